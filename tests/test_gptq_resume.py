"""Interrupted runs: nothing half-written that loads, and bit-identical continuation."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gptq.activations import Activations, DiskOffload
from gptq.cli import main
from gptq.lock import lock
from gptq.sequential import Walker
from gptq.storage import FinishedLayers
from marlin_kernel import ConfigError
from marlin_kernel.hf import load_model
from tests.gptq_models import SOURCES, write_source, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
FILE = "model.safetensors"
LAYERS = 3

# Runs the command line and dies by SIGKILL at a given point, as for want of memory or power.
KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from gptq import storage
from gptq.cli import main
from marlin_kernel.checkpoint import CheckpointWriter

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

point, *flags = sys.argv[1:]
if point == "finish":  # all layers and files written, nothing in place yet
    CheckpointWriter.finish = die
elif point == "write":  # half of the packed layers added
    add, count = CheckpointWriter.add_layer, [0]
    def add_layer(self, *given):
        count[0] += 1
        die() if count[0] > 10 else add(self, *given)
    CheckpointWriter.add_layer = add_layer
elif point.startswith("stage"):  # while solving so many stages later, whatever is being written
    from gptq.sequential import Walker
    solve, count = Walker._solve_stage, [0]
    def solve_stage(self, *given):
        count[0] += 1
        if count[0] > int(point[5:]):
            die()
        return solve(self, *given)
    Walker._solve_stage = solve_stage
else:  # after so many finished layers, in the middle of saving the next
    save, replaced = storage.FinishedLayers.save, os.replace
    def save_layer(self, index, *given):
        if index == int(point):
            os.replace = die
        save(self, index, *given)
    storage.FinishedLayers.save = save_layer
main(flags)
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Source, text and size of the run, without --save."""
    folder = tmp_path_factory.mktemp("source")
    write_source(folder, replace(SOURCES["qwen2"], layers=LAYERS))
    text = write_text(tmp_path_factory.mktemp("text") / "calibration.txt")
    few = ["--wbits", "4", "--groupsize", "32", "--nsamples", "8", "--seqlen", "32"]
    return [str(folder), *few, "--dataset", str(text)]


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([*flags, "--save", str(out)]) == 0
    return (out / FILE).read_bytes()


def unfinished(out: Path) -> Path:
    return out.with_name(f".{out.name}.unfinished")


def stop_after(monkeypatch, layers: int, flags: list[str], out: Path, *more: str) -> None:
    """Run in this process and interrupt it when `layers` layers are finished."""
    solve = Walker.quantize_layer

    def quantize_layer(self, index, on_stage):
        if index == layers:
            raise KeyboardInterrupt
        return solve(self, index, on_stage)

    monkeypatch.setattr(Walker, "quantize_layer", quantize_layer)
    assert main([*flags, "--save", str(out), *more]) == 130
    monkeypatch.undo()


# At every run another point of the work, beside the background writer.
RANDOM_STAGE = f"stage{random.randrange(4, 4 * LAYERS)}"


