"""The sm_90a kernels compile: registers, spills, instructions, without a GPU. The cubin cache."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from marlin_kernel import WEIGHT_TYPES, compiler, kernel_configs
from marlin_kernel.compiler import CompileError, Cubin, KernelSource
from marlin_kernel.kernel_configs import DecodeConfig, GemmConfig, KernelConfig
from tests import racecheck
from tests.compiling import REGISTERS, needs_nvrtc, own_cache, sass  # noqa: F401 (fixture)

TINY = KernelSource("sm90/read_floor.cuh", "sm90::read_floor_kernel")
# Every shape of kernel once, in the commonest specialisation; others where the code differs.
SHAPES = list(
    {
        config.source("float16", 128).expression: config
        for config in kernel_configs.supported_configs()
        if config.fits(1, 64, 128)
        and (config.split < 2 or (config.split == 4 and getattr(config, "cluster", True)))
    }.values()
)
VARIANTS = [("bfloat16", 128), ("float16", 32), ("bfloat16", 32), ("float16", -1), ("float16", 64)]


pytestmark = needs_nvrtc


def check(config: KernelConfig, dtype: str, group_size: int, weight_type: str = "uint4b8") -> Cubin:
    """Compile; assert that nothing spills and that the blocks that should share an SM can."""
    source = config.source(dtype, group_size, weight_type)
    cubin = compiler.compile_kernel(source, "sm_90a")
    assert cubin.stack_bytes == 0, f"{config} spills {cubin.stack_bytes} bytes"
    assert cubin.registers * config.threads * config.blocks_per_sm <= REGISTERS
    assert "C7510" not in cubin.log and "C7512" not in cubin.log, cubin.log  # serialised wgmma
    return cubin


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_kernel_fits_and_uses_tensor_cores(config: KernelConfig, tmp_path: Path) -> None:
    text = sass(check(config, "float16", 128), tmp_path / "kernel.cubin")
    if isinstance(config, GemmConfig):
        assert "HGMMA" in text and "HMMA.16816" not in text
        assert "UTMALDG" in text  # activations by tensor copies
    else:
        assert "HMMA.16816.F32" in text
    assert "UBLKCP" in text  # weights by bulk copies
    assert "LDL" not in text and "STL" not in text


GATHERING = [c for c in kernel_configs.gathering_configs() if c.split == 1]


@pytest.mark.parametrize("config", GATHERING, ids=str)
def test_kernels_that_gather(config: KernelConfig, tmp_path: Path) -> None:
    text = sass(check(config, "float16", 128), tmp_path / "kernel.cubin")
    assert "IDP.2A" in text and "LDS.U16" in text and "LDSM" not in text  # by index, not by rows
    assert "LDL" not in text and "STL" not in text


def test_types_that_gather_compile() -> None:
    for i, (name, dtype, group_size) in enumerate(typed_kernels()):
        if name not in ("uint4b8", "uint8b128") or group_size == -1:
            continue  # no act-order
        configs = [
            c
            for c in kernel_configs.gathering_configs(name)
            if c.split == 1 and c.fits(1, 64, group_size, name)
        ]
        for config in (configs[i % len(configs)], configs[-1]):
            check(config, dtype, group_size, name)


def test_gathering_in_front_compiles() -> None:
    tokens, inputs = (1, 3, 16, 64, 128, 1024), (4096, 28672)
    for plan in {kernel_configs.gather_plan(m, k, k) for m in tokens for k in inputs}:
        cubin = compiler.compile_kernel(plan.source(), "sm_90a")
        assert cubin.stack_bytes == 0 and plan.shared_bytes <= kernel_configs.MAX_SHARED_BYTES
        assert cubin.registers * 1024 <= REGISTERS  # threads of a multiprocessor
        assert plan.cluster == 1 or (cubin.registers, plan.threads) == (32, 128)  # see below


@pytest.mark.parametrize(
    "weight_type, dtype, group_size",
    [
        ("uint4b8", "float16", 128),
        ("uint4b8", "float16", 64),
        ("uint4b8", "bfloat16", 32),
        ("uint8b128", "float16", 32),
        ("uint8b128", "bfloat16", 128),
    ],
)
def test_room_for_gathering(weight_type: str, dtype: str, group_size: int, tmp_path: Path) -> None:
    configs = map(kernel_configs.leaving_room, kernel_configs.supported_configs(weight_type))
    shapes = {c.source(dtype, group_size, weight_type): c for c in configs if hasattr(c, "tokens")}
    roomy = [
        c for c in shapes.values() if c.leaves_room and c.fits(64, 64, group_size, weight_type)
    ]
    assert len(roomy) > 10
    for config in roomy[:: 1 if group_size == 128 else 3]:
        cubin = check(config, dtype, group_size, weight_type)
        assert cubin.registers * config.threads + 32 * 128 <= REGISTERS
    assert "USETMAXREG" in sass(cubin, tmp_path / "kernel.cubin")


@pytest.mark.parametrize("dtype, group_size", VARIANTS)
def test_variants_compile(dtype: str, group_size: int) -> None:
    for config in SHAPES[:: max(1, len(SHAPES) // 6)]:
        if config.fits(1, 64, group_size):
            check(config, dtype, group_size)


def typed_kernels() -> list[tuple[str, str, int]]:
    """Weight type, dtype of activations, group size of every set of kernels."""
    return [
        (t.name, dtype, group_size)
        for t in WEIGHT_TYPES.values()
        for dtype in kernel_configs.SCALARS
        if dtype in t.activations
        for group_size in kernel_configs.group_sizes(t.name)
    ]


@pytest.mark.parametrize("weight_type", [name for name in WEIGHT_TYPES if name != "uint4b8"])
def test_types_compile(weight_type: str) -> None:
    """Some configurations of every type and group size; the exhaustive test below takes all."""
    sets = [row for row in typed_kernels() if row[0] == weight_type]
    for i, (_, dtype, group_size) in enumerate(sets):
        fitting = [
            config
            for config in kernel_configs.supported_configs(weight_type)
            if config.split < 2 and config.fits(1, 64, group_size, weight_type)
        ]
        assert {type(config) for config in fitting} == {DecodeConfig, GemmConfig}
        for config in fitting[i :: len(sets)][:3]:
            check(config, dtype, group_size, weight_type)


@pytest.mark.parametrize(
    "weight_type, dtype, group_size",
    [
        pytest.param(
            *row, marks=pytest.mark.slow if row[0] == "uint4b8" else pytest.mark.exhaustive
        )
        for row in typed_kernels()
    ],
)
def test_every_configuration_compiles(weight_type: str, dtype: str, group_size: int) -> None:
    for config in kernel_configs.supported_configs(weight_type):
        if config.fits(1, 64, group_size, weight_type):
            check(config, dtype, group_size, weight_type)


# ---- cache ----


def test_second_compilation_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiler.compile_kernel(TINY, "sm_90a")
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compiler.compile_kernel(TINY, "sm_90a") == first


def test_damaged_entry_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARLIN_KERNEL_CACHE", str(tmp_path))
    first = compiler.compile_kernel(TINY, "sm_90a")
    (path,) = tmp_path.glob("*.cubin")
    path.write_bytes(first.image[:-1])
    assert compiler.compile_kernel(TINY, "sm_90a").image == first.image


@pytest.mark.parametrize("facts", [b"", b'{"symbol": "x', b"[]", b"{}", b"\xff\xfe"])
def test_damaged_facts_are_compiled_again(
    facts: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARLIN_KERNEL_CACHE", str(tmp_path))
    first = compiler.compile_kernel(TINY, "sm_90a")
    (path,) = tmp_path.glob("*.json")
    path.write_bytes(facts)
    assert compiler.compile_kernel(TINY, "sm_90a").image == first.image
    assert json.loads(path.read_text())["symbol"] == first.symbol


def test_what_is_written_may_be_read_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cubins that an image ships are built by one user and read by another."""
    monkeypatch.setenv("MARLIN_KERNEL_CACHE", str(tmp_path))
    compiler.compile_kernel(TINY, "sm_90a")
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    kept = [*tmp_path.glob("*.cubin"), *tmp_path.glob("*.json")]
    assert len(kept) == 2
    assert {path.stat().st_mode for path in kept} == {ordinary.stat().st_mode}


