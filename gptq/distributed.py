"""Several processes that share one quantization.

Every process holds the whole model's layer and its own calibration samples. Hessians are summed
over all; the outputs of a stage are divided, since no output of GPTQ depends on another; codes and
scales are gathered, so that all go on with the same weights. torch.distributed does the transport:
NCCL between GPUs, gloo between CPUs.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from marlin_kernel.errors import ConfigError, MarlinError

_PATIENCE = datetime.timedelta(minutes=30)  # of a process for the others, then the run ends


class WorkerError(MarlinError, RuntimeError):
    """Another process of the run has ended, or does not answer."""


class Workers:
    """The processes of a run; without arguments the only one. rank: 0..count - 1."""

    rank = 0
    count = 1

    def __init__(self) -> None:
        # makes a context that counts the seconds of a collective, the wait for the others included
        self.timed: Callable[[str], AbstractContextManager] = lambda kind: nullcontext()

    def sum(self, tensor: Tensor) -> None:
        """Add up over all processes, in place."""

    def gather(self, part: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate along the last dimension what every process holds; sizes: columns of each."""
        return part

    def stack(self, part: Tensor) -> Tensor:
        """What every process holds, contiguous and of equal shape, in the order of their ranks."""
        return part[None]

    def broadcast(self, tensor: Tensor, source: int) -> Callable[[], None]:
        """Start to overwrite `tensor`, contiguous, by what process `source` has there. Returns what
        must be called before the tensor is used (by the source: changed) again."""
        return lambda: None

    def agree(self, value: Any) -> Any:
        """The value that process 0 has."""
        return value

    def collect(self, value: Any) -> list[Any]:
        """What every process holds, in the order of their ranks."""
        return [value]

    def share(self, total: int) -> list[int]:
        """How to divide `total` things: sizes for each process, equal up to one."""
        each, more = divmod(total, self.count)
        return [each + (rank < more) for rank in range(self.count)]


class _Group(Workers):
    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        super().__init__()
        self._dist = dist
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._device = device

    def sum(self, tensor: Tensor) -> None:
        with self.timed("collective.sum"):
            self._call(self._dist.all_reduce, tensor)

    def gather(self, part: Tensor, sizes: Sequence[int]) -> Tensor:
        # equal shapes for all, as every backend takes them: pad, gather, cut
        padded = torch.zeros(max(sizes), part.shape[0], dtype=part.dtype, device=part.device)
        padded[: part.shape[1]] = part.T
        whole = torch.cat([p[:size] for p, size in zip(self.stack(padded), sizes, strict=True)])
        return whole.T.contiguous()

    def stack(self, part: Tensor) -> Tensor:
        whole = part.new_empty(self.count, *part.shape)
        with self.timed("collective.gather"):
            self._call(self._dist.all_gather, list(whole), part)
        return whole

    def broadcast(self, tensor: Tensor, source: int) -> Callable[[], None]:
        work = self._call(self._dist.broadcast, tensor, src=source, async_op=True)

        def wait() -> None:
            with self.timed("collective.broadcast"):
                self._call(work.wait)

        return wait

    def agree(self, value: Any) -> Any:
        box = [value]
        self._call(self._dist.broadcast_object_list, box, src=0, device=self._device)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        values = [None] * self.count
        self._call(self._dist.all_gather_object, values, value)
        return values

    def _call(self, collective: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return collective(*arguments, **named)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise WorkerError(
                f"process {self.rank} of {self.count}: another process of the run has ended or "
                f"does not answer ({reason}); see its message; finished layers are kept, continue "
                "with --resume"
            ) from error


def launched_by_torchrun() -> bool:
    """Whether this process is one of several (`torchrun --nproc-per-node N ...`)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Whether this process is the one that reads and prints for all."""
    return int(os.environ.get("RANK", "0")) == 0


def local_device(name: str | None) -> str | None:
    """Device of this process: `--device cuda` means the GPU with the process's local rank.

    Raises ConfigError if one GPU is named for all of several processes.
    """
    if not launched_by_torchrun():
        return name
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda:"):
        raise ConfigError(
            f"device={name!r} with {os.environ['WORLD_SIZE']} processes: each takes its own GPU; "
            "use --device cuda"
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else kind


def join(device: torch.device) -> Workers:
    """The group of processes that torchrun started, or a single worker."""
    if not launched_by_torchrun():
        return Workers()
    import torch.distributed as dist

    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    return _Group(device)


def leave() -> None:
    """End the group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
