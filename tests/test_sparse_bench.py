"""scripts/sparse_benchmarks.py and plot_bench.py, as far as they need no GPU."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.benchmark import Compare, Measurement
from torch.utils.benchmark.utils.common import TaskSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import plot_bench  # noqa: E402
import sparse_benchmarks  # noqa: E402

from marlin_kernel.sparse import prune_2_4  # noqa: E402


def problems(*arguments: str) -> list[tuple[int, int, int]]:
    options = sparse_benchmarks.parser().parse_args(["--dtype", "fp8", *arguments])
    return list(sparse_benchmarks.MODES[options.mode](options))


def test_square_problems() -> None:
    dims = ("--dim-start", "128", "--dim-end", "512", "--dim-increment", "128")
    assert problems("square_bench", *dims) == [(d, d, d) for d in (128, 256, 384, 512)]
    with pytest.raises(SystemExit, match="--dim-end 8 is less than --dim-start 9"):
        problems("square_bench", "--dim-start", "9", "--dim-end", "8", "--dim-increment", "1")


def test_ranges_sweep_what_is_not_constant() -> None:
    dims = ("--dim-start", "16", "--dim-end", "48", "--dim-increment", "16")
    found = problems("range_bench", *dims, "--n-constant", "256", "--k-constant", "512")
    assert found == [(16, 512, 256), (32, 512, 256), (48, 512, 256)]
    assert problems("range_bench", *dims, "--m-constant", "7")[0] == (7, 16, 16)
    constants = ("--m-constant", "1", "--n-constant", "1", "--k-constant", "1")
    with pytest.raises(SystemExit, match="leave one constant out"):
        problems("range_bench", *dims, *constants)


def test_models_are_divided_by_tensor_parallelism() -> None:
    llama = ("model_bench", "--models", "meta-llama/Llama-2-7b-hf", "--batch-sizes", "1", "16")
    assert problems(*llama)[:3] == [(1, 4096, 12288), (16, 4096, 12288), (1, 4096, 4096)]
    halves = problems(*llama, "--tp-sizes", "2")
    assert halves[0] == (1, 4096, 6144) and halves[-1] == (16, 5504, 4096)
    with pytest.raises(SystemExit, match="does not divide"):
        problems(*llama, "--tp-sizes", "7")


SQUARE = ("square_bench", "--dim-start", "64", "--dim-end", "64", "--dim-increment", "64")


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (("--replays", "0", *SQUARE), "'0' is no whole number of at least 1"),
        (("model_bench", "--batch-sizes", "16", "-1"), "'-1' is no whole number"),
        (("model_bench", "--models", "nobody/nothing"), "invalid choice: 'nobody/nothing'"),
        (("range_bench", *SQUARE[1:], "--k-constant", "x"), "'x' is no whole number"),
    ),
)
def test_bad_options_are_named(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        problems(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (("--only", "ours,cuspar5e", *SQUARE), "holds 'cuspar5e'; with --dtype fp8 .*cusparselt"),
        (("range_bench", *SQUARE[1:], "--k-constant", "30"), "K=30 is no multiple of 4"),
        (SQUARE, "on a CUDA GPU, and torch finds none"),
    ),
)
def test_what_cannot_run_is_said_before_it_runs(arguments, message, monkeypatch) -> None:
    monkeypatch.setattr(sparse_benchmarks.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        sparse_benchmarks.main(["--dtype", "fp8", *arguments])


@pytest.mark.parametrize("dtype", sparse_benchmarks.DTYPES)
def test_names_are_those_of_the_kernels(dtype, monkeypatch) -> None:
    monkeypatch.setattr(sparse_benchmarks, "ROTATE_BYTES", 1)
    a = torch.ones(32, 64).to(sparse_benchmarks.DTYPES[dtype])
    w = prune_2_4(torch.ones(48, 64)).to(sparse_benchmarks.DTYPES[dtype])
    found = [name for name, _ in sparse_benchmarks.torch_kernels(a, w, dtype)]
    for sparse in (False, True):
        for name, calls, expected in sparse_benchmarks.own_kernels(a, w, sparse):
            found.append(name)
            assert torch.equal(calls[0](), expected)
    assert [*found, "cusparselt"] == sparse_benchmarks.kernel_names(dtype)
    assert all(sparse_benchmarks.family(measurement(name, 16, 1.0)) for name in found)
    options = sparse_benchmarks.parser().parse_args(
        ["--dtype", dtype, "--only", "bf16,se_te", *SQUARE]
    )
    assert sparse_benchmarks.wanted_kernels(options) == {
        "torch_bf16", "ours_dense_tensor", "ours_dense_tensor_bias", "ours_sparse_tensor",
        "ours_sparse_tensor_bias",
    }  # fmt: skip


def measurement(name: str, m: int, seconds: float) -> Measurement:
    names = {"sub_label": f"MKN=({m}x4096x4096)", "description": name}
    task = TaskSpec("", "", label="model_bench-fp8", **names)
    return Measurement(10, [10 * seconds] * 3, task)


def run() -> list[Measurement]:
    """Two kernels and two sizes."""
    kernels = ("ours_sparse_tensor", 5e-5), ("torch_fp8_tensor", 1e-4)
    return [measurement(name, m, seconds) for name, seconds in kernels for m in (16, 1024)]


@pytest.fixture
def stored(tmp_path) -> dict[str, Path]:
    """A run as .pkl and .json."""
    arguments = ["--dtype", "fp8", "--output", str(tmp_path), "model_bench"]
    options = sparse_benchmarks.parser().parse_args(arguments)
    sparse_benchmarks.store(run(), [(16, 4096, 4096)], options, ["a note"])
    return {path.suffix: path for path in tmp_path.iterdir()}


def test_tables_fit_a_screen_and_hold_the_fastest(capsys) -> None:
    names = sparse_benchmarks.kernel_names("fp8")
    found = [measurement(name, m, 1e-5 * m) for m in (16, 8192) for name in names]
    found += [measurement("ours_sparse_tensor", 1024, 5e-5), measurement("cusparselt", 1024, 6e-5)]
    sparse_benchmarks.print_tables(found, ["a note"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 160
    assert all(f"model_bench-fp8: {t}" in out for t, _ in sparse_benchmarks.FAMILIES.values())
    assert out.endswith("a note\n")
    heads, *rows = sparse_benchmarks.summary(found)
    assert all(kind in heads for _, kind in sparse_benchmarks.FAMILIES.values())
    assert heads.endswith("2:4 x cuSPARSELt  2:4 x torch 8 bits")
    assert rows[2].split() == [
        "1024", "4096", "4096", "-", "-", "-", "60.0", "(572.7)", "50.0", "(687.2)", "1.20", "-"
    ]  # fmt: skip


def test_a_failing_run_keeps_what_it_has(tmp_path, monkeypatch, capsys) -> None:
    def bench(m, k, n, options, wanted, label, notes):
        yield measurement("torch_bf16", m, 1e-4)
        raise RuntimeError("the second kernel fails")

    monkeypatch.setattr(sparse_benchmarks, "bench", bench)
    monkeypatch.setattr(sparse_benchmarks, "require_gpu", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="the second kernel"):
        sparse_benchmarks.main(["--dtype", "fp8", "--output", str(tmp_path), *SQUARE])
    assert "[1/1] M=64 K=64 N=64" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["rows"][0]["kernel"] == "torch_bf16"


def on_the_cpu(monkeypatch) -> list[int]:
    """Let the script run without a GPU, on a clock that does not go. Returns launches as timed."""
    timed = []

    def operands(m, k, n, dtype):
        torch.manual_seed(0)
        a, w = torch.randn(m, k), prune_2_4(torch.randn(n, k))
        if dtype == "int8":
            a, w = (40 * a).clamp(-127, 127), (40 * w).clamp(-127, 127).round()
        return a.to(sparse_benchmarks.DTYPES[dtype]), w.to(sparse_benchmarks.DTYPES[dtype])

    def replay_times(calls, replays):
        timed.append(len(calls))
        return [1e-6 * len(calls)] * replays

    monkeypatch.setattr(sparse_benchmarks, "require_gpu", lambda *_, **__: None)
    monkeypatch.setattr(sparse_benchmarks, "operands", operands)
    monkeypatch.setattr(sparse_benchmarks, "replay_times", replay_times)
    monkeypatch.setattr(sparse_benchmarks, "ROTATE_BYTES", 1)
    return timed


@pytest.mark.parametrize("dtype", sparse_benchmarks.DTYPES)
@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        ("square_bench --dim-start 64 --dim-end 128 --dim-increment 64", [(64,) * 3, (128,) * 3]),
        (
            "range_bench --dim-start 32 --dim-end 64 --dim-increment 32 --n-constant 64 "
            "--k-constant 128",
            [(32, 128, 64), (64, 128, 64)],
        ),
    ],
)
def test_a_whole_run_on_the_cpu(dtype, mode, sizes, tmp_path, monkeypatch, capsys) -> None:
    """Every kernel that a CPU has, checked against the reference, to tables and files."""
    timed = on_the_cpu(monkeypatch)
    arguments = ["--dtype", dtype, "--output", str(tmp_path), "--replays", "3", *mode.split()]
    assert sparse_benchmarks.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"M={m} K={k} N={n}" in printed for m, k, n in sizes)
    (file,), (pickled,) = tmp_path.glob("*.json"), tmp_path.glob("*.pkl")
    assert file.name.startswith(f"{mode.split()[0]}-{dtype}-") and file.stem == pickled.stem
    facts = json.loads(file.read_text())
    refused = {note.split()[0] for note in facts["notes"]}
    assert "cusparselt" in refused  # the CPU has none
    for size in sizes:
        kernels = [r["kernel"] for r in facts["rows"] if (r["m"], r["k"], r["n"]) == size]
        assert kernels == [n for n in sparse_benchmarks.kernel_names(dtype) if n not in refused]
        assert {"ours_sparse_tensor", "ours_dense_token-channel_bias", "torch_bf16"} <= {*kernels}
    assert len(timed) == len(facts["rows"]) and all(r["us"] == 1.0 for r in facts["rows"])
    assert plot_bench.panels(plot_bench.read(pickled)["rows"])[0] == "TFLOP/s"


def test_a_wrong_product_is_not_timed(tmp_path, monkeypatch) -> None:
    on_the_cpu(monkeypatch)
    right = sparse_benchmarks.scaled_sparse_mm
    monkeypatch.setattr(sparse_benchmarks, "scaled_sparse_mm", lambda *a: right(*a) * 1.1)
    with pytest.raises(RuntimeError, match="ours_sparse_tensor 64x64x64: relative error 0.1"):
        sparse_benchmarks.main(["--dtype", "int8", "--output", str(tmp_path), *SQUARE])


def test_stored_runs_hold_measurements_and_rates(stored) -> None:
    assert stored[".pkl"].name.startswith("model_bench-fp8-")
    with open(stored[".pkl"], "rb") as file:
        measurements = pickle.load(file)
    assert "ours_sparse_tensor" in str(Compare(measurements))
    facts = json.loads(stored[".json"].read_text())
    assert facts["notes"] == ["a note"] and len(facts["rows"]) == 4
    assert facts["command"].startswith("python scripts/sparse_benchmarks.py")
    assert {"commit", "torch", "cuda", "gpu"} <= set(facts)
    assert str(stored[".json"].parent) not in stored[".json"].read_text()
    row = facts["rows"][1]
    assert (row["m"], row["kernel"]) == (1024, "ours_sparse_tensor")
    assert row["us"] == 50.0
    assert row["tflops"] == pytest.approx(2 * 1024 * 4096**2 / 50e-6 / 1e12, rel=1e-3)


def test_plots_read_both_files(stored) -> None:
    pickled, plain = (plot_bench.read(stored[suffix])["rows"] for suffix in (".pkl", ".json"))
    for a, b in zip(pickled, plain, strict=True):
        assert {k: a[k] for k in ("m", "k", "n", "kernel")} == {
            k: b[k] for k in ("m", "k", "n", "kernel")
        }
        assert a["tflops"] == pytest.approx(b["tflops"], rel=1e-3)
    upwards, (panel,) = plot_bench.panels(plain)
    assert (upwards, panel.title, panel.x) == ("TFLOP/s", "K=4096 N=4096", "M")
    assert [size for size, _ in panel.lines["ours_sparse_tensor"]] == [16, 1024]


def test_plots_refuse_other_pickles(tmp_path) -> None:
    path = tmp_path / "run.pkl"
    path.write_bytes(pickle.dumps([Path("x")]))
    with pytest.raises(ValueError, match="no stored run does"):
        plot_bench.read(path)
