"""Activations of all batches between two layers: on the device, or beside it in host memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

# Copies to the host that may be under way, and fetched tensors not yet used: the host runs ahead of
# the device, and each of them takes device memory.
_IN_FLIGHT = 2
_UNUSED = 4


class Offload:
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

    def fetch(self, host: Tensor, stored: torch.cuda.Event) -> tuple[Tensor, torch.cuda.Event]:
        """A copy on the device, and the event after which it may be read."""
        self._into.wait_event(stored)
        with torch.cuda.stream(self._into):
            tensor = host.to(self.device, non_blocking=True)
            return tensor, self._into.record_event()

    def received(self, tensor: Tensor, arrived: torch.cuda.Event) -> Tensor:
        """`tensor`, from now on usable on the current stream."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(arrived)
        tensor.record_stream(stream)
        self._received.append(stream.record_event())
        if len(self._received) > _UNUSED:
            self._received.popleft().synchronize()
        return tensor


class Activations:
    """One tensor per batch. With an Offload they lie in host memory and are fetched one ahead."""

    def __init__(self, count: int, offload: Offload | None = None) -> None:
        self._offload = offload
        self._kept: list = [None] * count
        self._ahead: tuple[int, Tensor, torch.cuda.Event] | None = None

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
            ahead = (i, *self._offload.fetch(*self._kept[i]))
        following = i + 1
        if following < len(self) and self._kept[following] is not None:
            self._ahead = (following, *self._offload.fetch(*self._kept[following]))
        return self._offload.received(*ahead[1:])

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
