"""Packing is exact, and equals the order that the layout derives code by code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import marlin_kernel
from marlin_kernel import INTEGER_TYPES, ConfigError, pack, unpack, weight_type
from marlin_kernel.layout import (
    packed_shape,
    permute_columns,
    scale_order,
    tile_order,
    unpermute_columns,
)
from marlin_kernel.packing import pack_rows, unpack_rows
from tests.cases import known_codes

BITS = {4: weight_type("uint4b8"), 8: weight_type("uint8b128")}


def hexadecimal(words: torch.Tensor) -> list[str]:
    return [f"{w & 0xFFFFFFFF:08x}" for w in words.flatten().tolist()]


def test_known_answer_vector():
    codes = known_codes()
    words = pack(codes, BITS[4])
    assert words.shape == (8, 512)
    assert hexadecimal(words[0, :4]) == ["3bb30880", "4cc41991", "5dd52aa2", "6ee63bb3"]
    assert hexadecimal(words[7, 511]) == ["7ff74cc4"]
    rows = pack_rows(
        codes.T, 4
    )  # compressed-tensors' weight_packed; its transpose is GPTQ's qweight
    assert hexadecimal(rows[:2, 0]) == ["52fc9630", "a741eb85"]
    assert hexadecimal(rows[255, 15]) == ["741eb852"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(16, 64), (64, 128), (576, 192)])
def test_pack_is_the_tile_order_and_unpack_inverts_it(bits, shape):
    wtype = BITS[bits]
    codes = torch.randint(0, wtype.levels, shape, dtype=torch.uint8)
    words = pack(codes, wtype)
    k, n = shape
    tiles = codes.view(k // 16, 16, n // 64, 64).transpose(1, 2).reshape(-1, 1024)
    fields = tiles[:, tile_order(bits)].reshape(-1, 32 // bits).long()
    expected = (fields << torch.arange(0, 32, bits)).sum(1)
    assert torch.equal(words.flatten().long() & 0xFFFFFFFF, expected)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert torch.equal(unpack(words, wtype), codes)


@pytest.mark.parametrize("bits", BITS)
def test_tile_order_is_a_permutation_of_the_tile(bits):
    assert tile_order(bits).sort().values.equal(torch.arange(1024))


@pytest.mark.parametrize("bits", BITS)
def test_drawing_in_the_documentation(bits):
    """FORMAT.md draws "lane.field" of every cell; word j repeats it to the right."""
    blocks = Path(marlin_kernel.__file__).with_name("FORMAT.md").read_text().split("```")
    drawing = next(b for b in blocks[blocks_after(blocks, f"### {bits} bits") :] if "n    0" in b)
    rows = [line.split()[2:] for line in drawing.strip().splitlines()[1:]]
    fields, columns = 32 // bits, len(rows[0])
    assert (len(rows), columns) == (16, 64 * fields // 32)
    order = tile_order(bits).view(32, -1, fields)
    for k, row in enumerate(rows):
        for n, cell in enumerate(row):
            lane, field = map(int, cell.split("."))
            for j in range(64 // columns):
                assert int(order[lane, j, field]) == 64 * k + columns * j + n


def blocks_after(blocks: list[str], heading: str) -> int:
    return next(i for i, block in enumerate(blocks) if heading in block)


def test_pack_accepts_any_integer_dtype_and_strides():
    codes = torch.randint(0, 16, (64, 32))
    expected = pack(codes.T.contiguous().to(torch.uint8), BITS[4])
    assert torch.equal(pack(codes.T, BITS[4]), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 7, 8, 33, 64])
def test_rows_round_trip_with_zero_fill(bits, columns):
    values = torch.randint(0, 1 << bits, (5, columns))
    words = pack_rows(values, bits)
    assert words.shape == (5, -(-columns * bits // 32))
    assert torch.equal(unpack_rows(words, bits, columns), values.to(torch.uint8))
    whole = unpack_rows(words, bits, words.shape[1] * 32 // bits)
    assert not whole[:, columns:].any()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(15, 64, dtype=torch.uint8), r"\[15, 64\]"),
        (torch.zeros(16, 63, dtype=torch.uint8), r"\[16, 63\]"),
        (torch.full((16, 64), 16), "span 16..16, outside 0..15"),
        (torch.full((16, 64), -1), "span -1..-1"),
        (torch.zeros(16, 64), "float32"),
    ],
)
def test_pack_rejects_what_it_cannot_hold(codes, message):
    with pytest.raises(ConfigError, match=message):
        pack(codes, BITS[4])


def test_unpack_rejects_part_of_a_tile():
    for words in (torch.zeros(4, 128), torch.zeros(4, 128).long(), torch.zeros(128).int()):
        with pytest.raises(ConfigError, match=rf"words are {words.dtype} .*128\]; .* int32 \["):
            unpack(words, BITS[4])
    with pytest.raises(ConfigError, match=r"\[1, 16, 64\].* \[K, N\]"):
        pack(torch.zeros(1, 16, 64, dtype=torch.uint8), BITS[4])
    with pytest.raises(ConfigError, match="100"):
        unpack(torch.zeros(1, 100, dtype=torch.int32), BITS[4])


@pytest.mark.parametrize("grouped", [True, False])
def test_scale_columns_round_trip(grouped):
    scales = torch.randn(3, 192)
    stored = permute_columns(scales, grouped)
    assert torch.equal(unpermute_columns(stored, grouped), scales)
    assert not torch.equal(stored, scales)
    assert scale_order(grouped).sort().values.equal(torch.arange(64 if grouped else 32))


def test_scale_columns_as_documented():
    columns = torch.arange(64.0)[None]
    grouped = permute_columns(columns, True)[0].tolist()
    assert all(grouped[8 * i + j] == i + 8 * j for i in range(8) for j in range(8))
    single = permute_columns(columns, False)[0].tolist()
    offsets = (0, 1, 8, 9, 16, 17, 24, 25)
    assert all(single[8 * i + t] == 2 * i + o for i in range(4) for t, o in enumerate(offsets))


@pytest.mark.parametrize(
    ("k", "n", "g", "expected"),
    [
        (128, 256, 128, (128, 256, 1)),
        (576, 192, 64, (576, 192, 9)),
        (576, 192, 128, (640, 192, 5)),
        (576, 192, -1, (576, 192, 1)),
        (100, 72, 32, (128, 128, 4)),
        (100, 72, -1, (128, 128, 1)),
        (24, 8, 128, (64, 64, 1)),
    ],
)
def test_padding_rule(k, n, g, expected):
    shape = packed_shape(k, n, g)
    assert (shape.k_padded, shape.n_padded, shape.groups) == expected


def test_group_size_that_no_type_allows():
    with pytest.raises(ConfigError, match=r"group_size=96 is not in .* -1 means"):
        packed_shape(192, 64, 96)


def test_weight_type_names():
    assert list(INTEGER_TYPES) == ["uint4b8", "uint4", "uint8b128", "uint8"]
    with pytest.raises(ConfigError, match="'int5'.*uint4b8"):
        weight_type("int5")
