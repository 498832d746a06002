"""Other kernels for 4-bit weights x FP16/BF16 that are installed, timed beside ours by bench.py.

A peer packs one set of random weights its own way, and gives what multiplies with it; every result
is checked against float64 before it is timed, by the same protocol as ours. None is a dependency:

    tinygemm      torch's own int4 product (torch._weight_int4pack_mm), BF16
    humming       pip install humming-kernels, with the configuration that it chooses
    vllm-marlin   vLLM's Marlin, as its Python code calls it
    machete       vLLM's kernel for Hopper, the fastest of its schedules

Of vLLM only the compiled library is loaded, not the package.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_kernel.layout import permute_columns
from marlin_kernel.packing import pack
from marlin_kernel.weight_types import weight_type
from scripts.gpu_timing import (
    ERROR_LIMITS,
    ROTATE_BYTES,
    graph_time,
    let_rest,
    relative_error,
)

_WORKSPACE_BLOCKS = 4  # of vLLM's Marlin, a multiprocessor

Multiply = Callable[[Tensor, Any], Tensor]  # activations [M, K], packed weights -> [M, N]


class NotInstalled(Exception):
    """A peer is not there, or does not take this problem; says why."""


@dataclass(frozen=True)
class Weights:
    """``W = (codes - 8) * scales``: codes int32 [K, N] of 0..15; scales [G, N] in the dtype of the
    activations, one for `group_size` inputs (K for one group)."""

    codes: Tensor
    scales: Tensor
    group_size: int

    @classmethod
    def random(cls, k: int, n: int, group_size: int, dtype: torch.dtype, device: str) -> Weights:
        """group_size: -1 for one group."""
        size = k if group_size == -1 else group_size
        codes = torch.randint(0, 16, (k, n), device=device, dtype=torch.int32)
        scales = torch.rand(k // size, n, device=device) * 0.01 + 0.001
        return cls(codes, scales.to(dtype), size)

    @property
    def grouped(self) -> bool:
        return self.scales.shape[0] > 1

    def exact(self) -> Tensor:
        """float32 [K, N]."""
        return (self.codes - 8).float() * self.scales.float().repeat_interleave(self.group_size, 0)


@dataclass(frozen=True)
class Packed:
    """A peer's weights, which copy.deepcopy copies, and the ways to multiply with them."""

    weights: Any
    ways: Sequence[Multiply]


# ---- the peers -----------------------------------------------------------------------------------


def tinygemm(w: Weights) -> Packed:
    """Ansel et al., PyTorch 2 (2024); W = (q - 8) scale + zero in groups of 32 to 256."""
    if w.scales.dtype != torch.bfloat16 or not w.grouped:
        raise NotInstalled("tinygemm takes BF16 and groups of 32 to 256")
    q = w.codes.t().to(torch.uint8).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)
    scales = torch.stack((w.scales, torch.zeros_like(w.scales)), -1)

    def multiply(a: Tensor, held: tuple[Tensor, Tensor]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(a, held[0], w.group_size, held[1])

    return Packed((packed, scales), [multiply])


def humming(w: Weights) -> Packed:
    """Codes eight to a word along K, scales [N, G] (humming/schema/humming.py of 0.1.19)."""
    try:
        from humming.layer import HummingLayer
    except ImportError as error:
        raise NotInstalled(f"pip install humming-kernels ({error})") from None
    k, n = w.codes.shape
    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={"dtype": "uint4", "group_size": w.group_size if w.grouped else 0},
        torch_dtype=w.scales.dtype,
    ).to(w.codes.device)
    words = _words_along_k(w.codes).t().contiguous()
    layer.load_from_tensors({"weight": words, "weight_scale": w.scales.t().contiguous()})
    layer.transform()
    return Packed(layer, [lambda a, held: held(a)])


def vllm_marlin(w: Weights) -> Packed:
    library, uint4b8 = _vllm()
    (k, n), device = w.codes.shape, w.codes.device
    words = pack(w.codes, weight_type("uint4b8"))
    scales = permute_columns(w.scales, grouped=w.grouped)
    blocks = torch.cuda.get_device_properties(device).multi_processor_count * _WORKSPACE_BLOCKS
    locks = torch.zeros(blocks, dtype=torch.int32, device=device)

    def multiply(a: Tensor, held: tuple[Tensor, Tensor]) -> Tensor:
        return library.marlin_gemm(
            *(a, None, held[0], None, held[1], None, None, None, locks, uint4b8),
            *(a.shape[0], n, k, False, True, False),  # no atomic additions, sums in FP32
        )

    return Packed((words, scales), [multiply])


