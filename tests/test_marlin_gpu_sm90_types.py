"""Every weight type on the sm_90a kernels, on a Hopper GPU, against float64.

uint4b8 in all its configurations is in test_marlin_gpu_sm90.py.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from emulator.sm80 import DTYPES, random_layer
from torch import Tensor

from marlin_kernel import WEIGHT_TYPES, QuantizedLinear, formats, kernel_configs
from marlin_kernel import Layer as PackedLayer
from marlin_kernel.compiler import compile_kernel
from marlin_kernel.kernel_configs import DecodeConfig, KernelConfig
from marlin_kernel.sm80_layout import KernelTensors
from marlin_kernel.sm90_layout import kernel_tensors, stored_tensors
from marlin_kernel.validity import Combination, combinations


def _runs_here() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _runs_here(), reason="needs a Hopper GPU (compute capability 9.0)"),
]
if _runs_here():
    from marlin_kernel import launch

# Largest error allowed, in units of what torch.matmul loses on the dequantized weights. HQQ weights
# may be rounded twice (zero point, scale).
RATIO, RATIO_HQQ = 1.1, 1.5
SIZES = ((1088, 576), (333, 301), (12, 8))
TOKENS = (1, 8, 16, 33, 64, 130, 300)
REPEATS = 30


@dataclass(frozen=True)
class Weights:
    """A random layer as the kernel takes it, and in float64."""

    combination: Combination
    layer: QuantizedLinear
    held: KernelTensors
    exact: Tensor
    bias: Tensor

    @property
    def group_size(self) -> int:
        return self.held.group_size or -1

    def run(
        self, a: Tensor, config: KernelConfig | None = None, batch_invariant: bool = False
    ) -> Tensor:
        """Multiply into a poisoned output, and look at what surrounds it."""
        (m, k), n, held = a.shape, self.exact.shape[1], self.held
        buffer = torch.full((m + 2, n), math.nan, device="cuda", dtype=a.dtype)
        operands = (a, held.weights, held.scales, self.bias, buffer[1 : m + 1])
        sizes = (k, n, held.k_padded, -(-n // 64) * 64, self.group_size)
        typed = {
            "weight_type": self.combination.weight_type.name,
            "global_scale": held.global_scale,
            "perm": held.perm,
        }
        if config is None:
            launch.gemm(*operands, *sizes, batch_invariant=batch_invariant, **typed)
        else:
            launch.launch_config(config, *operands, *sizes, **typed)
        assert buffer[0].isnan().all() and buffer[-1].isnan().all()
        return buffer[1 : m + 1]

    def check(self, a: Tensor, out: Tensor) -> None:
        """Compare with float64, and with what torch.matmul makes of the same."""
        assert not out.isnan().any()
        expected = a.double() @ self.exact + self.bias.double()
        dense = torch.matmul(a, self.exact.to(a.dtype)).double() + self.bias.double()
        dense = dense.to(out.dtype).double()
        error = float((out.double() - expected).norm() / expected.norm())
        allowed = float((dense - expected).norm() / expected.norm())
        if out.numel() < 4096:  # too few elements for a statement about the average
            allowed += torch.finfo(out.dtype).eps
        hqq = self.combination.weight_type.zeros == "float"
        assert error <= (RATIO_HQQ if hqq else RATIO) * allowed, (error, allowed)

    @property
    def k_tiles(self) -> int:
        return self.held.k_padded // 64


@functools.lru_cache(maxsize=16)
def weights(c: Combination, k: int, n: int) -> Weights:
    generator = torch.Generator().manual_seed(k * n)
    weight = torch.randn(k, n, generator=generator) / k**0.5
    layer = random_layer(weight, c, generator).to("cuda")
    held = kernel_tensors(formats.write(layer, "marlin"), layer.spec)
    bias = torch.randn(n, generator=generator).to("cuda", DTYPES[c.output])
    return Weights(c, layer, held, layer.dequantize(torch.float64), bias)


def activations(m: int, k: int, c: Combination) -> Tensor:
    """Random, in rows whose ends are NaN: the row stride is no multiple of what a copy takes."""
    generator = torch.Generator().manual_seed(m)
    buffer = torch.full((m, -(-k // 8) * 8 + 8), math.nan, device="cuda", dtype=DTYPES[c.output])
    buffer[:, :k] = torch.randn(m, k, generator=generator).to("cuda")
    return buffer[:, :k]


COMBINATIONS = list(
    combinations("9.0", activations=("float16", "bfloat16"), reductions=("float32",))
)


def compile_all(sources: set) -> None:
    """On all processors."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda source: compile_kernel(source, "sm_90a"), sources))


