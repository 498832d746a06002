"""The sm_90a kernels' own text, executed on the CPU by tests/emulator, against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from emulator.build import needs_emulator
from emulator.problem import DTYPES, TOLERANCE, Problem, problem
from emulator.sm90 import Kernel, Sm90Library
from torch import Tensor

from marlin_kernel.kernel_configs import DecodeConfig, GemmConfig

pytestmark = needs_emulator

SEEDS = range(3)  # seed % 3: copies land late, at once, at random moments

# Every structural choice: splits of warps and clusters, one and two column tiles per warpgroup,
# short and long rings, scales on weights and on sums, with and without a feeding warpgroup.
DECODE_CONFIGS = (
    DecodeConfig(token_tiles=1, warps_n=2, warps_k=2, split=1, stages=3, blocks_per_sm=1),
    DecodeConfig(token_tiles=2, warps_n=2, warps_k=3, split=4, stages=4, blocks_per_sm=1),
    DecodeConfig(token_tiles=2, warps_n=1, warps_k=4, split=2, stages=2, blocks_per_sm=1),
)


GEMM_CONFIGS = (
    GemmConfig(32, 1, stages=3, blocks_per_sm=1, stage_tiles=1, scale_sums=True),
    GemmConfig(16, 2, 4, 1, stage_tiles=2, scale_sums=True, split=2, cluster=True),
    GemmConfig(16, 1, 3, 1, stage_tiles=2, scale_sums=True),
    GemmConfig(64, 1, 3, 1, stage_tiles=2, scale_sums=False, split=2),
    GemmConfig(64, 2, 2, 1, stage_tiles=1, scale_sums=False, split=3, tail=True),
    GemmConfig(16, 1, 3, 1, stage_tiles=1, scale_sums=True, split=0, tail=True),
    GemmConfig(32, 1, 3, 1, stage_tiles=2, scale_sums=False, split=0, tail=True),
    GemmConfig(32, 1, 3, 1, stage_tiles=2, scale_sums=False, split=2, warpgroups=4),
    GemmConfig(32, 1, 3, 1, stage_tiles=2, scale_sums=False, split=2, warpgroups=3),
    GemmConfig(16, 1, 4, 1, stage_tiles=1, scale_sums=True, split=2, cluster=True, warpgroups=3),
    GemmConfig(256, 1, 3, 1, stage_tiles=1, scale_sums=False),
)

# M, N, K, multiprocessors
DECODE_SHAPES = ((1, 64, 64, 1), (8, 301, 333, 1), (3, 200, 1088, 1), (15, 130, 448, 1))
GEMM_SHAPES = (
    *((1, 64, 64, 1), (17, 301, 333, 3), (65, 520, 448, 2), (130, 200, 320, 3)),
    (40, 301, 333, 5),  # the last tiles are fewer than multiprocessors
)


def kernels(dtype: torch.dtype) -> list[Kernel]:
    group_sizes = (-1, 32, 64, 128) if dtype == torch.float16 else (-1, 64)
    configs = (*DECODE_CONFIGS, *GEMM_CONFIGS)
    return [Kernel(config, dtype, g) for config in configs for g in group_sizes]


@functools.cache
def library(dtype: torch.dtype, kind: type, group_size: int) -> Sm90Library:
    """Built in parts: a part takes a compiler several seconds."""
    chosen = [
        k for k in kernels(dtype) if isinstance(k.config, kind) and k.group_size == group_size
    ]
    return Sm90Library(chosen)


def run(built: Sm90Library, kernel: Kernel, p: Problem, sms: int, seed: int) -> tuple[str, Tensor]:
    """One launch into a poisoned output with guard rows. Returns the emulator's verdict and C."""
    m, n = p.expected.shape
    buffer = torch.full((m + 2, n), float("nan"), dtype=p.a.dtype)
    out = buffer[1 : m + 1]
    w = p.weights
    sizes = (w.k_padded, w.n_padded, sms, seed)
    verdict = built.run(kernel, p.a, w.weights, w.scales, p.bias, out, *sizes)
    if not (buffer[0].isnan().all() and buffer[-1].isnan().all()):
        verdict = "wrote outside of the output"
    return verdict, out


def name_of(value: object) -> str:
    if isinstance(value, Kernel):
        kind = type(value.config).__name__[:-6].lower()
        numbers = "-".join(str(int(v)) for v in vars(value.config).values())
        return f"{kind}-{numbers}-{str(value.dtype)[6:]}-g{value.group_size}"
    return str(value)


