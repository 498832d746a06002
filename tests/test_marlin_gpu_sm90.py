"""The sm_90a kernels on a Hopper GPU, against float64."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from marlin_kernel import Layer as PackedLayer
from marlin_kernel import kernel_configs, launch
from marlin_kernel.compiler import compile_kernel
from marlin_kernel.formats import LayerSpec
from marlin_kernel.fusion import fuse_layers
from marlin_kernel.kernel_configs import GemmConfig, KernelConfig
from marlin_kernel.layout import packed_shape, permute_columns
from marlin_kernel.packing import pack
from marlin_kernel.sm90_layout import kernel_tensors
from marlin_kernel.weight_types import weight_type
from tests.cases import random_layer


def _runs_here() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _runs_here(), reason="needs a Hopper GPU (compute capability 9.0)"),
]

DTYPES = (torch.float16, torch.bfloat16)
GROUP_SIZES = kernel_configs.GROUP_SIZES
MOST_HOST_US = 8  # of one eager call of a layer, beyond torch.matmul
ERROR_RATIO = 1.1  # of what torch.matmul loses on the dequantized weights
SIZES = ((4096, 1024), (576, 192), (1128, 440), (64, 64), (200, 8), (1000, 264))


class Layer:
    """Random weights of a linear layer in device order, and their exact values."""

    def __init__(self, k: int, n: int, group_size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(k * 7 + n)
        self.shape = shape = packed_shape(k, n, group_size)
        group_size = -1 if shape.groups == 1 else group_size
        self.k, self.n, self.group_size, self.dtype = k, n, group_size, dtype
        size = (shape.k_padded, shape.n_padded)
        codes = torch.randint(0, 16, size, generator=generator, device="cuda", dtype=torch.int32)
        codes[k:] = 8
        codes[:, n:] = 8
        groups = shape.groups
        scales = torch.rand(groups, shape.n_padded, generator=generator, device="cuda")
        scales = (scales * 0.02 + 0.001).half()
        spread = scales.double().repeat_interleave(-(-shape.k_padded // groups), 0)
        self.exact = ((codes - 8).double() * spread)[:k, :n]
        self.bias = torch.randn(n, generator=generator, device="cuda").to(dtype)
        wtype = weight_type("uint4b8")
        stored = {"B": pack(codes, wtype), "s": permute_columns(scales, grouped=groups > 1)}
        held = kernel_tensors(stored, LayerSpec(k, n, wtype, k if groups == 1 else group_size))
        self.words, self.scales = held.weights, held.scales

    def run(
        self, a: Tensor, config: KernelConfig | None = None, bias: bool = False, **options: bool
    ) -> Tensor:
        """Multiply into the middle of a poisoned buffer, and look at what surrounds it."""
        m = a.shape[0]
        buffer = torch.full((m + 2, self.n), math.nan, device=a.device, dtype=a.dtype)
        out = buffer[1:-1]
        arguments = (
            a,
            self.words,
            self.scales,
            self.bias if bias else None,
            out,
            self.k,
            self.n,
            self.shape.k_padded,
            self.shape.n_padded,
            self.group_size,
        )
        if config is None:
            launch.gemm(*arguments, **options)
        else:
            launch.launch_config(config, *arguments)
        assert buffer[0].isnan().all() and buffer[-1].isnan().all()
        return out

    def check(self, out: Tensor, a: Tensor, bias: bool = False) -> None:
        assert not out.isnan().any()
        offset = self.bias.double() if bias else 0.0
        reference = a.double() @ self.exact + offset
        plain = (a @ self.exact.to(a.dtype)).double() + offset
        error = (out.double() - reference).norm() / reference.norm()
        allowed = (plain.to(a.dtype).double() - reference).norm() / reference.norm()
        assert error <= ERROR_RATIO * allowed + 1e-5, (error.item(), allowed.item())


@functools.lru_cache(maxsize=8)
def layer(k: int, n: int, group_size: int, dtype: torch.dtype) -> Layer:
    return Layer(k, n, group_size, dtype)


def tokens(m: int, k: int, dtype: torch.dtype, stride: int | None = None) -> Tensor:
    """Random activations; what lies between rows is NaN."""
    buffer = torch.full((m, stride or k), math.nan, device="cuda", dtype=dtype)
    buffer[:, :k] = torch.randn(m, k, device="cuda")
    return buffer[:, :k]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("k, n", SIZES)
def test_matches_float64(k: int, n: int, group_size: int, dtype: torch.dtype) -> None:
    weights = layer(k, n, group_size, dtype)
    for m in (1, 3, 8, 15, 16, 17, 33, 64, 100, 130, 300, 1000):
        a = tokens(m, k, dtype)
        weights.check(weights.run(a, bias=m % 2 == 1), a, bias=m % 2 == 1)


def test_every_m() -> None:
    weights = layer(4096, 1024, 128, torch.float16)
    for m in (*range(1, 131), 255, 513, 2047):
        a = tokens(m, 4096, torch.float16)
        weights.check(weights.run(a), a)


def precompile(dtype: torch.dtype, group_size: int) -> None:
    """Every configuration's kernel, on all processors."""
    name = str(dtype).removeprefix("torch.")
    sources = {
        config.source(name, group_size)
        for config in kernel_configs.supported_configs()
        if config.fits(1, 64, group_size)
    }
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda source: compile_kernel(source, "sm_90a"), sources))


