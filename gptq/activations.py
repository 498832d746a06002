"""Activations of all batches between two layers: on the device, in host memory, or on disk."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_kernel.errors import ConfigError

from .background import background_thread
from .lock import unfinished_folder

# Copies to the host that may be under way, and fetched tensors not yet used: the host runs ahead of
# the device, and each of them takes device memory.
_IN_FLIGHT = 2
_UNUSED = 4


class Store:
    """Where tensors lie between two uses. What `store` returns is kept by the caller and given to
    `fetch`, whose result `received` turns into the tensor on the device."""

    def store(self, tensor: Tensor) -> Any:
        raise NotImplementedError

    def fetch(self, kept: Any) -> Any:
        """Start to bring a tensor back."""
        raise NotImplementedError

    def received(self, arriving: Any) -> Tensor:
        raise NotImplementedError


class Offload(Store):
    """Copies between a GPU and pinned host memory, on streams beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._out, self._into = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._leaving: deque[torch.cuda.Event] = deque()
        self._received: deque[torch.cuda.Event] = deque()

    def store(self, tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """A copy in pinned memory, and the event after which it is complete."""
        while len(self._leaving) >= _IN_FLIGHT:
            self._leaving.popleft().synchronize()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            host.copy_(tensor, non_blocking=True)
            done = self._out.record_event()
        tensor.record_stream(self._out)
        self._leaving.append(done)
        return host, done

    def fetch(self, kept: tuple[Tensor, torch.cuda.Event]) -> tuple[Tensor, torch.cuda.Event]:
        """A copy on the device, and the event after which it may be read."""
        host, stored = kept
        self._into.wait_event(stored)
        with torch.cuda.stream(self._into):
            tensor = host.to(self.device, non_blocking=True)
            return tensor, self._into.record_event()

    def received(self, arriving: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        """The tensor, from now on usable on the current stream."""
        tensor, arrived = arriving
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(arrived)
        tensor.record_stream(stream)
        self._received.append(stream.record_event())
        if len(self._received) > _UNUSED:
            self._received.popleft().synchronize()
        return tensor


@dataclass
class _File:
    """A tensor in a file of its own, which goes when nothing refers to it any more."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype
    written: Future[None] | None = None

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path)


class DiskOffload(Store):
    """Plain files, one per tensor, written behind and read ahead by one thread.

    folder: of this store alone, made here and removed by `close`. device: of the tensors.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"offload_activations: {folder} cannot be made ({error}); name another folder"
            ) from error
        self._names = itertools.count()
        self._thread = background_thread("activations")
        self._leaving: deque[Future[None]] = deque()

    def store(self, tensor: Tensor) -> _File:
        """A file that will hold `tensor`, which must not be changed."""
        while len(self._leaving) >= _IN_FLIGHT:
            self._wait(self._leaving.popleft())
        file = _File(self.folder / str(next(self._names)), tensor.shape, tensor.dtype)
        file.written = self._thread.submit(_write, file.path, tensor.cpu().contiguous())
        self._leaving.append(file.written)
        return file

    def fetch(self, kept: _File) -> tuple[_File, Future[Tensor]]:
        return kept, self._thread.submit(self._read, kept)  # behind all writing before it

    def received(self, arriving: tuple[_File, Future[Tensor]]) -> Tensor:
        self._wait(arriving[0].written)
        return self._wait(arriving[1]).to(self.device, non_blocking=True)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, file: _File) -> Tensor:
        pinned = self.device.type == "cuda"
        tensor = torch.empty(file.shape, dtype=file.dtype, pin_memory=pinned)
        with open(file.path, "rb", buffering=0) as stream:
            count = _read_into(stream, tensor)
        if count != tensor.numel() * tensor.element_size():
            raise OSError(f"{file.path} is shorter than what was written")
        return tensor

    def _wait(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except OSError as error:
            raise ConfigError(
                f"offload_activations: {self.folder} does not hold the activations ({error}); make "
                "room or name another folder, and continue with --resume"
            ) from error


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _write(path: Path, tensor: Tensor) -> None:
    with open(path, "wb") as stream:
        stream.write(_bytes(tensor))


def _read_into(stream: Any, tensor: Tensor) -> int:
    """Fill `tensor`; returns the bytes that were there."""
    view, count = _bytes(tensor), 0
    while count < len(view):
        got = stream.readinto(view[count:])
        if not got:
            break
        count += got
    return count


@contextlib.contextmanager
def store_of(
    where: str | None, device: torch.device, out: Path, rank: int = 0
) -> Iterator[Store | None]:
    """The store that a value of --offload_activations means, for the run that writes `out`."""
    if where is None or where == "host":
        yield None if where is None else Offload(device)
        return
    folder = disk_folder(where, out)
    store = DiskOffload(folder / str(rank), device)
    try:
        yield store
    finally:
        store.close()
        with contextlib.suppress(OSError):  # other processes still have theirs
            folder.rmdir()


def remove_left_over(where: str | None, out: Path) -> None:
    """Remove the files of a dead run that wrote `out`; only one process may do so."""
    for place in {"disk", where} - {None, "host"}:
        shutil.rmtree(disk_folder(place, out), ignore_errors=True)


def disk_folder(where: str, out: Path) -> Path:
    """Folder of the files: inside that of the unfinished run ("disk"), or in a folder `where`."""
    if where == "disk":
        return unfinished_folder(out) / "activations"
    key = hashlib.sha256(str(out).encode()).hexdigest()[:8]
    return Path(where).expanduser().absolute() / f"marlin-activations-{out.name}-{key}"


class Activations:
    """One tensor per batch. With a Store they lie elsewhere and are fetched one ahead."""

    def __init__(self, count: int, offload: Store | None = None) -> None:
        self._offload = offload
        self._kept: list = [None] * count
        self._ahead: tuple[int, Any] | None = None

    def like(self) -> Activations:
        """As many, all empty."""
        return Activations(len(self), self._offload)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __setitem__(self, i: int, tensor: Tensor) -> None:
        if self._ahead is not None and self._ahead[0] == i:
            self._ahead = None
        self._kept[i] = tensor if self._offload is None else self._offload.store(tensor)

    def __getitem__(self, i: int) -> Tensor:
        if self._offload is None:
            return self._kept[i]
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != i:
            ahead = (i, self._offload.fetch(self._kept[i]))
        following = i + 1
        if following < len(self) and self._kept[following] is not None:
            self._ahead = (following, self._offload.fetch(self._kept[following]))
        return self._offload.received(ahead[1])

    def take(self, i: int) -> Tensor:
        """The tensor of batch i, which is no longer kept here."""
        tensor = self[i]
        self._kept[i] = None
        return tensor

    def copy(self) -> Activations:
        """The same tensors under a second name; setting one does not change the other."""
        copied = self.like()
        copied._kept = list(self._kept)
        return copied
