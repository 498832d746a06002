"""The kernel generator, cubins built ahead of time, and the C header."""

from __future__ import annotations

import ctypes
import inspect
import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from marlin_kernel import (
    compiler,
    kernel_configs,
    launch,
    layout,
    packing,
    prebuilt,
    sm80_configs,
    sm80_layout,
    sm80_path,
    sm90_8bit_configs,
    sm90_8bit_layout,
    sm90_8bit_path,
    sm90_layout,
)
from marlin_kernel.compiler import CompileError
from marlin_kernel.errors import ConfigError
from marlin_kernel.formats import QuantizedLinear, write
from marlin_kernel.kernel_configs import DecodeConfig
from marlin_kernel.layer import Layer
from marlin_kernel.sm90_8bit_configs import EightBitTypes
from marlin_kernel.validity import ACTIVATIONS, ARCHITECTURES, Combination, combinations
from marlin_kernel.weight_types import INTEGER_TYPES, WEIGHT_TYPES, weight_type
from scripts import generate_kernels as generator
from tests.compiling import needs_nvrtc, own_cache  # noqa: F401 (fixture)

REPOSITORY = Path(__file__).parents[1]
HEADERS = REPOSITORY / "marlin_kernel" / "include"
EXAMPLE = REPOSITORY / "marlin_kernel" / "examples" / "gemm.cpp"
EMULATED = REPOSITORY / "tests" / "emulator" / "include"
CSRC = REPOSITORY / "marlin_kernel" / "csrc"
DEVICES = {  # multiprocessors, shared memory of a block and of a multiprocessor
    (8, 0): (108, 163 << 10, 164 << 10),
    (8, 6): (84, 99 << 10, 100 << 10),
    (8, 9): (128, 99 << 10, 100 << 10),
    (9, 0): (132, 227 << 10, 228 << 10),
}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources and selection table of everything, for four architectures."""
    output = tmp_path_factory.mktemp("kernels")
    assert generator.main(["8.0,8.6,8.9,9.0", "--output", str(output)]) == 0
    return output


# ---- what is generated ----


@pytest.mark.parametrize("arch", ARCHITECTURES.values())
def test_every_valid_combination_is_served_or_reported(arch: str) -> None:
    capability = next(c for c, a in ARCHITECTURES.items() if a == arch)
    variants = prebuilt.variants(arch)
    served = {(v.family, v.types) for v in variants}
    built = {kernel.source for kernel in prebuilt.kernels_to_build(variants)}
    missing = set(prebuilt.missing(arch))
    for c in combinations(capability):
        kernels = prebuilt.kernels_of(c, arch)
        assert (c in missing) == (not kernels) and set(kernels) <= served, str(c)
        of_a_layer = prebuilt.layer_kernels(c, arch, 4096, 8192, prebuilt.TOKENS)
        assert bool(of_a_layer) == bool(kernels) and set(of_a_layer) <= built, str(c)


def test_pruned_kernels_are_part_of_all() -> None:
    few = {k.source for k in prebuilt.specializations("sm_90a")}
    everything = {k.source for k in prebuilt.specializations("sm_90a", complete=True)}
    assert few <= everything
    of_sm90 = [len([s for s in part if s.header.startswith("sm90/")]) for part in (few, everything)]
    assert 0 < of_sm90[0] < of_sm90[1] / 2
    assert any(s.header.startswith("sm90_8bit/") for s in few)


def test_sm90_kernels_are_those_that_layers_ask_for() -> None:
    """The group size that a layer's tensors are converted to is one that is compiled."""
    for c in combinations("9.0", reductions=("float32",)):
        if c.act_order:
            continue  # the next test
        ((family, types),) = prebuilt.kernels_of(c, "sm_90a")
        quantized, tensors = stored(c.weight_type.name, 256, 64, c.group_size)
        if family == "sm90":
            group_size = sm90_layout.kernel_tensors(tensors, quantized.spec).group_size
        else:
            group_size = sm90_8bit_layout.types_of(quantized.spec, c.activation).group_size
        assert types.group_size == group_size, str(c)
        assert (types.activation, types.output) == (c.activation, c.output)
        assert not types.permuted and not types.reduce_half


def test_act_order_on_sm90_gathers_in_kernels_and_before_them() -> None:
    sources = {k.source for k in prebuilt.specializations("sm_90a")}
    for name, k, n, group_size in (("uint4b8", 4096, 4096, 128), ("uint8b128", 512, 1024, 32)):
        for m in prebuilt.TOKENS:
            config = kernel_configs.select_for_act_order(
                m, k // 64, n // 64, group_size, weight_type=name, dtype="bfloat16"
            )
            assert config.source("bfloat16", group_size, name) in sources
            assert config.gathers or kernel_configs.gather_plan(m, k, k).source() in sources
    gathering = [s for s in sources if "decode_gather_kernel" in s.expression]
    assert gathering and any(s.header == "sm90/gather.cuh" for s in sources)
    assert any("roomy_gemm_kernel" in s.expression for s in sources)


def test_the_complete_set_stays_small() -> None:
    """About half a second of one core each: 16 cores have 9600 of them in ten minutes."""
    shapes = generator.layer_shapes()
    arches = [prebuilt.architecture(capability) for capability in ("7.5", "8.0", "8.9", "9.0")]
    counts = [len(prebuilt.specializations(arch, shapes)) for arch in arches]
    assert min(counts) > 100 and sum(counts) < 8000


