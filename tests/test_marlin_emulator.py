"""The sm_80 kernel's own text, executed on the CPU by tests/emulator, against float64."""

from __future__ import annotations

import functools
import platform

import pytest
import torch
from emulator.build import compiler
from emulator.problem import DTYPES, TOLERANCE, Problem, problem
from emulator.sm80 import Kernel, Sm80Library
from torch import Tensor

from marlin_kernel.sm80_configs import (
    BATCH_INVARIANT_CONFIGS,
    CONFIGS,
    Sm80Config,
    geometry,
)

pytestmark = pytest.mark.skipif(
    compiler() is None or platform.machine() != "x86_64",
    reason="the emulator needs g++ on x86-64",
)

GROUP_SIZES = (-1, 32, 64, 128)
# seed % 3: copies land late, at once, at random moments
SEEDS = {torch.float16: (0, 1, 2), torch.bfloat16: (5,)}

# M, N, K, blocks: what each case is for
SHAPES = {
    "one tile": (1, 64, 64, 4),
    "several blocks per column": (15, 200, 448, 7),
    "several tiles per block": (16, 1090, 128, 2),
    "padding in K and N": (17, 301, 333, 3),
    "uneven stripes": (65, 520, 320, 5),
    "whole waves, then shared tiles": (130, 830, 192, 3),
}


def run_sm80(
    library: Sm80Library,
    kernel: Kernel,
    p: Problem,
    blocks: int,
    seed: int,
    batch_invariant: bool = False,
) -> tuple[str, Tensor]:
    """One launch into a poisoned output with guard rows. Returns the emulator's verdict and C."""
    m, n = p.expected.shape
    buffer = torch.full((m + 2, n), float("nan"), dtype=p.a.dtype)
    plan = geometry(kernel.config, m, n, p.k_padded, blocks, batch_invariant, min_k=64)
    out = buffer[1 : m + 1]
    verdict = library.run(kernel, p.a, p.words, p.scales, p.bias, out, p.n_padded, plan, seed=seed)
    if not (buffer[0].isnan().all() and buffer[-1].isnan().all()):
        verdict = "wrote outside of the output"
    return verdict, out


def sm80_kernels(dtype: torch.dtype) -> list[Kernel]:
    return [Kernel(config, dtype, g) for config in CONFIGS for g in (0, 32, 64, 128)]


@functools.cache
def sm80_library(dtype: torch.dtype) -> Sm80Library:
    return Sm80Library(sm80_kernels(dtype))


def name_of(value: object) -> str:
    if isinstance(value, Kernel):
        config = value.config
        return (
            f"tile{config.tile_m}x{config.tile_n}-{str(value.dtype)[6:]}-g{value.group_size or -1}"
        )
    return str(value).replace("torch.", "")


ALL_SM80 = [kernel for dtype in DTYPES for kernel in sm80_kernels(dtype)]


@pytest.mark.parametrize("kernel", ALL_SM80, ids=name_of)
def test_sm80_matches_float64(kernel: Kernel) -> None:
    library = sm80_library(kernel.dtype)
    for case, (m, n, k, blocks) in SHAPES.items():
        p = problem(m, n, k, kernel.dtype, kernel.group_size or -1)
        if p.grouped != (kernel.group_size > 0):
            continue  # a single group of K inputs is served as one scale per feature
        results = []
        for seed in SEEDS[kernel.dtype]:
            verdict, out = run_sm80(library, kernel, p, blocks, seed)
            assert verdict == "finished", f"{case}, seed {seed}: {verdict}"
            assert p.error(out) < TOLERANCE[kernel.dtype], f"{case}, seed {seed}"
            results.append(out)
        assert all(torch.equal(results[0], other) for other in results), f"{case}: order of fibers"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_sm80_shared_bytes_is_sizeof(dtype: torch.dtype) -> None:
    for kernel in sm80_kernels(dtype):
        size = sm80_library(dtype).shared_bytes(kernel)
        assert kernel.config.shared_bytes(kernel.group_size) == size


