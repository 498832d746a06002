"""Two processes share a run (gloo, CPU): the same checkpoint, clear failures, resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptq.cli import main
from gptq.distributed import Workers, launched_by_torchrun, local_device
from gptq.sequential import LinearResult
from gptq.solver import Solution, Statistics
from gptq.storage import FinishedLayers
from marlin_kernel import WEIGHT_TYPES, ConfigError
from marlin_kernel.checkpoint import open_checkpoint, packed_scheme, read_layer
from tests.gptq_models import write_source, write_text

ROOT = Path(__file__).parent.parent

# The launcher, with process 1 failing in its second layer where asked for.
LAUNCHER = """
import os, sys
import torch
torch.set_num_threads(1)
from gptq.cli import main
from gptq.sequential import Walker
from marlin_kernel import NumericalError

quantize_layer = Walker.quantize_layer
def failing(self, index, on_stage):
    if index == 1 and self.workers.rank == 1:
        raise NumericalError("a planted failure")
    return quantize_layer(self, index, on_stage)
if os.environ.get("PLANT_FAILURE"):
    Walker.quantize_layer = failing
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("source")
    write_source(folder)
    text = write_text(tmp_path_factory.mktemp("text") / "calibration.txt")
    few = ["--wbits", "4", "--groupsize", "32", "--nsamples", "7", "--seqlen", "32"]
    return [str(folder), *few, "--dataset", str(text), "--no-asymmetric", "--refit", "0"]


# Factors matrices by panels that belong to two or three processes in turn.
FACTOR = """
import torch
from gptq import hessian
from gptq.distributed import join, leave
from marlin_kernel import NumericalError

workers = join(torch.device("cpu"))
hessian._BY_PANELS = hessian._SHARED = 64
for k, panel in ((200, 64), (128, 64), (130, 64), (65, 16)):
    hessian._PANEL = panel
    x = torch.randn(3 * k, k, generator=torch.Generator().manual_seed(k))
    h = x.T @ x
    ours, alone = hessian.factorize(h, 0.01, "ours", workers), hessian.factorize(h, 0.01)
    torch.testing.assert_close(ours.r, alone.r, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.u, alone.u, rtol=1e-3, atol=1e-4)
    assert torch.equal(ours.r, ours.r.triu()) and ours.retries == 0
    for part in workers.collect(ours.r):
        assert torch.equal(part, ours.r)
x = torch.randn(40, 200, generator=torch.Generator().manual_seed(1))
h = x.T @ x
h[150, 150] -= 0.2 * h.diagonal().mean()  # not positive definite until damping is raised
ours, alone = hessian.factorize(h, 0.001, "ours", workers), hessian.factorize(h, 0.001)
assert ours.retries == alone.retries > 0
assert {retries for retries in workers.collect(ours.retries)} == {ours.retries}
print("equal factors")
leave()
"""


def torchrun(
    folder: Path, flags: list[str], script: str = LAUNCHER, count: int = 2, **environment: str
) -> subprocess.CompletedProcess:
    file = folder / "launcher.py"
    file.write_text(script)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), str(file),
         *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        cwd=folder, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip


