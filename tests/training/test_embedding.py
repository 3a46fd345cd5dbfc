"""Textual inversion: the new vectors learn, nothing else of the model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sdcli.errors import SdcliWarning
from sdcli.pipeline import features, text
from sdcli.pipeline.adapters import read_embedding
from sdcli.pipeline.bundle import TextEncoder, load_text
from sdcli.pipeline.images import to_pixels
from sdcli.train_specs import TrainEmbeddingSpec
from sdcli.training import data, embedding, parts
from tests.forks import Forks
from tests.runs import final_files, metrics, newest_checkpoint

CPU = torch.device("cpu")
WORD = "<my-disc>"


def train_embedding(pictures: Path, model: Path, run: Path, *more: object) -> tuple[object, ...]:
    """A command that learns a word of two vectors in six steps."""
    common = ("--resolution", 16, "--steps", 6, "--save-every", 2, "--device", "cpu")
    word = ("--token", WORD, "--init-token", "disc", "--vectors", 2)
    return ("train-embedding", "--data", pictures, "--model", model, "--run", run, *word, *common, *more)


@pytest.fixture(scope="module")
def embedding_run(pictures: Path, unet_run: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `train_embedding`."""
    run = tmp_path_factory.mktemp("embedding") / "run"
    ended = forks.sdcli(*train_embedding(pictures, unet_run / "export", run))
    assert ended.code == 0, ended.stderr
    return run


def prepared(model: Path, **settings: object) -> tuple[TextEncoder, embedding.LearnedRows, TextEncoder]:
    """The encoder that learns, its rows, and the model's own encoder as it was."""
    spec = TrainEmbeddingSpec(model=str(model), token=WORD, init_token="a red disc", **settings)  # type: ignore[arg-type]
    whole, rows, _ = embedding.prepare(spec, parts.model_as_it_is(spec, CPU))
    assert isinstance(whole.bundle.conditioner, TextEncoder)
    return whole.bundle.conditioner, rows, load_text(model, device=CPU, dtype=torch.float32)


def table_of(encoder: TextEncoder) -> Tensor:
    layer = encoder.model.get_input_embeddings()
    assert isinstance(layer, nn.Embedding)
    return layer.weight.detach()


def test_every_row_of_the_vocabulary_is_bit_equal_after_training_and_the_new_ones_are_not(unet_run: Path) -> None:
    encoder, rows, before = prepared(unet_run / "export", vectors=3)
    begun, others = rows.vectors.detach().clone(), {n: p.clone() for n, p in encoder.model.named_parameters()}
    learns = [p for p in encoder.model.parameters() if p.requires_grad]
    assert [p is rows.vectors for p in learns] == [True]
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=0.1, weight_decay=0.5)
    ids = torch.tensor([text.tokenize(encoder, f"a picture of {WORD}").ids])
    for _ in range(3):
        encoder.model(input_ids=ids).last_hidden_state.square().sum().backward()
        optimizer.step()
    assert len(table_of(before)) == 49_408
    assert torch.equal(rows.table, table_of(before))
    assert not (rows.vectors == begun).any()
    for name, parameter in encoder.model.named_parameters():
        assert parameter is rows.vectors or torch.equal(parameter, others[name]), name


def test_the_vectors_begin_at_the_pieces_of_the_initial_words_in_turn(unet_run: Path) -> None:
    _, rows, before = prepared(unet_run / "export", vectors=5)
    ids = before.tokenizer("a red disc", add_special_tokens=False)["input_ids"]
    expected = table_of(before)[[ids[i % len(ids)] for i in range(5)]]
    assert torch.equal(rows.vectors.detach(), expected)


def test_the_rows_look_up_as_a_whole_table_does(unet_run: Path) -> None:
    encoder, rows, before = prepared(unet_run / "export", vectors=2)
    ids = torch.tensor([text.tokenize(encoder, f"red {WORD} disc").ids])
    assert int(ids.max()) == 49_409
    whole = torch.cat([table_of(before), rows.vectors.detach()])
    assert torch.equal(rows(ids), whole[ids])


def test_a_checkpoint_holds_the_vectors_alone(embedding_run: Path) -> None:
    (value,) = load_file(newest_checkpoint(embedding_run) / "model.safetensors").values()
    assert value.shape == (2, 32)
    assert len(metrics(embedding_run)) == 6


def test_the_word_is_exported_in_three_dialects_that_say_the_same(embedding_run: Path) -> None:
    folder = embedding_run / "export"
    assert sorted(p.name for p in folder.iterdir()) == [
        "my-disc-kohya.safetensors",
        "my-disc.pt",
        "my-disc.safetensors",
    ]
    found = [read_embedding(path, width=32, token=WORD).vectors for path in sorted(folder.iterdir())]
    average = load_file(newest_checkpoint(embedding_run) / "ema.safetensors")
    for vectors in found:
        assert torch.equal(vectors, next(iter(average.values())))


