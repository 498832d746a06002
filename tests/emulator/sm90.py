"""One emulated launch of an sm_90 kernel on CPU tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from emulator.build import STATUS, build
from torch import Tensor

from marlin_kernel.kernel_configs import TILE_K, TILE_N, DecodeConfig, GemmConfig


@dataclass(frozen=True)
class Kernel:
    """A specialisation: shape, compute dtype, inputs per scale (-1: one scale per feature)."""

    config: DecodeConfig | GemmConfig
    dtype: torch.dtype
    group_size: int

    def template_arguments(self) -> str:
        """What stands between the angle brackets of DecodeConfig or GemmConfig."""
        expression = self.config.source(str(self.dtype)[6:], self.group_size).expression
        return expression.split("Config<")[1].split(">")[0]


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("activations", "weights", "scales", "bias", "out")),
        *((name, ctypes.c_void_p) for name in ("partials", "counters")),
        ("row_stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "column_tiles", "k_tiles")),
        *((name, ctypes.c_int) for name in ("split", "whole_tiles")),
    ]


class Sm90Library:
    """The kernels of one build, by specialisation."""

    def __init__(self, kernels: list[Kernel], mutation: tuple[str, str, str] | None = None):
        self._numbers = {kernel: number for number, kernel in enumerate(kernels)}
        cases = {}
        for name, kind in (("DECODE_CASES", DecodeConfig), ("GEMM_CASES", GemmConfig)):
            cases[name] = " ".join(
                f"X({number}, {kernel.template_arguments()})"
                for kernel, number in self._numbers.items()
                if isinstance(kernel.config, kind)
            )
        self._library = build("run_sm90.cpp", cases, mutation)
        self._library.violation.restype = ctypes.c_char_p

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
    ) -> str:
        """Launch; a [M, K] may have any row stride, out [M, N] is contiguous.

        codes, scales: in the device layout (`launch.convert_layout`); blocks: multiprocessors of
        the imagined GPU. Returns "finished", or what went wrong.
        """
        config = kernel.config
        (m, k), n = a.shape, out.shape[1]
        column_tiles, k_tiles = n_padded // TILE_N, k_padded // TILE_K
        split, whole_tiles, floats, counts = 1, 0, 0, 0
        if isinstance(config, GemmConfig):
            entry = self._library.run_gemm
            split, whole_tiles = config.split, config.whole_tiles(m, column_tiles, blocks)
            floats, counts = config.workspace(m, column_tiles, blocks)
        else:
            entry = self._library.run_decode
        grid = config.grid(m, k_tiles, column_tiles, kernel.group_size, blocks)
        partials = torch.full((floats + 4,), float("nan"))
        counters = torch.zeros(counts + 1, dtype=torch.int32)

        def pointer(t: Tensor | None) -> int | None:
            return None if t is None else t.data_ptr()

        arguments = _Arguments(
            *map(pointer, (a, codes, scales, bias, out, partials, counters)),
            *(a.stride(0), m, n, k, column_tiles, k_tiles, split, whole_tiles),
        )
        status = entry(
            self._numbers[kernel],
            ctypes.c_uint(seed),
            *grid[:2],
            config.shared_bytes(m, k_tiles, kernel.group_size),
            ctypes.byref(arguments),
        )
        if status:
            return f"{STATUS[status]} {self._library.violation().decode()}".strip()
        if counters.any():
            return "counters not zero on exit"
        return STATUS[0]
