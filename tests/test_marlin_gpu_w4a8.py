"""8-bit activations on a Hopper GPU (csrc/sm90_8bit), against float64 and exact integers."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from marlin_kernel import WEIGHT_TYPES, Layer, QuantizedLinear, compiler, formats, reference
from marlin_kernel.sm80_layout import kernel_activations
from marlin_kernel.sm90_8bit_configs import (
    TYPES,
    EightBitConfig,
    EightBitTypes,
    select_config,
    supported_configs,
)
from marlin_kernel.sm90_8bit_layout import Records, records, stored_tensors, types_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]
if torch.cuda.is_available():
    from marlin_kernel import sm80_path, sm90_8bit_path

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
LAYOUTS = {"int8": "sm90_int8", "float8_e4m3fn": "sm90_fp8"}
ALL_TYPES = [
    EightBitTypes(name, activation, output, max(0, group_size))
    for name, activations in TYPES.items()
    for activation in activations
    for output in ("float16", "bfloat16")
    for group_size in WEIGHT_TYPES[name].group_sizes
]
TOKENS = (1, 8, 17, 64, 130, 300, 1024)
SIZES = ((1088, 576), (333, 301))
# Error allowed beside rounding of the output, relative to the norm. Sums of e4m3 products keep 14
# bits (2**-13 of the largest addend is cut) for four instructions, then go to float32.
RATIO = 1.1
FP8_SUMS = 4 * 2.0**-13


@dataclass(frozen=True)
class Weights:
    """A random layer as the kernel takes it, and in float64."""

    types: EightBitTypes
    held: Records
    exact: Tensor
    bias: Tensor

    def operands(self, a: Tensor) -> tuple[Tensor, Tensor]:
        k_padded = -(-a.shape[1] // 16) * 16
        return sm80_path.quantize_activations(a, DTYPES[self.types.activation], k_padded)

    def run(self, a: Tensor, config: EightBitConfig | None = None, invariant: bool = False):
        """Multiply into a poisoned output, and look at what surrounds it."""
        m, n = a.shape[0], self.exact.shape[1]
        buffer = torch.full((m + 2, n), float("nan"), device="cuda", dtype=self.bias.dtype)
        out = buffer[1 : m + 1]
        codes, scales = self.operands(a)
        arguments = codes, scales, self.held.weights, self.held.scales, self.bias, out
        if config is None:
            sm90_8bit_path.gemm(*arguments, self.types, invariant)
        else:
            sm90_8bit_path.launch_config(config, self.types, *arguments)
        assert buffer[0].isnan().all() and buffer[-1].isnan().all()
        return out

    def error(self, a: Tensor, out: Tensor) -> tuple[float, float]:
        """Error of `out`, and the error allowed, relative to the norm."""
        codes, scales = reference.quantize_activations(a, DTYPES[self.types.activation])
        expected = (codes.double() * scales.double()[:, None]) @ self.exact + self.bias.double()
        norm = expected.norm()
        allowed = RATIO * float((expected.to(out.dtype).double() - expected).norm() / norm)
        if out.numel() < 4096:  # too few elements for a statement about the average
            allowed += torch.finfo(out.dtype).eps
        if self.types.activation == "float8_e4m3fn":
            allowed += FP8_SUMS
        return float((out.double() - expected).norm() / norm), allowed

    def check(self, a: Tensor, out: Tensor, what: object = "") -> None:
        error, allowed = self.error(a, out)
        assert error <= allowed, (what, error, allowed)


@functools.cache
def weights(types: EightBitTypes, k: int, n: int) -> Weights:
    generator = torch.Generator().manual_seed(k * n)
    weight = torch.randn(k, n, generator=generator) / k**0.5
    layer = QuantizedLinear.quantize(
        weight, WEIGHT_TYPES[types.weight_type], types.group_size or -1
    ).to("cuda")
    held = records(formats.write(layer, "marlin"), layer.spec, types.activation)
    bias = torch.randn(n, generator=generator).to("cuda", DTYPES[types.output])
    return Weights(types, held, layer.dequantize(torch.float64), bias)


def activations(m: int, k: int, types: EightBitTypes) -> Tensor:
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, k, generator=generator).to("cuda", DTYPES[types.output])


def name_of(value: object) -> str:
    if isinstance(value, EightBitTypes):
        return f"{value.weight_type}-{value.activation}-{value.output}-g{value.group_size}"
    return str(value)


# Types of which every configuration runs.
EVERY_CONFIG = [
    EightBitTypes("uint4b8", "int8", "float16", 0),
    EightBitTypes("uint4b8", "int8", "float16", 128),
    EightBitTypes("uint4", "int8", "float16", 64),
    EightBitTypes("uint8b128", "int8", "bfloat16", 0),
    EightBitTypes("uint4b8", "float8_e4m3fn", "float16", 0),
    EightBitTypes("float8_e4m3fn", "float8_e4m3fn", "bfloat16", 128),
]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Everything below, compiled in parallel."""
    sources = {}
    for types in EVERY_CONFIG:
        sources |= dict.fromkeys(config.source(types) for config in supported_configs(types))
    for types in ALL_TYPES:
        for k, n in (*SIZES, (4096, 512), (2048, 1024)):
            for m in TOKENS:
                for invariant in (False, True):
                    sources[
                        select_config(m, n, -(-k // 16) * 16, types, invariant).source(types)
                    ] = 0
    for _, cubin in compiler.compile_all(
        [(source, "sm_90a") for source in sources], os.cpu_count() or 1
    ):
        assert not isinstance(cubin, Exception), cubin


@pytest.mark.parametrize("types", ALL_TYPES, ids=name_of)
def test_every_combination(types: EightBitTypes) -> None:
    for k, n in SIZES:
        for m in TOKENS:
            a = activations(m, k, types)
            w = weights(types, k, n)
            w.check(a, w.run(a), f"M={m} N={n} K={k}")


@pytest.mark.parametrize("types", EVERY_CONFIG, ids=name_of)
def test_every_configuration(types: EightBitTypes) -> None:
    for k, n in ((2048, 1024), (1104, 328)):
        w = weights(types, k, n)
        for config in supported_configs(types):
            for m in (3, 530):
                a = activations(m, k, types)
                out = w.run(a, config)
                w.check(a, out, f"{config} M={m} N={n} K={k}")
                assert torch.equal(out, w.run(a, config)), f"{config} M={m} N={n} K={k}"


@pytest.mark.parametrize("name", ["uint4b8", "uint4", "uint8b128"])
@pytest.mark.parametrize("m", TOKENS)
def test_integer_sums_are_exact(name: str, m: int) -> None:
    """Scales of one leave the integer sums, small enough for 16 bits."""
    wtype = WEIGHT_TYPES[name]
    types = EightBitTypes(name, "int8", "float16", 0)
    generator = torch.Generator().manual_seed(m)
    k, n = 640, 264
    low, high = (0, 16) if wtype.bits == 4 else (120, 136)
    codes = torch.randint(low, high, (k, n), generator=generator, dtype=torch.uint8)
    zeros, zero = None, torch.full((1, n), wtype.midpoint)
    if not wtype.symmetric:
        zeros = zero = torch.randint(4, 12, (1, n), generator=generator, dtype=torch.uint8)
    layer = QuantizedLinear.of(codes, torch.ones(1, n), wtype, -1, zeros=zeros)
    held = records(formats.write(layer.to("cuda"), "marlin"), layer.spec, "int8")
    a = torch.randint(-1, 2, (m, k), generator=generator, dtype=torch.int8)
    expected = a.double() @ (codes.double() - zero.double())
    assert expected.abs().max() < 2048
    operand = kernel_activations(a, k).cuda()
    for config in supported_configs(types):
        if config.fits(types, -(-k // 128)):
            out = torch.full((m, n), float("nan"), device="cuda", dtype=torch.float16)
            ones = torch.ones(m, device="cuda")
            sm90_8bit_path.launch_config(config, types, operand, ones, *_pair(held), None, out)
            assert torch.equal(out.double().cpu(), expected), config


def _pair(held: Records) -> tuple[Tensor, Tensor]:
    return held.weights, held.scales


@pytest.mark.parametrize("types", ALL_TYPES[::3], ids=name_of)
def test_repeated_calls_are_equal(types: EightBitTypes) -> None:
    w = weights(types, 4096, 512)
    for m in (1, 17, 300):
        a = activations(m, 4096, types)
        first = w.run(a)
        for _ in range(30):
            assert torch.equal(first, w.run(a)), m


@pytest.mark.parametrize("types", ALL_TYPES[1::3], ids=name_of)
def test_batch_invariance(types: EightBitTypes) -> None:
    w = weights(types, 2048, 1024)
    a = activations(1024, 2048, types)
    whole = w.run(a, invariant=True)
    for m in TOKENS:
        assert torch.equal(whole[:m], w.run(a[:m], invariant=True)), m


@pytest.mark.parametrize("types", EVERY_CONFIG, ids=name_of)
def test_layouts_come_back_on_the_gpu(types: EightBitTypes) -> None:
    wtype = WEIGHT_TYPES[types.weight_type]
    layer = QuantizedLinear.quantize(torch.randn(600, 200), wtype, types.group_size or -1)
    on_cpu = records(formats.write(layer, "marlin"), layer.spec, types.activation)
    tensors = formats.write(layer.to("cuda"), "marlin")
    held = records(tensors, layer.spec, types.activation)
    assert types_of(layer.spec, types.activation, types.output) == types
    assert torch.equal(held.weights.cpu(), on_cpu.weights)
    assert torch.equal(held.scales.cpu(), on_cpu.scales)
    for suffix, tensor in stored_tensors(held, layer.spec, types.activation).items():
        assert torch.equal(tensor.view(torch.uint8), tensors[suffix].view(torch.uint8)), suffix


@pytest.mark.parametrize("activation", LAYOUTS)
def test_layer_reads_what_its_predecessor_wrote(activation, monkeypatch) -> None:
    """Layers one after another, alone and in a graph: no kernel starts on old activations."""
    monkeypatch.setenv("MARLIN_KERNEL_BACKEND", LAYOUTS[activation])
    wtype = WEIGHT_TYPES["uint4b8"]
    layers = []
    for seed in range(4):
        torch.manual_seed(seed)
        layer = QuantizedLinear.quantize(torch.randn(1024, 1024) / 32, wtype, 128)
        layers.append(Layer.from_quantized(layer).cuda())
        layers[-1].activation = activation
        layers[-1].prepare()
        assert layers[-1].layout == LAYOUTS[activation]

    def chain(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    def expected(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
            torch.cuda.synchronize()
        return x

    for m in (1, 33, 300):
        inputs = [torch.randn(m, 1024, device="cuda").half() for _ in range(5)]
        wanted = [expected(x) for x in inputs]
        assert all(torch.equal(chain(x), y) for x, y in zip(inputs, wanted, strict=True))
        static = inputs[0].clone()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            chain(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = chain(static)
        for x, y in zip(inputs, wanted, strict=True):
            static.copy_(x)
            graph.replay()
            assert torch.equal(result, y)
