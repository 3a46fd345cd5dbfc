"""A spec and the model's own settings -> everything decided, before anything heavy is imported. No torch."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sdcli import layout, schedulers, store
from sdcli.checks import MAX_SEED, PREDICTIONS, parse_interval, parse_size
from sdcli.errors import InputError, UsageError
from sdcli.pipeline import known_words
from sdcli.pipeline.wildcards import Prompts
from sdcli.plan.beside import Beside, arrange
from sdcli.plan.conditioning import Label, asked_label
from sdcli.plan.initial import (
    InitialPicture,
    initial_picture,
    size_of_latents,
    size_of_picture,
    warn_of_latents,
    warn_of_other_loras,
)
from sdcli.plan.lora_files import LoraFile, check_fit, lora_file
from sdcli.plan.naming import latent_targets, targets
from sdcli.plan.parts import check_clip_skip, check_multiple, parts_shape, prediction_word
from sdcli.plan.words import (
    EmbeddingFile,
    check_embeddings,
    check_no_words,
    check_text,
    drawn_prompts,
    embedding_file,
    read_prompts,
)
from sdcli.specs import GenerateSpec, WordSwap, word_swaps

DEFAULT_STEPS = 25
DEFAULT_SCHEDULER = "dpm"
DEFAULT_GUIDANCE = 7.5
DRAWN_SEED_BITS = 32  # short enough to be typed again
OWN_TYPES: dict[str, tuple[type, ...]] = {
    "scheduler": (str,),
    "steps": (int,),
    "guidance": (int, float),
    "size": (str,),
}


@dataclass(frozen=True)
class Plan:
    """What `generate` is going to do."""

    model: store.Model
    scheduler: schedulers.Scheduler
    scheduler_config: dict[str, Any]
    steps: int
    guidance: float
    guidance_interval: tuple[float, float]  # shares of the steps
    guidance_rescale: float
    label: Label | None  # the class to draw; None where a prompt says what, or nothing does
    width: int  # px
    height: int  # px
    seeds: tuple[int, ...]
    prompts: tuple[Prompts, ...]  # of each image, wildcards drawn by its seed
    targets: tuple[Path, ...]  # where each image goes; `-` is stdout
    loras: tuple[LoraFile, ...] = ()
    embeddings: tuple[EmbeddingFile, ...] = ()
    swaps: tuple[WordSwap, ...] = ()
    clip_skip: int = 0
    known_words: frozenset[str] | None = None  # that the model saw; None where it, or what is added to it, does not say
    latents: Path | None = None  # a file with the initial noise, in place of that of the seed
    initial: InitialPicture | None = None
    latent_targets: tuple[Path, ...] = ()  # where the final latents of each image go; none unless asked for
    beside: Beside = field(default_factory=Beside)

    @property
    def prediction(self) -> str:
        """What the UNet predicts, in the words of `--prediction`."""
        return prediction_word(self.scheduler_config)

    @property
    def evaluations(self) -> int:
        """Calls of the UNet an image."""
        steps = self.steps if self.initial is None else self.initial.steps
        return self.scheduler.evaluations(steps) if steps > 0 else 0

    def guidance_facts(self) -> dict[str, Any]:
        """What a record says of guidance besides its scale, by the options' names; nothing where it is as usual."""
        facts: dict[str, Any] = {}
        if self.guidance <= 1:
            return facts
        if self.guidance_interval != (0.0, 1.0):
            facts["guidance_interval"] = "{:g}:{:g}".format(*self.guidance_interval)
        if self.guidance_rescale > 0:
            facts["guidance_rescale"] = self.guidance_rescale
        return facts

    def describe(self) -> dict[str, Any]:
        """The decisions as plain values, for --dry-run."""
        rows: dict[str, Any] = {
            "model": self.model.ref,
            **self.model.pinned(),
            "folder": str(self.model.folder),
            "scheduler": self.scheduler.name,
            "class": self.scheduler.class_name,
            "overrides": dict(self.scheduler.overrides),
            **({"step_arguments": dict(self.scheduler.step_arguments)} if self.scheduler.step_arguments else {}),
            "prediction": self.prediction,
            "steps": self.steps,
            "evaluations": self.evaluations,
            "guidance": self.guidance,
            **self.guidance_facts(),
            **({"label": asdict(self.label)} if self.label is not None else {}),
            "size": f"{self.width}x{self.height}",
            "seeds": list(self.seeds),
            **self._drawn(),
            "outputs": [str(path) for path in self.targets],
        }
        if self.loras:
            rows["loras"] = [one.describe() for one in self.loras]
        if self.embeddings:
            rows["embeddings"] = [{"file": str(one.path), "token": one.token} for one in self.embeddings]
        if self.swaps:
            rows["swaps"] = [swap.option for swap in self.swaps]
        if self.clip_skip:
            rows["clip_skip"] = self.clip_skip
        if self.latents is not None:
            rows["latents"] = str(self.latents)
        if self.initial is not None:
            rows |= self.initial.describe()
        if self.latent_targets:
            rows["save_latents"] = [str(path) for path in self.latent_targets]
        return rows | self.beside.describe(self.evaluations)

    def _drawn(self) -> dict[str, Any]:
        """What the wildcards of each image drew, where there are some."""
        first, rows = self.prompts[0].facts(), dict[str, Any]()
        if "prompt_template" in first:
            rows |= {"prompt_template": first["prompt_template"], "prompts": [one.prompt for one in self.prompts]}
        if "negative_template" in first:
            rows |= {"negative_template": first["negative_template"]}
            rows |= {"negatives": [one.negative for one in self.prompts]}
        return rows