@needs_nvrtc
def test_a_random_sample_compiles(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["8.0,9.0", "--output", str(tmp_path), "--sample", "6"]
    arguments += ["--types", "uint4", "nvfp4", "--seed", str(random.randrange(1000))]
    assert generator.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "6 of " in printed and "0 failed, 0 with spilled registers" in printed
    assert not (tmp_path / "cubins").exists()


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a"])
def test_kernels_that_prepare_activations_are_built(arch: str) -> None:
    kernels = [k.source for k in prebuilt.specializations(arch) if k.name == "activations"]
    own = [k for k in kernels if k.header == "sm90/gather.cuh"]
    assert bool(own) == (arch == "sm_90a")
    kernels = [k for k in kernels if k not in own]
    assert {k.header for k in kernels} == {"sm80/activations.cuh"} and len(kernels) == 5
    text = inspect.getsource(sm80_path)
    for kernel in kernels:
        name = kernel.expression.split("<")[0]
        assert f'"{kernel.expression}"' in text or f'f"{name}<{{scalar}}, {{code}}>"' in text


def test_kernels_outside_the_type_table_are_built() -> None:
    few = prebuilt.other_kernels("sm_90a")
    everything = prebuilt.other_kernels("sm_90a", complete=True)
    assert {k.source for k in few} <= {k.source for k in everything}
    names = {k.name for k in few}
    assert {"repack", "scaled_sparse_int8_float16", "sparse_bfloat16_u8b128_bfloat16"} <= names
    assert {k.name for k in prebuilt.other_kernels("sm_75")} == {"repack"}
    names = {k.name for k in prebuilt.other_kernels("sm_80")}
    assert names == {"repack"} | {n for n in names if n.startswith("sparse_")} != {"repack"}


def test_names_and_contents(generated: Path) -> None:
    names = {path.name for path in generated.iterdir()}
    assert {
        "kernel_selector.h",
        "sm80_kernel_float16_u4b8_float16.cu",
        "sm90_kernel_bfloat16_u4b8_bfloat16.cu",
        "sm90_kernel_bfloat16_mxfp4_bfloat16.cu",
        "sm90_kernel_float8_e4m3fn_fe4m3fn_float16.cu",
    } <= names
    for arch in ("sm_80", "sm_90a"):
        for kernel in prebuilt.specializations(arch):
            text = (generated / generator.file_name(kernel)).read_text()
            assert f"    {kernel.source.expression};\n" in text


def test_only_changes_are_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["8.0,8.9", "--output", str(tmp_path), "--types", "uint4b8"]
    assert generator.main(arguments) == 0
    paths = list(tmp_path.iterdir())
    for path in paths:
        os.utime(path, (0, 0))
    paths[0].write_text(paths[0].read_text() + "// edited\n")
    own = tmp_path / "my_kernel_notes.cu"
    own.write_text("// not generated\n")
    assert generator.main(arguments) == 0
    assert "1 written" in capsys.readouterr().out
    assert [p for p in paths if p.stat().st_mtime != 0] == [paths[0]]
    assert generator.main(["8.0", *arguments[1:]]) == 0
    remaining = sorted(p.name for p in tmp_path.glob("*.cu"))
    assert own.name in remaining and all(n.startswith(("sm80", "my")) for n in remaining)


def test_missing_kernels_and_architectures_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels_of = prebuilt.kernels_of

    def few(c: Combination, arch: str) -> list:
        known = arch != "sm_75" and c.weight_type.name == "uint4b8"
        return kernels_of(c, arch) if known else []

    monkeypatch.setattr(prebuilt, "kernels_of", few)
    assert generator.main(["7.5,8.0", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "sm_75: no product of the type table has a kernel there" in printed
    assert "sm_80: valid combinations without a kernel" in printed and "x uint8b128 (" in printed
    assert "x uint4b8 (" not in printed
    assert generator.main(["7.0", "--output", str(tmp_path)]) == 2
    assert "'7.0' is not one of 7.5, 8.0" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="'sm_70' is not one of"):
        prebuilt.specializations("sm_70")


def test_one_group_of_a_type_that_repeats_it_has_kernels(tmp_path: Path) -> None:
    """On sm_80 a single group of a type with zero points is served by kernels of groups of 128."""
    arguments = ["8.0", "--types", "uint4", "--activations", "float16", "--output", str(tmp_path)]
    assert generator.main([*arguments, "--group_sizes", "128"]) == 0
    selector = (tmp_path / generator.SELECTOR).read_text()
    assert generator.main([*arguments, "--group_sizes", "-1"]) == 0
    assert (tmp_path / generator.SELECTOR).read_text() == selector


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--types", "nvfp4", "--group_sizes", "128"], "no kernel for sm_80 has"),
        (["--group_sizes", "48"], "invalid choice: 48"),
        (["--sample", "0"], "--sample: '0' is no whole number of at least 1"),
        (["--output", "{file}/x"], "cannot write to"),
    ],
)
def test_arguments_that_cannot_work_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "file"
    file.touch()
    arguments = [argument.format(file=file) for argument in arguments]
    try:
        status = generator.main(["8.0", "--output", str(tmp_path / "out"), *arguments])
    except SystemExit as stopped:  # of argparse
        status = stopped.code
    assert status == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


