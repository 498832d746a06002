"""The scaled GEMM kernels' own text, executed on the CPU by tests/emulator."""

from __future__ import annotations

import functools

import pytest
import torch
from emulator.build import needs_emulator
from emulator.scaled import ScaledLibrary
from emulator.sparse import SparseLibrary
from torch import Tensor

from marlin_kernel import sparse_format, sparse_marlin
from marlin_kernel.formats import QuantizedLinear
from marlin_kernel.scaled_configs import ScaledConfig
from marlin_kernel.scaled_mm import _aligned, reference
from marlin_kernel.sparse import compress_2_4, prune_2_4
from marlin_kernel.sparse_configs import AnyConfig, SparseConfig, SparseDecodeConfig
from marlin_kernel.sparse_sm80 import Sm80SparseConfig
from marlin_kernel.weight_types import weight_type

pytestmark = needs_emulator

SEEDS = range(3)  # seed % 3: copies land late, at once, at random moments
# Every structural choice: one and two warpgroups, tokens shared by a cluster, a split k range.
CONFIGS = (
    ScaledConfig(tokens=16, groups=2, multicast=1, split=1, stages=3, blocks_per_sm=1),
    ScaledConfig(tokens=16, groups=2, multicast=1, split=2, stages=2, blocks_per_sm=1),
    ScaledConfig(tokens=64, groups=1, multicast=2, split=1, stages=2, blocks_per_sm=1),
    ScaledConfig(tokens=128, groups=2, multicast=2, split=1, stages=3, blocks_per_sm=1),
)
# M, N, K, multiprocessors
SHAPES = ((1, 64, 128, 2), (17, 200, 336, 2), (130, 264, 272, 4))
FP8, INT8 = torch.float8_e4m3fn, torch.int8
VARIANTS = ((FP8, torch.bfloat16), (INT8, torch.float16))


def configs(sparse: bool) -> tuple[ScaledConfig, ...]:
    """Dense weights differ in their copies and steps only."""
    return CONFIGS if sparse else CONFIGS[1:3]


@functools.cache
def library(sparse: bool) -> ScaledLibrary:
    return ScaledLibrary([(c, *v, sparse) for c in configs(sparse) for v in VARIANTS])


def problem(m: int, n: int, k: int, dtype: torch.dtype, sparse: bool, exact: bool = False):
    """a [M, K], dense weight [N, K], per-token and per-feature scales.

    exact: small integers and unit scales, so that results are exact in 16 bits.
    """
    generator = torch.Generator().manual_seed(m * n + k)
    if dtype == INT8:
        bound = 2 if exact else 128
        a, w = (
            torch.randint(-bound, bound, shape, generator=generator).float()
            for shape in ((m, k), (n, k))
        )
    else:
        a, w = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k)))
    if sparse:
        w = prune_2_4(w)
    scale_a = torch.rand(m, generator=generator) + 0.5 if not exact else torch.ones(1)
    scale_b = (torch.rand(n, generator=generator) + 0.5) / 64 if not exact else torch.ones(1)
    return a.to(dtype), w.to(dtype), scale_a, scale_b


def run(
    built: ScaledLibrary,
    config: ScaledConfig,
    a: Tensor,
    w: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    sparse: bool,
    sms: int,
    seed: int,
) -> tuple[str, Tensor]:
    """One launch into a poisoned output with guard rows. Returns the verdict and the output."""
    m, n = a.shape[0], w.shape[0]
    values, meta = compress_2_4(w) if sparse else (w, None)
    buffer = torch.full((m + 2, n), float("nan"), dtype=out_dtype)
    out = buffer[1 : m + 1]
    arguments = _aligned(a), _aligned(values), meta, scale_a, scale_b, bias, out
    verdict = built.run(config, *arguments, sms, seed)
    if not (buffer[0].isnan().all() and buffer[-1].isnan().all()):
        verdict = "wrote outside of the output"
    return verdict, out


