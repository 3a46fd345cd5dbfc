"""train-unet, as real processes on six small pictures; and its mathematics."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdcli.pipeline import known_words, text
from sdcli.pipeline import vae as latent
from sdcli.pipeline.bundle import TextEncoder, load_bundle, load_text
from sdcli.train_specs import TrainUnetSpec
from sdcli.training import caches, data, parts, unet
from sdcli.training.denoising import DenoisingTask
from sdcli.training.order import Draw, mixed_seed
from tests.forks import Forks
from tests.models import edit_json, write_sd1, write_sd2
from tests.runs import final_files, metrics, names, newest_checkpoint, train_unet

CPU = torch.device("cpu")


def task_of(pictures: Path, model: Path, tmp_path: Path, **settings: Any) -> DenoisingTask:
    """The task that `sdcli train-unet --data pictures --model model` gives to the loop."""
    spec = TrainUnetSpec(data=pictures, model=str(model), device="cpu", **settings)
    accelerator, dataset = Accelerator(cpu=True), data.find(pictures)
    whole = parts.model(spec, CPU, dataset)
    sizes = [(16, 16)] * len(dataset.pictures)
    moments = result_of(caches.moments(tmp_path / "cache", whole.bundle.vae, dataset, sizes, spec, accelerator))
    condition = result_of(parts.condition(spec, whole.bundle, dataset, tmp_path / "cache", accelerator))
    encoder = unet._prepare(spec, whole, condition)

    def write(folder: Path, step: int) -> None:
        unet._write(folder, spec, whole, encoder, (16, 16))

    return DenoisingTask(whole, spec, dataset, moments, condition, size=(16, 16), write=write)


def draws(samples: Sequence[int], step: int) -> list[Draw]:
    return [Draw(sample, mixed_seed(step, sample)) for sample in samples]


def result_of(stream: Generator[Any, None, Any]) -> Any:
    """What a generator returns at its end."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value


def weights_of(model: Path, part: str) -> dict[str, Tensor]:
    (path,) = (model / part).glob("*.safetensors")
    return load_file(path)


def is_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


# Resuming


@pytest.mark.parametrize("stops", [[3], [1, 2]], ids=["once", "a resume of a resume"])
def test_a_run_in_parts_ends_as_a_straight_one_bit_for_bit(
    pictures: Path, vae_run: Path, unet_run: Path, forks: Forks, tmp_path: Path, stops: list[int]
) -> None:
    for stop in stops:
        assert forks.sdcli(*train_unet(pictures, tmp_path / "run", vae_run), "--stop-after", stop).code == 0
    assert len(metrics(tmp_path / "run")) == sum(stops)
    assert forks.sdcli(*train_unet(pictures, tmp_path / "run", vae_run)).code == 0
    assert final_files(tmp_path / "run") == final_files(unet_run)


