"""Layer: packing, the two forms of its buffers, moves, and replacement inside a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from marlin_kernel import (
    INTEGER_TYPES,
    WEIGHT_TYPES,
    ConfigError,
    Layer,
    QuantizedLinear,
    reference,
    replace_linear,
)
from marlin_kernel.formats import write
from tests.cases import TYPED_SIZES, random_layer, same_layer

U4B8, U4 = WEIGHT_TYPES["uint4b8"], WEIGHT_TYPES["uint4"]


def states_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


@pytest.mark.parametrize(("k", "n", "wtype", "g"), TYPED_SIZES)
@pytest.mark.parametrize("act_order", [False, True])
def test_both_forms_multiply_alike_and_save_alike(k, n, wtype, g, act_order):
    quantized = random_layer(k, n, wtype, g, act_order=act_order, bias=True)
    layer = Layer.from_quantized(quantized)
    assert same_layer(layer.quantized(), quantized)
    stored = {name: t.clone() for name, t in layer.state_dict().items()}
    assert states_equal(stored, write(quantized, "marlin"))
    x = torch.randn(4, k)
    expected = reference.matmul(x, quantized.dequantize(), quantized.bias)
    assert (layer(x) - expected).norm() < 1e-6 * expected.norm()
    layer.prepare()
    assert layer.layout == "codes" and not hasattr(layer, "B")
    assert (layer(x) - expected).norm() < 1e-6 * expected.norm()
    assert states_equal(layer.state_dict(), stored)
    assert same_layer(layer.quantized(), quantized)
    layer.unprepare()
    assert layer.layout is None and not hasattr(layer, "weights")
    assert states_equal(layer.state_dict(), stored)


def test_prepared_layer_holds_one_copy():
    layer = Layer.from_quantized(random_layer(128, 256, U4B8, 32)).prepare()
    held = sum(t.numel() * t.element_size() for t in layer.buffers())
    assert held == 128 * 256 + 4 * 256 * 2  # one byte per code, fp16 scales


@pytest.mark.parametrize("prepared", [False, True])
def test_state_dict_loads_into_either_form(prepared):
    source = Layer.from_quantized(random_layer(96, 64, U4, 32, act_order=True, bias=True)).prepare()
    target = Layer(96, 64, 32, True, "uint4", True, dtype=torch.float16)
    if prepared:
        target.prepare()
    target.load_state_dict(source.state_dict())
    assert (target.layout == "codes") == prepared
    x = torch.randn(3, 96)
    assert torch.allclose(target(x), source(x), atol=1e-6)
    assert states_equal(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scales_never_change_dtype(prepared, dtype):
    layer = Layer.from_quantized(random_layer(96, 64, U4, 32, bias=True))
    before = layer.state_dict()["s"].clone()
    if prepared:
        layer.prepare()
    layer.to(dtype)
    assert layer.bias.dtype == dtype
    assert (layer.layout == "codes") == prepared
    assert torch.equal(layer.state_dict()["s"], before)
    assert layer.state_dict()["s"].dtype == torch.float16


def test_prepared_for_a_dtype_follows_the_module():
    layer = Layer.from_quantized(random_layer(96, 64, U4B8, 32)).prepare(torch.float16)
    weights = layer.weights
    layer.to(torch.float16)
    assert layer.weights is weights  # nothing to convert
    layer.to(torch.bfloat16)
    assert layer._dtype == torch.bfloat16 and layer.weights is not weights


def test_moves_between_devices():
    quantized = random_layer(96, 64, U4B8, 32, bias=True)
    layer = Layer.from_quantized(quantized).prepare()
    layer.to("meta")
    assert layer.layout is None or layer.weights.is_meta
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    empty = Layer(96, 64, 32, bias=True, device="meta")
    empty.to_empty(device="cpu")
    empty.load_state_dict(write(quantized, "marlin"))
    assert same_layer(empty.quantized(), quantized)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moves_to_the_gpu_and_back(dtype):
    quantized = random_layer(256, 256, U4B8, 128, bias=True)
    layer = Layer.from_quantized(quantized).prepare(dtype)
    x = torch.randn(3, 256, dtype=dtype)
    expected = layer(x)
    layer.to("cuda")
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=2e-2, atol=2e-2)
    assert same_layer(layer.to("cpu").quantized(), quantized)


def test_deepcopy_and_pickle(tmp_path):
    layer = Layer.from_quantized(random_layer(96, 64, U4B8, 32)).prepare()
    x = torch.randn(2, 96)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    torch.save(layer, tmp_path / "layer.pt")
    again = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert torch.equal(again(x), layer(x))


def test_compiles_as_one_graph():
    quantized = random_layer(96, 64, U4B8, 32, act_order=True, bias=True)
    model = nn.Sequential(Layer.from_quantized(quantized).prepare(), nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for shape in ((3, 96), (5, 96), (2, 4, 96)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["uint4b8", "uint4", "nvfp4"])
def test_exports(name, bias, prepared, tmp_path):
    wtype = WEIGHT_TYPES[name]
    group_size = 16 if name == "nvfp4" else 32
    weight, own_bias = torch.randn(96, 64), torch.randn(64) if bias else None
    layer = Layer.from_quantized(QuantizedLinear.quantize(weight, wtype, group_size, own_bias))
    if prepared:
        layer.prepare(torch.float32)
    x = torch.randn(3, 96)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("m")},))
    torch.export.save(program, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    assert torch.equal(again(x), layer(x))
    assert again(torch.randn(7, 96)).shape == (7, 64)


def test_constructor_follows_the_original():
    layer = Layer(256, 512, 128)
    assert layer.B.shape == (16, 1024) and layer.s.shape == (2, 512) and layer.bias is None
    assert set(layer.state_dict()) == {"B", "s"}
    assert not layer(torch.randn(2, 256)).any()  # a new layer weighs nothing
    assert not list(layer.parameters())
    with pytest.raises(ConfigError, match="group_size=96"):
        Layer(256, 512, 96)
    with pytest.raises(ConfigError, match="weight_type='int4'"):
        Layer(256, 512, weight_type="int4")
    for k, n in ((0, 512), (256, 0), (-1, 512), (256, -1)):
        with pytest.raises(ConfigError, match=f"{k} inputs and {n} outputs; .* at least one"):
            Layer(k, n)
    assert "group_size=128, weight_type=uint4b8" in repr(layer)


# ---- pack ----------------------------------------------------------------------------------------


def linear_of(quantized, dtype=torch.float32):
    k, n = quantized.codes.shape
    linear = nn.Linear(k, n, bias=quantized.bias is not None)
    linear.weight.data = quantized.dequantize(dtype).T.contiguous()
    if quantized.bias is not None:
        linear.bias.data = quantized.bias.clone()
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", INTEGER_TYPES)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_pack_recovers_the_codes(dtype, name, act_order, transposed):
    wtype = WEIGHT_TYPES[name]
    quantized = random_layer(96, 40, wtype, 32, act_order=act_order, bias=True)
    layer = Layer(96, 40, 32, bias=True, weight_type=name, act_order=act_order)
    scales, zeros = quantized.scales, quantized.zeros
    if transposed:  # [N, G], as the original has it
        scales, zeros = scales.T, None if zeros is None else zeros.T
    layer.pack(linear_of(quantized, dtype), scales, zeros, quantized.g_idx)
    assert same_layer(layer.quantized(), quantized)


def test_pack_names_the_weight_that_is_off_the_grid():
    quantized = random_layer(96, 40, U4B8, 32)
    linear = linear_of(quantized)
    step = float(quantized.scales[1, 7])
    linear.weight.data[7, 50] += 0.3 * step
    with pytest.raises(ConfigError, match=r"linear.weight\[7, 50\] = .* lies 0.3 steps from the"):
        Layer(96, 40, 32).pack(linear, quantized.scales)
    linear = linear_of(quantized)
    linear.weight.data[3, 2] = 9 * float(quantized.scales[0, 3])  # 9 steps: beyond code 15 - 8
    with pytest.raises(ConfigError, match=r"linear.weight\[3, 2\].* lies 2 steps"):
        Layer(96, 40, 32).pack(linear, quantized.scales)
    linear.weight.data[3, 2] = float("nan")
    with pytest.raises(ConfigError, match="linear.weight"):
        Layer(96, 40, 32).pack(linear, quantized.scales)


def test_pack_rejects_what_does_not_fit_the_layer():
    quantized = random_layer(96, 40, U4B8, 32, bias=True)
    with pytest.raises(ConfigError, match="pass bias=True"):
        Layer(96, 40, 32).pack(linear_of(quantized), quantized.scales)
    with pytest.raises(ConfigError, match=r"scales have shape \[3, 41\], expected \[3, 40\]"):
        Layer(96, 40, 32).pack(linear_of(quantized), torch.ones(3, 41))
    with pytest.raises(
        ConfigError, match=r"linear.weight has shape \[40, 64\], the layer \[40, 96\]"
    ):
        Layer(96, 40, 32).pack(nn.Linear(64, 40), torch.ones(3, 40))
    moved = random_layer(96, 40, U4B8, 32, act_order=True)
    with pytest.raises(ConfigError, match=r"g_idx has shape \[95\]"):
        Layer(96, 40, 32, act_order=True).pack(
            linear_of(moved), moved.scales, None, moved.g_idx[:95]
        )
    with pytest.raises(ConfigError, match="make it with act_order"):
        Layer(96, 40, 32).pack(linear_of(moved), moved.scales, None, moved.g_idx)


# ---- replace_linear ------------------------------------------------------------------------------


def test_replace_linear_by_names_and_by_predicate():
    def model():
        return nn.ModuleDict(
            {"a": nn.Sequential(nn.Linear(64, 32), nn.ReLU()), "b": nn.Linear(32, 64, bias=False)}
        )

    by_name = model()
    assert replace_linear(by_name, ["a.0"], 32) == ["a.0"]
    assert isinstance(by_name["a"][0], Layer) and isinstance(by_name["b"], nn.Linear)
    assert by_name["a"][0].bias.shape == (32,)
    by_rule = model()
    chosen = replace_linear(by_rule, lambda name, linear: linear.bias is None, -1, "uint8")
    assert chosen == ["b"] and by_rule["b"].spec.weight_type.name == "uint8"
    with pytest.raises(ConfigError, match=r"\['a.1'\] are not torch.nn.Linear"):
        replace_linear(model(), ["a.1"])
    with pytest.raises(ConfigError, match="the module itself"):
        replace_linear(nn.Linear(64, 32), lambda name, linear: True)


# ---- types that are not integers, 8-bit activations, shards of K ---------------------------------

OTHER_TYPES = [t for t in WEIGHT_TYPES.values() if t.name not in INTEGER_TYPES]


@pytest.mark.parametrize("wtype", OTHER_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize(("k", "n"), [(128, 64), (200, 100)])
def test_other_types_in_both_forms(k, n, wtype):
    for group_size in wtype.group_sizes:
        quantized = QuantizedLinear.quantize(
            torch.randn(k, n) / k**0.5, wtype, group_size, torch.randn(n).half()
        )
        layer = Layer.from_quantized(quantized)
        x = torch.randn(3, k)
        expected = reference.matmul(x, quantized.dequantize(), quantized.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        before = {name: t.clone() for name, t in layer.state_dict().items()}
        torch.testing.assert_close(layer.prepare()(x), expected, rtol=1e-4, atol=1e-4)
        layer.bfloat16()  # scales, zero points and codes keep their dtypes
        after = layer.state_dict()
        assert before.keys() == after.keys()
        for name in before.keys() - {"bias"}:
            assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
        empty = Layer(k, n, group_size, bias=True, weight_type=wtype.name)
        empty.load_state_dict(before)
        assert same_layer(empty.quantized(), quantized)


@pytest.mark.parametrize("activation", ["int8", "float8_e4m3fn"])
def test_rounded_activations(activation):
    weight = torch.randn(96, 40) / 10
    quantized = QuantizedLinear.quantize(weight, U4B8, 32)
    plain = Layer.from_quantized(quantized).prepare()
    layer = Layer(96, 40, 32, weight_type="uint4b8", activation=activation)
    layer.load_state_dict(plain.state_dict())
    layer.prepare()
    x = torch.randn(2, 3, 96)
    error = float((layer(x) - plain(x)).norm() / plain(x).norm())
    assert 1e-3 < error < 0.05 and layer(x).shape == (2, 3, 40)


def test_what_no_kernel_can_do_is_named():
    with pytest.raises(ConfigError, match=r"group_size=128 is not in \(16,\) for nvfp4"):
        Layer(256, 64, 128, weight_type="nvfp4")
    with pytest.raises(ConfigError, match="uint8 is not multiplied with int8"):
        Layer(256, 64, 128, weight_type="uint8", activation="int8")
    with pytest.raises(ConfigError, match="act_order with int8 activations"):
        Layer(256, 64, 128, act_order=True, activation="int8")
    with pytest.raises(ConfigError, match="act_order with zero points"):
        Layer(256, 64, 128, act_order=True, weight_type="uint4", shard_groups=4)


def test_shard_of_an_act_order_layer():
    """Two shards of K add up to the whole layer, whatever groups their inputs belong to."""
    whole = random_layer(256, 40, U4B8, 32, act_order=True)
    x, parts = torch.randn(3, 256), []
    for rows in (slice(0, 96), slice(96, 256)):
        shard = QuantizedLinear.of(
            whole.codes[rows],
            whole.scales,
            U4B8,
            32,
            g_idx=whole.g_idx[rows],
            shard_groups=whole.scales.shape[0],
        )
        assert not shard.spec.k_full
        layer = Layer.from_quantized(shard)
        assert same_layer(layer.quantized(), shard)
        with pytest.raises(ConfigError, match="after prepare"):
            layer(x[:, rows])
        parts.append(layer.prepare()(x[:, rows]))
        with pytest.raises(ConfigError, match="cannot be restored"):
            layer.state_dict()
    torch.testing.assert_close(sum(parts), reference.matmul(x, whole.dequantize()))
