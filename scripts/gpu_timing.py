"""Timing on the GPU, shared by the benchmark and the tuner.

Protocol: launches are captured into a CUDA graph, each with another copy of the weights (together
more than `rotate_bytes`, so that none is in the L2 cache), and the graph is replayed; a time is the
median over replays of the time of one replay divided by its launches.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_kernel import WEIGHT_TYPES, kernel_configs, launch
from marlin_kernel.compiler import KernelSource, compile_all
from scripts.command_line import commit, seconds

ROTATE_BYTES = 400_000_000
ERROR_LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of a product that is to be timed
CHECKED_TOKENS = 512  # of it, at most
REST_OPTION = {  # of argparse, for `let_rest`
    "type": seconds,
    "default": 0.5,
    "metavar": "S",
    "help": "seconds without work before more than 64 tokens are timed: products lower the clock",
}


def circumstances(script: str, options: argparse.Namespace) -> dict[str, Any]:
    """What measured numbers depend on, for the JSON of a benchmark.

    Files by name, without the folders of this machine.
    """

    query = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    ask = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    except OSError:
        gpus = "unknown"
    words = [word.rpartition("/")[2] if word.startswith("/") else word for word in sys.argv[1:]]
    return {
        "command": " ".join([script, *words]),
        "gpu": "; ".join(dict.fromkeys(gpus.splitlines())),  # equal ones once
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "options": {name: _plain(value) for name, value in vars(options).items()},
    }


def _plain(value: Any) -> Any:
    """An option as JSON holds it; files by name."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def relative_error(out: Tensor, a: Tensor, exact: Tensor) -> float:
    """|out - a W| / |a W| in float64, of the first 512 tokens; W: `exact`, float32 [K, N]."""
    difference = total = 0.0
    rows = a[:CHECKED_TOKENS].double()
    for start in range(0, exact.shape[1], 4096):
        part = slice(start, start + 4096)
        reference = rows @ exact[:, part].double()
        wrong = out[:CHECKED_TOKENS, part].double() - reference
        difference += wrong.square().sum().item()
        total += reference.square().sum().item()
    return math.sqrt(difference / total)


def compile_first(sources: Iterable[KernelSource]) -> None:
    """Compile, on all processors, what launches on the current device will ask for."""
    arch = launch.device_arch(torch.cuda.current_device())
    work = [(source, arch) for source in dict.fromkeys(sources)]
    for _, cubin in compile_all(work, os.cpu_count() or 1):
        if isinstance(cubin, Exception):
            raise cubin


def let_rest(m: int, rest: float) -> None:
    """Wait so many seconds before more than 64 tokens are timed: products that just ran have
    lowered the clock.
    """
    if m > 64:
        time.sleep(rest)


def launch_count(m: int, copies: int) -> int:
    """Launches of a graph, each with another one of so many copies of the weights: fewer where a
    product of many tokens takes long, and reads much besides them."""
    return max(2, copies if m <= 256 else copies // 4)


def graph_time(launches: Sequence[Callable[[], None]], replays: int = 7) -> float:
    """Median microseconds of one launch."""
    return statistics.median(replay_times(launches, replays)) * 1e6 / len(launches)


def captured(launches: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of all launches; the first two are made once before, as captures require."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for launch in launches[:2]:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph


def replay_times(launches: Sequence[Callable[[], None]], replays: int) -> list[float]:
    """Seconds of each replay of a graph of all launches."""
    graph = captured(launches)
    graph.replay()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


@dataclass(frozen=True)
class RotatingWeights:
    """Random weights in device order, in several copies.

    codes: int32 [copies, K * N * bits / 32]; scales: float16 [copies, groups * N], or, of types
    other than uint4b8, the bytes of rows of groups (kernel_configs.row_bytes).
    """

    k: int
    n: int
    group_size: int
    codes: Tensor
    scales: Tensor
    weight_type: str = "uint4b8"
    global_scale: Tensor | None = None

    @property
    def copies(self) -> int:
        return self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Of one copy."""
        return self.codes[0].nbytes + self.scales[0].nbytes

    @classmethod
    def make(
        cls,
        k: int,
        n: int,
        group_size: int,
        rotate_bytes: int = ROTATE_BYTES,
        weight_type: str = "uint4b8",
    ) -> RotatingWeights:
        groups = 1 if group_size == -1 else -(-k // group_size)
        if weight_type != "uint4b8":
            return cls._of_type(k, n, group_size, groups, rotate_bytes, weight_type)
        one = k * n // 2 + groups * n * 2
        copies = max(2, -(-rotate_bytes // one))
        codes = torch.empty(copies, k * n // 8, dtype=torch.int32, device="cuda")
        codes.random_(-(2**31), 2**31 - 1)
        scales = torch.rand(copies, groups * n, device="cuda").mul_(0.01).half()
        return cls(k, n, group_size, codes, scales)

    @classmethod
    def _of_type(
        cls, k: int, n: int, group_size: int, groups: int, rotate_bytes: int, weight_type: str
    ) -> RotatingWeights:
        t = WEIGHT_TYPES[weight_type]
        row = kernel_configs.row_bytes(weight_type) * groups * n // kernel_configs.TILE_N
        words = k * n * t.bits // 32
        copies = max(2, -(-rotate_bytes // (4 * words + row)))
        codes = torch.empty(copies, words, dtype=torch.int32, device="cuda")
        codes.random_(-(2**31), 2**31 - 1)
        if weight_type == "float8_e4m3fn":
            codes &= 0x77777777  # no NaN
        scales = torch.randint(0, 256, (copies, row), dtype=torch.uint8, device="cuda")
        # small numbers in every format of scales: fp16 below 2**-7, e4m3 below 2, e8m0 around 1
        if t.scale == "e8m0":
            scales.bitwise_and_(0x07).bitwise_or_(0x78)
        else:
            scales.bitwise_and_(0x1F if t.scale == "float16" else 0x3F)
        factor = torch.ones(1, device="cuda") if t.global_scale else None
        return cls(k, n, group_size, codes, scales, weight_type, factor)