@pytest.mark.parametrize("kernel", [k for dtype in DTYPES for k in kernels(dtype)], ids=name_of)
def test_matches_float64(kernel: Kernel) -> None:
    config = kernel.config
    built = library(kernel.dtype, type(config), kernel.group_size)
    ran = 0
    for m, n, k, sms in DECODE_SHAPES if isinstance(config, DecodeConfig) else GEMM_SHAPES:
        p = problem(m, n, k, kernel.dtype, kernel.group_size)
        if p.grouped != (kernel.group_size > 0) or not config.fits(
            m, p.weights.k_padded // 64, kernel.group_size
        ):
            continue
        results = []
        for seed in SEEDS:
            verdict, out = run(built, kernel, p, sms, seed)
            assert verdict == "finished", f"M={m} N={n} K={k}, seed {seed}: {verdict}"
            assert p.error(out) < TOLERANCE[kernel.dtype], f"M={m} N={n} K={k}, seed {seed}"
            results.append(out)
        assert all(torch.equal(results[0], other) for other in results)
        ran += 1
    assert ran >= 2


def test_bf16_weights_from_subnormals_are_the_same() -> None:
    """Against the specialisation of kernels that scale sums: both are exact before the scale."""
    kernel = Kernel(GemmConfig(32, 1, 3, 1, 1, scale_sums=False), torch.bfloat16, 64)
    plain = (
        "sm90/gemm.cuh",
        "dequant::Operand<Weight, Scalar, Config::SCALE_WEIGHTS>",
        "dequant::Operand<Weight, Scalar>",
    )
    p = problem(17, 301, 333, kernel.dtype, 64)
    runs = [run(Sm90Library([kernel], edit), kernel, p, 3, 0) for edit in (None, plain)]
    assert [verdict for verdict, _ in runs] == ["finished"] * 2
    assert torch.equal(runs[0][1], runs[1][1])


def test_rows_of_large_tiles_are_written_in_turns() -> None:
    """Without a barrier behind them a turn's rows are overwritten by those of the next."""
    kernel = Kernel(GemmConfig(128, 2, 2, 1, 1, scale_sums=False), torch.float16, 64)
    copied = "threadIdx.x % kWarpgroupThreads);"
    behind = f"{copied}\n      ptx::named_sync(1 + group_, kWarpgroupThreads);"
    careless = ("sm90/gemm.cuh", behind, copied)
    p = problem(130, 301, 192, kernel.dtype, 64)
    for edit in (None, careless):
        built = Sm90Library([kernel], edit)
        runs = [run(built, kernel, p, 3, seed) for seed in range(6)]
        right = [v == "finished" and p.error(c) < TOLERANCE[torch.float16] for v, c in runs]
        assert all(right) if edit is None else not all(right)


