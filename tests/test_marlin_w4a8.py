"""8-bit activations on Hopper, without a GPU: records and back, choice of kernels, their code."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from marlin_kernel import WEIGHT_TYPES, ConfigError, QuantizedLinear, backends, compiler, formats
from marlin_kernel.compiler import Cubin
from marlin_kernel.sm90_8bit_configs import (
    TUNING_DIRECTORY,
    TYPES,
    EightBitConfig,
    EightBitTypes,
    _tuned,
    select_config,
    supported_configs,
)
from marlin_kernel.sm90_8bit_layout import LARGEST_K, records, stored_tensors, types_of
from marlin_kernel.weight_types import WeightType
from tests.compiling import REGISTERS, needs_nvrtc, own_cache, sass  # noqa: F401 (fixture)

COMBINATIONS = [
    (WEIGHT_TYPES[name], activation, group_size)
    for name, activations in TYPES.items()
    for activation in activations
    for group_size in WEIGHT_TYPES[name].group_sizes
]


def all_types(output: str = "float16") -> list[EightBitTypes]:
    return [
        EightBitTypes(wtype.name, activation, output, max(0, group_size))
        for wtype, activation, group_size in COMBINATIONS
    ]


def layer_of(wtype: WeightType, group_size: int, k: int, n: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(k + n)
    return QuantizedLinear.quantize(torch.randn(k, n, generator=generator), wtype, group_size)


def name_of(value: object) -> str:
    return value.short if isinstance(value, WeightType) else str(value)


@pytest.mark.parametrize("wtype, activation, group_size", COMBINATIONS, ids=name_of)
@pytest.mark.parametrize("k, n", [(512, 128), (333, 301), (64, 64), (96, 40)])
def test_records_come_back(wtype, activation, group_size, k: int, n: int) -> None:
    layer = layer_of(wtype, group_size, k, n)
    tensors = formats.write(layer, "marlin")
    held = records(tensors, layer.spec, activation)
    types = types_of(layer.spec, activation)
    assert held.weights.shape == (-(-n // 64), -(-k // 128), types.record_bytes)
    again = stored_tensors(held, layer.spec, activation)
    assert again.keys() == tensors.keys()
    for suffix, tensor in tensors.items():
        assert torch.equal(again[suffix].view(torch.uint8), tensor.view(torch.uint8)), suffix
        assert again[suffix].dtype == tensor.dtype


def test_known_words() -> None:
    """Bytes of the comment in csrc/dequant/eight_bit_fragment.cuh, for codes of one lane."""
    codes = torch.full((128, 64), 8, dtype=torch.uint8)
    codes[0, 0], codes[1, 0], codes[8, 0], codes[9, 0] = 0, 15, 7, 9  # row g = 0: k 2t + 0, 1, 8, 9
    codes[0, 8], codes[9, 8] = 10, 5  # row g + 8
    layer = QuantizedLinear.of(codes, torch.ones(1, 64), WEIGHT_TYPES["uint4b8"], -1)
    tensors = formats.write(layer, "marlin")
    word = records(tensors, layer.spec, "int8").weights[0, 0, :4].tolist()
    # q - 8 in two's complement: 8, 7, 15, 1 in the lower nibbles; 2, 0, 0, 13 in the upper ones
    assert word == [0x28, 0x07, 0x0F, 0xD1]
    word = records(tensors, layer.spec, "float8_e4m3fn").weights[0, 0, :4].tolist()
    # row g: -8 = (1, 7), 7 = (0, 7), -1 = (1, 0), 1 = (0, 1); row g + 8: 2, 0, 0, -3 = (1, 2),
    # whose sign is bit 3 of the next byte
    assert word == [0x87 | 0x20 | 0x08, 0x07, 0x80, 0x01 | 0x20]
    decoded = [
        v if v < 128 else 128 - v
        for v in ((b & 0x87) + ((b & 0x80) >> 7) for b in word)  # as the kernel does, for row g
    ]
    assert decoded == [-8, 7, -1, 1]


def test_backends_convert_and_restore() -> None:
    for wtype, activation, group_size in COMBINATIONS:
        layout = {"int8": "sm90_int8", "float8_e4m3fn": "sm90_fp8"}[activation]
        layer = layer_of(wtype, group_size, 320, 72)
        tensors = formats.write(layer, "marlin")
        prepared = backends.prepare(layout, tensors, layer.spec, torch.float16)
        restored = backends.restore(prepared, layer.spec)
        assert restored.keys() == tensors.keys()
        assert torch.equal(restored["B"], tensors["B"])


def test_long_columns_are_refused() -> None:
    spec = formats.LayerSpec(2 * LARGEST_K, 64, WEIGHT_TYPES["uint4b8"], 2 * LARGEST_K)
    tensors = {
        "B": torch.zeros(2 * LARGEST_K // 16, 128, dtype=torch.int32),
        "s": torch.ones(1, 64, dtype=torch.float16),
    }
    with pytest.raises(ConfigError, match="exact in 32 bits"):
        records(tensors, spec, "int8")


# ---- choice ----


@pytest.mark.parametrize("types", all_types(), ids=str)
def test_every_size_has_a_kernel(types: EightBitTypes) -> None:
    supported = set(supported_configs(types))
    sizes = itertools.product((1, 8, 17, 64, 130, 1024, 8192), (64, 320, 57344), (64, 448, 28672))
    for m, n, k in sizes:
        config = select_config(m, n, k, types)
        assert config in supported and config.fits(types, -(-k // 128))
        config = select_config(m, n, k, types, batch_invariant=True)
        assert config.split == 1 or not types.promote


def test_few_tokens_take_small_tiles() -> None:
    types = EightBitTypes()
    tiles = [select_config(m, 8192, 8192, types).tokens for m in (1, 8, 16, 64, 256, 4096)]
    assert tiles[0] == 8 and tiles == sorted(tiles) and tiles[-1] >= 192


def test_tuned_rows_name_supported_configurations() -> None:
    known = {config for types in all_types() for config in supported_configs(types)}
    for path in TUNING_DIRECTORY.glob("*.json"):
        for choices in _tuned(path.stem).values():
            limits = [limit for limit, _ in choices]
            assert limits == sorted(limits)
            assert {config for _, config in choices} <= known


# ---- code ----


def check(config: EightBitConfig, types: EightBitTypes) -> Cubin:
    """Compile; assert that nothing spills and that the blocks that should share an SM can."""
    cubin = compiler.compile_kernel(config.source(types), "sm_90a")
    assert cubin.stack_bytes == 0, f"{config} {types} spills {cubin.stack_bytes} bytes"
    assert cubin.registers * config.threads * config.blocks_per_sm <= REGISTERS
    for code in ("C7510", "C7512", "C7513"):  # serialised wgmma
        assert code not in cubin.log, cubin.log
    return cubin


def shapes(types: EightBitTypes) -> list[EightBitConfig]:
    """Every shape once, whole and split."""
    found = {}
    for c in supported_configs(types):
        moves = c.part, c.sets, c.turns
        found.setdefault((c.tokens, c.warpgroups, c.multicast, c.split > 1, c.lead, *moves), c)
    return list(found.values())


@needs_nvrtc
@pytest.mark.parametrize("types", all_types(), ids=str)
def test_sampled_kernels_do_not_spill(types: EightBitTypes) -> None:
    turn = all_types().index(types)
    for config in shapes(types)[turn % 5 :: 5]:
        check(config, types)


@needs_nvrtc
@pytest.mark.exhaustive
@pytest.mark.parametrize("types", [*all_types(), *all_types("bfloat16")], ids=str)
def test_no_kernel_spills(types: EightBitTypes) -> None:
    work = [(config.source(types), "sm_90a") for config in shapes(types)]
    for i, cubin in compiler.compile_all(work, 2):
        assert not isinstance(cubin, Exception), cubin
        check(shapes(types)[i], types)


@needs_nvrtc
def test_tensor_cores_and_copies(tmp_path: Path) -> None:
    for types, instruction in (
        (EightBitTypes("uint4b8", "int8", "float16", 128), "IGMMA.64x32x32.S8.S8"),
        (EightBitTypes("uint4b8", "float8_e4m3fn", "float16", 0), "QGMMA.64x32x32.F32.E4M3.E4M3"),
    ):
        config = next(c for c in shapes(types) if c.tokens == 256)
        text = sass(check(config, types), tmp_path / "kernel.cubin")
        assert instruction in text
        assert "UTMALDG" in text and "UBLKCP" in text
        assert "LDL" not in text and "STL" not in text
