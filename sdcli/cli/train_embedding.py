"""`sdcli train-embedding`."""

from __future__ import annotations

from typing import Annotated

import typer

from sdcli.cli import options
from sdcli.cli.training import fetch, settings, show
from sdcli.train_specs import TrainEmbeddingSpec

# Options of this trainer alone; those of several are in options.py.
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
    spec = TrainEmbeddingSpec(**settings(locals()))
    fetch(spec.model, offline=spec.offline)
    from sdcli.training import embedding  # deferred: imports torch

    show(embedding.run(spec))