def test_killed_at_a_write_a_run_goes_on_to_the_same_end_and_leaves_no_litter(
    pictures: Path, vae_run: Path, unet_run: Path, forks: Forks, tmp_path: Path
) -> None:
    writes = forks.sdcli(*train_unet(pictures, tmp_path / "straight", vae_run)).writes
    for write in range(60, writes, writes // 3):
        run = tmp_path / str(write)
        ended = forks.sdcli(*train_unet(pictures, run, vae_run), at=write, send=signal.SIGKILL)
        assert ended.code == -signal.SIGKILL
        assert forks.sdcli(*train_unet(pictures, run, vae_run)).code == 0
        assert final_files(run) == final_files(unet_run)
        assert names(run) == names(tmp_path / "straight")


def test_terminated_a_run_stops_saved_and_goes_on_to_the_same_end(
    pictures: Path, vae_run: Path, unet_run: Path, forks: Forks, tmp_path: Path
) -> None:
    ended = forks.sdcli(*train_unet(pictures, tmp_path / "run", vae_run), at=60, send=signal.SIGTERM)
    assert ended.code == 143
    assert 0 < len(metrics(tmp_path / "run")) < 6
    assert int(newest_checkpoint(tmp_path / "run").name[-8:]) == len(metrics(tmp_path / "run"))
    assert forks.sdcli(*train_unet(pictures, tmp_path / "run", vae_run)).code == 0
    assert final_files(tmp_path / "run") == final_files(unet_run)


def test_terminated_while_latents_are_cached_a_run_begins_again(
    pictures: Path, vae_run: Path, unet_run: Path, forks: Forks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = forks.sdcli(*train_unet(pictures, run, vae_run), at=8, send=signal.SIGTERM)
    assert ended.code == 143
    assert not (run / "metrics.jsonl").exists()
    assert forks.sdcli(*train_unet(pictures, run, vae_run)).code == 0
    assert final_files(run) == final_files(unet_run)


@pytest.mark.parametrize("state", ["missing", "halved", "of another length"])
def test_a_cache_that_is_not_whole_is_made_again_with_the_same_bits(
    pictures: Path, vae_run: Path, unet_run: Path, forks: Forks, tmp_path: Path, state: str
) -> None:
    run = tmp_path / "run"
    assert forks.sdcli(*train_unet(pictures, run, vae_run), "--stop-after", 1).code == 0
    cache = run / "cache" / "moments.safetensors"
    whole = cache.read_bytes()
    if state == "missing":
        shutil.rmtree(cache.parent)
    elif state == "halved":
        cache.write_bytes(whole[: len(whole) // 2])
    else:
        save_file({key: value[:3].clone() for key, value in load_file(cache).items()}, cache)
    assert forks.sdcli(*train_unet(pictures, run, vae_run), "--stop-after", 1).code == 0
    assert cache.read_bytes() == whole
    assert metrics(run) == metrics(unet_run)[:2]


def test_a_cache_that_is_whole_is_used(pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cache = run / "cache" / "moments.safetensors"
    assert forks.sdcli(*train_unet(pictures, run, vae_run), "--stop-after", 1).code == 0
    before = cache.stat().st_mtime_ns
    assert forks.sdcli(*train_unet(pictures, run, vae_run), "--stop-after", 1).code == 0
    assert cache.stat().st_mtime_ns == before


# Captions


def test_without_any_caption_it_trains_and_one_warning_tells_how_to_add_them(
    own_pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path
) -> None:
    for path in own_pictures.glob("*.txt"):
        path.unlink()
    ended = forks.sdcli(*train_unet(own_pictures, tmp_path / "run", vae_run), "--steps", 1)
    assert ended.code == 0
    (line,) = [line for line in ended.stderr.splitlines() if "warning" in line]
    assert line.startswith("sdcli: warning: ")
    assert all(way in line for way in ("without text", ".txt", "metadata.jsonl", "--caption"))


def test_with_one_caption_for_all_there_is_nothing_to_warn_of(
    own_pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path
) -> None:
    for path in own_pictures.glob("*.txt"):
        path.unlink()
    command = train_unet(own_pictures, tmp_path / "run", vae_run)
    ended = forks.sdcli(*command, "--steps", 1, "--caption", "a picture of a shape")
    assert ended.code == 0
    assert "warning" not in ended.stderr


def test_some_captions_missing_is_refused_with_the_names_and_nothing_is_written(
    own_pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path
) -> None:
    (own_pictures / "dot.txt").unlink()
    ended = forks.sdcli(*train_unet(own_pictures, tmp_path / "run", vae_run))
    assert ended.code == 3
    assert "1 of 6 pictures have no caption: dot.png; add the captions" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_dropped_caption_is_the_empty_one_and_the_others_are_drawn_from_the_samples_own(
    own_pictures: Path, unet_run: Path, tmp_path: Path
) -> None:
    rows = [{"file_name": "dot.png", "text": ["a dot", "a spot"]}, {"file_name": "bar.png", "text": "a bar"}]
    (own_pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def captions_seen(dropout: float) -> dict[int, set[tuple[int, ...]]]:
        task = task_of(own_pictures, unet_run / "export", tmp_path, caption_dropout=dropout, train_text_encoder=True)
        batches = [task.load(draws([0, 1], step))["condition"].tolist() for step in range(40)]
        return {i: {tuple(batch[i]) for batch in batches} for i in (0, 1)}

    encoder = load_text(unet_run / "export", device=CPU, dtype=torch.float32)
    empty, dot, spot, bar = (text.tokenize(encoder, words).ids for words in ("", "a dot", "a spot", "a bar"))
    assert captions_seen(0.0) == {0: {dot, spot}, 1: {bar}}
    assert captions_seen(0.5) == {0: {dot, spot, empty}, 1: {bar, empty}}
    assert captions_seen(1.0) == {0: {empty}, 1: {empty}}


def test_captions_are_dropped_as_often_as_asked(pictures: Path, unet_run: Path, tmp_path: Path) -> None:
    task = task_of(pictures, unet_run / "export", tmp_path, caption_dropout=0.25, train_text_encoder=True)
    nothing = text.tokenize(task.bundle.conditioner, "").ids
    tokens = torch.cat([task.load(draws(range(6), step))["condition"] for step in range(200)])
    share = (tokens == torch.tensor(nothing)).all(dim=1).float().mean()
    assert float(share) == pytest.approx(0.25, abs=0.04)  # three standard deviations of 1,200 draws


# Mathematics


def test_a_samples_latents_noise_timestep_and_caption_do_not_depend_on_its_batch(
    pictures: Path, unet_run: Path, tmp_path: Path
) -> None:
    task = task_of(pictures, unet_run / "export", tmp_path)
    together, alone = task.load(draws([3, 1, 4], 5)), task.load(draws([3, 1, 4], 5)[1:2])
    assert together.keys() == alone.keys() == {"x_0", "eps", "t", "condition"}
    for name in together:
        assert torch.equal(together[name][1:2], alone[name])
    later = task.load(draws([3, 1, 4], 6)[1:2])
    assert not torch.equal(later["eps"], alone["eps"])
    assert not torch.equal(later["x_0"], alone["x_0"])


def test_noise_is_standard_normal_and_timesteps_are_uniform(pictures: Path, unet_run: Path, tmp_path: Path) -> None:
    task = task_of(pictures, unet_run / "export", tmp_path)
    batches = [task.load(draws(range(6), step)) for step in range(300)]
    eps, t = (torch.cat([batch[name] for batch in batches]).double() for name in ("eps", "t"))
    assert float(eps.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(eps.std()) == pytest.approx(1.0, abs=0.01)
    assert (int(t.min()), int(t.max())) == pytest.approx((0, 999), abs=8)
    assert torch.histc(t, 10, 0, 1000).tolist() == pytest.approx([180] * 10, abs=50)  # four standard deviations


def test_x_0_is_a_sample_of_the_posterior_of_diffusers_vae_scaled(
    pictures: Path, unet_run: Path, tmp_path: Path
) -> None:
    task = task_of(pictures, unet_run / "export", tmp_path)
    theirs = StableDiffusionPipeline.from_pretrained(unet_run / "export", local_files_only=True).vae
    pixels = data.load_pixels(data.find(pictures).samples[2], (16, 16))
    posterior = theirs.encode(pixels).latent_dist
    draw = Draw(2, 5)
    generator = draw.generator()
    z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    expected = (z * theirs.config.scaling_factor).detach()
    torch.testing.assert_close(task.load([draw])["x_0"], expected, rtol=1e-4, atol=1e-5)
    assert float(torch.cat([task.load([Draw(i, 5 + i)])["x_0"] for i in range(6)]).std()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_loss_is_that_of_diffusers_own_parts(
    pictures: Path, unet_run: Path, tmp_path: Path, prediction: str
) -> None:
    task = task_of(pictures, unet_run / "export", tmp_path, prediction=prediction, train_text_encoder=True)
    batch = task.load(draws(range(4), 0))
    loss = task.losses(task.model, batch, 0)["loss"]
    theirs = StableDiffusionPipeline.from_pretrained(unet_run / "export", local_files_only=True)
    noise = DDPMScheduler.from_config(theirs.scheduler.config)
    with torch.no_grad():
        x_t = noise.add_noise(batch["x_0"], batch["eps"], batch["t"])
        context = theirs.text_encoder(batch["condition"])[0]
        guess = theirs.unet(x_t, batch["t"], context).sample
        v = noise.get_velocity(batch["x_0"], batch["eps"], batch["t"])
        wanted = {"epsilon": batch["eps"], "v": v, "x0": batch["x_0"]}[prediction]
        expected = (guess - wanted).square().mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_the_vae_has_no_gradients_and_the_text_encoder_has_some_only_if_trained(
    pictures: Path, unet_run: Path, tmp_path: Path, train_text_encoder: bool
) -> None:
    task = task_of(pictures, unet_run / "export", tmp_path, train_text_encoder=train_text_encoder)
    task.losses(task.model, task.load(draws(range(3), 0)), 0)["loss"].backward()  # type: ignore[no-untyped-call]

    def gradients(module: Any) -> set[bool]:
        return {parameter.grad is not None for parameter in module.parameters()}

    assert gradients(task.bundle.vae) == {False}
    assert gradients(task.bundle.unet) == {True}
    assert gradients(task.bundle.conditioner.model) == {train_text_encoder}
    trained = [task.bundle.unet, task.bundle.conditioner.model] if train_text_encoder else [task.bundle.unet]
    assert {id(p) for p in task.model.parameters()} == {id(p) for module in trained for p in module.parameters()}


# What is exported


@pytest.mark.parametrize(("is_trained", "attention"), [(True, "eager"), (False, "sdpa")])
def test_a_text_encoder_attends_by_plain_products_only_while_it_learns_in_bfloat16(
    pictures: Path, unet_run: Path, tmp_path: Path, is_trained: bool, attention: str
) -> None:
    how = {"mixed_precision": "bf16", "train_text_encoder": is_trained}
    task = task_of(pictures, unet_run / "export", tmp_path, **how)
    assert isinstance(task.bundle.conditioner, TextEncoder)
    assert task.bundle.conditioner.model.config._attn_implementation == attention


def test_all_but_what_is_trained_stays_bit_equal(pictures: Path, unet_run: Path, forks: Forks, tmp_path: Path) -> None:
    model = unet_run / "export"
    common = ("train-unet", "--data", pictures, "--model", model, "--resolution", 16, "--steps", 1, "--lr", 0.01)
    for name, flags, is_text_kept in (("frozen", (), True), ("along", ("--train-text-encoder",), False)):
        run = tmp_path / name
        assert forks.sdcli(*common, "--device", "cpu", "--run", run, *flags).code == 0
        assert not is_equal(weights_of(run / "export", "unet"), weights_of(model, "unet"))
        assert is_equal(weights_of(run / "export", "vae"), weights_of(model, "vae"))
        assert is_equal(weights_of(run / "export", "text_encoder"), weights_of(model, "text_encoder")) is is_text_kept
        for same in ("model_index.json", "vae/config.json", "unet/config.json", "scheduler/scheduler_config.json"):
            assert (run / "export" / same).read_bytes() == (model / same).read_bytes()


def test_the_export_says_which_words_were_in_the_captions(
    pictures: Path, unet_run: Path, forks: Forks, tmp_path: Path
) -> None:
    captions = [caption for sample in data.find(pictures).samples for caption in sample.captions]
    seen = known_words.read(unet_run / "export")
    assert seen == {word for caption in captions for word in known_words.words(caption)}
    (tmp_path / "more").mkdir()
    shutil.copy(next(pictures.rglob("*.png")), tmp_path / "more" / "a.png")
    common = ("train-unet", "--data", tmp_path / "more", "--model", unet_run / "export", "--device", "cpu")
    run = tmp_path / "run"
    assert forks.sdcli(*common, "--caption", "a zyzzyva", "--steps", 1, "--resolution", 16, "--run", run).code == 0
    assert known_words.read(run / "export") == seen | {"a", "zyzzyva"}


def test_of_a_model_that_does_not_say_what_it_saw_the_export_does_not_either(
    pictures: Path, unet_run: Path, forks: Forks, tmp_path: Path
) -> None:
    model = shutil.copytree(unet_run / "export", tmp_path / "model")
    (model / "words.txt").unlink()
    common = ("train-unet", "--data", pictures, "--model", model, "--resolution", 16, "--steps", 1, "--device", "cpu")
    assert forks.sdcli(*common, "--run", tmp_path / "run").code == 0
    assert not (tmp_path / "run" / "export" / "words.txt").exists()


def test_the_export_is_the_moving_average(unet_run: Path) -> None:
    average = load_file(newest_checkpoint(unet_run) / "ema.safetensors")
    for key, value in weights_of(unet_run / "export", "unet").items():
        assert torch.equal(value, average[f"unet.{key}"])
    for key, value in weights_of(unet_run / "export", "text_encoder").items():
        assert torch.equal(value, average[f"condition.model.{key.removeprefix('text_model.')}"])


def test_the_vae_in_the_export_is_the_one_named(vae_run: Path, unet_run: Path) -> None:
    assert is_equal(weights_of(unet_run / "export", "vae"), weights_of(vae_run / "export", "vae"))


def test_text_encoder_keys_carry_the_prefix_that_every_program_knows(unet_run: Path) -> None:
    keys = weights_of(unet_run / "export", "text_encoder").keys()
    assert keys and all(key.startswith("text_model.") for key in keys)
    assert "text_model.embeddings.token_embedding.weight" in keys


def test_plain_diffusers_loads_the_export_and_computes_the_same(unet_run: Path) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(unet_run / "export", local_files_only=True)
    ours = load_bundle(unet_run / "export", device=CPU, dtype=torch.float32)
    prompt = "a picture of a disc"
    with torch.no_grad():
        context = text.encode(ours.conditioner, [text.tokenize(ours.conditioner, prompt)])
        (expected, _) = theirs.encode_prompt(prompt, CPU, 1, do_classifier_free_guidance=False)
        assert torch.equal(context, expected)
        x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        assert torch.equal(ours.unet(x_t, 500, context).sample, theirs.unet(x_t, 500, expected).sample)
        pixels = theirs.vae.decode(x_t / theirs.vae.config.scaling_factor).sample
        assert torch.equal(latent.decode(ours.vae, x_t), pixels)
    image = theirs(prompt, num_inference_steps=2, height=16, width=16, output_type="np").images
    assert image.shape == (1, 16, 16, 3)


def test_the_export_is_used_by_generate_at_its_own_size(unet_run: Path, forks: Forks, tmp_path: Path) -> None:
    command = ("generate", "a disc", "--model", unet_run / "export", "--steps", 2, "--seed", 1, "--device", "cpu")
    ended = forks.sdcli(*command, "--output", tmp_path / "a.png", "--json")
    assert ended.code == 0, ended.stderr
    record = json.loads(ended.stdout)
    assert (record["width"], record["height"]) == (16, 16)


def test_the_prediction_asked_for_is_exported(pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path) -> None:
    command = train_unet(pictures, tmp_path / "run", vae_run)
    assert forks.sdcli(*command, "--steps", 1, "--prediction", "v").code == 0
    config = json.loads((tmp_path / "run/export/scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    assert config["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("write", [write_sd1, write_sd2], ids=["1.x", "2.x"])
def test_a_model_as_published_is_trained_further_and_keeps_its_configs(
    pictures: Path, forks: Forks, tmp_path: Path, write: Any
) -> None:
    model = write(tmp_path / "model")
    command = ("train-unet", "--data", pictures, "--model", model, "--run", tmp_path / "run", "--device", "cpu")
    ended = forks.sdcli(*command, "--steps", 1, "--batch-size", 2)
    assert ended.code == 0, ended.stderr
    read = [json.loads((m / "scheduler/scheduler_config.json").read_text()) for m in (model, tmp_path / "run/export")]
    assert read[0] == read[1]
    StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "export", local_files_only=True)


def test_a_prediction_type_that_cannot_be_trained_is_refused(pictures: Path, forks: Forks, tmp_path: Path) -> None:
    model = write_sd1(tmp_path / "model")
    edit_json(model / "scheduler" / "scheduler_config.json", prediction_type="score")
    command = ("train-unet", "--data", pictures, "--model", model, "--run", tmp_path / "run", "--device", "cpu")
    ended = forks.sdcli(*command, "--steps", 1)
    assert ended.code == 3
    assert "prediction_type" in ended.stderr


def test_weights_that_do_not_fit_float16_are_not_exported(
    pictures: Path, unet_run: Path, forks: Forks, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(unet_run / "export", tmp_path / "model"))
    weights = weights_of(model, "unet")
    weights["conv_out.bias"] = torch.full_like(weights["conv_out.bias"], 1e6)  # finite, but not in float16
    save_file(weights, model / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    command = ("train-unet", "--data", pictures, "--model", model, "--run", tmp_path / "run", "--device", "cpu")
    ended = forks.sdcli(*command, "--resolution", 16, "--steps", 1, "--lr", 0, "--export-dtype", "float16")
    assert ended.code == 7
    assert "conv_out.bias is not finite in torch.float16" in ended.stderr
    assert not [name for name in names(tmp_path / "run") if name.startswith("export")]


def test_a_loss_that_is_not_finite_ends_the_run_without_an_export(
    pictures: Path, unet_run: Path, forks: Forks, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(unet_run / "export", tmp_path / "model"))
    weights = weights_of(model, "unet")
    weights["conv_out.bias"] = torch.full_like(weights["conv_out.bias"], 3e38)  # finite, its square is not
    save_file(weights, model / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    command = ("train-unet", "--data", pictures, "--model", model, "--run", run, "--device", "cpu")
    ended = forks.sdcli(*command, "--resolution", 16, "--steps", 9, "--save-every", 1)
    assert ended.code == 7
    assert "not finite for 3 steps up to step 3 (last good: checkpoint 2)" in ended.stderr
    assert not (run / "export").exists()
    for path in run.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())