# ---- cubins ----


def some_kernels(arch: str, count: int) -> list[prebuilt.Specialization]:
    return prebuilt.specializations(arch)[:count]


@needs_nvrtc
@pytest.mark.parametrize(
    "arch, header",
    [
        ("sm_80", "sm80/kernel.cuh"),
        ("sm_90a", "sm90/gemm.cuh"),
        ("sm_90a", "sm90_8bit/kernel.cuh"),
    ],
)
def test_generated_source_compiles(arch: str, header: str) -> None:
    kernels = [k for k in prebuilt.specializations(arch) if k.source.header == header][:2]
    kernels = [k for k in kernels if k.name == kernels[0].name]
    nvrtc = compiler._nvrtc()
    text = generator.source_file(kernels).encode()
    program = compiler._call(nvrtc.nvrtcCreateProgram(text, b"kernel.cu", 0, [], []))
    options = [*compiler._options(arch), f"-I{CSRC}", f"-I{compiler._include_directory()}"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS
    image = b" " * compiler._call(nvrtc.nvrtcGetCUBINSize(program))
    compiler._call(nvrtc.nvrtcGetCUBIN(program, image))
    for kernel in kernels:
        assert compiler.compile_kernel(kernel.source, arch).symbol.encode() in image


@needs_nvrtc
def test_prebuilt_cubins_need_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    kernels = some_kernels("sm_80", 2)
    options = generator.parse(["8.0", "--output", str(tmp_path), "--jobs", "2"])
    assert generator.compile_kernels(kernels, options) == 0
    assert "2 kernels compiled or found in" in capsys.readouterr().out
    cubins = tmp_path / "cubins"
    stale = cubins / "stale.cubin"
    stale.touch()
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled"))
    assert generator.compile_kernels(kernels, options) == 0  # found, not compiled again
    assert not stale.exists() and len(list(cubins.glob("*.cubin"))) == 2

    monkeypatch.setattr(compiler, "_compiler_fingerprint", lambda: pytest.fail("no compiler here"))
    monkeypatch.setenv("MARLIN_KERNEL_PREBUILT", str(cubins))
    for kernel in kernels:
        found = compiler.compile_kernel(kernel.source, "sm_80")
        assert compiler.resource_usage(found.image, found.symbol)[0] == found.registers
        # an sm_86 runs code of its older sibling
        assert compiler.compile_kernel(kernel.source, "sm_86") == found


@needs_nvrtc
def test_a_checkout_finds_its_own_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel,) = some_kernels("sm_80", 1)
    options = generator.parse(["8.0", "--output", str(tmp_path), "--jobs", "1"])
    generator.compile_kernels([kernel], options)
    monkeypatch.setattr(compiler, "PREBUILT_PLACES", (tmp_path / "none", tmp_path / "cubins"))
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled"))
    assert compiler.compile_kernel(kernel.source, "sm_80").image
    assert REPOSITORY / "build" / "kernels" == generator.parse(["8.0"]).output


def test_a_changed_header_makes_only_its_kernels_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    monkeypatch.setattr(compiler, "SOURCE_ROOT", csrc)
    headers = ("sm80/kernel.cuh", "sm75/kernel.cuh", "sm90/decode.cuh", "sm90/gemm.cuh")

    def changed(edited: str) -> set[str]:
        keys = []
        for _ in range(2):
            compiler._sources_digest.cache_clear()
            sources = [compiler.KernelSource(header, "kernel") for header in headers]
            keys.append([compiler.source_key(source, "sm_90a") for source in sources])
            (csrc / edited).write_text((csrc / edited).read_text() + "// edited\n")
        return {h for h, old, new in zip(headers, *keys, strict=True) if old != new}

    assert changed("sm90/gemm.cuh") == {"sm90/gemm.cuh"}
    assert changed("sm80/partition.cuh") == {"sm80/kernel.cuh", "sm75/kernel.cuh"}
    assert changed("common/types.cuh") == set(headers)
    compiler._sources_digest.cache_clear()


@needs_nvrtc
def test_failures_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (kernel,) = some_kernels("sm_80", 1)
    broken = prebuilt.Specialization(
        "sm_80", kernel.name, compiler.KernelSource(kernel.source.header, "nothing::at_all")
    )
    options = generator.parse(["8.0", "--output", str(tmp_path), "--jobs", "1"])
    assert generator.compile_kernels([broken], options) == 1
    captured = capsys.readouterr()
    assert "nothing::at_all" in captured.err and "1 failed" in captured.out


@needs_nvrtc
def test_ahead_of_time_command_knows_every_family(tmp_path: Path) -> None:
    (kernel,) = some_kernels("sm_80", 1)
    pattern = kernel.source.expression.replace("(", r"\(")
    arguments = ["--arch", "sm_80", "--match", pattern, "--output", str(tmp_path), "--jobs", "1"]
    assert compiler.main(arguments) == 0
    assert len(list(tmp_path.glob("*.cubin"))) == 1


# ---- the C header ----


class CLayer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("type", "k", "n", "group_size")]


class Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("k_padded", "n_padded", "groups")),
        *((name, ctypes.c_size_t) for name in ("weight_bytes", "scale_bytes", "zero_bytes")),
    ]