def test_two_processes_write_the_checkpoint_of_one_and_survive_a_failure(flags, tmp_path):
    """Equal codes up to ties: sums over samples come in another order."""
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    assert main([*flags, "--save", str(alone)]) == 0

    out = ["--save", str(whole)]
    cpu = ["--device", "cpu"]
    failed = torchrun(tmp_path, [*flags, *out, *cpu], PLANT_FAILURE="1")
    assert failed.returncode != 0 and not whole.exists()
    assert "a planted failure" in failed.stderr
    kept = list((tmp_path / ".whole.unfinished").glob("layer-*.safetensors"))
    names = [f"layer-0000-part-{part}-of-2.safetensors" for part in (1, 2)]
    assert sorted(file.name for file in kept) == names  # each wrote a part of the linears
    ours = [set(load_file(file)) for file in kept]
    assert ours[0] and ours[1] and not ours[0] & ours[1]
    resumed = torchrun(tmp_path, [*flags, *out, *cpu, "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("packed checkpoint") == 1  # the first process speaks for all
    report = json.loads((whole / "quantization_report.json").read_text())
    ranks = report["totals"]["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    for rank in ranks:
        assert f"process {rank['rank']} on cpu: {rank['tokens']:,} tokens" in resumed.stdout
    assert all(rank["peak_host_bytes"] > 0 and rank["seconds"]["solve"] > 0 for rank in ranks)

    ours, theirs = open_checkpoint(whole), open_checkpoint(alone)
    scheme = packed_scheme(ours)
    names = sorted({name.rpartition(".")[0] for name in ours.files if name.endswith(".B")})
    assert len(names) == 14
    for name in names:
        a, b = read_layer(ours, scheme, name), read_layer(theirs, scheme, name)
        different = (a.codes != b.codes).any(0).float().mean()  # outputs that met a tie
        assert float(different) <= (0.0 if "layers.0.self_attn.q" in name else 0.2), name
    logits = [load_file(path / "marlin_probe.st")["logits"] for path in (whole, alone)]
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_that_share_a_factorization_get_that_of_one(tmp_path, count):
    done = torchrun(tmp_path, [], FACTOR, count)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal factors") == count


class _Seen(Workers):
    """Process `rank` of those that see a folder or not, as `sees` says."""

    def __init__(self, rank: int, sees: list[bool], mark: str | None = None) -> None:
        super().__init__()
        self.rank, self.count, self.sees, self.mark = rank, len(sees), sees, mark

    def agree(self, value):
        return value if self.mark is None else self.mark

    def collect(self, value):
        assert value == self.sees[self.rank]
        return self.sees


def test_processes_that_do_not_see_the_folder_write_nothing(tmp_path):
    sees = [True, False, True]
    folder = tmp_path / "run"
    first = FinishedLayers.shared(FinishedLayers(folder, "key", None), folder, _Seen(0, sees))
    assert (first.part, first.parts) == (0, 2)
    assert [file.name for file in folder.iterdir()] == ["run.json"]
    (folder / "mark").touch()
    elsewhere = tmp_path / "other"
    assert FinishedLayers.shared(None, elsewhere, _Seen(1, sees, "mark")) is None
    third = FinishedLayers.shared(None, folder, _Seen(2, sees, "mark"))
    assert (third.part, third.parts, third.count()) == (1, 2, 0)


def result(name: str, inputs: int, outputs: int) -> LinearResult:
    codes = torch.randint(16, (inputs, outputs), dtype=torch.uint8)
    g_idx = torch.arange(inputs) // 32
    scales = torch.rand(-(-inputs // 32), outputs).half().float() + 0.1
    zeros = torch.full(scales.shape, 8.0)
    facts = Statistics(0.0, 0.0, 0.0, 1.0, 0.0, 0.1, 0, 0)
    wtype = WEIGHT_TYPES["uint4b8"]
    return LinearResult(name, Solution(codes, scales, zeros, g_idx, facts, wtype), None, 0.0)


def test_parts_of_a_layer_are_those_of_one_file_and_count_when_all_are_there(tmp_path):
    shapes = ((96, 64), (96, 20), (96, 20), (96, 160), (33, 160))
    results = [result(f"linear{i}", *shape) for i, shape in enumerate(shapes)]
    whole = FinishedLayers(tmp_path / "one", "key", None)
    whole.save(0, results, [{"name": "row"}])
    several = FinishedLayers(tmp_path / "three", "key", None)
    several.parts = 3
    for part in (2, 0, 1):
        assert several.count() == 0
        several.part = part
        several.save(0, results, [{"name": "row"}] if part == 0 else [])
    assert whole.count() == several.count() == 1
    (expected, rows), (found, found_rows) = whole.load(0), several.load(0)
    assert rows == found_rows == [{"name": "row"}] and list(expected) == list(found)
    for name, tensors in expected.items():
        assert tensors.keys() == found[name].keys()
        assert all(torch.equal(tensor, found[name][part]) for part, tensor in tensors.items())
        assert torch.equal(tensors["codes"], results[int(name[-1])].solution.codes)
    sizes = [file.stat().st_size for file in (tmp_path / "three").glob("layer-*")]
    assert max(sizes) < 0.6 * sum(sizes)


def test_shares_are_equal_up_to_one():
    workers = Workers()
    workers.count = 3
    assert workers.share(7) == [3, 2, 2] and workers.share(2) == [1, 1, 0]
    assert sum(workers.share(4096)) == 4096


def test_a_single_process_shares_with_nobody():
    workers, part = Workers(), torch.ones(2, 3)
    workers.sum(part)
    assert torch.equal(workers.gather(part, [3]), torch.ones(2, 3))
    assert workers.agree("value") == "value" and workers.share(5) == [5]
    assert workers.collect("value") == ["value"]


def test_devices_of_several_processes(monkeypatch):
    assert local_device("cuda:3") == "cuda:3" and not launched_by_torchrun()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert local_device("cuda") == "cuda:2" and local_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="cuda:1.*4 processes.*--device cuda"):
        local_device("cuda:1")