@pytest.mark.parametrize("dtype, out_dtype", VARIANTS, ids=["fp8", "int8"])
@pytest.mark.parametrize(
    "config, sparse", [(c, sparse) for sparse in (True, False) for c in configs(sparse)], ids=str
)
def test_matches_reference(
    config: ScaledConfig, dtype: torch.dtype, out_dtype: torch.dtype, sparse: bool
) -> None:
    for m, n, k, sms in SHAPES:
        if not config.fits(-(-k // 128), sparse):
            continue
        a, w, scale_a, scale_b = problem(m, n, k, dtype, sparse)
        bias = torch.randn(n).to(out_dtype) if m > 1 else None
        expected = reference(a, w, scale_a, scale_b, out_dtype, bias)
        for seed in SEEDS if m < 64 else SEEDS[-1:]:  # large ones take long
            case = f"M={m} N={n} K={k}, seed {seed}"
            verdict, out = run(
                library(sparse), config, a, w, scale_a, scale_b, bias, out_dtype, sparse, sms, seed
            )
            assert verdict == "finished", f"{case}: {verdict}"
            if dtype == INT8:
                assert torch.equal(out, expected), case
            else:
                error = (out.float() - expected.float()).norm() / expected.float().norm()
                assert error < 2e-3, case


def test_integer_sums_are_exact() -> None:
    config = CONFIGS[1]  # with its k range split
    a, w, scale_a, scale_b = problem(9, 70, 512, INT8, True, exact=True)
    expected = (a.long() @ w.long().t()).to(torch.float16)
    verdict, out = run(
        library(True), config, a, w, scale_a, scale_b, None, torch.float16, True, 2, 0
    )
    assert verdict == "finished" and torch.equal(out, expected)


MUTATIONS = {
    "a stage is refilled before its release": (
        "ptx::mbarrier_wait(&shared_.empty[position.stage], position.parity);"
    ),
    "blocks of a cluster are not told of a release": (
        "ptx::mbarrier_arrive_remote(&shared_.empty[stage], lane_);"
    ),
    "the last products are not waited for": "ptx::wgmma_wait<0>();",
    "sums overwrite a ring that is still read": (
        "ptx::named_sync(1, Config::CONSUMERS);  // all warps have read the ring to its end"
    ),
    "sums of other blocks are read early": "ptx::cluster_wait();\n    if (n < p_.n)",
    "others' barriers are used before they exist": (
        "// others write here: their barriers must exist\n    ptx::cluster_arrive();\n"
        "    ptx::cluster_wait();"
    ),
}

IN_EPILOGUE = ("sums overwrite a ring that is still read", "sums of other blocks are read early")


def outcomes(mutation: str | None) -> list[str]:
    """What goes wrong, in each of several runs."""
    change = None
    if mutation is not None:
        text = MUTATIONS[mutation]
        left = "if (n < p_.n)" if text.endswith("if (n < p_.n)") else ";"
        header = "epilogue" if mutation in IN_EPILOGUE else "kernel"
        change = (f"scaled/{header}.cuh", text, left)
    chosen = CONFIGS[1], CONFIGS[2]
    built = ScaledLibrary([(c, INT8, torch.float16, True) for c in chosen], change)
    wrong = []
    for config in chosen:
        a, w, scale_a, scale_b = problem(33, 200, 1040, INT8, True)
        expected = reference(a, w, scale_a, scale_b, torch.float16, None)
        for seed in range(3):
            verdict, out = run(
                built, config, a, w, scale_a, scale_b, None, torch.float16, True, 2, seed
            )
            if verdict != "finished":
                wrong.append(verdict)
            elif not torch.equal(out, expected):
                wrong.append("wrong result")
    return wrong


def test_unmutated_kernel_is_sound() -> None:
    assert outcomes(None) == []


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(mutation: str) -> None:
    assert outcomes(mutation)


# ---- 2:4 Marlin ----

MARLIN_CONFIGS = (
    SparseConfig(tokens=8, groups=1, split=1, stages=3, blocks_per_sm=1),
    SparseConfig(tokens=16, groups=2, split=2, stages=2, blocks_per_sm=1),
    SparseConfig(tokens=64, groups=2, split=1, stages=2, blocks_per_sm=1),
)
DECODE_CONFIGS = (  # token_tiles, warps_n, warps_k, split, stages, blocks_per_sm
    SparseDecodeConfig(1, 1, 4, 1, 2, 1),
    SparseDecodeConfig(1, 2, 2, 2, 1, 1),
    SparseDecodeConfig(2, 1, 2, 4, 2, 1),
)
SM80_CONFIGS = (
    Sm80SparseConfig(tokens=8, k_parts=2, stages=3),
    Sm80SparseConfig(tokens=32, k_parts=2, stages=2),
)
MARLIN_SHAPES = ((1, 64, 128, 1), (17, 200, 300, 2), (70, 136, 512, 2))  # M, N, K, processors
DECODE_SHAPES = ((1, 64, 128, 1), (5, 200, 300, 2), (8, 136, 1664, 2), (15, 330, 640, 1))
MARLIN_TYPES = {4: "uint4b8", 8: "uint8b128"}
DTYPES = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 4e-3}


def marlin_kernels(bits: int) -> list[tuple[AnyConfig, torch.dtype, int, int]]:
    kernels = [
        (MARLIN_CONFIGS[1], torch.float16, bits, 128),
        (MARLIN_CONFIGS[1], torch.bfloat16, bits, -1),
    ]
    if bits == 4:
        kernels += [(c, torch.float16, bits, 128) for c in MARLIN_CONFIGS[::2]]
        kernels += [(c, torch.float16, bits, 128) for c in SM80_CONFIGS]
        kernels += [(SM80_CONFIGS[0], torch.bfloat16, bits, -1)]
        kernels += [(c, torch.float16, bits, 128) for c in DECODE_CONFIGS]
        kernels += [(DECODE_CONFIGS[1], torch.bfloat16, bits, -1)]
    else:
        kernels += [(c, torch.bfloat16, bits, 128) for c in DECODE_CONFIGS[:2]]
        kernels += [(DECODE_CONFIGS[2], torch.float16, bits, -1)]
        kernels += [(SM80_CONFIGS[1], torch.float16, bits, 128)]
    return kernels


@functools.cache
def marlin_library(bits: int) -> SparseLibrary:
    return SparseLibrary(marlin_kernels(bits))


def marlin_run(built: SparseLibrary, kernel, m: int, n: int, k: int, sms: int, seed: int):
    """One launch into a poisoned output. Returns the verdict and the relative error."""
    config, dtype, bits, group_size = kernel
    torch.manual_seed(m + n + k)
    w = prune_2_4(torch.randn(n, k)).t().contiguous()
    bias = torch.randn(n).to(dtype)
    wtype = weight_type(MARLIN_TYPES[bits])
    layer = QuantizedLinear.quantize(w, wtype, group_size, bias)
    stored = sparse_format.write(layer)
    weights, scales = sparse_marlin.device_weights(*stored.values(), group_size)
    a = torch.randn(m, k).to(dtype)
    if not isinstance(config, SparseDecodeConfig):  # which takes rows that start anywhere
        a = sparse_marlin._aligned(a)
    expected = a.double() @ layer.dequantize(torch.float64) + bias.double()
    out = torch.full((m, n), float("nan"), dtype=dtype)
    verdict = built.run(kernel, a, weights, scales, bias, out, sms, seed)
    return verdict, float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kernel", [k for bits in (4, 8) for k in marlin_kernels(bits)], ids=str)
def test_sparse_marlin_matches_float64(kernel) -> None:
    config, dtype, bits, group_size = kernel
    shapes = DECODE_SHAPES if isinstance(config, SparseDecodeConfig) else MARLIN_SHAPES
    for m, n, k, sms in shapes:
        size = m, -(-k // 128), bits, group_size
        if not isinstance(config, Sm80SparseConfig) and not config.fits(*size):
            continue
        for seed in SEEDS if m < 64 else SEEDS[-1:]:  # large ones take long
            verdict, error = marlin_run(marlin_library(bits), kernel, m, n, k, sms, seed)
            assert verdict == "finished", f"M={m} N={n} K={k}, seed {seed}: {verdict}"
            assert error < TOLERANCE[dtype], f"M={m} N={n} K={k}, seed {seed}"


MARLIN_MUTATIONS = {
    "a stage is refilled before its release": (
        "ptx::mbarrier_wait(&shared_.empty[position.stage], position.parity);"
    ),
    "the last products are not waited for": "ptx::wgmma_wait<0>();",
    "output rows are copied before they are complete": (
        "ptx::named_sync(1 + group_, kWarpgroupThreads);\n      common::copy_rows<"
    ),
}


SM80_MUTATIONS = {
    "sm_80: a stage is not waited for": "ptx::cp_async_wait<Config::STAGES - 2>();",
    "sm_80: a stage is refilled while it is read": (
        "ptx::named_sync(1 + part_, 128);  // stage i has arrived, stage i - 1 has been read"
    ),
    "sm_80: sums overwrite a ring that is still read": (
        "ptx::block_sync();  // all rings have been read: their place takes the sums"
    ),
}


DECODE_MUTATIONS = {
    "decode: a tile is not waited for": (
        "sparse/decode.cuh",
        "ptx::mbarrier_wait(&shared_.full[warp_][Base::stage_], Base::parity_);",
    ),
    "decode: activations are not waited for": (
        "sm90/small_batch.cuh",
        "ptx::mbarrier_wait(&shared_.tokens_full[warp_ / Config::WARPS_N], 0);",
    ),
}


def marlin_outcomes(mutation: str | None) -> list[str]:
    """What goes wrong, in each of several runs."""
    change = None
    kernels = [(c, torch.float16, 4, 128) for c in (*MARLIN_CONFIGS[:2], SM80_CONFIGS[0])]
    if mutation is None or mutation in DECODE_MUTATIONS:
        kernels += [(c, torch.float16, 4, 128) for c in DECODE_CONFIGS]
    if mutation in SM80_MUTATIONS:
        change = ("sparse/sm80.cuh", SM80_MUTATIONS[mutation], "")
        kernels = kernels[2:3]
    elif mutation in DECODE_MUTATIONS:
        header, text = DECODE_MUTATIONS[mutation]
        change = (header, text, "")
        kernels = kernels[3:]
    elif mutation is not None:
        text = MARLIN_MUTATIONS[mutation]
        change = ("sparse/kernel.cuh", text, "common::copy_rows<" if "copy_rows" in text else ";")
        kernels = kernels[:2]
    built = SparseLibrary(kernels, change)
    wrong = []
    for kernel in kernels:
        for seed in range(3):
            m = 7 if isinstance(kernel[0], SparseDecodeConfig) else 30
            verdict, error = marlin_run(built, kernel, m, 200, 1100, 2, seed)
            if verdict != "finished":
                wrong.append(verdict)
            elif not error < TOLERANCE[torch.float16]:
                wrong.append("wrong result")
    return wrong


def test_unmutated_sparse_marlin_is_sound() -> None:
    assert marlin_outcomes(None) == []


@pytest.mark.parametrize("mutation", [*MARLIN_MUTATIONS, *SM80_MUTATIONS, *DECODE_MUTATIONS])
def test_mutation_of_sparse_marlin_is_caught(mutation: str) -> None:
    assert marlin_outcomes(mutation)
