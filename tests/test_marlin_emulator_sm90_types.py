"""Every weight type on the sm_90a kernels' own text, executed on the CPU, against float64.

uint4b8 in all its configurations is in test_marlin_emulator_sm90.py.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from emulator.build import needs_emulator
from emulator.problem import TOLERANCE
from emulator.sm80 import DTYPES
from emulator.sm90 import Kernel, Sm90Library, TypedProblem

from marlin_kernel import WEIGHT_TYPES
from marlin_kernel.kernel_configs import DecodeConfig, GemmConfig, group_sizes
from marlin_kernel.validity import Combination, combinations

pytestmark = needs_emulator

# One and two token tiles, with and without a cluster; columns per block and blocks per column.
DECODE_CONFIGS = (
    DecodeConfig(token_tiles=1, warps_n=2, warps_k=2, split=1, stages=3, blocks_per_sm=1),
    DecodeConfig(token_tiles=2, warps_n=1, warps_k=2, split=2, stages=2, blocks_per_sm=1),
)
# One and two tiles of a stage and of a warpgroup, clusters and sums in global memory, scales on
# sums and on weights, two to four warpgroups.
GEMM_CONFIGS = (
    GemmConfig(16, 2, 3, 1, stage_tiles=2, scale_sums=True, split=2, cluster=True),
    GemmConfig(16, 1, 3, 1, stage_tiles=2, scale_sums=True),
    GemmConfig(64, 1, 2, 1, stage_tiles=2, scale_sums=False, split=2),
    GemmConfig(32, 1, 3, 1, stage_tiles=1, scale_sums=False, warpgroups=4),
    GemmConfig(32, 1, 3, 1, stage_tiles=2, scale_sums=False, warpgroups=3),
)
# M, N, K, multiprocessors
DECODE_SHAPES = ((1, 64, 64, 1), (8, 301, 333, 1), (5, 130, 448, 1), (15, 200, 192, 1))
GEMM_SHAPES = ((1, 64, 64, 1), (17, 301, 333, 3), (70, 200, 448, 2))
SEEDS = (0, 1)  # copies land late, or at once


def kernels(weight_type: str) -> list[Kernel]:
    """Every group size and 16-bit type of activations with every configuration that serves it."""
    return [
        Kernel(config, DTYPES[dtype], group_size, weight_type)
        for dtype in ("float16", "bfloat16")
        if dtype in WEIGHT_TYPES[weight_type].activations
        for group_size in group_sizes(weight_type)
        for config in (*DECODE_CONFIGS, *GEMM_CONFIGS)
        if config.fits(1, 64, group_size, weight_type)
    ]


@functools.cache
def library(weight_type: str, dtype: torch.dtype, group_size: int) -> Sm90Library:
    chosen = [k for k in kernels(weight_type) if (k.dtype, k.group_size) == (dtype, group_size)]
    return Sm90Library(chosen)


@functools.cache
def problem(c: Combination, m: int, n: int, k: int) -> TypedProblem:
    return TypedProblem(c, m, n, k)


def check(kernel: Kernel, c: Combination, shapes: tuple[tuple[int, int, int, int], ...]) -> int:
    """Run the shapes that the kernel serves; returns how many."""
    built = library(kernel.weight_type, kernel.dtype, kernel.group_size)
    ran = 0
    for m, n, k, sms in shapes:
        p = problem(c, m, n, k)
        k_tiles = p.weights.k_padded // 64
        if p.group_size != kernel.group_size or not kernel.config.fits(
            m, k_tiles, kernel.group_size, kernel.weight_type
        ):
            continue
        results = []
        for seed in SEEDS if m < 64 else SEEDS[:1]:
            verdict, out = p.run(built, kernel, sms, seed)
            assert verdict == "finished", f"M={m} N={n} K={k}, seed {seed}: {verdict}"
            assert p.error(out) < TOLERANCE[kernel.dtype], f"M={m} N={n} K={k}, seed {seed}"
            results.append(out)
        assert all(torch.equal(results[0], other) for other in results)
        ran += 1
    return ran


def name_of(kernel: Kernel) -> str:
    kind = type(kernel.config).__name__[:-6].lower()
    numbers = "-".join(str(int(v)) for v in vars(kernel.config).values())
    types = f"{kernel.weight_type}-{str(kernel.dtype)[6:]}-g{kernel.group_size}"
    return f"{types}-{kind}-{numbers}"


@pytest.mark.parametrize("kernel", [k for t in WEIGHT_TYPES for k in kernels(t)], ids=name_of)
def test_matches_float64(kernel: Kernel) -> None:
    dtype = str(kernel.dtype)[6:]
    c = Combination(WEIGHT_TYPES[kernel.weight_type], dtype, dtype, kernel.group_size)
    decode = isinstance(kernel.config, DecodeConfig)
    assert check(kernel, c, DECODE_SHAPES if decode else GEMM_SHAPES) >= 2


FAR = [
    k
    for name in ("float8_e4m3fn", "mxfp4", "nvfp4")
    for k in kernels(name)
    if k.dtype == torch.bfloat16 and isinstance(k.config, DecodeConfig)
]


@pytest.mark.parametrize("kernel", FAR, ids=name_of)
def test_activations_far_from_one(kernel: Kernel) -> None:
    """Small-batch kernels multiply BF16 activations by 2^80: values are as much too small."""
    c = Combination(WEIGHT_TYPES[kernel.weight_type], "bfloat16", "bfloat16", kernel.group_size)
    built = library(kernel.weight_type, kernel.dtype, kernel.group_size)
    p = TypedProblem(c, 5, 130, 448)
    p.bias.zero_()
    verdict, expected = p.run(built, kernel, 1, 0)
    assert verdict == "finished" and expected.isfinite().all()
    a = p.a.clone()
    for power in (2.0**40, 2.0**-40):
        p.a.copy_(a * power)
        assert torch.equal(p.run(built, kernel, 1, 0)[1], expected * power), power


@pytest.mark.parametrize("weight_type", ["uint4", "uint8", "nvfp4", "uint4_hqq"])
def test_one_group_is_repeated(weight_type: str) -> None:
    t = WEIGHT_TYPES[weight_type]
    one = -1 in t.group_sizes
    group_size = 128 if one else t.group_sizes[0]
    c = Combination(t, "float16", "float16", -1 if one else group_size)
    ran = 0
    for kernel in kernels(weight_type):
        if (kernel.dtype, kernel.group_size) == (torch.float16, group_size):
            shapes = ((3, 70, 12, 1), (2, 130, 200, 1))
            ran += check(kernel, c, shapes if one else shapes[:1])
    assert ran >= 3


ORDERED = [
    c
    for c in combinations("9.0", types=("uint4b8", "uint8b128"), activations=("float16",))
    if c.act_order and c.group_size in (32, 128) and c.reduction == "float32"
]


@pytest.mark.parametrize("c", ORDERED, ids=str)
def test_act_order(c: Combination) -> None:
    for kernel in kernels(c.weight_type.name):
        wanted = 32 if not c.k_full else c.group_size
        if (kernel.dtype, kernel.group_size) == (torch.float16, wanted):
            assert check(kernel, c, ((5, 130, 300, 2),)) == 1


GATHERING = (
    *(replace(config, gathers=True) for config in DECODE_CONFIGS),
    DecodeConfig(2, 2, 3, split=4, stages=2, blocks_per_sm=1, gathers=True),
)
# Without padding of K (bulk copies), and with: aligned rows, odd ones, an odd first address
GATHERED_SHAPES = (
    (3, 130, 448, 8),
    (8, 64, 64, 8),
    (5, 130, 333, 8),
    (4, 200, 328, 8),
    (2, 70, 448, 3),
)


@functools.cache
def gathering_library(weight_type: str, dtype: torch.dtype, group_size: int) -> Sm90Library:
    return Sm90Library([Kernel(c, dtype, group_size, weight_type) for c in GATHERING])


@functools.cache
def ordered_problem(c: Combination, m: int, n: int, k: int, shift: int) -> TypedProblem:
    return TypedProblem(c, m, n, k, shift)


@pytest.mark.parametrize("c", ORDERED, ids=str)
@pytest.mark.parametrize(
    "config", GATHERING, ids=lambda config: f"{config.token_tiles}-{config.split}"
)
def test_gathering_kernels(c: Combination, config: DecodeConfig) -> None:
    """The same bits as of the plain kernel on gathered activations."""
    weight_type, group_size = c.weight_type.name, 32 if not c.k_full else c.group_size
    types = (DTYPES[c.output], group_size, weight_type)
    built = gathering_library(weight_type, types[0], group_size)
    plain = Kernel(replace(config, gathers=False), *types)
    plain_built, ran = plain_library(plain), 0
    for m, n, k, shift in GATHERED_SHAPES:
        p = ordered_problem(c, m, n, k, shift)
        if p.group_size != group_size:
            continue
        verdict, expected = p.run(plain_built, plain, 1, 0)
        assert verdict == "finished"
        assert p.error(expected) < TOLERANCE[types[0]]
        for seed in (0, 1, 2):
            verdict, out = p.run(built, Kernel(config, *types), 1, seed)
            assert verdict == "finished", f"M={m} N={n} K={k}, seed {seed}: {verdict}"
            assert torch.equal(out, expected), f"M={m} N={n} K={k}, seed {seed}"
        ran += 1
    assert ran >= 4


@functools.cache
def plain_library(kernel: Kernel) -> Sm90Library:
    return Sm90Library([kernel])


# What a careless edit may break: (text, replacement). Each must be noticed.
GATHERING_MUTATIONS = {
    "rows are used before they have arrived": (
        "sm90/small_batch.cuh",
        "ptx::mbarrier_wait(&shared_.tokens_full[0], 0);",
        "",
    ),
    "a part of the index is missing": (
        "sm90/decode.cuh",
        "write_index(permutation);\n    ptx::warp_sync();",
        "",
    ),
    "no input is taken for the last one": (
        "sm90/decode.cuh",
        "row(token)[p_.k] = Element<Scalar>::from_float(0.f);",
        "",
    ),
}


@pytest.mark.parametrize("name", GATHERING_MUTATIONS)
def test_mutation_of_gathering_is_caught(name: str) -> None:
    kernel = Kernel(GATHERING[1], torch.float16, 128, "uint4b8")
    built = Sm90Library([kernel], GATHERING_MUTATIONS[name])
    c = next(
        c for c in ORDERED if c.k_full and c.group_size == 128 and c.weight_type.name == "uint4b8"
    )
    p = ordered_problem(c, 4, 200, 328, 8)
    outcomes = [p.run(built, kernel, 1, seed) for seed in range(6)]
    assert any(
        verdict != "finished" or not p.error(out) < TOLERANCE[torch.float16]
        for verdict, out in outcomes
    )
