"""What is said and checked before the work: the table, and room on disk and in memory."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptq import preflight
from gptq.cli import main
from gptq.config import QuantizeConfig
from gptq.models import StreamedModel
from marlin_kernel import ConfigError
from tests.gptq_models import write_source, write_text

GIB = 1 << 30


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_source(folder)
    write_text(folder / "calibration.txt")
    return folder


def table(source: Path, out: Path, capsys, *flags: str) -> dict[str, str]:
    """Label -> value of the table that a small run prints."""
    few = ["--wbits", "4", "--groupsize", "32", "--nsamples", "8", "--seqlen", "32"]
    text = ["--dataset", str(source / "calibration.txt"), "--eval", "none", "--save", str(out)]
    assert main([str(source), *few, *text, *flags]) == 0
    printed = capsys.readouterr().out.partition("\n\n")[0]
    rows = (line.strip().partition("  ") for line in printed.splitlines())
    return {label: value.strip() for label, _, value in rows}


def test_the_table_says_what_will_happen(source, tmp_path, capsys):
    rows = table(source, tmp_path / "a", capsys)
    assert rows["quantized"] == "14 linears, 0.1 M weights"
    assert rows["method"].startswith("GPTQ, asymmetric calibration")
    assert rows["calibration"].startswith("8 samples, ") and "nsamples" not in rows["calibration"]

    rows = table(source, tmp_path / "b", capsys, "--nsamples", "1000")
    assert rows["calibration"].endswith("(it has no more; nsamples is 1000)")

    rows = table(source, tmp_path / "c", capsys, "--nearest")
    assert rows["method"] == "round to nearest" and rows["calibration"] == "none"

    rows = table(source, tmp_path / "d", capsys, "--wbits", "16", "--sparsity", "2:4")
    assert rows["pruned"] == "14 linears, 0.1 M weights"
    assert rows["method"].startswith("SparseGPT, ") and "clip" not in rows["method"]


def plan_of(source: Path, **changes) -> tuple[preflight.Plan, QuantizeConfig, StreamedModel]:
    model = StreamedModel(source, torch.float32, torch.device("cpu"))
    config = QuantizeConfig(**{"checkpoint": str(source), "wbits": 4, "groupsize": 32, **changes})
    sizes = {}
    for name in model.quantizable():
        module = model.skeleton.get_submodule(name)
        sizes[name] = module.in_features, module.out_features
    return preflight.plan(model, config, sizes, [torch.arange(30)] * 4), config, model


def test_peak_host_memory_counts_the_process_itself(source):
    plan, _, _ = plan_of(source)
    if preflight._resident() == 0:
        pytest.skip("this system does not say")
    assert preflight._resident() > 100 << 20  # torch is loaded
    assert abs(plan.peak_host_bytes - preflight._resident()) < 100 << 20  # the model is tiny


def test_host_memory_that_may_not_suffice_is_told(source, tmp_path, monkeypatch, caplog):
    plan, config, model = plan_of(source)
    plan = replace(plan, peak_host_bytes=preflight._resident() + 8 * GIB)
    for available, told in ((None, False), (16 * GIB, False), (4 * GIB, True)):
        monkeypatch.setattr(preflight, "_available", lambda available=available: available)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            preflight.check_room(plan, config, model, tmp_path / "out")
        assert ("4.00 GiB of memory free" in caplog.text) == told
        assert ("--offload_activations disk" in caplog.text) == told
    monkeypatch.undo()
    assert preflight._available() is None or preflight._available() > 0


def test_a_gpu_without_room_is_refused_with_all_ways_out(source, tmp_path, monkeypatch):
    plan, config, model = plan_of(source)
    model.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * GIB, 80 * GIB))
    plan = replace(plan, peak_device_bytes=4 * GIB)
    with pytest.raises(ConfigError, match=r"2\.00 GiB free.*4\.00 GiB.*--offload_activations"):
        preflight.check_room(plan, config, model, tmp_path / "out")
    offloading = replace(config, offload_activations="host")
    with pytest.raises(ConfigError, match="lower --nsamples or --seqlen$"):
        preflight.check_room(plan, offloading, model, tmp_path / "out")


def test_a_disk_without_room_is_refused(source, tmp_path):
    plan, config, model = plan_of(source)
    plan = replace(plan, disk_bytes=1 << 60)
    with pytest.raises(ConfigError, match=r"save='.*out': .* free, the run needs .*another disk"):
        preflight.check_room(plan, config, model, tmp_path / "deep" / "out")
