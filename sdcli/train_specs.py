"""What the user asked a trainer for, validated; as in `specs`, which no other command pays for. No torch, no Typer."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sdcli.checks import MAX_SEED, at_least, between, in_unicode, one_of, option
from sdcli.errors import UsageError

LORA_LR = 1e-4
NO_CHECKPOINTING = "--gradient-checkpointing: a VAE with a codebook cannot do it"
CHECKPOINTING_HINT = "lower --batch-size and raise --accumulate"


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """What every trainer needs to know. Lengths in pixels, probabilities in 0..1."""

    data: Path = Path()
    model: str | None = None  # start from the weights of this model ...
    init: str | None = None  # ... or from scratch, by a preset's name or a JSON file of configs
    run: Path | None = None
    caption: str | None = None
    resolution: int | None = None
    batch_size: int = 4
    accumulate: int = 1
    steps: int = 1000
    optimizer: str = "adamw"
    lr: float | None = None  # None: peak_lr says
    lr_schedule: str = "constant"
    lr_warmup: int = 0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 0.999
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    compile: bool = False  # of what is trained
    seed: int = 0
    holdout: float = 0.0  # share of the pictures that validate instead of training
    validate_every: int | None = None  # steps; None: save_every
    sample_every: int | None = None
    save_every: int = 250
    keep: int = 2
    stop_after: int | None = None
    dry_run: bool = False
    tracker: str | None = None
    workers: int = 2
    device: str = "auto"
    offline: bool = False
    export: str = "last"
    export_dtype: str = "float32"

    DEFAULT_LR: ClassVar[float] = 1e-5
    # What may differ between two calls that belong to one run.
    NOT_IDENTITY = frozenset(
        {"run", "save_every", "keep", "stop_after", "validate_every", "sample_every", "sample_prompt", "dry_run"}
        | {"tracker", "workers", "device", "offline", "export", "export_dtype"}
        | {"gradient_checkpointing", "compile"}
    )

    def __post_init__(self) -> None:
        if self.model is not None and self.init is not None:
            raise UsageError("--model and --init exclude each other", "start from a model or from scratch")
        for name in ("batch_size", "accumulate", "steps", "save_every", "keep", "workers"):
            at_least(name, getattr(self, name), 1)
        at_least("lr_warmup", self.lr_warmup, 0)
        for name in ("stop_after", "validate_every", "sample_every"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        between("holdout", self.holdout, 0.0, 0.9)
        one_of("optimizer", self.optimizer, ("adamw", "adamw8bit"))
        one_of("export", self.export, ("last", "best"))
        if self.export == "best" and self.holdout == 0:
            raise UsageError("--export best: nothing says which step is best", "hold pictures out with --holdout")
        if self.tracker is not None:
            one_of("tracker", self.tracker, ("tensorboard", "wandb"))
        if self.resolution is not None:
            at_least("resolution", self.resolution, 8)
        if self.caption is not None:
            in_unicode("caption", self.caption)
        between("lr", self.peak_lr, 0.0, 1.0)
        between("weight_decay", self.weight_decay, 0.0, 1.0)
        between("ema", self.ema, 0.0, 0.999999)
        at_least("clip_norm", self.clip_norm, 0.0)
        between("seed", self.seed, 0, MAX_SEED)
        one_of("lr_schedule", self.lr_schedule, ("constant", "linear", "cosine"))
        one_of("mixed_precision", self.mixed_precision, ("no", "fp16", "bf16"))
        one_of("export_dtype", self.export_dtype, ("float32", "float16", "bfloat16"))

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of the run."""
        return self.lr if self.lr is not None else self.DEFAULT_LR

    def identity(self) -> dict[str, object]:
        """The settings that make two calls the same run, as plain JSON values."""
        rows = dataclasses.asdict(self) | {"lr": self.peak_lr}
        return {k: str(v) if isinstance(v, Path) else v for k, v in rows.items() if k not in self.NOT_IDENTITY}


