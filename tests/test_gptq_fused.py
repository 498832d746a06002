"""The solver's CUDA kernels: compiled for every GPU family, run by the emulator, run on a GPU.

In the emulator the host code of `gptq.fused_solver` runs unchanged on CPU tensors; only the launch
goes to the emulated kernel instead of the driver.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulator.build import build, needs_emulator, outcome
from torch import Tensor

from gptq import fused_solver
from gptq.fused_solver import DOTS, PICK, Kernel, search_kernel, search_splits, update_kernel
from gptq.grid import GridOptions, round_to_float
from gptq.hessian import Factor
from gptq.solver import SolverOptions, _sweep, solve
from gptq.sparsity import movable
from marlin_kernel import WEIGHT_TYPES
from marlin_kernel.compiler import compile_kernel, included_files
from marlin_kernel.reference import decode
from marlin_kernel.sparse import positions_2_4
from marlin_kernel.weight_types import WeightType
from tests.compiling import REGISTERS, needs_nvrtc, own_cache  # noqa: F401 (fixture)

U4B8 = WEIGHT_TYPES["uint4b8"]
KIB = 1024
# Shared memory that a block may have, in bytes.
LIMITS = {"sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_90a": 227 * KIB}
RESERVED = KIB  # of a multiprocessor's shared memory for each block that runs there


def kernels(limit: int) -> list[Kernel]:
    searches = [search_kernel(g, limit) for g in fused_solver.SEARCH_GROUPS]
    dense = [update_kernel(sweep, limit) for sweep in (False, True)]
    pruning = [update_kernel(sweep, limit, prune=True) for sweep in (False, True)]
    alone = update_kernel(False, limit, prune=True, grid="reals")
    floats = [update_kernel(s, limit, grid=g) for s in (False, True) for g in ("e4m3", "e2m1")]
    return [*searches, *dense, *pruning, alone, *floats, PICK, DOTS]


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
    names = "update.cuh", "rounding.cuh", "pruning.cuh", "grids.cuh"
    assert {SOURCES.resolve() / name for name in names} <= files


@needs_nvrtc
@pytest.mark.parametrize("arch", ("sm_86", "sm_90a"))
def test_a_multiprocessor_takes_two_blocks(arch):
    """Of the update of integers, pruned or not."""
    limit = LIMITS[arch]
    for sweep, prune in itertools.product((False, True), repeat=2):
        kernel = update_kernel(sweep, limit, prune)
        assert 2 * (kernel.shared_bytes + RESERVED) <= limit + RESERVED
        registers = compile_kernel(kernel.source, arch).registers
        assert 2 * registers * fused_solver._THREADS["update"] <= REGISTERS


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
        assert outcome(loaded, status) == "finished", kernel

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


def with_dead_inputs(weight: Tensor, h: Tensor, *dead: int) -> tuple[Tensor, Tensor]:
    """The problem with inputs that were never active: their weights become zero."""
    h = h.clone()
    h[list(dead)] = 0
    h[:, list(dead)] = 0
    return weight, h


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
    if options.sparsity:
        for solution in (fused, plain):
            positions_2_4(solution.weight().T.contiguous())  # raises if it is not 2:4
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

PRUNED = {
    name: (k, n, replace(options, sparsity="2:4"))
    for name, (k, n, options) in {
        "natural order": (300, 40, MARLIN),
        "natural order, groups of 32": (172, 33, replace(MARLIN, group_size=32)),
        "natural order, one group": (152, 20, replace(MARLIN, group_size=-1)),
        "no clipping": (152, 20, replace(MARLIN, grid=GridOptions(clip=False, signed=False))),
        "8 bits": (132, 40, replace(MARLIN, wtype=WEIGHT_TYPES["uint8b128"])),
        "8 bits, static groups": (132, 40, replace(DEFAULT, wtype=WEIGHT_TYPES["uint8b128"])),
        "static groups": (200, 70, replace(DEFAULT, refit=0, sweeps=0)),
        "static groups, refit, sweep": (200, 70, DEFAULT),
        "one group, sweeps": (140, 20, replace(DEFAULT, group_size=-1, refit=2, sweeps=2)),
    }.items()
}
FP8, NVFP4, MXFP4, HQQ = (
    WEIGHT_TYPES[name] for name in ("float8_e4m3fn", "nvfp4", "mxfp4", "uint4_hqq")
)
OTHER_TYPES = {
    "fp8, natural order": (300, 20, replace(MARLIN, wtype=FP8)),
    "fp8": (300, 40, replace(DEFAULT, wtype=FP8, group_size=128)),
    "fp8, one scale": (150, 20, replace(DEFAULT, wtype=FP8, group_size=-1, refit=2, sweeps=2)),
    "nvfp4, natural order": (150, 20, replace(MARLIN, wtype=NVFP4, group_size=16)),
    "nvfp4": (200, 40, replace(DEFAULT, wtype=NVFP4, group_size=16)),
    "mxfp4, natural order": (150, 20, replace(MARLIN, wtype=MXFP4, group_size=32)),
    "mxfp4": (200, 40, replace(DEFAULT, wtype=MXFP4, group_size=32)),
    "hqq, natural order": (150, 20, replace(MARLIN, wtype=HQQ, group_size=64)),
    "hqq": (200, 40, replace(DEFAULT, wtype=HQQ, group_size=64)),
}


def check_rounding(wtype: WeightType, device: str) -> None:
    """Without feedback (U = I) the update is rounding: ties, subnormals, saturation, signs."""
    points = decode(torch.arange(wtype.levels), wtype)
    points = points[~points.isnan()].unique()
    middles = (points[1:] + points[:-1]) / 2
    near = torch.cat([points, middles, middles * (1 + 2**-20), middles * (1 - 2**-20)])
    draw = torch.Generator().manual_seed(0)
    values = torch.cat([near, torch.randn(600, generator=draw) * 9, torch.tensor([1e9, 1e-30])])
    w = torch.cat([values, -values])[:, None].to(device)
    w = torch.cat([w, w * 0.3 * 2**-9, w * 2.0**5], 1).contiguous()
    k, n = w.shape
    scales = torch.tensor([[1.0, 0.75 * 2**-11, 2.0**5]], device=device)
    factor = Factor(*(torch.eye(k, device=device) for _ in range(2)), 0.0, 0)
    groups = torch.zeros(k, dtype=torch.int64, device=device)
    options = SolverOptions(wtype, -1)
    arguments = w, factor, None, k, scales, torch.zeros_like(scales), groups, options
    found = fused_solver.update(*arguments)[0]
    assert torch.equal(found, round_to_float(w / scales, wtype))
    assert torch.equal(found.signbit()[w != 0], w.signbit()[w != 0])  # what rounds to zero keeps it


def compare_pruning(weight: Tensor, h: Tensor, act_order: bool, ties: float) -> None:
    """Pruning alone: equal masks, and values up to the order of sums."""
    options = SolverOptions(None, -1, act_order=act_order, sparsity="2:4")
    fused = solve(weight, h, options)[0].codes
    plain = solve(weight, h, replace(options, fused=False))[0].codes
    assert fused.dtype == plain.dtype == torch.float32
    positions_2_4(fused.T.contiguous())
    equal = ((fused != 0) == (plain != 0)).all(0)  # [N]
    assert int((~equal).sum()) <= ties * fused.numel()
    difference = (fused - plain)[:, equal].norm() / plain[:, equal].norm()
    assert float(difference) < 1e-6
    w = weight.float().T
    assert weighted_error(w, fused, h) == pytest.approx(weighted_error(w, plain, h), rel=1e-4)


@needs_emulator
@pytest.mark.parametrize("case", CASES)
def test_emulated_kernels_equal_the_reference(case, emulated):
    k, n, options = CASES[case]
    compare(*problem(k, n), options, ties=0)


@needs_emulator
@pytest.mark.parametrize("case", PRUNED)
def test_emulated_pruning_equals_the_reference(case, emulated):
    k, n, options = PRUNED[case]
    weight, h = problem(k, n)
    compare(weight, h, options, ties=0)
    compare(*with_dead_inputs(weight, h, 4, 5, 6, 7, 9, 10, 33), options, ties=0)


@needs_emulator
@pytest.mark.parametrize("case", OTHER_TYPES)
def test_emulated_kernels_know_every_type(case, emulated):
    k, n, options = OTHER_TYPES[case]
    compare(*problem(k, n), options, ties=0)


@needs_emulator
@pytest.mark.parametrize("size", (2.0**-30, 2.0**30))
@pytest.mark.parametrize("case", ("nvfp4", "mxfp4"))
def test_emulated_kernels_keep_scales_beyond_fp16(case, size, emulated):
    k, n, options = OTHER_TYPES[case]
    weight, h = problem(k, n)
    compare(weight * size, h, options, ties=0)


@needs_emulator
@pytest.mark.parametrize("wtype", (FP8, NVFP4), ids=lambda t: t.name)
def test_emulated_rounding_to_floats(wtype, emulated):
    check_rounding(wtype, "cpu")


@needs_emulator
@pytest.mark.parametrize("act_order", (False, True))
@pytest.mark.parametrize(("k", "n"), [(4, 1), (300, 40)])
def test_emulated_pruning_alone_equals_the_reference(k, n, act_order, emulated):
    compare_pruning(*problem(k, n), act_order, ties=0)


def sparse_codes(k: int, n: int) -> Tensor:
    """Random codes [K, N] of which two of each quad are 8; in some quads three or all four."""
    draw = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (k, n), generator=draw)
    places = torch.rand(k // 4, 4, n, generator=draw).argsort(1)
    zeros = places < torch.randint(2, 5, (k // 4, 1, n), generator=draw)
    return torch.where(zeros.view(k, n), 8, codes).float()


@needs_emulator
def test_emulated_sweep_moves_what_may_move(emulated):
    """Quads with more zeros than two fill up, others keep their zeros; as `solver._sweep` does."""
    k, n = 140, 33
    check_sweep(*problem(k, n), sparse_codes(k, n))


def check_sweep(weight: Tensor, h: Tensor, codes: Tensor) -> None:
    k, n = codes.shape
    w, h = weight.T.contiguous(), h + 0.1 * h.diagonal().mean() * torch.eye(k, device=h.device)
    scales = torch.full((1, n), 0.25, device=w.device)
    zeros, groups = torch.full_like(scales, 8), torch.zeros(k, dtype=torch.int64, device=w.device)
    options = SolverOptions(U4B8, -1, sparsity="2:4")
    fused = fused_solver.sweep(w, h, codes, scales, zeros, groups, options)
    plain = _sweep(w, h, codes, scales, zeros, groups, options)
    assert torch.equal(fused.float(), plain)
    fixed = ~movable(codes, zeros.expand_as(codes))
    assert bool((fused[fixed] == 8).all()) and bool((fused != codes).any())
    assert bool(((fused != 8) & (codes == 8)).any())  # a zero filled up its quad


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
@pytest.mark.parametrize("case", PRUNED)
def test_pruning_equals_the_reference(case):
    k, n, options = PRUNED[case]
    compare(*problem(k, n, device="cuda"), options, ties=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("case", OTHER_TYPES)
def test_kernels_know_every_type(case):
    k, n, options = OTHER_TYPES[case]
    compare(*problem(k, n, device="cuda"), options, ties=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("wtype", (FP8, NVFP4), ids=lambda t: t.name)
def test_rounding_to_floats(wtype):
    check_rounding(wtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("act_order", (False, True))
@pytest.mark.parametrize(("k", "n"), [(4, 1), (300, 40), (4096, 1024)])
def test_pruning_alone_equals_the_reference(k, n, act_order):
    compare_pruning(*problem(k, n, device="cuda"), act_order, ties=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [
    replace(MARLIN, grid=GridOptions(clip_steps=16, signed=False)),
    replace(DEFAULT, group_size=128),
    replace(DEFAULT, group_size=128, sparsity="2:4"),
    replace(DEFAULT, group_size=128, wtype=FP8),
    replace(DEFAULT, group_size=16, wtype=NVFP4),
], ids=["marlin", "default", "default, pruned", "fp8", "nvfp4"])  # fmt: skip
def test_kernels_equal_the_reference_at_real_sizes(options):
    """4096 x 1024: ties are at most 1e-4 of the codes, and do not change the loss."""
    compare(*problem(4096, 1024, device="cuda"), options)
