"""Three formats hold the same layer; readers accept what exists and reject the rest."""

from __future__ import annotations

import pytest
import torch

from marlin_kernel import FORMATS, INTEGER_TYPES, WEIGHT_TYPES, ConfigError, QuantizedLinear, Scheme
from marlin_kernel.errors import CheckpointError, NumericalError
from marlin_kernel.formats import LayerSpec, check_exportable, read, tensor_shapes, write
from marlin_kernel.layout import permute_columns, tile_order
from marlin_kernel.packing import pack, unpack
from marlin_kernel.schemes import quantization_config, scheme_of
from tests.cases import TYPED_SIZES, exportable, known_codes, random_layer, same_layer

U4B8, U4, U8 = (WEIGHT_TYPES[name] for name in ("uint4b8", "uint4", "uint8"))


@pytest.mark.parametrize(("k", "n", "wtype", "g"), TYPED_SIZES)
@pytest.mark.parametrize("act_order", [False, True])
def test_every_format_holds_the_same_layer(k, n, wtype, g, act_order):
    layer = random_layer(k, n, wtype, g, act_order=act_order, bias=True)
    weight = layer.dequantize()
    formats = [fmt for fmt in FORMATS if exportable(layer, fmt)]
    assert "marlin" in formats
    for fmt in formats:
        tensors = write(layer, fmt)
        expected = tensor_shapes(fmt, layer.spec)
        assert {s: tuple(t.shape) for s, t in tensors.items()} == {
            s: shape for s, (shape, _) in expected.items()
        }
        for suffix, (_, dtype) in expected.items():
            assert dtype in (None, tensors[suffix].dtype)
        back = read(tensors, fmt, layer.spec)
        assert same_layer(back, layer), fmt
        assert torch.equal(back.dequantize(), weight)


@pytest.mark.parametrize(("k", "n", "wtype", "g"), TYPED_SIZES)
def test_padding_weighs_exactly_zero(k, n, wtype, g):
    """Decode the padded tensors themselves, by the unpadded definition."""
    layer = random_layer(k, n, wtype, g)
    p = layer.spec.packed
    padded_spec = LayerSpec(p.k_padded, p.n_padded, wtype, p.k_padded // p.groups)
    padded = read(write(layer, "marlin"), "marlin", padded_spec).dequantize()
    assert torch.equal(padded[:k, :n], layer.dequantize())
    assert not padded[k:].any() and not padded[:, n:].any()
    scales = read(write(layer, "marlin"), "marlin", padded_spec).scales
    assert not scales[layer.spec.groups :].any() and not scales[:, n:].any()


def test_original_marlin_files_are_byte_identical():
    """K % 128 == 0, N % 256 == 0, g in {-1, 128}: exactly `B` and `s` of the original."""
    codes = known_codes()
    for group_size in (-1, 128):
        scales = torch.rand(1, 256).half()
        tensors = write(QuantizedLinear.of(codes, scales, U4B8, group_size), "marlin")
        assert set(tensors) == {"B", "s"}
        first = [w & 0xFFFFFFFF for w in tensors["B"][0, :4].tolist()]
        assert first == [0x3BB30880, 0x4CC41991, 0x5DD52AA2, 0x6EE63BB3]
        assert torch.equal(tensors["s"], permute_columns(scales, grouped=False))
    deep = random_layer(256, 256, U4B8, 128)
    tensors = write(deep, "marlin")
    assert tensors["B"].shape == (16, 512)
    assert torch.equal(tensors["s"], permute_columns(deep.scales, grouped=True))


def test_gptq_and_compressed_tensors_are_transposes():
    for wtype in (U4, U8):
        layer = random_layer(128, 64, wtype, 32)
        gptq = write(layer, "gptq", gptq_version=2)
        other = write(layer, "compressed-tensors")
        assert torch.equal(other["weight_packed"], gptq["qweight"].T)
        assert torch.equal(other["weight_scale"], gptq["scales"].T)
        assert torch.equal(other["weight_zero_point"], gptq["qzeros"].T)
        assert other["weight_shape"].tolist() == [64, 128]


@pytest.mark.parametrize(
    ("version", "bits", "word"),
    [(1, 4, 0x77777777), (2, 4, -0x77777778), (1, 8, 0x7F7F7F7F), (2, 8, -0x7F7F7F80)],
)
def test_symmetric_gptq_zeros(version, bits, word):
    wtype = U4B8 if bits == 4 else WEIGHT_TYPES["uint8b128"]
    layer = random_layer(64, 32, wtype, 32)
    tensors = write(layer, "gptq", gptq_version=version)
    assert (tensors["qzeros"] == word).all()
    # files exist that say v1 and hold v2 zeros
    for claimed in (1, 2):
        assert same_layer(read(tensors, "gptq", layer.spec, gptq_version=claimed), layer)


def test_symmetric_gptq_with_other_zeros_is_rejected():
    layer = random_layer(64, 32, U4B8, 32)
    tensors = write(layer, "gptq")
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], 0x66666666)
    with pytest.raises(CheckpointError, match='q_proj.*qzeros hold 6 where 7 or 8.*"sym": false'):
        read(tensors, "gptq", layer.spec, name="q_proj")


