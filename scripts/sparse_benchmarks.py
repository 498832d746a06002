"""Benchmark 8-bit scaled products, dense and 2:4 sparse, beside torch and cuSPARSELt.

    python scripts/sparse_benchmarks.py --dtype fp8 square_bench \\
        --dim-start 1024 --dim-end 8192 --dim-increment 1024
    python scripts/sparse_benchmarks.py --dtype int8 range_bench \\
        --dim-start 16 --dim-end 1024 --dim-increment 16 --n-constant 4096 --k-constant 4096
    python scripts/sparse_benchmarks.py --dtype fp8 model_bench \\
        --models meta-llama/Llama-2-7b-hf --batch-sizes 16 128 1024 --tp-sizes 1

Per problem: torch's BF16 and FP16 product, its FP8 or INT8 product, our dense and sparse product
for each granularity of scales (tensor; token and channel) without and with bias, and cuSPARSELt's
where torch offers it (with its search for the fastest algorithm). Our results are checked against a
reference before they are timed. Times are medians over replays of CUDA graphs in which every launch
uses another copy of the weights, together more than the L2 cache (scripts/gpu_timing.py).

Prints torch.utils.benchmark.Compare tables of the times, and the fastest of each family with
TFLOP/s (of the dense product) and ratios. Stores the Measurements as {mode}-{dtype}-{time}.pkl, a
list as scripts/plot_bench.py and other tools expect it, and the same as JSON with TFLOP/s. A run
that is interrupted or fails prints and stores what it has.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.utils.benchmark import Compare, Measurement
from torch.utils.benchmark.utils.common import TaskSpec

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from marlin_kernel.scaled_mm import reference, scaled_mm, scaled_sparse_mm  # noqa: E402
from marlin_kernel.sparse import GROUP, compress_2_4, prune_2_4  # noqa: E402
from scripts.command_line import make_parser, positive, require_gpu  # noqa: E402
from scripts.gpu_timing import ROTATE_BYTES, circumstances, replay_times  # noqa: E402

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
MODELS = ROOT / "configs" / "bench" / "sparse_models.yaml"
OUT = torch.bfloat16
TOLERANCE = {"fp8": 8e-3, "int8": 4e-3}  # BF16 rounding, and FP8's sums in the tensor cores
Problem = tuple[int, int, int]  # M, K, N
Calls = list[Callable[[], object]]  # one per copy of the weights


# Part of a kernel's name -> (table of times, column of the summary) that it belongs to.
FAMILIES = {
    "torch_bf16": ("torch", "torch 16 bits"),
    "torch_fp16": ("torch", "torch 16 bits"),
    "torch_": ("torch", "torch 8 bits"),
    "ours_dense": ("dense", "ours dense"),
    "cusparselt": ("2:4 sparse", "cuSPARSELt"),
    "ours_sparse": ("2:4 sparse", "ours 2:4"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one mode. Returns the process exit status."""
    options = parser().parse_args(arguments)
    problems = list(MODES[options.mode](options))
    wanted = wanted_kernels(options)
    torn = sorted({k for _, k, _ in problems if k % GROUP})
    if torn:
        raise SystemExit(f"K={torn[0]} is no multiple of {GROUP}, which 2:4 sparsity needs")
    require_gpu("scripts/sparse_benchmarks.py", capability=(9, 0))
    measurements: list[Measurement] = []
    notes: set[str] = set()
    label = f"{options.mode}-{options.dtype}"
    try:
        for number, (m, k, n) in enumerate(problems, 1):
            print(f"\n[{number}/{len(problems)}] M={m} K={k} N={n}", flush=True)
            found = []
            for measurement in bench(m, k, n, options, wanted, label, notes):
                found.append(measurement)
                measurements.append(measurement)
            print_problem(found)
    finally:
        if measurements:
            print_tables(measurements, sorted(notes))
            store(measurements, problems, options, sorted(notes))
    return 0