def machete(w: Weights) -> Packed:
    library, uint4b8 = _vllm()
    dtype = w.scales.dtype
    words = _words_along_k(w.codes).t().contiguous().t()
    words = library.machete_prepack_B(words, dtype, uint4b8, dtype)
    schedules = library.machete_supported_schedules(dtype, uint4b8, dtype, None, None, None, None)

    def multiply(a: Tensor, held: tuple[Tensor, Tensor], schedule: str | None) -> Tensor:
        group = w.group_size if w.grouped else -1
        return library.machete_mm(
            a, held[0], uint4b8, None, held[1], None, group, None, None, schedule
        )

    ways = [functools.partial(multiply, schedule=schedule) for schedule in schedules]
    return Packed((words, w.scales.contiguous()), ways)


PEERS: dict[str, Callable[[Weights], Packed]] = {
    "tinygemm": tinygemm,
    "humming": humming,
    "vllm-marlin": vllm_marlin,
    "machete": machete,
}
_PACKAGES = {"tinygemm": "torch", "humming": "humming-kernels"}


def version(name: str) -> str:
    """Package and version of a peer, as "vllm 0.33.0"."""
    package = _PACKAGES.get(name, "vllm")
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def _words_along_k(codes: Tensor) -> Tensor:
    """int32 [K / 8, N], eight codes a word, the first in its lowest bits (GPTQ's qweight)."""
    shifts = torch.arange(0, 32, 4, device=codes.device, dtype=torch.int32)[:, None]
    return (codes.view(-1, 8, codes.shape[1]) << shifts).sum(1, dtype=torch.int32)


@functools.cache
def _vllm() -> tuple[Any, int]:
    """vLLM's operators, and the number of its type uint4b8."""
    found = importlib.util.find_spec("vllm")  # without importing it
    if found is None or not found.submodule_search_locations:
        raise NotInstalled("pip install vllm")
    folder = Path(found.submodule_search_locations[0])
    libraries = sorted(folder.glob("_C*.so"))
    if not libraries:
        raise NotInstalled(f"{folder.name} holds no _C*.so")
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except OSError as error:  # built for another torch
        raise NotInstalled(" ".join(str(error).split())) from None
    spec = importlib.util.spec_from_file_location("_vllm_scalar_type", folder / "scalar_type.py")
    module = sys.modules["_vllm_scalar_type"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return torch.ops._C, module.scalar_types.uint4b8.id


# ---- measuring -----------------------------------------------------------------------------------


def times(
    name: str,
    k: int,
    n: int,
    tokens: Sequence[int],
    group_size: int,
    dtype: torch.dtype,
    device: str = "cuda",
    rest: float = 0.0,
) -> dict[int, float]:
    """Microseconds of a peer by number of tokens, of its fastest way.

    rest: as of gpu_timing.let_rest.
    Raises NotInstalled if it is not there or does not take the problem, and ValueError for a result
    that is wrong.
    """
    w = Weights.random(k, n, group_size, dtype, device)
    packed, exact = PEERS[name](w), w.exact()
    count = max(2, -(-ROTATE_BYTES // (k * n // 2 + 2 * w.scales.numel())))
    held = [packed.weights, *(copy.deepcopy(packed.weights) for _ in range(count - 1))]
    found = {}
    for m in tokens:
        a = torch.randn(m, k, device=device).to(dtype)
        launches = count if m <= 256 else max(2, count // 4)
        best, refused = math.inf, None
        for way in packed.ways:
            try:
                error = relative_error(way(a, held[0]), a, exact)
            except RuntimeError as reason:  # this way does not take the shape
                refused = reason
                continue
            if not error < ERROR_LIMITS[dtype]:
                raise ValueError(f"{name}: relative error {error:.5f} at {k}x{n}, M = {m}")
            let_rest(m, rest)
            best = min(best, graph_time([_call(way, a, held[i]) for i in range(launches)]))
        if math.isinf(best):
            raise NotInstalled(f"{k}x{n}, M = {m}: {refused}")
        found[m] = best
    return found


def _call(way: Multiply, a: Tensor, held: Any) -> Callable[[], None]:
    def launch() -> None:
        way(a, held)

    return launch
