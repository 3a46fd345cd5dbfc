"""WHAT train-vae trains: reconstruction, its look, regularizer and adversary; and how its latents are scaled."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call

from sdcli.errors import UsageError
from sdcli.pipeline import features, measures
from sdcli.pipeline import vae as latent
from sdcli.pipeline.bundle import save_part
from sdcli.pipeline.images import to_images
from sdcli.train_specs import CHECKPOINTING_HINT, NO_CHECKPOINTING, TrainVaeSpec
from sdcli.training import data, losses, parts, start
from sdcli.training.autoencoders import Autoencoder, KlAutoencoder, VqAutoencoder
from sdcli.training.loop import Preparing, Report, train
from sdcli.training.order import Draw, fixed
from sdcli.training.state import Batch, Turn

if TYPE_CHECKING:
    from sdcli.pipeline.bundle import Vae

NARROW_LOGVAR = -8.0  # a fresh posterior begins with std e^-4: noise of std 1 would hide the mean for 1,000 steps
SAMPLES = 8  # pictures shown beside their reconstructions


def run(spec: TrainVaeSpec) -> Iterator[Report]:
    """Train the VAE of a model, or one from scratch, and yield what happens; the result lies in RUN/export/vae."""
    accelerator = start.accelerator_for(spec)
    dataset = data.find(spec.data, spec.caption)
    network = features.perceptual(spec.perceptual_network)
    part = parts.vae(spec, accelerator.device)
    resolution = start.resolution(spec, part.model.config["sample_size"], latent.factor(part.model))
    if spec.freeze_encoder:
        latent.encoder(part.model).requires_grad_(False)
    if spec.gradient_checkpointing and latent.is_vq(part.model):
        raise UsageError(NO_CHECKPOINTING, CHECKPOINTING_HINT)
    if spec.is_adversarial:
        losses.check_patches(spec.disc_layers, resolution)
    if resolution < network.least_side:
        raise UsageError(
            f"--resolution {resolution}: {network.name} cannot compare pictures so small",
            f"use {network.least_side} or more",
        )
    origin = f"{part.origin} {network.name}" if spec.perceptual_weight > 0 else part.origin
    plan = start.plan(spec, "vae", dataset, origin, accelerator)
    if spec.dry_run:
        yield from start.planned(plan, spec, dataset, accelerator, _learned(part.model))
        return
    with start.opened(plan, accelerator):
        yield from start.checked(dataset, spec, accelerator)
        if part.is_fresh and not latent.is_vq(part.model):
            _narrow(part.model)
        task = VaeTask(part.model, spec, dataset, resolution, network, accelerator)
        order = start.order(spec, accelerator, [task.training])
        yield from train(task, spec, plan.folder, accelerator=accelerator, order=order, config_hash=plan.config_hash)


class VaeTask:
    """What the loop needs to train a VAE."""

    def __init__(
        self,
        vae: Vae,
        spec: TrainVaeSpec,
        dataset: data.Dataset,
        resolution: int,
        network: features.Perceptual,
        accelerator: Accelerator,
    ) -> None:
        self.vae, self.spec, self.dataset, self.accelerator = vae, spec, dataset, accelerator
        self.resolution = resolution  # px
        self.training, self.held_out = data.split(dataset, spec.holdout, spec.seed)
        side = resolution // latent.factor(vae)
        self.noise_shape = (1, int(vae.config["latent_channels"]), side, side)
        self.readers = data.readers(spec.workers)
        self.network = network.to(accelerator.device)
        if spec.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        self.model: Autoencoder = (
            VqAutoencoder(vae, spec.seed, accelerator, learn_logvar=spec.learn_logvar)
            if latent.is_vq(vae)
            else KlAutoencoder(vae, learn_logvar=spec.learn_logvar)
        )
        settle = self.model.settle if isinstance(self.model, VqAutoencoder) else None
        self.turns = [Turn("model", self.model, self.losses, after=settle)]
        if spec.is_adversarial:
            torch.manual_seed(spec.seed)
            self.critic = losses.PatchDiscriminator(spec.disc_layers, spec.disc_width)
            self.turns.append(Turn("critic", self.critic, self.critic_losses, begin=spec.disc_start))

    def load(self, draws: Sequence[Draw]) -> Batch:
        rows = list(self.readers.map(self._load_one, draws))
        return {"pixels": torch.cat([r[0] for r in rows]), "noise": torch.cat([r[1] for r in rows])}

    def losses(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """The autoencoder's objective; leaves the reconstruction in the batch, for the discriminator's turn."""
        pixels, spec = batch["pixels"], self.spec
        reconstruction, regularizers, left = model(pixels, batch["noise"])
        batch |= left
        reconstruction = reconstruction.to(pixels.dtype)
        terms = self._reconstruction_terms(reconstruction, pixels)
        rec = spec.l1_weight * terms["l1"] + spec.l2_weight * terms["l2"]
        if self.network.name in terms:
            rec = rec + spec.perceptual_weight * terms[self.network.name]
        if self.model.logvar is not None:  # -log of a Laplace or normal likelihood with one scale for all pixels
            logvar = self.model.logvar
            rec = rec / logvar.exp() + logvar
            terms["logvar"] = logvar
        terms |= regularizers
        loss = rec + spec.kl_weight * terms["kl"] if "kl" in terms else rec + spec.codebook_weight * terms["codebook"]
        if spec.is_adversarial and step >= spec.disc_start:
            batch["reconstruction"] = reconstruction.detach()
            adversarial, weight = self._adversarial(reconstruction, rec, step)
            loss = loss + weight * adversarial
            terms |= {"adversarial": adversarial, "d_weight": weight}
        return {"loss": loss, **terms}

    def critic_losses(self, critic: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """The discriminator's objective on real pictures and on the reconstructions of the turn before."""
        both = critic(torch.cat([batch["pixels"], batch["reconstruction"]]))
        real, fake = (verdicts.to(batch["pixels"].dtype) for verdicts in both.chunk(2))
        of_real, of_fake = losses.DISCRIMINATOR_LOSSES[self.spec.disc_loss](real, fake)
        return {"loss": 0.5 * (of_real + of_fake), "real": real.mean(), "fake": fake.mean()}

    @torch.no_grad()
    def validate(self) -> Generator[Preparing, None, dict[str, float]]:
        """Reconstruction and regularizer over the held-out pictures."""
        return (yield from self._measured(self.held_out)) if self.held_out else {}

    @torch.no_grad()
    def sample(self, folder: Path) -> Generator[Preparing, None, dict[str, float]]:
        """Some pictures, each beside its reconstruction."""
        shown = (self.held_out or self.training)[:SAMPLES]
        for number, draw in enumerate(fixed(shown, self.spec.seed, "sample"), start=1):
            pixels = self._load_one(draw)[0].to(self.accelerator.device)
            back = latent.decode(self.vae, latent.encode(self.vae, pixels))
            name = self.dataset.samples[draw.sample].path.stem
            (image,) = to_images(torch.cat([pixels, back], dim=3))
            image.save(folder / f"{number}-{name}.png")
            yield Preparing("drawing samples", number, len(shown))
        return {}

    @torch.no_grad()
    def export(self, folder: Path, step: int) -> Generator[Preparing, None, dict[str, float]]:
        """Write the scaling factor that makes the latents' std 1 over the training pictures, measure, save the VAE.

        Of an encoder that was frozen it stays what it was.
        """
        if self.spec.freeze_encoder:
            scaling_factor = float(self.vae.config["scaling_factor"])
        else:
            scaling_factor = yield from self._scaling_factor()
        facts: dict[str, float] = {"scaling_factor": scaling_factor}
        if not self.spec.random_crop:  # a crop's size is not that of the pictures
            facts["sample_size"] = self.resolution
        self.vae.register_to_config(**facts)  # type: ignore[no-untyped-call]
        measured = yield from self._measured(self.held_out or self.training, with_frechet=True)
        save_part(folder / "vae", self.vae, getattr(torch, self.spec.export_dtype))
        held_out = float(len(self.held_out))
        return {"scaling_factor": scaling_factor, **measured, "held_out": held_out}

    def _reconstruction_terms(self, reconstruction: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        terms = {
            "l1": (reconstruction - pixels).abs().mean(),
            "l2": (reconstruction - pixels).square().mean(),
        }
        if self.spec.perceptual_weight > 0:
            terms[self.network.name] = self.network(reconstruction, pixels).mean()
        return terms

    def _adversarial(self, reconstruction: Tensor, rec: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What the discriminator, its weights taken as constants, says of the reconstruction; and the term's weight."""
        constants = {name: p.detach() for name, p in self.critic.named_parameters()}
        verdicts: Tensor = functional_call(self.critic, constants, (reconstruction,))
        adversarial = -verdicts.to(rec.dtype).mean()
        weight = torch.full_like(rec.detach(), self.spec.disc_weight)
        if self.spec.adaptive_weight:
            last = self.vae.decoder.conv_out.weight
            pull, push = (
                self.accelerator.reduce(torch.autograd.grad(term, last, retain_graph=True)[0], "mean")
                for term in (rec, adversarial)
            )
            weight = weight * losses.adaptive_weight(pull, push)
        warm = min(1.0, (step - self.spec.disc_start + 1) / self.spec.disc_warmup) if self.spec.disc_warmup else 1.0
        return adversarial, weight * warm

    def _scaling_factor(self) -> Generator[Preparing, None, float]:
        sums, squares, values = 0.0, 0.0, 0
        for rows, done in self._batches(self.training):
            mean, logvar = latent.moments(self.vae, rows["pixels"])
            z = (mean + (0.5 * logvar).exp() * rows["noise"]).double().cpu()
            sums, squares, values = sums + float(z.sum()), squares + float(z.square().sum()), values + z.numel()
            yield Preparing("measuring the latents", done, len(self.training))
        return float((squares / values - (sums / values) ** 2) ** -0.5)

    def _measured(
        self, samples: Sequence[int], *, with_frechet: bool = False
    ) -> Generator[Preparing, None, dict[str, float]]:
        """How near reconstructions from the posterior's mean come to the pictures, as means over samples."""
        totals: dict[str, float] = {}
        sides = (measures.RunningGaussian(), measures.RunningGaussian())
        is_training = self.model.training
        self.model.eval()
        for rows, done in self._batches(samples):
            pixels = rows["pixels"]
            back, regularizers, _ = self.model(pixels, torch.zeros_like(rows["noise"]))
            clamped = back.clamp(-1, 1).to(pixels.dtype)
            terms = self._reconstruction_terms(clamped, pixels) | regularizers
            terms |= {"psnr": measures.psnr(clamped, pixels).mean(), "ssim": measures.ssim(clamped, pixels).mean()}
            if self.network.name not in terms:
                terms[self.network.name] = self.network(clamped, pixels).mean()
            if with_frechet:
                for side, pictures in zip(sides, (pixels, clamped), strict=True):
                    side.add(self.network.features(pictures))
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(pixels)
            yield Preparing("measuring reconstructions", done, len(samples))
        means = {name: total / len(samples) for name, total in totals.items()}
        if isinstance(self.model, VqAutoencoder):
            means |= self.model.codebook_use()
        self.model.train(is_training)
        means["loss"] = self.spec.l1_weight * means["l1"] + self.spec.l2_weight * means["l2"]
        means["loss"] += self.spec.perceptual_weight * means[self.network.name]
        if with_frechet:
            means["frechet"] = measures.frechet_distance(*(side.gaussian() for side in sides))
        return means

    def _batches(self, samples: Sequence[int]) -> Iterator[tuple[Batch, int]]:
        """The samples in batches on the device, by fixed chance, with the number done after each."""
        draws = fixed(samples, self.spec.seed, "measure")
        for first in range(0, len(draws), self.spec.batch_size):
            part = draws[first : first + self.spec.batch_size]
            rows = {name: value.to(self.accelerator.device) for name, value in self.load(part).items()}
            yield rows, first + len(part)

    def _load_one(self, draw: Draw) -> tuple[Tensor, Tensor]:
        generator = draw.generator()
        crop_by = generator if self.spec.random_crop else None
        pixels = data.load_pixels(self.dataset.samples[draw.sample], (self.resolution, self.resolution), crop_by)
        return pixels, torch.randn(self.noise_shape, generator=generator)


def _learned(vae: Vae) -> nn.ModuleList:
    """The parts of a VAE that are not frozen."""
    return nn.ModuleList(part for part in vae.children() if any(value.requires_grad for value in part.parameters()))


@torch.no_grad()
def _narrow(vae: Vae) -> None:
    """Start a fresh posterior narrow around its mean."""
    last = vae.quant_conv if vae.quant_conv is not None else vae.encoder.conv_out
    assert last.bias is not None  # both kinds of last layer have one
    half = last.bias.shape[0] // 2
    last.weight[half:].zero_()
    last.bias[half:] = NARROW_LOGVAR