def test_asymmetric_gptq_versions_differ():
    layer = random_layer(64, 32, U4, 32)
    v1, v2 = (write(layer, "gptq", gptq_version=v) for v in (1, 2))
    assert ((v2["qzeros"] - v1["qzeros"]) == 0x11111111).all()
    assert same_layer(read(v1, "gptq", layer.spec, gptq_version=1), layer)
    assert same_layer(read(v2, "gptq", layer.spec, gptq_version=2), layer)
    # read as the wrong version, zero points are off by one: the config decides, not a guess
    wrong = read(v2, "gptq", layer.spec, gptq_version=1)
    assert not torch.equal(wrong.zeros, layer.zeros)


def test_gptq_v1_cannot_hold_a_zero_point_of_zero():
    layer = random_layer(64, 32, U4, 32)
    layer.zeros[1, 5] = 0
    with pytest.raises(ConfigError, match=r"zero point is 0.*gptq_version=2"):
        write(layer, "gptq")
    tensors = write(layer, "gptq", gptq_version=2)
    assert same_layer(read(tensors, "gptq", layer.spec, gptq_version=2), layer)
    assert same_layer(read(write(layer, "marlin"), "marlin", layer.spec), layer)


def test_gptq_reads_bfloat16_scales_and_lacking_g_idx():
    layer = random_layer(64, 32, U4B8, 32)
    scales = layer.scales.bfloat16()
    tensors = write(layer, "gptq") | {"scales": scales}
    del tensors["g_idx"]
    back = read(tensors, "gptq", layer.spec)
    assert torch.equal(back.scales.float(), scales.float())


def test_act_order_rows_are_sorted_by_group_in_marlin():
    layer = random_layer(128, 64, U4B8, 32, act_order=True)
    tensors = write(layer, "marlin")
    order = torch.argsort(layer.g_idx, stable=True)
    assert torch.equal(unpack(tensors["B"], U4B8), layer.codes[order])
    assert torch.equal(tensors["g_idx"], layer.g_idx)


def test_natural_index_is_dropped_or_kept_on_request():
    layer = random_layer(128, 64, U4B8, 32)
    index = torch.arange(128) // 32
    again = QuantizedLinear.of(layer.codes, layer.scales, U4B8, 32, g_idx=index)
    assert again.g_idx is None and "g_idx" not in write(again, "marlin")
    assert torch.equal(write(again, "marlin", act_order=True)["g_idx"], index.int())


def test_uneven_groups_cannot_be_marlin():
    layer = random_layer(64, 32, U4B8, 32)
    index = torch.arange(64) // 32
    index[0] = 1
    uneven = QuantizedLinear.of(layer.codes, layer.scales, U4B8, 32, g_idx=index)
    with pytest.raises(ConfigError, match="unevenly.*--format gptq"):
        write(uneven, "marlin")
    assert same_layer(read(write(uneven, "gptq"), "gptq", uneven.spec), uneven)


