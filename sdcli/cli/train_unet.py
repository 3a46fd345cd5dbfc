"""`sdcli train-unet`."""

from __future__ import annotations

from typing import Annotated

import typer

from sdcli.cli import options
from sdcli.cli.training import fetch, settings, show
from sdcli.train_specs import TrainUnetSpec

# Options of this trainer alone; those of several are in options.py.
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
    spec = TrainUnetSpec(**settings(locals()))
    fetch(spec.model, spec.vae, offline=spec.offline)
    from sdcli.training import unet  # deferred: imports torch

    show(unet.run(spec))
