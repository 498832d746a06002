"""The sm_80 kernel compiles for every GPU family it serves: registers, spills, SASS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marlin_kernel import compiler
from marlin_kernel.compiler import Cubin
from marlin_kernel.sm80_configs import CONFIGS, SCALARS, Sm80Config, select_config
from tests.compiling import REGISTERS, needs_nvrtc, own_cache, sass  # noqa: F401 (fixture)

# Shared memory that a block may have, in bytes.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10}


pytestmark = needs_nvrtc


def check(config: Sm80Config, dtype: torch.dtype, group_size: int, arch: str) -> Cubin:
    """Compile; assert that nothing spills and that the blocks meant to share an SM can."""
    cubin = compiler.compile_kernel(config.source(dtype, group_size), arch)
    assert cubin.stack_bytes == 0, f"{config} spills {cubin.stack_bytes} bytes for {arch}"
    assert cubin.registers * config.threads * config.blocks_per_sm <= REGISTERS
    return cubin


def name_of(value: object) -> str:
    if isinstance(value, Sm80Config):
        return f"tile{value.tile_m}x{value.tile_n}s{value.stages}"
    return str(value)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_no_spills(config: Sm80Config, arch: str) -> None:
    check(config, torch.float16, 128, arch)
    check(config, torch.bfloat16, 32, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", SCALARS)
@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
def test_every_specialisation(group_size: int, dtype: torch.dtype, arch: str) -> None:
    for config in CONFIGS:
        check(config, dtype, group_size, arch)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_selection_fits_the_gpu(arch: str, batch_invariant: bool) -> None:
    for group_size in (0, 32, 64, 128):
        tiles = []
        for m in range(1, 300):
            config = select_config(m, group_size, SHARED_LIMIT[arch], batch_invariant)
            assert config.shared_bytes(group_size) <= SHARED_LIMIT[arch]
            tiles.append(config.tile_m)
        assert tiles[0] == 8 and tiles[63] >= 64
        assert all(m <= tile for m, tile in zip(range(1, 65), tiles, strict=False))


def test_tensor_cores_and_asynchronous_copies(tmp_path: Path) -> None:
    text = sass(check(CONFIGS[0], torch.float16, 128, "sm_80"), tmp_path / "kernel.cubin")
    assert "HMMA.16816.F32" in text and "LDGSTS" in text and "LDSM" in text
    assert "LDL" not in text and "STL" not in text