class Device(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in ("major", "minor", "multiprocessors", "per_block", "per_processor")
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        ("layer", CLayer),
        *(
            (name, ctypes.c_int)
            for name in ("activation", "output", "m", "reduce_half", "batch_invariant")
        ),
    ]


class Plan(ctypes.Structure):
    _fields_ = [
        ("problem", Problem),
        ("kernel", ctypes.c_int),
        *(
            (name, ctypes.c_uint)
            for name in ("grid_x", "grid_y", "threads", "cluster", "shared_bytes")
        ),
        *((name, ctypes.c_size_t) for name in ("counter_bytes", "partial_bytes")),
        *(
            (name, ctypes.c_int)
            for name in ("k_padded", "n_padded", "splits", "in_turn", "whole_tiles")
        ),
        *((name, ctypes.c_void_p) for name in ("function", "quantizer")),
    ]


class RepackedSizes(ctypes.Structure):
    _fields_ = [(f"{name}_bytes", ctypes.c_size_t) for name in ("weight", "scale", "zero")]


def cuda_headers() -> Path | None:
    """Directory of cuda.h, as the compiler's own search finds it."""
    try:
        directory = compiler._include_directory()
    except CompileError:
        return None
    return directory if (directory / "cuda.h").is_file() else None


needs_gcc = pytest.mark.skipif(
    shutil.which("g++") is None or cuda_headers() is None or sys.platform != "linux",
    reason="needs g++, Linux and the CUDA headers",
)
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def build(generated: Path, output: Path, *arguments: str) -> Path:
    includes = [f"-I{path}" for path in (cuda_headers(), generated, HEADERS)]
    command = [*arguments, *WARNINGS, *includes, "-o", str(output), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def library(generated: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The header's functions, compiled as C."""
    directory = tmp_path_factory.mktemp("header")
    source = directory / "header.c"
    source.write_text(
        '#define MARLIN_KERNEL_IMPLEMENTATION\n#include "marlin_kernel.h"\n'
        "int size_of_plan(void) { return sizeof(marlin_plan); }\n"
        "const char* key_of(int kernel) { return marlin_kernels[kernel].key; }\n"
    )
    command = ("gcc", "-std=gnu11", "-O1", "-shared", "-fPIC", str(source))
    loaded = ctypes.CDLL(str(build(generated, directory / "header.so", *command)))
    loaded.marlin_error.restype = loaded.key_of.restype = ctypes.c_char_p
    assert loaded.size_of_plan() == ctypes.sizeof(Plan)
    return loaded


def device(capability: tuple[int, int]) -> Device:
    return Device(*capability, *DEVICES[capability])


def layer(name: str, k: int, n: int, group_size: int) -> CLayer:
    return CLayer(list(WEIGHT_TYPES).index(name), k, n, group_size)


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


LAYERS = [
    (256, 128, 128),
    (192, 200, 64),
    (100, 64, 32),
    (200, 72, 16),
    (128, 192, -1),
    (72, 40, -1),
    (64, 64, 64),
    (24, 72, 32),
    (12, 72, 16),
]
TYPED_LAYERS = [
    (name, *sizes)
    for name, t in WEIGHT_TYPES.items()
    for sizes in LAYERS
    if sizes[2] in t.group_sizes
]


def stored(name: str, k: int, n: int, group_size: int) -> tuple[QuantizedLinear, dict]:
    """A layer, and its on-disk tensors."""
    quantized = QuantizedLinear.quantize(torch.randn(k, n), weight_type(name), group_size)
    return quantized, write(quantized, "marlin")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).flatten()


@needs_gcc
@pytest.mark.parametrize("name, k, n, group_size", TYPED_LAYERS)
def test_packing_in_c_equals_python(
    library: ctypes.CDLL, name: str, k: int, n: int, group_size: int
) -> None:
    quantized, tensors = stored(name, k, n, group_size)
    wtype, shape = quantized.weight_type, quantized.spec.packed
    described, sizes = layer(name, k, n, group_size), Sizes()
    assert library.marlin_layer_sizes(ctypes.byref(described), ctypes.byref(sizes)) == 0
    assert (sizes.k_padded, sizes.n_padded) == (shape.k_padded, shape.n_padded)
    assert (sizes.groups, sizes.weight_bytes) == (shape.groups, tensors["B"].nbytes)
    assert sizes.scale_bytes == tensors["s"].nbytes
    assert sizes.zero_bytes == (tensors["z"].nbytes if "z" in tensors else 0)
    qweight = packing.pack_rows(quantized.codes.T, wtype.bits).T.contiguous()
    for pack, codes in (("codes", quantized.codes), ("gptq", qweight)):
        if pack == "gptq" and (k % wtype.pack_factor or name not in INTEGER_TYPES):
            continue
        packed = {x: torch.empty_like(t) for x, t in tensors.items() if x in ("B", "s", "z")}
        function = getattr(library, f"marlin_pack_{pack}")
        given = (codes, quantized.scales, quantized.zeros, *map(packed.get, ("B", "s", "z")))
        status = function(ctypes.byref(described), *map(pointer, given))
        assert status == 0, library.marlin_error()
        for suffix, tensor in packed.items():
            assert torch.equal(bits(tensor), bits(tensors[suffix])), suffix


def kernel_order(
    quantized: QuantizedLinear, tensors: dict, capability: tuple[int, int], activation: str
) -> list[torch.Tensor | None]:
    """Weights, scales and zero points as the package converts them."""
    spec = quantized.spec
    if capability != (9, 0):
        held = sm80_layout.kernel_tensors(tensors, spec)
    elif activation in kernel_configs.SCALARS:
        held = sm90_layout.kernel_tensors(tensors, spec)
    else:
        records = sm90_8bit_layout.records(tensors, spec, activation)
        return [records.weights, records.scales, None]
    return [held.weights, held.scales, held.zeros]


@needs_gcc
@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
@pytest.mark.parametrize("name, k, n, group_size", TYPED_LAYERS)
def test_repacking_in_c_equals_python(
    library: ctypes.CDLL, capability: tuple[int, int], name: str, k: int, n: int, group_size: int
) -> None:
    quantized, tensors = stored(name, k, n, group_size)
    for activation in quantized.weight_type.activations:
        expected = kernel_order(quantized, tensors, capability, activation)
        target = (
            ctypes.byref(device(capability)),
            ctypes.byref(layer(name, k, n, group_size)),
            ACTIVATIONS.index(activation),
        )
        sizes = RepackedSizes()
        status = library.marlin_repack_sizes(*target, ctypes.byref(sizes))
        assert status == 0, library.marlin_error()
        given = [0 if t is None else t.nbytes for t in expected]
        assert [sizes.weight_bytes, sizes.scale_bytes, sizes.zero_bytes] == given
        out = [None if t is None else torch.empty_like(t) for t in expected]
        inputs = map(tensors.get, ("B", "s", "z"))
        status = library.marlin_repack(*target, *map(pointer, (*inputs, *out)))
        assert status == 0, library.marlin_error()
        for tensor, wanted in zip(out, expected, strict=True):
            assert wanted is None or torch.equal(bits(tensor), bits(wanted)), activation


def chosen(
    library: ctypes.CDLL,
    capability: tuple[int, int],
    k: int,
    n: int,
    g: int,
    m: int,
    bi: bool,
    name: str = "uint4b8",
    activation: str = "float16",
    output: str = "float16",
    reduce_half: bool = False,
) -> Plan:
    dtypes = map(ACTIVATIONS.index, (activation, output))
    problem = Problem(layer(name, k, n, g), *dtypes, m, reduce_half, bi)
    plan = Plan()
    status = library.marlin_choose(
        ctypes.byref(device(capability)), ctypes.byref(problem), ctypes.byref(plan)
    )
    assert status == 0, library.marlin_error()
    return plan


@needs_gcc
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("reduce_half", [False, True])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)])
def test_sm80_launches_as_python_does(
    library: ctypes.CDLL, capability: tuple[int, int], batch_invariant: bool, reduce_half: bool
) -> None:
    processors, limit, per_processor = DEVICES[capability]
    arch = f"sm_{capability[0]}{capability[1]}"
    for k, n, g in ((4096, 4096, 128), (1000, 300, 32), (8192, 57344, 64), (576, 960, -1)):
        shape = layout.packed_shape(k, n, g)
        types = sm80_configs.KernelTypes(group_size=max(g, 0), reduce_half=reduce_half)
        for m in (1, 8, 9, 16, 17, 33, 64, 128, 129, 1000, 8192):
            config = sm80_configs.select_config(m, types, limit, batch_invariant)
            fitting = per_processor // (config.shared_bytes(types) + 1024)
            blocks = processors * max(1, min(config.blocks_per_sm, fitting))
            sizes = (m, n, shape.k_padded, blocks)
            need = sm80_configs.geometry(config, types, *sizes, batch_invariant)
            features = {"reduce_half": reduce_half}
            plan = chosen(library, capability, k, n, g, m, batch_invariant, **features)
            source = config.source(types)
            assert library.key_of(plan.kernel).decode() == compiler.source_key(source, arch)
            assert (plan.grid_x, plan.grid_y, plan.cluster) == (need.grid, 1, 1)
            assert (plan.threads, plan.shared_bytes) == (
                config.threads,
                config.shared_bytes(types),
            )
            assert (plan.splits, plan.in_turn) == (need.splits, need.in_turn)
            assert (plan.partial_bytes, plan.counter_bytes) == (
                need.partial_bytes,
                4 * need.counters,
            )


