"""Launches without a GPU: the device of the tensors is current; missing parts are named."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode

from marlin_kernel import launch, scaled_mm, sparse_marlin, sparse_sm80


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current device of two imagined GPUs, in a list; device 0 at first."""
    now = [0]

    @contextlib.contextmanager
    def device(index: int):
        now[0], before = index, now[0]
        yield
        now[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "imagined")
    monkeypatch.setattr(launch, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(launch, "device_arch", lambda _: "sm_90a")
    return now


def scaled(empty: Callable[..., torch.Tensor]) -> torch.Tensor:
    a, weight = empty(3, 64, dtype=torch.int8), empty(48, 64, dtype=torch.int8)
    return scaled_mm._run(a, weight, None, empty(3), empty(48), torch.float16, None)


def sparse(empty: Callable[..., torch.Tensor]) -> torch.Tensor:
    weights, scales = empty(1, 1, 128, dtype=torch.uint8), empty(1, 64)
    a = empty(3, 128, dtype=torch.float16)
    return sparse_marlin._sparse_gemm(a, weights, scales, None, 128, 64, 128, "uint4b8")


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("product", "module", "arch"),
    [
        (scaled, scaled_mm, "sm_90a"),
        (sparse, sparse_marlin, "sm_90a"),
        (sparse, sparse_sm80, "sm_80"),
    ],
    ids=["scaled", "sparse", "sparse_sm80"],
)
def test_the_device_of_the_tensors_is_current(
    product, module, arch: str, index: int, current: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    monkeypatch.setattr(launch, "device_arch", lambda _: arch)
    monkeypatch.setattr(module, "launch_config", lambda *_, **__: launched.append(current[0]))
    monkeypatch.setattr(sparse_marlin, "_aligned", lambda a: a)  # asks for addresses
    with FakeTensorMode():
        out = product(
            lambda *shape, **options: torch.empty(*shape, device=f"cuda:{index}", **options)
        )
    assert out.device == torch.device("cuda", index)
    assert launched == [index] and current == [0]


def test_missing_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    launch._driver.cache_clear()
    with pytest.raises(launch.LaunchError, match="pip install cuda-bindings"):
        launch._driver()
