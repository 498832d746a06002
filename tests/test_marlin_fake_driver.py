"""The launch path without a GPU: a fake libcuda records grid, shared memory and kernel arguments.

The library must be found before the driver bindings look for the real one, so each test runs a
small program in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FAKE = REPOSITORY / "tests" / "emulator" / "fake_libcuda.c"

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None
    or sys.platform != "linux"
    or importlib.util.find_spec("cuda") is None,
    reason="needs gcc, Linux and cuda.bindings",
)

# Stand-ins for what a CUDA build of torch would answer, and for tensors: only addresses matter.
PRELUDE = """
import contextlib, ctypes, math, struct
from types import SimpleNamespace
import torch

class Record(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_uint), ("cluster", ctypes.c_uint * 3),
        ("arguments", ctypes.c_ubyte * 128), ("shared_limit", ctypes.c_int),
        ("result", ctypes.c_int),
    ]

library = ctypes.CDLL("libcuda.so.1")
library.fake_record.restype = ctypes.POINTER(Record)
record = library.fake_record().contents
STREAM = 0x5000
torch.cuda.device = lambda index: contextlib.nullcontext()
torch.cuda.current_stream = lambda *_: None
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_name = lambda *_: "Fake"
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
    multi_processor_count=SMS, shared_memory_per_block_optin=SHARED,
    shared_memory_per_multiprocessor=SHARED + 1024,
)
torch._C._cuda_getCurrentRawStream = lambda index: STREAM
from marlin_kernel import compiler, launch, sm80_configs, sm80_path
compiled = []

def compile_kernel(source, arch, **kwargs):
    compiled.append((source, arch))
    return compiler.Cubin(b"ELF", "kernel", 32, 0)

launch.compile_kernel = compile_kernel

def tensor(address, *shape, stride=0, dtype=torch.float16):
    return SimpleNamespace(
        data_ptr=lambda: address, shape=shape, dtype=dtype,
        stride=lambda i=None: (stride, 1) if i is None else stride,
        is_contiguous=lambda: stride in (0, shape[-1]), numel=lambda: math.prod(shape),
        device=torch.device("cuda", 0), get_device=lambda: 0, element_size=lambda: 2,
    )

workspace = launch.Workspace(tensor(0x6000), tensor(0x7000))
asked = []
def give_workspace(index, stream, need):
    asked.append(need)
    return workspace
sm80_path._workspace = give_workspace
"""


@pytest.fixture(scope="module")
def fake_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fake_driver")
    library = directory / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(FAKE)], check=True)
    return directory


def run(directory: Path, program: str, capability: tuple[int, int], sms: int, shared: int) -> None:
    """Run `program` after the prelude, on an imagined GPU. Its assertions are the test."""
    text = (
        f"SMS, SHARED = {sms}, {shared}\n{PRELUDE}\n"
        f"torch.cuda.get_device_capability = lambda *_: {capability}\n{program}"
    )
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(directory),
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


A100 = ((8, 0), 108, 163 * 1024)
ADA = ((8, 9), 128, 99 * 1024)
HOPPER = ((9, 0), 132, 227 * 1024)


@pytest.mark.parametrize("gpu", [A100, ADA, HOPPER], ids=["sm_80", "sm_89", "sm_90a"])
def test_sm80_launch(fake_directory: Path, gpu: tuple[tuple[int, int], int, int]) -> None:
    program = """