@pytest.mark.parametrize(
    ("fmt", "spec", "message"),
    [
        ("gptq", LayerSpec(96, 64, U4B8, 64), "group_size=64 does not divide the 96.*marlin"),
        ("compressed-tensors", LayerSpec(96, 64, U4B8, 64), "group_size=64 does not divide the 96"),
        ("gptq", LayerSpec(64, 60, U4B8, 64), "60 outputs do not fill"),
        ("compressed-tensors", LayerSpec(64, 64, U4B8, 32, True), "--format gptq, or --static"),
        ("compressed-tensors", LayerSpec(151, 64, U4B8, 151), "151 inputs do not fill.*marlin"),
        ("awq", LayerSpec(64, 64, U4B8, 32), "'awq' is not known; choose one of marlin, gptq"),
    ],
)
def test_formats_name_the_way_out(fmt, spec, message):
    with pytest.raises(ConfigError, match=message):
        check_exportable(fmt, spec)


def test_constructor_rejects_what_would_change_values():
    codes, scales = torch.zeros(64, 32, dtype=torch.uint8), torch.full((2, 32), 0.1).half()
    make = QuantizedLinear.of
    for value in (float("nan"), float("inf")):
        weight = torch.ones(64, 32)
        weight[5, 7] = value
        with pytest.raises(NumericalError, match=r"weight\[5, 7\] is (nan|inf)"):
            QuantizedLinear.quantize(weight, U4B8, 32)
    with pytest.raises(ConfigError, match=r"weight has shape \[64\]"):
        QuantizedLinear.quantize(torch.ones(64), U4B8, 32)
    with pytest.raises(ConfigError, match="g_idx spans 0..2, outside 0..1"):
        QuantizedLinear.of(
            torch.zeros(64, 32).int(), torch.ones(2, 32), U4B8, 32, g_idx=torch.arange(64) // 30
        )
    with pytest.raises(ConfigError, match="scales of dtype torch.float32 lose"):
        make(codes, torch.full((2, 32), 0.1), U4B8, 32)
    with pytest.raises(ConfigError, match="lose"):
        make(codes, torch.full((2, 32), float("nan")), U4B8, 32)
    with pytest.raises(ConfigError, match=r"scales is .*\[3, 32\].*needs torch.float16 \[2, 32\]"):
        make(codes, scales[[0, 1, 1]], U4B8, 32)
    with pytest.raises(ConfigError, match="needs zeros"):
        make(codes, scales, U4, 32)
    with pytest.raises(ConfigError, match="zeros span 7..7.*constant 8"):
        make(codes, scales, U4B8, 32, zeros=torch.full((2, 32), 7))
    with pytest.raises(ConfigError, match="fractions"):
        make(codes, scales, U4, 32, zeros=torch.full((2, 32), 7.5))
    with pytest.raises(ConfigError, match="zeros span 16..16"):
        make(codes, scales, U4, 32, zeros=torch.full((2, 32), 16))
    constant = make(codes, scales, U4B8, 32, zeros=torch.full((2, 32), 8.0))
    assert constant.zeros is None


def test_missing_and_misshapen_tensors_are_named():
    layer = random_layer(64, 32, U4B8, 32)
    tensors = write(layer, "marlin")
    with pytest.raises(CheckpointError, match="q_proj.s is missing"):
        read({"B": tensors["B"]}, "marlin", layer.spec, name="q_proj")
    with pytest.raises(CheckpointError, match=r"q_proj.s has shape \[1, 64\], expected \[2, 64\]"):
        read(tensors | {"s": tensors["s"][:1]}, "marlin", layer.spec, name="q_proj")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", INTEGER_TYPES)
@pytest.mark.parametrize("group_size", [-1, 64])
def test_quantization_config_round_trip(fmt, name, group_size):
    layer = random_layer(128, 64, WEIGHT_TYPES[name], group_size)
    scheme = Scheme(fmt, WEIGHT_TYPES[name], group_size, modules={"a.b": (128, 64)})
    tensors = write(layer, fmt)
    shapes = {f"a.b.{suffix}": tuple(tensor.shape) for suffix, tensor in tensors.items()}
    shapes["norm.weight"] = (64,)
    assert scheme_of(quantization_config(scheme), shapes) == scheme
    assert scheme.layer("a.b", bias=False) == layer.spec


def test_one_group_needs_no_index():
    scheme = Scheme("marlin", U4B8, 64, act_order=True, modules={"a": (64, 32), "b": (128, 32)})
    assert not scheme.layer("a", bias=False).act_order  # 64 inputs are one group
    assert scheme.layer("b", bias=False).act_order