@pytest.mark.parametrize("obstacle", ["a file", "full"])
def test_without_a_cache_kernels_compile_and_it_is_said(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = compiler.compile_kernel(TINY, "sm_90a")
    cache = tmp_path / "cache"
    if obstacle == "a file":
        cache.touch()
    else:
        no_space = OSError(28, "No space left on device")
        monkeypatch.setattr(compiler.os, "fsync", lambda _: (_ for _ in ()).throw(no_space))
    monkeypatch.setenv("MARLIN_KERNEL_CACHE", str(cache))
    calls = []
    compile_once = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *a: calls.append(a) or compile_once(*a))
    for _ in range(2):
        assert compiler.compile_kernel(TINY, "sm_90a").image == first.image
    assert len(calls) == 2
    (record,) = caplog.records
    assert str(cache) in record.message and "MARLIN_KERNEL_CACHE" in record.message
    assert not list(tmp_path.rglob("*.part"))


def test_a_library_that_cannot_be_loaded_is_a_compile_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cuda.bindings import nvrtc

    def absent() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so"\nlisted directories')

    monkeypatch.setattr(nvrtc, "nvrtcVersion", absent)
    for cached in (compiler._nvrtc, compiler._compiler_fingerprint):
        cached.cache_clear()
    with pytest.raises(CompileError, match="libnvrtc.so.*pip install nvidia-cuda-nvrtc"):
        compiler.compile_kernel(TINY, "sm_90a")