n, k, n_padded, k_padded = 300, 1000, 320, 1024
for m in (1, 8, 16, 17, 128, 1000):
    for batch_invariant in (False, True):
        a = tensor(0x100, m, k, stride=1008)
        operands = (a, tensor(0x200), tensor(0x300, 8, n_padded), tensor(0x400), tensor(0x500))
        sizes = (k, n, k_padded, n_padded, 128)
        types = sm80_configs.KernelTypes()
        config = sm80_configs.select_config(m, types, SHARED, batch_invariant)
        source = config.source(types)
        for call in range(2):
            count, record.shared_limit = record.count, 0
            known = source in [s for s, _ in compiled]
            sm80_path.gemm(*operands, *sizes, batch_invariant=batch_invariant)
            assert record.count == count + 1
            if not known:
                assert compiled[-1] == (source, ARCH)
                assert record.shared_limit == config.shared_bytes(types) <= SHARED
        plan = asked[-1]
        assert tuple(record.grid) == (plan.grid, 1, 1)
        assert 0 < plan.grid <= SMS * config.blocks_per_sm
        assert tuple(record.block) == (config.threads, 1, 1)
        assert record.shared_bytes == config.shared_bytes(types)
        assert record.stream == STREAM
        assert record.attributes == 0, "the kernel does not wait for its predecessor by itself"
        fields = struct.unpack_from("<11Qq7i", bytes(record.arguments))
        assert fields[:7] == (0x100, 0x200, 0x300, 0, 0, 0, 0)
        assert fields[7:12] == (0x400, 0x500, 0x6000, 0x7000, 1008)
        assert fields[12:] == (m, n, k, n_padded, k_padded, plan.splits, plan.in_turn)
        assert (plan.splits > 0) == batch_invariant
assert len(compiled) == len(set(compiled)), "a kernel is loaded once"
"""
    arch = f"sm_{gpu[0][0]}{gpu[0][1]}" + ("a" if gpu[0] == (9, 0) else "")
    run(fake_directory, f"ARCH = {arch!r}\n{program}", *gpu)


def test_sm80_operands_of_other_types(fake_directory: Path) -> None:
    program = """
from marlin_kernel.sm80_configs import KernelTypes
half, n = torch.float16, 4096
def call(m, weight_type, group_size, a_dtype=half, rows=32, **more):
    a = tensor(0x100, m, 4096, stride=4096, dtype=a_dtype)
    out = tensor(0x500, dtype=half)
    arguments = (a, tensor(0x200), tensor(0x300, rows, n), tensor(0x400), out)
    sm80_path.gemm(*arguments, 4096, n, 4096, n, group_size, weight_type=weight_type, **more)
    return struct.unpack_from("<11Q", bytes(record.arguments))
assert call(1, "uint4", 128, zeros=tensor(0x31)) == (
    0x100, 0x200, 0x300, 0x31, 0, 0, 0, 0x400, 0x500, 0x6000, 0x7000)
assert "weights::uint4, __half, __half, 8" in compiled[-1][0].expression
assert call(16, "uint4b8", 128, perm=tensor(0x32, 4096))[4] == 0x32
assert "128, true, false>" in compiled[-1][0].expression, "gathered by the kernel"
assert call(1, "nvfp4", 16, rows=256, global_scale=tensor(0x33))[6] == 0x33
assert call(1, "uint4b8", 0, torch.int8, rows=1, token_scales=tensor(0x34))[5] == 0x34
assert "weights::uint4b8, int8_t, __half" in compiled[-1][0].expression
call(1, "uint4b8", 64, reduce_half=True)
assert "64, false, true>" in compiled[-1][0].expression
call(1, "uint8", 128, rows=1, zeros=tensor(0x31))
assert "weights::uint8, __half" in compiled[-1][0].expression
assert "128, false, false>" in compiled[-1][0].expression, "zero points come with groups"
call(1, "uint4b8", 128, rows=1)
assert "false, 0, false, false>" in compiled[-1][0].expression
call(1, "uint4b8", 128, sm75=True)
assert compiled[-1][0].header == "sm75/kernel.cuh"
"""
    run(fake_directory, program, *HOPPER)


def test_sm80_split_knows_only_k_and_n(fake_directory: Path) -> None:
    program = """
splits = set()
for m in (1, 8, 9, 40, 64, 65, 500, 5000):
    a = tensor(0x100, m, 4096, stride=4096)
    arguments = (a, tensor(0x200), tensor(0x300, 32, 4096), None, tensor(0x500))
    sm80_path.gemm(*arguments, 4096, 4096, 4096, 4096, 128, batch_invariant=True)
    splits.add(asked[-1].splits)
assert splits == {8}, splits
"""
    run(fake_directory, program, *A100)


def test_nothing_is_launched_for_no_tokens(fake_directory: Path) -> None:
    program = """
