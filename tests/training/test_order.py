"""The order of samples: pure functions of the seed and the step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from sdcli.training.order import Draw, Order, fixed


def order_of(count: int, batch_size: int, seed: int = 0) -> Order:
    return Order([range(count)], batch_size=batch_size, seed=seed)


def lap(number: int, *, count: int, seed: int, batch_size: int) -> list[int]:
    """One lap's samples, read off the batches that cover it."""
    first, last = number * count, (number + 1) * count
    steps = range(first // batch_size, (last - 1) // batch_size + 1)
    ids = [draw.sample for step in steps for draw in order_of(count, batch_size, seed).batch(step)]
    skipped = first - steps[0] * batch_size
    return ids[skipped : skipped + count]


@pytest.mark.parametrize(("count", "batch_size"), [(6, 4), (6, 6), (5, 16), (1, 3), (7, 1)])
def test_every_lap_is_a_permutation_of_all_samples(count: int, batch_size: int) -> None:
    for number in range(5):
        assert sorted(lap(number, count=count, seed=3, batch_size=batch_size)) == list(range(count))


def test_a_laps_order_depends_on_seed_and_lap_and_not_on_the_batch_size() -> None:
    def order(number: int, seed: int, batch_size: int) -> list[int]:
        return lap(number, count=20, seed=seed, batch_size=batch_size)

    assert order(2, 3, 4) == order(2, 3, 7) == order(2, 3, 64)
    assert order(2, 3, 4) != order(1, 3, 4)
    assert order(2, 3, 4) != order(2, 4, 4)


def test_the_batches_of_a_run_use_every_sample_equally_often() -> None:
    order = order_of(6, 4)
    used = Counter(draw.sample for step in range(15) for draw in order.batch(step))
    assert used == dict.fromkeys(range(6), 10)


def test_batches_may_be_asked_for_in_any_order_and_again() -> None:
    order = Order([range(5), range(5, 12)], batch_size=4, seed=1)
    steps = [7, 0, 3, 7, 40, 1, 0]
    assert [order.batch(step) for step in steps] == [
        Order([range(5), range(5, 12)], batch_size=4, seed=1).batch(step) for step in steps
    ]


def test_a_batch_is_of_one_group_and_groups_come_as_often_as_their_samples_fill_batches() -> None:
    groups = [range(4), range(4, 12), range(12, 13)]  # 1, 2 and at least 1 batches of 4 a round
    order = Order(groups, batch_size=4, seed=0)
    turns = []
    for step in range(40):
        (group,) = {next(g for g, members in enumerate(groups) if d.sample in members) for d in order.batch(step)}
        turns.append(group)
    assert all(Counter(turns[first : first + 4]) == {0: 1, 1: 2, 2: 1} for first in range(0, 40, 4))
    assert len({tuple(turns[first : first + 4]) for first in range(0, 40, 4)}) > 1  # the rounds are shuffled


def test_within_a_group_every_sample_comes_equally_often() -> None:
    order = Order([range(5), range(5, 8)], batch_size=4, seed=2)  # one batch of each a round
    used = Counter(draw.sample for step in range(2 * 15) for draw in order.batch(step))
    assert used == {**dict.fromkeys(range(5), 12), **dict.fromkeys(range(5, 8), 20)}


def test_the_order_has_no_part_in_torchs_own_stream_of_chance() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = order_of(6, 4).batch(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert order_of(6, 4).batch(5) == first


def test_no_two_showings_share_their_chance_not_even_of_one_sample_in_one_batch() -> None:
    order = order_of(3, 16)
    draws = [draw for step in range(20) for draw in order.batch(step)]
    assert len({draw.seed for draw in draws}) == len(draws)
    assert {draw.seed for draw in order_of(3, 16, seed=1).batch(0)}.isdisjoint(draw.seed for draw in draws)


def test_fixed_showings_depend_on_sample_and_purpose_and_are_none_of_training() -> None:
    assert fixed([2, 0], 0, "validate") == [fixed([2], 0, "validate")[0], fixed([0], 0, "validate")[0]]
    assert fixed([2], 0, "measure") != fixed([2], 0, "validate") != fixed([2], 1, "validate")


def test_a_draws_generator_begins_anew_each_time() -> None:
    draw = Draw(0, 5)
    assert torch.equal(torch.randn(3, generator=draw.generator()), torch.randn(3, generator=draw.generator()))


def test_the_largest_seed_is_no_trouble() -> None:
    assert [draw.sample for draw in order_of(6, 6, seed=2**64 - 1).batch(10**9)] != list(range(6))
