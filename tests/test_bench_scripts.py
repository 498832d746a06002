"""Benchmark scripts without a GPU: tables, peers' files, and generation with a tiny model."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Imports a script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


CSV = """kernel,dtype,group_size,K,N,M,us_median_of_passes
slow,w4a16,128,4096,4096,1,9.5
fast,w4a16-bf16,128,4096,4096,1,6.75
fast,w4a16,-1,4096,4096,1,6.0
eight bits,w8a16-int8,128,4096,4096,1,1.0
cublas-fp16,fp16,0,4096,4096,1,13.0
"""


def row(m=1, us=5.0, **changes) -> dict:
    made = {"k": 4096, "n": 4096, "m": m, "dtype": "float16", "group_size": 128, "us": us}
    made |= {"us_alone": 6.0, "floor": 4.0, "floor_pdl": 3.0, "cublas": 10.0, "tflops": 1.0}
    return made | {"gb_per_s": 1.0, "error": 1e-4, "config": "DecodeConfig()"} | changes


def test_best_peer_of_each_entry(script, tmp_path, capsys):
    tables = script("bench_tables")
    file = tmp_path / "peers.csv"
    file.write_text(CSV)
    peers = tables.read_peers(file)
    assert peers == {(128, 4096, 4096, 1): ("fast", 6.75), (-1, 4096, 4096, 1): ("fast", 6.0)}
    rows = [row(), row(us=3.0), row(m=2)]
    tables.add_peers(rows, peers)
    assert [r.get("us_peer") for r in rows] == [6.75, 6.75, None]
    tables.print_row(rows[0])
    assert "fast 6.75 (1.35x)" in capsys.readouterr().out
    file.write_text("kernel,K,N,M,us\n")
    with pytest.raises(SystemExit, match="expected kernel, dtype, group_size, K, N, M and micro"):
        tables.read_peers(file)


def test_summary_holds_geometric_means_and_the_worst(script, capsys):
    tables = script("bench_tables")
    rows = [row(us=4.0, us_peer=8.0), row(us=8.0, us_invariant=16.0, cublas=math.nan), row(m=2)]
    first, second = tables.summarize(rows)
    assert first["x floor"] == pytest.approx(math.sqrt(2)) and first["worst x floor"] == 2
    assert first["x cublas"] == pytest.approx(2.5)  # nan: not measured
    assert (first["x peer"], first["invariant"]) == (pytest.approx(2), pytest.approx(2))
    assert "x peer" not in second and second["m"] == 2
    assert "x peer" in capsys.readouterr().out


def test_models_are_summed_over_their_linears(script, capsys):
    tables = script("bench_tables")
    tables.print_models({"Toy": ["4096x4096", "4096x4096"]}, [row(us=5.0)])
    assert "Toy float16 group 128 M=1: 10.0 us a layer, 2.00x" in capsys.readouterr().out


def test_plot(script, tmp_path):
    pytest.importorskip("matplotlib")
    script("bench_tables").plot([row(), row(m=2)], tmp_path / "plot.svg", "a GPU")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("name", ["bench.py", "bench_generate.py", "tune.py"])
def test_options_are_explained(name):
    command = [sys.executable, str(SCRIPTS / name), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--output" in shown and "--group_size" in shown


def test_generation(script, tmp_path, capsys):
    bench = script("bench_generate")
    command = "--size tiny --device cpu --dtype bfloat16 --variants eager --context 8 "
    command += "--new_tokens 3 --repeats 1 --prefill 16 --batch 1 2 --models plain packed unfused"
    output = tmp_path / "generate.json"
    report = bench.main([*command.split(), "--output", str(output)])
    assert [(r["model"], r["batch"]) for r in report["rows"]] == [
        (model, batch) for model in ("plain", "packed", "unfused") for batch in (1, 2)
    ]
    for r in report["rows"]:
        assert r["ms_per_token"] > 0 and r["logits_difference"] < 0.05
        assert r["tokens_per_s"] == pytest.approx(1e3 * r["batch"] / r["ms_per_token"])
    assert [p["tokens"] for p in report["prefill"]] == [16] * 3
    written = json.loads(output.read_text())
    assert written == report
    assert written["circumstances"]["options"]["output"] == "generate.json"
    assert str(tmp_path) not in output.read_text()
    assert "prefill of 16 tokens, packed" in capsys.readouterr().out


def test_a_model_that_computes_other_things_is_not_timed(script, monkeypatch):
    bench = script("bench_generate")
    make = bench.make_model

    def other_weights(name, config, options):
        model = make(name, config, options)
        if name == "packed":
            model.model.layers[0].mlp.down_proj.scales.mul_(1.5)
        return model

    monkeypatch.setattr(bench, "make_model", other_weights)
    command = "--size tiny --device cpu --dtype bfloat16 --variants eager --context 8 --prefill 0"
    with pytest.raises(AssertionError, match="logits of the packed model differ"):
        bench.main([*command.split(), "--new_tokens", "1", "--repeats", "1"])
