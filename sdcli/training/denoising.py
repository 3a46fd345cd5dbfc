"""The denoising objective, whatever learns by it: the loss at a noised latent, its validation, samples on the way."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdcli import schedulers
from sdcli.pipeline import noise, sampling, text
from sdcli.pipeline import vae as latent
from sdcli.pipeline.bundle import TextEncoder
from sdcli.pipeline.context import Context
from sdcli.pipeline.images import to_images
from sdcli.pipeline.prompt import networks
from sdcli.plan.words import warn_of_networks
from sdcli.schedulers.config import prediction_type
from sdcli.train_specs import DenoisingSpec
from sdcli.training import buckets, caches, data, parts, start
from sdcli.training.attention import ShortAttention
from sdcli.training.caches import Moments
from sdcli.training.conditions import Condition, Texts
from sdcli.training.loop import Preparing, Report, train
from sdcli.training.order import Draw, fixed, mixed_seed
from sdcli.training.parts import ModelParts
from sdcli.training.state import Batch, Turn

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

BANDS = 4  # equal shares of the timesteps, whose losses are logged apart
SAMPLES = 4  # pictures drawn on the way, unless prompts say how many
SAMPLE_SETTINGS = {"scheduler": "dpm", "steps": 25, "guidance": 7.5}


Write = Callable[[Path, int], None]  # what was trained, into an empty folder; after so many steps
Prepare = Callable[[Path], Generator[Preparing, None, tuple[Condition, Write]]]


def run(
    spec: DenoisingSpec,
    kind: str,
    dataset: data.Dataset,
    model: ModelParts,
    accelerator: Accelerator,
    *,
    learned: nn.Module,
    prepare: Prepare,
) -> Iterator[Report]:
    """Train what learns by the denoising loss, or with `--dry-run` tell what it would be.

    learned: what has the parameters. prepare: given the folder of the run's caches, says what learns and gives the
    condition of the samples, and what writes the result into an empty folder.
    """
    unet, vae, size = model.bundle.unet, model.bundle.vae, start.size(spec, model.bundle)
    plan = start.plan(spec, kind, dataset, model.origin, accelerator)
    if spec.dry_run:
        yield from start.planned(plan, spec, dataset, accelerator, learned)
        return
    with start.opened(plan, accelerator):
        yield from start.checked(dataset, spec, accelerator)
        cache = plan.folder / "cache"
        sizes = buckets.sizes(dataset, size, latent.factor(vae) * parts.deepest(unet), are_buckets=spec.buckets)
        moments = yield from caches.moments(cache, vae, dataset, sizes, spec, accelerator)
        condition, write = yield from prepare(cache)
        task = DenoisingTask(model, spec, dataset, moments, condition, size=size, write=write)
        order = start.order(spec, accelerator, moments.groups(task.training))
        yield from train(task, spec, plan.folder, accelerator=accelerator, order=order, config_hash=plan.config_hash)


class Denoiser(nn.Module):
    """The UNet, with what makes its context in front when that is trained along."""

    def __init__(self, unet: UNet2DConditionModel, condition: nn.Module | None) -> None:
        super().__init__()
        self.unet = unet
        self.condition = condition

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """(B, C, h, w) at t (B,), given (B, n, D) context or what the condition makes it of -> prediction."""
        if self.condition is not None:
            context = self.condition(context)
        prediction: Tensor = self.unet(x_t, t, context, return_dict=False)[0]
        return prediction


class DenoisingTask:
    """What the loop needs of a run whose loss is the denoising one."""

    def __init__(
        self,
        model: ModelParts,
        spec: DenoisingSpec,
        dataset: data.Dataset,
        moments: Moments,
        condition: Condition,
        *,
        size: caches.Size,
        write: Write,
    ) -> None:
        """What is to learn requires gradients already."""
        self.source, self.bundle, self.spec, self.dataset = model, model.bundle, spec, dataset
        self.moments, self.condition, self.size, self.write = moments, condition, size, write
        self.training, self.held_out = data.split(dataset, spec.holdout, spec.seed)
        if spec.gradient_checkpointing:
            self.bundle.unet.enable_gradient_checkpointing()
        if self.bundle.device.type == "cpu" and spec.mixed_precision == "bf16":
            self.bundle.unet.set_attn_processor(ShortAttention())  # type: ignore[arg-type]  # a list of its own
            if isinstance(condition, Texts) and condition.module is not None:
                condition.encoder.model.set_attn_implementation("eager")  # by plain products, too
        self.model = Denoiser(self.bundle.unet, condition.module)
        self.turns = [Turn("model", self.model, self.losses)]
        self.alpha_bar = noise.alpha_bars(self.bundle.scheduler_config)
        self.prediction_type = prediction_type(self.bundle.scheduler_config)

    def load(self, draws: Sequence[Draw]) -> Batch:
        rows = [self._load_one(draw) for draw in draws]
        return {
            "x_0": torch.cat([row[0] for row in rows]),
            "eps": torch.cat([row[1] for row in rows]),
            "t": torch.stack([row[2] for row in rows]),
            "condition": torch.stack([row[3] for row in rows]),
        }

    def losses(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        x_0, t, eps = batch["x_0"], batch["t"], batch["eps"]
        x_t = noise.q_sample(x_0, t, eps, self.alpha_bar)
        output = model(x_t, t, self.condition.context(batch["condition"])).to(x_0.dtype)
        prediction, v = output[:, : x_0.shape[1]], output[:, x_0.shape[1] :]
        wanted = noise.target(x_0, t, eps, self.alpha_bar, prediction_type=self.prediction_type)
        errors = (prediction - wanted).square().mean(dim=(1, 2, 3))  # (B,)
        terms = self._bands(errors, t)
        if self.spec.loss == "min-snr":
            kind, gamma = self.prediction_type, self.spec.snr_gamma
            weights = noise.min_snr_weight(t, self.alpha_bar, gamma=gamma, prediction_type=kind)
            return {"loss": (errors * weights.to(errors)).mean(), "simple": errors.mean(), **terms}
        if self.spec.loss == "hybrid":
            vlb = self._bound(prediction.detach(), v, x_0, x_t, t)
            weight = self.spec.vlb_weight * len(self.alpha_bar)  # t is one of T terms; arXiv:2102.09672, section 3.1
            return {"loss": errors.mean() + weight * vlb.mean(), "simple": errors.mean(), "vlb": vlb.mean(), **terms}
        return {"loss": errors.mean(), **terms}

    @torch.no_grad()
    def validate(self) -> Generator[Preparing, None, dict[str, float]]:
        """The loss on held-out pictures, each at one timestep of every band; the chance is the same at every call."""
        totals: dict[str, list[float]] = {}
        done = 0
        for group in self.moments.groups(self.held_out):
            draws = [draw for band in range(BANDS) for draw in fixed(group, self.spec.seed, f"validate{band}")]
            for first in range(0, len(draws), self.spec.batch_size):
                part = range(first, min(first + self.spec.batch_size, len(draws)))
                batch = self.load([draws[i] for i in part])
                width = len(self.alpha_bar) // BANDS
                batch["t"] = torch.stack(
                    [t % width + width * (i // len(group)) for i, t in zip(part, batch["t"], strict=True)]
                )
                rows = {name: value.to(self.bundle.device) for name, value in batch.items()}
                for name, value in self.losses(self.model, rows, 0).items():
                    numbers = value.flatten().tolist() * (len(part) if value.ndim == 0 else 1)
                    is_band = name.startswith("loss_t")  # says nothing of the samples of others
                    totals.setdefault(name, []).extend(n for n in numbers if not (is_band and math.isnan(n)))
                done += len(part)
                yield Preparing("validating", done, BANDS * len(self.held_out))
        return {name: sum(numbers) / len(numbers) for name, numbers in totals.items() if numbers}

    @torch.no_grad()
    def sample(self, folder: Path) -> Generator[Preparing, None, dict[str, float]]:
        """Pictures of some prompts or classes, with the model's own settings, from seeds that stay the same."""
        settings = SAMPLE_SETTINGS | self.source.settings
        config = self.bundle.scheduler_config
        scheduler = schedulers.find(str(settings["scheduler"]))
        guidance, steps = float(str(settings["guidance"])), int(str(settings["steps"]))
        wanted, null, names = self._samples()
        channels, factor = int(self.bundle.unet.config["in_channels"]), latent.factor(self.bundle.vae)
        shape = (channels, self.size[1] // factor, self.size[0] // factor)
        for number, name in enumerate(names):
            sources = sampling.generators([mixed_seed(self.spec.seed, "sample", number)])
            solver = schedulers.create(scheduler, config, steps, device=str(self.bundle.device))
            x = sampling.initial_noise(shape, sources)
            context, negative = Context(wanted[number : number + 1]), Context(null) if guidance > 1 else None
            for state in sampling.denoise(
                self.bundle.unet, solver, x, context, negative=negative, guidance=guidance, sources=sources
            ):
                x = state.latents
            (image,) = to_images(latent.decode(self.bundle.vae, x))
            image.save(folder / f"{number + 1}-{_slug(name)}.png")
            yield Preparing("drawing samples", number + 1, len(names))
        return {}

    def export(self, folder: Path, step: int) -> Generator[Preparing, None, dict[str, float]]:
        """Write what was trained."""
        yield Preparing("writing the model", 0, 1)
        self.write(folder, step)
        yield Preparing("writing the model", 1, 1)
        return {"parameters": float(sum(p.numel() for p in self.model.parameters() if p.requires_grad))}

    def _load_one(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, noise, timestep and condition of one sample, all chance from its own generator."""
        generator = draw.generator()
        mean, logvar = self.moments[draw.sample].chunk(2, dim=1)  # 2 x (1, C, h, w)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        eps = torch.randn(mean.shape, generator=generator)
        t = torch.randint(self.alpha_bar.shape[0], (), generator=generator)
        condition = self.condition.row(self.dataset.samples[draw.sample], generator)
        if self.spec.offset_noise > 0:  # one draw a channel, so that the mean of a picture is noised, too
            eps = eps + self.spec.offset_noise * torch.randn((*mean.shape[:2], 1, 1), generator=generator)
        return latent.scale(self.bundle.vae, z), eps, t, condition

    def _bands(self, errors: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The errors (B,) by timestep: one term a band, NaN for the samples of others."""
        band = t * BANDS // len(self.alpha_bar)
        return {f"loss_t{i}": errors.detach().where(band == i, torch.nan) for i in range(BANDS)}

    def _bound(self, prediction: Tensor, v: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The variational bound (B,) in bits a value, of which only the variance learns."""
        kind = self.prediction_type
        guess = noise.x_0_of(prediction, x_t, t, self.alpha_bar, prediction_type=kind)
        mean, _ = noise.q_posterior(guess, x_t, t, self.alpha_bar)
        logvar = noise.learned_logvar(v, t, self.alpha_bar)
        return noise.variational_bound(x_0, x_t, t, mean, logvar, self.alpha_bar)

    def _samples(self) -> tuple[Tensor, Tensor, list[str]]:
        """Context (n, k, D) of what is drawn on the way, that of nothing (1, k, D), and the names of the pictures."""
        conditioner = parts.single(self.bundle)
        if isinstance(conditioner, TextEncoder):
            known = dict.fromkeys(sample.captions[0] for sample in self.dataset.samples if sample.captions)
            warn_of_networks(networks(*self.spec.sample_prompt))
            prompts = list(self.spec.sample_prompt) or list(known)[:SAMPLES] or [""]
            rows = text.encode(conditioner, [text.tokenize(conditioner, prompt) for prompt in (*prompts, "")])
            return rows[:-1], rows[-1:], prompts
        labels = list(range(len(conditioner.names)))[:SAMPLES] or [conditioner.null]
        names = [conditioner.names[label] if label < conditioner.null else "picture" for label in labels]
        rows = conditioner(torch.tensor([*labels, conditioner.null], device=self.bundle.device))
        return rows[:-1], rows[-1:], names


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "empty"