def parser() -> argparse.ArgumentParser:
    top = make_parser(__doc__)
    top.add_argument("--dtype", choices=DTYPES, required=True, help="of both operands")
    top.add_argument("--output", type=Path, default=Path("."), help="folder of .pkl and .json")
    top.add_argument(
        "--replays", type=positive, default=7, help="of a graph, of which the median counts"
    )
    top.add_argument("--only", help="only kernels whose name holds one of these: A,B,...")
    modes = top.add_subparsers(dest="mode", required=True, help="what is swept")
    for name, text in (
        ("square_bench", "M = K = N, over a range"),
        ("range_bench", "a range for the sizes that are not held constant"),
    ):
        mode = modes.add_parser(name, help=text, description=text)
        mode.add_argument("--dim-start", type=positive, required=True, help="first size")
        mode.add_argument("--dim-end", type=positive, required=True, help="last size, included")
        mode.add_argument("--dim-increment", type=positive, required=True, help="between sizes")
        if name == "range_bench":
            mode.add_argument("--m-constant", type=positive, help="tokens")
            mode.add_argument("--n-constant", type=positive, help="output features")
            mode.add_argument("--k-constant", type=positive, help="input features")
    text = "layers of models by batch size"
    known = yaml.safe_load(MODELS.read_text())
    mode = modes.add_parser("model_bench", help=text, description=text)
    mode.add_argument(
        "--models", nargs="+", choices=known, default=list(known)[:1], metavar="MODEL",
        help=f"of {', '.join(known)} (configs/bench/{MODELS.name}; default: the first)",
    )  # fmt: skip
    mode.add_argument(
        "--batch-sizes", nargs="+", type=positive, default=[1, 16, 32, 64, 128, 256, 512],
        metavar="M", help="tokens (default: 1 16 32 64 128 256 512)",
    )  # fmt: skip
    mode.add_argument(
        "--tp-sizes", nargs="+", type=positive, default=[1], metavar="PARTS",
        help="GPUs that share a layer; its part on one of them is timed (default: 1)",
    )  # fmt: skip
    return top


# ---- problems ----


def _dimensions(options: argparse.Namespace) -> range:
    if options.dim_end < options.dim_start:
        raise SystemExit(
            f"--dim-end {options.dim_end} is less than --dim-start {options.dim_start}; sizes go up"
        )
    return range(options.dim_start, options.dim_end + 1, options.dim_increment)


def square_problems(options: argparse.Namespace) -> Iterator[Problem]:
    for size in _dimensions(options):
        yield size, size, size


def range_problems(options: argparse.Namespace) -> Iterator[Problem]:
    constants = options.m_constant, options.k_constant, options.n_constant
    if all(c is not None for c in constants):
        raise SystemExit("range_bench sweeps what is not constant; leave one constant out")
    for size in _dimensions(options):
        yield tuple(size if c is None else c for c in constants)