@pytest.mark.parametrize("alignment", [2, 4, 8, 16])
@pytest.mark.parametrize("k", [333, 334, 336])
def test_sm80_rows_of_any_alignment(alignment: int, k: int) -> None:
    kernel = Kernel(CONFIGS[1], torch.float16, 64)
    p = problem(17, 301, k, torch.float16, 64, alignment)
    for seed in SEEDS[torch.float16]:
        verdict, out = run_sm80(sm80_library(torch.float16), kernel, p, 3, seed)
        assert verdict == "finished"
        assert p.error(out) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_sm80_batch_invariant_rows(dtype: torch.dtype, group_size: int) -> None:
    """Row 0 has the same bits in every batch, tile shape and grid."""
    n, k = 300, 384
    kernels = [Kernel(c, dtype, max(group_size, 0)) for c in BATCH_INVARIANT_CONFIGS]
    library = sm80_library(dtype)
    first = Problem(1, n, k, dtype, group_size, 16)
    rows = []
    for kernel in kernels:
        for m, blocks in ((1, 5), (1, 64), (kernel.config.tile_m + 1, 3)):
            p = Problem(m, n, k, dtype, group_size, 16)
            p.words, p.scales, p.bias = first.words, first.scales, first.bias
            p.a[0] = first.a[0]
            verdict, out = run_sm80(library, kernel, p, blocks, m, batch_invariant=True)
            assert verdict == "finished"
            rows.append(out[0])
    assert first.error(rows[0][None]) < TOLERANCE[dtype]
    assert all(torch.equal(rows[0], row) for row in rows)


# What a careless edit may break: (header, text, replacement). Each must be noticed.
SM80_MUTATIONS = {
    "copies are not waited for": (
        "sm80/kernel.cuh",
        "ptx::cp_async_wait<Config::STAGES - 2>();",
        "",
    ),
    "one stage too few is waited for": (
        "sm80/kernel.cuh",
        "ptx::cp_async_wait<Config::STAGES - 2>();",
        "ptx::cp_async_wait<Config::STAGES - 1>();",
    ),
    "no barrier per stage": ("sm80/kernel.cuh", "ptx::block_sync();", ""),
    "the stage being read is refilled": (
        "sm80/kernel.cuh",
        "load_next(stage == 0 ? Config::STAGES - 1 : stage - 1);",
        "load_next(stage);",
    ),
    "no group is committed once the copies have run out": (
        "sm80/kernel.cuh",
        "      ahead.advance();\n    }\n    ptx::cp_async_commit();",
        "      ahead.advance();\n      ptx::cp_async_commit();\n    }",
    ),
    "no barrier between the warps' partial sums": ("sm80/reduce.cuh", "ptx::block_sync();", ""),
    "sums are added before the last block has arrived": (
        "sm80/reduce.cuh",
        "arrived != u.parts - 1",
        "arrived != u.parts - 2",
    ),
    "the counter is not reset": ("sm80/reduce.cuh", "*counter = 0;", ";"),
    "the next rows are staged while others are read": (
        "sm80/epilogue.cuh",
        "ptx::warp_sync();  // the lanes have read the rows staged before",
        "",
    ),
    "staged rows are read before they are complete": (
        "sm80/epilogue.cuh",
        "ptx::warp_sync();  // all lanes' elements are in place",
        "",
    ),
    "the padding of K is not zero-filled": (
        "sm80/load.cuh",
        "count < 0 ? 0 : count > CHUNK ? CHUNK : count",
        "count > 0 ? CHUNK : 0",
    ),
}
MUTANT = Kernel(
    Sm80Config(16, warps_m=1, warps_n=2, warps_k=2, tile_k=64, stages=3, scale_weights=False),
    torch.float16,
    64,
)


@functools.cache
def sm80_mutant(mutation: str | None) -> Sm80Library:
    return Sm80Library([MUTANT], SM80_MUTATIONS[mutation] if mutation else None)


def mutant_outcomes(mutation: str | None) -> list[str]:
    """What goes wrong, in each of several runs."""
    wrong = []
    for m, n, k, blocks in ((17, 301, 333, 3), (33, 256, 640, 5), (15, 200, 448, 7)):
        p = problem(m, n, k, torch.float16, 64)
        for seed in range(6):
            verdict, out = run_sm80(sm80_mutant(mutation), MUTANT, p, blocks, seed)
            if verdict != "finished":
                wrong.append(verdict)
            elif not p.error(out) < TOLERANCE[torch.float16]:
                wrong.append("wrong result")
    return wrong


def test_sm80_unmutated_kernel_is_sound() -> None:
    assert mutant_outcomes(None) == []


@pytest.mark.parametrize("mutation", SM80_MUTATIONS)
def test_sm80_mutation_is_caught(mutation: str) -> None:
    assert mutant_outcomes(mutation)
