"""What a picture says about its making, whichever program wrote it, under our own names."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcli.pipeline import exif
from sdcli.pipeline.comfy import nodes_besides, read_graph
from sdcli.pipeline.containers import Inside
from sdcli.pipeline.parameters import LEAST_PAIRS, Parameters, read_json, read_parameters

MAX_SEED = 2**64 - 1
A1111_NAMES = {
    "steps": ("Steps",),
    "sampler": ("Sampler",),
    "schedule": ("Schedule type",),
    "guidance": ("CFG scale",),
    "seed": ("Seed",),
    "model": ("Model",),
    "model_hash": ("Model hash",),
    "strength": ("Denoising strength",),
    "clip_skip": ("Clip skip",),
    "prompt_template": ("Template",),
    "negative_template": ("Negative Template",),
}
# Names of our fields in flat JSON and in single keys of other programs, in the order in which they are looked for.
FLAT_NAMES = {
    "prompt": ("positive_prompt", "prompt"),
    "negative": ("negative_prompt", "negative-prompt"),
    "seed": ("seed",),
    "steps": ("steps", "num_inference_steps"),
    "sampler": ("scheduler", "sampler", "sampler_name", "sampler_type"),
    "guidance": ("cfg_scale", "guidance_scale", "guidance", "scale", "prompt_strength"),
    "width": ("width",),
    "height": ("height",),
    "model": ("model", "base_model", "model_weights"),
    "model_hash": ("model_hash",),
    "strength": ("strength", "denoising_strength", "image_strength"),
    "clip_skip": ("clip_skip",),  # InvokeAI counts layers left out, as we do
}
INTEGERS = {"seed": MAX_SEED, "steps": 10_000, "width": 1 << 20, "height": 1 << 20, "clip_skip": 100}
NUMBERS = ("guidance", "strength")
# Of stable-diffusion.cpp's JSON what `facts` hold, and what says nothing of the picture.
SDCPP_USED = frozenset({
    *("schema", "mode", "generator", "seed", "width", "height", "clip_skip", "prompt.positive", "prompt.negative"),
    *("sampling.steps", "sampling.method", "sampling.scheduler", "sampling.guidance.txt_cfg", "models.model"),
})  # fmt: skip
MAX_DEPTH = 3  # to which nested JSON is taken apart
XMP_PARAMETERS = (
    ("<sdcpp:parameters>", "</sdcpp:parameters>"),
    ('sdcpp:parameters="', '"'),
)  # as element, as attribute
GRAPH = re.compile(r"(prompt|workflow):(?=\s*\{)")  # how ComfyUI begins what it writes into EXIF


@dataclass(frozen=True)
class Provenance:
    """Who wrote it (None: nothing is said), the facts by our names, and all texts of the file as they stand there.

    rest: what else the other program tells of the making, in its own words.
    """

    source: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)


def find_out(inside: Inside, path: Path) -> Provenance:
    """The first of the known forms in a file: ours, InvokeAI's, A1111's and its like, ComfyUI's, JSON, single keys.

    facts may have, besides ours, `sampler` and `schedule` in the words of the other program. What has no sense (a seed
    below 0) is left out of them. Warns (SdcliWarning) of text that is not in the encoding it claims.
    """
    texts = {**inside.texts, **exif.texts_of(inside.exif, path)}
    found = _xmp_parameters(inside.xmp)
    if found is not None:
        texts.setdefault("parameters", found)
    elif inside.xmp:
        texts["XMP"] = inside.xmp
    for reader in READERS:
        said = reader(texts)
        if said is not None:
            return Provenance(*said, texts)
    return Provenance(None, {}, {}, texts)


def _xmp_parameters(xmp: str) -> str | None:
    """What stands between an opener and the next closer; searched for once each, however many openers there are."""
    for opener, closer in XMP_PARAMETERS:
        at = xmp.find(opener)
        end = xmp.find(closer, at + len(opener)) if at >= 0 else -1
        if end >= 0:
            text = xmp[at + len(opener) : end]
            try:
                return html.unescape(text)
            except ValueError:  # a character whose number has thousands of digits
                return text
    return None


Said = tuple[str, dict[str, Any], dict[str, Any]] | None  # source, facts and rest


def _own(texts: Mapping[str, str]) -> Said:
    text = texts.get("sdcli", "")
    if not text and texts.get("ImageDescription", "").startswith("sdcli {"):
        text = texts["ImageDescription"].removeprefix("sdcli ")
    record = read_json(text) if text else None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        return None
    known = {name: value for name, value in record.items() if name in (*INTEGERS, *NUMBERS)}
    return "sdcli", {k: v for k, v in record.items() if k not in known} | _sound(known), {}


def _invoke(texts: Mapping[str, str]) -> Said:
    record = read_json(texts.get("invokeai_metadata", ""))
    return ("invokeai", _flat(record), _besides(record, FLAT_NAMES)) if isinstance(record, dict) else None


def _a1111(texts: Mapping[str, str]) -> Said:
    for key in ("parameters", "UserComment", "COM"):
        text = texts.get(key, "").removeprefix("parameters\0")
        if not text or text.lstrip().startswith("{"):
            continue
        read = read_parameters(text)
        if len(read.pairs) >= LEAST_PAIRS or read.sdcpp or key == "parameters":
            return _program(read), _facts_of(read), _rest_of(read)
    return None


def _comfy(texts: Mapping[str, str]) -> Said:
    found = {}
    for key in ("prompt", "workflow"):
        found[key] = texts.get(key, "")
    for tag in ("Make", "Model", "ImageDescription", "UserComment"):
        if begin := GRAPH.match(texts.get(tag, "")):
            found[begin[1]] = texts[tag][begin.end() :]
    graph, workflow = read_json(found["prompt"]), read_json(found["workflow"])
    if isinstance(graph, dict) and any(isinstance(node, dict) and "class_type" in node for node in graph.values()):
        return "comfyui", _sound(read_graph(graph)), nodes_besides(graph)
    return ("comfyui", {}, {}) if isinstance(workflow, dict) and "nodes" in workflow else None


def _json_comment(texts: Mapping[str, str]) -> Said:
    """mflux and imaginAIry write JSON into EXIF, Fooocus into `parameters`."""
    for key in ("UserComment", "parameters", "ImageDescription"):
        record = read_json(texts.get(key, "")) if "{" in texts.get(key, "")[:100] else None
        if not isinstance(record, dict):
            continue
        if isinstance(record.get("prompt"), dict):
            own = record["prompt"] | {"prompt": record["prompt"].get("prompt_text")}
            return "imaginairy", _flat(own), _besides(record["prompt"], FLAT_NAMES)
        if isinstance(record.get("prompt"), str):
            is_mflux = any(name.startswith("mflux") for name in record)
            return "mflux" if is_mflux else "json", _flat(record), _besides(record, FLAT_NAMES)
    return None


def _single_keys(texts: Mapping[str, str]) -> Said:
    if "prompt" not in texts or not {"seed", "steps", "sampler", "scale"} & texts.keys():
        return None
    return "kohya", _flat(texts), _besides(texts, FLAT_NAMES)


READERS: tuple[Callable[[Mapping[str, str]], Said], ...] = (_own, _invoke, _a1111, _comfy, _json_comment, _single_keys)


def _program(read: Parameters) -> str:
    version = str(read.pairs.get("Version", ""))
    if read.sdcpp or version.startswith("stable-diffusion.cpp"):
        return "stable-diffusion.cpp"
    return "sdcli" if version.startswith("sdcli") else "a1111"


def _facts_of(read: Parameters) -> dict[str, Any]:
    facts = _named(read.pairs, A1111_NAMES)
    size = re.fullmatch(r"(\d{1,9})x(\d{1,9})", str(read.pairs.get("Size", "")))
    if size:
        facts |= {"width": size[1], "height": size[2]}
    hashes = read.pairs.get("Hashes")
    if isinstance(hashes, dict) and "model" in hashes:  # Civitai's
        facts.setdefault("model_hash", hashes["model"])
    facts |= {"prompt": read.prompt, "negative": read.negative} | _sdcpp_facts(read.sdcpp)
    skip = _integer(facts.pop("clip_skip", None), 100)
    if skip is not None and skip >= 1:  # A1111 counts the last layer as 1
        facts["clip_skip"] = skip - 1
    return _sound(facts)


def _rest_of(read: Parameters) -> dict[str, Any]:
    if read.sdcpp:
        return dict(_leaves(read.sdcpp, "", SDCPP_USED))
    return {key: value for key, value in _besides(read.pairs, A1111_NAMES).items() if key != "Size"}


def _besides(record: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """What a record holds under other names than these."""
    used = {name for theirs in names.values() for name in theirs}
    return {name: value for name, value in record.items() if name not in used}


def _leaves(record: Mapping[str, Any], above: str, used: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """The values of nested JSON by their dotted names, those in use left out; lists stay whole."""
    for name, value in record.items():
        if f"{above}{name}" in used:
            continue
        if isinstance(value, dict) and above.count(".") < MAX_DEPTH:
            yield from _leaves(value, f"{above}{name}.", used)
        else:
            yield f"{above}{name}", value


def _sdcpp_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of the JSON that stable-diffusion.cpp ends its text with, which is exact where the text is not."""
    prompt, sampling, models = (_mapping(record.get(key)) for key in ("prompt", "sampling", "models"))
    facts = {
        "prompt": prompt.get("positive"),
        "negative": prompt.get("negative"),
        "steps": sampling.get("steps"),
        "sampler": sampling.get("method"),
        "schedule": sampling.get("scheduler"),
        "guidance": _mapping(sampling.get("guidance")).get("txt_cfg"),
        "model": models.get("model"),
        **{name: record.get(name) for name in ("seed", "width", "height", "clip_skip")},
    }
    return {name: value for name, value in facts.items() if value is not None}


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    facts = _named(record, FLAT_NAMES)
    model = facts.get("model")
    if isinstance(model, dict):  # InvokeAI's
        facts["model"] = model.get("name", model.get("model_name"))
        facts.setdefault("model_hash", model.get("hash"))
    return _sound(facts)


def _named(record: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    found = {
        ours: next((record[one] for one in theirs if record.get(one) is not None), None)
        for ours, theirs in names.items()
    }
    return {ours: value for ours, value in found.items() if value is not None}


def _sound(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of the types that ours have; what cannot be one is left out."""
    sound: dict[str, Any] = {}
    for name, value in facts.items():
        if name in INTEGERS:
            value = _integer(value, INTEGERS[name])
        elif name in NUMBERS:
            value = _number(value)
        elif not isinstance(value, str):
            value = str(value) if type(value) in (int, float) else None
        if value is not None:
            sound[name] = value
    return sound


def _integer(value: object, most: int) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,20}\s*", value, re.ASCII):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= most else None


def _number(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
