"""Whether the tensors of a LoRA file make a change of a layer's shape, and of which rank. No torch.

| form | tensors of a layer with weight (out, in, *k)                          | dialects              |
|------|-----------------------------------------------------------------------|-----------------------|
| LoRA | down (r, in, *k), up (out, r); with mid (r, r, *k), down is (r, in)   | kohya, diffusers, old |
| LoHa | two pairs (out, r) and (r, in * k); with two t (r, r, *k), transposed | LyCORIS               |
| LoKr | w1 and w2, whose sizes multiply to the layer's, each whole or a pair  | LyCORIS               |

Beside them may stand alpha, a number by which r divides, and DoRA's magnitudes, one an output (or input) of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from sdcli.errors import InputError
from sdcli.pipeline.lora_names import Shape

MAX_RANK = 4096
MAGNITUDES = frozenset({"magnitude", "dora"})  # peft's, and those of kohya's scripts and LyCORIS
COMPLETE = {  # the tensors that make a form, but for alpha and the magnitudes
    "lora": ({"down", "up"}, {"down", "up", "mid"}),
    "loha": ({"w1_a", "w1_b", "w2_a", "w2_b"}, {"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}),
    "lokr": tuple(
        one | two for one in ({"w1"}, {"w1_a", "w1_b"}) for two in ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})
    ),
}


@dataclass
class Change:
    """How a layer is changed. keys: what a tensor is in the formula -> its key in the file."""

    part: str
    layer: str
    form: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    rank: int | None = None  # None where no tensor tells one: LoKr of two whole matrices
    alpha: float | None = None  # by the file's metadata; None: by a tensor, or as the rank
    is_root: bool = False  # whether alpha is divided by the rank's root: rsLoRA


def check_shapes(where: str, change: Change, shapes: Mapping[str, Shape], weight: Shape) -> None:
    """Set the rank of a change. Raises InputError unless its tensors make one of the layer's shape."""
    given = {role: shapes[key] for role, key in change.keys.items()}
    factors = {role: shape for role, shape in given.items() if role not in ("alpha", *MAGNITUDES)}
    name = f"{where}: {change.layer}"
    if set(factors) not in COMPLETE.get(change.form, ()) or given.keys() >= MAGNITUDES:
        held = ", ".join(sorted(given))
        raise InputError(f"{name}: {held} make no whole change", "get the file again")
    fits = {"lora": _lora_rank, "loha": _loha_rank, "lokr": _lokr_rank}[change.form]
    rank = fits(factors, weight)
    if rank == 0:
        told = ", ".join(f"{role} {shape}" for role, shape in sorted(factors.items()))
        raise InputError(f"{name}: {told} make no change of {weight}", "use one that was made for this model")
    if rank is not None and rank > MAX_RANK:
        raise InputError(f"{name}: has rank {rank:,}", f"at most {MAX_RANK:,} is read")
    change.rank = rank
    if math.prod(given.get("alpha", ())) != 1:
        raise InputError(f"{name}: alpha has shape {given['alpha']}", "expected is one number")
    for role, one in given.items():
        if role in MAGNITUDES and magnitude_axis(role, one, weight) is None:
            what = f"{name}: DoRA's magnitudes have shape {one}, the weight {weight}"
            raise InputError(what, "use one that was made for this model")


def magnitude_axis(role: str, shape: Shape, weight: Shape) -> int | None:
    """Of which axis of a layer's weight DoRA's magnitudes are: 0, one an output, or 1; None if of neither.

    peft's are one an output, whatever their shape; LyCORIS has them in the weight's shape with 1 for all other axes.
    """
    if math.prod(shape) == weight[0] and (role == "magnitude" or _trimmed(shape) == _trimmed(weight[:1])):
        return 0
    return 1 if role == "dora" and _trimmed(shape) == _trimmed((1, weight[1])) else None


def _trimmed(shape: Shape) -> Shape:
    """A shape without the ones at its end."""
    return shape if not shape or shape[-1] != 1 else _trimmed(shape[:-1])


def _lora_rank(given: Mapping[str, Shape], weight: Shape) -> int:
    """The rank of down, up and perhaps mid; 0 unless they fit each other and the layer."""
    down, up, mid = given["down"], given["up"], given.get("mid")
    kernel = weight[2:]
    rank = down[0] if down else 0
    if _trimmed(up[2:]) or up[:2] != (weight[0], rank) or len(down) < 2:
        return 0
    if mid is not None:
        fits = mid == (rank, rank, *kernel) and down[1] == weight[1] and not _trimmed(down[2:])
    else:
        fits = math.prod(down[1:]) == math.prod(weight[1:])
    return rank if fits else 0


def _loha_rank(given: Mapping[str, Shape], weight: Shape) -> int:
    rank = given["w1_b"][0] if given["w1_b"] else 0
    if "t1" in given:
        one = {"a": (rank, weight[0]), "b": (rank, weight[1])}
        fits = all(given[name] == (rank, rank, *weight[2:]) for name in ("t1", "t2"))
    else:
        one = {"a": (weight[0], rank), "b": (rank, math.prod(weight[1:]))}
        fits = True
    return rank if fits and all(given[f"{w}_{half}"] == one[half] for w in ("w1", "w2") for half in one) else 0


def _lokr_rank(given: Mapping[str, Shape], weight: Shape) -> int | None:
    """None where neither matrix is a product."""
    ranks = [given[name][0] for name in ("w1_b", "w2_b") if len(given.get(name, ())) > 1]
    first = given.get("w1") or _product(given["w1_a"], given["w1_b"])
    if "t2" in given:
        a, b, t = given["w2_a"], given["w2_b"], given["t2"]
        is_core = len(a) == len(b) == 2 and t == (a[0], b[0], *weight[2:]) and a[0] == b[0]
        second = (a[1], b[1], *weight[2:]) if is_core else ()
    else:
        second = given.get("w2") or _product(given["w2_a"], given["w2_b"])
    if len(first) != 2 or len(second) not in (2, len(weight)) or (len(second) == 4 and second[2:] != weight[2:]):
        return 0
    if first[0] * second[0] != weight[0] or first[1] * math.prod(second[1:]) != math.prod(weight[1:]):
        return 0
    return ranks[-1] if ranks else None


def _product(a: Shape, b: Shape) -> Shape:
    return (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] > 0 else ()