arguments = (tensor(0x200), tensor(0x300, 32, 4096), None, tensor(0x500))
sm80_path.gemm(tensor(0x100, 0, 4096), *arguments, 4096, 4096, 4096, 4096, 128)
launch.gemm(tensor(0x100, 0, 4096), *arguments, 4096, 4096, 4096, 4096, 128)
assert record.count == 0 and not compiled
"""
    run(fake_directory, program, *HOPPER)


def test_refused_launch_raises_with_the_drivers_words(fake_directory: Path) -> None:
    program = """
record.result = 1
arguments = (tensor(0x200), tensor(0x300, 32, 4096), None, tensor(0x500))
try:
    sm80_path.gemm(tensor(0x100, 4, 4096, stride=4096), *arguments, 4096, 4096, 4096, 4096, 128)
except launch.LaunchError as error:
    assert "cuLaunchKernelEx" in str(error) and "fake driver" in str(error), error
else:
    raise AssertionError("no exception")
"""
    run(fake_directory, program, *HOPPER)


def test_sm90_decode_launch(fake_directory: Path) -> None:
    program = """
from marlin_kernel.kernel_configs import DecodeConfig
config = DecodeConfig(token_tiles=1, warps_n=2, warps_k=4, split=2, stages=4, blocks_per_sm=2)
m, n, k, n_padded, k_padded = 3, 300, 1000, 320, 1024
arguments = (tensor(0x100, m, k, stride=1008), tensor(0x200), tensor(0x300), None, tensor(0x500))
launch.launch_config(config, *arguments, k, n, k_padded, n_padded, 128)
assert compiled == [(config.source("float16", 128), "sm_90a")]
assert tuple(record.grid) == config.grid(m, k_padded // 64, n_padded // 64, 128)
assert tuple(record.block) == (config.threads, 1, 1)
assert record.shared_bytes == config.shared_bytes(m, k_padded // 64, 128)
assert tuple(record.cluster) == (2, 1, 1)
assert record.attributes == 1 << 4 | 1 << 6, "cluster and programmatic serialization"
fields = struct.unpack_from("<5Qq5i", bytes(record.arguments))
assert fields == (0x100, 0x200, 0x300, 0, 0x500, 1008, m, n, k, n_padded // 64, k_padded // 64)
"""
    run(fake_directory, program, *HOPPER)


def test_sm90_calls_of_one_size(fake_directory: Path) -> None:
    """What a size decides is decided once; addresses, strides and tensor maps belong to a call."""
    program = """
from marlin_kernel import kernel_configs
encoded = []
def tensor_map(*arguments):
    encoded.append(arguments)
    return len(encoded).to_bytes(128, "little")
launch._tensor_map = tensor_map
launch.workspace = lambda *need: workspace
k, n = 4096, 512
config = kernel_configs.select_config(64, 64, 8, 128, gpu="fake")
assert isinstance(config, kernel_configs.GemmConfig)
def call(a, weights, out, bias=None, **more):
    launch.gemm(a, tensor(weights), tensor(0x300), bias, tensor(out), k, n, k, n, 128, **more)
    (plan,) = {id(p): p for p in launch._plans._plans.values()}.values()
    return struct.unpack_from("<5Qq3i", bytes(record.arguments)), bytes(plan.arguments[128:256])
def mapped(count):
    return count.to_bytes(128, "little")
whole = tensor(0x100, 64, k, stride=k)
assert call(whole, 0x200, 0x500) == ((0x100, 0x200, 0x300, 0, 0x500, k, 64, n, k), mapped(1))
assert call(whole, 0x210, 0x510, tensor(0x400)) == (
    (0x100, 0x210, 0x300, 0x400, 0x510, k, 64, n, k), mapped(1))
rows = tensor(0x100, 64, k, stride=k + 8)
assert call(rows, 0x200, 0x500) == ((0x100, 0x200, 0x300, 0, 0x500, k + 8, 64, n, k), mapped(2))
batch = tensor(0x900, 4, 16, k)
assert call(batch, 0x200, 0x500) == ((0x900, 0x200, 0x300, 0, 0x500, k, 64, n, k), mapped(3))
assert call(whole, 0x200, 0x500)[1] == mapped(4)
assert [(e[0], *e[2:5]) for e in encoded] == [
    (0x100, 64, k, 2 * k), (0x100, 64, k, 2 * k + 16), (0x900, 64, k, 2 * k), (0x100, 64, k, 2 * k)]
assert len(compiled) == 1 and compiled[0][0] == config.source("float16", 128)
launch._plans._plans.clear()
invariant = kernel_configs.select_config(64, 64, 8, 128, batch_invariant=True)
call(whole, 0x200, 0x500, batch_invariant=True)
assert compiled[-1][0] == invariant.source("float16", 128) != compiled[0][0]
"""
    run(fake_directory, program, *HOPPER)


def test_act_order_launches(fake_directory: Path) -> None:
    program = """
from marlin_kernel import kernel_configs
k, n = 1000, 320
perm = tensor(0x600, 1024)
perm.data_ptr = lambda: 0x600
tuned = kernel_configs.gathering_configs()[0]
kernel_configs._tuned_act_order = lambda gpu: {(16, 5): ((4, tuned), (16, None))}
assert not kernel_configs.select_for_act_order(8, 16, 5, 128, gpu="fake").gathers
for m in (4, 300):
    a = tensor(0x100, m, k, stride=1008)
    a.new_empty = lambda *shape: tensor(0x700, *shape, stride=shape[1])
    a.reshape = lambda *shape: a
    arguments = (a, tensor(0x200), tensor(0x300), None, tensor(0x500))
    compiled.clear()
    count = record.count
    launch._tensor_map = lambda *encoded: bytes(128)
    launch.gemm(*arguments, k, n, 1024, n, 128, perm=perm)
    config = kernel_configs.select_for_act_order(m, 16, 5, 128, gpu="fake")
    assert compiled[0] == (config.source("float16", 128), "sm_90a")
    assert record.shared_bytes == config.shared_bytes(m, 16, 128)
    fields = struct.unpack_from("<5Qq3i", bytes(record.arguments))
    if m == 4:
        assert config == tuned and record.count == count + 1
        assert fields == (0x100, 0x200, 0x300, 0, 0x500, 1008, m, n, k)
    else:
        assert not config.gathers and record.count == count + 2
        shape = kernel_configs.gather_plan(m, k, 1024)
        assert compiled[1:] == [(shape.source(), "sm_90a")]
        assert fields == (0x700, 0x200, 0x300, 0, 0x500, 1024, m, n, 1024)
        launch.gather(a, perm)
        assert tuple(record.grid) == shape.grid and record.shared_bytes == shape.shared_bytes
        assert tuple(record.block) == (shape.threads, 1, 1)
        assert record.attributes & 1 << 6, "before its predecessor ends"
        fields = struct.unpack_from("<3Qq4i", bytes(record.arguments))
        assert fields == (0x100, 0x600, 0x700, 1008, m, k, 1024, shape.part)
"""
    run(fake_directory, program, *HOPPER)


def test_8bit_launch_on_hopper(fake_directory: Path) -> None:
    program = """
from marlin_kernel import scaled_mm, sm90_8bit_configs, sm90_8bit_path
encoded = []
def byte_map(*arguments):
    encoded.append(arguments)
    return bytes(range(128))
scaled_mm._byte_map = byte_map
n, k = 300, 1008
for m, group_size in ((1, 0), (100, 128)):
    types = sm90_8bit_configs.EightBitTypes("uint4b8", "int8", "float16", group_size)
    a = tensor(0x100, m, k, dtype=torch.int8)
    scales = tensor(0x400)
    scales.numel = lambda: 320 if group_size == 0 else 1
    operands = a, tensor(0x200), tensor(0x300, 5, 8, types.record_bytes), scales, None
    config = next(c for c in sm90_8bit_configs.supported_configs(types) if c.split == 2)
    sm90_8bit_path.launch_config(config, types, *operands, tensor(0x500, m, n))
    assert compiled[-1] == (config.source(types), "sm_90a")
    assert tuple(record.grid) == (config.grid(m, n, SMS), 1, 1)
    assert tuple(record.block) == (config.threads, 1, 1)
    assert record.shared_bytes == config.storage_bytes(types)
    assert record.attributes == 1 << 4 | 1 << 6, "in clusters, and before its predecessor ends"
    assert tuple(record.cluster) == (2, 1, 1)
    fields = struct.unpack_from("<5Q6iQ", bytes(record.arguments))
    assert fields[:5] == (0x200, 0x400, 0, 0x500, 0)
    assert fields[5:] == (1, int(group_size == 0), m, n, 8, 5, 0x300)
    assert encoded[-1] == (0x100, m, k, k, (config.tokens, 128))
"""
    run(fake_directory, program, *HOPPER)


def test_sparse_launches(fake_directory: Path) -> None:
    """2:4 sparse weights: through a tensor map on Hopper, without on the GPUs before it."""
    program = """
from marlin_kernel import sparse_configs, sparse_marlin, sparse_sm80
encoded = []
def tensor_map(*arguments):
    encoded.append(arguments)
    return bytes(range(128))
launch._tensor_map = tensor_map
n, k = 300, 1000
for m, bits, group_size in ((1, 4, 128), (100, 8, -1)):
    a = tensor(0x100, m, k, stride=1008)
    arguments = a, tensor(0x200, 5, 8, 64), tensor(0x300), None, tensor(0x500, m, n)
    arguments += bits, group_size
    configs = sparse_configs.supported_configs(bits, group_size)
    warpgroups = [c for c in configs if isinstance(c, sparse_configs.SparseConfig)]
    config = next(c for c in warpgroups if c.split == 2)
    sparse_marlin.launch_config(config, *arguments)
    assert compiled[-1] == (config.source("float16", bits, group_size), "sm_90a")
    assert tuple(record.grid) == config.grid(m, 8, 5, bits, group_size, SMS)
    assert tuple(record.block) == (config.threads, 1, 1)
    assert record.shared_bytes == config.storage_bytes(bits, group_size)
    assert record.attributes == 1 << 4 | 1 << 6, "in clusters, and before its predecessor ends"
    assert tuple(record.cluster) == (2, 1, 1)
    fields = struct.unpack_from("<4Q4i", bytes(record.arguments))
    assert fields == (0x200, 0x300, 0, 0x500, m, n, 8, 5)
    row_bytes = 2 * (1008 if m > 1 else 1000)
    assert encoded[-1] == (0x100, "float16", m, k, row_bytes, config.tokens)
    (plan,) = (p for key, p in sparse_marlin._plans._plans.items() if m in key)
    assert bytes(plan.arguments[128:256]) == bytes(range(128))

    if m == 1:
        config = next(c for c in configs if c.split == 2)
        assert isinstance(config, sparse_configs.SparseDecodeConfig)
        sparse_marlin.launch_config(config, *arguments)
        assert compiled[-1] == (config.source("float16", bits, group_size), "sm_90a")
        assert tuple(record.grid) == config.grid(m, 8, 5, bits, group_size, SMS)
        assert record.shared_bytes == config.shared_bytes(m, 8, bits, group_size)
        assert record.attributes == 1 << 4 | 1 << 6
        assert tuple(record.cluster) == (2, 1, 1)
        fields = struct.unpack_from("<5Qq5i", bytes(record.arguments))
        assert fields == (0x100, 0x200, 0x300, 0, 0x500, 1008, m, n, k, 5, 8)

    config = sparse_sm80.select(m)
    sparse_sm80.launch_config(config, *arguments)
    assert compiled[-1][0] == config.source(torch.float16, bits, group_size)
    assert tuple(record.grid) == config.grid(m, 5) and record.attributes == 0
    assert record.shared_bytes == config.storage_bytes(bits, group_size)
    fields = struct.unpack_from("<5Qq4i", bytes(record.arguments))
    assert fields == (0x100, 0x200, 0x300, 0, 0x500, 1008 if m > 1 else 1000, m, n, k, 8)
"""
    run(fake_directory, program, *HOPPER)
