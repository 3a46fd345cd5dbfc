"""STORY: a model in any form -> a folder in the diffusers layout, or a single file in its authors' naming."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdcli import layout, store
from sdcli.checks import PREDICTIONS
from sdcli.errors import InputError, OutputError
from sdcli.files import atomic_folder, check_writable, exists, folder_for, is_folder, remove_dead_parts
from sdcli.model_specs import ConvertSpec
from sdcli.original.checkpoint import CONFIGS, SCALES
from sdcli.original.names import SD1, SDXL
from sdcli.pipeline import known_words, single_file
from sdcli.pipeline.bundle import build_part, copy_tokenizer, part_config, write_index, write_part
from sdcli.pipeline.vocabulary import load_vocabulary
from sdcli.pipeline.weights import State, check_shapes, read_state, shapes, write_tensors
from sdcli.plan.parts import configs_shape
from sdcli.schedulers.config import check_config

Config = dict[str, Any]


@dataclass(frozen=True)
class Gathered:
    """All that a model is made of, its tensors mapped from wherever they are."""

    configs: Mapping[str, Config]  # by part, and of the scheduler
    states: Mapping[str, State]
    text_place: Path  # whose tokenizers they are
    encoders: tuple[str, ...]  # of text; none where something else conditions the UNet
    settings: Config
    is_empty_zero: bool  # of XL, as `layout.is_empty_zero` tells
    words: frozenset[str] | None  # that it saw while it learned; None where it does not say


def run(spec: ConvertSpec) -> dict[str, Any]:
    """Write a model in the form asked for, whole or not at all; returns what was written.

    Raises InputError for a model that is not whole or not sound, UsageError for options that do not fit it,
    NumericalError for weights that are not finite in the type asked for, OutputError when the target exists.
    """
    if exists(spec.output):
        raise OutputError(f"{spec.output}: exists", "name another")
    check_writable(spec.output.parent)
    gathered = _gather(spec)
    dtype = getattr(torch, spec.dtype) if spec.dtype != "auto" else None
    write = _write_folder if spec.form == "diffusers" else _write_file
    with folder_for(spec.output):
        write(spec.output, gathered, dtype)
    written = [path for path in spec.output.rglob("*") if path.is_file()] if is_folder(spec.output) else [spec.output]
    return {
        "path": str(spec.output),
        "to": spec.form,
        "prediction_type": gathered.configs["scheduler"].get("prediction_type", "epsilon"),
        "tensors": {part: len(state) for part, state in gathered.states.items()},
        "bytes": sum(path.stat().st_size for path in written),
    }


def _gather(spec: ConvertSpec) -> Gathered:
    """Read what is to be written. Raises InputError when a part is missing, or fits no config or no other part."""
    given = {"vae": spec.vae, "text_encoder": spec.text_encoder}
    named = {part: ref for part, ref in given.items() if ref is not None}
    substitutes = {part: store.place_of(ref, part, offline=spec.offline) for part, ref in named.items()}
    needs = [part for part in store.PARTS_OF_A_WHOLE if part not in substitutes]
    model = store.resolve(spec.model, offline=spec.offline, needs=needs)
    text_place = substitutes.get("text_encoder", model.folder)
    encoders = layout.encoders(text_place)
    places = dict.fromkeys(("unet", "vae"), model.folder) | {k: v for k, v in substitutes.items() if k == "vae"}
    places |= dict.fromkeys(encoders or (layout.conditioner(model.folder),), text_place)
    prediction = PREDICTIONS[spec.prediction] if spec.prediction is not None else None
    configs, states = {}, {}
    for part, place in places.items():
        module = build_part(place, part, layout.config(place, part, prediction))
        configs[part] = part_config(module)
        states[part] = read_state(place, part, averaged=spec.ema and part == "unet")
        check_shapes(place, part, shapes(module.state_dict()), shapes(states[part]))
    configs["vae"] |= _scale_of_family(places["vae"], configs["unet"])
    configs["scheduler"] = layout.config(model.folder, "scheduler", prediction)
    check_config(configs["scheduler"])
    configs_shape(model.folder, configs, configs["scheduler"], may_read_mask=True)
    if encoders:
        load_vocabulary(text_place)  # whether there are tokenizers, and their pieces have rows in the tables
    is_empty_zero = encoders != layout.ENCODERS or layout.is_empty_zero(model.folder)
    seen = known_words.read(model.folder) if text_place == model.folder else None  # another encoder knows others
    return Gathered(configs, states, text_place, encoders, store.settings(model), is_empty_zero, seen)


def _scale_of_family(place: Path, unet: Config) -> Config:
    """What a VAE alone in a single file does not tell, XL's being shaped as others: the scale of its latents."""
    checkpoint = layout.single_file(place)
    if checkpoint is None or checkpoint.sources.keys() != {"vae"} or CONFIGS in checkpoint.header.metadata:
        return {}
    is_xl = unet.get("addition_embed_type") == layout.XL_EMBEDDING
    return {"scaling_factor": SCALES[SDXL if is_xl else SD1], "force_upcast": is_xl}


def _write_folder(target: Path, model: Gathered, dtype: torch.dtype | None) -> None:
    with atomic_folder(target) as folder:
        for part, state in model.states.items():
            (folder / part).mkdir()
            write_part(folder / part, model.configs[part], state, dtype)
        (folder / "scheduler").mkdir()
        layout.write_json(folder / "scheduler" / "scheduler_config.json", model.configs["scheduler"])
        for encoder in model.encoders:
            source = layout.tokenizer(model.text_place, encoder)
            copy_tokenizer(source, folder / layout.TOKENIZERS[encoder], encoder)
        classes = (model.configs[part]["_class_name"] for part in ("vae", "scheduler"))
        write_index(folder, *classes, is_empty_zero=model.is_empty_zero)
        layout.write_json(folder / "sdcli.json", model.settings)
        if model.words is not None:
            known_words.write(folder, model.words)


def _write_file(target: Path, model: Gathered, dtype: torch.dtype | None) -> None:
    if not model.encoders:
        raise InputError("a model without a text encoder: a single file has no place for it", "keep the folder")
    own: dict[str, Config] = {"settings": model.settings}
    for encoder in model.encoders:
        own[layout.TOKENIZERS[encoder]] = {"pad_token": single_file.pad_token(model.text_place, encoder)}
    if not model.is_empty_zero:
        own["index"] = {"force_zeros_for_empty_prompt": False}
    state = single_file.original_state(model.configs, model.states)
    said = single_file.metadata(model.configs, own, target.stem)
    remove_dead_parts(target.parent)
    try:
        write_tensors(target, state, said, dtype, overwrite=False)
    except FileExistsError as error:
        raise OutputError(f"{target}: exists", "name another") from error
