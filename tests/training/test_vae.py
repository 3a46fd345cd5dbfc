"""train-vae, as real processes on six small pictures; and its mathematics."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from safetensors.torch import load_file
from torch import Tensor

from sdcli.pipeline import features
from sdcli.pipeline import vae as latent
from sdcli.pipeline.bundle import load_vae
from sdcli.train_specs import TrainVaeSpec
from sdcli.training import checkpoint, data, parts, vae
from sdcli.training.order import Draw
from sdcli.training.state import State
from sdcli.training.vae import VaeTask
from tests.forks import Forks
from tests.models import edit_json
from tests.runs import DAMAGES, final_files, metrics, names, newest_checkpoint, train_vae

CPU = torch.device("cpu")


def task_of(pictures: Path, **settings: object) -> VaeTask:
    spec = TrainVaeSpec(data=pictures, init="tiny", device="cpu", **settings)  # type: ignore[arg-type]
    model = parts.vae(spec, CPU).model
    resolution = spec.resolution or int(model.config["sample_size"])
    return VaeTask(model, spec, data.find(pictures), resolution, features.perceptual("builtin"), Accelerator(cpu=True))


# Resuming


@pytest.mark.parametrize("stops", [[3], [1, 2]], ids=["once", "a resume of a resume"])
def test_a_run_in_parts_ends_as_a_straight_one_bit_for_bit(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path, stops: list[int]
) -> None:
    done = 0
    for stop in stops:
        ended = forks.sdcli(*train_vae(pictures, tmp_path / "run"), "--stop-after", stop)
        done += stop
        assert (ended.code, ended.stdout) == (0, f"stopped at step {done} of 6; the same command goes on\n")
    ended = forks.sdcli(*train_vae(pictures, tmp_path / "run"))
    assert (ended.code, ended.stdout) == (0, f"{tmp_path / 'run' / 'export'}\n")
    assert final_files(tmp_path / "run") == final_files(vae_run)


def test_killed_at_a_write_a_run_goes_on_to_the_same_end_and_leaves_no_litter(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path
) -> None:
    writes = forks.sdcli(*train_vae(pictures, tmp_path / "straight")).writes
    for write in range(3, writes, writes // 8):
        run = tmp_path / str(write)
        ended = forks.sdcli(*train_vae(pictures, run), at=write, send=signal.SIGKILL)
        assert ended.code == -signal.SIGKILL
        ended = forks.sdcli(*train_vae(pictures, run))
        assert ended.code == 0, ended.stderr
        assert "warning" not in ended.stderr
        assert final_files(run) == final_files(vae_run)
        assert names(run) == names(tmp_path / "straight")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=["TERM", "INT", "HUP"]
)
def test_a_signal_while_a_checkpoint_is_written_stops_the_run_saved(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path, number: int, code: int
) -> None:
    run = tmp_path / "run"
    ended = forks.sdcli(*train_vae(pictures, run), at=30, send=number)
    assert ended.code == code
    assert ended.stderr.splitlines()[-1] == "sdcli: error: stopped; the same command goes on from here"
    assert newest_checkpoint(run).name == "checkpoint-00000002"
    assert forks.sdcli(*train_vae(pictures, run)).code == 0
    assert final_files(run) == final_files(vae_run)


def test_terminated_between_two_checkpoints_a_run_saves_where_it_stands(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    never = ("--save-every", 100)
    code = """
import os, signal, sys
from pathlib import Path
from sdcli.cli import app
metrics = Path(arguments[0]) / "metrics.jsonl"
def tell(event, values):  # when a picture is opened after a first step was logged
    if event == "open" and str(values[0]).endswith(".png") and metrics.exists() and metrics.stat().st_size:
        os.kill(os.getpid(), signal.SIGTERM)
