"""`sdcli train-vae`, `sdcli train-unet` and `sdcli train-embedding`."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sdcli import output
from sdcli.cli import options
from sdcli.errors import Stopped
from sdcli.train_specs import TrainEmbeddingSpec, TrainUnetSpec, TrainVaeSpec

if TYPE_CHECKING:
    from sdcli.training.loop import Report

# Options of one trainer alone; those of several are in options.py.
RandomCrop = Annotated[
    bool,
    typer.Option("--random-crop", help="Train on random squares at the pictures' own scale, not on whole pictures."),
]
Regularizer = Annotated[
    str | None,
    typer.Option("--regularizer", help="kl (a posterior) or vq (a codebook). Default: the model's own, else kl."),
]
CodebookSize = Annotated[int, typer.Option("--codebook-size", help="Codes of vq, 2 to 2^20.")]
L1Weight = Annotated[float, typer.Option("--l1-weight", help="Weight of the mean absolute error, 0 or more.")]
L2Weight = Annotated[float, typer.Option("--l2-weight", help="Weight of the mean squared error, 0 or more.")]
LearnLogvar = Annotated[
    bool, typer.Option("--learn-logvar", help="Learn the scale of the reconstruction error along, as one number.")
]
PerceptualWeight = Annotated[
    float, typer.Option("--perceptual-weight", help="Weight of how different the pictures look, 0 or more.")
]
PerceptualNetwork = Annotated[
    str,
    typer.Option(
        "--perceptual-network",
        metavar="FILE",
        help="What looks: LPIPS with a file of VGG16 weights, builtin, or auto: LPIPS if torch.hub has the file.",
    ),
]
KlWeight = Annotated[
    float, typer.Option("--kl-weight", help="Weight of the KL divergence to N(0, I), a pixel value; 0 or more.")
]
CodebookWeight = Annotated[
    float, typer.Option("--codebook-weight", help="Weight of the codebook loss of vq, 0 or more.")
]
DiscWeight = Annotated[
    float, typer.Option("--disc-weight", help="Weight of the adversarial term, 0 (no discriminator) or more.")
]
DiscLoss = Annotated[str, typer.Option("--disc-loss", help="Loss of the discriminator: hinge or vanilla.")]
DiscStart = Annotated[
    int,
    typer.Option(
        "--disc-start", help="The step the discriminator begins with, 0 or more; it never does beyond --steps."
    ),
]
DiscWarmup = Annotated[
    int, typer.Option("--disc-warmup", help="Steps in which the adversarial term rises to its weight, 0 or more.")
]
DiscLayers = Annotated[
    int, typer.Option("--disc-layers", help="Halvings in the discriminator, 1 to 8; more judge larger patches.")
]
DiscWidth = Annotated[
    int, typer.Option("--disc-width", help="Channels of its first layer, a multiple of 16 up to 1024.")
]
AdaptiveWeight = Annotated[
    bool,
    typer.Option(
        "--adaptive-weight/--no-adaptive-weight",
        help="Scale the adversarial term so that its gradient is as large as that of the reconstruction.",
    ),
]
Vae = Annotated[
    str | None, typer.Option("--vae", metavar="REF", help="The VAE to stand on: a folder with vae/, or a model.")
]
Condition = Annotated[
    str | None,
    typer.Option("--condition", help="With --init: text, class (one folder of pictures a class) or none."),
]
Prediction = Annotated[
    str | None,
    typer.Option("--prediction", help="What the UNet predicts: epsilon, v or x0. Default: as the model does."),
]
Loss = Annotated[
    str,
    typer.Option("--loss", help="simple, min-snr, or hybrid: simple and the variational bound of the variance."),
]
ZeroTerminalSnr = Annotated[
    bool,
    typer.Option("--zero-terminal-snr", help="Let the last timestep be pure noise; needs --prediction v or x0."),
]
TrainTextEncoder = Annotated[
    bool, typer.Option("--train-text-encoder", help="Train the text encoder along; otherwise it is frozen.")
]
LoraRank = Annotated[
    int | None,
    typer.Option("--lora-rank", metavar="N", help="Train a LoRA of this rank, 1 to 1024, instead of the model."),
]
LoraAlpha = Annotated[
    float | None, typer.Option("--lora-alpha", help="It counts alpha / rank, above 0. Default: the rank.")
]
Token = Annotated[
    str, typer.Option("--token", metavar="WORD", help="What prompts shall call what the pictures show: '<my-cat>'.")
]
InitToken = Annotated[str, typer.Option("--init-token", metavar="TEXT", help="What the new word begins as: cat.")]
Vectors = Annotated[
    int, typer.Option("--vectors", help="Vectors that stand for the word, 1 to 75: tokens it takes of a prompt.")
]
Kind = Annotated[
    str, typer.Option("--kind", help="What the word names, for pictures without a caption: object or style.")
]
EmbeddingLoss = Annotated[str, typer.Option("--loss", help="simple or min-snr.")]


def train_vae(
    data: options.Data,
    model: options.TrainModel = TrainVaeSpec.model,
    init: options.Init = TrainVaeSpec.init,
    run: options.Run = TrainVaeSpec.run,
    caption: options.Caption = TrainVaeSpec.caption,
    resolution: options.Resolution = TrainVaeSpec.resolution,
    random_crop: RandomCrop = TrainVaeSpec.random_crop,
    regularizer: Regularizer = TrainVaeSpec.regularizer,
    codebook_size: CodebookSize = TrainVaeSpec.codebook_size,
    l1_weight: L1Weight = TrainVaeSpec.l1_weight,
    l2_weight: L2Weight = TrainVaeSpec.l2_weight,
    learn_logvar: LearnLogvar = TrainVaeSpec.learn_logvar,
    perceptual_weight: PerceptualWeight = TrainVaeSpec.perceptual_weight,
    perceptual_network: PerceptualNetwork = TrainVaeSpec.perceptual_network,
    kl_weight: KlWeight = TrainVaeSpec.kl_weight,
    codebook_weight: CodebookWeight = TrainVaeSpec.codebook_weight,
    disc_weight: DiscWeight = TrainVaeSpec.disc_weight,
    disc_loss: DiscLoss = TrainVaeSpec.disc_loss,
    disc_start: DiscStart = TrainVaeSpec.disc_start,
    disc_warmup: DiscWarmup = TrainVaeSpec.disc_warmup,
    disc_layers: DiscLayers = TrainVaeSpec.disc_layers,
    disc_width: DiscWidth = TrainVaeSpec.disc_width,
    adaptive_weight: AdaptiveWeight = TrainVaeSpec.adaptive_weight,
    batch_size: options.BatchSize = TrainVaeSpec.batch_size,
    accumulate: options.Accumulate = TrainVaeSpec.accumulate,
    steps: options.Steps = TrainVaeSpec.steps,
    optimizer: options.Optimizer = TrainVaeSpec.optimizer,
    lr: options.Lr = TrainVaeSpec.lr,
    lr_schedule: options.LrSchedule = TrainVaeSpec.lr_schedule,
    lr_warmup: options.LrWarmup = TrainVaeSpec.lr_warmup,
    weight_decay: options.WeightDecay = TrainVaeSpec.weight_decay,
    clip_norm: options.ClipNorm = TrainVaeSpec.clip_norm,
    ema: options.Ema = TrainVaeSpec.ema,
    mixed_precision: options.MixedPrecision = TrainVaeSpec.mixed_precision,
    gradient_checkpointing: options.GradientCheckpointing = TrainVaeSpec.gradient_checkpointing,
    seed: options.Seed = TrainVaeSpec.seed,
    holdout: options.Holdout = TrainVaeSpec.holdout,
    validate_every: options.ValidateEvery = TrainVaeSpec.validate_every,
    sample_every: options.SampleEvery = TrainVaeSpec.sample_every,
    save_every: options.SaveEvery = TrainVaeSpec.save_every,
    keep: options.Keep = TrainVaeSpec.keep,
    stop_after: options.StopAfter = TrainVaeSpec.stop_after,
    dry_run: options.DryRun = TrainVaeSpec.dry_run,
    tracker: options.Tracker = TrainVaeSpec.tracker,
    workers: options.Workers = TrainVaeSpec.workers,
    device: options.Device = TrainVaeSpec.device,
    offline: options.Offline = TrainVaeSpec.offline,
    export: options.Export = TrainVaeSpec.export,
    export_dtype: options.ExportDtype = TrainVaeSpec.export_dtype,
    config: options.ConfigFile = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a VAE: the model's own further, or one from scratch (--init). The same command again resumes.

    Writes RUN/export/vae in the diffusers layout, with the scaling factor measured over the data.
    """
    spec = TrainVaeSpec(**_settings(locals()))
    from sdcli.training import vae  # deferred: imports torch

    _show(vae.run(spec))


