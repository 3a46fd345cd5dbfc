"""`sdcli train-vae`."""

from __future__ import annotations

from typing import Annotated

import typer

from sdcli.cli import options, train_options
from sdcli.cli.training import fetch, settings, show
from sdcli.train_specs import TrainVaeSpec

# Options of this trainer alone; those of several are in options.py.
RandomCrop = Annotated[
    bool,
    typer.Option("--random-crop", help="Train on random squares at the pictures' own scale, not on whole pictures."),
]
FreezeEncoder = Annotated[
    bool,
    typer.Option("--freeze-encoder", help="Train the decoder alone: latents stay those that the model's UNet knows."),
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


def train_vae(
    data: train_options.Data,
    model: train_options.TrainModel = TrainVaeSpec.model,
    init: train_options.Init = TrainVaeSpec.init,
    run: train_options.Run = TrainVaeSpec.run,
    caption: train_options.Caption = TrainVaeSpec.caption,
    resolution: train_options.Resolution = TrainVaeSpec.resolution,
    random_crop: RandomCrop = TrainVaeSpec.random_crop,
    freeze_encoder: FreezeEncoder = TrainVaeSpec.freeze_encoder,
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
    batch_size: train_options.BatchSize = TrainVaeSpec.batch_size,
    accumulate: train_options.Accumulate = TrainVaeSpec.accumulate,
    steps: train_options.Steps = TrainVaeSpec.steps,
    optimizer: train_options.Optimizer = TrainVaeSpec.optimizer,
    lr: train_options.Lr = TrainVaeSpec.lr,
    lr_schedule: train_options.LrSchedule = TrainVaeSpec.lr_schedule,
    lr_warmup: train_options.LrWarmup = TrainVaeSpec.lr_warmup,
    weight_decay: train_options.WeightDecay = TrainVaeSpec.weight_decay,
    clip_norm: train_options.ClipNorm = TrainVaeSpec.clip_norm,
    ema: train_options.Ema = TrainVaeSpec.ema,
    mixed_precision: train_options.MixedPrecision = TrainVaeSpec.mixed_precision,
    gradient_checkpointing: train_options.GradientCheckpointing = TrainVaeSpec.gradient_checkpointing,
    compile: train_options.Compile = TrainVaeSpec.compile,
    seed: train_options.Seed = TrainVaeSpec.seed,
    holdout: train_options.Holdout = TrainVaeSpec.holdout,
    validate_every: train_options.ValidateEvery = TrainVaeSpec.validate_every,
    sample_every: train_options.SampleEvery = TrainVaeSpec.sample_every,
    save_every: train_options.SaveEvery = TrainVaeSpec.save_every,
    keep: train_options.Keep = TrainVaeSpec.keep,
    stop_after: train_options.StopAfter = TrainVaeSpec.stop_after,
    dry_run: train_options.DryRun = TrainVaeSpec.dry_run,
    tracker: train_options.Tracker = TrainVaeSpec.tracker,
    workers: options.Workers = TrainVaeSpec.workers,
    device: options.Device = TrainVaeSpec.device,
    offline: options.Offline = TrainVaeSpec.offline,
    export: train_options.Export = TrainVaeSpec.export,
    export_dtype: train_options.ExportDtype = TrainVaeSpec.export_dtype,
    config: train_options.ConfigFile = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a VAE: the model's own further, or one from scratch (--init). The same command again resumes.

    Writes RUN/export/vae in the diffusers layout, with the scaling factor measured over the data.
    """
    spec = TrainVaeSpec(**settings(locals()))
    fetch(spec.model, offline=spec.offline)
    from sdcli.training import vae  # deferred: imports torch

    show(vae.run(spec))
