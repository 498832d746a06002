"""Act-order on the sm_90a kernels, on a Hopper GPU: gathering changes no bit of a product."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from marlin_kernel import WEIGHT_TYPES, QuantizedLinear, formats, kernel_configs
from marlin_kernel.kernel_configs import GemmConfig, KernelConfig
from marlin_kernel.sm80_layout import KernelTensors
from marlin_kernel.sm90_layout import kernel_tensors
from tests.test_marlin_gpu_sm90_types import compile_all


def _runs_here() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _runs_here(), reason="needs a Hopper GPU (compute capability 9.0)"),
]
if _runs_here():
    from marlin_kernel import launch

# (K, N, group size): whole tiles, padding of both (rows that a bulk copy takes, and not), fewer
# columns than blocks
SIZES = ((4096, 4096, 128), (1088, 576, 64), (333, 301, 32), (8192, 512, 128), (11008, 256, 128))
TOKENS = (1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 24, 31, 33, 64, 65, 100, 128, 130)
MANY_TOKENS = (300, 1024, 2049)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def in_order(config: KernelConfig) -> KernelConfig:
    """The same kernel for activations that are in the order of the weights."""
    if isinstance(config, GemmConfig):
        return replace(config, leaves_room=False)
    return replace(config, gathers=False)


class Ordered:
    """A random layer whose inputs belong to groups in random order."""

    def __init__(self, k: int, n: int, group_size: int, weight_type: str, dtype: str) -> None:
        generator = torch.Generator().manual_seed(k + n)
        weight = torch.randn(k, n, generator=generator) / k**0.5
        t = WEIGHT_TYPES[weight_type]
        plain = QuantizedLinear.quantize(weight, t, group_size)
        g_idx = torch.empty(k, dtype=torch.int32)
        g_idx[torch.randperm(k, generator=generator)] = (torch.arange(k) // group_size).int()
        layer = QuantizedLinear.of(plain.codes, plain.scales, t, group_size, g_idx=g_idx)
        layer = layer.to("cuda")
        self.exact = layer.dequantize(torch.float64)
        self.k, self.n, self.dtype, self.weight_type = k, n, dtype, weight_type
        self.held: KernelTensors = kernel_tensors(formats.write(layer, "marlin"), layer.spec)
        self.perm: Tensor = self.held.perm
        self.group_size = self.held.group_size or -1
        self.sizes = (self.held.k_padded, -(-n // 64) * 64, self.group_size)

    def gathered(self, a: Tensor) -> Tensor:
        return torch.where(self.perm >= 0, a[:, self.perm.clamp(min=0).long()], 0)

    def run(self, a: Tensor, perm: Tensor | None, config: KernelConfig | None = None) -> Tensor:
        """a: as `perm` wants it. Multiplies into the middle of a poisoned buffer."""
        m = a.shape[0]
        buffer = torch.full((m + 2, self.n), math.nan, device="cuda", dtype=a.dtype)
        operands = (a, self.held.weights, self.held.scales, None, buffer[1 : m + 1])
        typed = {"weight_type": self.weight_type, "perm": perm}
        if config is None:
            launch.gemm(*operands, a.shape[1], self.n, *self.sizes, **typed)
        else:
            launch.launch_config(config, *operands, a.shape[1], self.n, *self.sizes, **typed)
        assert buffer[0].isnan().all() and buffer[-1].isnan().all()
        return buffer[1 : m + 1]

    def chosen(self, m: int) -> KernelConfig:
        """What `launch.gemm` launches."""
        return kernel_configs.select_for_act_order(
            *(m, self.sizes[0] // 64, self.sizes[1] // 64, self.group_size),
            gpu=launch._gpu_key(0),
            multiprocessors=launch.multiprocessors(0),
            weight_type=self.weight_type,
            dtype=self.dtype,
        )

    def check(self, m: int, a: Tensor, config: KernelConfig | None = None) -> None:
        """The bits of the same kernel on gathered activations; near the float64 product."""
        used = config or self.chosen(m)
        expected = self.run(self.gathered(a), None, in_order(used))
        out = self.run(a, self.perm, config)
        assert torch.equal(out, expected), (m, used)
        exact = a.double() @ self.exact
        error = float((out.double() - exact).norm() / exact.norm())
        assert error < (1e-3 if self.dtype == "float16" else 8e-3), (m, used, error)


@functools.lru_cache(maxsize=8)
def ordered(
    k: int, n: int, group_size: int, weight_type: str = "uint4b8", dtype: str = "float16"
) -> Ordered:
    return Ordered(k, n, group_size, weight_type, dtype)


def activations(m: int, layer: Ordered, kind: str = "contiguous") -> Tensor:
    """Random. kind: contiguous; strided, in rows whose ends are NaN; odd, with an odd address."""
    k, dtype = layer.k, DTYPES[layer.dtype]
    generator = torch.Generator().manual_seed(m)
    values = torch.randn(m, k, generator=generator).to("cuda", dtype)
    if kind == "contiguous":
        return values
    stride, shift = (-(-k // 8) * 8 + 16, 0) if kind == "strided" else (k + 3, 1)
    buffer = torch.full((m * stride + shift,), math.nan, device="cuda", dtype=dtype)
    a = buffer[shift:].as_strided((m, k), (stride, 1))
    a.copy_(values)
    return a


def compile_for(layer: Ordered, tokens: tuple[int, ...]) -> None:
    sources = set()
    for m in tokens:
        config = layer.chosen(m)
        for c in (config, in_order(config)):
            sources.add(c.source(layer.dtype, layer.group_size, layer.weight_type))
    compile_all(sources)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_number_of_tokens(size: tuple[int, int, int]) -> None:
    layer = ordered(*size)
    compile_for(layer, TOKENS + MANY_TOKENS)
    for m in TOKENS + MANY_TOKENS:
        layer.check(m, activations(m, layer))


@pytest.mark.parametrize("kind", ["strided", "odd"])
@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_rows_of_any_place(size: tuple[int, int, int], kind: str) -> None:
    layer = ordered(*size)
    for m in (1, 4, 8, 16, 33, 130, 600):
        layer.check(m, activations(m, layer, kind))


@pytest.mark.parametrize(
    "weight_type, dtype",
    [("uint4b8", "float16"), ("uint4b8", "bfloat16"), ("uint8b128", "float16")],
)
def test_every_kernel_that_gathers(weight_type: str, dtype: str) -> None:
    layer = ordered(4096, 1024, 128, weight_type, dtype)
    configs = kernel_configs.gathering_configs(weight_type)
    configs = [c for c in configs if c.fits(1, 64, 128, weight_type)]
    sources = {c.source(dtype, 128, weight_type) for c in configs}
    sources |= {replace(c, gathers=False).source(dtype, 128, weight_type) for c in configs}
    compile_all(sources)
    for config in configs:
        for m in {1, 3, config.max_tokens}:
            if config.fits(m, 64, 128, weight_type):
                layer.check(m, activations(m, layer), config)


@pytest.mark.parametrize(
    "weight_type, dtype, group_size",
    [("uint4b8", "float16", 128), ("uint4b8", "bfloat16", 64), ("uint8b128", "float16", 32)],
)
def test_every_kernel_that_leaves_room(weight_type: str, dtype: str, group_size: int) -> None:
    layer = ordered(4096, 1024, group_size, weight_type, dtype)
    configs = map(kernel_configs.leaving_room, kernel_configs.supported_configs(weight_type))
    configs = [c for c in configs if isinstance(c, GemmConfig) and c.leaves_room]
    configs = [c for c in configs if c.fits(1, 64, group_size, weight_type)]
    every = [c for config in configs for c in (config, in_order(config))]
    compile_all({c.source(dtype, group_size, weight_type) for c in every})
    assert len(configs) > 20
    for config in configs:
        for m in (1, config.tokens, config.tokens + 3):
            layer.check(m, activations(m, layer), config)


def test_gathering_alone() -> None:
    for m, k, k_padded in (
        *((1, 300, 320), (7, 4096, 4096), (9, 4100, 4160), (16, 28672, 28672), (33, 11008, 11008)),
        *((64, 4104, 4160), (130, 8192, 8192), (300, 1088, 1152), (2000, 28672, 28672)),
    ):
        a = torch.randn(m, k + 8, device="cuda").half()[:, :k]
        perm = torch.randint(-1, k, (k_padded,), device="cuda").int()
        expected = torch.where(perm >= 0, a[:, perm.clamp(min=0).long()], 0)
        assert torch.equal(launch.gather(a, perm), expected)


@pytest.mark.parametrize("m", [1, 4, 16, 64, 300])
def test_chains_in_a_graph(m: int) -> None:
    """Every product reads what the one before wrote: nothing may start too early."""
    layer = ordered(4096, 4096, 128)
    a = activations(m, layer)

    def chain(x: Tensor) -> Tensor:
        for _ in range(12):
            x = layer.run(x, layer.perm)
        return x

    def slowly(x: Tensor) -> Tensor:
        config = layer.chosen(m)
        for _ in range(12):
            x = layer.run(layer.gathered(x), None, in_order(config))
            torch.cuda.synchronize()
        return x

    expected = [slowly(a * factor) for factor in (1, 2, 3)]
    static = a.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            chain_without_checks(layer, static)
    torch.cuda.synchronize()
    assert torch.equal(chain(static), expected[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain_without_checks(layer, static)
    for _ in range(20):
        for factor, wanted in zip((1, 2, 3), expected, strict=True):
            static.copy_(a * factor)
            graph.replay()
            assert torch.equal(out, wanted)


def chain_without_checks(layer: Ordered, x: Tensor) -> Tensor:
    for _ in range(12):
        out = x.new_empty(x.shape[0], layer.n)
        operands = (x, layer.held.weights, layer.held.scales, None, out)
        launch.gemm(*operands, x.shape[1], layer.n, *layer.sizes, perm=layer.perm)
        x = out
    return x


@pytest.mark.parametrize("m", [1, 8, 64])
def test_repeated_calls_are_bit_equal(m: int) -> None:
    layer = ordered(4096, 4096, 128)
    a = activations(m, layer)
    first = layer.run(a, layer.perm)
    for _ in range(300):
        assert torch.equal(layer.run(a, layer.perm), first)