def test_the_a1111_file_says_after_which_step_it_was(unet_run: Path, tmp_path: Path) -> None:
    _, rows, _ = prepared(unet_run / "export")
    embedding._write(tmp_path, TrainEmbeddingSpec(token=WORD, init_token="disc", steps=6), rows, 4)
    assert torch.load(tmp_path / "my-disc.pt", weights_only=True)["step"] == 4


def test_generate_draws_with_the_word(embedding_run: Path, unet_run: Path, forks: Forks, tmp_path: Path) -> None:
    common = ("--model", unet_run / "export", "--steps", 2, "--seed", 1, "--device", "cpu", "--no-metadata")
    file = embedding_run / "export" / "my-disc.safetensors"
    ended = forks.sdcli("generate", f"a {WORD}", *common, "--embedding", file, "-o", tmp_path / "with.png")
    assert (ended.code, ended.stderr) == (0, "")
    assert forks.sdcli("generate", f"a {WORD}", *common, "-o", tmp_path / "without.png").code == 0
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_a_run_in_parts_ends_as_a_straight_one(
    pictures: Path, unet_run: Path, embedding_run: Path, forks: Forks, tmp_path: Path
) -> None:
    for stop in (1, 3):
        command = train_embedding(pictures, unet_run / "export", tmp_path / "run", "--stop-after", stop)
        assert forks.sdcli(*command).code == 0
    assert forks.sdcli(*train_embedding(pictures, unet_run / "export", tmp_path / "run")).code == 0
    assert final_files(tmp_path / "run") == final_files(embedding_run)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--token", "disc"), 3, "is in the vocabulary already"),
        (("--token", ""), 2, "--token: is empty"),
        (("--init-token", " "), 2, "--init-token: is empty"),
        (("--vectors", 0), 2, "--vectors 0: out of range"),
        (("--vectors", 76), 2, "--vectors 76: out of range"),
        (("--kind", "mood"), 2, "--kind mood: unknown"),
        (("--caption", "a dog"), 2, "--caption 'a dog': does not name <my-disc>"),
    ],
)
def test_what_makes_no_word_is_refused(
    pictures: Path, unet_run: Path, forks: Forks, tmp_path: Path, flags: tuple[object, ...], code: int, said: str
) -> None:
    ended = forks.sdcli(*train_embedding(pictures, unet_run / "export", tmp_path / "run"), *flags)
    assert (ended.code, said in ended.stderr) == (code, True), ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_text_encoder_learns_no_word(
    pictures: Path, classed: Path, forks: Forks, tmp_path: Path
) -> None:
    ended = forks.sdcli(*train_embedding(pictures, classed, tmp_path / "run"))
    assert (ended.code, "no text encoder" in ended.stderr) == (2, True)


def test_captions_that_name_the_word_are_kept_and_templates_stand_for_the_others(own_pictures: Path) -> None:
    (own_pictures / "dot.txt").write_text(f"{WORD} on white", encoding="utf-8")
    spec = TrainEmbeddingSpec(token=WORD, init_token="disc", kind="style")
    with pytest.warns(SdcliWarning, match="the captions of 5 of 6 pictures do not name <my-disc>: templates stand"):
        samples = embedding._named(data.find(own_pictures), spec).samples
    captions = {sample.path.stem: sample.captions for sample in samples}
    assert captions["dot"] == (f"{WORD} on white",)
    assert captions["bar"] == tuple(one.format(WORD) for one in embedding.TEMPLATES["style"])


@pytest.mark.slow
def test_a_word_learned_from_four_pictures_draws_what_they_show(forks: Forks, tmp_path: Path) -> None:
    """Four penguins of the embedded model's own, learned by a word that begins as a dog."""
    common = ("--device", "cpu", "--no-metadata", "-n", 4)
    for prompt, folder in (("a picture of a penguin", "penguins"), ("a picture of a dog face", "dogs")):
        ended = forks.sdcli("generate", prompt, "--seed", 1, *common, "-o", f"{tmp_path / folder}/")
        assert ended.code == 0, ended.stderr
    word = ("--token", "<x>", "--init-token", "dog face", "--vectors", 2, "--steps", 150, "--save-every", 150)
    command = ("train-embedding", "--data", tmp_path / "penguins", *word, "--device", "cpu", "--run", tmp_path / "run")
    ended = forks.sdcli(*command)
    assert ended.code == 0, ended.stderr
    file = tmp_path / "run" / "export" / "x.safetensors"
    prompt = ("generate", "a picture of <x>", "--embedding", file, "--seed", 5)
    assert forks.sdcli(*prompt, *common, "-o", f"{tmp_path / 'learned'}/").code == 0
    network = features.perceptual("builtin")

    def pixels(folder: str) -> Tensor:
        return torch.cat([to_pixels(Image.open(path)) for path in sorted((tmp_path / folder).iterdir())])

    def distance(folder: str) -> float:
        shown, wanted = pixels(folder), pixels("penguins")
        return float(torch.stack([network(shown, one.expand_as(shown)).mean() for one in wanted]).mean())

    assert distance("learned") < 0.8 * distance("dogs")