def plan(spec: GenerateSpec, *, may_lack_picture: bool = False) -> Plan:
    """Resolve every default and refuse whatever can be refused without a tensor.

    may_lack_picture: whether a model for inpainting may be given none, as by options that jobs add theirs to.
    Raises UsageError for an option that is out of range or does not fit the model, and for a weight in a prompt that
    is, InputError for a model that is missing or malformed, OutputError when the pictures could not be written.
    """
    templates = read_prompts(spec)
    for text in (*spec.replace, *spec.mix):
        check_text(text)
    if spec.scheduler is not None:
        _chosen(spec.scheduler, spec)  # a wrong name is told before a wrong model
    embeddings = tuple(embedding_file(text) for text in spec.embedding)
    loras = tuple(lora_file(text) for text in spec.lora)
    model = store.resolve(spec.model, offline=spec.offline)
    classes = layout.classes(model.folder)
    label = asked_label(spec, classes)
    swaps = word_swaps(spec.replace, spec.mix)
    if classes is not None:
        check_no_words(embeddings, swaps)
    check_embeddings(embeddings, model.folder)
    check_clip_skip(model.folder, spec.clip_skip)
    own = own_settings(model)
    scheduler = _chosen(_first(spec.scheduler, own.get("scheduler"), DEFAULT_SCHEDULER), spec)
    config = scheduler_config(model, spec.prediction)
    steps = _first(spec.steps, own.get("steps"), DEFAULT_STEPS)
    schedulers.check_steps(scheduler, steps, config)
    guidance = _guidance(spec, own)
    width, height = _size(spec, model, own, config)
    check_fit(loras, model.folder)
    is_left_out = may_lack_picture and spec.init_image is None
    initial = None if is_left_out else initial_picture(spec, model.folder, scheduler, steps)
    seed = spec.seed if spec.seed is not None else secrets.randbits(DRAWN_SEED_BITS)
    seeds = tuple((seed + i) % (MAX_SEED + 1) for i in range(spec.count))
    prompts = tuple(drawn_prompts(*templates, one) for one in seeds)
    subjects = [one.prompt if label is None else label.name for one in prompts]
    guidance = 1.0 if classes == () else float(guidance)  # of an unconditional model there is nothing to guide
    named = {"scheduler": scheduler.name, "steps": steps, "guidance": guidance, "width": width, "height": height}
    _warn_of_latents(spec, named, scheduler, config, loras)
    named["model"] = Path(model.ref).name
    decided = Plan(
        model=model,
        scheduler=scheduler,
        scheduler_config=config,
        steps=steps,
        guidance=guidance,
        guidance_interval=parse_interval(spec.guidance_interval),
        guidance_rescale=spec.guidance_rescale,
        label=label,
        width=width,
        height=height,
        seeds=seeds,
        prompts=prompts,
        targets=targets(spec, seeds, subjects, named),
        loras=loras,
        embeddings=embeddings,
        swaps=swaps,
        clip_skip=spec.clip_skip,
        known_words=known_words.read(model.folder) if not loras else None,
        latents=spec.latents,
        initial=initial,
        latent_targets=latent_targets(spec, seeds, subjects),
    )
    paths, beside = arrange(spec, decided.targets, decided.evaluations, named)
    return replace(decided, targets=paths, beside=beside)