@functools.cache
def compile_chosen(name: str) -> None:
    """What the tests of a type will ask for."""
    sources = set()
    for c in COMBINATIONS:
        if c.weight_type.name != name:
            continue
        for k, n in SIZES:
            w = weights(c, k, n)
            for m in TOKENS:
                sizes = (m, w.k_tiles, -(-n // 64), w.group_size)
                select = kernel_configs.select_config
                if w.held.perm is not None:
                    select = kernel_configs.select_for_act_order
                config = select(*sizes, weight_type=name)
                sources.add(config.source(c.output, w.group_size, name))
    compile_all(sources)


@pytest.mark.parametrize("c", COMBINATIONS, ids=str)
def test_every_combination(c: Combination) -> None:
    compile_chosen(c.weight_type.name)
    for k, n in SIZES:
        w = weights(c, k, n)
        for m in TOKENS:
            a = activations(m, k, c)
            w.check(a, w.run(a))
    torch.cuda.synchronize()
    assert all(not memory.counters.any() for memory in launch._workspaces.values())


def typed(name: str, dtype: str, group_size: int) -> Combination:
    return Combination(WEIGHT_TYPES[name], dtype, dtype, group_size)


OTHERS = [
    (t.name, dtype, g)
    for t in WEIGHT_TYPES.values()
    for dtype, g in zip(t.activations[:2], (t.group_sizes[-1], t.group_sizes[0]), strict=False)
    if dtype in DTYPES and t.name != "uint4b8"
]


@pytest.mark.parametrize("name, dtype, group_size", OTHERS)
def test_every_shape_of_kernel(name: str, dtype: str, group_size: int) -> None:
    c = typed(name, dtype, group_size)
    for k, n in ((4096, 1024), (1128, 440)):
        w = weights(c, k, n)
        fitting = [
            config
            for config in kernel_configs.supported_configs(name)
            if config.split in (1, 4) and config.fits(1, w.k_tiles, w.group_size, name)
        ]
        compile_all({config.source(dtype, w.group_size, name) for config in fitting})
        for config in fitting:
            small = isinstance(config, DecodeConfig)
            limit = config.max_tokens if small else 3 * config.tokens - 5
            for m in {1, limit}:
                if not config.fits(m, w.k_tiles, w.group_size, name):
                    continue
                a = activations(m, k, c)
                first = w.run(a, config)
                w.check(a, first)
                assert torch.equal(first, w.run(a, config)), config


@pytest.mark.parametrize("m", [1, 7, 16])
@pytest.mark.parametrize(
    "name, group_size",
    [("float8_e4m3fn", -1), ("float8_e4m3fn", 128), ("mxfp4", 32), ("nvfp4", 16)],
)
def test_activations_far_from_one(name: str, group_size: int, m: int) -> None:
    """Small-batch kernels multiply BF16 activations by 2^80: values are as much too small."""
    c = typed(name, "bfloat16", group_size)
    w = weights(c, 4096, 1024)
    w = replace(w, bias=torch.zeros_like(w.bias))
    a = activations(m, 4096, c)
    config = DecodeConfig(1 + m // 9, 1, 8, split=2, stages=2, blocks_per_sm=1)
    assert config.fits(m, w.k_tiles, w.group_size, name)
    expected = w.run(a, config)
    w.check(a, expected)
    for power in (2.0**40, 2.0**-40):
        assert torch.equal(w.run(a * power, config), expected * power), power


@pytest.mark.parametrize("name, dtype, group_size", OTHERS)
@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_repeated_calls_are_bit_equal(name: str, dtype: str, group_size: int, m: int) -> None:
    c = typed(name, dtype, group_size)
    w = weights(c, 4096, 1024)
    a = activations(m, 4096, c)
    first = w.run(a).clone()
    results = torch.stack([w.run(a) for _ in range(REPEATS)])
    assert (results == first).all()


@pytest.mark.parametrize("name", [name for name in WEIGHT_TYPES if name != "uint4b8"])
def test_batch_invariance(name: str) -> None:
    t = WEIGHT_TYPES[name]
    c = typed(name, t.activations[0], t.group_sizes[-1])
    w = weights(c, 1128, 440)
    a = activations(300, 1128, c)
    whole = w.run(a, batch_invariant=True)
    w.check(a, whole)
    for m in (1, 8, 16, 33, 64, 129):
        assert torch.equal(w.run(a[:m], batch_invariant=True), whole[:m]), m


@pytest.mark.parametrize("c", COMBINATIONS, ids=str)
def test_layers_are_served_when_asked_for(c: Combination, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public module: layout, product, and the way back to the stored tensors."""
    monkeypatch.setenv("MARLIN_KERNEL_BACKEND", "sm90")
    w = weights(c, 1088, 576)
    tensors = formats.write(w.layer, "marlin")
    dtype = DTYPES[c.output]
    layer = PackedLayer.from_quantized(w.layer).prepare(dtype)
    assert layer.layout == "sm90"
    for m in (1, 16, 100):
        a = activations(m, 1088, c)
        out, expected = layer(a).double(), a.double() @ w.exact
        bound = 1e-3 if dtype == torch.float16 else 8e-3
        assert float((out - expected).norm() / expected.norm()) < bound
    if c.k_full:
        back = stored_tensors(w.held, w.layer.spec)
        assert all(
            torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8))
            for name, tensor in tensors.items()
        )
