"""The scaled GEMM kernels on a GPU: every configuration, sizes, streams, graphs, repeats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from marlin_kernel import (
    formats,
    scaled_configs,
    scaled_mm,
    sparse_configs,
    sparse_marlin,
    sparse_sm80,
)
from marlin_kernel.formats import QuantizedLinear
from marlin_kernel.scaled_configs import ScaledConfig
from marlin_kernel.sparse import compress_2_4, decompress, prune_2_4
from marlin_kernel.sparse_configs import SparseDecodeConfig
from marlin_kernel.sparse_layer import SparseLayer
from marlin_kernel.weight_types import weight_type

pytestmark = pytest.mark.gpu

FP8, INT8 = torch.float8_e4m3fn, torch.int8
SHAPES = ((1, 64, 128), (17, 200, 336), (130, 264, 272), (300, 1000, 1184), (16, 512, 4096))


def problem(m: int, n: int, k: int, dtype: torch.dtype, sparse: bool) -> tuple[Tensor, ...]:
    """a [M, K], dense weight [N, K], scales per token and feature, bias."""
    shapes = (m, k), (n, k)
    if dtype == INT8:
        a, w = (torch.randint(-128, 128, s, device="cuda").float() for s in shapes)
    else:
        a, w = (torch.randn(s, device="cuda") for s in shapes)
    w = prune_2_4(w) if sparse else w
    scale_a = torch.rand(m, device="cuda") + 0.5
    scale_b = (torch.rand(n, device="cuda") + 0.5) / 64
    return a.to(dtype), w.to(dtype), scale_a, scale_b, torch.randn(n, device="cuda").bfloat16()


def expected(a: Tensor, w: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor) -> Tensor:
    sums = (a.double() @ w.double().t()).float() * scale_b * scale_a[:, None]
    return (sums + bias.float()).to(bias.dtype)


def check(out: Tensor, want: Tensor, dtype: torch.dtype, case: object) -> None:
    if dtype == INT8:
        assert torch.equal(out, want), case
    else:
        assert float((out.float() - want.float()).norm() / want.float().norm()) < 5e-3, case


@pytest.mark.parametrize("sparse", (True, False))
@pytest.mark.parametrize("dtype", (FP8, INT8), ids=str)
def test_every_configuration(dtype: torch.dtype, sparse: bool) -> None:
    for m, n, k in SHAPES:
        a, w, scale_a, scale_b, bias = problem(m, n, k, dtype, sparse)
        want = expected(a, w, scale_a, scale_b, bias)
        values, metadata = compress_2_4(w) if sparse else (w, None)
        for config in scaled_configs.supported_configs(sparse):
            if not config.fits(-(-k // 128), sparse):
                continue
            guarded = torch.full((m + 2, n), float("nan"), dtype=torch.bfloat16, device="cuda")
            out = guarded[1:-1]
            scaled_mm.launch_config(config, a, values, metadata, scale_a, scale_b, bias, out)
            check(out, want, dtype, (config, m, n, k))
            assert guarded[0].isnan().all() and guarded[-1].isnan().all()


@pytest.mark.parametrize("out_dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("dtype", (FP8, INT8), ids=str)
def test_operators(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for m, n, k in ((1, 64, 4), (15, 72, 60), (65, 129, 1028), (1000, 576, 576)):
        a, w, scale_a, scale_b, bias = problem(m, n, k, dtype, True)
        bias = bias.to(out_dtype)
        values, metadata = compress_2_4(w)
        assert torch.equal(decompress(values, metadata, k).float(), w.float())
        want = expected(a, w, scale_a, scale_b, bias)
        common = scale_a, scale_b, out_dtype, bias
        check(scaled_mm.scaled_mm(a, w.t(), *common), want, dtype, (m, n, k))
        got = scaled_mm.scaled_sparse_mm(a, values, metadata, *common)
        check(got, want, dtype, (m, n, k))
        one = torch.full((1,), 0.125, device="cuda")
        got = scaled_mm.scaled_sparse_mm(a, values, metadata, one, one, out_dtype)
        zero = torch.zeros_like(bias)
        check(got, expected(a, w, one.expand(m), one.expand(n), zero), dtype, (m, n, k))


def test_integer_sums_bit_for_bit() -> None:
    """Sums small enough to be exact in float16, then all bits of larger ones in two halves."""
    a = torch.randint(-2, 3, (100, 512), device="cuda", dtype=torch.int8)
    w = prune_2_4(torch.randint(-2, 3, (192, 512), device="cuda").float()).to(INT8)
    values, metadata = compress_2_4(w)
    one = torch.ones(1, device="cuda")
    sums = a.cpu().long() @ w.cpu().long().t()
    for out in (
        scaled_mm.scaled_sparse_mm(a, values, metadata, one, one, torch.float16),
        scaled_mm.scaled_mm(a, w.t(), one, one, torch.float16),
    ):
        assert torch.equal(out.cpu().long(), sums)


def test_strided_activations_and_streams() -> None:
    a, w, scale_a, scale_b, bias = problem(40, 320, 448, INT8, True)
    wide = torch.zeros(40, 1000, dtype=INT8, device="cuda")
    wide[:, 3:451] = a
    values, metadata = compress_2_4(w)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = scaled_mm.scaled_sparse_mm(
            wide[:, 3:451], values, metadata, scale_a, scale_b, torch.bfloat16, bias
        )
    torch.cuda.synchronize()
    assert torch.equal(out, expected(a, w, scale_a, scale_b, bias))


def test_graph_replay_and_repeats_are_equal() -> None:
    config = ScaledConfig(16, 2, 1, 4, 9, 2)
    for m in (16, 700):
        a, w, scale_a, scale_b, bias = problem(m, 1024, 2048, FP8, True)
        values, metadata = compress_2_4(w)
        call = scaled_mm.scaled_sparse_mm
        first = call(a, values, metadata, scale_a, scale_b, torch.bfloat16, bias)
        for _ in range(20):
            again = call(a, values, metadata, scale_a, scale_b, torch.bfloat16, bias)
            assert torch.equal(first, again)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(a, values, metadata, scale_a, scale_b, torch.bfloat16, bias)
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(first, captured)
    assert config in scaled_configs.supported_configs(True)


def test_compiled_call() -> None:
    a, w, scale_a, scale_b, bias = problem(33, 256, 512, INT8, True)
    values, metadata = compress_2_4(w)

    def layer(x: Tensor) -> Tensor:
        out = scaled_mm.scaled_sparse_mm(x, values, metadata, scale_a, scale_b, torch.bfloat16)
        return out + 1

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(a), layer(a))


# ---- 2:4 Marlin ----

SPARSE_SHAPES = (
    *((1, 64, 128), (17, 200, 300), (70, 136, 512), (300, 1000, 1280), (9, 512, 4096)),
    *((3, 4100, 2052), (16, 136, 1664)),
)


def sparse_problem(m: int, n: int, k: int, dtype: torch.dtype, name: str, group_size: int):
    """(activations, bias, layer, float64 result)."""
    w = prune_2_4(torch.randn(n, k)).t().contiguous()
    bias = torch.randn(n).to(dtype)
    layer = QuantizedLinear.quantize(w, weight_type(name), group_size, bias).to("cuda")
    a = torch.randn(m, k, device="cuda").to(dtype)
    return a, layer, a.double() @ layer.dequantize(torch.float64) + layer.bias.double()


@pytest.mark.parametrize("group_size", (-1, 128))
@pytest.mark.parametrize("name", ("uint4b8", "uint8b128"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_sparse_marlin_configuration(dtype, name: str, group_size: int) -> None:
    bits = weight_type(name).bits
    for m, n, k in SPARSE_SHAPES:
        a, layer, want = sparse_problem(m, n, k, dtype, name, group_size)
        stored = formats.write(layer, "marlin-24")
        tensors = stored["B_24"], stored["B_meta"], stored["s"]
        group = sparse_marlin.kernel_group(layer.group_size, k) if group_size == -1 else 128
        weights, scales = sparse_marlin.device_weights(*tensors, group)
        back = sparse_marlin.stored_weights(
            weights, scales, n, layer.weight_type, layer.spec.groups
        )
        assert all(torch.equal(x, y) for x, y in zip(back, tensors, strict=True))
        for config in sparse_configs.supported_configs(bits, group):
            if not config.fits(m, -(-k // 128), bits, group):
                continue
            decodes = isinstance(config, SparseDecodeConfig)  # takes rows that start anywhere
            rows = a if decodes else sparse_marlin._aligned(a)
            guarded = torch.full((m + 2, n), float("nan"), dtype=dtype, device="cuda")
            sparse_marlin.launch_config(
                config, rows, weights, scales, layer.bias, guarded[1:-1], bits, group
            )
            error = float((guarded[1:-1].double() - want).norm() / want.norm())
            assert error < (6e-4 if dtype == torch.float16 else 4e-3), (config, m, n, k)
            assert guarded[0].isnan().all() and guarded[-1].isnan().all()


@pytest.mark.parametrize("config", sparse_sm80.CONFIGS, ids=str)
@pytest.mark.parametrize(
    "name, group_size", (("uint4b8", 128), ("uint4b8", -1), ("uint8b128", 128))
)
def test_sparse_kernel_of_older_gpus(config, name: str, group_size: int) -> None:
    bits = weight_type(name).bits
    for dtype in (torch.float16, torch.bfloat16):
        for m, n, k in SPARSE_SHAPES:
            a, layer, want = sparse_problem(m, n, k, dtype, name, group_size)
            stored = formats.write(layer, "marlin-24")
            tensors = stored["B_24"], stored["B_meta"], stored["s"]
            weights, scales = sparse_marlin.device_weights(*tensors, group_size)
            out = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
            rest = layer.bias, out, bits, group_size
            sparse_sm80.launch_config(config, sparse_marlin._aligned(a), weights, scales, *rest)
            error = float((out.double() - want).norm() / want.norm())
            assert error < (6e-4 if dtype == torch.float16 else 4e-3), (config, m, n, k)


@pytest.mark.parametrize("group_size", (-1, 64, 128))
def test_sparse_layer_moves_saves_and_multiplies(group_size: int) -> None:
    a, layer, want = sparse_problem(33, 200, 576, torch.float16, "uint4b8", group_size)
    module = SparseLayer.from_quantized(layer)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    module.prepare(torch.float16)
    assert module.layout == ("sparse24" if group_size != 64 else module.layout)
    assert float((module(a).double() - want).norm() / want.norm()) < 6e-4
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    module = module.cpu()
    out = module(a.cpu().float())
    assert float((out.double() - want.cpu()).norm() / want.norm().cpu()) < 6e-4
    again = module.cuda().prepare(torch.bfloat16)(a.bfloat16())
    assert float((again.double() - want).norm() / want.norm()) < 6e-3


@pytest.mark.parametrize("type_name", ("uint4b8", "uint8b128"))
def test_sparse_layer_has_gradients(type_name: str) -> None:
    a, layer, _ = sparse_problem(33, 200, 1152, torch.float16, type_name, 128)
    module = SparseLayer.from_quantized(layer).prepare(torch.float16)
    assert module.layout == "sparse24"
    out = module(a.requires_grad_())
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, a, grad)
    want = grad.double() @ layer.dequantize(torch.float64).T
    assert float((found.double() - want).norm() / want.norm()) < 6e-4


def test_sparse_layer_in_graphs_and_compiled() -> None:
    a, layer, _ = sparse_problem(5, 512, 1024, torch.float16, "uint4b8", 128)
    module = SparseLayer.from_quantized(layer).prepare(torch.float16)
    first = module(a)
    assert all(torch.equal(first, module(a)) for _ in range(50))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = module(a)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(first, captured)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(a), first)
