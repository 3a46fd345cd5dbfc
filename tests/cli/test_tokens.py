"""`sdcli tokens` as a person and as a script see it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdcli.errors import ExitCode
from tests.commands import Shell, tree

PROMPT = "A picture of a puppy"


def test_a_person_sees_the_articles_example(shell: Shell) -> None:
    outcome = shell("tokens", PROMPT)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.lines == [
        "chunk  pos     id  piece                 weight mask",
        "    1    0  49406  <|startoftext|> mark       1    1",
        "    1    1    320  a</w>           kept       1    1",
        "    1    2   1674  picture</w>     kept       1    1",
        "    1    3    539  of</w>          kept       1    1",
        "    1    4    320  a</w>           kept       1    1",
        "    1    5   6829  puppy</w>       kept       1    1",
        "    1    6  49407  <|endoftext|>   mark       1    1",
        "ids: 49406 320 1674 539 320 6829 49407 and 70 more 49407",
        "attention mask: 7 ones, 70 zeros",
        "tokens: 5 kept, 0 cut, chunks: 1",
    ]


def test_a_script_reads_one_document_with_all_padding(shell: Shell) -> None:
    outcome = shell("tokens", PROMPT, "--json")
    found = json.loads(outcome.stdout)
    assert found["chunks"][0]["ids"] == [49406, 320, 1674, 539, 320, 6829, *[49407] * 71]
    assert found["tokens"] == {"kept": 5, "cut": 0, "chunks": 1}
    assert found["rows"][5] == {
        "id": 6829,
        "piece": "puppy</w>",
        "state": "kept",
        "weight": 1.0,
        "chunk": 1,
        "position": 5,
        "attention_mask": 1,
    }
    assert len(found["rows"]) == 77


def test_the_prompt_may_come_on_stdin(shell: Shell) -> None:
    assert shell("tokens", "-", stdin=b"a dog\n").lines == shell("tokens", "a dog").lines


def test_weights_chunks_and_swaps_are_shown(shell: Shell) -> None:
    outcome = shell("tokens", "(puppy:1.4) BREAK [dog]", "--mix", "puppy=0.5,cat=0.5", "--replace", "dog=cow")
    assert "    1    1  49408  puppy</w> -> 0.5 puppy</w> + 0.5 cat</w> kept     1.4    1" in outcome.lines
    assert any("dog</w> -> cow</w>" in line and "0.9091" in line for line in outcome.lines)
    assert "ids of chunk 1: 49406 49408 49407 and 74 more 49407" in outcome.lines
    assert "attention mask of chunk 2: 3 ones, 74 zeros" in outcome.lines


def test_wildcards_are_drawn_by_the_seed_as_for_an_image(shell: Shell) -> None:
    for seed in range(4):
        outcome = shell("tokens", "a {red|blue} {dog|cat}", "--seed", seed)
        dry = shell("generate", "a {red|blue} {dog|cat}", "--seed", seed, "--dry-run", "--json")
        (drawn,) = json.loads(dry.stdout)["prompts"]
        assert outcome.lines == [f"prompt: {drawn}", *shell("tokens", drawn).lines]
    found = json.loads(shell("tokens", "{a|b\\n}", "--seed", 2**64 - 1, "--json").stdout)
    assert (found["prompt_template"], found["seed"]) == ("{a|b\\n}", 2**64 - 1) and found["prompt"] in ("a", "b\\n")
    assert "seed" not in json.loads(shell("tokens", "a {b}", "--seed", 5, "--json").stdout)


def test_files_are_written_and_named_with_their_statistics(shell: Shell) -> None:
    outcome = shell("tokens", "a dog", "--embeddings", "e.safetensors", "--embeddings", "e.png", "--mask", "m.png")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.lines[-3:] == ["e.safetensors", "e.png", "m.png"]
    assert set(tree(Path())) == {"e.safetensors", "e.png", "m.png"}
    (line,) = (line for line in outcome.lines if line.startswith("causal_mask"))
    assert "77x77" in line and "-3.403e+38" in line and "0.0000 -3.4028e+38" in line
    document = json.loads(shell("tokens", "a dog", "--embeddings", "e.png", "--json").stdout)
    assert document["files"] == ["e-2.png"]
    assert document["tensors"][0]["name"] == "token_embedding"


@pytest.mark.parametrize("prompt", ["", "\x1b[31m red", "小狗 🐶", "(", "<|endoftext|>", "a\nb"])
def test_any_prompt_is_shown_without_steering_the_terminal(shell: Shell, prompt: str) -> None:
    outcome = shell("tokens", "--", prompt)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "\x1b" not in outcome.stdout
    assert json.loads(shell("tokens", "--json", "--", prompt).stdout)["prompt"] == prompt


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["(a:11)"], ExitCode.USAGE, "the weight 11 in the prompt: out of range"),
        (["{a|(b:11)}"], ExitCode.USAGE, "the weight 11 in the prompt: out of range"),
        (["a", "--seed", "-1"], ExitCode.USAGE, "--seed -1: out of range"),
        (["a", "--seed", 2**64], ExitCode.USAGE, "--seed 18446744073709551616: out of range"),
        (["a", "--clip-skip", "1"], ExitCode.USAGE, "--clip-skip 1 without --embeddings: no layer is looked into"),
        (["a", "--clip-skip", "-1"], ExitCode.USAGE, "--clip-skip -1: out of range"),
        (
            ["a", "--clip-skip", "2", "--embeddings", "e.png"],
            ExitCode.USAGE,
            "--clip-skip 2: this model's text encoder",
        ),
        (["a", "--replace", "a=hot dog"], ExitCode.USAGE, "a is 1 token, hot dog is 2 tokens"),
        (["a", "--mask", "m.txt"], ExitCode.USAGE, "--mask m.txt: of no known kind"),
        (["a", "--mask", "/dev/null/m.png"], ExitCode.OUTPUT, "/dev/null"),
        (["a", "--embedding", "none.pt"], ExitCode.INPUT, "none.pt"),
        (["a", "--model", "none"], ExitCode.INPUT, "none: no such model"),
    ],
)
def test_what_cannot_be_shown_is_refused(shell: Shell, arguments: list[str], code: int, said: str) -> None:
    outcome = shell("tokens", *arguments)
    assert (outcome.code, outcome.stdout) == (code, "")
    assert said in outcome.stderr
    assert tree(Path()) == {}


def test_a_prompt_that_is_no_text_is_refused(shell: Shell) -> None:
    for arguments in (["\udcff"], ["a", "--replace", "a=\udcff"]):
        outcome = shell("tokens", *arguments)
        assert (outcome.code, outcome.stdout) == (ExitCode.USAGE, "")
        assert "is no valid text" in outcome.stderr


def test_without_vectors_no_torch_is_imported(sd1: Path) -> None:
    program = "import sys; from sdcli.cli.app import run; code = run(sys.argv[1:]);"
    program += "sys.exit('imported torch' if 'torch' in sys.modules else code)"
    command = [sys.executable, "-c", program, "tokens", PROMPT, "--model", str(sd1)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
