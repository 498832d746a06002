"""Timing on the GPU, shared by the benchmark and the tuner.

Protocol: launches are captured into a CUDA graph, each with another copy of the weights (together
more than `rotate_bytes`, so that none is in the L2 cache), and the graph is replayed; a time is the
median over replays of the time of one replay divided by its launches.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROTATE_BYTES = 400_000_000


def graph_time(launches: Sequence[Callable[[], None]], replays: int = 7) -> float:
    """Median microseconds of one launch."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for launch in launches[:2]:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times)


@dataclass(frozen=True)
class RotatingWeights:
    """Random weights in device order, in several copies.

    codes: int32 [copies, K * N / 8]; scales: float16 [copies, groups * N].
    """

    k: int
    n: int
    group_size: int
    codes: Tensor
    scales: Tensor

    @property
    def copies(self) -> int:
        return self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Of one copy."""
        return self.codes[0].nbytes + self.scales[0].nbytes

    @classmethod
    def make(
        cls, k: int, n: int, group_size: int, rotate_bytes: int = ROTATE_BYTES
    ) -> RotatingWeights:
        groups = 1 if group_size == -1 else k // group_size
        one = k * n // 2 + groups * n * 2
        copies = max(2, -(-rotate_bytes // one))
        codes = torch.empty(copies, k * n // 8, dtype=torch.int32, device="cuda")
        codes.random_(-(2**31), 2**31 - 1)
        scales = torch.rand(copies, groups * n, device="cuda").mul_(0.01).half()
        return cls(k, n, group_size, codes, scales)
