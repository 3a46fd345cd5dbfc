"""Which samples a training step sees, and all their chance: pure functions of the seed and the step.

So neither workers, ranks, the split of a batch nor the point of a resume can change what is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Draw(NamedTuple):
    """One showing of a sample: its index in the dataset, and the seed of all its chance."""

    sample: int
    seed: int

    def generator(self) -> torch.Generator:
        """A fresh source of this showing's noise, timestep, caption and crop."""
        return torch.Generator().manual_seed(self.seed)


class Order:
    """The batches of a run. Every group of samples is its own endless stream of shuffled laps.

    groups: samples that can lie in one batch, such as pictures of one shape; a batch is of one group. In a round,
    every group gives about as many batches as its samples fill, at least one.
    """

    def __init__(self, groups: Sequence[Sequence[int]], *, batch_size: int, seed: int) -> None:
        self.groups, self.batch_size, self.seed = groups, batch_size, seed
        self.shares = [max(1, round(len(group) / batch_size)) for group in groups]  # batches a round
        self.round_length = sum(self.shares)
        self._laps: dict[int, tuple[int, list[int]]] = {}  # group -> the lap looked at last, and its order
        self._round: tuple[int, list[tuple[int, int]]] = (-1, [])  # the round looked at last, and its turns

    def batch(self, step: int) -> list[Draw]:
        """The showings of step `step` (from 0), the same whenever they are asked for."""
        group, number = self._turn(step)
        members = self.groups[group]
        draws = []
        for place in range(self.batch_size):
            lap, index = divmod(number * self.batch_size + place, len(members))
            sample = members[self._lap(group, lap)[index]]
            draws.append(Draw(sample, mixed_seed(self.seed, step, place)))
        return draws

    def _turn(self, step: int) -> tuple[int, int]:
        """The group of a step, and which of that group's batches it is."""
        if len(self.groups) == 1:
            return 0, step
        number, index = divmod(step, self.round_length)
        if self._round[0] != number:
            self._round = (number, self._turns(number))
        return self._round[1][index]

    def _turns(self, number: int) -> list[tuple[int, int]]:
        """The group of every step of a round, and which of that group's batches it is."""
        turns = [group for group, share in enumerate(self.shares) for _ in range(share)]
        counts = [number * share for share in self.shares]
        found = []
        for i in _permutation(len(turns), self.seed, "turns", number):
            group = turns[i]
            found.append((group, counts[group]))
            counts[group] += 1
        return found

    def _lap(self, group: int, lap: int) -> list[int]:
        known = self._laps.get(group)
        if known is None or known[0] != lap:
            known = (lap, _permutation(len(self.groups[group]), self.seed, "order", group, lap))
            self._laps[group] = known
        return known[1]


def fixed(samples: Sequence[int], seed: int, purpose: str) -> list[Draw]:
    """The showings of samples outside training (validating, measuring): the same at every step of a run."""
    return [Draw(sample, mixed_seed(seed, purpose, sample)) for sample in samples]


def mixed_seed(*parts: int | str) -> int:
    """A 63-bit seed out of numbers and words, spread by a hash."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _permutation(count: int, *seed: int | str) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed(*seed))).tolist()
    return order
