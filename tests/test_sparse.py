"""2:4 compression and the scaled products on the CPU."""

from __future__ import annotations

import pytest
import torch

from marlin_kernel import (
    formats,
    scaled_configs,
    sparse_configs,
    sparse_format,
    sparse_marlin,
    sparse_sm80,
)
from marlin_kernel.checkpoint import CheckpointWriter, convert, open_checkpoint
from marlin_kernel.errors import CheckpointError, ConfigError
from marlin_kernel.formats import QuantizedLinear
from marlin_kernel.scaled_mm import scaled_mm, scaled_sparse_mm
from marlin_kernel.schemes import Scheme, quantization_config, scheme_of
from marlin_kernel.sparse import (
    compress_2_4,
    decompress,
    metadata_shape,
    pack_metadata,
    positions_2_4,
    prune_2_4,
    unpack_metadata,
)
from marlin_kernel.sparse_configs import SparseDecodeConfig
from marlin_kernel.sparse_layer import SparseLayer
from marlin_kernel.weight_types import weight_type
from tests.compiling import REGISTERS, needs_nvrtc, own_cache, sass  # noqa: F401 (fixture)

FP8 = torch.float8_e4m3fn
SIZES = (128, 4, 2, 2, 2, 2, 3, 4)  # of the indices of a stored word
DTYPES = (torch.int8, FP8, torch.float16, torch.bfloat16, torch.float32)
SHAPES = ((1, 4), (3, 8), (64, 128), (65, 132), (200, 576))


