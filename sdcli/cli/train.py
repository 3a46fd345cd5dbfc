"""`sdcli train-vae` and `sdcli train-unet`."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sdcli import output
from sdcli.cli import options
from sdcli.errors import Stopped
from sdcli.specs import TrainUnetSpec, TrainVaeSpec

if TYPE_CHECKING:
    from sdcli.training.loop import Report


def train_vae(
    data: options.Data,
    model: options.TrainModel = TrainVaeSpec.model,
    init: options.Init = TrainVaeSpec.init,
    run: options.Run = TrainVaeSpec.run,
    caption: options.Caption = TrainVaeSpec.caption,
    resolution: options.Resolution = TrainVaeSpec.resolution,
    random_crop: Annotated[
        bool,
        typer.Option(
            "--random-crop", help="Train on random squares at the pictures' own scale, not on whole pictures."
        ),
    ] = TrainVaeSpec.random_crop,
    l1_weight: Annotated[
        float, typer.Option("--l1-weight", help="Weight of the mean absolute error.")
    ] = TrainVaeSpec.l1_weight,
    l2_weight: Annotated[
        float, typer.Option("--l2-weight", help="Weight of the mean squared error.")
    ] = TrainVaeSpec.l2_weight,
    kl_weight: Annotated[
        float, typer.Option("--kl-weight", help="Weight of the KL divergence to N(0, I), a pixel value.")
    ] = TrainVaeSpec.kl_weight,
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
    vae: Annotated[
        str | None, typer.Option("--vae", metavar="REF", help="The VAE to stand on: a folder with vae/, or a model.")
    ] = TrainUnetSpec.vae,
    run: options.Run = TrainUnetSpec.run,
    caption: options.Caption = TrainUnetSpec.caption,
    resolution: options.Resolution = TrainUnetSpec.resolution,
    prediction: Annotated[
        str | None,
        typer.Option("--prediction", help="What the UNet predicts: epsilon or v. Default: as the model does."),
    ] = TrainUnetSpec.prediction,
    caption_dropout: Annotated[
        float, typer.Option("--caption-dropout", help="Share of captions left out, for guidance; 0 to 1.")
    ] = TrainUnetSpec.caption_dropout,
    train_text_encoder: Annotated[
        bool, typer.Option("--train-text-encoder", help="Train the text encoder along; otherwise it is frozen.")
    ] = TrainUnetSpec.train_text_encoder,
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


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments as its spec's fields: the names are the same, which a test holds."""
    return {name: value for name, value in given.items() if name not in options.SPEAKING}


def _show(reports: Iterator[Report]) -> None:
    from sdcli.training.loop import Finished, Paused, Preparing, Saved, StepDone

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
            elif isinstance(report, Paused):
                text = f"stopped at step {report.step} of {report.steps}; the same command goes on"
                output.result(text, {"step": report.step, "steps": report.steps, "export": None})
            elif isinstance(report, Finished):
                facts = ", ".join(f"{key} {value:.4g}" for key, value in report.summary.items())
                output.note(facts)
                output.result(str(report.export), {"export": str(report.export), **report.summary})
            if stop:
                stream.throw(Stopped(stop[0], "stopped; the same command goes on from here"))


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
