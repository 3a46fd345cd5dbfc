"""What a picture says, and what the user says in place of it -> what `generate` is to draw, and with which model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdcli import hub, layout, store
from sdcli.archive.files import look_up
from sdcli.archive.foreign import Remark, shown
from sdcli.archive.hearing import hear, is_own
from sdcli.archive.specs import ReplaySpec
from sdcli.errors import InputError
from sdcli.pipeline.provenance import Provenance
from sdcli.plan.naming import SUFFIXES
from sdcli.plan.parts import prediction_word
from sdcli.specs import GenerateSpec

MAX_REFERENCE = 200  # characters of a model's name that are shown
LEAST_DIGITS = 10  # of a model's hash, that tell one: as many as A1111 writes
OF_THE_SCHEDULER = ("sigmas", "order", "eta", "timestep_spacing", "variance")


@dataclass(frozen=True)
class Asked:
    """What is to be drawn, and what of the picture's words cannot be honoured in it."""

    spec: GenerateSpec
    remarks: tuple[Remark, ...]
    model: str  # as the picture names it; the spec may say its commit, too


def form(spec: ReplaySpec, source: Path) -> str:
    """The format of a picture drawn again: the one asked for, else that of the picture by its name."""
    return spec.format if spec.format is not None else SUFFIXES.get(source.suffix.lower(), "png")


def ask(spec: ReplaySpec, said: Provenance, source: Path, target: Path | None) -> Asked:
    """What generate is to draw for a picture, and what of its words cannot be honoured in it.

    target: where it goes; None where it goes nowhere.
    Raises InputError for what the picture says or names, UsageError for what is out of range.
    """
    own = spec.settings()
    files = {name: getattr(spec, name) for name in ("init_image", "mask", "latents", "embedding", "lora")}
    given = frozenset(own) | {name for name, value in files.items() if value}
    heard = hear(said, source, given)
    found, of_files = look_up(heard.files, files, source)
    settings = _merged(heard.settings, own)
    if spec.prediction is None and "prediction" in settings and _names_another_model(spec, said):
        del settings["prediction"]  # that one predicts what it says itself
    dtype = settings.pop("dtype", "float32" if is_own(said) else GenerateSpec.dtype)
    tiling = settings.pop("tiling", False)  # without which its VAE gives another picture
    drawn = GenerateSpec(
        **settings,
        **found,
        model=_reference(spec, said, source),
        output=target if target is not None else Path("-"),
        format=form(spec, source) if target is None or str(target) == "-" else None,
        quality=spec.quality,
        if_exists=spec.if_exists,
        device=spec.device,
        offload=spec.offload,
        tiling=spec.tiling or tiling,
        dtype=spec.dtype if spec.dtype is not None else dtype,
        offline=spec.offline or spec.model is None,  # what a picture names opens no socket
    )
    called = spec.model if spec.model is not None else str(said.facts["model"])
    return Asked(drawn, (*heard.remarks, *of_files), called)


def model_remarks(spec: ReplaySpec, said: Provenance, model: store.Model, source: Path) -> list[Remark]:
    """Whether the model at hand is the one that drew the picture, as far as hashes tell.

    Raises InputError with `check` where it is another.
    """
    told = said.facts.get("model_hash")
    if not isinstance(told, str) or len(told) < LEAST_DIGITS:
        return [Remark("model hash", f"model {model.ref}: it may be another, the picture tells no hash")]
    if said.source != "sdcli" and not Path(model.ref).expanduser().is_file():
        what = f"model hash {shown(told)}: is of a file in another program, whether {model.ref} is it cannot be told"
        return [Remark("model hash", what)]
    found = store.model_hash(model)
    if found.startswith(told.lower()):
        return []
    what = f"model {model.ref}: is another, of hash {found[:LEAST_DIGITS]}, drawn was with {told[:LEAST_DIGITS]}"
    if spec.check:
        raise InputError(f"{source}: {what}", "name the one that drew it with --model, or leave --check out")
    named = str(said.facts.get("model"))
    pinned = _pinned(said, named)
    is_to_be_had = spec.model is None and pinned != named and model.revision != said.facts.get("model_revision")
    return [Remark("model hash", f"{what}; sdcli models pull {pinned} fetches that one" if is_to_be_had else what)]


def prediction_drift(spec: ReplaySpec, drawn: GenerateSpec, model: store.Model) -> list[str]:
    """Whether the model says of its UNet what the picture says, by which it is drawn.

    drawn: what `ask` gave. Where the two differ the model's config was edited, or `--prediction` had set it right.
    """
    if spec.prediction is not None or drawn.prediction is None:
        return []
    here = prediction_word(layout.config(model.folder, "scheduler"))
    return [f"prediction: {drawn.prediction} there, the model here says {here}"] if here != drawn.prediction else []


def _names_another_model(spec: ReplaySpec, said: Provenance) -> bool:
    """Whether `--model` is not the one that drew the picture, by their hashes."""
    if spec.model is None:
        return False
    told = said.facts.get("model_hash")
    return told != store.model_hash(store.find(spec.model, offline=spec.offline))


def _merged(heard: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What the picture says but for what the user says; another scheduler takes none of the options of the first."""
    settings = dict(heard)
    if "scheduler" in own:
        for name in OF_THE_SCHEDULER:
            settings.pop(name, None)
    if "size" in own:
        settings.pop("width", None)
        settings.pop("height", None)
    if own.get("guidance") == 1:  # off
        settings.pop("guidance_interval", None)
        settings.pop("guidance_rescale", None)
    return settings | dict(own)


def _reference(spec: ReplaySpec, said: Provenance, source: Path) -> str:
    """The model to draw a picture with. Raises InputError where it names none that is here."""
    if spec.model is not None:
        return spec.model
    told = said.facts.get("model")
    if not isinstance(told, str) or not told:
        raise InputError(f"{source}: does not say which model drew it", "name one with --model")
    if said.source != "sdcli" and hub.parse(told) is None:
        raise _lacking(source, told)
    pinned = _pinned(said, told)
    for ref in (pinned, told):
        try:
            store.resolve(ref, offline=True)
        except InputError as error:
            problem = error
        else:
            return ref
    raise _lacking(source, told, pinned) from problem


def _pinned(said: Provenance, told: str) -> str:
    """A model as the picture names it, and of one of the Hub the commit that drew it, where that is told."""
    hub_id, commit = hub.parse(told), said.facts.get("model_revision")
    if hub_id is None or not isinstance(commit, str) or not hub.COMMIT.fullmatch(commit):
        return told
    return str(replace(hub_id, revision=commit))


def _lacking(source: Path, told: str, pinned: str | None = None) -> InputError:
    what = f"{source}: was drawn with the model {told[:MAX_REFERENCE]}, which is not here by that name"
    is_to_be_had = pinned is not None and pinned != told
    return InputError(what, f"name one with --model{f', or sdcli models pull {pinned}' if is_to_be_had else ''}")