def test_gptq_config_has_the_keys_that_servers_demand():
    config = quantization_config(Scheme("gptq", U4B8, 128))
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    expected |= {"sym": True, "checkpoint_format": "gptq", "lm_head": False}
    assert config.items() >= expected.items()
    v2 = quantization_config(Scheme("gptq", U4B8, 128, gptq_version=2))
    assert v2["checkpoint_format"] == "gptq_v2"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "aqlm"}, "'aqlm' cannot be read"),
        ({"quant_method": "gptq", "bits": 4}, "no tensor named"),
    ],
)
def test_unreadable_configs(config, message):
    with pytest.raises(CheckpointError, match=message):
        scheme_of(config, {"x.weight": (2, 2)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "wbits=3"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not read"),
        ({"dynamic": {"x": {"bits": 8}}}, "dynamic"),
        ({"group_size": None}, None),
    ],
)
def test_unreadable_gptq_options(changes, message):
    config = quantization_config(Scheme("gptq", U4B8, 32)) | changes
    if message is None:
        del config["group_size"]
        message = "lacks the key 'group_size'"
    with pytest.raises(CheckpointError, match=message):
        scheme_of(config, {"x.qweight": (8, 64)})


def test_unreadable_compressed_tensors_options():
    config = quantization_config(Scheme("compressed-tensors", U4B8, 32))
    weights = config["config_groups"]["group_0"]["weights"]
    shapes = {"x.weight_packed": (64, 8)}
    weights["actorder"] = "static"  # changes no byte
    assert scheme_of(config, shapes).group_size == 32
    weights["actorder"] = "group"
    with pytest.raises(CheckpointError, match="no group index"):
        scheme_of(config, shapes)


def test_marlin_config_must_agree_with_the_tensors():
    config = quantization_config(Scheme("marlin", U4B8, 32, modules={"a": (64, 64), "b": (64, 64)}))
    with pytest.raises(CheckpointError, match=r"lists 2 .* hold 1; they differ in \['b'\]"):
        scheme_of(config, {"a.B": (4, 128)})
    with pytest.raises(CheckpointError, match="format_version=2"):
        scheme_of(config | {"format_version": 2}, {"a.B": (4, 128), "b.B": (4, 128)})