def train_unet(
    data: options.Data,
    model: options.TrainModel = TrainUnetSpec.model,
    init: options.Init = TrainUnetSpec.init,
    vae: Vae = TrainUnetSpec.vae,
    run: options.Run = TrainUnetSpec.run,
    caption: options.Caption = TrainUnetSpec.caption,
    resolution: options.Resolution = TrainUnetSpec.resolution,
    buckets: options.Buckets = TrainUnetSpec.buckets,
    condition: Condition = TrainUnetSpec.condition,
    prediction: Prediction = TrainUnetSpec.prediction,
    loss: Loss = TrainUnetSpec.loss,
    snr_gamma: options.SnrGamma = TrainUnetSpec.snr_gamma,
    vlb_weight: options.VlbWeight = TrainUnetSpec.vlb_weight,
    offset_noise: options.OffsetNoise = TrainUnetSpec.offset_noise,
    zero_terminal_snr: ZeroTerminalSnr = TrainUnetSpec.zero_terminal_snr,
    caption_dropout: options.CaptionDropout = TrainUnetSpec.caption_dropout,
    train_text_encoder: TrainTextEncoder = TrainUnetSpec.train_text_encoder,
    lora_rank: LoraRank = TrainUnetSpec.lora_rank,
    lora_alpha: LoraAlpha = TrainUnetSpec.lora_alpha,
    batch_size: options.BatchSize = TrainUnetSpec.batch_size,
    accumulate: options.Accumulate = TrainUnetSpec.accumulate,
    steps: options.Steps = TrainUnetSpec.steps,
    optimizer: options.Optimizer = TrainUnetSpec.optimizer,
    lr: options.Lr = TrainUnetSpec.lr,
    lr_schedule: options.LrSchedule = TrainUnetSpec.lr_schedule,
    lr_warmup: options.LrWarmup = TrainUnetSpec.lr_warmup,
    weight_decay: options.WeightDecay = TrainUnetSpec.weight_decay,
    clip_norm: options.ClipNorm = TrainUnetSpec.clip_norm,
    ema: options.Ema = TrainUnetSpec.ema,
    mixed_precision: options.MixedPrecision = TrainUnetSpec.mixed_precision,
    gradient_checkpointing: options.GradientCheckpointing = TrainUnetSpec.gradient_checkpointing,
    seed: options.Seed = TrainUnetSpec.seed,
    holdout: options.Holdout = TrainUnetSpec.holdout,
    validate_every: options.ValidateEvery = TrainUnetSpec.validate_every,
    sample_every: options.SampleEvery = TrainUnetSpec.sample_every,
    sample_prompt: options.SamplePrompt = [],  # noqa: B006  typer copies it
    save_every: options.SaveEvery = TrainUnetSpec.save_every,
    keep: options.Keep = TrainUnetSpec.keep,
    stop_after: options.StopAfter = TrainUnetSpec.stop_after,
    dry_run: options.DryRun = TrainUnetSpec.dry_run,
    tracker: options.Tracker = TrainUnetSpec.tracker,
    workers: options.Workers = TrainUnetSpec.workers,
    device: options.Device = TrainUnetSpec.device,
    offline: options.Offline = TrainUnetSpec.offline,
    export: options.Export = TrainUnetSpec.export,
    export_dtype: options.ExportDtype = TrainUnetSpec.export_dtype,
    config: options.ConfigFile = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a UNet on captioned pictures: the model's own further, or one from scratch (--init with --vae).

    The same command again resumes. RUN/export is a whole model: sdcli generate "..." --model RUN/export
    """
    spec = TrainUnetSpec(**_settings(locals()))
    from sdcli.training import unet  # deferred: imports torch

    _show(unet.run(spec))


def train_embedding(
    data: options.Data,
    token: Token,
    init_token: InitToken,
    model: options.TrainModel = TrainEmbeddingSpec.model,
    vectors: Vectors = TrainEmbeddingSpec.vectors,
    kind: Kind = TrainEmbeddingSpec.kind,
    run: options.Run = TrainEmbeddingSpec.run,
    caption: options.Caption = TrainEmbeddingSpec.caption,
    resolution: options.Resolution = TrainEmbeddingSpec.resolution,
    buckets: options.Buckets = TrainEmbeddingSpec.buckets,
    loss: EmbeddingLoss = TrainEmbeddingSpec.loss,
    snr_gamma: options.SnrGamma = TrainEmbeddingSpec.snr_gamma,
    offset_noise: options.OffsetNoise = TrainEmbeddingSpec.offset_noise,
    caption_dropout: options.CaptionDropout = TrainEmbeddingSpec.caption_dropout,
    batch_size: options.BatchSize = TrainEmbeddingSpec.batch_size,
    accumulate: options.Accumulate = TrainEmbeddingSpec.accumulate,
    steps: options.Steps = TrainEmbeddingSpec.steps,
    optimizer: options.Optimizer = TrainEmbeddingSpec.optimizer,
    lr: options.Lr = TrainEmbeddingSpec.lr,
    lr_schedule: options.LrSchedule = TrainEmbeddingSpec.lr_schedule,
    lr_warmup: options.LrWarmup = TrainEmbeddingSpec.lr_warmup,
    weight_decay: options.WeightDecay = TrainEmbeddingSpec.weight_decay,
    clip_norm: options.ClipNorm = TrainEmbeddingSpec.clip_norm,
    ema: options.Ema = TrainEmbeddingSpec.ema,
    mixed_precision: options.MixedPrecision = TrainEmbeddingSpec.mixed_precision,
    gradient_checkpointing: options.GradientCheckpointing = TrainEmbeddingSpec.gradient_checkpointing,
    seed: options.Seed = TrainEmbeddingSpec.seed,
    holdout: options.Holdout = TrainEmbeddingSpec.holdout,
    validate_every: options.ValidateEvery = TrainEmbeddingSpec.validate_every,
    sample_every: options.SampleEvery = TrainEmbeddingSpec.sample_every,
    sample_prompt: options.SamplePrompt = [],  # noqa: B006  typer copies it
    save_every: options.SaveEvery = TrainEmbeddingSpec.save_every,
    keep: options.Keep = TrainEmbeddingSpec.keep,
    stop_after: options.StopAfter = TrainEmbeddingSpec.stop_after,
    dry_run: options.DryRun = TrainEmbeddingSpec.dry_run,
    tracker: options.Tracker = TrainEmbeddingSpec.tracker,
    workers: options.Workers = TrainEmbeddingSpec.workers,
    device: options.Device = TrainEmbeddingSpec.device,
    offline: options.Offline = TrainEmbeddingSpec.offline,
    export: options.Export = TrainEmbeddingSpec.export,
    config: options.ConfigFile = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Learn a new word for what some pictures show (textual inversion); the model stays as it is.

    The same command again resumes. RUN/export has the word for A1111, diffusers and kohya:
    sdcli generate "a picture of <my-cat>" --embedding RUN/export/my-cat.safetensors
    """
    spec = TrainEmbeddingSpec(**_settings(locals()))
    from sdcli.training import embedding  # deferred: imports torch

    _show(embedding.run(spec))


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments as its spec's fields: the names are the same, which a test holds."""
    kept = {name: value for name, value in given.items() if name not in options.NO_SETTINGS}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}


