"""The sm_80 kernel's own text, executed on the CPU by tests/emulator, against float64."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from emulator.build import needs_emulator
from emulator.sm80 import Kernel, Problem, Sm80Library

from marlin_kernel import WEIGHT_TYPES
from marlin_kernel.sm80_configs import (
    Sm80Config,
    configs,
    kernel_types,
)
from marlin_kernel.validity import Combination, combinations, is_supported

pytestmark = needs_emulator

# Relative to the norm: the output's rounding, and in some kernels that of the scaled weights.
TOLERANCE = {"float16": 4e-4, "bfloat16": 3e-3}
# seed % 3: copies land late, at once, at random moments
SEEDS = (0, 1, 2)

# M, N, K, blocks: what each case is for
SHAPES = {
    "one tile": (1, 64, 64, 4),
    "several blocks per column": (15, 200, 448, 7),
    "several tiles per block": (16, 1090, 128, 2),
    "padding in K and N": (17, 301, 333, 3),
    "uneven stripes": (65, 520, 320, 5),
    "whole waves, then shared tiles": (130, 830, 192, 3),
}


def sample() -> list[tuple[Combination, Kernel]]:
    """Every row of the table and every valid triple of activation, weight and output types, in turn
    with the group sizes; act-order, shards and fp16 exchange once or twice each.
    """
    chosen: dict[Kernel, Combination] = {}

    def add(c: Combination, index: int, permuted: bool = False) -> None:
        types = kernel_types(c, permuted=permuted)
        rows = configs(types)
        chosen.setdefault(Kernel(rows[index % len(rows)], types), c)

    plain = Combination(WEIGHT_TYPES["uint4b8"])
    for i in range(len(configs(kernel_types(plain)))):
        add(replace(plain, group_size=(-1, 32, 64, 128)[i % 4]), i)
        b = replace(plain, activation="bfloat16", output="bfloat16")
        add(replace(b, group_size=(128, 64, 32, -1)[i % 4]), i)
    triples: dict[tuple[str, str, str], list[Combination]] = {}
    for c in combinations(reductions=("float32",)):
        if not c.act_order:
            triples.setdefault((c.activation, c.weight_type.name, c.output), []).append(c)
    for i, members in enumerate(triples.values()):
        if members[0].activation in ("int8", "float8_e4m3fn") and i % 2:
            continue  # the other output differs in the epilogue only
        for row in (0, -1) if i % 2 else (1, -2):
            add(members[(i - row) % len(members)], row)
    ordered = replace(plain, act_order=True, group_size=64)
    add(ordered, 0, permuted=True)
    add(replace(ordered, k_full=False), 1, permuted=True)
    add(replace(plain, reduction="float16", group_size=128), 3)
    add(replace(plain, reduction="float16", weight_type=WEIGHT_TYPES["float8_e4m3fn"]), 0)
    return [(c, kernel) for kernel, c in chosen.items()]


SAMPLE = sample()


@functools.cache
def library(weight_type: str) -> Sm80Library:
    """All sampled kernels of a weight type, in one build."""
    return Sm80Library([k for c, k in SAMPLE if c.weight_type.name == weight_type])


@functools.cache
def problem(c: Combination, m: int, n: int, k: int, alignment: int = 16) -> Problem:
    return Problem(c, m, n, k, alignment)


def name_of(value: object) -> str:
    if isinstance(value, Kernel):
        return f"tile{value.config.tile_m}x{value.config.tile_n}"
    return str(value)


@pytest.mark.parametrize(("c", "kernel"), SAMPLE, ids=name_of)
def test_matches_float64(c: Combination, kernel: Kernel) -> None:
    assert is_supported(c)
    build = library(c.weight_type.name)
    assert kernel.config.shared_bytes(kernel.types) == build.shared_bytes(kernel)
    ran = 0
    for case, (m, n, k, blocks) in SHAPES.items():
        if c.group_size >= k and c.k_full:
            continue  # a single group of K inputs is served as one scale per feature
        if kernel.types.permuted and m > 17:
            continue
        p, results = problem(c, m, n, k), []
        for seed in SEEDS if m < 65 else SEEDS[:1]:
            verdict, out = p.run(build, kernel, blocks, seed)
            assert verdict == "finished", f"{case}, seed {seed}: {verdict}"
            limit = TOLERANCE[c.output] * (2 if c.reduction == "float16" else 1)
            assert p.error(out) < limit, f"{case}, seed {seed}"
            results.append(out)
        assert all(torch.equal(results[0], other) for other in results), f"{case}: order of fibers"
        ran += 1
    assert ran >= 3


UINT4B8_G64 = Combination(WEIGHT_TYPES["uint4b8"], group_size=64)


@functools.cache
def second_row() -> tuple[Sm80Library, Kernel]:
    types = kernel_types(UINT4B8_G64)
    kernel = Kernel(configs(types)[1], types)
    return Sm80Library([kernel]), kernel


@pytest.mark.parametrize("alignment", [2, 4, 8, 16])
@pytest.mark.parametrize("k", [333, 334, 336])
def test_rows_of_any_alignment(alignment: int, k: int) -> None:
    build, kernel = second_row()
    p = problem(UINT4B8_G64, 17, 301, k, alignment)
    for seed in SEEDS:
        verdict, out = p.run(build, kernel, 3, seed)
        assert verdict == "finished"
        assert p.error(out) < TOLERANCE["float16"]


INVARIANT = [
    Combination(WEIGHT_TYPES[name], activation, output, group_size)
    for name, activation, output, group_size in (
        ("uint4b8", "float16", "float16", 64),
        ("uint4b8", "bfloat16", "bfloat16", -1),
        ("nvfp4", "bfloat16", "bfloat16", 16),
        ("uint8b128", "int8", "float16", 128),
    )
]


@pytest.mark.parametrize("c", INVARIANT, ids=str)
def test_batch_invariant_rows(c: Combination) -> None:
    """Row 0 has the same bits in every batch, tile shape and grid."""
    n, k, types = 300, 384, kernel_types(c)
    rows = configs(types, batch_invariant=True)
    build = Sm80Library([Kernel(row, types) for row in rows])
    first, results = Problem(c, 1, n, k), []
    for config in rows:
        for m, blocks in ((1, 5), (1, 64), (config.tile_m + 1, 3)):
            p = Problem(c, m, n, k)
            p.weights, p.bias = first.weights, first.bias
            p.a[0] = first.a[0]
            if first.token_scales is not None:
                p.token_scales[0] = first.token_scales[0]
            verdict, out = p.run(build, Kernel(config, types), blocks, m, batch_invariant=True)
            assert verdict == "finished"
            results.append(out[0])
    assert first.error(results[0][None]) < TOLERANCE[c.output]
    assert all(torch.equal(results[0], row) for row in results)


# What a careless edit may break: (header, text, replacement). Each must be noticed.
SM80_MUTATIONS = {
    "copies are not waited for": (
        "sm80/kernel.cuh",
        "ptx::cp_async_wait<Config::STAGES - 2>();",
        "",
    ),
    "one stage too few is waited for": (
        "sm80/kernel.cuh",
        "ptx::cp_async_wait<Config::STAGES - 2>();",
        "ptx::cp_async_wait<Config::STAGES - 1>();",
    ),
    "no barrier per stage": ("sm80/kernel.cuh", "ptx::block_sync();", ""),
    "the stage being read is refilled": (
        "sm80/kernel.cuh",
        "load_next(stage == 0 ? Config::STAGES - 1 : stage - 1);",
        "load_next(stage);",
    ),
    "no group is committed once the copies have run out": (
        "sm80/kernel.cuh",
        "      ahead.advance();\n    }\n    ptx::cp_async_commit();",
        "      ahead.advance();\n      ptx::cp_async_commit();\n    }",
    ),
    "no barrier between the warps' partial sums": ("sm80/reduce.cuh", "ptx::block_sync();", ""),
    "sums are added before the last block has arrived": (
        "sm80/reduce.cuh",
        "arrived != u.parts - 1",
        "arrived != u.parts - 2",
    ),
    "the counter is not reset": ("sm80/reduce.cuh", "*counter = 0;", ";"),
    "the next rows are staged while others are read": (
        "sm80/epilogue.cuh",
        "ptx::warp_sync();  // the lanes have read the rows staged before",
        "",
    ),
    "staged rows are read before they are complete": (
        "sm80/epilogue.cuh",
        "ptx::warp_sync();  // all lanes' elements are in place",
        "",
    ),
    "the padding of K is not zero-filled": (
        "sm80/load.cuh",
        "count = p_.k - k < Config::CHUNK ? p_.k - k : Config::CHUNK",
        "count = Config::CHUNK",
    ),
}
MUTANT = Kernel(
    Sm80Config(16, warps_m=1, warps_n=2, warps_k=2, tile_k=64, stages=3, scale_weights=False),
    kernel_types(UINT4B8_G64),
)


@functools.cache
def sm80_mutant(mutation: str | None) -> Sm80Library:
    return Sm80Library([MUTANT], SM80_MUTATIONS[mutation] if mutation else None)


def mutant_outcomes(mutation: str | None) -> list[str]:
    """What goes wrong, in each of several runs."""
    wrong = []
    for m, n, k, blocks in ((17, 301, 333, 3), (33, 256, 640, 5), (15, 200, 448, 7)):
        p = problem(UINT4B8_G64, m, n, k)
        for seed in range(6):
            verdict, out = p.run(sm80_mutant(mutation), MUTANT, blocks, seed)
            if verdict != "finished":
                wrong.append(verdict)
            elif not p.error(out) < TOLERANCE["float16"]:
                wrong.append("wrong result")
    return wrong


def test_sm80_unmutated_kernel_is_sound() -> None:
    assert mutant_outcomes(None) == []


@pytest.mark.parametrize("mutation", SM80_MUTATIONS)
def test_sm80_mutation_is_caught(mutation: str) -> None:
    assert mutant_outcomes(mutation)
