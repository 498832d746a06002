"""The sm_80 kernel compiles for every GPU family it serves: registers, spills, SASS."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlin_kernel import compiler
from marlin_kernel.compiler import Cubin, KernelSource
from marlin_kernel.repack import kernel_source
from marlin_kernel.sm80_configs import (
    SHARED_LIMITS,
    KernelTypes,
    Sm80Config,
    all_kernel_types,
    configs,
    kernels,
    select_config,
)
from marlin_kernel.validity import ARCHITECTURES
from tests.compiling import REGISTERS, needs_nvrtc, own_cache, sass  # noqa: F401 (fixture)

pytestmark = needs_nvrtc
CAPABILITY = {arch: capability for capability, arch in ARCHITECTURES.items()}


def check(config: Sm80Config, types: KernelTypes, arch: str) -> Cubin:
    """Compile; assert that nothing spills and that the blocks meant to share an SM can."""
    cubin = compiler.compile_kernel(config.source(types), arch)
    assert cubin.stack_bytes == 0, f"{config} {types} spills {cubin.stack_bytes} B for {arch}"
    assert cubin.registers * config.threads * config.blocks_per_sm <= REGISTERS
    return cubin


def name_of(value: object) -> str:
    if isinstance(value, Sm80Config):
        return f"tile{value.tile_m}x{value.tile_n}s{value.stages}"
    return str(value)


def sampled(arch: str) -> list[tuple[KernelTypes, Sm80Config]]:
    """One kernel of every third pair of types, another third for each architecture.

    The exhaustive test compiles everything.
    """
    pairs: dict[tuple[str, str], list[tuple[KernelTypes, Sm80Config]]] = {}
    for types, row in kernels(CAPABILITY[arch]):
        pairs.setdefault((types.weight_type, types.activation), []).append((types, row))
    turn = list(ARCHITECTURES.values()).index(arch)
    largest = {pair: members[-1 - 7 * turn % len(members)] for pair, members in pairs.items()}
    return list(largest.values())[turn % 3 :: 3]


@pytest.mark.parametrize("arch", ARCHITECTURES.values())
def test_no_spills(arch: str) -> None:
    for types, row in sampled(arch):
        check(row, types, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89"])
def test_every_row_of_the_commonest_type(arch: str) -> None:
    types = KernelTypes()
    for row in configs(types):
        if row.shared_bytes(types) <= SHARED_LIMITS[arch]:
            check(row, types, arch)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ARCHITECTURES.values())
def test_every_specialisation(arch: str) -> None:
    work = [(row.source(types), arch) for types, row in kernels(CAPABILITY[arch])]
    for i, cubin in compiler.compile_all(work, 2):
        assert not isinstance(cubin, Exception), cubin
        assert cubin.stack_bytes == 0, work[i]
    for types, row in kernels(CAPABILITY[arch]):
        check(row, types, arch)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_preparation_of_activations_compiles(arch: str) -> None:
    header = "sm80/activations.cuh"
    for expression in ("gather_activations<8>", "quantize_activations<__half, int8_t>"):
        cubin = compiler.compile_kernel(KernelSource(header, f"sm80::{expression}"), arch)
        assert cubin.stack_bytes == 0
    fp8 = "sm80::quantize_activations<__nv_bfloat16, float8_e4m3>"
    assert compiler.compile_kernel(KernelSource(header, fp8), "sm_90a").stack_bytes == 0


@pytest.mark.parametrize("arch", ["sm_75", "sm_90a"])
def test_repacking_compiles(arch: str) -> None:
    for source, bits in (("gptq", 4), ("awq", 4), ("compressed-tensors", 8)):
        for permuted in (False, source != "awq"):
            cubin = compiler.compile_kernel(kernel_source(source, bits, permuted), arch)
            assert cubin.stack_bytes == 0


@pytest.mark.parametrize("arch", ARCHITECTURES.values())
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_selection_fits_the_gpu(arch: str, batch_invariant: bool) -> None:
    for types in all_kernel_types(CAPABILITY[arch]):
        tiles = []
        for m in (*range(1, 132), 299, 100000):
            config = select_config(m, types, SHARED_LIMITS[arch], batch_invariant)
            assert config.shared_bytes(types) <= SHARED_LIMITS[arch]
            assert config in configs(types, batch_invariant)
            tiles.append(config.tile_m)
        assert tiles[0] == 8 and tiles == sorted(tiles)


def test_tensor_cores_and_asynchronous_copies(tmp_path: Path) -> None:
    types = KernelTypes()
    text = sass(check(configs(types)[0], types, "sm_80"), tmp_path / "kernel.cubin")
    assert "HMMA.16816.F32" in text and "LDGSTS" in text and "LDSM" in text
    assert "LDL" not in text and "STL" not in text
    types = KernelTypes(activation="int8")
    text = sass(check(configs(types)[0], types, "sm_80"), tmp_path / "kernel.cubin")
    assert "IMMA.16832.S8.S8" in text
    types = KernelTypes(sm75=True)
    text = sass(check(configs(types)[0], types, "sm_75"), tmp_path / "kernel.cubin")
    assert "HMMA.1688.F32" in text and "LDGSTS" not in text
