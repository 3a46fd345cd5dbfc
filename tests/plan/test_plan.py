"""Everything is decided, and refused, before a tensor exists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdcli.errors import ExitCode, InputError, OutputError, SdcliError, UsageError
from sdcli.plan import plan
from sdcli.plan.conditioning import Label
from sdcli.plan.words import EmbeddingFile
from sdcli.specs import GenerateSpec
from tests import models

PROMPT = "a picture of a puppy"


@pytest.fixture
def asked(model: Path, tmp_path: Path) -> Any:
    """A spec for that model, with the output in a folder of its own."""

    def spec(**values: Any) -> GenerateSpec:
        return GenerateSpec(**{"prompt": PROMPT, "model": str(model), "output": tmp_path / "out"} | values)

    return spec


def test_without_settings_the_defaults_of_the_tool_hold(asked: Any) -> None:
    decided = plan(asked())
    assert (decided.scheduler.name, decided.steps, decided.guidance) == ("dpm", 25, 7.5)
    assert (decided.width, decided.height) == (models.SIZE, models.SIZE)  # sample_size times the VAE factor


def test_the_models_own_settings_win_over_the_defaults_and_the_user_over_both(asked: Any, model: Path) -> None:
    (model / "sdcli.json").write_text('{"scheduler": "heun", "steps": 9, "guidance": 3, "size": "16x48", "more": 1}')
    own = plan(asked())
    assert (own.scheduler.name, own.steps, own.guidance, own.width, own.height) == ("heun", 9, 3.0, 16, 48)

    users = plan(asked(scheduler="plms", steps=5, guidance=1.0, size="64x32"))
    assert (users.scheduler.name, users.steps, users.guidance) == ("pndm", 5, 1.0)
    assert (users.width, users.height) == (64, 32)


def test_one_side_alone_keeps_the_other(asked: Any) -> None:
    assert (plan(asked(width=64)).width, plan(asked(width=64)).height) == (64, models.SIZE)
    assert (plan(asked(height=64)).width, plan(asked(height=64)).height) == (models.SIZE, 64)


@pytest.mark.parametrize("values", [{"size": "33x32"}, {"width": 31}, {"height": 33}])
def test_a_size_that_is_no_multiple_of_the_factor_is_refused_with_the_nearest(asked: Any, values: Any) -> None:
    with pytest.raises(UsageError, match=r"no multiple of 2, .*; use 3[02] or 3[24]"):
        plan(asked(**values))


def test_seeds_follow_each_other_and_wrap(asked: Any) -> None:
    assert plan(asked(seed=5, count=4)).seeds == (5, 6, 7, 8)
    assert plan(asked(seed=2**64 - 2, count=4)).seeds == (2**64 - 2, 2**64 - 1, 0, 1)


def test_a_seed_is_drawn_anew_when_none_is_given(asked: Any) -> None:
    assert len({plan(asked()).seeds[0] for _ in range(4)}) == 4


@pytest.mark.parametrize("prompt", ["", " ", "\n\t "])
def test_an_empty_prompt_is_refused(asked: Any, prompt: str) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        plan(asked(prompt=prompt))


@pytest.mark.parametrize("name", ["prompt", "negative"])
def test_text_that_is_no_unicode_is_refused(asked: Any, name: str) -> None:
    with pytest.raises(UsageError, match=r"udcff.*no valid text"):
        plan(asked(**{name: "a \udcff dog"}))  # how Python hands over the byte 0xff of a command line


def test_an_unknown_scheduler_is_told_before_a_missing_model(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'dmp' is unknown"):
        plan(asked(scheduler="dmp", model=str(tmp_path / "none")))


def test_steps_the_scheduler_cannot_do_are_refused(asked: Any) -> None:
    with pytest.raises(UsageError, match="ddim cannot do 1000 steps"):
        plan(asked(scheduler="ddim", steps=1000))


# FILE or FILE:TOKEN.


@pytest.mark.parametrize(
    ("written", "path", "token"),
    [
        ("cat.pt", "cat.pt", None),
        ("cat.pt:<my-cat>", "cat.pt", "<my-cat>"),
        ("cat.pt:my cat", "cat.pt", "my cat"),
        ("odd:name.pt", "odd:name.pt", None),
        ("odd:name.pt:cat", "odd:name.pt", "cat"),
        ("cat.pt:2", "cat.pt:2", None),  # a file of the whole name comes first
        (":x", ":x", None),
    ],
)
def test_the_whole_is_a_file_or_what_follows_the_last_colon_a_token(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, path: str, token: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cat.pt", "odd:name.pt", "cat.pt:2", ":x"):
        Path(name).write_bytes(b"PK\3\4")
    decided = plan(asked(embedding=(written, "cat.pt")))
    assert decided.embeddings == (EmbeddingFile(Path(path), token), EmbeddingFile(Path("cat.pt"), None))
    assert decided.describe()["embeddings"] == [{"file": path, "token": token}, {"file": "cat.pt", "token": None}]


@pytest.mark.parametrize(
    ("written", "error", "said"),
    [
        ("none.pt", InputError, "none.pt: no such file or directory"),
        ("none.pt:cat", InputError, "--embedding none.pt:cat: no such file; write it as FILE or FILE:TOKEN"),
        ("C:\\models\\cat.pt", InputError, "--embedding C:\\models\\cat.pt: no such file"),
        ("a\0b:c", InputError, "no such file"),
        ("x" * 5000, InputError, "file name too long"),
        ("", InputError, "is a folder"),
        (".", InputError, "is a folder"),
        (".:cat", InputError, "is a folder"),
        ("cat.pt:", UsageError, "--embedding cat.pt:: the token after the colon is empty"),
        ("cat.pt: ", UsageError, "the token after the colon is empty"),
    ],
)
def test_an_embedding_that_is_not_there_is_told_before_the_model_is_looked_for(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, error: type[SdcliError], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cat.pt").touch()
    with pytest.raises(error) as caught:
        plan(asked(embedding=(written,), model="owner/none", offline=True))
    assert said in str(caught.value)


# What is drawn goes where.


def test_in_a_folder_every_image_has_a_name_of_prompt_and_seed(asked: Any, tmp_path: Path) -> None:
    names = [f"a-picture-of-a-puppy-{seed}.png" for seed in (5, 6)]
    for folder in (tmp_path / "new", tmp_path):
        assert plan(asked(seed=5, count=2, output=folder)).targets == tuple(folder / name for name in names)


def test_a_folder_with_a_dot_in_its_name_is_a_folder(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "v1.5").mkdir()
    assert plan(asked(seed=5, output=tmp_path / "v1.5")).targets[0].parent == tmp_path / "v1.5"


def test_a_file_is_numbered_from_the_second_image_on(asked: Any, tmp_path: Path) -> None:
    targets = plan(asked(count=3, output=tmp_path / "x.PNG")).targets
    assert [path.name for path in targets] == ["x.PNG", "x-2.png", "x-3.png"]


def test_only_files_of_a_known_kind_are_written(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"x\.bmp: is of no kind of picture"):
        plan(asked(output=tmp_path / "x.bmp"))


def test_a_folder_below_a_file_is_refused(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        plan(asked(output=tmp_path / "file" / "out"))


def test_an_existing_file_is_refused_when_that_was_asked_for(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "x-2.png").touch()
    spec = asked(count=2, output=tmp_path / "x.png", if_exists="error")
    with pytest.raises(OutputError, match=r"x-2\.png: exists"):
        plan(spec)


def test_latents_are_named_as_the_pictures_or_numbered_before_the_whole_ending(asked: Any, tmp_path: Path) -> None:
    in_folder = plan(asked(prompt="A Puppy", seed=3, count=2, save_latents=tmp_path)).latent_targets
    assert [path.name for path in in_folder] == ["a-puppy-3.latents.safetensors", "a-puppy-4.latents.safetensors"]
    numbered = plan(asked(count=3, save_latents=tmp_path / "z.latents.safetensors"))
    names = ["z.latents.safetensors", "z-2.latents.safetensors", "z-3.latents.safetensors"]
    assert [path.name for path in numbered.latent_targets] == names
    assert numbered.describe()["save_latents"] == [str(tmp_path / name) for name in names]
    assert plan(asked()).latent_targets == ()


@pytest.mark.parametrize(("name", "what"), [("z.png", "latents are safetensors"), ("z" * 256, "has over 255 bytes")])
def test_a_place_for_latents_that_is_none_is_refused(asked: Any, tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises((UsageError, OutputError), match=f"^--save-latents .*{what}"):
        plan(asked(save_latents=tmp_path / name))


def test_latents_that_are_there_are_refused_when_that_was_asked_for(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "z.safetensors").touch()
    with pytest.raises(OutputError, match=r"z\.safetensors: exists"):
        plan(asked(if_exists="error", save_latents=tmp_path / "z.safetensors"))


def test_planning_writes_nothing(asked: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    plan(asked(count=3))
    assert sorted(tmp_path.rglob("*")) == before


# A model that draws classes, or draws unconditionally.


def test_a_class_is_decided_and_names_the_picture(classed: Path, tmp_path: Path) -> None:
    spec = GenerateSpec(class_name="sea urchin, echinoid", model=str(classed), seed=7, output=tmp_path)
    decided = plan(spec)
    assert decided.label == Label(3, "sea urchin, echinoid")
    assert decided.guidance == 7.5
    assert decided.targets == (tmp_path / "sea-urchin-echinoid-7.png",)
    assert decided.describe()["label"] == {"index": 3, "name": "sea urchin, echinoid"}
    assert plan(replace(spec, class_name="3")).targets == decided.targets


def test_an_unconditional_model_has_no_guidance_whatever_its_settings_say(unconditional: Path, tmp_path: Path) -> None:
    folder = models.copy(unconditional, tmp_path / "model")
    (folder / "sdcli.json").write_text('{"guidance": 3, "steps": 9}')
    decided = plan(GenerateSpec(model=str(folder), seed=7, output=tmp_path))
    assert (decided.guidance, decided.steps, decided.label) == (1.0, 9, None)
    assert decided.targets == (tmp_path / "image-7.png",)
    assert "label" not in decided.describe()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"width": 24}, "reads context of width 16, the class embedder gives 24"),
        ({"width": "16"}, "class_embedder/config.json:width: is '16'"),
        ({"names": ["cat", "cat"]}, "class_embedder/config.json:names: is 'cat'"),
    ],
)
def test_a_class_embedder_that_does_not_fit_is_refused(
    classed: Path, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    folder = models.copy(classed, tmp_path / "model")
    models.edit_json(folder / "class_embedder" / "config.json", **changes)
    assert what in str(refused(GenerateSpec(class_name="cat", model=str(folder), output=tmp_path)))


# What a model folder says is untrusted.


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ('{"steps": 0}', "--steps 0: out of range"),
        ('{"steps": "9"}', "steps: is '9'; expected is int"),
        ('{"steps": true}', "steps: is True"),
        ('{"steps": 9.5}', "steps: is 9.5"),
        ('{"guidance": 0.5}', "--guidance 0.5: out of range"),
        ('{"guidance": NaN}', "is no JSON (it holds NaN)"),
        ('{"guidance": [7]}', "guidance: is [7]"),
        ('{"scheduler": "warp"}', "scheduler 'warp' is unknown"),
        ('{"scheduler": 5}', "scheduler: is 5"),
        ('{"size": "large"}', "--size large: is no size"),
        ('{"size": 512}', "size: is 512"),
        ("[]", "holds no JSON object"),
        ("{", "is no JSON"),
    ],
)
def test_a_setting_of_the_model_that_is_out_of_range_is_the_models_fault(
    asked: Any, model: Path, setting: str, what: str
) -> None:
    (model / "sdcli.json").write_text(setting)
    refusal = refused(asked())
    assert "sdcli.json" in str(refusal) and what in str(refusal)


@pytest.mark.parametrize(
    ("part", "changes", "what"),
    [
        ("unet", {"in_channels": 7}, "in_channels is 7, the VAE has 4 channels; mend"),
        ("unet", {"out_channels": 8}, "out_channels is 8, expected are 4"),
        ("scheduler", {"variance_type": "learned_range"}, "out_channels is 4, expected are 8"),
        ("unet", {"addition_embed_type": "text_time"}, "is 'text_time', of a model with one text encoder"),
        ("unet", {"num_class_embeds": 1000}, "is conditioned by num_class_embeds"),
        ("unet", {"cross_attention_dim": 24}, "reads context of width 24, the text encoder gives 16"),
        ("text_encoder", {"hidden_size": "wide"}, "text_encoder: hidden_size is 'wide'"),
        ("unet", {"sample_size": "big"}, "sample_size is 'big'"),
        ("vae", {"block_out_channels": []}, "block_out_channels is "),
        ("vae", {"block_out_channels": 7}, "block_out_channels is "),
        ("vae", {"block_out_channels": [1] * 99}, "block_out_channels is "),
        ("vae", {"latent_channels": 16}, "in_channels is 4, the VAE has 16"),
        ("vae", {"latent_channels": [4]}, "latent_channels is [4]"),
        ("vae", {"latents_std": [1, 1, 1, 1]}, "latents_std is [1, 1, 1, 1]; expected is null"),
        ("text_encoder", {"num_hidden_layers": 101}, "num_hidden_layers is 101; expected is a number of layers"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(
    asked: Any, model: Path, part: str, changes: dict[str, Any], what: str
) -> None:
    models.edit_json(model / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **changes)
    assert what in str(refused(asked()))


@pytest.mark.parametrize(
    ("part", "changes", "what"),
    [
        ("unet", {"cross_attention_dim": 16}, "reads context of width 16, the text encoders give 40"),
        ("text_encoder_2", {"hidden_size": 16}, "reads context of width 40, the text encoders give 32"),
        ("unet", {"addition_embed_type": None}, "addition_embed_type is None, of a model with two text encoders"),
        ("unet", {"addition_embed_type": "text_image"}, "addition_embed_type is 'text_image'"),
        ("unet", {"time_cond_proj_dim": 256}, "is conditioned by time_cond_proj_dim"),
        ("unet", {"projection_class_embeddings_input_dim": 60}, "is a Stable Diffusion XL refiner; only whole"),
        ("unet", {"projection_class_embeddings_input_dim": 67}, "is told of 67 numbers, the text encoder gives 20 and"),
        ("text_encoder_2", {"projection_dim": 24}, "is told of 68 numbers, the text encoder gives 24"),
        ("unet", {"addition_time_embed_dim": None}, "addition_time_embed_dim None; mend"),
        ("unet", {"addition_time_embed_dim": 0, "projection_class_embeddings_input_dim": 20}, "embed_dim 0; mend"),
        ("unet", {"addition_time_embed_dim": [8] * 5000}, "addition_time_embed_dim is [8, 8, 8, 8, 8, 8, ...]"),
        ("unet", {"addition_time_embed_dim": [8] * 16}, "addition_time_embed_dim [8, 8, 8, 8, 8, 8, ...]; mend"),
        ("unet", {"projection_class_embeddings_input_dim": 10**1000}, "projection_class_embeddings_input_dim is 1000"),
        ("vae", {"latents_mean": [0, 0, 0, 0]}, "latents_mean is [0, 0, 0, 0]; expected is null"),
    ],
)
def test_parts_of_stable_diffusion_xl_that_do_not_fit_together_are_refused(
    sdxl: Path, tmp_path: Path, part: str, changes: dict[str, Any], what: str
) -> None:
    folder = models.copy(sdxl, tmp_path / "model", without="*.safetensors")
    models.edit_json(folder / part / "config.json", **changes)
    refusal = str(refused(GenerateSpec(prompt="x", model=str(folder))))
    assert what in refusal and len(refusal) < 500


def test_an_index_that_does_not_say_what_an_empty_prompt_is_is_refused(sdxl: Path, tmp_path: Path) -> None:
    folder = models.copy(sdxl, tmp_path / "model", without="*.safetensors")
    models.edit_json(folder / "model_index.json", force_zeros_for_empty_prompt="no")
    assert "force_zeros_for_empty_prompt: is 'no'" in str(refused(GenerateSpec(prompt="x", model=str(folder))))


def test_clip_skip_leaves_a_layer_to_both_encoders_of_stable_diffusion_xl(sdxl: Path) -> None:
    assert plan(GenerateSpec(prompt="x", model=str(sdxl), clip_skip=1)).clip_skip == 1
    with pytest.raises(UsageError, match=r"--clip-skip 2: .* smaller text encoder has 3 layers; .* in 0\.\.1"):
        plan(GenerateSpec(prompt="x", model=str(sdxl), clip_skip=2))


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_unet_of_twice_the_channels_is_admitted_where_the_scheduler_config_says_variances(
    asked: Any, model: Path, variance_type: str
) -> None:
    models.edit_json(model / "unet" / "config.json", out_channels=8)
    models.edit_json(model / "scheduler" / "scheduler_config.json", variance_type=variance_type)
    plan(asked())


def test_a_scheduler_config_out_of_range_is_refused(asked: Any, model: Path) -> None:
    models.edit_json(model / "scheduler" / "scheduler_config.json", num_train_timesteps=-5)
    assert "scheduler_config.json:num_train_timesteps: is -5" in str(refused(asked()))


def test_layers_that_the_text_encoder_does_not_have_cannot_be_left_out(asked: Any, model: Path) -> None:
    assert plan(asked(clip_skip=1)).describe()["clip_skip"] == 1 and "clip_skip" not in plan(asked()).describe()
    for skip in (2, 10**9):
        with pytest.raises(UsageError, match=rf"--clip-skip {skip}: this model's text encoder has 2 layers; .* 0\.\.1"):
            plan(asked(clip_skip=skip))
    models.edit_json(model / "text_encoder" / "config.json", num_hidden_layers=...)
    with pytest.raises(UsageError, match=r"has 12 layers; it must lie in 0\.\.11"):
        plan(asked(clip_skip=12))
    models.edit_json(model / "text_encoder" / "config.json", num_hidden_layers="two")
    assert "text_encoder: num_hidden_layers is 'two'" in str(refused(asked(clip_skip=1)))


def test_a_model_without_a_text_encoder_has_no_layers_to_leave_out(classed: Path, unconditional: Path) -> None:
    for other in ({"model": str(classed), "class_name": "dog"}, {"model": str(unconditional)}):
        with pytest.raises(UsageError, match="--clip-skip 1: this model reads no prompts; leave it out"):
            plan(GenerateSpec(clip_skip=1, **other))


def test_a_width_of_512_that_transformers_does_not_write_is_known(asked: Any, model: Path) -> None:
    models.edit_json(model / "text_encoder" / "config.json", hidden_size=...)
    models.edit_json(model / "unet" / "config.json", cross_attention_dim=512)
    plan(asked())


def test_each_image_draws_its_wildcards_and_is_named_by_what_it_shows(asked: Any, tmp_path: Path) -> None:
    decided = plan(asked(prompt="a {red|blue} {dog|cat}", negative="{x|y}", seed=1, count=20, save_latents=tmp_path))
    assert {one.prompt for one in decided.prompts} == {f"a {c} {a}" for c in ("red", "blue") for a in ("dog", "cat")}
    assert {one.negative for one in decided.prompts} == {"x", "y"}
    for seed, one, path, latents in zip(
        decided.seeds, decided.prompts, decided.targets, decided.latent_targets, strict=True
    ):
        assert plan(asked(prompt="a {red|blue} {dog|cat}", negative="{x|y}", seed=seed)).prompts == (one,)
        name = f"{one.prompt.replace(' ', '-')}-{seed}"
        assert (path.name, latents.name) == (f"{name}.png", f"{name}.latents.safetensors")
    rows = decided.describe()
    assert rows["prompt_template"] == "a {red|blue} {dog|cat}" and rows["negative_template"] == "{x|y}"
    assert rows["prompts"] == [one.prompt for one in decided.prompts] and len(rows["negatives"]) == 20
    templated = plan(asked(prompt="{a dog|a cat}", output=tmp_path / "{slug}" / "{seed}", seed=1, count=9))
    assert {path.parent.name for path in templated.targets} == {"a-dog", "a-cat"}


def test_without_wildcards_the_plan_says_nothing_of_them(asked: Any) -> None:
    decided = plan(asked(prompt=r"a {dog}, {cat | \{cow|sheep\}", seed=1))
    assert decided.prompts[0].facts() == {"prompt": r"a {dog}, {cat | \{cow|sheep\}", "negative": ""}
    assert not {"prompt_template", "prompts", "negative_template", "negatives"} & decided.describe().keys()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a {dog|(cat:11)}", "the weight 11 in the prompt"),
        ("({a (dog:4)|cat}:4)", "the weight 16 of "),
        ("(a:{50|60})", "the weight [56]0 in the prompt"),  # known when it is drawn
        ("{|a dog}", "its wildcards may draw nothing at all; say outside of them what to draw"),
        ("{a|{b|}} { | }", "its wildcards may draw nothing at all"),
    ],
)
def test_what_a_wildcard_could_draw_wrong_is_refused_whatever_the_seed(asked: Any, prompt: str, said: str) -> None:
    for seed in range(9):
        with pytest.raises(UsageError, match=said):
            plan(asked(prompt=prompt, seed=seed))
    if "weight" in said:
        with pytest.raises(UsageError, match=said):
            plan(asked(negative=prompt))
    else:
        assert plan(asked(negative=prompt)).prompts


def test_the_plan_describes_itself_in_plain_values(asked: Any, model: Path, tmp_path: Path) -> None:
    assert plan(asked(scheduler="pndm", steps=4, seed=3, count=2, size="16x32")).describe() == {
        "model": str(model),
        "folder": str(model),
        "scheduler": "pndm",
        "class": "PNDM",
        "overrides": {"solver_order": 4},
        "prediction": "epsilon",
        "steps": 4,
        "evaluations": 5,
        "guidance": 7.5,
        "size": "16x32",
        "seeds": [3, 4],
        "outputs": [str(tmp_path / "out" / f"a-picture-of-a-puppy-{seed}.png") for seed in (3, 4)],
    }


def refused(spec: GenerateSpec) -> SdcliError:
    with pytest.raises(InputError) as caught:
        plan(spec)
    assert caught.value.exit_code == ExitCode.INPUT
    return caught.value
