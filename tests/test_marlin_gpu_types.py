"""Every valid combination of types on a GPU, on the mma.sync path, against float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from emulator.sm80 import DTYPES, random_layer
from torch import Tensor

from marlin_kernel import WEIGHT_TYPES, QuantizedLinear, formats, reference
from marlin_kernel.sm80_configs import KernelTypes, choices, kernel_types, select_config
from marlin_kernel.sm80_layout import KernelTensors, kernel_activations, kernel_tensors
from marlin_kernel.validity import Combination, combinations


def _capability() -> str | None:
    if not torch.cuda.is_available():
        return None
    version = torch.cuda.get_device_capability()
    known = {(7, 5): "7.5", (8, 0): "8.0", (8, 6): "8.6", (8, 9): "8.9", (9, 0): "9.0"}
    return known.get(version, "12.0" if version >= (9, 0) else None)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_capability() is None, reason="needs a GPU of capability 7.5 or newer"),
]
if _capability():
    from marlin_kernel import launch, sm80_path

# Largest error allowed, in units of what torch.matmul (for 8-bit activations: rounding the exact
# result) loses. HQQ weights are rounded twice (zero point, scale), fp16 exchange rounds every part.
RATIO, RATIO_HQQ, RATIO_HALF = 1.1, 1.5, 2.5
SIZES = ((1088, 576), (333, 301))
TOKENS = (1, 16, 65, 300)  # one in every group of rows of the table
FEW_TOKENS = (1, 300)


@dataclass(frozen=True)
class Weights:
    """A random layer as the kernel takes it, and in float64."""

    combination: Combination
    held: KernelTensors
    exact: Tensor
    bias: Tensor

    def run(self, a: Tensor, config=None, sm75: bool = False) -> Tensor:
        """Multiply into a poisoned output, and look at what surrounds it."""
        (m, k), n, held, c = a.shape, self.exact.shape[1], self.held, self.combination
        buffer = torch.full((m + 2, n), float("nan"), device="cuda", dtype=self.bias.dtype)
        token_scales = None
        if c.activation in ("int8", "float8_e4m3fn"):
            dtype = DTYPES[c.activation]
            a, token_scales = sm80_path.quantize_activations(a, dtype, held.k_padded)
            k = held.k_padded
        sm80_path.gemm(
            *(a, held.weights, held.scales, self.bias, buffer[1 : m + 1], k, n),
            *(held.k_padded, held.n_padded, held.group_size),
            weight_type=c.weight_type.name,
            zeros=held.zeros,
            perm=held.perm,
            token_scales=token_scales,
            global_scale=held.global_scale,
            reduce_half=c.reduction == "float16",
            config=config,
            sm75=sm75,
        )
        assert buffer[0].isnan().all() and buffer[-1].isnan().all()
        return buffer[1 : m + 1]

    def check(self, a: Tensor, out: Tensor) -> None:
        """Compare with float64, and with what rounding or torch.matmul makes of the same."""
        c = self.combination
        if c.activation in ("int8", "float8_e4m3fn"):
            codes, scales = reference.quantize_activations(a, DTYPES[c.activation])
            product = (codes.double() * scales.double()[:, None]) @ self.exact
            expected = product + self.bias.double()
            dense = expected.to(out.dtype).double()
        else:
            expected = a.double() @ self.exact + self.bias.double()
            dense = torch.matmul(a, self.exact.to(a.dtype)).double() + self.bias.double()
            dense = dense.to(out.dtype).double()
        error = float((out.double() - expected).norm() / expected.norm())
        allowed = float((dense - expected).norm() / expected.norm())
        if out.numel() < 4096:  # too few elements for a statement about the average
            allowed += torch.finfo(out.dtype).eps
        ratio = RATIO_HALF if c.reduction == "float16" else RATIO
        if c.weight_type.zeros == "float":
            ratio = max(ratio, RATIO_HQQ)
        assert error <= ratio * allowed, (error, allowed)


@functools.cache
def weights(c: Combination, k: int, n: int) -> Weights:
    generator = torch.Generator().manual_seed(k * n)
    weight = torch.randn(k, n, generator=generator) / k**0.5
    layer: QuantizedLinear = random_layer(weight, c, generator).to("cuda")
    held = kernel_tensors(formats.write(layer, "marlin"), layer.spec)
    bias = torch.randn(n, generator=generator).to("cuda", DTYPES[c.output])
    return Weights(c, held, layer.dequantize(torch.float64), bias)


def activations(m: int, k: int, c: Combination) -> Tensor:
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, k, generator=generator).to("cuda", DTYPES[c.output])


def tokens_of(c: Combination) -> tuple[int, ...]:
    """All rows of the table for fp16, the first and the last for the other outputs."""
    return TOKENS if c.output == "float16" and c.reduction == "float32" else FEW_TOKENS


def kernels_needed() -> list[tuple[KernelTypes, int]]:
    """Types and tokens of everything below, to compile it beforehand in parallel."""
    needed: dict[tuple[KernelTypes, int], None] = {}
    for c in combinations(_capability() or "9.0"):
        for m in tokens_of(c):
            needed[kernel_types(c, permuted=c.act_order and m <= 16), m] = None
    for c in SM75:
        for m in (1, 16, 300):
            needed[kernel_types(c, sm75=True), m] = None
    return list(needed)


@pytest.mark.parametrize("c", list(combinations(_capability() or "9.0")), ids=str)
def test_every_combination(c: Combination) -> None:
    for k, n in SIZES:
        for m in tokens_of(c):
            a = activations(m, k, c)
            w = weights(c, k, n)
            w.check(a, w.run(a))
    torch.cuda.synchronize()
    assert all(not w.counters.any() for w in launch._workspaces.values())


SM75 = [
    Combination(WEIGHT_TYPES[name], activation, "float16", group_size)
    for name, activation, group_size in (
        ("uint4b8", "float16", 128),
        ("uint8", "float16", -1),
        ("float8_e4m3fn", "float16", -1),
        ("nvfp4", "float16", 16),
        ("uint4b8", "int8", -1),
        ("uint8b128", "int8", 64),
    )
]


@pytest.mark.parametrize("c", SM75, ids=str)
def test_what_sm75_has(c: Combination) -> None:
    for k, n in SIZES:
        for m in (1, 16, 300):
            a = activations(m, k, c)
            w = weights(c, k, n)
            w.check(a, w.run(a, sm75=True))


@pytest.mark.parametrize("name", WEIGHT_TYPES)
def test_repeated_calls_are_equal(name: str) -> None:
    t = WEIGHT_TYPES[name]
    c = Combination(t, t.activations[0], t.activations[0], t.group_sizes[-1])
    w = weights(c, 4096, 512)
    for m in FEW_TOKENS:
        a = activations(m, 4096, c)
        first = w.run(a)
        for _ in range(30):
            assert torch.equal(first, w.run(a))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("m", "k", "offset"), [(1, 64, 0), (5, 333, 0), (300, 4096, 1)])
def test_quantized_activations(dtype, code, m: int, k: int, offset: int) -> None:
    if code == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 conversions need capability 8.9")
    buffer = torch.randn(m * k + offset, device="cuda").to(dtype)
    a = buffer[offset:].view(m, k)
    a[0] = 0
    k_padded = -(-k // 64) * 64
    codes, scales = sm80_path.quantize_activations(a, code, k_padded)
    expected, expected_scales = reference.quantize_activations(a, code)
    assert torch.equal(scales, expected_scales)
    ordered = kernel_activations(expected, k_padded)
    # -0 and 0 are one number
    assert torch.equal(codes.float(), ordered.float())


def test_gathered_activations() -> None:
    a = torch.randn(70, 1000, device="cuda", dtype=torch.float16)[:, :900]
    perm = torch.randint(-1, 900, (1024,), device="cuda", dtype=torch.int32)
    expected = torch.where(perm >= 0, a[:, perm.clamp(min=0)], 0)
    assert torch.equal(sm80_path.gather(a, perm), expected)


def test_all_rows_are_tried() -> None:
    """TOKENS reach every kind of row."""
    for types, _ in kernels_needed():
        if types.output == "float16" and not types.reduce_half and not types.sm75:
            limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
            rows = {select_config(m, types, limit, False) for m in (*TOKENS, 32)}
            fitting = [row for _, row in choices(types) if row.shared_bytes(types) <= limit]
            assert rows <= set(fitting)