@pytest.mark.parametrize("dtype, group_size", [(torch.float16, 128), (torch.bfloat16, 32)], ids=str)
def test_every_configuration(dtype: torch.dtype, group_size: int) -> None:
    precompile(dtype, group_size)
    for k, n in ((4096, 1024), (1128, 440)):
        weights = layer(k, n, group_size, dtype)
        for config in kernel_configs.supported_configs():
            limit = getattr(config, "max_tokens", 3 * getattr(config, "tokens", 0))
            for m in {1, min(7, limit), limit}:
                if not config.fits(m, weights.shape.k_padded // 64, group_size):
                    continue
                a = tokens(m, k, dtype)
                first = weights.run(a, config, bias=True)
                weights.check(first, a, bias=True)
                assert torch.equal(first, weights.run(a, config, bias=True)), config


@pytest.mark.parametrize("stride", [1136, 1144, 1129, 1130])
def test_strided_and_unaligned_rows(stride: int) -> None:
    weights = layer(1128, 440, 128, torch.float16)
    for m in (1, 5, 16, 70):
        a = tokens(m, 1128, torch.float16, stride)
        weights.check(weights.run(a), a)


def test_rows_that_start_off_alignment() -> None:
    weights = layer(576, 192, 64, torch.float16)
    for m in (2, 40):
        a = torch.randn(m, 580, device="cuda").half()[:, 3:579]
        weights.check(weights.run(a), a)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("act_order", [False, True])
def test_layers_take_activations_of_any_strides(act_order: bool, rows: int) -> None:
    quantized = random_layer(512, 320, weight_type("uint4b8"), 64, act_order=act_order, bias=True)
    module = PackedLayer.from_quantized(quantized).to("cuda").prepare(torch.float16)
    assert module.layout == "sm90"
    weight, bias = quantized.dequantize(torch.float64).cuda(), quantized.bias.double().cuda()
    wide = torch.randn(3, rows, 1024, device="cuda").half()
    whole = wide[..., :512].contiguous()
    cases = (
        whole,
        whole.unsqueeze(0),
        whole[0, 0],
        whole[:, 0],
        whole[:, :0],
        whole.transpose(0, 1),
        whole[:1].expand(3, rows, 512),
        whole[0, :1].expand(rows, 512),
        wide[..., :512],
        wide[0, :, 8:520],
        wide[..., 1:513],
        wide[..., ::2],
    )
    for a in cases:
        out = module(a)
        assert out.shape == (*a.shape[:-1], 320) and out.is_contiguous()
        assert torch.equal(out, module(a.contiguous()))
        if a.numel():
            expected = a.double() @ weight + bias
            assert (out.double() - expected).norm() / expected.norm() < 1e-3


def test_no_tokens() -> None:
    weights = layer(576, 192, 64, torch.float16)
    assert weights.run(tokens(0, 576, torch.float16)).shape == (0, 192)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, n", [(4096, 1024), (1128, 440)])
def test_batch_invariance(k: int, n: int, dtype: torch.dtype) -> None:
    weights = layer(k, n, 128, dtype)
    a = tokens(600, k, dtype)
    whole = weights.run(a, batch_invariant=True)
    weights.check(whole, a)
    for m in (1, 2, 7, 8, 9, 16, 31, 32, 33, 64, 65, 128, 129, 300):
        assert torch.equal(weights.run(a[:m], batch_invariant=True), whole[:m]), m
        assert torch.equal(weights.run(a[5 : 5 + m], batch_invariant=True), whole[5 : 5 + m]), m


@pytest.mark.parametrize("m", [1, 8, 16, 32, 64, 128, 300])
def test_repeated_calls_are_bit_equal(m: int) -> None:
    weights = layer(4096, 1024, 128, torch.float16)
    a = tokens(m, 4096, torch.float16)
    first = weights.run(a).clone()
    results = torch.stack([weights.run(a) for _ in range(100)])
    assert (results == first).all()


def test_ten_thousand_launches_of_every_configuration() -> None:
    """Races that no tool sees show as results that differ. Outputs are poisoned before."""
    precompile(torch.float16, 128)
    weights = layer(4096, 1024, 128, torch.float16)
    for config in kernel_configs.supported_configs():
        decode = not isinstance(config, GemmConfig)
        m = config.max_tokens if decode else 3 * config.tokens - 5  # several tiles, one partial
        if not config.fits(m, 64, 128):
            continue
        a = tokens(m, 4096, torch.float16)
        first = weights.run(a, config).clone()
        outs = torch.empty(100 if m <= 128 else 20, *first.shape, device="cuda", dtype=a.dtype)
        wrong = torch.zeros((), device="cuda", dtype=torch.int64)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.fill_(math.nan)
            for out in outs:
                launch.launch_config(
                    config, a, weights.words, weights.scales, None, out, 4096, 1024, 4096, 1024, 128
                )
            wrong += (outs != first).any(2).any(1).sum()
        for _ in range(10_000 // len(outs)):
            graph.replay()
        assert wrong.item() == 0, config


def test_concurrent_streams() -> None:
    weights = layer(4096, 1024, 128, torch.float16)
    batches = [tokens(m, 4096, torch.float16) for m in (1, 16, 64, 128)]
    expected = [weights.run(a).clone() for a in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    results: list[list[Tensor]] = [[] for _ in batches]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                out = torch.empty_like(expected[i])
                launch.gemm(
                    batches[i],
                    weights.words,
                    weights.scales,
                    None,
                    out,
                    4096,
                    1024,
                    4096,
                    1024,
                    128,
                )
                results[i].append(out)
    torch.cuda.synchronize()
    for outs, want in zip(results, expected, strict=True):
        assert all(torch.equal(out, want) for out in outs)


def test_graph_replay_follows_its_inputs() -> None:
    """A chain of layers, each launched while its predecessor still runs."""
    first, second = (layer(1024, 1024, g, torch.float16) for g in (128, 64))
    for m in (1, 16, 64, 128):
        a = tokens(m, 1024, torch.float16)

        def chain(a: Tensor = a) -> Tensor:
            hidden = a
            for weights in (first, second) * 4:
                out = torch.empty(hidden.shape[0], 1024, device="cuda", dtype=torch.float16)
                shape = (1024, 1024, 1024, 1024)
                pair = (weights.words, weights.scales)
                launch.gemm(hidden, *pair, None, out, *shape, weights.group_size)
                hidden = out / out.abs().amax().clamp(min=1e-3) if weights is second else out * 0.1
            return hidden

        chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain()
        for _ in range(3):
            a.copy_(torch.randn_like(a))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(captured, chain())


def packed_layer(k: int, n: int, bias: bool = False) -> PackedLayer:
    """The public module, prepared for float16."""
    quantized = random_layer(k, n, weight_type("uint4b8"), 128, bias=bias).to("cuda")
    return PackedLayer.from_quantized(quantized).prepare(torch.float16)


def test_compiled_with_graphs() -> None:
    """torch.compile's graphs tolerate no memory that a kernel keeps; splits need some."""
    model = torch.nn.Sequential(packed_layer(4096, 1024, True), torch.nn.GELU()).cuda()
    with torch.inference_mode():
        for m in (1, 16, 64, 128, 200):
            torch._dynamo.reset()
            compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
            for _ in range(5):
                x = tokens(m, 4096, torch.float16)
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=1e-2)
    assert all(w.counters.count_nonzero() == 0 for w in launch._workspaces.values())


def test_graphs_captured_on_one_stream_run_side_by_side() -> None:
    weights = layer(4096, 1024, 128, torch.float16)
    config = GemmConfig(64, 1, 4, 2, 2, False, split=4)
    batches = [tokens(64, 4096, torch.float16) for _ in range(4)]
    expected = [weights.run(a, config).clone() for a in batches]
    graphs, outs = [], [torch.empty_like(out) for out in expected]
    for a, out in zip(batches, outs, strict=True):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for _ in range(20):
                pair = (weights.words, weights.scales)
                launch.launch_config(config, a, *pair, None, out, 4096, 1024, 4096, 1024, 128)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for out in outs:
            out.fill_(math.nan)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, want) for out, want in zip(outs, expected, strict=True))