def sparse_weight(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    w = torch.randn(n, k) * 3
    return prune_2_4(w).to(dtype)


# ---- compression ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, k", SHAPES)
def test_round_trip_is_exact(n: int, k: int, dtype: torch.dtype) -> None:
    w = sparse_weight(n, k, dtype)
    values, metadata = compress_2_4(w)
    assert values.shape == (n, -(-k // 32) * 16) and values.dtype == dtype
    assert tuple(metadata.shape) == metadata_shape(n, k) and metadata.dtype == torch.int32
    back = decompress(values, metadata, k)
    assert back.dtype == dtype and torch.equal(back.float(), w.float())


def test_all_patterns_survive() -> None:
    patterns = [[int(i >> j & 1) * (j + 1) for j in range(4)] for i in range(16)]
    allowed = torch.tensor([p for p in patterns if sum(map(bool, p)) <= 2], dtype=torch.int8)
    w = allowed[torch.randint(len(allowed), (70, 40))].reshape(70, 160)
    assert torch.equal(decompress(*compress_2_4(w), 160), w)


def test_negative_zero_counts_as_zero() -> None:
    w = torch.tensor([[-0.0, 1.0, -0.0, 2.0]]).to(FP8)
    assert positions_2_4(w).tolist() == [[[1, 3]]]


@pytest.mark.parametrize("dtype", (torch.int8, FP8, torch.float16), ids=str)
def test_first_offending_position_is_named(dtype: torch.dtype) -> None:
    w = sparse_weight(9, 64, torch.float32)
    w[3, 40:44] = 1.0
    w[5, 0:4] = 1.0
    with pytest.raises(ConfigError, match=r"w\[3, 40:44\] holds 4 nonzero values.*prune"):
        compress_2_4(w.to(dtype))


def test_sizes_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"\[2, 6\].*multiple of 4"):
        compress_2_4(torch.zeros(2, 6))
    values, metadata = compress_2_4(sparse_weight(64, 128, torch.int8))
    with pytest.raises(ConfigError, match="one compress_2_4 call"):
        decompress(values[:, :32], torch.cat([metadata, metadata], 1))
    with pytest.raises(ConfigError, match=r"k=129 is not in 1\.\.128"):
        decompress(values, metadata, 129)


def test_metadata_words() -> None:
    """The layout as documented, word by word."""
    assert pack_metadata(
        torch.tensor([1, 3], dtype=torch.uint8).expand(64, 32, 2)
    ).unique().tolist() == [-(2**32) + 0xDDDDDDDD]
    positions = positions_2_4(sparse_weight(100, 300, torch.float32))
    words = pack_metadata(positions)
    for thread, step, i in ((0, 0, 0), (1, 0, 3), (2, 1, 7), (37, 0, 5), (127, 1, 2)):
        warp, lane = divmod(thread, 32)
        feature = 64 + 16 * warp + 8 * (lane % 2) + lane // 4
        k = 128 + 64 * step + 32 * (lane // 2 % 2) + 4 * i
        nibble = int(words[1, 1, thread, step]) >> 4 * i & 15
        expected = 4
        if feature < 100 and k < 300:
            first, second = positions[feature, k // 4].tolist()
            expected = second << 2 | first
        assert nibble == expected
    assert torch.equal(unpack_metadata(words, 100, 300), positions)


def test_prune_keeps_the_largest_two() -> None:
    w = torch.tensor([[1.0, -4.0, 2.0, -3.0, 0.0, 0.0, 0.0, 5.0]])
    assert prune_2_4(w).tolist() == [[0, -4, 0, -3, 0, 0, 0, 5]]


# ---- products ----


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    if dtype == torch.int8:
        a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        return a, prune_2_4(torch.randint(-128, 128, (n, k)).float()).to(torch.int8)
    return torch.randn(m, k).to(dtype), prune_2_4(torch.randn(n, k)).to(dtype)


@pytest.mark.parametrize("dtype", (torch.int8, FP8), ids=str)
@pytest.mark.parametrize("out_dtype", (torch.bfloat16, torch.float16), ids=str)
def test_products_on_the_cpu(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    a, w = operands(5, 70, 132, dtype)
    values, metadata = compress_2_4(w)
    for scale_a in (torch.tensor(0.5), torch.rand(5, 1)):
        for scale_b in (torch.tensor([0.25]), torch.rand(1, 70) / 64):
            for bias in (None, torch.randn(70).to(out_dtype)):
                expected = a.double() @ w.double().t() * scale_a * scale_b
                if bias is not None:
                    expected = expected + bias
                common = scale_a, scale_b, out_dtype, bias
                dense = scaled_mm(a, w.t(), *common)
                assert dense.dtype == out_dtype and dense.shape == (5, 70)
                assert torch.equal(dense, scaled_sparse_mm(a, values, metadata, *common))
                error = (dense.double() - expected).norm() / expected.norm()
                assert error < (4e-3 if out_dtype == torch.bfloat16 else 5e-4)


def test_integer_sums_are_exact() -> None:
    a, w = operands(3, 64, 20000, torch.int8)
    one = torch.ones(1)
    out = scaled_mm(a, w.t(), one * 2**-12, one, torch.float16)
    assert torch.equal(out, ((a.long() @ w.long().t()).float() * 2**-12).half())


def test_empty_batch() -> None:
    a, w = operands(0, 64, 128, torch.int8)
    assert scaled_mm(a, w.t(), torch.ones(1), torch.ones(1), torch.float16).shape == (0, 64)


def wrong(message: str, **changes: object) -> None:
    a, w = operands(5, 64, 128, torch.int8)
    values, metadata = compress_2_4(w)
    one = torch.ones(1)
    arguments = {"a": a, "b": w.t(), "scale_a": one, "scale_b": one}
    sparse = "b_compressed" in changes or "b_meta" in changes
    if sparse:
        del arguments["b"]
        arguments |= {"b_compressed": values, "b_meta": metadata}
    arguments |= {"out_dtype": torch.float16, "bias": None, **changes}
    with pytest.raises(ConfigError, match=message):
        (scaled_sparse_mm if sparse else scaled_mm)(**arguments)


def test_errors_name_the_argument() -> None:
    wrong("a is torch.float16", a=torch.zeros(5, 128, dtype=torch.float16))
    wrong("a is torch.int8, b is torch.float8", b=torch.zeros(64, 128).to(FP8).t())
    wrong("column-major", b=torch.zeros(128, 64, dtype=torch.int8))
    wrong("do not belong together", b=torch.zeros(64, 100, dtype=torch.int8).t())
    wrong("scale_a is torch.float32 with 2 values", scale_a=torch.ones(2))
    wrong("scale_b is torch.float16", scale_b=torch.ones(1, dtype=torch.float16))
    wrong("out_dtype=torch.float32", out_dtype=torch.float32)
    wrong("bias is torch.float32", bias=torch.zeros(64))
    wrong("holds 160 inputs", b_compressed=torch.zeros(64, 80, dtype=torch.int8), b_meta=(
        torch.zeros(metadata_shape(64, 160), dtype=torch.int32)
    ))  # fmt: skip
    wrong("b_compressed|values", b_compressed=torch.zeros(64, 63, dtype=torch.int8))
    wrong("metadata is", b_meta=torch.zeros(1, 1, 128, 2))


@pytest.mark.parametrize("sparse", (False, True))
def test_operators_are_well_formed(sparse: bool) -> None:
    a, w = operands(4, 64, 128, torch.int8)
    common = torch.rand(4), torch.rand(64), torch.bfloat16, torch.randn(64).bfloat16()
    weights = compress_2_4(w) if sparse else (w.t(),)
    operator = scaled_sparse_mm if sparse else scaled_mm
    torch.library.opcheck(operator, (a, *weights, *common))


# ---- configurations ----


@pytest.mark.parametrize("sparse", (False, True))
def test_every_size_has_a_kernel(sparse: bool) -> None:
    supported = set(scaled_configs.supported_configs(sparse))
    assert len(supported) > 20
    for k in (4, 128, 576, 4096, 28672):
        for n in (1, 64, 200, 4096, 57344):
            for m in (1, 16, 17, 130, 1000, 8192):
                config = scaled_configs.select(m, n, k, sparse)
                assert config in supported and config.fits(-(-k // 128), sparse)


def test_tuned_rows_are_supported() -> None:
    for path in scaled_configs.TUNING_DIRECTORY.glob("*.json"):
        for (sparse, _, _), entries in scaled_configs._tuned(path.stem).items():
            known = set(scaled_configs.supported_configs(sparse))
            assert {config for _, config in entries} <= known


@needs_nvrtc
@pytest.mark.parametrize("sparse", (False, True))
@pytest.mark.parametrize("operand", ("float8_e4m3fn", "int8"))
def test_kernels_compile_without_spills(operand: str, sparse: bool, tmp_path) -> None:
    from marlin_kernel import compiler

    configs = scaled_configs.supported_configs(sparse)
    for config in configs[::6]:
        source = config.source(operand, "bfloat16", sparse)
        cubin = compiler.compile_kernel(source, "sm_90a")
        assert cubin.stack_bytes == 0, config
        assert cubin.registers * config.threads * config.blocks_per_sm <= REGISTERS
        assert "C7510" not in cubin.log and "C7512" not in cubin.log, cubin.log
    text = sass(cubin, tmp_path / "kernel.cubin")
    name = "QGMMA" if operand == "float8_e4m3fn" else "IGMMA"
    assert (f"{name}.SP" if sparse else name) in text
    assert "UTMALDG" in text and "LDL" not in text and "STL" not in text


# ---- the 2:4 Marlin format ----


def quantized(n: int, k: int, name: str, group_size: int) -> QuantizedLinear:
    w = prune_2_4(torch.randn(n, k)).T.contiguous()
    return QuantizedLinear.quantize(w, weight_type(name), group_size)


@pytest.mark.parametrize("name", sparse_format.SPARSE_TYPES)
@pytest.mark.parametrize("n, k, group_size", ((64, 128, -1), (100, 300, 64), (72, 576, 128)))
def test_format_round_trip(n: int, k: int, group_size: int, name: str) -> None:
    layer = quantized(n, k, name, group_size)
    tensors = formats.write(layer, "marlin-24")
    for suffix, (shape, dtype) in formats.tensor_shapes("marlin-24", layer.spec).items():
        assert tuple(tensors[suffix].shape) == shape and tensors[suffix].dtype == dtype
    back = formats.read(tensors, "marlin-24", layer.spec)
    assert torch.equal(back.codes, layer.codes) and torch.equal(back.scales, layer.scales)


@pytest.mark.parametrize("name", sparse_format.SPARSE_TYPES)
def test_format_words_are_where_the_docs_say(name: str) -> None:
    layer = quantized(100, 300, name, -1)
    tensors, bits = formats.write(layer, "marlin-24"), layer.weight_type.bits
    centred = layer.codes.T.int() - layer.weight_type.bias
    positions = positions_2_4(centred)
    kept = centred.unflatten(1, (-1, 4)).gather(2, positions.long()).flatten(1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        thread, s, u, v, e, row, tile, i = (
            int(torch.randint(high, (1,), generator=generator)) for high in SIZES
        )
        warp, lane = divmod(thread, 32)
        output = 64 * row + 16 * warp + lane // 4 + 8 * u
        column = 64 * tile + 16 * s + 2 * (lane % 4) + 8 * v + e
        word = tensors["B_24"][row, tile, thread, s if bits == 4 else 2 * s + u]
        shift = 4 * (v + 2 * u) + 16 * e if bits == 4 else 8 * (v + 2 * e)
        inside = output < 100 and column < 150
        expected = (int(kept[output, column]) if inside else 0) + layer.weight_type.bias
        assert int(word) >> shift & (layer.weight_type.levels - 1) == expected
        k = 128 * tile + 32 * (2 * (s % 2) + lane // 2 % 2) + 16 * (lane % 2) + 4 * i
        nibble = int(tensors["B_meta"][row, tile, thread, s % 2]) >> (16 * u + 4 * i) & 15
        inside = output < 100 and k < 300
        first, second = positions[output, k // 4].tolist() if inside else (0, 1)
        assert nibble == second << 2 | first


def test_format_refuses_what_it_cannot_hold() -> None:
    dense = QuantizedLinear.quantize(torch.randn(64, 64), weight_type("uint4b8"), -1)
    with pytest.raises(ConfigError, match=r"w\[0, 0:4\] holds [34] nonzero"):
        formats.write(dense, "marlin-24")
    zeros = QuantizedLinear.quantize(torch.randn(64, 64), weight_type("uint4"), -1)
    with pytest.raises(ConfigError, match="uint4; quantize with --sym"):
        formats.write(zeros, "marlin-24")


def test_scheme_round_trip() -> None:
    scheme = Scheme("marlin-24", weight_type("uint4b8"), 128, modules={"a.b": (256, 128)})
    config = quantization_config(scheme)
    assert config["quant_method"] == "marlin" and config["sparsity"] == "2:4"
    assert scheme_of(config, {"a.b.B_24": (2, 2, 128, 4), "a.b.s": (2, 128)}) == scheme
    with pytest.raises(CheckpointError, match="sparsity='1:4' is not read"):
        scheme_of({**config, "sparsity": "1:4"}, {"a.b.B_24": (2, 2, 128, 4)})


# ---- the layer and its kernels ----


def test_layer_on_the_meta_device_has_shapes() -> None:
    layer = SparseLayer.from_quantized(quantized(100, 300, "uint4b8", 128)).to("meta")
    assert layer(torch.zeros(2, 5, 300, device="meta")).shape == (2, 5, 100)
    with pytest.raises(ConfigError, match="do not end in the 300 inputs"):
        layer(torch.zeros(2, 299, device="meta"))


@pytest.mark.parametrize("group_size", (-1, 64))
def test_layer_multiplies_and_saves(group_size: int) -> None:
    q = quantized(100, 300, "uint4b8", group_size)
    layer = SparseLayer.from_quantized(q)
    stored = {name: t.clone() for name, t in layer.state_dict().items()}
    assert set(stored) == {"B_24", "B_meta", "s"}
    x = torch.randn(2, 3, 300)
    assert torch.allclose(layer.prepare(torch.float32)(x), x @ q.dequantize(), atol=1e-3)
    assert all(torch.equal(t, stored[name]) for name, t in layer.state_dict().items())
    assert torch.equal(layer.quantized().codes, q.codes)
    other = SparseLayer.from_quantized(quantized(100, 300, "uint4b8", group_size))
    other.load_state_dict(stored)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("bits, name", ((4, "uint4b8"), (8, "uint8b128")))
@pytest.mark.parametrize("group_size", (-1, 128))
def test_device_weights_round_trip(bits: int, name: str, group_size: int) -> None:
    q = quantized(100, 300, name, group_size)
    tensors = formats.write(q, "marlin-24")
    weights, scales = sparse_marlin.device_weights(*tensors.values(), group_size)
    assert weights.shape == (2, 3, sparse_configs.tile_bytes(bits, group_size))
    back = sparse_marlin.stored_weights(weights, scales, 100, q.weight_type, q.spec.groups)
    assert all(torch.equal(a, b) for a, b in zip(back, tensors.values(), strict=True))


@pytest.mark.parametrize("bits", (4, 8))
def test_every_sparse_size_has_a_kernel(bits: int) -> None:
    for group_size in sparse_configs.GROUP_SIZES:
        supported = set(sparse_configs.supported_configs(bits, group_size))
        for k in (128, 576, 28672):
            for n in (1, 200, 57344):
                for m in (1, 8, 9, 130, 8192):
                    config = sparse_configs.select(m, n, k, bits, group_size)
                    assert config.fits(m, -(-k // 128), bits, group_size)
                    assert config in supported or (bits, k, n) in sparse_configs._tuned("h200")


def test_tuned_sparse_rows_are_supported() -> None:
    for path in sparse_configs.TUNING_DIRECTORY.glob("*.json"):
        for (bits, _, _), entries in sparse_configs._tuned(path.stem).items():
            known = set(sparse_configs.supported_configs(bits, 128))
            assert {config for _, config in entries} <= known


@needs_nvrtc
@pytest.mark.parametrize("bits", (4, 8))
def test_sparse_kernels_compile_without_spills(bits: int, tmp_path) -> None:
    from marlin_kernel import compiler

    for number, config in enumerate(sparse_configs.supported_configs(bits, 128)):
        decodes = isinstance(config, SparseDecodeConfig)
        if number % (3 if decodes else 6):
            continue
        dtype = ("float16", "bfloat16")[number // 6 % 2]
        cubin = compiler.compile_kernel(config.source(dtype, bits, 128), "sm_90a")
        assert cubin.stack_bytes == 0, config
        assert cubin.registers * config.threads * config.blocks_per_sm <= REGISTERS
        assert "C7510" not in cubin.log and "C7512" not in cubin.log, cubin.log
        if number % 12 == 0:
            text = sass(cubin, tmp_path / "kernel.cubin")
            assert ("HMMA.SP" if decodes else "HGMMA.SP") in text and "UBLKCP" in text
            assert decodes or "UTMALDG" in text
            assert "LDL" not in text and "STL" not in text


@needs_nvrtc
@pytest.mark.parametrize("arch", ("sm_80", "sm_86", "sm_90a", "sm_120"))
def test_sparse_kernels_of_other_gpus_compile(arch: str, tmp_path) -> None:
    from marlin_kernel import compiler

    for number, config in enumerate(sparse_sm80.CONFIGS):
        dtype = (torch.float16, torch.bfloat16)[number % 2]
        bits = (4, 8)[number // 2]
        assert config.storage_bytes(8, 128) <= 99 * 1024
        cubin = compiler.compile_kernel(config.source(dtype, bits, 128), arch)
        assert cubin.stack_bytes == 0 and cubin.registers * config.threads <= REGISTERS
    text = sass(cubin, tmp_path / "kernel.cubin")
    assert "HMMA.SP.16832.F32" in text and "LDGSTS" in text and "LDL" not in text
    assert sparse_sm80.select(1).tokens == 8 and sparse_sm80.select(1000).tokens == 64


def test_checkpoints_convert_both_ways(tmp_path) -> None:
    scheme = Scheme("marlin-24", weight_type("uint4b8"), 64)
    layer = quantized(128, 256, "uint4b8", 64)
    with CheckpointWriter(tmp_path / "sparse", scheme) as writer:
        writer.add_layer("a.b", layer)
        writer.finish({})
    convert(tmp_path / "sparse", tmp_path / "gptq", "gptq")
    convert(tmp_path / "gptq", tmp_path / "back", "marlin-24")
    first, last = open_checkpoint(tmp_path / "sparse"), open_checkpoint(tmp_path / "back")
    assert set(first) == set(last) == {"a.b.B_24", "a.b.B_meta", "a.b.s"}
    assert all(torch.equal(first[name], last[name]) for name in first)