def test_prebuilt_directory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    monkeypatch.setenv("MARLIN_KERNEL_CACHE", str(shipped))
    first = compiler.compile_kernel(TINY, "sm_90a")
    monkeypatch.setenv("MARLIN_KERNEL_CACHE", str(own))
    monkeypatch.setenv("MARLIN_KERNEL_PREBUILT", str(shipped))
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compiler.compile_kernel(TINY, "sm_90a") == first
    assert not own.exists()


def test_a_prebuilt_directory_that_does_not_exist_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MARLIN_KERNEL_PREBUILT", str(tmp_path / "mistyped"))
    for _ in range(2):
        compiler.compile_kernel(TINY, "sm_90a")
    (record,) = caplog.records
    assert "MARLIN_KERNEL_PREBUILT" in record.message and "mistyped" in record.message


def test_threads_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARLIN_KERNEL_CACHE", str(tmp_path))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        cubins = list(pool.map(lambda _: compiler.compile_kernel(TINY, "sm_90a"), range(8)))
    assert len({cubin.image for cubin in cubins}) == 1
    assert not list(tmp_path.glob("*.part"))


def test_errors_show_the_log() -> None:
    broken = KernelSource("sm90/decode.cuh", "sm90::decode_kernel<int>")
    with pytest.raises(CompileError, match=r"decode_kernel<int> for sm_90a:\n.*error"):
        compiler.compile_kernel(broken, "sm_90a")


def test_key_depends_on_what_matters() -> None:
    other = KernelSource(TINY.header, TINY.expression + " ")
    keys = {compiler.cache_key(TINY, "sm_90a"), compiler.cache_key(TINY, "sm_80")}
    assert len(keys | {compiler.cache_key(other, "sm_90a")}) == 3


