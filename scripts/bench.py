"""Benchmark the W4A16 kernel against torch.matmul and the time to read the weights at all.

    python scripts/bench.py                      # configs/bench/anchors.yaml
    python scripts/bench.py --config configs/bench/models.yaml
    python scripts/bench.py --sustained 5        # seconds of back-to-back launches at large batch

Every result is checked against float64 before it is timed. Times are medians over replays of CUDA
graphs that rotate over copies of the weights (scripts/gpu_timing.py). `floor` is a kernel that only
reads the weights' bytes, `fl_pdl` the same with programmatic dependent launch, both measured in the
same run; `cublas` is the faster of torch.matmul with FP16 weights [K, N] and [N, K] transposed;
`alone` is the kernel without programmatic dependent launch.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from gpu_timing import ROTATE_BYTES, RotatingWeights, graph_time
from torch import Tensor

from marlin_kernel import kernel_configs, launch
from marlin_kernel.compiler import KernelSource
from marlin_kernel.packing import pack
from marlin_kernel.weight_types import weight_type

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/bench/anchors.yaml")
    parser.add_argument("--shapes", nargs="+", help="K x N, instead of the configuration's")
    parser.add_argument("--m", nargs="+", type=int, help="tokens, instead of the configuration's")
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--batch_invariant", action="store_true")
    parser.add_argument("--no_baseline", action="store_true", help="skip torch.matmul")
    parser.add_argument("--sustained", type=float, default=0.0, help="seconds per entry")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG or SVG file (needs matplotlib)")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    models = config.get("models", {})
    shapes = options.shapes or config.get("shapes") or sum(models.values(), [])
    report = {"circumstances": circumstances(options), "rows": []}
    print(HEADER)
    tokens = sorted(options.m or config["tokens"])
    # Few tokens first: minutes of large products leave the chip hot, and its clock low.
    for part in ([m for m in tokens if m <= 64], [m for m in tokens if m > 64]):
        for shape in dict.fromkeys(shapes):
            k, n = map(int, shape.split("x"))
            if part:
                report["rows"] += bench_shape(k, n, part, options)
            if options.output:
                options.output.write_text(json.dumps(report, indent=1))
    summarize(report["rows"])
    for name, parts in models.items():
        print_model(name, parts, report["rows"])
    if options.plot:
        plot(report["rows"], options.plot)


HEADER = (
    f"{'K x N':>12} {'M':>5} {'us':>9} {'alone':>9} {'floor':>8} {'fl_pdl':>8} {'cublas':>9} "
    f"{'x floor':>8} {'x cublas':>9} {'TFLOP/s':>8} {'GB/s':>6} {'error':>8} configuration"
)


def bench_shape(k: int, n: int, tokens: list[int], options: argparse.Namespace) -> list[dict]:
    """Rows of results for one shape."""
    dtype = DTYPES[options.dtype]
    weights = RotatingWeights.make(k, n, options.group_size)
    exact = fill_known(weights, dtype)
    floors = {pdl: read_floor(weights, pdl) for pdl in (False, True)}
    rows = []
    for m in tokens:
        config = kernel_configs.select_config(
            m,
            k // kernel_configs.TILE_K,
            n // kernel_configs.TILE_N,
            options.group_size,
            batch_invariant=options.batch_invariant,
            gpu=kernel_configs.gpu_key(torch.cuda.get_device_name()),
        )
        a = torch.randn(m, k, device="cuda").to(dtype)
        error = relative_error(config, a, weights, exact)
        count = max(2, weights.copies if m <= 256 else weights.copies // 4)
        out = torch.empty(m, n, device="cuda", dtype=dtype)
        times = {
            pdl: graph_time([_launch(config, a, weights, i, out, pdl) for i in range(count)])
            for pdl in (True, False)
        }
        us, floor = times[True], floors[False]
        row = {
            "k": k,
            "n": n,
            "m": m,
            "us": us,
            "us_alone": times[False],
            "floor": floor,
            "floor_pdl": floors[True],
            "tflops": 2 * m * n * k / us * 1e-6,
            "gb_per_s": weights.nbytes / us * 1e-3,
            "error": error,
            "config": repr(config),
        }
        if options.sustained:
            launches = [_launch(config, a, weights, i, out, True) for i in range(weights.copies)]
            row["us_sustained"] = sustained(launches, options.sustained)
        rows.append(row)
    baseline = {} if options.no_baseline else cublas_times(k, n, tokens, dtype)
    for row in rows:
        row["cublas"] = baseline.get(row["m"], math.nan)
        print_row(row)
    return rows


def _launch(config, a: Tensor, w: RotatingWeights, i: int, out: Tensor, pdl: bool = True):
    return lambda: launch.launch_config(
        config, a, w.codes[i], w.scales[i], None, out, w.k, w.n, w.k, w.n, w.group_size, pdl
    )


def fill_known(weights: RotatingWeights, dtype: torch.dtype) -> Tensor:
    """Give copy 0 known values. Returns them, exact: float32 [k, n] (codes times scales)."""
    k, n, group_size = weights.k, weights.n, weights.group_size
    codes = torch.randint(0, 16, (k, n), device="cuda", dtype=torch.int32)
    groups = weights.scales.shape[1] // n
    scales = (torch.rand(groups, n, device="cuda") * 0.01 + 0.001).half()
    from marlin_kernel.layout import permute_columns

    words, stored = launch.convert_layout(
        pack(codes, weight_type("uint4b8")),
        permute_columns(scales, grouped=groups > 1),
        k,
        n,
        group_size,
        dtype,
    )
    weights.codes[0].copy_(words.view(-1))
    weights.scales[0].copy_(stored.view(-1))
    # a code times an fp16 scale has at most 15 significant bits: exact in float32
    return (codes - 8).float() * scales.float().repeat_interleave(k // groups, 0)


def relative_error(config, a: Tensor, weights: RotatingWeights, exact: Tensor) -> float:
    """|out - ref| / |ref| of a poisoned output against float64, on at most 512 tokens."""
    a = a[:512]
    out = torch.full((a.shape[0], weights.n), math.nan, device="cuda", dtype=a.dtype)
    _launch(config, a, weights, 0, out)()
    difference = total = 0.0
    for columns in range(0, weights.n, 4096):
        part = slice(columns, columns + 4096)
        reference = a.double() @ exact[:, part].double()
        difference += (out[:, part].double() - reference).square().sum().item()
        total += reference.square().sum().item()
    error = math.sqrt(difference / total)
    limit = 1e-3 if a.dtype == torch.float16 else 8e-3
    if not error < limit:
        raise AssertionError(f"{config}: relative error {error}")
    return error


def read_floor(weights: RotatingWeights, dependent_launch: bool) -> float:
    """Microseconds to only read one copy of the weights: the best of several grids."""
    index = torch.cuda.current_device()
    name = "sm90::read_floor_kernel"
    function = launch.load(KernelSource("sm90/read_floor.cuh", name), index)
    # one buffer with copies of codes and scales together, as many bytes as the kernel reads
    size = weights.nbytes // 16 * 16
    data = torch.empty(weights.copies * size // 4, dtype=torch.int32, device="cuda").random_()
    best = math.inf
    for blocks in (264, 396, 528, 1056):
        launches = [
            _FloorLaunch(function, data.data_ptr() + i * size, size, blocks, dependent_launch)
            for i in range(weights.copies)
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


def cublas_times(k: int, n: int, tokens: list[int], dtype: torch.dtype) -> dict[int, float]:
    """Microseconds of torch.matmul, the faster of weights [k, n] and [n, k].T."""
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


# ---- output --------------------------------------------------------------------------------------


def print_row(r: dict) -> None:
    shape = f"{r['k']}x{r['n']}"
    print(
        f"{shape:>12} {r['m']:5} {r['us']:9.2f} {r['us_alone']:9.2f} {r['floor']:8.2f} "
        f"{r['floor_pdl']:8.2f} {r['cublas']:9.2f} {r['us'] / r['floor']:8.2f} "
        f"{r['cublas'] / r['us']:9.2f} {r['tflops']:8.0f} {r['gb_per_s']:6.0f} "
        f"{r['error']:8.5f} {r['config']}"
        + (f" sustained {r['us_sustained']:.2f}" if "us_sustained" in r else ""),
        flush=True,
    )


def summarize(rows: list[dict]) -> None:
    """Geometric means over shapes, for each number of tokens."""
    print(f"\n{'M':>5} {'x floor':>8} {'worst':>7} {'x cublas':>9} {'worst':>7}")
    for m in sorted({r["m"] for r in rows}):
        mine = [r for r in rows if r["m"] == m]
        floor = [r["us"] / r["floor"] for r in mine]
        speed = [r["cublas"] / r["us"] for r in mine]
        print(f"{m:5} {_mean(floor):8.3f} {max(floor):7.2f} {_mean(speed):9.3f} {min(speed):7.2f}")


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def print_model(name: str, shapes: list[str], rows: list[dict]) -> None:
    for m in sorted({r["m"] for r in rows}):
        parts = [r for r in rows if r["m"] == m and f"{r['k']}x{r['n']}" in shapes]
        us, cublas = (sum(r[key] for r in parts) for key in ("us", "cublas"))
        print(f"{name:>12} M={m}: {us:.1f} us a layer, {cublas / us:.2f}x of FP16")


def plot(rows: list[dict], path: Path) -> None:
    """Speed-up over torch.matmul against the number of tokens, one line per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for shape in dict.fromkeys((r["k"], r["n"]) for r in rows):
        mine = [r for r in rows if (r["k"], r["n"]) == shape]
        axes.plot(
            [r["m"] for r in mine],
            [r["cublas"] / r["us"] for r in mine],
            marker="o",
            label=f"{shape[0]} x {shape[1]}",
        )
    axes.set_xscale("log", base=2)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("tokens (M)")
    axes.set_ylabel("speed-up over torch.matmul in FP16")
    axes.legend(fontsize=8)
    axes.set_title(torch.cuda.get_device_name())
    figure.tight_layout()
    figure.savefig(path)


def circumstances(options: argparse.Namespace) -> dict:
    """What the numbers depend on."""

    def output_of(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except OSError:
            return "unknown"

    query = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    return {
        "command": "scripts/bench.py " + " ".join(sys.argv[1:]),
        "gpu": output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": output_of("git", "rev-parse", "--short", "HEAD"),
        "group_size": options.group_size,
        "dtype": options.dtype,
        "batch_invariant": options.batch_invariant,
    }


if __name__ == "__main__":
    main()