def _chosen(name: str, spec: GenerateSpec) -> schedulers.Scheduler:
    """The scheduler of this name with the options given for it. Raises UsageError for one it does not take."""
    return schedulers.choose(
        schedulers.find(name),
        sigmas=spec.sigmas,
        order=spec.order,
        eta=spec.eta,
        timestep_spacing=spec.timestep_spacing,
        variance=spec.variance,
    )


def scheduler_config(model: store.Model, prediction: str | None) -> dict[str, Any]:
    """A model's noise schedule, and what its UNet predicts unless the user says. Raises InputError."""
    return layout.config(model.folder, "scheduler", PREDICTIONS[prediction] if prediction is not None else None)


def own_settings(model: store.Model) -> dict[str, Any]:
    """What the model's own sdcli.json says about drawing. Raises InputError when a value is out of range."""
    path, own = model.folder / "sdcli.json", store.settings(model)
    found = {name: own[name] for name in OWN_TYPES if own.get(name) is not None}
    for name, value in found.items():
        if type(value) not in OWN_TYPES[name]:
            raise InputError(f"{path}:{name}: is {value!r}", f"expected is {OWN_TYPES[name][-1].__name__}")
    try:
        GenerateSpec(**found)
        schedulers.find(found.get("scheduler", DEFAULT_SCHEDULER))
    except UsageError as error:
        raise InputError(f"{path}: {error.message}", "mend the file") from error
    return found


def _size(
    spec: GenerateSpec, model: store.Model, own: dict[str, Any], scheduler: Mapping[str, object]
) -> tuple[int, int]:
    """Width and height in px. Raises UsageError unless both are multiples of the VAE factor."""
    factor, native = parts_shape(model.folder, scheduler, may_read_mask=True)
    if spec.latents is not None:
        return size_of_latents(spec, spec.latents, model)
    if spec.init_image is not None:
        width, height = size_of_picture(spec, spec.init_image, model.folder, native)
    elif spec.size is not None:
        width, height = parse_size(spec.size)
    else:
        native_width, native_height = parse_size(str(own.get("size", f"{native}x{native}")))
        width, height = _first(spec.width, native_width), _first(spec.height, native_height)
    check_multiple((width, height), factor)
    return width, height


def _guidance(spec: GenerateSpec, own: dict[str, Any]) -> float:
    """How strongly images are guided. Raises UsageError for options of guidance where there is none."""
    found: float = _first(spec.guidance, own.get("guidance"), DEFAULT_GUIDANCE)
    if found <= 1 and (spec.guidance_interval != GenerateSpec.guidance_interval or spec.guidance_rescale > 0):
        what = "--guidance-interval and --guidance-rescale change nothing at --guidance 1"
        raise UsageError(what, "leave them out, or guide by more")
    return found


def _warn_of_latents(
    spec: GenerateSpec,
    named: Mapping[str, Any],
    scheduler: schedulers.Scheduler,
    config: dict[str, Any],
    loras: tuple[LoraFile, ...],
) -> None:
    """Warn where the latents to start from were made in another way than they are drawn with."""
    if spec.latents is not None:
        how = {**named, "clip_skip": spec.clip_skip, "prediction": prediction_word(config)}
        warn_of_latents(spec.latents, how, scheduler, config)
        warn_of_other_loras(spec.latents, loras)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
