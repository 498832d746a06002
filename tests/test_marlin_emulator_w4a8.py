"""The sm_90a kernels for 8-bit activations: their text, executed on the CPU by tests/emulator."""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass, replace

import pytest
import torch
from emulator.build import needs_emulator
from emulator.sm90_8bit import EightBitLibrary
from torch import Tensor

from marlin_kernel import WEIGHT_TYPES, QuantizedLinear, formats, reference
from marlin_kernel.sm80_layout import kernel_activations
from marlin_kernel.sm90_8bit_configs import EightBitConfig, EightBitTypes
from marlin_kernel.sm90_8bit_layout import Records, records, types_of

pytestmark = needs_emulator

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
# Every structural choice: one, two and three warpgroups, tokens shared by a cluster, a split k
# range, one and several parts of the tokens.
FEW = EightBitConfig(tokens=8, warpgroups=2, multicast=1, split=1, stages=3, blocks_per_sm=1)
SPLIT = EightBitConfig(tokens=16, warpgroups=1, multicast=1, split=2, stages=3, blocks_per_sm=1)
SHARED = EightBitConfig(tokens=64, warpgroups=1, multicast=2, split=1, stages=3, blocks_per_sm=1)
PARTS = EightBitConfig(tokens=128, warpgroups=2, multicast=1, split=1, stages=3, blocks_per_sm=1)
LEAD = EightBitConfig(64, warpgroups=2, multicast=2, split=1, stages=4, blocks_per_sm=1, lead=1)
WIDE = EightBitConfig(tokens=64, warpgroups=3, multicast=1, split=3, stages=3, blocks_per_sm=1)
THREE = EightBitConfig(tokens=192, warpgroups=1, multicast=1, split=1, stages=3, blocks_per_sm=1)
# One set of sums: with turns, with a leading warpgroup, with one buffer of fragments, and that with
# two parts and a split k range.
TURNS = EightBitConfig(128, 2, 1, split=1, stages=3, blocks_per_sm=1, part=128, sets=1, turns=1)
ONE_SET = EightBitConfig(64, 2, 2, split=1, stages=4, blocks_per_sm=1, lead=1, part=32, sets=1)
ONE_BUFFER = EightBitConfig(192, 1, 1, split=1, stages=3, blocks_per_sm=1, part=192, sets=1)
TWO_PARTS = EightBitConfig(256, 1, 1, split=2, stages=3, blocks_per_sm=1, part=128, sets=1)
# weight type, activation, output, group size
KERNELS = [
    (FEW, EightBitTypes("uint4b8", "int8", "float16", 0)),
    (SPLIT, EightBitTypes("uint4b8", "int8", "bfloat16", 0)),
    (SHARED, EightBitTypes("uint4b8", "int8", "float16", 0)),
    (PARTS, EightBitTypes("uint4b8", "int8", "float16", 0)),
    (LEAD, EightBitTypes("uint4b8", "int8", "float16", 0)),
    (LEAD, EightBitTypes("uint4b8", "float8_e4m3fn", "float16", 128)),
    (WIDE, EightBitTypes("uint4b8", "int8", "float16", 0)),
    (WIDE, EightBitTypes("uint4b8", "int8", "bfloat16", 128)),
    (FEW, EightBitTypes("uint4b8", "int8", "float16", 128)),
    (SPLIT, EightBitTypes("uint4b8", "int8", "float16", 64)),
    (SHARED, EightBitTypes("uint4b8", "int8", "bfloat16", 32)),
    (PARTS, EightBitTypes("uint4b8", "int8", "float16", 128)),
    (THREE, EightBitTypes("uint4b8", "int8", "float16", 128)),
    (SPLIT, EightBitTypes("uint4", "int8", "float16", 0)),
    (SHARED, EightBitTypes("uint4", "int8", "float16", 0)),
    (FEW, EightBitTypes("uint4", "int8", "bfloat16", 64)),
    (SPLIT, EightBitTypes("uint4", "int8", "float16", 128)),
    (FEW, EightBitTypes("uint4", "int8", "float16", 32)),
    (SPLIT, EightBitTypes("uint8b128", "int8", "float16", 0)),
    (FEW, EightBitTypes("uint8b128", "int8", "float16", 128)),
    (SHARED, EightBitTypes("uint8b128", "int8", "float16", 32)),
    (FEW, EightBitTypes("uint4b8", "float8_e4m3fn", "float16", 0)),
    (SPLIT, EightBitTypes("uint4b8", "float8_e4m3fn", "bfloat16", 128)),
    (SHARED, EightBitTypes("uint4b8", "float8_e4m3fn", "float16", 64)),
    (THREE, EightBitTypes("uint4b8", "float8_e4m3fn", "float16", 0)),
    (SPLIT, EightBitTypes("float8_e4m3fn", "float8_e4m3fn", "float16", 0)),
    (FEW, EightBitTypes("float8_e4m3fn", "float8_e4m3fn", "bfloat16", 128)),
    (TURNS, EightBitTypes("uint4b8", "float8_e4m3fn", "float16", 128)),
    (ONE_SET, EightBitTypes("uint4b8", "float8_e4m3fn", "float16", 64)),
    (ONE_SET, EightBitTypes("float8_e4m3fn", "float8_e4m3fn", "float16", 128)),
    (ONE_BUFFER, EightBitTypes("uint4b8", "float8_e4m3fn", "bfloat16", 128)),
    (TWO_PARTS, EightBitTypes("uint4b8", "float8_e4m3fn", "float16", 128)),
    (ONE_BUFFER, EightBitTypes("float8_e4m3fn", "float8_e4m3fn", "float16", 0)),
]
# M, N, K, multiprocessors: one tile; padding; several tiles of a block and token tiles
SHAPES = ((1, 64, 256, 2), (17, 200, 336, 2), (70, 264, 640, 2))
# Relative to the norm: the rounding of the output.
TOLERANCE = {"float16": 4e-4, "bfloat16": 3e-3}


