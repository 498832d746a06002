"""The reference, checked against loops and closed forms."""

from __future__ import annotations

import pytest
import torch

from marlin_kernel import INTEGER_TYPES, WEIGHT_TYPES, ConfigError, reference
from marlin_kernel.dense import dequantize, multiply
from tests.cases import random_layer

TYPES = list(INTEGER_TYPES.values())


@pytest.mark.parametrize("wtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("act_order", [False, True])
def test_dequantize_equals_the_definition(wtype, act_order):
    layer = random_layer(70, 6, wtype, 32, act_order=act_order)
    weight = layer.dequantize()
    for k in range(70):
        j = int(layer.group_index[k])
        for n in range(6):
            zero = wtype.bias if layer.zeros is None else int(layer.zeros[j, n])
            value = float(layer.scales[j, n]) * (int(layer.codes[k, n]) - zero)
            assert float(weight[k, n]) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("wtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_quantize_is_within_half_a_step(wtype, group_size):
    weight = torch.randn(70, 24)
    codes, scales, zeros = reference.quantize(weight, wtype, group_size)
    index = reference.group_index(70, group_size)
    back = reference.dequantize(codes, scales, zeros, wtype, index)
    steps = scales.abs()[index]
    # Asymmetric grids round their zero point too, which may cost the ends another half step. Scales
    # are rounded to fp16, 2**-11 relative, which moves the outermost codes by so many steps.
    slack = (0.5 if wtype.symmetric else 1.0) + wtype.levels * 2.0**-11
    assert ((back - weight).abs() <= slack * steps).all()
    assert int(codes.max()) < wtype.levels
    assert torch.equal(scales, scales.half().float())


def test_round_scales_keeps_signs_and_never_gives_zero():
    scales = torch.tensor([1e-12, -1e-12, 0.0, 0.1, -0.1, 1e6])
    rounded = reference.round_scales(scales)
    assert (rounded != 0).all()
    assert rounded[0] > 0 > rounded[1]
    assert torch.equal(rounded, rounded.half().float())
    assert rounded[5] == torch.finfo(torch.float16).max


@pytest.mark.parametrize("wtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize(("k", "group_size"), [(128, 32), (100, 32), (100, -1), (24, 128)])
def test_fast_dequantize_equals_the_reference(wtype, k, group_size):
    layer = random_layer(k, 40, wtype, group_size)
    codes, zeros = centred(layer)
    fast = dequantize(codes, layer.scales, zeros, layer.group_size, wtype)
    assert torch.equal(fast, layer.dequantize())


@pytest.mark.parametrize("block", [1, 40 * 32, 1 << 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_multiply_by_blocks(monkeypatch, block, dtype):
    from marlin_kernel import dense

    monkeypatch.setattr(dense, "_BLOCK", block)
    layer = random_layer(100, 40, WEIGHT_TYPES["uint4"], 32, bias=True)
    codes, zeros = centred(layer)
    rows = torch.randn(5, 100, dtype=dtype)
    out = multiply(
        rows, codes, layer.scales, zeros, layer.bias, layer.group_size, layer.weight_type
    )
    expected = reference.matmul(rows, layer.dequantize(), layer.bias)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True])
def test_multiply_at_once(bias):
    """The fallback of GPUs, which runs on any device."""
    from marlin_kernel.dense import _multiply_at_once

    layer = random_layer(100, 40, WEIGHT_TYPES["uint4"], 32, bias=bias)
    codes, zeros = centred(layer)
    rows = torch.randn(5, 100)
    facts = (layer.group_size, layer.weight_type)
    out = _multiply_at_once(rows, codes, layer.scales, zeros, layer.bias, *facts)
    expected = reference.matmul(rows, layer.dequantize(), layer.bias)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_int4_kernel_of_torch_agrees():
    from marlin_kernel import dense

    layer = random_layer(128, 48, WEIGHT_TYPES["uint4b8"], 32, bias=True)
    codes, _ = centred(layer)
    args = (codes, layer.scales, None, layer.bias.bfloat16(), 32, layer.weight_type)
    few = torch.randn(4, 128, dtype=torch.bfloat16)
    if not dense._int4_fits(few, codes, None, 32, layer.weight_type):
        pytest.skip("this torch or CPU has no int4 kernel")
    partial = torch.randn(4, 112, dtype=torch.bfloat16)  # a group that K does not fill
    assert not dense._int4_fits(partial, codes[:112], None, 32, layer.weight_type)
    many = few.repeat(16, 1)
    assert not dense._int4_fits(many, codes, None, 32, layer.weight_type)
    expected = reference.matmul(few.float(), layer.dequantize(), layer.bias)
    error = (multiply(few, *args).float() - expected).norm() / expected.norm()
    error_many = (multiply(many, *args)[:4].float() - expected).norm() / expected.norm()
    # bfloat16 rounds to 2**-9; the kernel rounds scales and sums, the other path only the output
    assert error < 2**-8 and error_many < 2**-8
    wide = torch.randn(4, 256, dtype=torch.bfloat16)
    wide[:, ::2] = few
    for strided in (wide[:, ::2], few.T.contiguous().T):  # the kernel takes contiguous rows only
        assert torch.equal(multiply(strided, *args), multiply(few, *args))


def centred(layer):
    """Codes and zeros minus the middle of their range, as int8."""
    middle = layer.weight_type.midpoint
    codes = (layer.codes.int() - middle).to(torch.int8)
    return codes, None if layer.zeros is None else (layer.zeros.int() - middle).to(torch.int8)


# ---- floating-point types, zero points in fp16, rounded activations ------------------------------


def test_float_values():
    e2m1 = reference.float_values(WEIGHT_TYPES["nvfp4"]).tolist()
    assert e2m1[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6] and e2m1[8:] == [-x for x in e2m1[:8]]
    ours = reference.float_values(WEIGHT_TYPES["float8_e4m3fn"])
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(ours.nan_to_num(1e9), theirs.nan_to_num(1e9))


def test_encode_rounds_ties_to_even_and_saturates():
    e2m1, e4m3 = WEIGHT_TYPES["mxfp4"], WEIGHT_TYPES["float8_e4m3fn"]
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 100.0, -5.0, -0.2])
    assert reference.encode(values, e2m1).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 7, 14, 8]
    x = torch.randn(20000) * 100
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(reference.encode(x, e4m3), expected.view(torch.uint8))
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(reference.encode(reference.decode(codes, e2m1), e2m1), codes)


