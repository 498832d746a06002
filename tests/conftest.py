"""Fixtures shared by the tests. Everything here runs without a GPU and without a network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch


def _share_gpus() -> None:
    """Each process of a parallel run has another GPU first; it sees all."""
    count = torch.cuda.device_count()
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")  # gw0, gw1, ...
    if worker and count > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        first = int(worker.removeprefix("gw"))
        order = [str((first + i) % count) for i in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(order)


_share_gpus()
for name in ("DATA_DIR", "KERNEL_BACKEND", "KERNEL_LINEINFO", "KERNEL_PREBUILT"):
    os.environ.pop(f"MARLIN_{name}", None)  # what a user has set is not what is tested
# Processes that tests start import this checkout, not what may be installed.
_PLACES = (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PLACES))


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes are not spelled out in names of tests: those of gzip tell the time, and the workers
    of a run must find the same names."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "exhaustive" not in config.getoption("-m"):
        left_out = [item for item in items if "exhaustive" in item.keywords]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if "exhaustive" not in item.keywords]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted sources belong to the run, not to the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARLIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums of one order, whatever the machine: runs of the same work give the same bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