@dataclass(frozen=True)
class Problem:
    """Operands as the kernel takes them, and the exact result."""

    a: Tensor
    token_scales: Tensor
    held: Records
    bias: Tensor
    expected: Tensor  # float64


@functools.cache
def problem(types: EightBitTypes, m: int, n: int, k: int) -> Problem:
    generator = torch.Generator().manual_seed(m * 1009 + n * 31 + k)
    wtype = WEIGHT_TYPES[types.weight_type]
    weight = torch.randn(k, n, generator=generator) / k**0.5
    layer = QuantizedLinear.quantize(weight, wtype, types.group_size or -1)
    assert types_of(layer.spec, types.activation, types.output) == types
    a = torch.randn(m, k, generator=generator)
    codes, token_scales = reference.quantize_activations(a, DTYPES[types.activation])
    bias = torch.randn(n, generator=generator).to(DTYPES[types.output])
    exact = codes.double() * token_scales.double()[:, None]
    expected = exact @ layer.dequantize(torch.float64) + bias.double()
    held = records(formats.write(layer, "marlin"), layer.spec, types.activation)
    operand = kernel_activations(codes, -(-k // 16) * 16)
    return Problem(operand, token_scales, held, bias, expected)


def run(
    built: EightBitLibrary,
    config: EightBitConfig,
    types: EightBitTypes,
    p: Problem,
    multiprocessors: int,
    seed: int,
) -> tuple[str, Tensor]:
    """One launch into a poisoned output with guard rows. Returns the verdict and the output."""
    m, n = p.expected.shape
    buffer = torch.full((m + 2, n), float("nan"), dtype=p.bias.dtype)
    out = buffer[1 : m + 1]
    verdict = built.run(
        config, types, p.a, p.token_scales, p.held, p.bias, out, multiprocessors, seed
    )
    if not (buffer[0].isnan().all() and buffer[-1].isnan().all()):
        verdict = "wrote outside of the output"
    return verdict, out


@functools.cache
def library() -> EightBitLibrary:
    return EightBitLibrary(KERNELS)


def name_of(value: object) -> str:
    if isinstance(value, EightBitConfig):
        return "t{}w{}m{}s{}_{}_{}l{}p{}s{}t{}".format(*astuple(value))
    return f"{value.weight_type}-{value.activation}-{value.output}-g{value.group_size}"


@pytest.mark.parametrize("config, types", KERNELS, ids=name_of)
def test_matches_reference(config: EightBitConfig, types: EightBitTypes) -> None:
    for m, n, k, multiprocessors in SHAPES:
        p = problem(types, m, n, k)
        large = config.tokens > 64
        if (large and m < 64) or not config.fits(types, -(-k // 128)):
            continue
        # seed % 3: copies land late, at once, at random moments
        for seed in (0, 1, 2) if not large and m < 64 else (2,):
            case = f"M={m} N={n} K={k}, seed {seed}"
            verdict, out = run(library(), config, types, p, multiprocessors, seed)
            assert verdict == "finished", f"{case}: {verdict}"
            error = (out.double() - p.expected).norm() / p.expected.norm()
            assert error < TOLERANCE[types.output], f"{case}: {error}"


@pytest.mark.parametrize(
    "config, types",
    [
        kernel
        for kernel in KERNELS
        if not kernel[1].promote and kernel[1].output == "float16" and kernel[0].tokens <= 64
    ],
    ids=name_of,
)
def test_integer_sums_are_exact(config: EightBitConfig, types: EightBitTypes) -> None:
    """Scales of one leave the integer sums, small enough for 16 bits."""
    generator = torch.Generator().manual_seed(7)
    m, n, k = 9, 70, 512
    wtype = WEIGHT_TYPES[types.weight_type]
    low, high = (0, 16) if wtype.bits == 4 else (120, 136)
    codes = torch.randint(low, high, (k, n), generator=generator, dtype=torch.uint8)
    zeros = None
    zero = torch.full((1, n), 0 if wtype.bias is None else wtype.bias)
    if not wtype.symmetric:
        zeros = torch.randint(0, 16, (1, n), generator=generator, dtype=torch.uint8)
        zero = zeros
    layer = QuantizedLinear.of(codes, torch.ones(1, n), wtype, -1, zeros=zeros)
    held = records(formats.write(layer, "marlin"), layer.spec, types.activation)
    a = torch.randint(-1, 2, (m, k), generator=generator, dtype=torch.int8)
    expected = a.double() @ (codes.double() - zero.double())
    assert expected.abs().max() < 2048
    p = Problem(kernel_activations(a, k), torch.ones(m), held, torch.zeros(n).half(), expected)
    verdict, out = run(library(), config, types, p, 2, 0)
    assert verdict == "finished"
    assert torch.equal(out.double(), expected)


MUTATIONS = {
    "a stage is refilled before its release": (
        "ptx::mbarrier_wait(&shared_.empty[position.stage], position.parity);"
    ),
    "codes are read before they have arrived": (
        "ptx::mbarrier_wait(&shared_.full[position_.stage], position_.parity);"
    ),
    "the last products are not waited for": ("ptx::wgmma_wait<0>();  // the last move is complete"),
    "sums are moved on before they are complete": (
        "ptx::wgmma_wait<1>();  // the move before is complete"
    ),
    "a stage is released while it is multiplied": (
        "ptx::wgmma_wait<1>();  // the stage before is complete"
    ),
    "the one set of sums is moved on before it is complete": (
        "ptx::wgmma_wait<0>();  // this move is complete"
    ),
}


def outcomes(mutation: str | None) -> list[str]:
    """What goes wrong, in each of several runs."""
    change = None
    if mutation is not None:
        change = ("sm90_8bit/kernel.cuh", MUTATIONS[mutation], ";")
    kernels = [
        (FEW, EightBitTypes("uint4b8", "int8", "float16", 0)),
        (SPLIT, EightBitTypes("uint4b8", "int8", "float16", 64)),
        (replace(SPLIT, sets=1), EightBitTypes("uint4b8", "float8_e4m3fn", "float16", 128)),
    ]
    built = EightBitLibrary(kernels, change)
    wrong = []
    for config, types in kernels:
        p = problem(types, 33, 200, 1040)
        for seed in range(3):
            verdict, out = run(built, config, types, p, 2, seed)
            error = float((out.double() - p.expected).norm() / p.expected.norm())
            if verdict != "finished":
                wrong.append(verdict)
            elif not error < TOLERANCE[types.output]:
                wrong.append("wrong result")
    return wrong


def test_unmutated_kernel_is_sound() -> None:
    assert outcomes(None) == []


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(mutation: str) -> None:
    assert outcomes(mutation)