@pytest.mark.parametrize("name", ["uint4_hqq", "float8_e4m3fn", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("k", [200, 12])
def test_stored_grids(name, k):
    """Errors of rounding stay within the grid's steps; zero groups are exact."""
    wtype = WEIGHT_TYPES[name]
    limit = {"uint4_hqq": 0.12, "float8_e4m3fn": 0.03, "nvfp4": 0.12, "mxfp4": 0.14}[name]
    for group_size in wtype.group_sizes:
        weight = torch.randn(k, 40)
        weight[:, 3] = 0
        q = reference.quantize_stored(weight, wtype, group_size)
        groups = reference.group_index(k, min(group_size, k) if group_size > 0 else -1)
        args = (q.codes, q.scales, q.zeros, wtype, groups)
        out = reference.dequantize(*args, global_scale=q.global_scale)
        assert float((out - weight).norm() / weight.norm()) < limit
        assert not out[:, 3].any()
    with pytest.raises(ConfigError, match=f"group_size=48 is not in .* for {name}"):
        reference.quantize_stored(weight, wtype, 48)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rounded_activations(dtype):
    a = torch.randn(5, 64) * torch.tensor([1e-3, 1, 1e3, 0, 1])[:, None]
    codes, scales = reference.quantize_activations(a, dtype)
    assert codes.dtype == dtype and scales.shape == (5,)
    back = codes.float() * scales[:, None]
    assert bool(((back - a).norm(dim=1) <= 0.05 * a.norm(dim=1)).all())
    largest = 127 if dtype == torch.int8 else 448
    assert codes[[0, 1, 2, 4]].float().abs().amax(1).tolist() == [largest] * 4
