"""One emulated launch of the sm_80 kernel on CPU tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from emulator.build import STATUS, build
from torch import Tensor

from marlin_kernel.sm80_configs import Geometry, Sm80Config


@dataclass(frozen=True)
class Kernel:
    """A specialisation: tile shape, compute dtype, inputs per scale (0: one scale per feature)."""

    config: Sm80Config
    dtype: torch.dtype
    group_size: int


class Sm80Library:
    """The kernels of one build, by specialisation."""

    def __init__(self, kernels: list[Kernel], mutation: tuple[str, str, str] | None = None):
        self._numbers = {kernel: number for number, kernel in enumerate(kernels)}
        cases = " ".join(
            f"X({number}, {k.config.template_arguments(k.dtype, k.group_size)})"
            for k, number in self._numbers.items()
        )
        self._library = build("run_sm80.cpp", {"CONFIG_CASES": cases}, mutation)
        self._library.violation.restype = ctypes.c_char_p

    def shared_bytes(self, kernel: Kernel) -> int:
        """sizeof(SharedStorage) as the compiler sees it."""
        return self._library.shared_bytes(self._numbers[kernel])

    def run(
        self,
        kernel: Kernel,
        a: Tensor,
        words: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        out: Tensor,
        n_padded: int,
        geometry: Geometry,
        seed: int,
    ) -> str:
        """Launch; a [M, K] may have any row stride, out [M, N] is contiguous.

        Returns "finished", or what went wrong. Workspaces start as the kernel's contract says:
        partial sums as NaN, counters as zero; counters left nonzero count as a failure.
        """
        partials = torch.full((geometry.partial_bytes // 4 + 4,), float("nan"))
        arrivals = torch.zeros(geometry.counters + 1, dtype=torch.int32)

        def pointer(t: Tensor | None) -> ctypes.c_void_p:
            return ctypes.c_void_p(None if t is None else t.data_ptr())

        status = self._library.run_gemm(
            self._numbers[kernel],
            ctypes.c_uint(seed),
            geometry.grid,
            *map(pointer, (a, words, scales, bias, out, partials, arrivals)),
            ctypes.c_longlong(a.stride(0)),
            *(a.shape[0], out.shape[1], a.shape[1], n_padded, words.shape[0] * 16),
            *(geometry.splits, geometry.in_turn),
        )
        if status:
            return f"{STATUS[status]} {self._library.violation().decode()}".strip()
        if arrivals.any():
            return "counters not zero on exit"
        return STATUS[0]
