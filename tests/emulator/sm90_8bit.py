"""One emulated launch of an sm_90a kernel for 8-bit activations on CPU tensors."""

from __future__ import annotations

import ctypes

from emulator.build import build, outcome, pointer
from torch import Tensor

from marlin_kernel.sm90_8bit_configs import EightBitConfig, EightBitTypes
from marlin_kernel.sm90_8bit_layout import Records


class _Arguments(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("a", "scale_a", "scale_b", "bias", "weights", "out")
        ),
        *((name, ctypes.c_int) for name in ("scale_b_stride", "m", "n", "columns")),
        *((name, ctypes.c_int) for name in ("k_tiles", "feature_tiles")),
    ]


class EightBitLibrary:
    """The kernels of one build: pairs of a configuration and types."""

    def __init__(
        self,
        kernels: list[tuple[EightBitConfig, EightBitTypes]],
        mutation: tuple[str, str, str] | None = None,
    ) -> None:
        self._numbers = {kernel: number for number, kernel in enumerate(kernels)}
        cases = " ".join(
            f"X({number}, {config.template_arguments(types)})"
            for (config, types), number in self._numbers.items()
        )
        self._library = build("run_sm90_8bit.cpp", {"CASES": cases}, mutation)

    def run(
        self,
        config: EightBitConfig,
        types: EightBitTypes,
        a: Tensor,
        token_scales: Tensor,
        held: Records,
        bias: Tensor | None,
        out: Tensor,
        multiprocessors: int,
        seed: int,
    ) -> str:
        """Launch as sm90_8bit_path.launch_config does. Returns "finished", or what went wrong."""
        (m, k), n = a.shape, out.shape[1]
        tensors = (a, token_scales, held.scales, bias, held.weights, out)
        arguments = _Arguments(
            *map(pointer, tensors),
            *(int(held.scales.numel() > 1), m, n, k, held.weights.shape[1], held.weights.shape[0]),
        )
        status = self._library.run(
            self._numbers[config, types],
            ctypes.c_uint(seed),
            config.grid(m, n, multiprocessors),
            config.storage_bytes(types),
            ctypes.byref(arguments),
        )
        return outcome(self._library, status)