# (K, N, group size, weights, activations): a type of each sort
SM90_CASES = [
    (4096, 4096, 128, "uint4b8", "float16"),
    (8192, 57344, 32, "uint4b8", "bfloat16"),
    (4096, 22016, -1, "uint8b128", "float16"),
    (512, 512, 64, "uint4", "float16"),
    (4096, 8192, -1, "uint8", "bfloat16"),
    (8192, 8192, 16, "nvfp4", "float16"),
]


@needs_gcc
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("k, n, g, name, dtype", SM90_CASES)
def test_sm90_launches_as_python_does(
    library: ctypes.CDLL, k: int, n: int, g: int, name: str, dtype: str, batch_invariant: bool
) -> None:
    shape = layout.packed_shape(k, n, g)
    k_tiles, column_tiles = shape.k_padded // 64, shape.n_padded // 64
    if g == -1 and not weight_type(name).symmetric:
        g = layout.ONE_GROUP_WITH_ZEROS
    typed = {"weight_type": name}
    for m in prebuilt.TOKENS:
        config = kernel_configs.select_config(
            m, k_tiles, column_tiles, g, batch_invariant=batch_invariant, dtype=dtype, **typed
        )
        group_size = -1 if shape.groups == 1 else g
        types = (name, dtype, dtype, m % 3 == 0)  # half sums are not needed, float32 will do
        plan = chosen(library, (9, 0), k, n, group_size, m, batch_invariant, *types)
        source = config.source(dtype, g, name)
        assert library.key_of(plan.kernel).decode() == compiler.source_key(source, "sm_90a")
        assert plan.threads == config.threads and plan.quantizer is None
        assert plan.shared_bytes == config.shared_bytes(m, k_tiles, g, **typed)
        grid = config.grid(m, k_tiles, column_tiles, g, **typed)
        assert (plan.grid_x, plan.grid_y, 1) == grid
        if isinstance(config, DecodeConfig):
            assert plan.cluster == config.split
        else:
            floats, counters = config.workspace(m, column_tiles)
            assert (plan.partial_bytes, plan.counter_bytes) == (4 * floats, 4 * counters)
            assert plan.whole_tiles == config.whole_tiles(m, column_tiles)
            assert plan.splits == config.parts(m, column_tiles)
            assert plan.cluster == (config.split if config.cluster else 1)


