# make setup [EXTRA=gpu]  make .venv with the pinned packages (vLLM for CPU unless EXTRA=gpu)
# make test               setup if needed, then lint, format, types, tests
# make demo               setup if needed, then `winnow demo`
# make example            setup if needed, then `winnow demo --real`: a real chat model
# make bench WHAT="..."   setup if needed, then one benchmark: diagnose, equal-kl, mixes, optimize, rounding or store (tests/README.md)
# make clean              remove .venv and caches

PYTHON ?= python3.11
EXTRA  ?= $(or $(patsubst .venv/setup-%,%,$(wildcard .venv/setup-*)),cpu)
STAMP  := .venv/setup-$(EXTRA)
PINS   := requirements/base.txt requirements/$(EXTRA).txt requirements/dev.txt requirements/example.txt
PIP    := .venv/bin/python -m pip --disable-pip-version-check install -qq --no-deps
TORCH  := $(PIP) --constraint requirements/$(EXTRA).txt torch

# No run looks anything up on a network or reports its use.
export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0
export VLLM_NO_USAGE_STATS := 1

.PHONY: setup test demo example bench clean

setup: $(STAMP)

# A changed pin re-installs into .venv; the other build, or a half-made .venv, starts afresh.
# PyTorch's own index is asked for torch alone, and only if pip finds our build of it nowhere else.
$(STAMP): $(PINS) pyproject.toml
	test -e $@ || $(PYTHON) -m venv --clear .venv
	$(TORCH) 2>/dev/null || $(TORCH) --extra-index-url https://download.pytorch.org/whl/cpu
	$(PIP) $(addprefix --requirement ,$(PINS))
	$(PIP) --no-build-isolation --editable .
	touch $@

test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder  # by file: its tests share costly fixtures

demo: setup
	.venv/bin/winnow demo

example: setup
	.venv/bin/winnow demo --real

bench: setup
	.venv/bin/python -m tests.bench $(or $(WHAT),--help)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