@pytest.mark.parametrize("point", ["1", "write", "finish", RANDOM_STAGE], ids=lambda p: p[:5])
def test_a_killed_run_leaves_nothing_that_loads_and_continues_to_the_same_bytes(
    point, flags, uninterrupted, tmp_path
):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, point, *flags, "--save", str(out)],
        env=environment, cwd=tmp_path, capture_output=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists()
    finished = sorted(p.name for p in unfinished(out).glob("layer-*.safetensors"))
    if point == RANDOM_STAGE:
        assert len(finished) <= int(point[5:]) // 4
    else:
        assert len(finished) == (int(point) if point.isdigit() else LAYERS)
    assert main([*flags, "--save", str(out), "--resume"]) == 0
    assert (out / FILE).read_bytes() == uninterrupted
    load_model(out, verify=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # what the dead run left is gone


# Kills its children from outside, at random times: some at any time of the run, some while the
# checkpoint is assembled. They are forks of a process that has all modules loaded, so that time is
# spent on the work. Prints how many were killed, and how many of those while assembling.
KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM
torch.set_num_threads(1)
from gptq.cli import main

seed, last, *flags = sys.argv[1:]
draw = random.Random(int(seed))
folder = Path.cwd()

def start(out):
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        code = 1
        try:
            code = main([*flags, "--save", str(out), "--resume"])
        finally:
            os._exit(code)
    return child

def ended(child):
    return os.waitpid(child, os.WNOHANG)[0] != 0

def wait_for(file, child):  # whether it came before the child ended
    while not file.exists():
        if ended(child):
            return False
        time.sleep(0.0005)
    return True

def content(out):
    return (out / "model.safetensors").read_bytes()

began = time.perf_counter()
child = start(folder / "whole")
alive = wait_for(folder / ".whole.unfinished" / last, child)
walked = time.perf_counter() - began
assert not alive or os.waitpid(child, 0)[1] == 0
duration = time.perf_counter() - began
whole, out = content(folder / "whole"), folder / "out"
longest = [duration, duration - walked]  # waits: of the whole run, of assembling
killed = assembling = 0
for trial in range(10):
    child = start(out)
    alive = True
    if trial % 2:
        alive = wait_for(folder / ".out.unfinished" / last, child)
    time.sleep(draw.uniform(0, longest[trial % 2]))
    alive = alive and not ended(child)
    if not alive:  # a machine that was busier during the first run: wait less
        longest[trial % 2] /= 2
    if alive:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        assembling += any(folder.glob(".out.partial-*"))
    if out.exists():  # it was in place before the end, and then it is whole
        assert content(out) == whole
        shutil.rmtree(out)
child = start(out)
assert os.waitpid(child, 0)[1] == 0
assert content(out) == whole
shutil.rmtree(folder / "whole")
print(killed, assembling)
"""


def test_a_run_killed_again_and_again_at_random_times(flags, tmp_path):
    """Every continuation ends in the same bytes, and nothing of the dead ones is left."""
    seed = random.randrange(1 << 30)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    last = f"layer-{LAYERS - 1:04d}.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(seed), last, *flags],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    killed, _ = map(int, done.stdout.split())
    assert killed >= 3, f"seed {seed}"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    load_model(tmp_path / "out", verify=True)


@pytest.mark.parametrize(
    "method",
    [
        ("--no-static-groups",),
        ("--no-sym",),
        ("--no-asymmetric", "--no-true-sequential"),
        ("--nearest",),
        ("--skip_gq",),
        ("--dtype", "bfloat16"),
    ],
    ids=" ".join,
)
def test_resuming_gives_the_same_bytes_for_every_method(method, flags, tmp_path, monkeypatch):
    assert main([*flags, "--save", str(tmp_path / "whole"), *method]) == 0
    stop_after(monkeypatch, 2, flags, tmp_path / "out", *method)
    assert not (tmp_path / "out").exists()
    assert main([*flags, "--save", str(tmp_path / "out"), *method, "--resume"]) == 0
    whole, resumed = tmp_path / "whole", tmp_path / "out"
    assert (resumed / FILE).read_bytes() == (whole / FILE).read_bytes()
    probes = []
    for folder in (whole, resumed):
        with safe_open(folder / "marlin_probe.st", "pt") as file:
            probes.append(file.get_tensor("logits"))
    assert torch.equal(*probes)


def test_resuming_does_not_solve_finished_layers_again(flags, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_after(monkeypatch, 2, flags, out)
    solve, solved = Walker.quantize_layer, []

    def quantize_layer(self, index, on_stage):
        solved.append(index)
        return solve(self, index, on_stage)

    monkeypatch.setattr(Walker, "quantize_layer", quantize_layer)
    assert main([*flags, "--save", str(out), "--resume"]) == 0
    assert solved == [2]


def test_an_unfinished_run_needs_a_decision(flags, uninterrupted, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    stop_after(monkeypatch, 1, flags, out)
    capsys.readouterr()
    assert main([*flags, "--save", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "1 finished layers" in error and "--resume" in error and "--no-resume" in error
    assert len(list(unfinished(out).glob("layer-*"))) == 1  # the question costs nothing
    assert main([*flags, "--save", str(out), "--no-resume"]) == 0
    assert (out / FILE).read_bytes() == uninterrupted
    assert not unfinished(out).exists()


@pytest.mark.parametrize(
    "changed",
    [
        ("--groupsize", "64"),
        ("--percdamp", "0.2"),
        ("--seed", "1"),
        ("--nsamples", "9"),
        ("--skip_gq",),
        ("--dtype", "float16"),
    ],
    ids=" ".join,
)
def test_other_settings_do_not_continue_a_run(changed, flags, tmp_path, monkeypatch, capsys):
    """Layers of two different runs in one checkpoint would load, and be wrong."""
    out = tmp_path / "out"
    stop_after(monkeypatch, 1, flags, out)
    capsys.readouterr()
    assert main([*flags, "--save", str(out), "--resume", *changed]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    setting, value = changed[0].lstrip("-"), changed[-1] if len(changed) == 2 else "True"
    assert f"other settings ({setting} " in error and "--no-resume" in error
    assert f"{value} here" in error.replace("'", "")
    assert not out.exists() and len(list(unfinished(out).glob("layer-*"))) == 1


def test_other_text_or_weights_do_not_continue_a_run(flags, tmp_path, monkeypatch, capsys):
    """The same names, but the files behind them have changed."""
    source, text, out = tmp_path / "source", tmp_path / "text.txt", tmp_path / "out"
    write_source(source, replace(SOURCES["qwen2"], layers=LAYERS))
    write_text(text)
    own = [str(source), *flags[1:-1], str(text), "--save", str(out)]
    stop_after(monkeypatch, 1, own[:-2], out)
    write_text(text, seed=5)
    assert main([*own, "--resume"]) == 2
    write_text(text)
    write_source(source, replace(SOURCES["qwen2"], layers=LAYERS), seed=1)
    assert main([*own, "--resume"]) == 2
    assert capsys.readouterr().err.count("another source or another calibration text") == 2
    write_source(source, replace(SOURCES["qwen2"], layers=LAYERS))
    assert main([*own, "--resume"]) == 0


def test_the_format_may_change(flags, tmp_path, monkeypatch):
    """Codes do not depend on how they will be written."""
    out = tmp_path / "out"
    stop_after(monkeypatch, 2, flags, out)
    assert main([*flags, "--save", str(out), "--resume", "--format", "gptq"]) == 0
    load_model(out, verify=True)


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Writing further into any file fails, as on a full disk; size: bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_nothing_that_is_finished(flags, uninterrupted, tmp_path, capsys):
    out = tmp_path / "out"
    with files_of_at_most(30_000):  # a finished layer has more
        assert main([*flags, "--save", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "finished layer 0" in error and "--resume" in error
    with files_of_at_most(100_000):  # the checkpoint has more
        assert main([*flags, "--save", str(out), "--resume"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: save=") and "cannot be written" in error and "--resume" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.unfinished"]
    assert len(list(unfinished(out).glob("layer-*.safetensors"))) == LAYERS
    assert main([*flags, "--save", str(out), "--resume"]) == 0
    assert (out / FILE).read_bytes() == uninterrupted


def test_a_full_gpu_names_the_ways_out(flags, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(Walker, "quantize_layer", full)
    for save in ((), ("--save", str(tmp_path / "out"))):
        assert main([*flags, *save]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB; lower ")
        assert "--offload_activations" in error and ("--resume" in error) == bool(save)


def test_resume_without_an_unfinished_run_starts_one(flags, uninterrupted, tmp_path):
    assert main([*flags, "--save", str(tmp_path / "out"), "--resume"]) == 0
    assert (tmp_path / "out" / FILE).read_bytes() == uninterrupted


def test_a_run_for_an_existing_checkpoint_keeps_it_until_the_end(flags, tmp_path, monkeypatch):
    """--overwrite must not remove the old checkpoint before the new one is whole."""
    out = tmp_path / "out"
    assert main([*flags, "--save", str(out), "--nearest"]) == 0
    old = (out / FILE).read_bytes()
    stop_after(monkeypatch, 1, flags, out, "--overwrite")
    assert (out / FILE).read_bytes() == old
    load_model(out, verify=True)
    assert main([*flags, "--save", str(out), "--overwrite", "--resume"]) == 0
    assert (out / FILE).read_bytes() != old


# ---- activations on disk -------------------------------------------------------------------------


def test_activations_on_disk_change_no_byte(flags, uninterrupted, tmp_path, capsys):
    """Beside OUT, and in a folder that is named; nothing is left of them."""
    big = tmp_path / "big"
    big.mkdir()
    for where in ("disk", str(big)):
        out = tmp_path / "out"
        assert main([*flags, "--save", str(out), "--offload_activations", where]) == 0
        assert (out / FILE).read_bytes() == uninterrupted
        assert "for activations" in capsys.readouterr().out
        shutil.rmtree(out)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["big"] and not list(big.iterdir())


def test_files_of_a_dead_run_go_when_the_next_one_starts(flags, uninterrupted, tmp_path):
    out, big = tmp_path / "out", tmp_path / "big"
    big.mkdir()
    stages = "stage6"
    where = ["--save", str(out), "--offload_activations", str(big)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, stages, *flags, *where],
        env=environment, cwd=tmp_path, capture_output=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = [p for p in big.rglob("*") if p.is_file()]
    assert left
    assert main([*flags, *where, "--resume"]) == 0
    assert (out / FILE).read_bytes() == uninterrupted
    assert not list(big.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_store_on_disk_keeps_bits_and_only_what_is_referred_to(dtype, tmp_path):
    store = DiskOffload(tmp_path / "files", torch.device("cpu"))
    kept = Activations(3, store)
    tensors = [torch.randn(1, 5 + i, 8).to(dtype) for i in range(3)]
    for i, tensor in enumerate(tensors):
        kept[i] = tensor
    other = kept.copy()
    assert all(map(torch.equal, other, tensors))
    kept[1] = tensors[0]
    assert torch.equal(other[1], tensors[1]) and torch.equal(kept[1], tensors[0])
    assert torch.equal(kept.take(0), tensors[0])
    del other
    assert torch.equal(kept[2], tensors[2])
    assert len(list((tmp_path / "files").iterdir())) == 2
    store.close()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_loses_bytes_is_named(tmp_path):
    store = DiskOffload(tmp_path / "files", torch.device("cpu"))
    kept = Activations(1, store)
    kept[0] = torch.randn(4, 4)
    assert kept[0].shape == (4, 4)
    next((tmp_path / "files").iterdir()).write_bytes(b"short")
    with pytest.raises(ConfigError, match="offload_activations: .*shorter.*--resume"):
        kept[0]
    store.close()


# ---- two runs with one OUT -----------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from gptq.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


def test_a_second_run_is_refused_until_the_first_is_dead(flags, uninterrupted, tmp_path, capsys):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], env=environment, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        for more in ((), ("--resume",), ("--no-resume", "--overwrite")):
            assert main([*flags, "--save", str(out), *more]) == 2
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert f"process {holder.pid} on " in error and "--resume" in error
        assert [p.name for p in tmp_path.iterdir()] == [".out.lock"]
    finally:
        holder.kill()  # SIGKILL: it cannot remove its file
        holder.wait()
    assert (tmp_path / ".out.lock").is_file()
    assert main([*flags, "--save", str(out)]) == 0
    assert (out / FILE).read_bytes() == uninterrupted
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_lock_goes_however_the_run_ends(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(KeyError), lock(out):
        assert (out.parent / ".out.lock").is_file()
        with pytest.raises(ConfigError, match="another run writes there"), lock(out):
            pass
        assert (out.parent / ".out.lock").is_file()
        raise KeyError
    assert not list(tmp_path.iterdir())  # and the folders made for it
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="file is a file; choose another"),
        lock(tmp_path / "file" / "x" / "out"),
    ):
        pass


# ---- the folder of finished layers ---------------------------------------------------------------


def test_a_damaged_record_of_a_finished_layer_is_named(flags, tmp_path, monkeypatch, capsys):
    """A truncated file must not end in another library's traceback, far less be used."""
    out = tmp_path / "out"
    stop_after(monkeypatch, 2, flags, out)
    file = unfinished(out) / "layer-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    capsys.readouterr()
    assert main([*flags, "--save", str(out), "--resume"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "layer-0001" in error and "--no-resume" in error


def test_only_leading_layers_count(tmp_path):
    finished = FinishedLayers(tmp_path / "run", "key", None)
    for index in (0, 1, 3):
        (tmp_path / "run" / f"layer-{index:04d}.safetensors").touch()
    (tmp_path / "run" / "layer-0002.partial").touch()
    assert finished.count() == 2
    with pytest.raises(ConfigError, match="2 finished layers"):
        FinishedLayers(tmp_path / "run", "key", None)


def test_a_run_without_finished_layers_asks_nothing(tmp_path):
    FinishedLayers(tmp_path / "run", "one", None)
    assert FinishedLayers(tmp_path / "run", "other", None).count() == 0
    FinishedLayers(tmp_path / "run", "other", True)  # the stamp is that of the second


def test_discarding_removes_the_old_layers(tmp_path):
    FinishedLayers(tmp_path / "run", "one", None)
    (tmp_path / "run" / "layer-0000.safetensors").touch()
    assert FinishedLayers(tmp_path / "run", "other", False).count() == 0
    with pytest.raises(ConfigError, match="another source or another calibration text"):
        FinishedLayers(tmp_path / "run", "one", True)
