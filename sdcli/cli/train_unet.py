"""`sdcli train-unet`."""

from __future__ import annotations

from typing import Annotated

import typer

from sdcli.cli import options, train_options
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
    data: train_options.Data,
    model: train_options.TrainModel = TrainUnetSpec.model,
    init: train_options.Init = TrainUnetSpec.init,
    vae: Vae = TrainUnetSpec.vae,
    run: train_options.Run = TrainUnetSpec.run,
    caption: train_options.Caption = TrainUnetSpec.caption,
    resolution: train_options.Resolution = TrainUnetSpec.resolution,
    buckets: train_options.Buckets = TrainUnetSpec.buckets,
    condition: Condition = TrainUnetSpec.condition,
    prediction: Prediction = TrainUnetSpec.prediction,
    loss: Loss = TrainUnetSpec.loss,
    snr_gamma: train_options.SnrGamma = TrainUnetSpec.snr_gamma,
    vlb_weight: train_options.VlbWeight = TrainUnetSpec.vlb_weight,
    offset_noise: train_options.OffsetNoise = TrainUnetSpec.offset_noise,
    zero_terminal_snr: ZeroTerminalSnr = TrainUnetSpec.zero_terminal_snr,
    caption_dropout: train_options.CaptionDropout = TrainUnetSpec.caption_dropout,
    train_text_encoder: TrainTextEncoder = TrainUnetSpec.train_text_encoder,
    lora_rank: LoraRank = TrainUnetSpec.lora_rank,
    lora_alpha: LoraAlpha = TrainUnetSpec.lora_alpha,
    batch_size: train_options.BatchSize = TrainUnetSpec.batch_size,
    accumulate: train_options.Accumulate = TrainUnetSpec.accumulate,
    steps: train_options.Steps = TrainUnetSpec.steps,
    optimizer: train_options.Optimizer = TrainUnetSpec.optimizer,
    lr: train_options.Lr = TrainUnetSpec.lr,
    lr_schedule: train_options.LrSchedule = TrainUnetSpec.lr_schedule,
    lr_warmup: train_options.LrWarmup = TrainUnetSpec.lr_warmup,
    weight_decay: train_options.WeightDecay = TrainUnetSpec.weight_decay,
    clip_norm: train_options.ClipNorm = TrainUnetSpec.clip_norm,
    ema: train_options.Ema = TrainUnetSpec.ema,
    mixed_precision: train_options.MixedPrecision = TrainUnetSpec.mixed_precision,
    gradient_checkpointing: train_options.GradientCheckpointing = TrainUnetSpec.gradient_checkpointing,
    compile: train_options.Compile = TrainUnetSpec.compile,
    seed: train_options.Seed = TrainUnetSpec.seed,
    holdout: train_options.Holdout = TrainUnetSpec.holdout,
    validate_every: train_options.ValidateEvery = TrainUnetSpec.validate_every,
    sample_every: train_options.SampleEvery = TrainUnetSpec.sample_every,
    sample_prompt: train_options.SamplePrompt = [],  # noqa: B006  typer copies it
    save_every: train_options.SaveEvery = TrainUnetSpec.save_every,
    keep: train_options.Keep = TrainUnetSpec.keep,
    stop_after: train_options.StopAfter = TrainUnetSpec.stop_after,
    dry_run: train_options.DryRun = TrainUnetSpec.dry_run,
    tracker: train_options.Tracker = TrainUnetSpec.tracker,
    workers: options.Workers = TrainUnetSpec.workers,
    device: options.Device = TrainUnetSpec.device,
    offline: options.Offline = TrainUnetSpec.offline,
    export: train_options.Export = TrainUnetSpec.export,
    export_dtype: train_options.ExportDtype = TrainUnetSpec.export_dtype,
    config: train_options.ConfigFile = None,
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
