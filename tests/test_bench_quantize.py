"""scripts/bench_quantize.py with tiny models on the CPU: one process and two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bench_quantize
from tests.gptq_models import Source, tiny_config, write_source, write_text

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "bench_quantize.py"
SMALL = ["--nsamples", "4", "--seqlen", "32", "--groupsize", "32", "--device", "cpu"]


def bench(folder: Path, *flags: str, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), *flags, *SMALL,
         "--out", str(folder / "results")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_first_layers_of_a_real_model(tmp_path):
    write_source(tmp_path / "source")
    text = write_text(tmp_path / "calibration.txt")
    bench(tmp_path, str(tmp_path / "source"), "--dataset", str(text), "--layers", "1")
    result = json.loads((tmp_path / "results" / "bench_quantize_layers.json").read_text())
    assert result["layers"] == 1 and len(result["loss_of_each_linear"]) == 7
    seconds = result["cpu_seconds"]
    floor = 2 * seconds["one_forward"] + seconds["hessian_products"]
    assert result["ratio"] == pytest.approx(seconds["quantize"] / floor)
    assert str(tmp_path) not in json.dumps({**result, "command": "", "settings": ""})


def test_two_processes_print_one_result_with_both_ranks(tmp_path):
    shape = tmp_path / "shape.json"
    shape.write_text(tiny_config(Source()).to_json_string())
    recipe = str(ROOT / "configs" / "quantize" / "marlin.yaml")
    done = bench(
        tmp_path, "--from_config", str(shape), "--config", recipe, "--true-sequential",
        "--offload_activations", "disk", processes=2,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    printed = json.loads(line)
    name = "bench_quantize_shape_marlin_offload_disk_2gpus.json"
    result = json.loads((tmp_path / "results" / name).read_text())
    assert printed["ranks"] == result["ranks"] and result["processes"] == 2
    assert [rank["rank"] for rank in result["ranks"]] == [0, 1]
    assert sum(rank["tokens"] for rank in result["ranks"]) == result["calibration_tokens"] == 128
    for rank in result["ranks"]:
        assert rank["peak_host_bytes"] > 0 and rank["seconds"]["forward"] > 0
        usual = rank["seconds_of_a_layer"]
        assert usual.keys() == rank["seconds"].keys()
        assert {"forward", "hessian", "solve", "refine", "io_waited_for"} <= usual.keys()
        assert {"solve.factor", "solve.update", "io.read", "io.write"} <= usual.keys()
        assert {"collective.sum", "collective.gather"} <= usual.keys()
        assert 0 < usual["solve.factor"] < usual["solve"]
    assert result["layers"] == 2 and len(result["seconds_of_each_layer"]) == 2


def test_kernels_of_one_layer_more(tmp_path):
    shape = tmp_path / "shape.json"
    shape.write_text(tiny_config(Source()).to_json_string())
    bench(tmp_path, "--from_config", str(shape), "--profile")
    result = json.loads((tmp_path / "results" / "bench_quantize_shape_fast.json").read_text())
    assert result["layers"] == result["layers_of_model"] - 1 == 1
    slowest = [kernel["seconds"] for kernel in result["slowest_kernels"]]
    assert slowest == sorted(slowest, reverse=True) and slowest[0] > 0
    floor = result["floor_of_a_layer"]
    assert all(floor[part] > 0 for part in ("factor", "target", "update", "refit", "sweep"))
    assert {"solve.refit", "solve.sweep"} <= result["ranks"][0]["seconds_of_a_layer"].keys()


def test_other_quantizers_are_timed_beside_it(tmp_path, monkeypatch, capsys):
    """On as many tokens as ours; options that do not go together are refused at once."""
    write_source(tmp_path / "source")
    text = write_text(tmp_path / "calibration.txt")
    asked = []

    def quantize(name, folder, rows, group_size, **options):
        asked.append((name, folder, tuple(rows.shape), group_size, options["device"]))
        return {"version": "x 1", "seconds": 3.0}, {}

    monkeypatch.setattr(bench_quantize.peers, "quantize", quantize)
    monkeypatch.setattr(bench_quantize.peers, "version", lambda name, python: "x 1")
    source, out = tmp_path / "source", tmp_path / "results"
    words = [str(source), "--dataset", str(text), *SMALL, "--out", str(out), "--peers", "autoround"]
    monkeypatch.setattr(sys, "argv", ["bench_quantize.py", *words])
    bench_quantize.main()
    result = json.loads((out / "bench_quantize_fast.json").read_text())
    assert result["peers"] == {"autoround": {"version": "x 1", "seconds": 3.0}}
    ((name, folder, (rows, length), *rest),) = asked
    assert (name, folder, length, rest) == ("autoround", source, 32, [32, "cpu"])
    assert rows == round(result["calibration_tokens"] / 32)

    monkeypatch.setattr(sys, "argv", ["bench_quantize.py", *words, "--layers", "1"])
    with pytest.raises(SystemExit):
        bench_quantize.main()
    assert "--peers goes with a whole real model" in capsys.readouterr().err