@needs_gcc
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    "k, n, g, name, activation",
    [
        (4096, 4096, -1, "uint4b8", "int8"),
        (8192, 57344, 128, "uint4b8", "float8_e4m3fn"),
        (512, 1024, 32, "uint4", "int8"),
        (4096, 512, -1, "uint4", "int8"),
        (14336, 4096, 64, "uint8b128", "int8"),
    ],
)
def test_8bit_launches_as_python_does(
    library: ctypes.CDLL, k: int, n: int, g: int, name: str, activation: str, batch_invariant: bool
) -> None:
    for m, output in itertools.product(prebuilt.TOKENS, ("float16", "bfloat16")):
        types = EightBitTypes(name, activation, output, max(g, 0))
        config = sm90_8bit_configs.select_config(m, n, k, types, batch_invariant)
        plan = chosen(library, (9, 0), k, n, g, m, batch_invariant, name, activation, output)
        source = config.source(types)
        assert library.key_of(plan.kernel).decode() == compiler.source_key(source, "sm_90a")
        assert (plan.grid_x, plan.grid_y) == (config.grid(m, n, 132), 1)
        assert (plan.threads, plan.cluster) == (config.threads, config.cluster)
        assert plan.shared_bytes == config.storage_bytes(types)
        assert (plan.partial_bytes, plan.counter_bytes) == (0, 0)


@needs_gcc
def test_unusual_sizes_find_a_kernel(library: ctypes.CDLL) -> None:
    cases = [
        (False, "uint4b8"),
        (False, "uint8"),
        (False, "uint4b8", "int8"),
        (True, "uint4b8", "int8"),
    ]
    for k, n in ((64, 64), (130, 7), (72, 100000), (100000, 64), (4100, 5000)):
        for capability in DEVICES:
            for m, case in itertools.product((1, 2, 3, 60, 5000), cases):
                plan = chosen(library, capability, k, n, 128, m, *case)
                assert plan.grid_x * plan.grid_y > 0
                assert plan.shared_bytes <= DEVICES[capability][1]


@needs_gcc
def test_c_errors_name_the_rule(library: ctypes.CDLL) -> None:
    def refused(problem: Problem, on: Device) -> str:
        plan = Plan()
        assert library.marlin_choose(*map(ctypes.byref, (on, problem, plan))) != 0
        return library.marlin_error().decode()

    good = layer("uint4b8", 256, 256, 128)
    assert "m=0" in refused(Problem(good, 0, 0, 0, 0, 0), device((8, 0)))
    assert "capability 7.5" in refused(
        Problem(good, 0, 0, 1, 0, 0), Device(7, 5, 40, 1 << 16, 1 << 16)
    )
    odd = layer("uint4b8", 256, 256, 48)
    assert "group_size=48 is not allowed for uint4b8" in refused(
        Problem(odd, 0, 0, 1, 0, 0), device((8, 0))
    )
    nothing = [None] * 6
    for pack, name, words in (
        ("codes", "uint4", b"uint4 needs zero points"),
        ("gptq", "mxfp4", b"mxfp4 is not a type of GPTQ checkpoints"),
        ("codes", "nvfp4", b"group_size=32 is not allowed for nvfp4"),
    ):
        other = layer(name, 256, 256, 32)
        function = getattr(library, f"marlin_pack_{pack}")
        assert function(ctypes.byref(other), *map(pointer, nothing)) != 0
        assert words in library.marlin_error()
    large = layer("uint4b8", (1 << 17) + 64, 64, -1)
    target = (ctypes.byref(device((9, 0))), ctypes.byref(large), ACTIVATIONS.index("int8"))
    assert library.marlin_repack_sizes(*target, ctypes.byref(RepackedSizes())) != 0
    assert b"exact in 32 bits up to 131072" in library.marlin_error()
    assert "these activations" in refused(
        Problem(layer("uint8", 256, 256, 128), 2, 0, 1, 0, 0), device((9, 0))
    )
    codes = torch.full((256, 256), 16, dtype=torch.uint8)
    scales = torch.ones(2, 256).half()
    b, s = torch.empty(16, 512, dtype=torch.int32), torch.empty(2, 256).half()
    assert (
        library.marlin_pack_codes(
            ctypes.byref(good), *map(pointer, (codes, scales, None, b, s, None))
        )
        != 0
    )
    assert b"code 16 at k=0, n=0 has more than 4 bits" in library.marlin_error()