MUTANTS = (
    Kernel(
        DecodeConfig(token_tiles=2, warps_n=2, warps_k=2, split=2, stages=2, blocks_per_sm=1),
        torch.float16,
        64,
    ),
    Kernel(
        GemmConfig(16, 1, 3, 1, stage_tiles=1, scale_sums=True, split=3, tail=True),
        torch.float16,
        64,
    ),
    Kernel(
        GemmConfig(16, 1, 4, 1, stage_tiles=1, scale_sums=False, split=2, cluster=True),
        torch.float16,
        64,
    ),
    Kernel(
        GemmConfig(16, 1, 3, 1, stage_tiles=1, scale_sums=True, split=0, tail=True),
        torch.float16,
        64,
    ),
)
# What a careless edit may break: (header, text, replacement). Each must be noticed.
MUTATIONS = {
    "decode: weights are not waited for": (
        "sm90/decode.cuh",
        "ptx::mbarrier_wait(&shared_.full[warp_][Base::stage_], Base::parity_);",
        "",
    ),
    "decode: the phase of the ring is forgotten": ("sm90/small_batch.cuh", "parity_ ^= 1;", ""),
    "decode: activations are used before all have been written": (
        "sm90/small_batch.cuh",
        "ptx::mbarrier_wait(&shared_.tokens_full[warp_ / Config::WARPS_N], 0);",
        "",
    ),
    "decode: activations arrive at a barrier that is not initialised": (
        "sm90/small_batch.cuh",
        "ptx::block_sync();  // barriers of activations are initialised",
        "",
    ),
    "decode: sums of other warps are read early": (
        "sm90/small_batch.cuh",
        "    ptx::block_sync();\n    if constexpr (Config::SPLIT > 1)\n",
        "    if constexpr (Config::SPLIT > 1)\n",
    ),
    "decode: sums of other blocks are read early": (
        "sm90/small_batch.cuh",
        "      ptx::cluster_arrive();\n      ptx::cluster_wait();\n",
        "",
    ),
    "decode: sums of the next column overwrite those of this one": (
        "sm90/small_batch.cuh",
        "if constexpr (Config::SPLIT > 1) parity ^= 1;",
        "",
    ),
    "gemm: a stage is not waited for": (
        "sm90/gemm.cuh",
        "ptx::mbarrier_wait(&shared_.full[position_.stage], position_.parity);",
        "",
    ),
    "gemm: a stage is refilled before its release": (
        "sm90/gemm.cuh",
        "ptx::mbarrier_wait(&shared_.empty[position.stage], position.parity);",
        "",
    ),
    "gemm: a stage is never released": (
        "sm90/gemm.cuh",
        "if (lane_ == 0) ptx::mbarrier_arrive(&shared_.empty[stage]);",
        "",
    ),
    "gemm: products are used one step too early": (
        "sm90/gemm.cuh",
        "ptx::wgmma_wait<1>();",
        "ptx::wgmma_wait<2>();",
    ),
    "gemm: the last products are not waited for": ("sm90/gemm.cuh", "ptx::wgmma_wait<0>();", ""),
    "gemm: output rows are copied before they are complete": (
        "sm90/gemm.cuh",
        "ptx::named_sync(1 + group_, kWarpgroupThreads);\n"
        "      constexpr int kFeatures = Config::M_TILES",
        "constexpr int kFeatures = Config::M_TILES",
    ),
    "gemm: parts are added before the last has arrived": (
        "sm90/gemm.cuh",
        "const bool last = shared_.arrivals[group_] == p_.split - 1;",
        "const bool last = shared_.arrivals[group_] == p_.split - 2;",
    ),
    "gemm: the counter is not reset": (
        "sm90/gemm.cuh",
        "if (before == p_.split - 1) *counter = 0;",
        "",
    ),
    "gemm: a share of the last tiles ends before the next begins": (
        "sm90/gemm.cuh",
        "const int end = share_begin(blockIdx.x + 1, p);",
        "const int end = share_begin(blockIdx.x + 1, p) - (blockIdx.x == 0);",
    ),
    "gemm: a tile counts on a part that no block has": (
        "sm90/gemm.cuh",
        "((stage + 1u) * sharers(p) - 1)",
        "((stage + 2u) * sharers(p) - 1)",
    ),
    "gemm: stretches are added before they are there": (
        "sm90/gemm.cuh",
        "ptx::wait_for_count(counter, item.part);",
        "",
    ),
    "gemm: the counter of stretches is not reset": ("sm90/gemm.cuh", "      *counter = 0;\n", ""),
    "gemm: sums overwrite a ring that is still read": (
        "sm90/gemm.cuh",
        "ptx::named_sync(1, Config::CONSUMERS);",
        "",
    ),
    "gemm: sums of other blocks are read early": (
        "sm90/gemm.cuh",
        "    ptx::cluster_wait();\n    if (writes)",
        "    if (writes)",
    ),
    "gemm: a block ends while others read its sums": (
        "sm90/gemm.cuh",
        "    ptx::cluster_arrive();  // no block may end while others read its sums\n"
        "    ptx::cluster_wait();\n",
        "",
    ),
}


def mutant_outcomes(mutation: str | None) -> list[str]:
    """What goes wrong, in each of several runs."""
    name = mutation or ""
    chosen = [k for k in MUTANTS if type(k.config).__name__.lower().startswith(name.split(":")[0])]
    built = Sm90Library(chosen, MUTATIONS[name] if mutation else None)
    wrong = []
    for kernel in chosen:
        for m, n, k, sms in ((9, 200, 1088, 1), (16, 520, 700, 2), (16, 130, 640, 4)):
            p = problem(m, n, k, kernel.dtype, kernel.group_size)
            for seed in range(6):
                verdict, out = run(built, kernel, p, sms, seed)
                if verdict != "finished":
                    wrong.append(verdict)
                elif not p.error(out) < TOLERANCE[kernel.dtype]:
                    wrong.append("wrong result")
    return wrong


def test_unmutated_kernels_are_sound() -> None:
    assert mutant_outcomes(None) == []


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(mutation: str) -> None:
    assert mutant_outcomes(mutation)
