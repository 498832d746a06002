"""One emulated launch of the sm_80 kernel on CPU tensors, and random problems for it."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from emulator.build import build, outcome, pointer
from torch import Tensor

from marlin_kernel import QuantizedLinear, formats, reference
from marlin_kernel.sm80_configs import (
    Geometry,
    KernelTypes,
    Sm80Config,
    geometry,
    kernel_types,
)
from marlin_kernel.sm80_layout import KernelTensors, kernel_activations, kernel_tensors
from marlin_kernel.validity import Combination

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class Kernel:
    """A specialisation: tile shape and types."""

    config: Sm80Config
    types: KernelTypes


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("activations", "weights", "scales", "zeros")),
        *((name, ctypes.c_void_p) for name in ("permutation", "token_scales", "global_scale")),
        *((name, ctypes.c_void_p) for name in ("bias", "output", "partials", "arrivals")),
        ("row_stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "n_padded", "k_padded")),
        *((name, ctypes.c_int) for name in ("splits", "in_turn")),
    ]


class Sm80Library:
    """The kernels of one build, by specialisation."""

    def __init__(self, kernels: list[Kernel], mutation: tuple[str, str, str] | None = None):
        self._numbers = {kernel: number for number, kernel in enumerate(kernels)}
        cases = " ".join(
            f"X({number}, {k.config.template_arguments(k.types)})"
            for k, number in self._numbers.items()
        )
        self._library = build("run_sm80.cpp", {"CONFIG_CASES": cases}, mutation)

    def shared_bytes(self, kernel: Kernel) -> int:
        """sizeof(SharedStorage) as the compiler sees it."""
        return self._library.shared_bytes(self._numbers[kernel])

    def run(
        self,
        kernel: Kernel,
        a: Tensor,
        weights: KernelTensors,
        bias: Tensor | None,
        out: Tensor,
        geometry: Geometry,
        seed: int,
        token_scales: Tensor | None = None,
    ) -> str:
        """Launch; a [M, K] may have any row stride, out [M, N] is contiguous.

        Returns "finished", or what went wrong. Workspaces start as the kernel's contract says:
        partial sums as NaN, counters as zero; counters left nonzero count as a failure.
        """
        partials = torch.full((geometry.partial_bytes // 4 + 4,), float("nan"))
        arrivals = torch.zeros(geometry.counters + 1, dtype=torch.int32)

        w = weights
        arguments = _Arguments(
            *map(pointer, (a, w.weights, w.scales, w.zeros, w.perm, token_scales)),
            *map(pointer, (w.global_scale, bias, out, partials, arrivals)),
            a.stride(0),
            *(a.shape[0], out.shape[1], a.shape[1], w.n_padded, w.k_padded),
            *(geometry.splits, geometry.in_turn),
        )
        status = self._library.run_gemm(
            self._numbers[kernel], ctypes.c_uint(seed), geometry.grid, ctypes.byref(arguments)
        )
        return outcome(self._library, status, arrivals)


class Problem:
    """Random operands of one multiplication, as the kernel takes them, and its float64 result.

    16-bit activations lie inside a larger buffer of NaN; its rows are aligned to `alignment` bytes.
    """

    def __init__(self, c: Combination, m: int, n: int, k: int, alignment: int = 16):
        generator = torch.Generator().manual_seed(m * 1000003 + n * 1009 + k)
        randn = functools.partial(torch.randn, generator=generator)
        output = DTYPES[c.output]
        self.combination = c
        self.bias = randn(n).to(output)
        self.layer = random_layer(randn(k, n) / k**0.5, c, generator)
        tensors = formats.write(self.layer, "marlin")
        self.weights = kernel_tensors(tensors, self.layer.spec)
        self.token_scales = None
        a = randn(m, k)
        if DTYPES[c.activation].itemsize == 1:
            codes, self.token_scales = reference.quantize_activations(a, DTYPES[c.activation])
            self.a = kernel_activations(codes, self.weights.k_padded)
            exact = codes.double() * self.token_scales.double()[:, None]
        else:
            unit = alignment // 2  # elements
            stride = -(-k // unit) * unit + unit
            buffer = torch.full((m + 2, stride), float("nan"), dtype=output)
            self.a = buffer.flatten()[unit:].as_strided((m, k), (stride, 1))
            exact = self.a.copy_(a).double()
        self.expected = exact @ self.layer.dequantize().double() + self.bias.double()

    def types(self, sm75: bool = False) -> KernelTypes:
        """Of the kernel that serves this problem."""
        permuted = self.weights.perm is not None
        types = kernel_types(self.combination, permuted=permuted, sm75=sm75)
        assert types.group_size == self.weights.group_size, "one group takes -1"
        return types

    def run(
        self,
        library: Sm80Library,
        kernel: Kernel,
        blocks: int,
        seed: int,
        batch_invariant: bool = False,
    ) -> tuple[str, Tensor]:
        """One launch into a poisoned output with guard rows. Returns the verdict and C."""
        m, n = self.expected.shape
        buffer = torch.full((m + 2, n), float("nan"), dtype=self.bias.dtype)
        sizes = (m, n, self.weights.k_padded, blocks, batch_invariant)
        plan = geometry(kernel.config, kernel.types, *sizes, min_k=64)
        out = buffer[1 : m + 1]
        verdict = library.run(
            *(kernel, self.a, self.weights, self.bias, out, plan, seed, self.token_scales)
        )
        if not (buffer[0].isnan().all() and buffer[-1].isnan().all()):
            verdict = "wrote outside of the output"
        return verdict, out

    def error(self, out: Tensor) -> float:
        """Relative error in the Frobenius norm; NaN if any element is."""
        return float((out.double() - self.expected).norm() / self.expected.norm())


def random_layer(weight: Tensor, c: Combination, generator: torch.Generator) -> QuantizedLinear:
    """`weight` [K, N] rounded to the type; with act-order, inputs belong to random groups.

    k_full=False: a third of the inputs of a layer, with all its groups.
    """
    k = weight.shape[0]
    if not c.act_order:
        return QuantizedLinear.quantize(weight, c.weight_type, c.group_size)
    whole = k if c.k_full else 3 * k
    order = torch.randperm(whole, generator=generator)
    g_idx = torch.empty(whole, dtype=torch.int32)
    g_idx[order] = (torch.arange(whole) // c.group_size).int()
    groups = -(-whole // c.group_size)
    g_idx = g_idx[:k]
    largest = torch.zeros(groups, weight.shape[1])
    largest.index_reduce_(0, g_idx.long(), weight.abs(), "amax")
    scales = reference.round_scales(2 * largest / (c.weight_type.levels - 1))
    codes = (weight / scales[g_idx.long()]).round() + c.weight_type.bias
    return QuantizedLinear.of(
        codes.clamp(0, c.weight_type.levels - 1).to(torch.uint8),
        scales,
        c.weight_type,
        c.group_size,
        g_idx=g_idx,
        shard_groups=None if c.k_full else groups,
    )
