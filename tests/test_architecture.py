"""Who may import whom, and which modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import sdcli

ROOT = Path(sdcli.__file__).parent
PACKAGES = ("cli", "pipeline", "training", "builtin", "jobs", "lab", "pages", "archive", "warm", "original")
PACKAGES += ("schedulers", "plan", "drawing", "hub")
# Anyone may import them; `sdcli` itself holds the version.
GROUND = {"sdcli", "errors", "checks", "files", "headers", "original", "layout", "jail", "hub"}
FOUNDATION = GROUND | {"specs", "train_specs", "model_specs", "store", "schedulers", "plan", "ledger", "inputs"}
FOUNDATION |= {"latent_files", "events", "drawing", "jobs", "lab", "pages", "archive", "warm"}
BEFORE_THE_STORY = GROUND | {"specs", "train_specs", "model_specs", "output", "store", "schedulers", "plan"}
BEFORE_THE_STORY |= {"events", "display"}
BEFORE_THE_STORY |= {"sdcli.jobs.plan", "sdcli.lab.plan", "sdcli.lab.specs", "sdcli.archive.specs", "facts", "removal"}
BEFORE_THE_STORY |= {"sdcli.warm.client", "sdcli.warm.identity", "sdcli.warm.place", "listing"}
# What a room may import; every top-level module that is not named here tells a story.
MAY_IMPORT: dict[str, set[str]] = {
    "sdcli": set(),
    "errors": set(),
    "checks": {"errors"},
    "files": {"errors"},
    "headers": {"errors", "files"},
    "jail": {"errors", "files"},
    "original": {"errors", "files", "headers", "original"},
    "layout": {"errors", "files", "headers", "original"},
    "hub": {"errors", "files"},
    "hub.choosing": {"errors", "layout", "hub"},
    "hub.contents": {"files", "hub"},
    "hub.fetching": {"errors", "files", "headers", "hub"},
    "hub.refusals": {"errors", "files", "hub"},
    "hub.pulling": {"errors", "files", "layout", "original", "hub"},
    "specs": GROUND,
    "train_specs": GROUND | {"specs"},
    "output": GROUND,
    "store": GROUND | {"display"},
    "listing": GROUND | {"store"},
    "facts": GROUND | {"store", "sdcli.pipeline.adapter_facts", "sdcli.pipeline.adapters"},
    "removal": GROUND | {"store"},
    "model_specs": GROUND | {"specs"},
    "schedulers.config": GROUND,
    "schedulers.table": GROUND | {"sdcli.schedulers.config"},
    "schedulers.steps": GROUND | {"sdcli.schedulers.config", "sdcli.schedulers.table"},  # of the latter the type alone
    "schedulers": GROUND | {"schedulers"},
    "latent_files": GROUND,
    "inputs": GROUND | {"sdcli.plan.naming", "latent_files"},
    "plan.conditioning": GROUND | {"specs"},
    "plan.lora_files": GROUND | {"store", "sdcli.pipeline.lora_keys", "sdcli.pipeline.lora_names"},
    "plan.naming": GROUND | {"specs", "latent_files"},
    "plan.beside": GROUND | {"specs", "sdcli.plan.naming"},
    "plan.parts": GROUND | {"sdcli.schedulers.config", "sdcli.pipeline.part_configs"},
    # Of the pipeline leaves without torch: what is wrong in a prompt is found before anything heavy is imported.
    "plan.words": GROUND
    | {"specs", "sdcli.plan.parts", "sdcli.pipeline.prompt", "sdcli.pipeline.wildcards"}
    | {"sdcli.pipeline.adapter_facts", "sdcli.pipeline.lora_keys"},
    "plan.initial": GROUND
    | {"specs", "store", "schedulers", "latent_files", "sdcli.pipeline.images"}
    | {"sdcli.plan.lora_files", "sdcli.plan.parts"},
    "plan": GROUND | {"specs", "store", "schedulers", "plan", "sdcli.pipeline.known_words", "sdcli.pipeline.wildcards"},
    "ledger": GROUND,
    "jobs.lines": GROUND | {"specs"},
    "jobs.tally": GROUND,
    "jobs.inputs": GROUND | {"specs", "sdcli.plan.initial", "latent_files", "sdcli.pipeline.images"},
    "jobs.plan": GROUND
    | {"specs", "store", "schedulers", "plan"}
    | {"sdcli.jobs.inputs", "sdcli.jobs.lines", "sdcli.jobs.tally"}
    | {"sdcli.pipeline.prompt", "sdcli.pipeline.wildcards"},
    "jobs.ledger": GROUND | {"ledger", "sdcli.jobs.tally"},
    "jobs.album": GROUND | {"ledger", "sdcli.jobs.tally"},
    "jobs.stdin": GROUND | {"sdcli.jobs.lines"},
    # The two halves of the story of batch, which stand on generate's parts as it does.
    "drawing.reading": GROUND | {"plan", "pipeline"},
    "drawing.records": GROUND | {"specs", "plan", "sdcli.drawing.reading", "store", "latent_files", "pipeline"},
    "drawing.ladder": GROUND | {"pipeline"},
    "drawing.extras": GROUND | {"specs", "plan", "sdcli.drawing.ladder", "pipeline"},
    "drawing": GROUND | {"specs", "plan", "schedulers", "latent_files", "pipeline"},
    "jobs.finish": GROUND | {"generate", "sdcli.drawing.ladder", "pipeline", "sdcli.jobs.ledger", "sdcli.jobs.plan"},
    "jobs.studio": GROUND | {"drawing", "plan", "specs", "pipeline", "sdcli.jobs.finish", "sdcli.jobs.plan"},
    "events": set(),
    "display": set(),
    "warm": GROUND,
    "warm.place": GROUND | {"store"},
    "warm.client": GROUND | {"events", "plan", "specs", "warm"},
    "lab.specs": GROUND | {"specs"},
    "lab.plan": GROUND | {"specs", "store", "schedulers", "plan", "ledger", "sdcli.lab.specs"},
    "lab.plots": GROUND,
    "lab.table": GROUND | {"sdcli.lab.plots"},
    "lab.row": GROUND | {"schedulers", "pipeline", "sdcli.lab.plan", "sdcli.lab.table"},
    "pages.curves": GROUND,
    "pages.charts": GROUND | {"sdcli.pages.curves"},
    "pages.page": GROUND,
    "pages.report": GROUND | {"train_specs", "sdcli.pages.charts", "sdcli.pages.curves", "sdcli.pages.page"},
    "pages.gallery": GROUND | {"sdcli.plan.naming", "sdcli.pages.charts", "sdcli.pages.page"},
    "archive.specs": GROUND | {"specs"},
    "archive.reading": GROUND | {"schedulers", "pipeline"},
    "archive.foreign": GROUND | {"specs", "schedulers", "pipeline", "sdcli.archive.reading"},
    "archive.hearing": GROUND | {"specs", "pipeline", "sdcli.archive.foreign"},
    "archive.files": GROUND | {"plan", "sdcli.archive.foreign", "sdcli.archive.hearing"},
    "archive.asking": GROUND | {"specs", "plan", "store", "pipeline", "archive"},
    "archive.comparing": GROUND | {"pipeline", "sdcli.archive.foreign"},
    "__main__": {"cli"},
    "cli": BEFORE_THE_STORY | {"cli"},
    "pipeline": GROUND | {"pipeline"},
    "training": FOUNDATION | {"pipeline", "training"},
    "builtin": GROUND | {"builtin", "pipeline"},
}
STORY_MAY_IMPORT = FOUNDATION | {"pipeline"}
STAND_ON_GENERATE = {"batch", "bench", "replay", "serve"}
PIPELINE_LEAVES = {
    "classes",
    "comfy",
    "containers",
    "device",
    "fonts",
    "heatmaps",
    "images",
    "narrow",
    "noise",
    "parameters",
    "pickles",
    "prompt",
    "start",
    "tiles",
    "wildcards",
}
LIGHT = (
    *("errors", "checks", "files", "headers", "jail", "original.checkpoint", "layout"),
    *("specs", "train_specs", "output", "store", "listing", "facts", "schedulers"),
    *("hub", "hub.choosing", "hub.contents", "hub.fetching", "hub.pulling", "hub.refusals"),
    *("plan", "latent_files", "inputs", "pipeline.adapter_facts", "pipeline.lora_shapes"),
    *("jobs.tally", "jobs.lines", "jobs.inputs", "jobs.plan", "jobs.ledger", "jobs.album", "jobs.stdin"),
    *("lab.specs", "lab.plan", "lab.plots", "lab.table", "archive.specs"),
    *("events", "warm.client", "warm.identity", "warm.messages", "warm.place"),
)
HEAVY = (
    *("torch", "numpy", "scipy", "PIL", "matplotlib"),
    *("diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub"),
)


class Import(NamedTuple):
    """One module that another imports; deferred inside a function or for type checking only."""

    target: str
    is_deferred: bool


def sources() -> dict[str, str]:
    """Every module of the package by its dotted name, with its text."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


