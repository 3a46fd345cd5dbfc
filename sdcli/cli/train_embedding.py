"""`sdcli train-embedding`."""

from __future__ import annotations

from typing import Annotated

import typer

from sdcli.cli import options, train_options
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
    data: train_options.Data,
    token: Token,
    init_token: InitToken,
    model: train_options.TrainModel = TrainEmbeddingSpec.model,
    vectors: Vectors = TrainEmbeddingSpec.vectors,
    kind: Kind = TrainEmbeddingSpec.kind,
    run: train_options.Run = TrainEmbeddingSpec.run,
    caption: train_options.Caption = TrainEmbeddingSpec.caption,
    resolution: train_options.Resolution = TrainEmbeddingSpec.resolution,
    buckets: train_options.Buckets = TrainEmbeddingSpec.buckets,
    loss: EmbeddingLoss = TrainEmbeddingSpec.loss,
    snr_gamma: train_options.SnrGamma = TrainEmbeddingSpec.snr_gamma,
    offset_noise: train_options.OffsetNoise = TrainEmbeddingSpec.offset_noise,
    caption_dropout: train_options.CaptionDropout = TrainEmbeddingSpec.caption_dropout,
    batch_size: train_options.BatchSize = TrainEmbeddingSpec.batch_size,
    accumulate: train_options.Accumulate = TrainEmbeddingSpec.accumulate,
    steps: train_options.Steps = TrainEmbeddingSpec.steps,
    optimizer: train_options.Optimizer = TrainEmbeddingSpec.optimizer,
    lr: train_options.Lr = TrainEmbeddingSpec.lr,
    lr_schedule: train_options.LrSchedule = TrainEmbeddingSpec.lr_schedule,
    lr_warmup: train_options.LrWarmup = TrainEmbeddingSpec.lr_warmup,
    weight_decay: train_options.WeightDecay = TrainEmbeddingSpec.weight_decay,
    clip_norm: train_options.ClipNorm = TrainEmbeddingSpec.clip_norm,
    ema: train_options.Ema = TrainEmbeddingSpec.ema,
    mixed_precision: train_options.MixedPrecision = TrainEmbeddingSpec.mixed_precision,
    gradient_checkpointing: train_options.GradientCheckpointing = TrainEmbeddingSpec.gradient_checkpointing,
    compile: train_options.Compile = TrainEmbeddingSpec.compile,
    seed: train_options.Seed = TrainEmbeddingSpec.seed,
    holdout: train_options.Holdout = TrainEmbeddingSpec.holdout,
    validate_every: train_options.ValidateEvery = TrainEmbeddingSpec.validate_every,
    sample_every: train_options.SampleEvery = TrainEmbeddingSpec.sample_every,
    sample_prompt: train_options.SamplePrompt = [],  # noqa: B006  typer copies it
    save_every: train_options.SaveEvery = TrainEmbeddingSpec.save_every,
    keep: train_options.Keep = TrainEmbeddingSpec.keep,
    stop_after: train_options.StopAfter = TrainEmbeddingSpec.stop_after,
    dry_run: train_options.DryRun = TrainEmbeddingSpec.dry_run,
    tracker: train_options.Tracker = TrainEmbeddingSpec.tracker,
    workers: options.Workers = TrainEmbeddingSpec.workers,
    device: options.Device = TrainEmbeddingSpec.device,
    offline: options.Offline = TrainEmbeddingSpec.offline,
    export: train_options.Export = TrainEmbeddingSpec.export,
    config: train_options.ConfigFile = None,
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
