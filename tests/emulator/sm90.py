"""One emulated launch of an sm_90 kernel on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from emulator.build import build, outcome, pointer
from emulator.sm80 import DTYPES, random_layer
from torch import Tensor

from marlin_kernel import formats
from marlin_kernel.kernel_configs import TILE_K, TILE_N, DecodeConfig, GemmConfig
from marlin_kernel.sm90_layout import kernel_tensors
from marlin_kernel.validity import Combination


@dataclass(frozen=True)
class Kernel:
    """A specialisation: shape, compute dtype, inputs per scale (-1: one per feature), weights."""

    config: DecodeConfig | GemmConfig
    dtype: torch.dtype
    group_size: int
    weight_type: str = "uint4b8"

    def template_arguments(self) -> str:
        """What stands between the angle brackets of DecodeConfig or GemmConfig."""
        types = (str(self.dtype)[6:], self.group_size, self.weight_type)
        expression = self.config.source(*types).expression
        return expression.split("Config<")[1].split(">")[0]


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("activations", "weights", "scales", "bias", "out")),
        *((name, ctypes.c_void_p) for name in ("partials", "counters", "global_scale")),
        ("permutation", ctypes.c_void_p),
        ("row_stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "column_tiles", "k_tiles")),
        *((name, ctypes.c_int) for name in ("split", "whole_tiles")),
    ]


def _entry(config: DecodeConfig | GemmConfig) -> str:
    if isinstance(config, GemmConfig):
        return "gemm"
    return "decode_gather" if config.gathers else "decode"


class Sm90Library:
    """The kernels of one build, by specialisation."""

    def __init__(self, kernels: list[Kernel], mutation: tuple[str, str, str] | None = None):
        self._numbers = {kernel: number for number, kernel in enumerate(kernels)}
        cases = {}
        for name in ("decode", "decode_gather", "gemm"):
            cases[f"{name.upper()}_CASES"] = " ".join(
                f"X({number}, {kernel.template_arguments()})"
                for kernel, number in self._numbers.items()
                if _entry(kernel.config) == name
            )
        self._library = build("run_sm90.cpp", cases, mutation)

    def run(
        self,
        kernel: Kernel,
        a: Tensor,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        out: Tensor,
        k_padded: int,
        n_padded: int,
        blocks: int,
        seed: int,
        global_scale: Tensor | None = None,
        perm: Tensor | None = None,
    ) -> str:
        """Launch; a [M, K] may have any row stride, out [M, N] is contiguous.

        codes, scales: in the device layout (sm90_layout); blocks: multiprocessors of the imagined
        GPU; global_scale: of types that have one; perm: of kernels that gather. Returns "finished",
        or what went wrong.
        """
        config = kernel.config
        (m, k), n = a.shape, out.shape[1]
        column_tiles, k_tiles = n_padded // TILE_N, k_padded // TILE_K
        split, whole_tiles, floats, counts = 1, 0, 0, 0
        if isinstance(config, GemmConfig):
            size = (m, column_tiles, blocks)
            split, whole_tiles = config.parts(*size), config.whole_tiles(*size)
            floats, counts = config.workspace(*size)
        entry = getattr(self._library, f"run_{_entry(config)}")
        types = (kernel.group_size, kernel.weight_type)
        grid = config.grid(m, k_tiles, column_tiles, types[0], blocks, types[1])
        partials = torch.full((floats + 4,), float("nan"))
        counters = torch.zeros(counts + 1, dtype=torch.int32)

        arguments = _Arguments(
            *map(pointer, (a, codes, scales, bias, out, partials, counters, global_scale, perm)),
            *(a.stride(0), m, n, k, column_tiles, k_tiles, split, whole_tiles),
        )
        status = entry(
            self._numbers[kernel],
            ctypes.c_uint(seed),
            *grid[:2],
            config.shared_bytes(m, k_tiles, *types),
            ctypes.byref(arguments),
        )
        return outcome(self._library, status, counters)


class TypedProblem:
    """A random multiplication with weights of any type, and its float64 result.

    The activations lie inside a larger buffer of NaN. For kernels that do not gather (act-order)
    they are gathered before, as csrc/sm90/gather.cuh does. shift: of the buffer, in elements.
    """

    def __init__(self, c: Combination, m: int, n: int, k: int, shift: int = 8):
        generator = torch.Generator().manual_seed(m * 1000003 + n * 1009 + k)
        randn = functools.partial(torch.randn, generator=generator)
        dtype = DTYPES[c.output]
        self.bias = randn(n).to(dtype)
        layer = random_layer(randn(k, n) / k**0.5, c, generator)
        self.weights = kernel_tensors(formats.write(layer, "marlin"), layer.spec)
        buffer = torch.full((m + 2, -(-k // 8) * 8 + 8), float("nan"), dtype=dtype)
        self.a = buffer.flatten()[shift:].as_strided((m, k), (buffer.shape[1], 1))
        exact = self.a.copy_(randn(m, k)).double()
        self.expected = exact @ layer.dequantize(torch.float64) + self.bias.double()
        self.gathered, perm = self.a, self.weights.perm
        if perm is not None:
            self.gathered = torch.where(perm >= 0, self.a[:, perm.clamp(min=0).long()], 0)

    @property
    def group_size(self) -> int:
        """Of the kernel that serves this problem."""
        return self.weights.group_size or -1

    def run(self, built: Sm90Library, kernel: Kernel, sms: int, seed: int) -> tuple[str, Tensor]:
        """One launch into a poisoned output with guard rows. Returns the verdict and C."""
        m, n = self.expected.shape
        w = self.weights
        buffer = torch.full((m + 2, n), float("nan"), dtype=self.bias.dtype)
        out = buffer[1 : m + 1]
        n_padded = -(-n // TILE_N) * TILE_N
        gathers = kernel.config.gathers
        a = self.a if gathers else self.gathered
        verdict = built.run(
            *(kernel, a, w.weights, w.scales, self.bias, out, w.k_padded, n_padded),
            *(sms, seed, w.global_scale, w.perm if gathers else None),
        )
        if not (buffer[0].isnan().all() and buffer[-1].isnan().all()):
            verdict = "wrote outside of the output"
        return verdict, out

    def error(self, out: Tensor) -> float:
        """Relative error in the Frobenius norm; NaN if any element is."""
        return float((out.double() - self.expected).norm() / self.expected.norm())
