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

Prints torch.utils.benchmark.Compare tables; stores the Measurements as {mode}-{dtype}-{time}.pkl, a
list as scripts/plot_bench.py and other tools expect it, and the same as JSON with TFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.utils.benchmark import Compare, Measurement
from torch.utils.benchmark.utils.common import TaskSpec

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from gpu_timing import ROTATE_BYTES, replay_times  # noqa: E402

from marlin_kernel.scaled_mm import reference, scaled_mm, scaled_sparse_mm  # noqa: E402
from marlin_kernel.sparse import compress_2_4, prune_2_4  # noqa: E402

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
MODELS = ROOT / "configs" / "bench" / "sparse_models.yaml"
OUT = torch.bfloat16
TOLERANCE = {"fp8": 8e-3, "int8": 4e-3}  # BF16 rounding, and FP8's sums in the tensor cores
Problem = tuple[int, int, int]  # M, K, N
Calls = list[Callable[[], object]]  # one per copy of the weights


def main(arguments: list[str] | None = None) -> int:
    """Run one mode. Returns the process exit status."""
    options = parser().parse_args(arguments)
    problems = list(MODES[options.mode](options))
    measurements: list[Measurement] = []
    notes: set[str] = set()
    label = f"{options.mode}-{options.dtype}"
    for m, k, n in problems:
        found = list(bench(m, k, n, options, label, notes))
        measurements += found
        compare(found, (m, k, n))
    for note in sorted(notes):
        print(note)
    print("\nall problems, us:")
    Compare(measurements).print()
    store(measurements, problems, options, sorted(notes))
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--dtype", choices=DTYPES, required=True)
    top.add_argument("--output", type=Path, default=Path("."), help="folder of .pkl and .json")
    top.add_argument("--replays", type=int, default=7, help="of a graph, per time")
    top.add_argument("--only", help="only kernels whose name holds one of these: A,B,...")
    modes = top.add_subparsers(dest="mode", required=True)
    for name in ("square_bench", "range_bench"):
        mode = modes.add_parser(name)
        for flag in ("--dim-start", "--dim-end", "--dim-increment"):
            mode.add_argument(flag, type=int, required=True)
        if name == "range_bench":
            for flag in ("--m-constant", "--n-constant", "--k-constant"):
                mode.add_argument(flag, type=int)
    mode = modes.add_parser("model_bench")
    known = yaml.safe_load(MODELS.read_text())
    mode.add_argument("--models", nargs="+", choices=known, default=list(known)[:1])
    mode.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16, 32, 64, 128, 256, 512])
    mode.add_argument("--tp-sizes", nargs="+", type=int, default=[1])
    return top


# ---- problems ----


def _dimensions(options: argparse.Namespace) -> range:
    if options.dim_increment < 1 or options.dim_end < options.dim_start:
        raise SystemExit(
            f"--dim-start {options.dim_start} --dim-end {options.dim_end} --dim-increment "
            f"{options.dim_increment} is no range"
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
                    raise SystemExit(f"--tp-sizes {parts} does not divide {size} of {model}")
                k_part, n_part = (k // parts, n) if side == "K" else (k, n // parts)
                for m in options.batch_sizes:
                    yield m, k_part, n_part


MODES = {
    "square_bench": square_problems,
    "range_bench": range_problems,
    "model_bench": model_problems,
}


# ---- kernels ----


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
    one = torch.rand(1, device="cuda") + 0.5
    both = torch.rand(m, device="cuda") + 0.5, torch.rand(n, device="cuda") + 0.5
    bias = torch.randn(n, device="cuda").to(OUT)
    product = scaled_sparse_mm if sparse else scaled_mm
    rows = min(m, 128)
    for scales, granularity in (((one, one), "tensor"), (both, "token-channel")):
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
    ones = {
        "tensor": (torch.ones((), device="cuda"), torch.ones((), device="cuda")),
        "token-channel": (torch.rand(m, 1, device="cuda"), torch.rand(1, n, device="cuda")),
    }
    for granularity, scales in ones.items():
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
    m: int, k: int, n: int, options: argparse.Namespace, label: str, notes: set[str]
) -> Iterator[Measurement]:
    """Measurements of one problem; what a library refuses is noted and left out."""
    a, w = operands(m, k, n, options.dtype)

    def wanted(name: str) -> bool:
        return not options.only or any(part in name for part in options.only.split(","))

    def timed(name: str, calls: Calls) -> Measurement:
        flops = 2 * m * n * k
        used = calls if flops < 3e11 else calls[: max(2, len(calls) // 8)]
        return measure(name, used, label, f"MKN=({m}x{k}x{n})", options.replays)

    for name, calls in torch_kernels(a, w, options.dtype):
        if wanted(name):
            try:
                calls[0]()
            except RuntimeError as error:
                notes.add(f"{name} refuses {m}x{k}x{n}: {str(error).splitlines()[0][:120]}")
                continue
            yield timed(name, calls)
    for sparse in (False, True):
        for name, calls, expected in own_kernels(a, w, sparse):
            if wanted(name):
                out = calls[0]()[: expected.shape[0]].float()
                error = float((out - expected.float()).norm() / expected.float().norm())
                if not error < TOLERANCE[options.dtype]:
                    raise RuntimeError(f"{name} {m}x{k}x{n}: relative error {error:.2g}")
                yield timed(name, calls)
    if wanted("cusparselt"):
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


def compare(found: list[Measurement], problem: Problem) -> None:
    m, k, n = problem
    print(f"\nM={m} K={k} N={n}")
    for measurement in sorted(found, key=lambda x: x.median):
        print(
            f"  {measurement.task_spec.description:32s} {measurement.median * 1e6:9.2f} us "
            f"{tflops(measurement):8.1f} TFLOP/s",
            flush=True,
        )


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
        "command": "python scripts/sparse_benchmarks.py " + " ".join(sys.argv[1:]),
        "mode": options.mode,
        "dtype": options.dtype,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
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
