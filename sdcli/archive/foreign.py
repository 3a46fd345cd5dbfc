"""What other programs say of a picture's making -> our settings, and a remark on each thing we cannot do likewise."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdcli import schedulers
from sdcli.archive.reading import has_usual_schedule
from sdcli.errors import UsageError
from sdcli.pipeline.prompt import NETWORK, networks
from sdcli.pipeline.provenance import Provenance
from sdcli.pipeline.wildcards import template

MAX_SHOWN = 60  # characters of a value in a remark
BRACES = re.compile(r"(?<!\\)([{}|])")
WEIGHTS = re.compile(r"\([^()]*:\s*[\d.]+\)|\[[^\[\]]+\]|[\w)][+-]{1,4}(?=[\s,]|$)|\)\d")
OTHER_GRAMMAR = ("comfyui", "invokeai")  # weights in prompts mean something else there
GROUPS = (
    "Hires",
    "VAE",
    "ControlNet",
    "ADetailer",
    "Refiner",
    "Variation",
    "Token",
    "Tiled",
    "FreeU",
    "Dynamic",
    "Schedule",
)
DIRECT = ("prompt", "negative", "seed", "steps", "guidance", "width", "height")
CHOICES = ("sigmas", "order", "timestep_spacing")
# Where programs tell of files that an option of ours names, and that option's field.
FILES = {"Lora hashes": "lora", "TI hashes": "embedding", "loras": "lora", "LoraLoader": "lora"}
FILES |= {"LoraLoaderModelOnly": "lora"}
# What says nothing of the picture, or is said by something else, by program; all else is remarked on.
SILENT: Mapping[str, frozenset[str]] = {
    "a1111": frozenset({
        *("Version", "User", "Created Date", "Hashes", "Template", "Negative Template", "Civitai resources"),
        *("Civitai metadata", "Init image hash", "RNG", "Eta", "Image CFG scale"),
    }),
    "sdcli": frozenset({
        *("Version", "RNG", "Eta", "Class", "Class index", "Replace", "Mix", "Init image hash"),
    }),
    "stable-diffusion.cpp": frozenset({
        *("Version", "RNG", "rng", "Eta", "Guidance", "strength", "control_strength", "ip_adapter_strength"),
        *("auto_resize_ref_image", "increase_ref_index", "sampling.flow_shift", "sampling.guidance.img_cfg"),
        *("sampling.guidance.distilled_guidance", "sampling.guidance.slg.layers", "sampling.guidance.slg.start"),
        *("sampling.guidance.slg.end", "models.clip_l", "models.diffusion_model", "batch_count", "image_count"),
    }),
    "invokeai": frozenset({
        *("generation_mode", "app_version", "rand_device", "cfg_rescale_multiplier", "init_image"),
        *("canvas_v2_metadata", "positive_style_prompt", "negative_style_prompt"),
    }),
    "mflux": frozenset({
        *("mflux_version", "generation_time_seconds", "generation_time", "created_at", "precision", "image_path"),
    }),
    "comfyui": frozenset({"LoadImage"}),
}  # fmt: skip
NOISE_OF = {  # where the noise of a seed is not that of torch on the CPU
    "a1111": "its noise is drawn on a GPU unless it says RNG: CPU",
    "stable-diffusion.cpp": "its noise is that of its own generators",
    "invokeai": "its noise was drawn on a GPU",
    "mflux": "its noise is that of MLX",
    "imaginairy": "its noise is drawn in its own way",
    "kohya": "its noise is drawn in its own way",
}


@dataclass(frozen=True)
class Remark:
    """Something that is not honoured. about: of what kind, equal for equal things of other pictures."""

    about: str
    text: str


def others(said: Provenance, given: frozenset[str]) -> tuple[dict[str, Any], str | None, list[Remark]]:
    """Settings by GenerateSpec's fields, the name of the picture it started from, and what is not honoured.

    given: fields that the user says in place of the picture, of which nothing is remarked.
    """
    facts, rest, source = said.facts, said.rest, str(said.source)
    settings = {name: facts[name] for name in DIRECT if name in facts}
    remarks = [
        *_prompts(settings, source),
        *_guidance(settings),
        *_scheduler(facts, settings),
        *_strength(facts, rest, settings, source),
        *_options(facts, rest, settings, source),
        *_noise(rest, source),
        *_unheeded(rest, settings, source),
    ]
    named = {"scheduler": "scheduler", "network": "lora", **FILES}
    return settings, _init_image(rest), [one for one in remarks if named.get(one.about, one.about) not in given]


def shown(value: object) -> str:
    """A value in a few characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _prompts(settings: dict[str, Any], source: str) -> Iterator[Remark]:
    """Take networks out of the prompts, as A1111 does before it reads them."""
    for name in ("prompt", "negative"):
        text = settings.get(name, "")
        for network in networks(text):
            yield Remark("network", f"{shown(network)}: is left out; name the file of this network with --lora")
        settings[name] = _literal(NETWORK.sub("", text).strip())
        if source in OTHER_GRAMMAR and WEIGHTS.search(text):
            yield Remark("weights", f"weights in the {name}: are read as A1111 means them, not as {source} does")


