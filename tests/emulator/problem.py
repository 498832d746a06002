"""Random multiplications with their float64 results, as the emulated kernels take them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from marlin_kernel import layout, packing, reference
from marlin_kernel.formats import LayerSpec
from marlin_kernel.sm90_layout import kernel_tensors
from marlin_kernel.weight_types import weight_type

DTYPES = (torch.float16, torch.bfloat16)
UINT4B8 = weight_type("uint4b8")
# Relative to the norm: the output's rounding, and in some kernels that of the scaled weights.
TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 3e-3}


class Problem:
    """Random operands of one multiplication and its float64 result.

    The activations lie inside a larger buffer of NaN; its rows are aligned to `alignment` bytes.
    """

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype, group_size: int, alignment: int):
        generator = torch.Generator().manual_seed(m * 1000003 + n * 1009 + k)
        randn = functools.partial(torch.randn, generator=generator)
        shape = layout.packed_shape(k, n, group_size)
        codes, scales, _ = reference.quantize(randn(k, n) / k**0.5, UINT4B8, group_size)
        pad_n = shape.n_padded - n
        pad = torch.nn.functional.pad
        codes = pad(codes, (0, pad_n, 0, shape.k_padded - k), value=UINT4B8.bias)
        scales = pad(scales, (0, pad_n, 0, shape.groups - scales.shape[0]), value=1.0).half()
        self.grouped = shape.groups > 1
        stored = {
            "B": packing.pack(codes, UINT4B8),
            "s": layout.permute_columns(scales, self.grouped),
        }
        self.weights = kernel_tensors(stored, LayerSpec(k, n, UINT4B8, shape.group_size))
        unit = alignment // 2  # elements
        stride = -(-k // unit) * unit + unit
        buffer = torch.full((m + 2, stride), float("nan"), dtype=dtype)
        self.a = buffer.flatten()[unit:].as_strided((m, k), (stride, 1))
        self.a.copy_(randn(m, k))
        self.bias = randn(n).to(dtype)
        g_idx = torch.arange(shape.k_padded) // (shape.k_padded // shape.groups)
        weight = reference.dequantize(codes, scales.float(), None, UINT4B8, g_idx)
        self.expected = self.a.double() @ weight[:k, :n].double() + self.bias.double()

    def error(self, out: Tensor) -> float:
        """Relative error in the Frobenius norm; NaN if any element is."""
        return float((out.double() - self.expected).norm() / self.expected.norm())


@functools.cache
def problem(
    m: int, n: int, k: int, dtype: torch.dtype, group_size: int, alignment: int = 16
) -> Problem:
    return Problem(m, n, k, dtype, group_size, alignment)