sys.addaudithook(tell)
sys.exit(app.run(arguments[1:]))
"""
    arguments = [str(a) for a in (run, *train_vae(pictures, run), *never)]
    ended = forks.python(code, arguments)
    assert ended.code == 143
    stopped_at = len(metrics(run))
    assert 1 <= stopped_at < 6
    assert newest_checkpoint(run).name == f"checkpoint-{stopped_at:08d}"
    assert forks.sdcli(*train_vae(pictures, run), *never).code == 0
    assert final_files(run) == final_files(vae_run)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path, damage: str
) -> None:
    run = Path(shutil.copytree(vae_run, tmp_path / "run"))
    shutil.rmtree(run / "export")
    DAMAGES[damage](newest_checkpoint(run) / "model.safetensors")
    ended = forks.sdcli(*train_vae(pictures, run))
    assert ended.code == 0
    assert ended.stderr.count("sdcli: warning: ") == 1
    assert "checkpoint-00000006: model.safetensors is damaged or missing" in ended.stderr
    assert final_files(run) == final_files(vae_run)


def test_without_a_whole_checkpoint_the_run_is_refused(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(vae_run, tmp_path / "run"))
    for path in (run / "checkpoints").iterdir():
        (path / "model.safetensors").unlink()
    ended = forks.sdcli(*train_vae(pictures, run))
    assert ended.code == 3
    assert ended.stderr.splitlines()[-1].endswith("none of its 2 checkpoints is whole; begin another run with --run")


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_goes_on_when_there_is_room(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert forks.sdcli(*train_vae(pictures, run), "--stop-after", 2).code == 0
    before = names(run)
    ended = forks.sdcli(*train_vae(pictures, run), file_limit=50_000)
    assert ended.code == 5
    assert ended.stderr.splitlines()[-1].startswith("sdcli: error: ")
    assert names(run) == before
    assert forks.sdcli(*train_vae(pictures, run)).code == 0
    assert final_files(run) == final_files(vae_run)


def test_a_disk_too_full_for_the_export_keeps_the_training(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(vae_run, tmp_path / "run"))
    shutil.rmtree(run / "export")
    ended = forks.sdcli(*train_vae(pictures, run), file_limit=50_000)
    assert ended.code == 5
    assert not [name for name in names(run) if name.startswith("export")]
    assert forks.sdcli(*train_vae(pictures, run)).code == 0
    assert final_files(run) == final_files(vae_run)


# Refusals


def test_other_settings_in_the_same_run_folder_are_refused_by_name(pictures: Path, vae_run: Path, forks: Forks) -> None:
    before = final_files(vae_run)
    ended = forks.sdcli(*train_vae(pictures, vae_run), "--lr", 0.002, "--kl-weight", 0.5)
    assert ended.code == 3
    assert "kl_weight was 1e-06 and is 0.5 now, lr was 0.001 and is 0.002 now" in ended.stderr
    assert final_files(vae_run) == before


def test_settings_that_do_not_change_the_result_may_differ(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = forks.sdcli(*train_vae(pictures, run), "--stop-after", 3, "--workers", 1, "--save-every", 5, "--keep", 7)
    assert first.code == 0
    assert forks.sdcli(*train_vae(pictures, run), "--workers", 3).code == 0
    assert final_files(run) == final_files(vae_run)


def test_changed_data_in_the_same_run_folder_is_refused(own_pictures: Path, forks: Forks, tmp_path: Path) -> None:
    assert forks.sdcli(*train_vae(own_pictures, tmp_path / "run"), "--stop-after", 1).code == 0
    (own_pictures / "dot.png").unlink()
    ended = forks.sdcli(*train_vae(own_pictures, tmp_path / "run"))
    assert ended.code == 3
    assert "data_hash was" in ended.stderr


def test_a_second_process_on_the_same_run_folder_is_refused(pictures: Path, forks: Forks, tmp_path: Path) -> None:
    with checkpoint.owned(tmp_path / "run"):
        ended = forks.sdcli(*train_vae(pictures, tmp_path / "run"))
    assert ended.code == 8
    assert ended.stderr == (
        f"sdcli: error: {tmp_path / 'run'}: another training owns this run folder; wait for it to end\n"
    )
    assert forks.sdcli(*train_vae(pictures, tmp_path / "run"), "--stop-after", 1).code == 0


def test_broken_pictures_are_named_before_the_first_step(own_pictures: Path, forks: Forks, tmp_path: Path) -> None:
    whole = {name: (own_pictures / name).read_bytes() for name in ("bar.png", "dot.png")}
    for name in ("bar.png", "dot.png"):
        (own_pictures / name).write_bytes(b"broken")
    ended = forks.sdcli(*train_vae(own_pictures, tmp_path / "run"))
    assert ended.code == 3
    assert "2 pictures cannot be read" in ended.stderr and "bar.png" in ended.stderr and "dot.png" in ended.stderr
    assert not list((tmp_path / "run").glob("*.jsonl"))
    for name, picture in whole.items():
        (own_pictures / name).write_bytes(picture)
    assert forks.sdcli(*train_vae(own_pictures, tmp_path / "run"), "--stop-after", 1).code == 0


def test_a_folder_of_pictures_is_no_run_folder_and_stays_as_it_is(own_pictures: Path, forks: Forks) -> None:
    before = names(own_pictures)
    ended = forks.sdcli(*train_vae(own_pictures, own_pictures))
    assert ended.code == 3
    assert "holds bar.png but no run" in ended.stderr
    assert names(own_pictures) == before


def test_a_size_that_does_not_fit_is_refused_and_the_mended_command_takes_the_folder(
    pictures: Path, forks: Forks, tmp_path: Path
) -> None:
    ended = forks.sdcli(*train_vae(pictures, tmp_path / "run"), "--resolution", 17)
    assert ended.code == 2
    assert ended.stderr == "sdcli: error: --resolution 17: is no multiple of 2, which this VAE needs; use 16 or 18\n"
    assert not (tmp_path / "run").exists()
    assert forks.sdcli(*train_vae(pictures, tmp_path / "run"), "--resolution", 16, "--stop-after", 1).code == 0


def test_a_disk_that_fills_between_two_checkpoints_is_an_output_error(
    pictures: Path, forks: Forks, tmp_path: Path
) -> None:
    command = (*train_vae(pictures, tmp_path / "run"), "--steps", 60, "--save-every", 60)
    ended = forks.sdcli(*command, file_limit=3000)  # bytes: more than any file before the log of step 30 or so
    assert ended.code == 5
    assert "metrics.jsonl: file too large" in ended.stderr


def test_a_loss_that_is_not_finite_ends_the_run_without_an_export(pictures: Path, forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = forks.sdcli(*train_vae(pictures, run), "--l1-weight", 1e39)
    assert ended.code == 7
    assert "not finite for 3 steps up to step 3" in ended.stderr
    assert not (run / "export").exists()
    for path in run.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--mixed-precision", "fp16"), 2, "--mixed-precision fp16: a CPU cannot train in it"),
        (("--device", "banana"), 2, "--device banana: unknown"),
        (("--init", "huge"), 2, "--init huge: no such preset or file"),
        (("--model", "builtin"), 2, "--model and --init exclude each other"),
        (("--regularizer", "vq", "--gradient-checkpointing"), 2, "--gradient-checkpointing: a VAE with a codebook"),
        (("--compile", "--disc-start", 2), 2, "--compile with an adaptive weight"),
        (("--freeze-encoder",), 2, "--freeze-encoder with --init: a fresh encoder knows nothing yet"),
        (("--data", "nowhere"), 3, "nowhere: is no folder"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, tuple) else "",
)
def test_a_wrong_option_is_one_line_and_nothing_is_written(
    pictures: Path, forks: Forks, tmp_path: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    ended = forks.sdcli(*train_vae(pictures, tmp_path / "run"), *options)
    assert (ended.code, ended.stdout) == (code, "")
    assert ended.stderr.startswith(f"sdcli: error: {words}") and ended.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_file_of_configs_is_part_of_what_makes_a_run_the_same(pictures: Path, forks: Forks, tmp_path: Path) -> None:
    configs = json.loads((parts.PRESETS / "tiny.json").read_text(encoding="utf-8"))
    command = (*train_vae(pictures, tmp_path / "run"), "--init", tmp_path / "mine.json", "--stop-after", 1)
    (tmp_path / "mine.json").write_text(json.dumps(configs), encoding="utf-8")
    assert forks.sdcli(*command).code == 0
    configs["vae"]["norm_num_groups"] = 4
    (tmp_path / "mine.json").write_text(json.dumps(configs), encoding="utf-8")
    ended = forks.sdcli(*command)
    assert ended.code == 3
    assert "origin was" in ended.stderr


# What is trained and exported


def test_the_export_is_the_moving_average_in_the_layout_of_diffusers(vae_run: Path) -> None:
    exported = AutoencoderKL.from_pretrained(vae_run / "export" / "vae").state_dict()
    average = load_file(newest_checkpoint(vae_run) / "ema.safetensors")
    weights = load_file(newest_checkpoint(vae_run) / "model.safetensors")
    assert all(torch.equal(value, average[f"vae.{key}"]) for key, value in exported.items())
    assert any(not torch.equal(value, weights[f"vae.{key}"]) for key, value in exported.items())


def test_the_exported_scaling_factor_gives_latents_a_std_of_1(pictures: Path, vae_run: Path) -> None:
    theirs = AutoencoderKL.from_pretrained(vae_run / "export" / "vae")
    pixels = torch.cat([data.load_pixels(sample, (16, 16)) for sample in data.find(pictures).samples])
    torch.manual_seed(0)
    with torch.no_grad():
        latents = theirs.encode(pixels).latent_dist.sample() * theirs.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1.0, abs=0.03)
    summary = json.loads((vae_run / "summary.json").read_text(encoding="utf-8"))
    assert summary["scaling_factor"] == theirs.config.scaling_factor


def test_the_psnr_told_is_that_of_the_exported_vae(pictures: Path, vae_run: Path) -> None:
    theirs = AutoencoderKL.from_pretrained(vae_run / "export" / "vae")
    pixels = torch.cat([data.load_pixels(sample, (16, 16)) for sample in data.find(pictures).samples])
    with torch.no_grad():
        back = theirs.decode(theirs.encode(pixels).latent_dist.mode()).sample
    unit, unit_back = (pixels + 1) / 2, ((back + 1) / 2).clamp(0, 1)
    psnr = -10 * (unit - unit_back).square().mean(dim=(1, 2, 3)).log10().mean()
    summary = json.loads((vae_run / "summary.json").read_text(encoding="utf-8"))
    assert summary["psnr"] == pytest.approx(float(psnr), abs=1e-3)


def test_an_export_in_float16_is_in_float16(pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path) -> None:
    run = Path(shutil.copytree(vae_run, tmp_path / "run"))
    assert forks.sdcli(*train_vae(pictures, run), "--export-dtype", "float16").code == 0
    half, full = (load_file(r / "export/vae/diffusion_pytorch_model.safetensors") for r in (run, vae_run))
    assert all(torch.equal(half[key], value.half()) for key, value in full.items())


def test_a_model_trained_with_a_rate_of_0_keeps_its_vae(
    pictures: Path, unet_run: Path, forks: Forks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("train-vae", "--data", pictures, "--model", unet_run / "export", "--run", run, "--device", "cpu")
    assert forks.sdcli(*command, "--steps", 2, "--lr", 0, "--resolution", 16).code == 0
    before, after = (load_vae(folder / "export", device=CPU, dtype=torch.float32) for folder in (unet_run, run))
    for key, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[key], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_with_a_frozen_encoder_latents_stay_and_a_run_in_parts_ends_as_a_straight_one(
    pictures: Path, forks: Forks, tmp_path: Path, regularizer: str
) -> None:
    first, run, parted = (tmp_path / name for name in ("first", "run", "parted"))
    assert forks.sdcli(*train_vae(pictures, first), "--regularizer", regularizer).code == 0
    edit_json(first / "export" / "vae" / "config.json", scaling_factor=0.5)  # another than would be measured anew
    command = [one for one in train_vae(pictures, run) if one not in ("--init", "tiny")]
    command += ["--model", first / "export", "--freeze-encoder"]
    ended = forks.sdcli(*command)
    assert ended.code == 0, ended.stderr
    old, new = (load_vae(folder, device=CPU, dtype=torch.float32) for folder in (first / "export", run / "export"))
    assert new.config["scaling_factor"] == 0.5
    after = new.state_dict()
    changed = {name.split(".")[0] for name, value in old.state_dict().items() if not torch.equal(after[name], value)}
    assert changed == {"decoder", "post_quant_conv"} | ({"quantize"} if regularizer == "vq" else set())
    command[command.index(run)] = parted
    assert forks.sdcli(*command, "--stop-after", 3).code == 0
    assert forks.sdcli(*command).code == 0
    assert final_files(parted) == final_files(run)


def test_the_loss_is_the_weighted_sum_of_its_terms(pictures: Path) -> None:
    task = task_of(pictures, l1_weight=0.25, l2_weight=3.0, kl_weight=0.01, perceptual_weight=0.5)
    batch = task.load([Draw(0, 0), Draw(1, 1)])
    terms = task.losses(task.model, batch, 0)
    with torch.no_grad():
        posterior = task.vae.encode(batch["pixels"]).latent_dist
        back = task.vae.decode(posterior.mean + posterior.std * batch["noise"]).sample
        l1, l2 = (back - batch["pixels"]).abs().mean(), (back - batch["pixels"]).square().mean()
        kl = posterior.kl().sum() / batch["pixels"].numel()
        look = task.network(back, batch["pixels"]).mean()
    torch.testing.assert_close(terms["kl"].detach(), kl, rtol=1e-4, atol=1e-6)
    expected = 0.25 * l1 + 3.0 * l2 + 0.5 * look + 0.01 * kl
    torch.testing.assert_close(terms["loss"].detach(), expected, rtol=1e-4, atol=1e-6)


def gradients(module: torch.nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def test_the_perceptual_weight_changes_the_decoders_gradient(pictures: Path) -> None:
    norms = []
    for weight in (0.0, 1.0):
        task = task_of(pictures, perceptual_weight=weight)
        task.losses(task.model, task.load([Draw(0, 0), Draw(1, 1)]), 0)["loss"].backward()  # type: ignore[no-untyped-call]
        norms.append(task.vae.decoder.conv_out.weight.grad.clone())
    assert not torch.allclose(norms[0], norms[1], rtol=0.01)


def adversarial_task(pictures: Path, **settings: object) -> VaeTask:
    return task_of(pictures, disc_start=0, disc_layers=1, disc_width=16, **settings)


def test_either_turn_gives_the_others_module_no_gradient(pictures: Path) -> None:
    task = adversarial_task(pictures)
    batch = task.load([Draw(0, 0), Draw(1, 1)])
    task.losses(task.model, batch, 0)["loss"].backward()  # type: ignore[no-untyped-call]
    assert {grad is None for grad in gradients(task.critic)} == {True}
    before = gradients(task.model)
    assert {grad is None for grad in before} == {False}
    task.critic_losses(task.critic, batch, 0)["loss"].backward()  # type: ignore[no-untyped-call]
    assert {grad is None for grad in gradients(task.critic)} == {False}
    assert all(
        torch.equal(a, b) for a, b in zip(before, gradients(task.model), strict=True) if a is not None and b is not None
    )


def test_a_step_of_the_discriminator_leaves_the_vae_bit_equal(pictures: Path, tmp_path: Path) -> None:
    task = adversarial_task(pictures)
    batch = task.load([Draw(0, 0), Draw(1, 1)])
    task.losses(task.model, batch, 0)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    judged = task.critic.last.weight.detach().clone()
    state = State(task.turns[1:], task.spec, tmp_path, Accelerator(cpu=True), "hash")
    state.advance(batch)
    assert not torch.equal(task.critic.last.weight, judged)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_adversarial_weight_is_lambda_computed_apart_and_rises_in_the_warm_up(
    pictures: Path, adaptive: bool
) -> None:
    task = adversarial_task(pictures, adaptive_weight=adaptive, disc_weight=0.7, disc_warmup=4)
    batch = task.load([Draw(0, 0), Draw(1, 1)])
    found = [float(task.losses(task.model, batch, step)["d_weight"]) for step in (0, 1, 3, 9)]
    last = task.vae.decoder.conv_out.weight
    mean, logvar = latent.moments(task.vae, batch["pixels"])
    back = latent.decode(task.vae, latent.scale(task.vae, mean + (logvar / 2).exp() * batch["noise"]))
    error = back - batch["pixels"]
    rec = error.abs().mean() + 0.5 * error.square().mean() + task.network(back, batch["pixels"]).mean()
    (pull,) = torch.autograd.grad(rec, last, retain_graph=True)
    (push,) = torch.autograd.grad(-task.critic(back).mean(), last)
    by_hand = float(pull.norm() / (push.norm() + 1e-4)) if adaptive else 1.0
    assert found == pytest.approx([0.7 * by_hand * share for share in (0.25, 0.5, 1.0, 1.0)], rel=1e-4)


def test_before_its_first_step_the_discriminator_is_no_part_of_the_loss(pictures: Path) -> None:
    task = task_of(pictures, disc_start=3, steps=9, disc_layers=1, disc_width=16)
    batch = task.load([Draw(0, 0), Draw(1, 1)])
    assert "adversarial" not in task.losses(task.model, batch, 2)
    assert {"adversarial", "d_weight"} <= task.losses(task.model, batch, 3).keys()
    assert [turn.begin for turn in task.turns] == [0, 3]
    assert len(task_of(pictures, disc_start=9, steps=9).turns) == 1


def test_an_adversarial_run_in_parts_ends_as_a_straight_one(pictures: Path, forks: Forks, tmp_path: Path) -> None:
    extra = ("--disc-start", 2, "--disc-layers", 1, "--disc-width", 16, "--learn-logvar", "--holdout", 0.2)
    assert forks.sdcli(*train_vae(pictures, tmp_path / "straight"), *extra).code == 0
    for stop in (3, 2):
        assert forks.sdcli(*train_vae(pictures, tmp_path / "parts"), *extra, "--stop-after", stop).code == 0
    assert forks.sdcli(*train_vae(pictures, tmp_path / "parts"), *extra).code == 0
    assert final_files(tmp_path / "parts") == final_files(tmp_path / "straight")
    row = [line for line in metrics(tmp_path / "parts") if "loss" in line][-1]
    assert {"sdcli-perceptual", "logvar", "adversarial", "d_weight", "critic_loss", "critic_grad_norm"} <= row.keys()


# The codebook


def test_with_a_codebook_plain_diffusers_loads_the_result_and_decodes_the_same(
    pictures: Path, forks: Forks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = forks.sdcli(*train_vae(pictures, run), "--regularizer", "vq", "--codebook-size", 16)
    assert ended.code == 0, ended.stderr
    theirs = VQModel.from_pretrained(run / "export" / "vae")
    ours = load_vae(run / "export", device=CPU, dtype=torch.float32)
    pixels = data.load_pixels(data.find(pictures).samples[0], (16, 16))
    with torch.no_grad():
        expected = theirs.decode(theirs.encode(pixels).latents).sample
        found = latent.decode(ours, latent.encode(ours, pixels))
    torch.testing.assert_close(found, expected)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert 0 < summary["codes_used"] <= 1 < summary["perplexity"] <= 16
    assert {"codebook", "perplexity", "codes_used"} <= metrics(run)[0].keys()


def test_a_run_with_a_codebook_in_parts_ends_as_a_straight_one(pictures: Path, forks: Forks, tmp_path: Path) -> None:
    extra = ("--regularizer", "vq", "--codebook-size", 16)
    assert forks.sdcli(*train_vae(pictures, tmp_path / "straight"), *extra).code == 0
    assert forks.sdcli(*train_vae(pictures, tmp_path / "parts"), *extra, "--stop-after", 4).code == 0
    assert forks.sdcli(*train_vae(pictures, tmp_path / "parts"), *extra).code == 0
    assert final_files(tmp_path / "parts") == final_files(tmp_path / "straight")


def test_the_regularizer_of_a_model_is_not_another_one(
    pictures: Path, vae_run: Path, sd1: Path, forks: Forks, tmp_path: Path
) -> None:
    command = ("train-vae", "--data", pictures, "--model", sd1, "--run", tmp_path / "run", "--device", "cpu")
    ended = forks.sdcli(*command, "--regularizer", "vq")
    assert (ended.code, "this model's VAE has kl" in ended.stderr) == (2, True)


def test_a_fresh_posterior_begins_narrow_around_its_mean(pictures: Path) -> None:
    task = task_of(pictures)
    vae._narrow(task.vae)
    with torch.no_grad():
        mean, logvar = latent.moments(task.vae, task.load([Draw(0, 0), Draw(1, 1)])["pixels"])
    assert torch.equal(logvar, torch.full_like(logvar, vae.NARROW_LOGVAR))
    assert float(mean.std()) > 0


@pytest.mark.parametrize("random_crop", [False, True])
def test_a_samples_noise_and_crop_do_not_depend_on_its_batch(pictures: Path, random_crop: bool) -> None:
    task = task_of(pictures, random_crop=random_crop, resolution=16)
    together = task.load([Draw(3, 7), Draw(1, 8), Draw(4, 9)])
    alone = task.load([Draw(1, 8)])
    assert together["pixels"].shape == (3, 3, 16, 16)
    for name in ("pixels", "noise"):
        assert torch.equal(together[name][1:2], alone[name])
    assert not torch.equal(task.load([Draw(1, 10)])["noise"], alone["noise"])
    assert torch.equal(task.load([Draw(1, 10)])["pixels"], alone["pixels"]) is not random_crop


def test_metrics_hold_every_term_of_every_step(vae_run: Path) -> None:
    rows = metrics(vae_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    expected = {"step", "loss", "l1", "l2", "sdcli-perceptual", "kl", "grad_norm", "lr"}
    assert all(row.keys() == expected for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_model_with_a_codebook_encodes_and_decodes_and_has_nothing_to_sample(
    pictures: Path, unet_run: Path, forks: Forks, tmp_path: Path
) -> None:
    extra = ("--regularizer", "vq", "--codebook-size", 16)
    assert forks.sdcli(*train_vae(pictures, tmp_path / "run"), *extra).code == 0
    model = Path(shutil.copytree(unet_run / "export", tmp_path / "model"))
    shutil.rmtree(model / "vae")
    shutil.copytree(tmp_path / "run" / "export" / "vae", model / "vae")
    common = ("--model", model, "--device", "cpu")
    picture, latents = pictures / "dot.png", tmp_path / "dot.safetensors"
    assert forks.sdcli("encode", picture, *common, "-o", latents).code == 0
    assert forks.sdcli("decode", latents, *common, "-o", tmp_path / "back.png").code == 0
    ended = forks.sdcli("encode", picture, *common, "--sample", "-o", tmp_path / "other.safetensors")
    assert (ended.code, "no posterior" in ended.stderr) == (2, True)
