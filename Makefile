# sdcli. `make help` lists what there is to make.
#
# Needs python3 (3.11 to 3.13, with its venv module), git and make. Everything is installed into .venv, once; it is
# installed again when pyproject.toml or constraints.txt changes.
#
#   make demo PYTHON=python3.12         another interpreter
#   make demo PIP_ARGS="..."            more arguments for pip, such as an index (README: "Without a GPU")

PYTHON ?= python3
PIP_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_ARGS) --constraint constraints.txt
# Two processes of one thread each: most tests are too small for two threads to share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal
TORCH := $(shell grep '^torch==' constraints.txt)
SUPPORTED := import sys; v = sys.version_info[:2]; \
	sys.exit(None if (3, 11) <= v < (3, 14) else "sdcli needs Python 3.11 to 3.13, this is %d.%d; make PYTHON=..." % v)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check fix bench fuzz quality builtin clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/.runtime ## draw a puppy with the embedded model
	@$(BIN)/sdcli generate "a picture of a puppy" --seed 7 --if-exists overwrite --output puppy.png

test: .venv/.dev ## run the quick tests
	@$(PYTEST)

test-all: .venv/.dev ## run all tests but those that need a GPU
	@$(PYTEST) -m "not gpu"

check: .venv/.dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: .venv/.dev ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev ## measure the solvers' orders; time start-up, a whole picture, cold and warm, and a training step
	@$(BIN)/python -m tests.benchmarks.orders
	@$(BIN)/python tests/benchmarks/startup.py
	@$(BIN)/python tests/benchmarks/warm.py
	@$(BIN)/python tests/benchmarks/training.py
	@$(BIN)/python -m tests.benchmarks.batch

fuzz: .venv/.dev ## damage files of every kind and have them read, for half an hour; RUNS=100 for less
	@$(BIN)/python -m tests.fuzz.run --runs $(or $(RUNS),2000)

quality: .venv/.dev ## measure the embedded model: what its VAE keeps, and which concepts it draws
	@$(BIN)/python tests/quality/quality.py

# Needs the Debian packages fonts-noto-color-emoji and unicode-data, and two hours on two CPU cores. Every sdcli command
# resumes where it was stopped.
builtin: build/emoji/metadata.jsonl ## train the embedded model anew, from the drawing of its pictures on
	OMP_NUM_THREADS=1 $(BIN)/python -m sdcli.builtin.perceptual train build/emoji sdcli/builtin/perceptual
	$(BIN)/sdcli train-vae --data build/emoji --init small --resolution 32 --random-crop --batch-size 32 --steps 4000 \
		--lr 1e-3 --lr-schedule linear --l2-weight 0.5 --kl-weight 1e-6 --perceptual-weight 0 --ema 0.999 \
		--mixed-precision bf16 --run build/vae
	$(BIN)/sdcli train-unet --data build/emoji --init small --vae build/vae/export --train-text-encoder --prediction v \
		--batch-size 24 --steps 9000 --lr 6e-4 --lr-schedule linear --lr-warmup 100 --ema 0.999 --mixed-precision bf16 \
		--export-dtype float16 --run build/unet
	cp -R build/unet/export/. sdcli/builtin/model/

build/emoji/metadata.jsonl: .venv/.dev sdcli/builtin/recipe.py sdcli/builtin/words.py
	$(BIN)/python -m sdcli.builtin.recipe draw build/emoji

clean: ## remove caches; .venv and what was trained under build/ and runs/ stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis dist *.egg-info
	find sdcli tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: a CPU build of this version, where pip is offered one, is then kept by all that follows.
.venv/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c '$(SUPPORTED)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: once, and mostly $(TORCH)" >&2
	@$(PIP) --quiet "$(TORCH)"
	@$(PIP) --quiet --editable .
	@touch $@

.venv/.dev: .venv/.runtime
	@$(PIP) --quiet --editable ".[dev]"
	@touch $@
