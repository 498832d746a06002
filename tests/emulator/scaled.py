"""One emulated launch of a scaled GEMM kernel on CPU tensors."""

from __future__ import annotations

import ctypes

import torch
from emulator.build import build, outcome, pointer
from torch import Tensor

from marlin_kernel.scaled_configs import STAGE_K, ScaledConfig


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "scale_a", "scale_b", "bias")),
        *((name, ctypes.c_void_p) for name in ("metadata", "out")),
        *((name, ctypes.c_longlong) for name in ("a_row", "b_row")),
        *((name, ctypes.c_int) for name in ("scale_a_stride", "scale_b_stride", "m", "n")),
        *((name, ctypes.c_int) for name in ("a_columns", "b_columns", "k_tiles", "feature_tiles")),
    ]


class ScaledLibrary:
    """The kernels of one build: (config, operand dtype, output dtype, sparse)."""

    def __init__(
        self,
        kernels: list[tuple[ScaledConfig, torch.dtype, torch.dtype, bool]],
        mutation: tuple[str, str, str] | None = None,
    ) -> None:
        self._numbers = {kernel: number for number, kernel in enumerate(kernels)}
        cases = []
        for (config, operand, out, sparse), number in self._numbers.items():
            expression = config.source(str(operand)[6:], str(out)[6:], sparse).expression
            cases.append(f"X({number}, {expression.split('Config<')[1].split('>')[0]})")
        self._library = build("run_scaled.cpp", {"CASES": " ".join(cases)}, mutation)

    def run(
        self,
        config: ScaledConfig,
        a: Tensor,
        weight: Tensor,
        metadata: Tensor | None,
        scale_a: Tensor,
        scale_b: Tensor,
        bias: Tensor | None,
        out: Tensor,
        multiprocessors: int,
        seed: int,
    ) -> str:
        """Launch as scaled_mm.launch_config does. Returns "finished", or what went wrong."""
        (m, k), n = a.shape, weight.shape[0]
        sparse = metadata is not None

        arguments = _Arguments(
            *map(pointer, (a, weight, scale_a, scale_b, bias, metadata, out)),
            *(a.stride(0), weight.stride(0), int(scale_a.numel() > 1), int(scale_b.numel() > 1)),
            *(m, n, k, weight.shape[1], -(-k // STAGE_K), -(-n // 64)),
        )
        status = self._library.run(
            self._numbers[config, a.dtype, out.dtype, sparse],
            ctypes.c_uint(seed),
            config.grid(m, n, multiprocessors),
            config.storage_bytes(sparse),
            ctypes.byref(arguments),
        )
        return outcome(self._library, status)
