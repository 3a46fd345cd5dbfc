"""ComfyUI's `prompt` JSON, a graph of nodes: what it was that drew the picture."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

MAX_NODES = 10_000
OUTPUTS = ("SaveImage", "PreviewImage", "SaveAnimated")  # beginnings of the names of what shows a picture
SEEDS = ("seed", "noise_seed")
TEXTS = ("text", "text_g", "text_l", "prompt", "string", "value", "t5xxl", "clip_l")
MODELS = ("ckpt_name", "unet_name", "model_name")
NO_TEXT = "ConditioningZeroOut"  # what stands above it is not used
# Nodes of which `read_graph` tells all there is to say.
UNDERSTOOD = frozenset({
    *("KSampler", "KSamplerSelect", "SamplerCustom", "SamplerCustomAdvanced", "BasicScheduler", "RandomNoise"),
    *("CFGGuider", "BasicGuider", "CheckpointLoaderSimple", "CheckpointLoader", "UNETLoader", "CLIPTextEncode"),
    *("CLIPSetLastLayer", "EmptyLatentImage", "VAEDecode", "VAEEncode", "SaveImage", "PreviewImage", "Reroute"),
    *("Note", "MarkdownNote", "PrimitiveNode", "PrimitiveInt", "PrimitiveFloat", "PrimitiveString", NO_TEXT),
})  # fmt: skip
Graph = Mapping[str, Any]


def read_graph(graph: Graph) -> dict[str, Any]:
    """Prompt, negative, seed, steps, sampler, guidance, size and model of the sampler next to the picture shown.

    Links are followed from inputs to what feeds them, each node once, so that a circle ends. What is not found is left
    out; nodes of extensions are understood as far as their inputs have ComfyUI's names.
    """
    if len(graph) > MAX_NODES:
        return {}
    sampler = _sampler(graph)
    if sampler is None:
        return {}
    found = {
        "prompt": _text(graph, sampler, ("positive", "conditioning"), "negative"),
        "negative": _text(graph, sampler, ("negative",), "positive"),
        "seed": _first(graph, sampler, SEEDS, int),
        "steps": _first(graph, sampler, ("steps",), int),
        "sampler": _first(graph, sampler, ("sampler_name",), str),
        "schedule": _first(graph, sampler, ("scheduler",), str),
        "guidance": _first(graph, sampler, ("cfg", "guidance"), (int, float)),
        "width": _first(graph, sampler, ("width",), int, through=("latent_image", "samples", "pixels")),
        "height": _first(graph, sampler, ("height",), int, through=("latent_image", "samples", "pixels")),
        "model": _first(graph, sampler, MODELS, str, alone=("model", "guider")),
        "strength": _first(graph, sampler, ("denoise",), (int, float)),
    }
    last = _first(graph, sampler, ("stop_at_clip_layer",), int)  # -1: the last one
    if last is not None and last < 0:
        found["clip_skip"] = -last - 1
    return {name: value for name, value in found.items() if value is not None}


def nodes_besides(graph: Graph) -> dict[str, Any]:
    """The kinds of nodes that `read_graph` tells nothing of, each with the first text among its inputs, or none.

    Samplers count if there is more than one, of which the facts tell one.
    """
    besides: dict[str, Any] = {}
    for name in list(graph)[:MAX_NODES]:
        kind = _kind(graph, name)
        if kind and kind not in UNDERSTOOD:
            texts = (value for value in _inputs(graph, name).values() if isinstance(value, str))
            besides.setdefault(kind, next(texts, ""))
    if (count := len(_samplers(graph))) > 1:
        besides["samplers"] = count
    return besides


def _samplers(graph: Graph) -> list[str]:
    kinds = {name: _kind(graph, name) for name in graph}
    samplers = [name for name, kind in kinds.items() if "KSampler" in kind and kind != "KSamplerSelect"]
    return samplers + [name for name, kind in kinds.items() if kind.startswith("SamplerCustom")]


def _sampler(graph: Graph) -> str | None:
    """The sampler nearest to a node that shows a picture, else the first there is.

    One that adds no noise only if there is no other: it goes on, as a refiner's does, from what another began.
    """
    samplers = _samplers(graph)
    samplers = [name for name in samplers if _inputs(graph, name).get("add_noise") != "disable"] or samplers
    known = set(samplers)
    seen: set[str] = set()  # of all walks: above a node where one has been, there is no sampler
    for name in graph:
        if name not in seen and _kind(graph, name).startswith(OUTPUTS):
            for above in _upward(graph, name, seen=seen):
                if above in known:
                    return above
    return samplers[0] if samplers else None


def _text(graph: Graph, sampler: str, inputs: tuple[str, ...], other: str) -> str | None:
    """The first text above a conditioning input of the sampler or, with a guider between them, of that.

    The empty text where there is none but a conditioning that is zeroed out.
    """
    for name in _upward(graph, sampler, not_through=(other,)):
        given = _inputs(graph, name)
        for key in inputs:
            start = _link(graph, given.get(key))
            if start is not None:
                found: str | None = _first(graph, start, TEXTS, str, not_through=(other,))
                if found is None and any(
                    _kind(graph, n) == NO_TEXT for n in _upward(graph, start, not_through=(other,))
                ):
                    return ""
                return found
    return None


def _first(
    graph: Graph,
    start: str,
    keys: tuple[str, ...],
    kind: type | tuple[type, ...],
    *,
    through: tuple[str, ...] = (),
    not_through: tuple[str, ...] = (),
    alone: tuple[str, ...] = (),
) -> Any:
    """The first plain value of one of these names, from a node upward."""
    asked: set[str] = set()  # nodes that have no number to give: each is searched once, however many inputs it has
    for name in _upward(graph, start, through=through, not_through=not_through, alone=alone):
        given = _inputs(graph, name)
        for key in keys:
            value = given.get(key)
            if isinstance(value, kind) and not isinstance(value, bool):
                return value
            source = _link(graph, value)
            if source is not None and source not in asked and key not in TEXTS:  # a number from a node of its own
                asked.add(source)
                for number in _inputs(graph, source).values():
                    if isinstance(number, kind) and not isinstance(number, bool):
                        return number
    return None


def _upward(
    graph: Graph,
    start: str,
    *,
    through: tuple[str, ...] = (),
    not_through: tuple[str, ...] = (),
    alone: tuple[str, ...] = (),
    seen: set[str] | None = None,
) -> Iterator[str]:
    """A node and those that feed it, nearest first, but for those seen, to which they are added, and those zeroed out.

    through: from the start only by inputs of these names; alone: from every node.
    """
    seen = set() if seen is None else seen
    seen.add(start)
    waiting = deque([start])
    while waiting:
        name = waiting.popleft()
        yield name
        if _kind(graph, name) == NO_TEXT:
            continue
        for key, value in _inputs(graph, name).items():
            source = _link(graph, value)
            if (
                source is None
                or source in seen
                or key in not_through
                or (name == start and through and key not in through)
                or (alone and key not in alone)
            ):
                continue
            seen.add(source)
            waiting.append(source)


def _inputs(graph: Graph, name: str) -> Mapping[str, Any]:
    node = graph.get(name)
    given = node.get("inputs") if isinstance(node, dict) else None
    return given if isinstance(given, dict) else {}


def _kind(graph: Graph, name: str) -> str:
    node = graph.get(name)
    return str(node.get("class_type", "")) if isinstance(node, dict) else ""


def _link(graph: Graph, value: object) -> str | None:
    """The node that an input comes from: links are [node, number of its output]."""
    name = value[0] if isinstance(value, list) and len(value) == 2 else None
    return name if isinstance(name, str) and name in graph else None