@dataclass(frozen=True, kw_only=True)
class TrainVaeSpec(TrainSpec):
    """`sdcli train-vae`."""

    regularizer: str | None = None  # None: the model's own; from scratch kl
    codebook_size: int = 1024
    l1_weight: float = 1.0
    l2_weight: float = 0.5
    learn_logvar: bool = False
    perceptual_weight: float = 1.0
    perceptual_network: str = "auto"
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    disc_weight: float = 0.5
    disc_loss: str = "hinge"
    disc_start: int = 50_001
    disc_warmup: int = 0
    disc_layers: int = 3
    disc_width: int = 64
    adaptive_weight: bool = True
    random_crop: bool = False
    freeze_encoder: bool = False  # for the latents to stay those that a UNet learned from

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze_encoder and self.init is not None:
            what = "--freeze-encoder with --init: a fresh encoder knows nothing yet"
            raise UsageError(what, "name a trained model with --model")
        for name in ("l1_weight", "l2_weight", "perceptual_weight", "kl_weight", "codebook_weight", "disc_weight"):
            at_least(name, getattr(self, name), 0.0)
        for name in ("disc_start", "disc_warmup"):
            at_least(name, getattr(self, name), 0)
        between("codebook_size", self.codebook_size, 2, 2**20)
        between("disc_layers", self.disc_layers, 1, 8)
        if self.regularizer is not None:
            one_of("regularizer", self.regularizer, ("kl", "vq"))
        one_of("disc_loss", self.disc_loss, ("hinge", "vanilla"))
        if self.disc_width % 16 or not 16 <= self.disc_width <= 1024:
            raise UsageError(f"--disc-width {self.disc_width}: out of range", "it must be a multiple of 16 up to 1024")
        if self.compile and self.is_adversarial and self.adaptive_weight:
            what = "--compile with an adaptive weight, which asks for gradients of one layer of what is compiled whole"
            raise UsageError(what, "add --no-adaptive-weight, or leave --compile out")
        if self.gradient_checkpointing and self.regularizer == "vq":
            raise UsageError(NO_CHECKPOINTING, CHECKPOINTING_HINT)
        if self.l1_weight + self.l2_weight == 0:
            raise UsageError("--l1-weight and --l2-weight are both 0", "the reconstruction needs at least one")

    @property
    def is_adversarial(self) -> bool:
        """Whether a discriminator ever takes part."""
        return self.disc_weight > 0 and self.disc_start < self.steps


@dataclass(frozen=True, kw_only=True)
class DenoisingSpec(TrainSpec):
    """What the trainers share that learn from the denoising loss."""

    buckets: bool = False
    loss: str = "simple"
    snr_gamma: float = 5.0
    vlb_weight: float = 0.001
    offset_noise: float = 0.0
    caption_dropout: float = 0.1
    sample_prompt: tuple[str, ...] = ()

    LOSSES: ClassVar[tuple[str, ...]] = ("simple", "min-snr")

    def __post_init__(self) -> None:
        super().__post_init__()
        between("caption_dropout", self.caption_dropout, 0.0, 1.0)
        between("offset_noise", self.offset_noise, 0.0, 1.0)
        at_least("vlb_weight", self.vlb_weight, 0.0)
        if not 0.0 < self.snr_gamma < math.inf:
            raise UsageError(f"--snr-gamma {self.snr_gamma}: out of range", "it must be above 0; 5 is usual")
        one_of("loss", self.loss, self.LOSSES)
        for text in self.sample_prompt:
            in_unicode("sample_prompt", text)


@dataclass(frozen=True, kw_only=True)
class TrainUnetSpec(DenoisingSpec):
    """`sdcli train-unet`."""

    vae: str | None = None
    condition: str | None = None  # None: the model's own; from scratch text
    prediction: str | None = None
    zero_terminal_snr: bool = False
    train_text_encoder: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None  # None: the rank

    LOSSES: ClassVar[tuple[str, ...]] = ("simple", "min-snr", "hybrid")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition is not None:
            one_of("condition", self.condition, ("text", "class", "none"))
        if self.prediction is not None:
            one_of("prediction", self.prediction, ("epsilon", "v", "x0"))
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise UsageError("--zero-terminal-snr with --prediction epsilon: pure noise says nothing of x_0", "use v")
        self._check_lora()
        if self.init is not None and self.vae is None:
            raise UsageError("--init needs --vae", "train one first with sdcli train-vae, or name a model that has one")

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of the run; adapters start from nothing and bear more."""
        return LORA_LR if self.lr is None and self.lora_rank is not None else super().peak_lr

    @property
    def alpha(self) -> float:
        """LoRA's alpha: what the adapters add counts alpha / rank."""
        return self.lora_alpha if self.lora_alpha is not None else float(self.lora_rank or 0)

    def _check_lora(self) -> None:
        if self.lora_rank is None:
            if self.lora_alpha is not None:
                raise UsageError("--lora-alpha without --lora-rank", "say the rank, such as 16")
            return
        between("lora_rank", self.lora_rank, 1, 1024)
        if self.lora_alpha is not None and not 0.0 < self.lora_alpha < math.inf:
            raise UsageError(f"--lora-alpha {self.lora_alpha}: out of range", "it must be above 0; the rank is usual")
        if self.init is not None:
            raise UsageError("--lora-rank with --init: an adapter needs a trained model", "name one with --model")
        if self.loss == "hybrid":
            raise UsageError("--lora-rank with --loss hybrid: adapters add no channels", "use --loss simple or min-snr")


@dataclass(frozen=True, kw_only=True)
class TrainEmbeddingSpec(DenoisingSpec):
    """`sdcli train-embedding`."""

    DEFAULT_LR: ClassVar[float] = 5e-3  # a few vectors, of std about 0.01, bear and need much

    token: str = ""
    init_token: str = ""
    vectors: int = 1
    kind: str = "object"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("token", "init_token"):
            if not getattr(self, name).strip():
                raise UsageError(f"{option(name)}: is empty", "as in --token '<my-cat>' --init-token cat")
        if self.init is not None:
            raise UsageError("--init: a word is learned by a trained model", "name one with --model")
        between("vectors", self.vectors, 1, 75)
        one_of("kind", self.kind, ("object", "style"))