@needs_gcc
def test_kernel_arguments_lie_as_the_kernels_read_them(generated: Path, tmp_path: Path) -> None:
    source = tmp_path / "layouts.cpp"
    source.write_text(
        "#include <cstddef>\n#include <cstdio>\n"
        '#define MARLIN_KERNEL_IMPLEMENTATION\n#include "marlin_kernel.h"\n'
        + "".join(
            f"const std::size_t layout_{family}[] = {{sizeof(marlin_{family}_problem), "
            + ", ".join(f"offsetof(marlin_{family}_problem, {field})" for field in fields)
            + "};\n"
            for family, fields in FIELDS.items()
        )
        + "int main() {\n"
        + "".join(
            f'  for (std::size_t x : layout_{family}) std::printf("%zu ", x);\n'
            for family in FIELDS
        )
        + "}\n"
    )
    ours = build(generated, tmp_path / "ours", "g++", "-std=c++17", str(source))
    kernels = tmp_path / "kernels.cpp"
    kernels.write_text(
        "#include <cstddef>\n#include <cstdio>\n"
        + "".join(f'#include "{header}"\n' for header in HEADERS_OF_PROBLEMS)
        + "".join(f"using {name} = {of};\n" for name, of in PROBLEMS.items())
        + "int main() {\n"
        + "".join(
            f'  std::printf("%zu ", sizeof({name}));\n'
            + "".join(f'  std::printf("%zu ", offsetof({name}, {field}));\n' for field in fields)
            for name, fields in zip(PROBLEMS, FIELDS.values(), strict=True)
        )
        + "}\n"
    )
    theirs = tmp_path / "theirs"
    includes = [f"-I{EMULATED}", f"-I{EMULATED.parent}", f"-I{CSRC}"]
    command = ["g++", "-std=c++17", *includes, str(kernels), "-o", str(theirs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [subprocess.run([p], capture_output=True, text=True).stdout for p in (ours, theirs)]
    assert outputs[0] == outputs[1] != ""


SM80_TYPES = "weights::uint4b8, __half, __half, 8, 1, 4, 1, 128, 4, false, 128, false, false"
HEADERS_OF_PROBLEMS = (
    *("sm80/tile_config.cuh", "sm90/problem.cuh", "sm90_8bit/config.cuh", "sm80/activations.cuh"),
)
PROBLEMS = {
    "Sm80": f"sm80::Problem<sm80::TileConfig<{SM80_TYPES}>>",
    "Sm90": "sm90::Problem<__half>",
    "Sm90EightBit": "sm90_8bit::Problem<__half>",
    "Quantize": "sm80::QuantizeProblem",
}
FIELDS = {
    "sm80": (
        *("activations", "weights", "scales", "zeros", "permutation", "token_scales"),
        *("global_scale", "bias", "output", "partials", "arrivals"),
        *("row_stride", "m", "n", "k", "n_padded", "k_padded", "splits", "in_turn"),
    ),
    "sm90": (
        *("activations", "weights", "scales", "bias", "out", "row_stride", "m", "n", "k"),
        *("column_tiles", "k_tiles", "split", "whole_tiles", "partials", "counters"),
        "global_scale",
    ),
    "sm90_8bit": (
        *("scale_a", "scale_b", "bias", "out", "metadata", "scale_a_stride", "scale_b_stride"),
        *("m", "n", "k_tiles", "feature_tiles", "weights"),
    ),
    "quantize": ("activations", "codes", "scales", "row_stride", "m", "k", "k_padded"),
}


@needs_gcc
def test_example_compiles_and_asks_for_a_driver(generated: Path, tmp_path: Path) -> None:
    program = build(generated, tmp_path / "gemm", "g++", "-std=c++17", "-O1", str(EXAMPLE))
    if torch.cuda.is_available():
        pytest.skip("there is a driver; test_example_on_the_gpu runs the program")
    done = subprocess.run([program, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and ("libcuda.so.1" in done.stderr or "cuInit" in done.stderr)


@pytest.fixture(scope="module")
def imagined_gpu(generated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example, a driver that multiplies by itself, and cubins for it to load."""
    directory = tmp_path_factory.mktemp("imagined_gpu")
    driver = EMULATED.parent / "fake_gemm_driver.cpp"
    flags = ("-std=c++17", "-O1", "-shared", "-fPIC")
    build(generated, directory / "libcuda.so.1", "g++", *flags, str(driver))
    build(generated, directory / "gemm", "g++", "-std=c++17", "-O1", str(EXAMPLE))
    (directory / "kernel.cubin").write_bytes(b"\177ELF")
    lines = []
    for arch in ("sm_80", "sm_90a"):
        for variant in prebuilt.variants(arch, generator.layer_shapes()):
            sources = [variant.source(config) for config in variant.configs]
            if variant.types.eight_bit:
                sources.append(prebuilt.quantizer(variant.types))
            for source in sources:
                name = source.expression.split("<")[0].replace("sm80::gemm", "sm804gemm")
                key = compiler.source_key(source, arch)
                lines.append(f"{key} kernel {name}_{variant.types.weight_type}\n")
    (directory / "index.txt").write_text("".join(lines))
    return directory


@needs_gcc
@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("k, n, group_size", [(128, 136, 64), (72, 70, 32), (96, 64, -1)])
def test_example_on_an_imagined_gpu(
    imagined_gpu: Path, capability: str, k: int, n: int, group_size: int
) -> None:
    """The whole program, against what a launch passes to the kernel."""
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(imagined_gpu),
        "FAKE_CAPABILITY": capability,
        "FAKE_GROUP": str(max(0, group_size)),
    }
    arguments = [imagined_gpu / "gemm", imagined_gpu, str(k), str(n), str(group_size)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    for case in ("uint4b8 x float16 m=   1", "uint8b128 x float16 m= 300", "uint4b8 x int8 m=  33"):
        assert case in done.stdout
    assert "all results agree" in done.stdout


@needs_nvrtc
@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, activation, group_size",
    [
        ("uint4b8", None, 128),
        ("uint4", None, -1),
        ("uint8b128", None, -1),
        ("nvfp4", None, 16),
        ("uint4b8", "int8", -1),
        ("float8_e4m3fn", "float8_e4m3fn", 128),
    ],
)
def test_layers_run_prebuilt_kernels(
    name: str,
    activation: str | None,
    group_size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the generator built for a shape is all that layers of that shape need."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (compute capability 9.0)")
    k = n = 512
    types = (name, activation or "float16", "float16")
    c = Combination(weight_type(name), *types[1:], group_size)
    ((family, kernel_types),) = prebuilt.kernels_of(c, "sm_90a")
    choices = prebuilt._sm90_choices(family, kernel_types, False, ((k, n),))
    configs = {choice.config for choice in choices if (choice.k, choice.n) == (k, n)}
    variant = prebuilt.Variant("sm_90a", family, kernel_types, False, choices)
    kernels = [
        prebuilt.Specialization("sm_90a", "_".join(types), source)
        for source in (*map(variant.source, configs), *prebuilt._activation_sources(variant))
    ]
    options = generator.parse(["9.0", "--output", str(tmp_path)])
    assert generator.compile_kernels(kernels, options) == 0

    monkeypatch.setenv("MARLIN_KERNEL_PREBUILT", str(tmp_path / "cubins"))
    monkeypatch.setattr(compiler, "_compile", lambda source, arch: pytest.fail(source.expression))
    monkeypatch.setattr(compiler, "cache_directory", lambda: tmp_path / "empty")
    monkeypatch.setattr(launch, "_functions", {})
    for module in (launch, sm80_path, sm90_8bit_path):
        monkeypatch.setattr(module, "_plans", launch.ThreadPlans())
    sm80_path._load.cache_clear()
    layer = Layer.from_quantized(
        QuantizedLinear.quantize(torch.randn(k, n), c.weight_type, group_size)
    )
    layer.activation = activation
    weight = layer.quantized().dequantize(torch.float32).cuda()
    layer = layer.cuda().prepare(torch.float16)
    assert layer.layout in ("sm90", "sm90_int8", "sm90_fp8")
    for m in prebuilt.TOKENS:
        a = torch.randn(m, k, device="cuda").half()
        expected = a.float() @ weight
        error = (layer(a).float() - expected).norm() / expected.norm()
        assert error < (0.05 if activation == "float8_e4m3fn" else 0.02), m


@needs_gcc
@needs_nvrtc
@pytest.mark.gpu
@pytest.mark.parametrize("k, n, group_size", [(1024, 768, 128), (1000, 300, 32), (2048, 4096, -1)])
def test_example_on_the_gpu(
    generated: Path, library: ctypes.CDLL, tmp_path: Path, k: int, n: int, group_size: int
) -> None:
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) not in DEVICES:
        pytest.skip(f"nothing is generated for capability {major}.{minor} here")
    arch = prebuilt.architecture(f"{major}.{minor}")
    keys = set()
    for types, m, batch_invariant in itertools.product(
        (("uint4b8", "float16"), ("uint8b128", "float16"), ("uint4b8", "int8")),
        *((1, 2, 7, 16, 33, 64, 100, 300), (False, True)),
    ):
        plan = chosen(library, (major, minor), k, n, group_size, m, batch_invariant, *types)
        keys.add(library.key_of(plan.kernel).decode())
    quantizer = prebuilt.quantizer(sm80_configs.KernelTypes(activation="int8"))
    keys.add(compiler.source_key(quantizer, arch))
    kernels = [
        kernel
        for kernel in prebuilt.specializations(arch, generator.layer_shapes())
        if compiler.source_key(kernel.source, arch) in keys
    ]
    assert len(kernels) == len(keys)
    options = generator.parse([f"{major}.{minor}", "--output", str(tmp_path)])
    assert generator.compile_kernels(kernels, options) == 0
    program = build(generated, tmp_path / "gemm", "g++", "-std=c++17", "-O2", str(EXAMPLE))
    arguments = [program, tmp_path / "cubins", str(k), str(n), str(group_size)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all results agree" in done.stdout