def test_ahead_of_time_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pattern = r"DecodeConfig<weights::uint4b8, __half, 128, 1, 1, 4, 1,"
    arguments = ["--arch", "sm_90a", "--match", pattern, "--output", str(tmp_path), "--jobs", "1"]
    assert compiler.main(arguments) == 0
    assert list(tmp_path.glob("*.cubin"))
    assert "0 B stack" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_77"], "invalid choice: 'sm_77'"),
        (["--match", "("], "--match.*unterminated"),
        (["--arch", "sm_80", "--match", "nothing like it"], "no kernel for sm_80 matches"),
        (["--arch", "sm_80", "--match", "Gptq<4>, false", "--output", "{file}"], "cannot write to"),
    ],
)
def test_ahead_of_time_command_says_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    arguments = [argument.format(file=tmp_path / "file") for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        compiler.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


# ---- choice ----


@pytest.mark.parametrize(
    "weight_type, group_size", dict.fromkeys((t, g) for t, _, g in typed_kernels())
)
def test_every_size_has_a_kernel(weight_type: str, group_size: int) -> None:
    supported = set(kernel_configs.supported_configs(weight_type))
    for k_tiles in (1, 2, 3, 9, 64, 448, 1000):
        if group_size == 128 and k_tiles % 2:
            continue
        for column_tiles in (1, 2, 3, 64, 344, 896):
            for m in (1, 7, 8, 9, 16, 17, 100, 128, 129, 1000, 8192):
                for invariant in (False, True):
                    sizes = (m, k_tiles, column_tiles, group_size)
                    config = kernel_configs.select_config(
                        *sizes, batch_invariant=invariant, weight_type=weight_type
                    )
                    assert config in supported
                    assert config.fits(m, k_tiles, group_size, weight_type)


def test_batch_invariant_choice_orders_additions_by_k_and_n_only() -> None:
    for k_tiles, column_tiles in ((64, 64), (448, 128), (9, 3)):
        configs = {
            kernel_configs.select_config(m, k_tiles, column_tiles, 128, batch_invariant=True)
            for m in range(1, 2000, 7)
        }
        assert len({(c.split, c.stage_tiles, c.scale_sums) for c in configs}) == 1


def test_tuned_rows_name_supported_configurations() -> None:
    for weight_type in WEIGHT_TYPES:
        supported = set(kernel_configs.supported_configs(weight_type))
        for dtype in {"float16", "bfloat16"} & set(WEIGHT_TYPES[weight_type].activations):
            check_tuned_rows(weight_type, dtype, supported)


def check_tuned_rows(weight_type: str, dtype: str, supported: set) -> None:
    for path in kernel_configs.tuning_path("any", weight_type, dtype).parent.glob("*.json"):
        for choices in kernel_configs._tuned_rows(path.stem, weight_type, dtype).values():
            limits = [limit for limit, _ in choices]
            assert limits == sorted(limits)
            assert {config for _, config in choices} <= supported


def test_rows_of_a_dtype_replace_those_of_another(tmp_path, monkeypatch) -> None:
    def write(path, choices: dict[int, int]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [
            {"m": m, "kind": "gemm", "config": asdict(GemmConfig(tokens, 1, 4, 1, 1, False))}
            for m, tokens in choices.items()
        ]
        path.write_text(json.dumps({"rows": [{"k": 256, "n": 128, "choices": entries}]}))

    monkeypatch.setattr(kernel_configs, "TUNING_DIRECTORY", tmp_path)
    write(kernel_configs.tuning_path("some"), {16: 16, 64: 64, 8192: 256})
    write(kernel_configs.tuning_path("some", dtype="bfloat16"), {64: 32, 256: 128})
    chosen = {
        dtype: [kernel_configs.select_config(m, 4, 2, 128, gpu="some", dtype=dtype).tokens for m in
                (9, 16, 17, 64, 65, 256, 257, 100000)]
        for dtype in ("float16", "bfloat16")
    }  # fmt: skip
    assert chosen["float16"] == [16, 16, 64, 64, 256, 256, 256, 256]
    assert chosen["bfloat16"] == [16, 16, 32, 32, 128, 128, 256, 256]


def test_choice_for_act_order() -> None:
    supported = kernel_configs.supported_configs()
    configs = {*kernel_configs.gathering_configs(), *map(kernel_configs.leaving_room, supported)}
    for path in (kernel_configs.TUNING_DIRECTORY / "act_order").glob("*.json"):
        for choices in kernel_configs._tuned_act_order(path.stem).values():
            assert {c for _, c in choices if c} <= configs
    for gpu in ("h200", "another"):
        for m in (1, 2, 7, 16, 17, 64, 65, 300):
            for k_tiles, columns in (
                (1, 1),
                (64, 64),
                (128, 128),
                (172, 64),
                (448, 128),
                (1023, 8),
            ):
                config = kernel_configs.select_for_act_order(m, k_tiles, columns, 128, gpu=gpu)
                plain = kernel_configs.select_config(m, k_tiles, columns, 128, gpu=gpu)
                if m > 64:
                    assert config == plain
                elif gpu == "another":
                    assert config == kernel_configs.leaving_room(plain)
                else:
                    assert config in configs
                assert config.fits(m, k_tiles, 128)
    one_token = kernel_configs.select_for_act_order(1, 64, 64, 128)
    assert one_token.gathers, "of the tuned table"
    assert not kernel_configs.select_for_act_order(1, 64, 64, 128, batch_invariant=True).gathers


@pytest.mark.parametrize("multiprocessors", [1, 7, 132])
def test_shares_of_the_last_tiles(multiprocessors: int) -> None:
    """Blocks get stretches of k that differ by one stage at most, and workspace for all parts."""
    config = GemmConfig(128, 1, 3, 1, 2, False, split=0, tail=True)
    for m, k_tiles, column_tiles in ((1, 1, 1), (300, 3, 9), (256, 64, 192), (512, 65, 344)):
        tiles = config.tiles(m, column_tiles)
        whole = config.whole_tiles(m, column_tiles, multiprocessors)
        stages = -(-k_tiles // config.stage_tiles)
        total = (tiles - whole) * stages
        (blocks, *_) = config.grid(m, k_tiles, column_tiles, 128, multiprocessors)
        assert whole % multiprocessors == 0 and tiles - whole < multiprocessors
        assert blocks == min(multiprocessors, whole + total)
        sharing = min(blocks, total)
        begins = [total * block // max(sharing, 1) for block in range(sharing + 1)]
        lengths = {end - begin for begin, end in itertools.pairwise(begins)}
        assert max(lengths, default=0) - min(lengths, default=0) <= 1
        parts = [
            sum(
                b < (tile + 1) * stages and e > tile * stages for b, e in itertools.pairwise(begins)
            )
            for tile in range(tiles - whole)
        ]
        most = config.parts(m, column_tiles, multiprocessors)
        assert max(parts, default=1) <= most
        floats, counters = config.workspace(m, column_tiles, multiprocessors)
        assert floats == (tiles - whole) * most * 128 * 128 and counters == 2 * (tiles - whole)


def test_unfit_configurations_say_so() -> None:
    assert not DecodeConfig(1, 1, 4, 1, 4, 4).fits(9, 8, 128)
    assert not GemmConfig(16, 1, 6, 2, 2, True, split=8).fits(1, 2, 128)


# ---- a variant for racecheck ----


@pytest.mark.parametrize(
    "source",
    [
        racecheck.CONFIGS[1].source("float16", racecheck.GROUP_SIZE),
        racecheck.EIGHT_BIT_CONFIGS[1].source(racecheck.TYPES),
        racecheck.SPARSE_CONFIGS[0].source("float16", 4, racecheck.GROUP_SIZE),
    ],
    ids=lambda source: source.header,
)
def test_racecheck_variant_differs_in_arrivals_only(
    source: KernelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/racecheck.py finds its text, and the compiler makes the same of the rest."""
    ours = compiler.compile_kernel(source, "sm_90a")
    monkeypatch.setattr(compiler, "SOURCE_ROOT", racecheck.write_variant(tmp_path))
    compiler._sources_digest.cache_clear()
    theirs = compiler.compile_kernel(source, "sm_90a")
    compiler._sources_digest.cache_clear()
    assert theirs.image != ours.image
    assert (theirs.registers, theirs.stack_bytes) == (ours.registers, 0)
    assert "C75" not in theirs.log, theirs.log  # serialised wgmma

    listings = [sass(cubin, tmp_path / "cubin") for cubin in (ours, theirs)]
    assert listings[0].count("GMMA") == listings[1].count("GMMA") > 0