@pytest.mark.parametrize("name", INTEGER_TYPES)
@pytest.mark.parametrize("group_size", [-1, 32])
def test_compressed_tensors_decodes_to_our_values(name, group_size):
    """The package's own decompression of our tensors, asymmetric types included."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    layer = random_layer(96, 48, WEIGHT_TYPES[name], group_size)
    config = quantization_config(Scheme("compressed-tensors", layer.weight_type, group_size))
    weights = QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    decoded = compressor.decompress(write(layer, "compressed-tensors"), scheme)["weight"]
    assert torch.equal(decoded, layer.dequantize(torch.float16).T)


def test_tile_order_of_both_widths_places_the_same_lane():
    """Both orders give a lane the same rows: 2 * (lane % 4) + {0, 1, 8, 9}."""
    for bits in (4, 8):
        rows = (tile_order(bits) // 64).view(32, -1)
        for lane in range(32):
            assert set(rows[lane].tolist()) == {2 * (lane % 4) + r for r in (0, 1, 8, 9)}


def test_eight_bits_in_marlin_order_by_definition():
    codes = torch.randint(0, 256, (16, 64))
    word = int(pack(codes, U8)[0, 8 * 5 + 3]) & 0xFFFFFFFF  # lane 5, j = 3
    k, n = 2 * (5 % 4), 8 * 3 + 5 // 4
    expected = [int(codes[k + r, n]) for r in (0, 8, 1, 9)]
    assert [word >> shift & 255 for shift in (0, 8, 16, 24)] == expected


# ---- formats that are read only, and types that are not integers --------------------------------


def awq_tensors(layer):
    """As AutoAWQ writes them: along outputs, in the order 0, 2, 4, 6, 1, 3, 5, 7."""

    def words(values):
        blocks = values.long().view(values.shape[0], -1, 8)
        packed = sum(blocks[:, :, c] << (4 * i) for i, c in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
        return torch.where(packed >= 2**31, packed - 2**32, packed).int()

    return {
        "qweight": words(layer.codes),
        "qzeros": words(layer.zeros),
        "scales": layer.scales,
    }


@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_awq(group_size):
    layer = random_layer(256, 72, U4, group_size)
    layer.zeros[0, 0] = 0  # stored as it is, unlike GPTQ v1
    tensors = awq_tensors(layer)
    shapes = {f"a.{suffix}": tuple(t.shape) for suffix, t in tensors.items()}
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True}
    scheme = scheme_of(config | {"version": "gemm"}, shapes)
    assert scheme == Scheme("awq", U4, group_size, modules={"a": (256, 72)})
    assert same_layer(read(tensors, "awq", scheme.layer("a", bias=False)), layer)
    for broken in ({"bits": 8}, {"zero_point": False}, {"version": "gemv"}):
        with pytest.raises(CheckpointError, match="AWQ files of bits=.* are not read"):
            scheme_of(config | broken, shapes)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_float4_of_compressed_tensors(name):
    wtype = WEIGHT_TYPES[name]
    k, n, g = 128, 24, wtype.group_sizes[0]
    layer = QuantizedLinear.quantize(torch.randn(k, n), wtype, g)
    codes = layer.codes.T.contiguous()
    tensors = {
        "weight_packed": codes[:, 0::2] | (codes[:, 1::2] << 4),
        "weight_scale": layer.scales.view(torch.uint8).T.contiguous().view(layer.scales.dtype),
    }
    if wtype.global_scale:
        tensors["weight_global_scale"] = 1 / layer.global_scale
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": g}
    groups = {"group_0": {"weights": weights, "input_activations": None}}
    config = {
        "quant_method": "compressed-tensors",
        "format": f"{name}-pack-quantized",
        "config_groups": groups,
    }
    scheme = scheme_of(config, {"a.weight_packed": tuple(tensors["weight_packed"].shape)})
    assert scheme == Scheme("compressed-tensors", wtype, g, modules={"a": (k, n)})
    again = read(tensors, "compressed-tensors", scheme.layer("a", bias=False))
    assert torch.equal(again.codes, layer.codes)
    torch.testing.assert_close(again.dequantize(), layer.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("wtype", WEIGHT_TYPES.values(), ids=lambda t: t.name)
@pytest.mark.parametrize(("k", "n"), [(128, 64), (200, 100), (12, 8)])
def test_every_type_in_our_format(k, n, wtype):
    for group_size in wtype.group_sizes:
        bias = torch.randn(n).half()
        layer = QuantizedLinear.quantize(torch.randn(k, n), wtype, group_size, bias)
        tensors = write(layer, "marlin")
        expected = tensor_shapes("marlin", layer.spec)
        assert {x: tuple(t.shape) for x, t in tensors.items()} == {
            x: shape for x, (shape, _) in expected.items()
        }
        assert all(tensors[x].dtype == dtype for x, (_, dtype) in expected.items() if dtype)
        assert same_layer(read(tensors, "marlin", layer.spec), layer)
        scheme = Scheme("marlin", wtype, group_size, modules={"a": (k, n)})
        shapes = {f"a.{suffix}": tuple(t.shape) for suffix, t in tensors.items()}
        assert scheme_of(quantization_config(scheme), shapes) == scheme
        if wtype.name not in INTEGER_TYPES:
            foreign = wtype.name in ("nvfp4", "mxfp4")
            for fmt in ("gptq", *(() if foreign else ("compressed-tensors",))):
                with pytest.raises(ConfigError, match="holds uint4b8.*not"):
                    write(layer, fmt)


def test_shard_of_an_act_order_layer():
    whole = random_layer(256, 40, U4B8, 32, act_order=True)
    parts = (whole.codes[:96], whole.scales, U4B8, 32)
    shard = QuantizedLinear.of(*parts, g_idx=whole.g_idx[:96], shard_groups=8)
    assert torch.equal(shard.dequantize(), whole.dequantize()[:96])
    assert same_layer(read(write(shard, "marlin"), "marlin", shard.spec), shard)
    with pytest.raises(ConfigError, match="not shards of K"):
        write(shard, "gptq")
