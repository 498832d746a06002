"""Gathering and rounding of activations: the kernels' own text on the CPU, and the reference."""

from __future__ import annotations

import ctypes
import functools
import itertools

import pytest
import torch
from emulator.build import build, needs_emulator

from marlin_kernel import kernel_configs, launch, reference, sm80_path
from marlin_kernel.sm80_layout import K_ORDER, kernel_activations

pytestmark = needs_emulator
KINDS = [
    (dtype, code)
    for dtype in (torch.float16, torch.bfloat16)
    for code in (torch.int8, torch.float8_e4m3fn)
]


@functools.cache
def library() -> ctypes.CDLL:
    return build("run_activations.cpp", {})


@pytest.mark.parametrize(("dtype", "code"), KINDS, ids=str)
@pytest.mark.parametrize(("m", "k", "offset"), [(1, 64, 0), (5, 333, 0), (3, 4200, 1)])
def test_rounding_equals_the_reference(dtype, code, m: int, k: int, offset: int) -> None:
    buffer = (torch.randn(m * k + offset) * 3).to(dtype)
    a = buffer[offset:].view(m, k)
    a[-1] = 0
    k_padded = -(-k // 64) * 64
    expected, expected_scales = reference.quantize_activations(a, code)
    for seed, grid in ((0, 1), (1, 2), (2, 7)):
        codes = torch.full((m, k_padded), 85, dtype=torch.uint8)
        scales = torch.full((m,), float("nan"))
        pointers = (a.data_ptr(), codes.data_ptr(), scales.data_ptr())
        block = sm80_path._QUANTIZE.pack(*pointers, a.stride(0), m, k, k_padded)
        kind = KINDS.index((dtype, code))
        assert library().run_quantize(kind, ctypes.c_uint(seed), grid, block) == 0
        assert torch.equal(scales, expected_scales)
        ordered = kernel_activations(expected, k_padded).float()
        assert torch.equal(codes.view(code).float(), ordered)  # 0 and -0 are one number


def test_gathering() -> None:
    a = torch.randn(7, 330).half()[:, :300]
    perm = torch.randint(-1, 300, (320,), dtype=torch.int32)
    expected = torch.where(perm >= 0, a[:, perm.clamp(min=0)], 0)
    for seed, grid in ((0, 1), (1, 3)):
        out = torch.full((7, 320), float("nan")).half()
        pointers = (a.data_ptr(), perm.data_ptr(), out.data_ptr())
        block = sm80_path._GATHER.pack(*pointers, a.stride(0), 7, 320)
        assert library().run_gather(ctypes.c_uint(seed), grid, block) == 0
        assert torch.equal(out, expected)


@functools.cache
def gather_library(mutation: tuple[str, str, str] | None = None) -> ctypes.CDLL:
    return build("run_gather.cpp", {}, mutation)


@pytest.mark.parametrize(
    ("m", "k", "k_padded", "stride", "offset"),
    [
        (1, 300, 320, 300, 0),  # one row that no bulk copy can take
        (7, 320, 320, 328, 8),
        (5, 312, 1344, 320, 0),  # several parts
        (3, 4096, 4096, 4104, 8),  # blocks that fetch a row together
        (3, 4104, 4160, 4104, 0),  # the last one less
        (4, 40, 4096, 48, 0),  # some of them nothing
        (3, 4100, 4160, 4100, 0),  # and one that no bulk copy can take
        (9, 333, 384, 340, 1),
        (300, 64, 64, 64, 0),  # more tokens than blocks
        (40, 56, 128, 56, 0),
    ],
)
def test_gathering_on_hopper(m: int, k: int, k_padded: int, stride: int, offset: int) -> None:
    generator = torch.Generator().manual_seed(k)
    buffer = torch.full((m * stride + offset,), float("nan")).half()
    a = buffer[offset:].as_strided((m, k), (stride, 1))
    a.copy_(torch.randn(m, k, generator=generator))
    perm = torch.randint(-1, k, (k_padded,), dtype=torch.int32, generator=generator)
    expected = torch.where(perm >= 0, a[:, perm.clamp(min=0)], 0)
    ways = ({"picks": True}, *({"picks": False, "cluster": c} for c in (1, 2, 4, 8)))
    for multiprocessors, way in itertools.product((1, 3, 132), ways):
        plan = kernel_configs.gather_plan(m, k, k_padded, multiprocessors, **way)
        for seed in (0, 1, 2):
            out = torch.full((m + 1, k_padded), float("nan")).half()
            pointers = (a.data_ptr(), perm.data_ptr(), out.data_ptr())
            block = launch._GATHER.pack(*pointers, stride, m, k, k_padded, plan.part)
            shape = (plan.threads, plan.rows, plan.cluster, ctypes.c_uint(seed), *plan.grid[:2])
            assert gather_library().run_gather(*shape, plan.shared_bytes, block) == 0
            assert torch.equal(out[:m], expected)
            assert out[m].isnan().all()


def test_plans_of_gathering() -> None:
    longest = kernel_configs.MAX_GATHERED_INPUTS
    for k in (64, 1000, 4096, 11008, 28672, 53248, longest):
        k_padded = -(-k // 64) * 64
        for m in (1, 2, 16, 100, 132, 133, 1000, 100000):
            plan = kernel_configs.gather_plan(m, k, k_padded)
            parts, tokens, _ = plan.grid
            assert (plan.rows == 0) == (m <= 2)
            assert parts % plan.cluster == 0 and (plan.cluster == 1 or tokens == m <= 64)
            assert plan.shared_bytes <= kernel_configs.MAX_SHARED_BYTES, (m, k, plan)
            assert (parts - 1) * plan.part < k_padded <= parts * plan.part and plan.part % 8 == 0
            assert 0 < tokens <= min(m, 65535)


# What a careless edit may break: (text, replacement). Each must be noticed.
GATHER_MUTATIONS = {
    "rows are not waited for": ("ptx::mbarrier_wait(&shared_.full[place], parity);", ""),
    "a row is overwritten while it is read": ("ptx::block_sync();  // all have read the row", ""),
    "the phase is forgotten": ("parity ^= 1;", ""),
    "no input is taken for the last one": ("row(threadIdx.x)[p_.k] = 0;", ""),
}
CLUSTER_MUTATIONS = {
    "barriers of others are not waited for": ("ptx::cluster_wait();", "ptx::block_sync();"),
    "two blocks bring the same share": ("ptx::cluster_rank())", "ptx::cluster_rank() & 6)"),
    "a share is for its block alone": ("(1 << Config::CLUSTER) - 1", "1 << ptx::cluster_rank()"),
    "the last share reads on": ("min(share, p_.k - first)", "share"),
}
PICK_MUTATIONS = {
    "no input is taken for one": ("columns.z < 0 ? 0 : ", ""),
    "two elements change places": ("third | fourth << 16", "fourth | third << 16"),
    "one token of each block": ("token += gridDim.y", "token += p.m"),
    "threads beyond the row write": ("if (4 * quad >= p.k_padded) return;", ""),
}


MUTATIONS = GATHER_MUTATIONS | CLUSTER_MUTATIONS | PICK_MUTATIONS


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_of_gathering_is_caught(name: str) -> None:
    clusters = name in CLUSTER_MUTATIONS
    rows = 0 if name in PICK_MUTATIONS else 1 if clusters else 2
    library = gather_library(("sm90/gather.cuh", *MUTATIONS[name]))
    m, k, k_padded = (3, 4104, 4160) if clusters else (600, 64, 64)
    a = torch.randn(m, k).half()
    memory = torch.zeros(4 * k_padded, dtype=torch.int32)  # so that what reads on finds indices
    perm = memory[:k_padded].random_(-1, k)
    perm[5] = perm[6] = -1
    expected = torch.where(perm >= 0, a[:, perm.clamp(min=0)], 0)
    plan = kernel_configs.gather_plan(m, k, k_padded, 132 if clusters else 2, picks=rows == 0)
    assert plan.rows == rows and plan.cluster == (8 if clusters else 1)
    correct = True
    for seed in range(6):
        out = torch.full((m + 4, k_padded), float("nan")).half()
        pointers = (a.data_ptr(), perm.data_ptr(), out.data_ptr())
        block = launch._GATHER.pack(*pointers, k, m, k, k_padded, plan.part)
        shape = (plan.threads, plan.rows, plan.cluster, ctypes.c_uint(seed), *plan.grid[:2])
        status = library.run_gather(*shape, plan.shared_bytes, block)
        correct = correct and status == 0 and torch.equal(out[:m], expected)
        correct = correct and bool(out[m:].isnan().all())
    assert not correct


def test_order_of_inputs() -> None:
    assert sorted(K_ORDER) == list(range(16))
    codes = torch.arange(32, dtype=torch.int8)[None]
    assert kernel_activations(codes, 48)[0, :16].tolist() == list(K_ORDER)
    assert kernel_activations(codes, 48)[0, 16:].tolist() == [16 + i for i in K_ORDER] + [0] * 16