def model_problems(options: argparse.Namespace) -> Iterator[Problem]:
    known = yaml.safe_load(MODELS.read_text())
    for model in options.models:
        for parts in options.tp_sizes:
            for k, n, side in known[model]:
                size = k if side == "K" else n
                if size % parts:
                    raise SystemExit(
                        f"--tp-sizes {parts} does not divide {side}={size} of {model}; leave "
                        "either out"
                    )
                k_part, n_part = (k // parts, n) if side == "K" else (k, n // parts)
                for m in options.batch_sizes:
                    yield m, k_part, n_part


MODES = {
    "square_bench": square_problems,
    "range_bench": range_problems,
    "model_bench": model_problems,
}


# ---- kernels ----


GRANULARITIES = ("tensor", "token-channel")  # one scale; one per token and per output feature


def kernel_names(dtype: str) -> list[str]:
    """All that is timed, in this order."""
    torch_8_bit = ["int8_int_mm"] if dtype == "int8" else [f"fp8_{g}" for g in GRANULARITIES]
    names = [f"torch_{name}" for name in ("bf16", "fp16", *torch_8_bit)]
    for kind in ("dense", "sparse"):
        for granularity in GRANULARITIES:
            names += [f"ours_{kind}_{granularity}{bias}" for bias in ("", "_bias")]
    return [*names, "cusparselt"]


def wanted_kernels(options: argparse.Namespace) -> set[str]:
    """Names that --only leaves. Exits if a part of it leaves none."""
    names = kernel_names(options.dtype)
    if options.only is None:
        return set(names)
    wanted = set()
    for part in options.only.split(","):
        found = {name for name in names if part and part in name}
        if not found:
            raise SystemExit(
                f"--only {options.only}: no kernel's name holds {part!r}; with --dtype "
                f"{options.dtype} they are {', '.join(names)}"
            )
        wanted |= found
    return wanted


def operands(m: int, k: int, n: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Random a [M, K] and 2:4 sparse weight [N, K] of the 8-bit type."""
    if dtype == "int8":
        a, w = (torch.randint(-127, 128, s, device="cuda").float() for s in ((m, k), (n, k)))
    else:
        a, w = (torch.randn(s, device="cuda") for s in ((m, k), (n, k)))
    return a.to(DTYPES[dtype]), prune_2_4(w).to(DTYPES[dtype])


def copies(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors, and copies of them, together more than ROTATE_BYTES."""
    size = sum(t.nbytes for t in tensors)
    count = min(64, max(2, -(-ROTATE_BYTES // size)))
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]


def own_kernels(a: Tensor, w: Tensor, sparse: bool) -> Iterator[tuple[str, Calls, Tensor]]:
    """(name, calls, reference) of our product for every granularity, without and with bias."""
    m, n = a.shape[0], w.shape[0]
    weights = copies(*(compress_2_4(w) if sparse else (w,)))
    one = torch.rand(1, device=a.device) + 0.5
    both = torch.rand(m, device=a.device) + 0.5, torch.rand(n, device=a.device) + 0.5
    bias = torch.randn(n, device=a.device).to(OUT)
    product = scaled_sparse_mm if sparse else scaled_mm
    rows = min(m, 128)
    for scales, granularity in zip(((one, one), both), GRANULARITIES, strict=True):
        for shift in (None, bias):
            name = f"ours_{'sparse' if sparse else 'dense'}_{granularity}"
            name += "" if shift is None else "_bias"
            calls = [
                partial(product, a, *(v if sparse else (v[0].t(),)), *scales, OUT, shift)
                for v in weights
            ]
            scale_a = scales[0] if scales[0].numel() == 1 else scales[0][:rows]
            yield name, calls, reference(a[:rows], w, scale_a, scales[1], OUT, shift)


def torch_kernels(a: Tensor, w: Tensor, dtype: str) -> Iterator[tuple[str, Calls]]:
    """torch's products of the same sizes, dense."""
    m, n = a.shape[0], w.shape[0]
    for name, wide in (("torch_bf16", torch.bfloat16), ("torch_fp16", torch.float16)):
        x = a.to(wide)
        weights = copies(w.to(wide))
        yield name, [partial(torch.mm, x, v.t()) for (v,) in weights]
        del weights
    weights = copies(w)
    if dtype == "int8":
        yield "torch_int8_int_mm", [partial(torch._int_mm, a, v.t()) for (v,) in weights]
        return
    one = torch.ones((), device=a.device)
    both = torch.rand(m, 1, device=a.device), torch.rand(1, n, device=a.device)
    for granularity, scales in zip(GRANULARITIES, ((one, one), both), strict=True):
        yield (
            f"torch_fp8_{granularity}",
            [
                partial(torch._scaled_mm, a, v.t(), *scales, out_dtype=OUT, use_fast_accum=True)
                for (v,) in weights
            ],
        )


def cusparselt_kernel(a: Tensor, w: Tensor) -> Calls:
    """cuSPARSELt's sparse product [M, N] through torch, by the algorithm its search finds."""
    compressed = copies(torch._cslt_compress(w))
    b = a.t()
    extra = {"out_dtype": OUT, "transpose_result": True}
    best = torch._cslt_sparse_mm_search(compressed[0][0], b, **extra)
    found = {"alg_id": best} if isinstance(best, int) else {"alg_id": int(best[0])}
    return [partial(torch._cslt_sparse_mm, v, b, **extra, **found) for (v,) in compressed]


def bench(
    m: int,
    k: int,
    n: int,
    options: argparse.Namespace,
    wanted: set[str],
    label: str,
    notes: set[str],
) -> Iterator[Measurement]:
    """Measurements of one problem; what a library refuses is noted and left out."""
    a, w = operands(m, k, n, options.dtype)

    def timed(name: str, calls: Calls) -> Measurement:
        flops = 2 * m * n * k
        used = calls if flops < 3e11 else calls[: max(2, len(calls) // 8)]
        return measure(name, used, label, f"MKN=({m}x{k}x{n})", options.replays)

    for name, calls in torch_kernels(a, w, options.dtype):
        if name in wanted:
            try:
                calls[0]()
            except RuntimeError as error:
                notes.add(f"{name} refuses {m}x{k}x{n}: {str(error).splitlines()[0][:120]}")
                continue
            yield timed(name, calls)
    for sparse in (False, True):
        for name, calls, expected in own_kernels(a, w, sparse):
            if name in wanted:
                out = calls[0]()[: expected.shape[0]].float()
                error = float((out - expected.float()).norm() / expected.float().norm())
                if not error < TOLERANCE[options.dtype]:
                    raise RuntimeError(f"{name} {m}x{k}x{n}: relative error {error:.2g}")
                yield timed(name, calls)
    if "cusparselt" in wanted:
        try:
            calls = cusparselt_kernel(a, w)
            calls[0]()
        except (RuntimeError, AttributeError) as error:
            notes.add(f"cusparselt refuses {m}x{k}x{n}: {str(error).splitlines()[0][:120]}")
            return
        yield timed("cusparselt", calls)


def measure(name: str, calls: Calls, label: str, sub_label: str, replays: int) -> Measurement:
    """Time of one launch, as torch.utils.benchmark holds it; one raw time per graph replay."""
    times = replay_times(calls, replays)
    task = TaskSpec(stmt="graph.replay()", setup="", label=label, sub_label=sub_label,
                    description=name)  # fmt: skip
    return Measurement(number_per_run=len(calls), raw_times=times, task_spec=task)


# ---- results ----


def size_of(measurement: Measurement) -> Problem:
    """M, K, N of a measurement's sub label."""
    m, k, n = measurement.task_spec.sub_label.removeprefix("MKN=(").removesuffix(")").split("x")
    return int(m), int(k), int(n)


def tflops(measurement: Measurement) -> float:
    """TFLOP/s of the dense product."""
    m, k, n = size_of(measurement)
    return 2 * m * k * n / measurement.median / 1e12


def print_problem(found: list[Measurement]) -> None:
    """One problem, fastest first."""
    for measurement in sorted(found, key=lambda x: x.median):
        print(
            f"  {measurement.task_spec.description:32s} {measurement.median * 1e6:9.2f} us "
            f"{tflops(measurement):8.1f} TFLOP/s",
            flush=True,
        )


def family(measurement: Measurement) -> tuple[str, str]:
    """Table of times and column of the summary that a kernel belongs to."""
    name = measurement.task_spec.description
    return next(found for part, found in FAMILIES.items() if part in name)


def print_tables(measurements: list[Measurement], notes: list[str]) -> None:
    """Times of all problems, a table for each family of kernels, and the fastest of each."""
    print()
    tables: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        spec, (title, _) = measurement.task_spec, family(measurement)
        named = replace(spec, label=f"{spec.label}: {title}")
        own = Measurement(measurement.number_per_run, measurement.raw_times, named)
        tables.setdefault(title, []).append(own)
    for own in tables.values():
        Compare(own).print()
    print("fastest of each kind: us (TFLOP/s); x: how many times faster")
    print("\n".join([*summary(measurements), *notes]))


def summary(measurements: list[Measurement]) -> list[str]:
    """Lines of a table: of each problem the fastest of each kind, us and TFLOP/s.

    The last columns say how many times faster our 2:4 product is than cuSPARSELt and than torch's
    8-bit one.
    """
    best: dict[Problem, dict[str, Measurement]] = {}
    for measurement in measurements:
        own, (_, kind) = best.setdefault(size_of(measurement), {}), family(measurement)
        if kind not in own or measurement.median < own[kind].median:
            own[kind] = measurement
    kinds = [kind for _, kind in dict.fromkeys(FAMILIES.values())]
    kinds = [kind for kind in kinds if any(kind in own for own in best.values())]
    peers = [kind for kind in ("cuSPARSELt", "torch 8 bits") if {kind, "ours 2:4"} <= {*kinds}]
    lines = [["M", "K", "N", *kinds, *(f"2:4 x {kind}" for kind in peers)]]
    for sizes, own in best.items():
        cells = list(map(str, sizes))
        for kind in kinds:
            found = own.get(kind)
            cells.append(f"{found.median * 1e6:.1f} ({tflops(found):.1f})" if found else "-")
        for kind in peers:
            both = own.get(kind), own.get("ours 2:4")
            cells.append(f"{both[0].median / both[1].median:.2f}" if all(both) else "-")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.rjust, line, widths)) for line in lines]


def store(
    measurements: list[Measurement],
    problems: list[Problem],
    options: argparse.Namespace,
    notes: list[str],
) -> None:
    """{mode}-{dtype}-{time}.pkl and .json in the output folder."""
    options.output.mkdir(parents=True, exist_ok=True)
    stem = f"{options.mode}-{options.dtype}-{int(time.time())}"
    with open(options.output / f"{stem}.pkl", "wb") as file:
        pickle.dump(measurements, file)
    rows = []
    for measurement in measurements:
        m, k, n = size_of(measurement)
        microseconds = [t * 1e6 for t in measurement.times]
        rows.append(
            {
                **{"m": m, "k": k, "n": n, "kernel": measurement.task_spec.description},
                "us": round(measurement.median * 1e6, 3),
                "us_min": round(min(microseconds), 3),
                "us_max": round(max(microseconds), 3),
                "tflops": round(tflops(measurement), 2),
            }
        )
    facts = {
        **circumstances("python scripts/sparse_benchmarks.py", options),
        "mode": options.mode,
        "dtype": options.dtype,
        "protocol": f"CUDA graphs, rotating weights > {ROTATE_BYTES} bytes, median of "
        f"{options.replays} replays",
        "problems": len(problems),
        "notes": notes,
        "rows": rows,
    }
    (options.output / f"{stem}.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"\n{options.output / stem}.pkl and .json")


if __name__ == "__main__":
    sys.exit(main())
