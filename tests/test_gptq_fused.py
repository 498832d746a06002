"""The solver's CUDA kernels: compiled for every GPU family, run by the emulator, run on a GPU.

In the emulator the host code of `gptq.fused_solver` runs unchanged on CPU tensors; only the launch
goes to the emulated kernel instead of the driver.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulator.build import STATUS, build, compiler
from torch import Tensor

from gptq import fused_solver
from gptq.fused_solver import DOTS, PICK, Kernel, search_kernel, search_splits, update_kernel
from gptq.grid import GridOptions
from gptq.solver import SolverOptions, solve
from marlin_kernel import WEIGHT_TYPES
from marlin_kernel.compiler import compile_kernel, included_files
from tests.compiling import REGISTERS, needs_nvrtc, own_cache  # noqa: F401 (fixture)

U4B8 = WEIGHT_TYPES["uint4b8"]
KIB = 1024
# Shared memory that a block may have, in bytes.
LIMITS = {"sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_90a": 227 * KIB}


def kernels(limit: int) -> list[Kernel]:
    searches = [search_kernel(g, limit) for g in fused_solver.SEARCH_GROUPS]
    return [*searches, update_kernel(False, limit), update_kernel(True, limit), PICK, DOTS]


# ---- compilation ---------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("arch", LIMITS)
def test_compiles_without_spills(arch):
    for kernel in kernels(LIMITS[arch]):
        cubin = compile_kernel(kernel.source, arch)
        assert cubin.stack_bytes == 0, kernel
        assert cubin.registers * fused_solver._THREADS[kernel.name] <= REGISTERS
        assert kernel.shared_bytes <= LIMITS[arch]


def test_the_cache_knows_these_sources():
    """A cubin of an older text of the kernels must never be taken."""
    source = update_kernel(False, LIMITS["sm_90a"]).source
    files = set(included_files(source.header))
    assert {SOURCES.resolve() / "update.cuh", SOURCES.resolve() / "rounding.cuh"} <= files


def test_no_room_is_said():
    with pytest.raises(ValueError, match="1000 bytes"):
        search_kernel(128, 1000)
    with pytest.raises(ValueError, match="1000 bytes"):
        update_kernel(True, 1000)


@pytest.mark.parametrize(("tiles", "candidates"), [(1, 1), (32, 76), (96, 76), (5504, 32), (3, 2)])
def test_splits_never_leave_a_part_empty(tiles, candidates):
    splits = search_splits(tiles, candidates, 132)
    assert 1 <= splits <= candidates
    waves = -(-tiles * splits // 132)
    assert waves * (-(-candidates // splits) + 1) <= -(-tiles // 132) * (candidates + 1)


# ---- emulator ------------------------------------------------------------------------------------

needs_emulator = pytest.mark.skipif(
    compiler() is None or platform.machine() != "x86_64",
    reason="the emulator needs g++ on x86-64",
)
SOURCES = Path(__file__).parents[1] / "gptq" / "csrc"


@functools.cache
def library(limit: int) -> tuple[ctypes.CDLL, dict[Kernel, int]]:
    numbers = {kernel: i for i, kernel in enumerate(kernels(limit))}
    cases = " ".join(
        f"{kernel.name.upper()}({i}, {', '.join(str(a).lower() for a in kernel.arguments)})"
        for kernel, i in numbers.items()
    )
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.cuh")))
    digest = hashlib.sha256(text).hexdigest()[:16]  # names the library, which is kept by content
    found = build("run_gptq.cpp", {"CASES": cases, "SOURCES": f'"{digest}"'})
    found.violation.restype = ctypes.c_char_p
    return found, numbers


@pytest.fixture
def emulated(monkeypatch):
    """Run `fused_solver` on CPU tensors as on a GPU whose blocks have 163 KiB."""
    limit = LIMITS["sm_80"]
    loaded, numbers = library(limit)
    seeds = iter(range(1 << 30))

    def launch(kernel: Kernel, grid: tuple[int, int], like: Tensor, arguments: bytes) -> None:
        assert loaded.shared_bytes(numbers[kernel]) == kernel.shared_bytes
        status = loaded.run(numbers[kernel], ctypes.c_uint(next(seeds)), *grid, arguments)
        assert status == 0, f"{kernel}: {STATUS[status]} {loaded.violation().decode()}"

    def shrinks(least: float, steps: int, index: None) -> Tensor:
        return kept.setdefault((least, steps), torch.linspace(1.0, least, steps))

    kept: dict[tuple[float, int], Tensor] = {}
    monkeypatch.setattr(fused_solver, "_launch", launch)
    monkeypatch.setattr(fused_solver, "shared_limit", lambda index: limit)
    monkeypatch.setattr(fused_solver, "_shrinks", shrinks)
    monkeypatch.setattr(fused_solver, "_BLOCKS", 2)  # K is short
    monkeypatch.setattr(fused_solver.launch, "multiprocessors", lambda index: 5)
    monkeypatch.setattr("gptq.solver._fused", lambda w, options: options.fused)


def problem(k: int, n: int, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Weight [N, K] and a well-conditioned H [K, K] of correlated inputs of different energy."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * k, k, generator=draw)
    x = x + 0.5 * x.roll(1, 1) + torch.randn(4 * k, 1, generator=draw)
    x = (x * (torch.rand(k, generator=draw) * 2 + 0.1)).to(device)
    return torch.randn(n, k, generator=draw).to(device), 2 * x.T @ x


def weighted_error(w: Tensor, q: Tensor, h: Tensor) -> float:
    error = (q - w).double()
    return float((error * (h.double() @ error)).sum())


def first_differences(a: Tensor, b: Tensor, order: Tensor) -> int:
    """Outputs [N] of codes [K, N] that differ anywhere.

    What follows the first difference of an output follows from it: it counts as one.
    """
    return int((a[order] != b[order]).any(0).sum())


def compare(weight: Tensor, h: Tensor, options: SolverOptions, ties: float = 1e-4) -> None:
    fused = solve(weight, h, options)[0]
    plain = solve(weight, h, replace(options, fused=False))[0]
    assert torch.equal(fused.g_idx, plain.g_idx)
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    k, n = fused.codes.shape
    assert first_differences(fused.codes, plain.codes, order) <= max(ties * k * n, 0)
    w = weight.float().T
    losses = [weighted_error(w, s.weight(), h) for s in (fused, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert fused.statistics.loss == pytest.approx(plain.statistics.loss, rel=2e-3)
    assert fused.statistics.clip_mean == pytest.approx(plain.statistics.clip_mean, rel=1e-3)


MARLIN = SolverOptions(
    U4B8, 128, GridOptions(clip_steps=5, signed=False), act_order=False, static_groups=False
)
DEFAULT = SolverOptions(U4B8, 64, GridOptions(clip_steps=4), refit=1, sweeps=1)
CASES = {
    "marlin": (300, 40, MARLIN),
    "marlin, groups of 32": (170, 33, replace(MARLIN, group_size=32)),
    "marlin, groups of 64": (200, 70, replace(MARLIN, group_size=64)),
    "one group per column": (150, 20, replace(MARLIN, group_size=-1)),
    "no clipping": (150, 20, replace(MARLIN, grid=GridOptions(clip=False, signed=False))),
    "signed": (130, 40, replace(MARLIN, grid=GridOptions(clip_steps=3))),
    "zero points": (260, 40, replace(MARLIN, wtype=WEIGHT_TYPES["uint4"])),
    "8 bits": (130, 40, replace(MARLIN, wtype=WEIGHT_TYPES["uint8b128"])),
    "static groups, refit, sweep": (200, 70, DEFAULT),
    "static groups of 128": (300, 20, replace(DEFAULT, group_size=128)),
    "moving groups": (170, 20, replace(DEFAULT, static_groups=False, group_size=32)),
    "one group, sweep": (140, 20, replace(DEFAULT, group_size=-1, refit=2, sweeps=2)),
}


@needs_emulator
@pytest.mark.parametrize("case", CASES)
def test_emulated_kernels_equal_the_reference(case, emulated):
    k, n, options = CASES[case]
    compare(*problem(k, n), options, ties=0)


@needs_emulator
def test_emulated_search_keeps_the_first_of_equal_candidates(emulated):
    """All-zero groups and repeated factors: every candidate is as good, the unclipped one wins."""
    w = torch.zeros(2, 32, 40)
    w[1, 3] = 1.0
    factor = torch.eye(32).expand(2, 32, 32).contiguous()
    options = GridOptions(clip_steps=3, clip_min=1.0)
    fused = fused_solver.search_grid(w, factor, U4B8, options)
    plain = fused_solver.grid.search_grid(w, factor, U4B8, options)
    assert all(map(torch.equal, fused, plain))


# ---- GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(case):
    k, n, options = CASES[case]
    compare(*problem(k, n, device="cuda"), options, ties=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [
    replace(MARLIN, grid=GridOptions(clip_steps=16, signed=False)),
    replace(DEFAULT, group_size=128),
], ids=["marlin", "default"])  # fmt: skip
def test_kernels_equal_the_reference_at_real_sizes(options):
    """4096 x 1024: ties are at most 1e-4 of the codes, and do not change the loss."""
    compare(*problem(4096, 1024, device="cuda"), options)
