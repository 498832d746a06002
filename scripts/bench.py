"""Benchmark the W4A16 kernel against torch.matmul and the time to read the weights at all.

    python scripts/bench.py                                 # configs/bench/anchors.yaml
    python scripts/bench.py --dtype float16 bfloat16 --group_size 32 64 128 -1 --m 1 16
    python scripts/bench.py --run_peers                     # beside other kernels, as installed
    python scripts/bench.py --peers docs/results/h200_peers.csv    # beside their stored times
    python scripts/bench.py --batch_invariant               # what that option costs
    python scripts/bench.py --overhead                      # host time of eager calls

The benchmarks of the original Marlin: the largest speed-up, whole models, under sustained load:

    python scripts/bench.py --config configs/bench/peak.yaml
    python scripts/bench.py --config configs/bench/models.yaml
    python scripts/bench.py --config configs/bench/models.yaml --sustained 2

Every result is checked against float64 before it is timed. Times are medians over replays of CUDA
graphs that rotate over copies of the weights (scripts/gpu_timing.py). `floor` is a kernel that only
reads the weights' bytes, `fl_pdl` the same with programmatic dependent launch, both measured in the
same run; `cublas` is the faster of torch.matmul with weights [K, N] and [N, K] transposed;
`alone` is the kernel without programmatic dependent launch. --sustained launches each entry back to
back for so many seconds, until power limits the clock.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from torch import Tensor

from marlin_kernel import kernel_configs, launch, sm90_layout
from marlin_kernel.compiler import KernelSource
from marlin_kernel.formats import LayerSpec
from marlin_kernel.kernel_configs import KernelConfig
from marlin_kernel.layout import permute_columns
from marlin_kernel.packing import pack
from marlin_kernel.weight_types import weight_type
from scripts import kernel_peers, plot_bench
from scripts.bench_tables import (
    HEADER,
    add_peers,
    print_models,
    print_row,
    read_peers,
    summarize,
)
from scripts.call_overhead import call_overhead
from scripts.command_line import make_parser, positive, require_gpu, shape, write_json
from scripts.gpu_timing import (
    CHECKED_TOKENS,
    ERROR_LIMITS,
    REST_OPTION,
    ROTATE_BYTES,
    RotatingWeights,
    circumstances,
    compile_first,
    graph_time,
    launch_count,
    let_rest,
    relative_error,
)

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    require_gpu("scripts/bench.py", capability=(9, 0))
    config = yaml.safe_load(options.config.read_text())
    models = {} if options.shapes else config.get("models", {})
    shapes = config.get("shapes") or sum(models.values(), [])
    shapes = list(dict.fromkeys(options.shapes or map(shape, shapes)))
    tokens = sorted(options.m or config["tokens"])
    peers = read_peers(options.peers) if options.peers else {}
    report = {"circumstances": circumstances("scripts/bench.py", options), "rows": []}
    rows = report["rows"]
    if options.overhead:
        report["overhead"] = overheads(shapes[0], tokens, options)
    else:
        precompile(shapes, tokens, options)
        print(HEADER)
        # Few tokens first: minutes of large products leave the chip hot, and its clock low.
        for part in ([m for m in tokens if m <= 64], [m for m in tokens if m > 64]):
            for dtype, group_size in itertools.product(options.dtype, options.group_size):
                for k, n in shapes if part else ():
                    found = bench_shape(k, n, part, dtype, group_size, options)
                    add_peers(found, peers)
                    if options.run_peers is not None:
                        names = options.run_peers or list(kernel_peers.PEERS)
                        run_peers(found, names, report, options.rest)
                    for row in found:
                        print_row(row)
                    rows += found
                    write(report, options.output)
        report["summary"] = summarize(rows)
        print_models(models, rows)
    write(report, options.output)
    if options.plot and rows:
        plot_bench.draw(report, options.plot)


def parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs/bench/anchors.yaml",
        help="YAML: shapes or models, and tokens",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape,
        metavar="KxN",
        help="as 4096x12288, instead of the configuration's",
    )
    parser.add_argument("--m", nargs="+", type=positive, help="tokens, likewise")
    parser.add_argument(
        "--group_size", nargs="+", type=int, default=[128], help="of 32, 64, 128; -1: one group"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float16"], help="of activations"
    )
    parser.add_argument(
        "--batch_invariant", action="store_true", help="also time batch-invariant products"
    )
    parser.add_argument("--overhead", action="store_true", help="only the host time of eager calls")
    parser.add_argument("--no_baseline", action="store_true", help="skip torch.matmul")
    parser.add_argument("--rest", **REST_OPTION)
    parser.add_argument(
        "--sustained", type=float, default=0.0, metavar="S", help="also S seconds per entry"
    )
    parser.add_argument(
        "--run_peers",
        nargs="*",
        choices=kernel_peers.PEERS,
        help="time these other kernels in the same run, if they are installed (no name: all)",
    )
    parser.add_argument(
        "--peers",
        type=Path,
        help="times of other kernels, as docs/results/h200_peers.csv: "
        "kernel,dtype,group_size,K,N,M,us",
    )
    parser.add_argument("--output", type=Path, help="JSON file for rows and circumstances")
    parser.add_argument("--plot", type=Path, help="PNG or SVG file (needs matplotlib)")
    return parser


def write(report: dict, path: Path | None) -> None:
    if path:
        write_json(path, report)


def select(
    k: int, n: int, m: int, group_size: int, dtype: str, batch_invariant: bool
) -> KernelConfig:
    """What `launch.gemm` would choose."""
    return kernel_configs.select_config(
        m,
        k // kernel_configs.TILE_K,
        n // kernel_configs.TILE_N,
        group_size,
        batch_invariant=batch_invariant,
        dtype=dtype,
        gpu=kernel_configs.gpu_key(torch.cuda.get_device_name()),
        multiprocessors=launch.multiprocessors(torch.cuda.current_device()),
    )


def precompile(
    shapes: list[tuple[int, int]], tokens: list[int], options: argparse.Namespace
) -> None:
    """Compile in parallel what the launches will ask for."""
    modes = (False, True) if options.batch_invariant else (False,)
    sources = {
        select(k, n, m, group_size, dtype, invariant).source(dtype, group_size)
        for (k, n), m in itertools.product(shapes, tokens)
        for group_size, invariant in itertools.product(options.group_size, modes)
        for dtype in options.dtype
    }
    compile_first(sources)


def overheads(shape: tuple[int, int], tokens: list[int], options: argparse.Namespace) -> list[dict]:
    """Host microseconds of eager calls at one shape (K, N)."""
    k, n = shape
    found = []
    print(f"{'K x N':>12} {'M':>5} {'dtype':>9} {'matmul':>8} {'linear':>8} {'op':>8} {'layer':>8}")
    for dtype, m in itertools.product(options.dtype, tokens):
        us = call_overhead(k, n, m, DTYPES[dtype], options.group_size[0])
        found.append({"k": k, "n": n, "m": m, "dtype": dtype, **us})
        times = " ".join(f"{us[name]:8.2f}" for name in ("matmul", "linear", "op", "layer"))
        print(f"{f'{k}x{n}':>12} {m:5} {dtype:>9} {times}", flush=True)
    return found


def bench_shape(
    k: int,
    n: int,
    tokens: list[int],
    dtype_name: str,
    group_size: int,
    options: argparse.Namespace,
) -> list[dict]:
    """Rows of results (scripts/bench_tables.py) for one shape."""
    dtype = DTYPES[dtype_name]
    weights = RotatingWeights.make(k, n, group_size)
    exact = fill_known(weights)
    floors = {pdl: read_floor(weights.nbytes, weights.copies, pdl) for pdl in (False, True)}
    rows = []
    for m in tokens:
        config = select(k, n, m, group_size, dtype_name, batch_invariant=False)
        a = torch.randn(m, k, device="cuda").to(dtype)
        error = checked_error(config, a, weights, exact)
        count = launch_count(m, weights.copies)
        out = torch.empty(m, n, device="cuda", dtype=dtype)

        def timed(config: KernelConfig, pdl: bool, a=a, out=out, count=count) -> float:
            let_rest(a.shape[0], options.rest)
            return graph_time([_launch(config, a, weights, i, out, pdl) for i in range(count)])

        us = timed(config, True)
        row = {
            "k": k,
            "n": n,
            "m": m,
            "dtype": dtype_name,
            "group_size": group_size,
            "us": us,
            "us_alone": timed(config, False),
            "floor": floors[False],
            "floor_pdl": floors[True],
            "tflops": 2 * m * n * k / us * 1e-6,
            "gb_per_s": weights.nbytes / us * 1e-3,
            "error": error,
            "config": repr(config),
        }
        if options.batch_invariant:
            calls = [_invariant_call(a, weights, i, out) for i in range(count)]
            let_rest(m, options.rest)
            row["us_invariant"] = graph_time(calls)
            invariant = select(k, n, m, group_size, dtype_name, batch_invariant=True)
            row["config_invariant"] = repr(invariant)
        if options.sustained:
            launches = [_launch(config, a, weights, i, out, True) for i in range(weights.copies)]
            row["us_sustained"] = sustained(launches, options.sustained)
        rows.append(row)
    baseline = {} if options.no_baseline else cublas_times(k, n, tokens, dtype, options.rest)
    for row in rows:
        row["cublas"] = baseline.get(row["m"], math.nan)
    return rows


def run_peers(rows: list[dict], names: list[str], report: dict, rest: float) -> None:
    """Time other kernels at the rows of one shape, and give each row their times, `peers`; the
    fastest becomes its `peer` and `us_peer`. Into report: versions, and why one was not timed.
    rest: as of `let_rest`.
    """
    first, versions = rows[0], report.setdefault("peers", {})
    reasons = report.setdefault("not_timed", {})
    problem = first["k"], first["n"], [row["m"] for row in rows], first["group_size"]
    for name in names:
        try:
            us = kernel_peers.times(name, *problem, DTYPES[first["dtype"]], rest=rest)
        except (kernel_peers.NotInstalled, ValueError) as error:
            if reasons.get(name) != str(error):
                print(f"{name} is not timed: {error}", flush=True)
            reasons[name] = str(error)
            continue
        versions[name] = kernel_peers.version(name)
        for row in rows:
            row.setdefault("peers", {})[name] = us[row["m"]]
    for row in rows:
        if row.get("peers"):
            row["peer"], row["us_peer"] = min(row["peers"].items(), key=lambda item: item[1])


def _invariant_call(a: Tensor, w: RotatingWeights, i: int, out: Tensor):
    """The whole interface: many rows may take several launches."""
    return lambda: launch.gemm(
        *(a, w.codes[i], w.scales[i], None, out, w.k, w.n, w.k, w.n, w.group_size),
        batch_invariant=True,
    )


def _launch(config, a: Tensor, w: RotatingWeights, i: int, out: Tensor, pdl: bool = True):
    return lambda: launch.launch_config(
        config, a, w.codes[i], w.scales[i], None, out, w.k, w.n, w.k, w.n, w.group_size, pdl
    )


def fill_known(weights: RotatingWeights) -> Tensor:
    """Give copy 0 known values. Returns them, exact: float32 [k, n] (codes times scales)."""
    k, n = weights.k, weights.n
    codes = torch.randint(0, 16, (k, n), device="cuda", dtype=torch.int32)
    groups = weights.scales.shape[1] // n
    scales = (torch.rand(groups, n, device="cuda") * 0.01 + 0.001).half()
    wtype = weight_type("uint4b8")
    stored = {"B": pack(codes, wtype), "s": permute_columns(scales, grouped=groups > 1)}
    held = sm90_layout.kernel_tensors(stored, LayerSpec(k, n, wtype, k // groups))
    weights.codes[0].copy_(held.weights.view(-1))
    weights.scales[0].copy_(held.scales.view(-1))
    # a code times an fp16 scale has at most 15 significant bits: exact in float32
    return (codes - 8).float() * scales.float().repeat_interleave(k // groups, 0)


def checked_error(config, a: Tensor, weights: RotatingWeights, exact: Tensor) -> float:
    """Relative error of a poisoned output; AssertionError if it is wrong."""
    out = torch.full(
        (min(a.shape[0], CHECKED_TOKENS), weights.n), math.nan, device="cuda", dtype=a.dtype
    )
    _launch(config, a[:CHECKED_TOKENS], weights, 0, out)()
    error = relative_error(out, a, exact)
    if not error < ERROR_LIMITS[a.dtype]:
        raise AssertionError(f"{config}: relative error {error}")
    return error


def read_floor(nbytes: int, copies: int, dependent_launch: bool) -> float:
    """Microseconds to only read so many bytes, one of `copies`: the best of several grids."""
    index = torch.cuda.current_device()
    name = "sm90::read_floor_kernel"
    function = launch.load(KernelSource("sm90/read_floor.cuh", name), index)
    # one buffer with copies of codes and scales together, as many bytes as the kernel reads
    size = nbytes // 16 * 16
    data = torch.empty(copies * size // 4, dtype=torch.int32, device="cuda").random_()
    best = math.inf
    for blocks in (264, 396, 528, 1056):
        launches = [
            _FloorLaunch(function, data.data_ptr() + i * size, size, blocks, dependent_launch)
            for i in range(copies)
        ]
        best = min(best, graph_time(launches))
    return best


class _FloorLaunch:
    def __init__(self, function, address: int, size: int, blocks: int, pdl: bool) -> None:
        self.arguments = (function, (blocks, 1, 1), 512, 1, 0)
        self.pdl = pdl
        self.values = (address, size // 16, 0)

    def __call__(self) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        plan = launch.Plan(*self.arguments, stream, 128, dependent_launch=self.pdl)
        # three separate 8-byte parameters
        base = ctypes.addressof(plan._memory) + plan._offset
        plan._pointers = (ctypes.c_void_p * 3)(base, base + 8, base + 16)
        plan._pointers_address = ctypes.addressof(plan._pointers)
        for i, value in enumerate(self.values):
            plan.arguments[8 * i : 8 * i + 8] = value.to_bytes(8, "little")
        plan.launch()


def cublas_times(
    k: int, n: int, tokens: list[int], dtype: torch.dtype, rest: float = 0.0
) -> dict[int, float]:
    """Microseconds of torch.matmul, the faster of weights [k, n] and [n, k].T.

    rest: as of `let_rest`.
    """
    copies = max(2, -(-ROTATE_BYTES // (2 * k * n)))
    best = dict.fromkeys(tokens, math.inf)
    for transposed in (False, True):
        shape = (n, k) if transposed else (k, n)
        weights = torch.randn(copies, *shape, device="cuda", dtype=dtype).mul_(0.02)
        for m in tokens:
            a = torch.randn(m, k, device="cuda").to(dtype)
            out = torch.empty(m, n, device="cuda", dtype=dtype)

            def multiply(i: int, a=a, out=out, weights=weights, transposed=transposed) -> None:
                torch.matmul(a, weights[i].t() if transposed else weights[i], out=out)

            calls = [lambda i=i, f=multiply: f(i) for i in range(copies)]
            let_rest(m, rest)
            best[m] = min(best[m], graph_time(calls))
        del weights
    return best


def sustained(launches: list, seconds: float) -> float:
    """Mean microseconds of a launch over `seconds` of back-to-back replays: power counts."""
    graph = torch.cuda.CUDAGraph()
    launches[0]()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for launch_one in launches:
            launch_one()
    graph.replay()
    torch.cuda.synchronize()
    start, replays = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
        replays += 10
    return (time.perf_counter() - start) * 1e6 / (replays * len(launches))


if __name__ == "__main__":
    main()