def _literal(text: str) -> str:
    """A prompt whose braces with bars are no wildcards: what stands there was drawn already."""
    return BRACES.sub(r"\\\1", text) if template(text).has_wildcards else text


def _guidance(settings: dict[str, Any]) -> Iterator[Remark]:
    if settings.get("guidance", 1) < 1:
        yield Remark("guidance", f"guidance {settings['guidance']:g}: becomes 1, which is none")
        settings["guidance"] = 1.0


def _scheduler(facts: Mapping[str, Any], settings: dict[str, Any]) -> Iterator[Remark]:
    name = facts.get("scheduler")
    if name is None:
        if "sampler" in facts:
            yield Remark(
                "scheduler", f"sampler {shown(facts['sampler'])}: there is none like it, the model's own draws"
            )
        return
    settings |= {"scheduler": name, **{key: facts[key] for key in CHOICES if key in facts}}
    if not has_usual_schedule(dict(facts)) and not {"sigmas", "timestep_spacing"} & settings.keys():
        yield Remark("schedule", f"schedule {shown(facts['schedule'])}: {name} has none like it, its usual one is used")


def _strength(
    facts: Mapping[str, Any], rest: Mapping[str, Any], settings: dict[str, Any], source: str
) -> Iterator[Remark]:
    """The strength of image to image: of a second pass it is none, and 1 is what starts from noise alone."""
    strength = facts.get("strength", 1.0)
    is_from_text = "txt2img" in str(rest.get("generation_mode", ""))
    if strength < 1 and not is_from_text and not any(name.startswith("Hires") for name in rest):
        settings["strength"] = max(0.0, strength)
        if "width" in settings and source == "comfyui":
            yield Remark("size", "its size: is told of an empty latent, the picture's own may differ")


def _options(
    facts: Mapping[str, Any], rest: Mapping[str, Any], settings: dict[str, Any], source: str
) -> Iterator[Remark]:
    """What has an option of ours, if the program's word for it is known."""
    if facts.get("clip_skip"):
        settings["clip_skip"] = facts["clip_skip"]
    rescale = rest.get("cfg_rescale_multiplier")
    if source == "invokeai" and isinstance(rescale, int | float) and 0 < rescale <= 1:
        settings["guidance_rescale"] = float(rescale)
    if "Eta" in rest and not (source == "stable-diffusion.cpp" and re.fullmatch(r"0(\.0*)?", str(rest["Eta"]))):
        yield from _eta(rest["Eta"], settings)  # which that program writes for all and uses in some
    if source == "sdcli":  # our own text, whose record is gone
        settings |= {"class_name": str(rest["Class"])} if "Class" in rest else {}
        for name in ("Replace", "Mix"):
            if name in rest:
                settings[name.lower()] = tuple(str(rest[name]).split("; "))


def _eta(value: object, settings: dict[str, Any]) -> Iterator[Remark]:
    try:
        eta = float(str(value))
        takes = schedulers.find(str(settings.get("scheduler", ""))).default_eta is not None
    except (ValueError, UsageError):
        eta, takes = -1.0, False
    if takes and 0 <= eta <= 1:
        settings["eta"] = eta
    else:
        yield Remark("Eta", f"Eta {shown(value)}: this scheduler takes none")


def _noise(rest: Mapping[str, Any], source: str) -> Iterator[Remark]:
    place = str(rest.get("RNG", rest.get("rng", rest.get("rand_device", "")))).lower()
    if source not in NOISE_OF or place == "cpu" or (source == "invokeai" and not place):
        return
    told = f" ({shown(place)})" if place else ""
    yield Remark("noise", f"noise{told}: {NOISE_OF[source]}, here on the CPU by torch: another picture of the seed")


def _unheeded(rest: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> Iterator[Remark]:
    """All else that says something, keys of one extension together."""
    groups: dict[str, list[str]] = {}
    for name, value in rest.items():
        if name in SILENT.get(source, frozenset()) or value in (None, False, "", 0, "0", "None") or value in ([], {}):
            continue
        first = re.split(r"[ .]", name)[0]
        first = "hrf" if name.startswith("hrf_") else first  # InvokeAI's second pass
        groups.setdefault(first if first in GROUPS or first in ("hires", "hrf", "sampling") else name, []).append(name)
    for group, enabled in (("hires", "hires.enabled"), ("hrf", "hrf_enabled")):
        if rest.get(enabled) is False:
            groups.pop(group, None)
    for group, names in groups.items():
        told = ", ".join(f"{name} {shown(rest[name])}".rstrip() for name in names)
        why = f"name its file with --{FILES[group]}" if group in FILES else "there is nothing like it here"
        yield Remark(group, f"{shown(told)}: is not honoured, {why}")


def _init_image(rest: Mapping[str, Any]) -> str | None:
    """The name of the picture it started from, as ComfyUI, InvokeAI and mflux tell it."""
    for told in (rest.get("LoadImage"), rest.get("init_image"), rest.get("image_path")):
        name = told.get("image_name") if isinstance(told, dict) else told
        if isinstance(name, str) and name:
            return name
    return None
