"""The sm_80 kernel on a GPU (any of compute capability 8.0 or newer), against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from marlin_kernel import reference
from marlin_kernel.layout import packed_shape, permute_columns
from marlin_kernel.packing import pack
from marlin_kernel.sm80_configs import KernelTypes, Sm80Config, configs
from marlin_kernel.weight_types import weight_type


def _runs_here() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _runs_here(), reason="needs a GPU of compute capability 8.0 or newer"),
]
if _runs_here():
    from marlin_kernel import launch, sm80_path

DTYPES = (torch.float16, torch.bfloat16)
GROUP_SIZES = (-1, 32, 64, 128)
CONFIGS = configs(KernelTypes())
BATCH_INVARIANT_CONFIGS = configs(KernelTypes(), batch_invariant=True)
UINT4B8 = weight_type("uint4b8")
# Largest error allowed, in units of what torch.matmul loses on the dequantized weights.
ERROR_RATIO = 1.1


class Layer:
    """Random weights of a linear layer as the kernel takes them, and dequantized."""

    def __init__(self, k: int, n: int, group_size: int, seed: int = 0):
        generator = torch.Generator("cuda").manual_seed(seed)
        self.k, self.n, self.group_size = k, n, group_size
        weight = torch.randn(k, n, generator=generator, device="cuda") / k**0.5
        codes, scales, _ = reference.quantize(weight, UINT4B8, group_size)
        self.shape = shape = packed_shape(k, n, group_size)
        pad = torch.nn.functional.pad
        padded = pad(codes, (0, shape.n_padded - n, 0, shape.k_padded - k), value=UINT4B8.bias)
        scales = pad(scales, (0, shape.n_padded - n, 0, shape.groups - scales.shape[0])).half()
        g_idx = torch.arange(k, device="cuda") // shape.group_size
        self.exact = reference.dequantize(
            codes, scales[:, :n].double(), None, UINT4B8, g_idx, torch.float64
        )
        self.bias = torch.randn(n, generator=generator, device="cuda")
        self.words = pack(padded, UINT4B8)
        self.scales = permute_columns(scales, grouped=True) if shape.groups > 1 else scales

    def __call__(
        self,
        a: Tensor,
        bias: bool = True,
        config: Sm80Config | None = None,
        batch_invariant: bool = False,
    ) -> Tensor:
        """Multiply into a poisoned output, and look at what surrounds it."""
        m = a.shape[0]
        buffer = torch.full((m + 2, self.n), float("nan"), device="cuda", dtype=a.dtype)
        out = buffer[1 : m + 1]
        sm80_path.gemm(
            *(a, self.words, self.scales, self.bias.to(a.dtype) if bias else None, out),
            *(self.k, self.n, self.shape.k_padded, self.shape.n_padded, self.group_size),
            batch_invariant=batch_invariant,
            config=config,
        )
        assert buffer[0].isnan().all() and buffer[-1].isnan().all()
        return out

    def check(self, a: Tensor, out: Tensor, bias: bool = True) -> None:
        """Compare with float64, and with what torch.matmul makes of the dequantized weights."""
        expected = a.double() @ self.exact
        dense = torch.matmul(a, self.exact.to(a.dtype)).double()
        if bias:
            shift = self.bias.to(a.dtype).double()
            expected, dense = expected + shift, (dense + shift).to(a.dtype).double()
        error = float((out.double() - expected).norm() / expected.norm())
        allowed = float((dense - expected).norm() / expected.norm())
        if out.numel() < 4096:  # too few elements for a statement about the average
            allowed += torch.finfo(a.dtype).eps
        assert error <= ERROR_RATIO * allowed, (error, allowed)


@functools.cache
def layer(k: int, n: int, group_size: int) -> Layer:
    return Layer(k, n, group_size)


def activations(m: int, k: int, dtype: torch.dtype, offset: int = 0, pad: int = 0) -> Tensor:
    """Random [m, k] in a buffer of NaN, `offset` elements from its start, rows k + pad apart."""
    buffer = torch.full((m * (k + pad) + offset + 64,), float("nan"), device="cuda", dtype=dtype)
    a = buffer[offset:].as_strided((m, k), (k + pad, 1))
    return a.copy_(torch.randn(m, k, device="cuda"))


def name_of(value: object) -> str:
    if isinstance(value, Sm80Config):
        kind = "w" if value.scale_weights else "s"
        return f"tile{value.tile_m}x{value.tile_n}k{value.warps_k}{kind}"
    return str(value).replace("torch.", "")


def counters_are_zero() -> bool:
    torch.cuda.synchronize()
    return all(not w.counters.any() for w in launch._workspaces.values())


@pytest.mark.parametrize("config", CONFIGS if _runs_here() else (), ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_config(config: Sm80Config, dtype: torch.dtype, group_size: int) -> None:
    for k, n in ((4096, 1024), (320, 4160), (1088, 576)):
        if k % max(group_size, 1):
            continue
        for m in (1, config.tile_m, config.tile_m + 1, 3 * config.tile_m - 1):
            a = activations(m, k, dtype)
            out = layer(k, n, group_size)(a, config=config)
            layer(k, n, group_size).check(a, out)
    assert counters_are_zero()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("group_size", [-1, 128])
def test_every_m(dtype: torch.dtype, group_size: int) -> None:
    weights = layer(1024, 1536, group_size)
    a = activations(2049, 1024, dtype)
    for m in (*range(1, 131), 257, 511, 1023, 2049):
        out = weights(a[:m], bias=False)
        weights.check(a[:m], out, bias=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("k, n", [(1, 1), (63, 65), (100, 200), (577, 191), (1000, 1001)])
def test_padding(dtype: torch.dtype, group_size: int, k: int, n: int) -> None:
    weights = layer(k, n, group_size)
    for m in (1, 17, 130):
        for offset, pad in ((0, 0), (0, -k % 8 + 8), (1, 1), (2, k % 2 + 2)):
            a = activations(m, k, dtype, offset, pad)
            weights.check(a, weights(a))


def test_no_tokens() -> None:
    assert layer(100, 200, 32)(activations(0, 100, torch.float16)).shape == (0, 200)


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_repeated_calls_are_equal(config: Sm80Config) -> None:
    weights = layer(4096, 1024, 128)
    a = activations(config.tile_m + 3, 4096, torch.float16)
    first = weights(a, config=config)
    for _ in range(100):
        assert torch.equal(first, weights(a, config=config))
    assert counters_are_zero()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("k, n", [(4096, 512), (1024, 8256)])
def test_batch_invariance(dtype: torch.dtype, group_size: int, k: int, n: int) -> None:
    weights = layer(k, n, group_size)
    a = activations(1024, k, dtype)
    whole = weights(a, batch_invariant=True)
    weights.check(a, whole)
    for m in (1, 2, 8, 9, 16, 31, 64, 65, 128, 200, 513):
        assert torch.equal(weights(a[:m], batch_invariant=True), whole[:m]), m
    for config in BATCH_INVARIANT_CONFIGS:
        assert torch.equal(weights(a[:100], config=config, batch_invariant=True), whole[:100])


def test_streams_do_not_share_a_workspace() -> None:
    weights = layer(4096, 1024, 128)
    inputs = [activations(m, 4096, torch.float16) for m in (1, 5, 16, 33, 64, 100)]
    expected = [weights(a) for a in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for a, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                out = a.new_empty(a.shape[0], weights.n)
                sm80_path.gemm(
                    *(a, weights.words, weights.scales, weights.bias.half(), out),
                    *(4096, 1024, 4096, 1024, 128),
                )
                results.append(out)
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, expected))


def test_cuda_graph() -> None:
    weights = layer(4096, 1024, 128)
    a = activations(5, 4096, torch.float16)
    other = activations(5, 4096, torch.float16)
    expected = [weights(x, bias=False) for x in (a, other)]
    out, again = a.new_empty(2, 5, 1024)
    arguments = (weights.words, weights.scales, None)
    sizes = (4096, 1024, 4096, 1024, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sm80_path.gemm(a, *arguments, out, *sizes)
        sm80_path.gemm(a, *arguments, again, *sizes)
    for source, result in ((a.clone(), expected[0]), (other, expected[1])):
        a.copy_(source)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, result) and torch.equal(again, result)
    assert torch.equal(weights(other, bias=False), expected[1])