def imports(source: str, modules: set[str]) -> Iterator[Import]:
    """The imports of a module, `from package import module` resolved to the module."""

    def walk(node: ast.AST, is_deferred: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, is_deferred) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    yield Import(full if full in modules else str(child.module), is_deferred)
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                yield from walk(child, True)
            else:
                yield from walk(child, is_deferred or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from walk(ast.parse(source), False)


def room_of(module: str) -> str:
    """The package a module lies in, or its own name at the top level."""
    _, *rest = module.split(".")
    return rest[0] if rest else "sdcli"


def violations(module: str, source: str, modules: set[str]) -> list[str]:
    """What in a module goes against the directions, each as `module imports target`."""
    room = room_of(module)
    allowed = MAY_IMPORT.get(module.partition(".")[2], MAY_IMPORT.get(room, STORY_MAY_IMPORT | {room}))
    if room in STAND_ON_GENERATE:
        allowed = allowed | {"generate"}
    wrong = []
    for target, is_deferred in imports(source, modules):
        if target.split(".")[0] != "sdcli":
            is_wrong = target.split(".")[0] == "typer" and room != "cli"
        else:
            there = room_of(target)
            tells_a_story = there == "training" or there not in {*MAY_IMPORT, *PACKAGES}
            is_wrong = not {there, target} & allowed and not (room == "cli" and is_deferred and tells_a_story)
            if room == there == "pipeline" and module.rsplit(".", 1)[-1] in PIPELINE_LEAVES:
                is_wrong = target != "sdcli.pipeline"
        if is_wrong:
            wrong.append(f"{module} imports {target}")
    return wrong


def test_imports_go_downward_only() -> None:
    texts = sources()
    assert [wrong for module, text in texts.items() for wrong in violations(module, text, set(texts))] == []


def test_the_trainer_of_adapters_alone_imports_peft() -> None:
    texts = sources()
    using = [name for name, text in texts.items() if any(i.target == "peft" for i in imports(text, set(texts)))]
    assert using == ["sdcli.training.lora"]


def test_no_two_modules_import_each_other() -> None:
    texts = sources()
    above = {
        module: {i.target for i in imports(text, set(texts)) if not i.is_deferred and i.target in texts} - {module}
        for module, text in texts.items()
    }
    while above:
        free = {module for module, targets in above.items() if not targets & set(above)}
        assert free, f"a circle among {', '.join(sorted(above))}"
        above = {module: targets for module, targets in above.items() if module not in free}


@pytest.mark.parametrize(
    ("module", "source", "is_wrong"),
    [
        ("sdcli.pipeline.vae", "from sdcli import store", True),
        ("sdcli.pipeline.vae", "from sdcli.specs import GenerateSpec", True),
        ("sdcli.pipeline.vae", "from sdcli.pipeline.bundle import load", False),
        ("sdcli.pipeline.vae", "def f():\n    import sdcli.generate", True),
        ("sdcli.pipeline.images", "from sdcli.pipeline import vae", True),
        ("sdcli.pipeline.images", "import typer", True),
        ("sdcli.codec", "from sdcli import generate", True),
        ("sdcli.codec", "from sdcli.training.loop import train", True),
        ("sdcli.batch", "from sdcli import generate", False),
        ("sdcli.codec", "if TYPE_CHECKING:\n    from sdcli.cli import options", True),
        ("sdcli.cli.generate", "from sdcli.generate import run", True),
        ("sdcli.cli.generate", "from sdcli.pipeline import vae", True),
        ("sdcli.cli.generate", "def f():\n    from sdcli.pipeline import vae", True),
        ("sdcli.plan.words", "from sdcli.pipeline import prompt", False),
        ("sdcli.plan", "from sdcli.pipeline import vae", True),
        ("sdcli.cli.generate", "def f():\n    from sdcli.generate import run", False),
        ("sdcli.cli.train_unet", "if TYPE_CHECKING:\n    from sdcli.training.loop import Report", False),
        ("sdcli.training.loop", "from sdcli.generate import run", True),
        ("sdcli.schedulers", "from sdcli import store", True),
        ("sdcli.store", "from sdcli import __version__", False),
    ],
)
def test_the_check_tells_right_from_wrong(module: str, source: str, is_wrong: bool) -> None:
    modules = {"sdcli.store", "sdcli.generate", "sdcli.cli.options"}
    modules |= {f"sdcli.pipeline.{name}" for name in ("vae", "bundle", "prompt")}
    assert bool(violations(module, source, modules)) == is_wrong


def test_what_runs_before_the_story_imports_nothing_heavy() -> None:
    modules = [f"sdcli.{name}" for name in LIGHT]
    modules += [name for name in sources() if room_of(name) == "cli"]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(name)\n"
        f"    heavy = sorted(set({HEAVY!r}) & (set(sys.modules) - before))\n"
        "    if heavy: print(name, 'brings', *heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")
