"""One emulated launch of a 2:4 Marlin kernel on CPU tensors."""

from __future__ import annotations

import ctypes

import torch
from emulator.build import build, outcome, pointer
from torch import Tensor

from marlin_kernel.sparse_configs import AnyConfig, SparseConfig, SparseDecodeConfig
from marlin_kernel.sparse_sm80 import Sm80SparseConfig

# config, dtype, bits, group size
Kernel = tuple[AnyConfig | Sm80SparseConfig, torch.dtype, int, int]
_LETTERS = {SparseConfig: "X", Sm80SparseConfig: "Y", SparseDecodeConfig: "Z"}  # run_sparse.cpp


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "weights", "scales", "bias", "out")),
        ("row_stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "k_tiles", "feature_tiles")),
    ]


class SparseLibrary:
    """The kernels of one build."""

    def __init__(self, kernels: list[Kernel], mutation: tuple[str, str, str] | None = None) -> None:
        self._numbers = {kernel: number for number, kernel in enumerate(kernels)}
        cases = []
        for (config, dtype, bits, group_size), number in self._numbers.items():
            old = isinstance(config, Sm80SparseConfig)
            source = config.source(dtype if old else str(dtype)[6:], bits, group_size)
            arguments = source.expression.split("Config<")[1].split(">")[0]
            cases.append(f"{_LETTERS[type(config)]}({number}, {arguments})")
        self._library = build("run_sparse.cpp", {"CASES": " ".join(cases)}, mutation)

    def run(
        self,
        kernel: Kernel,
        a: Tensor,
        weights: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        out: Tensor,
        multiprocessors: int,
        seed: int,
    ) -> str:
        """Launch as sparse_marlin.launch_config does. Returns "finished", or what went wrong."""
        config, _, bits, group_size = kernel
        (m, k), n = a.shape, out.shape[1]
        arguments = _Arguments(
            *map(pointer, (a, weights, scales, bias, out)),
            *(a.stride(0), m, n, k, weights.shape[1], weights.shape[0]),
        )
        column_tiles, k_tiles = weights.shape[:2]
        if isinstance(config, Sm80SparseConfig):
            grid, shared = config.grid(m, column_tiles), config.storage_bytes(bits, group_size)
        else:
            grid = config.grid(m, k_tiles, column_tiles, bits, group_size, multiprocessors)
            shared = config.shared_bytes(m, k_tiles, bits, group_size)
        status = self._library.run(
            *(self._numbers[kernel], ctypes.c_uint(seed), *grid[:2], shared),
            ctypes.byref(arguments),
        )
        return outcome(self._library, status)
