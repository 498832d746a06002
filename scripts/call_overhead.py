"""Host time of one eager call: torch.matmul, nn.Linear, the packed operator and `Layer`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from marlin_kernel import Layer, QuantizedLinear, gemm, weight_type


def host_us(call: Callable[[], object], calls: int = 200, bursts: int = 41) -> float:
    """Median microseconds of host time of a call, over bursts that the GPU's queue can hold."""
    times = []
    for _ in range(bursts):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) * 1e6 / calls)
    torch.cuda.synchronize()
    return statistics.median(times)


@torch.inference_mode()
def call_overhead(k: int, n: int, m: int, dtype: torch.dtype, group_size: int) -> dict[str, float]:
    """Microseconds of host time for m tokens: "matmul", "linear", "op" and "layer"."""
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8, device="cuda")
    scales = torch.full((1 if group_size == -1 else k // group_size, n), 0.01, device="cuda")
    quantized = QuantizedLinear.of(codes, scales.half(), weight_type("uint4b8"), group_size)
    layer = Layer.from_quantized(quantized).prepare(dtype)
    linear = nn.Linear(k, n, bias=False, device="cuda", dtype=dtype)
    weight = linear.weight.t()
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    held = (layer.weights, layer.scales, layer.zeros, layer.perm, layer.bias)
    sizes = (k, n, layer.spec.group_size, "uint4b8", layer.layout, False)
    calls = {
        "matmul": lambda: torch.matmul(x, weight),
        "linear": lambda: linear(x),
        "op": lambda: gemm(x, *held, *sizes),
        "layer": lambda: layer(x),
    }
    for call in calls.values():
        call()
    return {name: host_us(call) for name, call in calls.items()}
