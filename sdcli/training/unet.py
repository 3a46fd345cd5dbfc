"""WHAT train-unet trains: the prediction of epsilon or v at a noised latent, given its caption."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sdcli.pipeline import noise, text
from sdcli.pipeline import vae as latent
from sdcli.pipeline.bundle import Config, ModelBundle, TextEncoder, save_bundle
from sdcli.scheduler_config import prediction_type
from sdcli.specs import TrainUnetSpec
from sdcli.training import data, latents, start
from sdcli.training.loop import Preparing, Report, train
from sdcli.training.order import Draw
from sdcli.training.state import Batch, Turn

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


def run(spec: TrainUnetSpec) -> Iterator[Report]:
    """Train the UNet of a model, or one from scratch, and yield what happens; RUN/export is a whole model."""
    accelerator = start.accelerator_for(spec)
    dataset = data.find(spec.data, spec.caption)
    data.check_captions(dataset)
    parts = start.model(spec, accelerator.device)
    bundle, factor = parts.bundle, latent.factor(parts.bundle.vae)
    resolution = start.resolution(spec, _native(bundle.unet.config["sample_size"], factor), factor)
    with start.opened(spec, "unet", dataset, parts.origin, accelerator) as (folder, config_hash):
        yield from start.checked(dataset, spec, accelerator)
        moments = yield from latents.cached(
            folder / "cache" / "moments.safetensors",
            bundle.vae,
            dataset,
            resolution=resolution,
            batch_size=spec.batch_size,
            workers=spec.workers,
        )
        bundle.unet.register_to_config(sample_size=resolution // factor)
        task = _UnetTask(bundle, spec, dataset, moments, parts.tokenizer, parts.settings | _size(resolution))
        order = start.order(spec, accelerator, [range(len(dataset.samples))])
        yield from train(task, spec, folder, accelerator=accelerator, order=order, config_hash=config_hash)


class Denoiser(nn.Module):
    """The UNet, with the text encoder in front when it is trained along."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: nn.Module | None) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """(B, C, h, w) at t (B,), given (B, 77) ids or their (B, 77, D) context -> prediction like x_t."""
        if self.text_encoder is not None:
            context = self.text_encoder(input_ids=context).last_hidden_state
        prediction: Tensor = self.unet(x_t, t, context, return_dict=False)[0]
        return prediction


class _UnetTask:
    def __init__(
        self,
        bundle: ModelBundle,
        spec: TrainUnetSpec,
        dataset: data.Dataset,
        moments: Tensor,
        tokenizer: Path,
        settings: Config,
    ) -> None:
        self.bundle, self.spec, self.dataset, self.moments = bundle, spec, dataset, moments
        self.tokenizer, self.settings = tokenizer, settings
        assert isinstance(bundle.conditioner, TextEncoder)  # start.model refuses others
        self.text = bundle.conditioner
        self.text.model.requires_grad_(spec.train_text_encoder)
        bundle.unet.requires_grad_(True)
        self.model = Denoiser(bundle.unet, self.text.model if spec.train_text_encoder else None)
        self.turns = [Turn("model", self.model, self.losses)]
        self.alpha_bar = noise.alpha_bars(bundle.scheduler_config)
        self.prediction_type = prediction_type(bundle.scheduler_config)
        self.no_caption = text.tokenize(self.text, "").ids

    def load(self, draws: Sequence[Draw]) -> Batch:
        rows = [self._load_one(draw) for draw in draws]
        return {
            "x_0": torch.cat([row[0] for row in rows]),
            "eps": torch.cat([row[1] for row in rows]),
            "t": torch.stack([row[2] for row in rows]),
            "tokens": torch.tensor([row[3] for row in rows]),
        }

    def losses(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        x_0, t, eps = batch["x_0"], batch["t"], batch["eps"]
        x_t = noise.q_sample(x_0, t, eps, self.alpha_bar)
        context = batch["tokens"]
        if not self.spec.train_text_encoder:
            with torch.no_grad():
                context = self.text.model(input_ids=context).last_hidden_state
        prediction = model(x_t, t, context).float()
        wanted = noise.target(x_0, t, eps, self.alpha_bar, prediction_type=self.prediction_type)
        return {"loss": mse_loss(prediction, wanted)}

    def validate(self) -> Generator[Preparing, None, dict[str, float]]:
        yield from ()
        return {}

    def sample(self, folder: Path) -> Generator[Preparing, None, dict[str, float]]:
        yield from ()
        return {}

    def export(self, folder: Path) -> Generator[Preparing, None, dict[str, float]]:
        """Write the whole model: trained parts beside those that stayed as they were."""
        yield Preparing("writing the model", 0, 1)
        dtype = getattr(torch, self.spec.export_dtype)
        b = self.bundle
        whole = ModelBundle(b.vae, b.unet, b.conditioner, b.scheduler_config, b.device, dtype)
        save_bundle(folder, whole, self.tokenizer, self.settings)
        yield Preparing("writing the model", 1, 1)
        return {"parameters": float(sum(p.numel() for p in self.model.parameters()))}

    def _load_one(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """Latents, noise, timestep and tokens of one sample, all chance from its own generator."""
        generator, sample_id = draw.generator(), draw.sample
        mean, logvar = self.moments[sample_id : sample_id + 1].chunk(2, dim=1)  # 2 x (1, C, h, w)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        eps = torch.randn(mean.shape, generator=generator)
        t = torch.randint(self.alpha_bar.shape[0], (), generator=generator)
        captions = self.dataset.samples[sample_id].captions
        chosen = int(torch.randint(max(1, len(captions)), (), generator=generator))
        is_dropped = bool(torch.rand((), generator=generator) < self.spec.caption_dropout)
        tokens = self.no_caption if is_dropped or not captions else text.tokenize(self.text, captions[chosen]).ids
        return latent.scale(self.bundle.vae, z), eps, t, tokens


def _native(sample_size: object, factor: int) -> object:
    return sample_size * factor if type(sample_size) is int else sample_size


def _size(resolution: int) -> Config:
    return {"size": f"{resolution}x{resolution}"}
