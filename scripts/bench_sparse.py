"""Time 2:4 Marlin beside the dense kernel and the time to read its bytes, in one run.

    python scripts/bench_sparse.py --output sparse_marlin_h200.json
    python scripts/bench_sparse.py --peers docs/results/h200_peers.csv    # beside sparse Marlin
    python scripts/bench_sparse.py --bits 4 --m 1 16 --shapes 4096x4096

FP16, group size 128, configurations of the tuned tables. Results are checked against float32 before
they are timed. Protocol of scripts/gpu_timing.py: graphs that rotate over copies of the weights.
`floor` is a kernel that only reads the bytes of the sparse weights; `dense` the W4A16 kernel on a
weight of the same shape, which is what 4 bits without sparsity would take.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from bench import _launch, read_floor, select  # noqa: E402
from tune_scaled import SHAPES  # noqa: E402
from tune_sparse import GROUP, TOKENS, copies_of, random_weight  # noqa: E402

from marlin_kernel import launch, scaled_mm, sparse_configs, sparse_marlin  # noqa: E402
from scripts.bench_tables import geometric_mean, read_peers  # noqa: E402
from scripts.command_line import make_parser, positive, require_gpu, shape, write_json  # noqa: E402
from scripts.gpu_timing import (  # noqa: E402
    ERROR_LIMITS,
    REST_OPTION,
    RotatingWeights,
    circumstances,
    compile_first,
    graph_time,
    launch_count,
    let_rest,
)

PEER = "sparse Marlin"


def sparse_config(k: int, n: int, m: int, bits: int) -> sparse_configs.AnyConfig:
    """What the operator would choose on this GPU."""
    index = torch.cuda.current_device()
    gpu, count = scaled_mm._gpu_name(index), launch.multiprocessors(index)
    return sparse_configs.select(m, n, k, bits, GROUP, gpu, count)


def bench_shape(k: int, n: int, tokens: list[int], bits: int, rest: float) -> list[dict[str, Any]]:
    """Rows of one shape: microseconds of the sparse kernel, of the dense one, and of reading.

    rest: as of gpu_timing.let_rest.
    """
    weights, scales, dense = random_weight(k, n, bits)
    copies = [weights.clone() for _ in range(copies_of(weights))]
    floors = {pdl: read_floor(weights.nbytes, len(copies), pdl) for pdl in (False, True)}
    others = RotatingWeights.make(k, n, GROUP) if bits == 4 else None
    rows = []
    for m in tokens:
        config = sparse_config(k, n, m, bits)
        a = torch.randn(m, k, device="cuda", dtype=torch.float16)
        out = torch.full((m, n), float("nan"), device="cuda", dtype=torch.float16)

        def call(weight, config=config, a=a, out=out):
            sparse_marlin.launch_config(config, a, weight, scales, None, out, bits, GROUP)

        call(weights)
        want = a[:64].float() @ dense.float().t()
        error = float((out[:64] - want).norm() / want.norm())
        if not error < ERROR_LIMITS[torch.float16]:
            raise RuntimeError(f"{config}: error {error:.2g} at M={m}, K={k}, N={n}, {bits} bits")
        count = launch_count(m, len(copies))
        let_rest(m, rest)
        row = {
            **{"bits": bits, "k": k, "n": n, "m": m},
            "us": graph_time([partial(call, w) for w in copies[:count]]),
            **{"floor": floors[False], "floor_pdl": floors[True]},
            **{"error": error, "config": repr(config)},
        }
        if others is not None:
            plan = select(k, n, m, GROUP, "float16", batch_invariant=False)
            count = launch_count(m, others.copies)
            calls = [_launch(plan, a, others, i, out) for i in range(count)]
            let_rest(m, rest)
            row |= {"us_dense": graph_time(calls), "config_dense": repr(plan)}
        rows.append(row)
    return rows


def precompile(shapes: list[tuple[int, int]], tokens: list[int], all_bits: list[int]) -> None:
    """Compile in parallel what the launches will ask for."""
    problems = [(k, n, m) for k, n in shapes for m in tokens]
    sources = [
        sparse_config(*p, bits).source("float16", bits, GROUP)
        for p in problems
        for bits in all_bits
    ]
    if 4 in all_bits:
        chosen = [select(*p, GROUP, "float16", batch_invariant=False) for p in problems]
        sources += [config.source("float16", GROUP) for config in chosen]
    compile_first(sources)


def print_row(row: dict[str, Any]) -> None:
    text = f"{row['bits']} bits {row['k']:>6}x{row['n']:<6} M={row['m']:<5} {row['us']:9.2f} us"
    text += f"  {row['us'] / row['floor']:5.2f}x floor"
    if "us_dense" in row:
        text += f"  dense {row['us_dense']:9.2f} ({row['us_dense'] / row['us']:.2f}x)"
    if "us_peer" in row:
        text += f"  {PEER} {row['us_peer']:9.2f} ({row['us_peer'] / row['us']:.2f}x)"
    print(text, flush=True)


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print and return means and worst of the ratios by bits and number of tokens."""
    found = []
    for bits, m in sorted({(row["bits"], row["m"]) for row in rows}):
        mine = [row for row in rows if (row["bits"], row["m"]) == (bits, m)]
        line: dict[str, Any] = {"bits": bits, "m": m}
        for name, over, under, worst in (
            ("x floor", "us", "floor", max),
            ("x dense", "us_dense", "us", min),
            ("x peer", "us_peer", "us", min),
        ):
            if ratios := [row[over] / row[under] for row in mine if over in row]:
                line |= {name: geometric_mean(ratios), f"worst {name}": worst(ratios)}
        found.append(line)
        print(*(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))
    return found


def main() -> int:
    """Measure; write the JSON after every shape. Returns the process exit status."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--shapes", nargs="+", type=shape, metavar="KxN", default=SHAPES,
        help="default: the fused linears of Llama-2-7B and 70B",
    )  # fmt: skip
    parser.add_argument("--m", nargs="+", type=positive, default=TOKENS, help="numbers of tokens")
    parser.add_argument(
        "--bits", nargs="+", type=int, choices=(4, 8), default=[4, 8], help="of a weight"
    )
    parser.add_argument("--rest", **REST_OPTION)
    parser.add_argument(
        "--peers", type=Path, help="times of other kernels, as docs/results/h200_peers.csv"
    )
    parser.add_argument("--output", type=Path, help="JSON file for rows and circumstances")
    options = parser.parse_args()
    require_gpu("scripts/bench_sparse.py", capability=(9, 0))
    for k, n in options.shapes:
        if k % GROUP or n % 64:
            parser.error(f"{k}x{n}: K must be a multiple of {GROUP}, N one of 64")
    peers = read_peers(options.peers, "sp-w4a16") if options.peers else {}
    report = {"circumstances": circumstances("scripts/bench_sparse.py", options), "rows": []}
    rows = report["rows"]
    precompile(list(options.shapes), list(options.m), options.bits)
    # Few tokens first: minutes of large products leave the chip hot, and its clock low.
    for part in ([m for m in options.m if m <= 64], [m for m in options.m if m > 64]):
        for bits in options.bits:
            for k, n in options.shapes if part else ():
                for row in bench_shape(k, n, part, bits, options.rest):
                    found = [peers.get((g, k, n, row["m"])) for g in (-1, GROUP)]
                    if bits == 4 and all(found):  # of the faster group size
                        row["us_peer"] = min(us for _, us in found)
                    print_row(row)
                    rows.append(row)
                if options.output:
                    write_json(options.output, report)
    report["summary"] = summarize(rows)
    if options.output:
        write_json(options.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
