"""Packed codes of checkpoints straight to the words of the Marlin layout, on the CPU or a GPU.

    gptq                 qweight int32 [K * bits / 32, N], 4 or 8 bits, with or without act-order
    awq                  qweight int32 [K, N / 8], 4 bits, columns interleaved
    compressed-tensors   weight_packed int32 [N, ceil(K * bits / 32)], 4 or 8 bits

The result equals ``formats.write(formats.read(...), "marlin")["B"]`` bit for bit; on a CPU it is
that. Scales and zero points are small; `formats` converts them.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .compiler import KernelSource
from .errors import ConfigError
from .layout import PackedShape, words_shape
from .packing import pack, unpack_awq, unpack_rows
from .weight_types import WeightType

SOURCES = {"gptq": "Gptq", "awq": "Awq", "compressed-tensors": "Transposed"}
_PROBLEM = struct.Struct("<4Q7i4x")  # repack::Problem
_WARPS, _TILE = 8, 64


def unpack_source(words: Tensor, source: str, k: int, n: int, bits: int) -> Tensor:
    """uint8 codes [K, N], in natural order, of the packed tensor of a checkpoint."""
    if source == "gptq":
        return unpack_rows(words.T, bits, k).T.contiguous()
    if source == "awq":
        return unpack_awq(words)
    return unpack_rows(words, bits, k).T.contiguous()


def repack(
    words: Tensor,
    source: str,
    wtype: WeightType,
    shape: PackedShape,
    *,
    perm: Tensor | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    """int32 [K' / 16, N' * bits / 2]: the words of the Marlin layout (FORMAT.md).

    words: int32, as the table above says; source: a key of SOURCES; shape: of the layer
    (layout.packed_shape); perm: integers [K], the input that each row of the result holds
    (act-order: ``argsort(g_idx, stable=True)``); zeros: uint8 [G, N], natural zero points, which
    fill the rows from K to K' of types that store them.
    Raises ConfigError naming what does not fit.
    """
    _check(words, source, wtype, shape, perm, zeros)
    if words.device.type == "cuda":
        return _repack_on_gpu(words, source, wtype, shape, perm, zeros)
    codes = unpack_source(words, source, shape.k, shape.n, wtype.bits)
    if perm is not None:
        codes = codes[perm.long()]
    pad = (0, shape.n_padded - shape.n, 0, shape.k_padded - shape.k)
    codes = torch.nn.functional.pad(codes, pad, value=wtype.midpoint)
    if zeros is not None:
        groups = torch.arange(shape.k, shape.k_padded, device=codes.device) // shape.group_size
        inside = groups < zeros.shape[0]
        rows = torch.arange(shape.k, shape.k_padded, device=codes.device)[inside]
        codes[rows, : shape.n] = zeros[groups[inside]]
    return pack(codes, wtype)


def _check(
    words: Tensor,
    source: str,
    wtype: WeightType,
    shape: PackedShape,
    perm: Tensor | None,
    zeros: Tensor | None,
) -> None:
    k, n, factor = shape.k, shape.n, wtype.pack_factor
    if source not in SOURCES:
        raise ConfigError(f"source={source!r} is not one of {', '.join(SOURCES)}")
    if source == "awq" and wtype.bits != 4:
        raise ConfigError(f"AWQ packs 4 bits, not the {wtype.bits} of {wtype.name}")
    if source == "awq" and perm is not None:
        raise ConfigError("perm is for act-order, which AWQ checkpoints do not have; leave it out")
    expected = {
        "gptq": (k // factor, n),
        "awq": (k, n // 8),
        "compressed-tensors": (n, -(-k // factor)),
    }[source]
    whole = source == "compressed-tensors" or (k if source == "gptq" else n) % factor == 0
    if words.dtype != torch.int32 or tuple(words.shape) != expected or not whole:
        raise ConfigError(
            f"words are {words.dtype} {list(words.shape)}; {source} packs {k} inputs x {n} outputs "
            f"of {wtype.bits} bits as int32 {list(expected)}, whole words of {factor} codes"
        )
    if perm is not None and tuple(perm.shape) != (k,):
        raise ConfigError(f"perm has shape {list(perm.shape)}, expected [{k}]")
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape[1:] != (n,)):
        raise ConfigError(f"zeros are {zeros.dtype} {list(zeros.shape)}, expected uint8 [G, {n}]")


def kernel_source(source: str, bits: int, permuted: bool) -> KernelSource:
    """What to compile (csrc/repack/repack.cuh)."""
    name = SOURCES[source] + ("" if source == "awq" else f"<{bits}>")
    return KernelSource(
        "repack/repack.cuh",
        f"repack::repack<repack::{name}, {str(permuted).lower()}>",
    )


def shared_bytes(source: str, bits: int) -> int:
    """sizeof(repack::Storage)."""
    rows = _TILE * bits // 32
    words = {"gptq": rows * 96, "awq": _TILE * 12, "compressed-tensors": rows * 100}[source]
    return 4 * _WARPS * words


def arguments(
    words: Tensor,
    out: Tensor,
    wtype: WeightType,
    shape: PackedShape,
    perm: Tensor | None,
    zeros: Tensor | None,
) -> bytes:
    """The kernel's argument (repack::Problem); perm: int32."""
    pointers = (0 if t is None else t.data_ptr() for t in (words, perm, zeros, out))
    return _PROBLEM.pack(
        *pointers,
        *(shape.k, shape.n, shape.k_padded, shape.n_padded),
        *(shape.group_size, 0 if zeros is None else zeros.shape[0], wtype.midpoint),
    )


def _repack_on_gpu(
    words: Tensor,
    source: str,
    wtype: WeightType,
    shape: PackedShape,
    perm: Tensor | None,
    zeros: Tensor | None,
) -> Tensor:
    from . import sm80_path  # needs CUDA's bindings

    words = words.contiguous()
    perm = None if perm is None else perm.to(torch.int32).contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    sizes = words_shape(shape.k_padded, shape.n_padded, wtype)
    out = torch.empty(sizes, dtype=torch.int32, device=words.device)
    shares = shape.k_padded // _TILE * (shape.n_padded // _TILE)
    if shares:
        sm80_path.run(
            kernel_source(source, wtype.bits, perm is not None),
            32 * _WARPS,
            shared_bytes(source, wtype.bits),
            arguments(words, out, wtype, shape, perm, zeros),
            -(-shares // _WARPS),
            words.device,
        )
    return out
