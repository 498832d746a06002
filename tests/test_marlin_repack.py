"""Packed codes of checkpoints to the Marlin layout: the packer, and the kernel's own text."""

from __future__ import annotations

import ctypes
import functools

import pytest
import torch
from emulator.build import build, needs_emulator
from torch import Tensor

from marlin_kernel import WEIGHT_TYPES, ConfigError, formats
from marlin_kernel.formats import QuantizedLinear
from marlin_kernel.layout import packed_shape
from marlin_kernel.packing import pack_awq, pack_rows, unpack_awq
from marlin_kernel.repack import SOURCES, arguments, repack, shared_bytes
from tests.cases import random_layer

KERNELS = [("gptq", 4), ("gptq", 8), ("awq", 4), ("compressed-tensors", 4)]
KERNELS.append(("compressed-tensors", 8))
SHAPES = ((64, 64), (256, 192), (160, 72), (104, 8))
SYMMETRIC = {4: WEIGHT_TYPES["uint4b8"], 8: WEIGHT_TYPES["uint8b128"]}
ASYMMETRIC = {4: WEIGHT_TYPES["uint4"], 8: WEIGHT_TYPES["uint8"]}


def source_words(codes: Tensor, source: str, bits: int) -> Tensor:
    if source == "gptq":
        return pack_rows(codes.T, bits).T.contiguous()
    return pack_awq(codes) if source == "awq" else pack_rows(codes.T, bits)


def problem(
    source: str, bits: int, k: int, n: int, *, symmetric: bool, act_order: bool
) -> tuple[QuantizedLinear, dict]:
    """A layer, and the arguments of `repack` that must lead to its `B`."""
    wtype = (SYMMETRIC if symmetric else ASYMMETRIC)[bits]
    layer = random_layer(k, n, wtype, 32, act_order=act_order)
    perm = None if layer.g_idx is None else torch.argsort(layer.g_idx, stable=True)
    return layer, {
        "words": source_words(layer.codes, source, bits),
        "source": source,
        "wtype": wtype,
        "shape": packed_shape(k, n, layer.group_size),
        "perm": perm,
        "zeros": layer.zeros,
    }


VARIANTS = [(True, False), (True, True), (False, False)]  # symmetric, act-order


@pytest.mark.parametrize(("symmetric", "act_order"), VARIANTS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize(("source", "bits"), KERNELS)
def test_repack_equals_the_packer(source, bits, k, n, symmetric, act_order) -> None:
    act_order = act_order and source != "awq"
    layer, args = problem(source, bits, k, n, symmetric=symmetric, act_order=act_order)
    assert torch.equal(repack(**args), formats.write(layer, "marlin")["B"])


@functools.cache
def library() -> ctypes.CDLL:
    return build("run_repack.cpp", {})


@needs_emulator
@pytest.mark.parametrize(("source", "bits"), KERNELS)
def test_the_kernel_equals_the_packer(source, bits) -> None:
    number = KERNELS.index((source, bits))
    assert library().shared_bytes(number) == shared_bytes(source, bits)
    for symmetric, act_order in VARIANTS:
        for k, n in SHAPES:
            act_order = act_order and source != "awq"
            layer, args = problem(source, bits, k, n, symmetric=symmetric, act_order=act_order)
            expected = formats.write(layer, "marlin")["B"]
            out = torch.full_like(expected, -1)
            perm = None if args["perm"] is None else args["perm"].int()
            block = arguments(args["words"], out, args["wtype"], args["shape"], perm, layer.zeros)
            for seed, grid in ((0, 1), (1, 2), (2, 7)):
                out.fill_(-1)
                assert library().run_repack(number, ctypes.c_uint(seed), grid, block) == 0
                assert torch.equal(out, expected), (k, n, symmetric, act_order)


@pytest.mark.gpu
@pytest.mark.parametrize(("symmetric", "act_order"), VARIANTS)
@pytest.mark.parametrize(("source", "bits"), KERNELS)
def test_repack_on_the_gpu_equals_the_packer(source, bits, symmetric, act_order) -> None:
    act_order = act_order and source != "awq"
    for k, n in (*SHAPES, (2048, 1088)):
        layer, args = problem(source, bits, k, n, symmetric=symmetric, act_order=act_order)
        expected = formats.write(layer, "marlin")["B"]
        moved = {x: t.cuda() if isinstance(t, Tensor) else t for x, t in args.items()}
        assert torch.equal(repack(**moved).cpu(), expected)


def test_awq_words() -> None:
    assert pack_awq(torch.arange(8)[None]).item() == 0x75316420
    values = torch.randint(0, 16, (5, 24), dtype=torch.uint8)
    assert torch.equal(unpack_awq(pack_awq(values)), values)


def test_what_does_not_fit_is_named() -> None:
    _, args = problem("gptq", 4, 64, 64, symmetric=True, act_order=False)
    with pytest.raises(ConfigError, match="source='marlin' is not one of gptq, awq"):
        repack(**(args | {"source": "marlin"}))
    with pytest.raises(ConfigError, match=r"words are torch.int32 \[8, 64\]; awq packs 64 inputs"):
        repack(**(args | {"source": "awq"}))
    with pytest.raises(ConfigError, match=r"perm has shape \[3\], expected \[64\]"):
        repack(**(args | {"perm": torch.arange(3)}))
    with pytest.raises(ConfigError, match="AWQ checkpoints do not have"):
        repack(**(args | {"source": "awq", "perm": torch.arange(64)}))
    with pytest.raises(ConfigError, match="AWQ packs 4 bits, not the 8 of uint8"):
        repack(**(args | {"source": "awq", "wtype": WEIGHT_TYPES["uint8"]}))
    assert set(SOURCES) == {source for source, _ in KERNELS}