def test_fused_layers_give_the_outputs_of_their_parts() -> None:
    model = torch.nn.Module()
    for name, n in (("q_proj", 1024), ("k_proj", 200), ("v_proj", 256)):
        setattr(model, name, packed_layer(1024, n, bias=True))
    parts = [model.q_proj, model.k_proj, model.v_proj]
    inputs = [tokens(m, 1024, torch.float16) for m in (1, 7, 16, 100)]
    expected = [[part(x) for part in parts] for x in inputs]
    assert fuse_layers(model) == ["qkv_proj"] and model.qkv_proj.layout == "sm90"
    for x, outs in zip(inputs, expected, strict=True):
        for part, want in zip((model.q_proj, model.k_proj, model.v_proj), outs, strict=True):
            torch.testing.assert_close(
                part(x), want, rtol=4e-3, atol=4e-3 * want.abs().max().item()
            )


def test_tracers_see_the_operator() -> None:
    """An eager layer skips the dispatcher, but not while something records or wraps the call."""
    module = packed_layer(256, 128)
    x = tokens(3, 256, torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(x)).shape == (3, 128)
    graph = make_fx(module)(x)
    assert "marlin_kernel.gemm" in graph.code
    assert torch.equal(graph(x), module(x))


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other tests disturb host times")
def test_eager_calls_cost_little_host_time() -> None:
    file = Path(__file__).parents[1] / "scripts" / "call_overhead.py"
    spec = importlib.util.spec_from_file_location("call_overhead", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for m in (1, 16, 64):
        us = script.call_overhead(4096, 4096, m, torch.float16, 128)
        assert us["layer"] - us["matmul"] <= MOST_HOST_US, us


def test_workspace_is_left_zeroed() -> None:
    weights = layer(4096, 1024, 128, torch.float16)
    config = GemmConfig(64, 1, 4, 2, 2, False, split=4)
    weights.run(tokens(64, 4096, torch.float16), config)
    torch.cuda.synchronize()
    assert launch._workspaces
    assert all(w.counters.count_nonzero() == 0 for w in launch._workspaces.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device() -> None:
    weights = Layer(1024, 512, 128, torch.float16)
    a = tokens(9, 1024, torch.float16)
    expected = weights.run(a)
    weights.words, weights.scales = weights.words.to("cuda:1"), weights.scales.to("cuda:1")
    assert torch.equal(weights.run(a.to("cuda:1")).to("cuda:0"), expected)


def test_supports() -> None:
    device = torch.device("cuda")
    assert launch.supports(device, "uint4b8", 128, torch.float16)
    assert launch.supports(device, "uint8b128", 128, torch.float16)
    assert not launch.supports(device, "mxfp4", 32, torch.float16)
    assert not launch.supports(device, "uint4b8", 96, torch.float16)
    assert not launch.supports(device, "uint4b8", 128, torch.float32)
    assert not launch.supports(torch.device("cpu"), "uint4b8", 128, torch.float16)
