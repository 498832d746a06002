"""scripts/sparse_benchmarks.py and plot_bench.py, as far as they need no GPU."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
from torch.utils.benchmark import Compare, Measurement
from torch.utils.benchmark.utils.common import TaskSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import plot_bench  # noqa: E402
import sparse_benchmarks  # noqa: E402


def problems(*arguments: str) -> list[tuple[int, int, int]]:
    options = sparse_benchmarks.parser().parse_args(["--dtype", "fp8", *arguments])
    return list(sparse_benchmarks.MODES[options.mode](options))


def test_square_problems() -> None:
    dims = ("--dim-start", "128", "--dim-end", "512", "--dim-increment", "128")
    assert problems("square_bench", *dims) == [(d, d, d) for d in (128, 256, 384, 512)]
    with pytest.raises(SystemExit, match="no range"):
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


@pytest.fixture
def stored(tmp_path) -> dict[str, Path]:
    """A run of two kernels and two sizes, as .pkl and .json."""
    measurements = []
    for name, speed in (("ours_sparse_tensor", 2.0), ("torch_fp8_tensor", 1.0)):
        for m in (16, 1024):
            names = {"sub_label": f"MKN=({m}x4096x4096)", "description": name}
            task = TaskSpec("", "", label="model_bench-fp8", **names)
            measurements.append(Measurement(10, [1e-3 / speed] * 3, task))
    arguments = ["--dtype", "fp8", "--output", str(tmp_path), "model_bench"]
    options = sparse_benchmarks.parser().parse_args(arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_benchmarks.torch.cuda, "get_device_name", lambda: "a GPU")
        sparse_benchmarks.store(measurements, [(16, 4096, 4096)], options, ["a note"])
    return {path.suffix: path for path in tmp_path.iterdir()}


def test_stored_runs_hold_measurements_and_rates(stored) -> None:
    assert stored[".pkl"].name.startswith("model_bench-fp8-")
    with open(stored[".pkl"], "rb") as file:
        measurements = pickle.load(file)
    assert "ours_sparse_tensor" in str(Compare(measurements))
    facts = json.loads(stored[".json"].read_text())
    assert facts["notes"] == ["a note"] and len(facts["rows"]) == 4
    row = facts["rows"][1]
    assert (row["m"], row["kernel"]) == (1024, "ours_sparse_tensor")
    assert row["us"] == 50.0
    assert row["tflops"] == pytest.approx(2 * 1024 * 4096**2 / 50e-6 / 1e12, rel=1e-3)


def test_plots_read_both_files(stored) -> None:
    pickled, plain = (plot_bench.read(stored[suffix]) for suffix in (".pkl", ".json"))
    for a, b in zip(pickled, plain, strict=True):
        assert {k: a[k] for k in ("m", "k", "n", "kernel")} == {
            k: b[k] for k in ("m", "k", "n", "kernel")
        }
        assert a["tflops"] == pytest.approx(b["tflops"], rel=1e-3)
    ((title, (varies, lines)),) = plot_bench.figures(plain).items()
    assert (title, varies) == ("K=4096 N=4096", "m")
    assert [size for size, _ in lines["ours_sparse_tensor"]] == [16, 1024]


def test_plots_refuse_other_pickles(tmp_path) -> None:
    path = tmp_path / "run.pkl"
    path.write_bytes(pickle.dumps([Path("x")]))
    with pytest.raises(ValueError, match="no stored run does"):
        plot_bench.read(path)