def _show(reports: Iterator[Report]) -> None:
    from sdcli.training.loop import Finished, Paused, Planned, Preparing, Saved, StepDone, Validated

    if os.environ.get("RANK", "0") != "0":  # of the processes that accelerate launched, the first one speaks
        output.mute()
    stream = cast("Generator[Report, None, None]", reports)
    with output.progress() as bar, _deferred_signals() as stop:
        for report in stream:
            if isinstance(report, Preparing):
                bar.update(report.what, report.done, report.total)
            elif isinstance(report, StepDone):
                info = f"loss {report.terms['loss']:.4f}  {report.images_per_second:.1f} images/s"
                bar.update("training", report.step, report.steps, info)
            elif isinstance(report, Saved):
                output.note(f"saved {report.path}")
            elif isinstance(report, Validated):
                output.note(f"step {report.step}, on held-out pictures: {_facts(report.terms)}")
            elif isinstance(report, Planned):
                output.document(report.facts)
            elif isinstance(report, Paused):
                text = f"stopped at step {report.step} of {report.steps}; the same command goes on"
                output.result(text, {"step": report.step, "steps": report.steps, "export": None})
            elif isinstance(report, Finished):
                output.note(_facts(report.summary))
                output.result(str(report.export), {"export": str(report.export), **report.summary})
            if stop:
                stream.throw(Stopped(stop[0], "stopped; the same command goes on from here"))


def _facts(terms: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in terms.items())


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collect INT, TERM and HUP instead of dying of them, so that training stops between two steps, saved."""
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    heeded = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, remember) for number in heeded}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
