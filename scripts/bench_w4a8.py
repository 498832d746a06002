"""Benchmark packed weights with 8-bit activations on Hopper against dense FP8 and INT8 products.

    python scripts/bench_w4a8.py --output w4a8_h200.json
    python scripts/bench_w4a8.py --peers docs/results/h200_peers.csv    # beside other kernels
    python scripts/bench_w4a8.py --types uint4b8-int8-0 --m 1 1024
    python scripts/bench_w4a8.py --peers docs/results/h200_peers.csv --tuned h200    # needs no GPU

Protocol of scripts/gpu_timing.py: graphs that rotate over copies of the weights. Results are
checked against float64 before they are timed, and the GPU rests before more than 64 tokens, because
products that just ran lower its clock (--rest). `us` is the product of quantized activations,
`us_fp16` the same with the kernel that quantizes FP16 activations in front. Dense, in the same run:
torch._scaled_mm row-wise with and without fast accumulation, torch._int_mm.
"""

from __future__ import annotations

import csv
import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from tune_w4a8 import (  # noqa: E402
    DTYPES,
    KEYS,
    add_problems,
    random_tokens,
    rotating_records,
)

from marlin_kernel import launch, scaled_mm, sm80_path, sm90_8bit_path  # noqa: E402
from marlin_kernel.formats import LayerSpec  # noqa: E402
from marlin_kernel.formats import read as read_format  # noqa: E402
from marlin_kernel.sm80_layout import K_ORDER  # noqa: E402
from marlin_kernel.sm90_8bit_configs import (  # noqa: E402
    TUNING_DIRECTORY,
    EightBitTypes,
    as_row,
    select_config,
)
from marlin_kernel.sm90_8bit_layout import Records, stored_tensors  # noqa: E402
from marlin_kernel.weight_types import WEIGHT_TYPES  # noqa: E402
from scripts.command_line import make_parser, require_gpu, write_json  # noqa: E402
from scripts.gpu_timing import (  # noqa: E402
    REST_OPTION,
    ROTATE_BYTES,
    circumstances,
    graph_time,
    let_rest,
)
from scripts.tuned_tables import read_rows  # noqa: E402

DEFAULT_TYPES = ("uint4b8-int8-0", "uint4b8-int8-128", "uint4b8-float8_e4m3fn-128")
DENSE = {"int8": "int_mm", "float8_e4m3fn": "scaled_mm"}
CHECKED_FEATURES = 1024  # results of so many features are compared


def dense_weight(held: Records, types: EightBitTypes, k: int, n: int) -> Tensor:
    """float32 [K, N]."""
    spec = LayerSpec(k, n, WEIGHT_TYPES[types.weight_type], types.group_size or k)
    layer = read_format(stored_tensors(held, spec, types.activation), "marlin", spec)
    return layer.dequantize(torch.float32)


def check(
    held: Records, types: EightBitTypes, tokens: tuple[Tensor, Tensor], out: Tensor, k: int
) -> float:
    """Relative error of `out` [M, N'] for the first features, in float64."""
    columns = min(CHECKED_FEATURES, out.shape[1]) // 64
    scales = held.scales if held.scales.numel() == 1 else held.scales[: 64 * columns]
    part = Records(held.weights[:columns].contiguous(), scales)
    weight = dense_weight(part, types, k, 64 * columns).double()
    order = torch.argsort(torch.tensor(K_ORDER, device="cuda"))
    codes = tokens[0].float().view(-1, k // 16, 16)[:, :, order].reshape(-1, k)
    expected = (codes.double() @ weight) * tokens[1].double()[:, None]
    return float((out[:, : 64 * columns].double() - expected).norm() / expected.norm())


def dense_times(m: int, k: int, n: int, rest: float) -> dict[str, float]:
    """Microseconds of torch's dense 8-bit products."""
    copies = min(48, max(2, -(-ROTATE_BYTES // (k * n))))
    fp8 = torch.float8_e4m3fn
    w = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16).to(fp8) for _ in range(copies)]
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16).to(fp8)
    scales = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
    times = {}
    for name, fast in (("scaled_mm", True), ("scaled_mm_slow", False)):
        calls = [
            partial(
                *(torch._scaled_mm, a, x.t(), *scales),
                out_dtype=torch.bfloat16,
                use_fast_accum=fast,
            )
            for x in w
        ]
        let_rest(m, rest)
        times[name] = graph_time(calls)
    if m > 16:
        w = [x.view(torch.int8) for x in w]
        a8 = a.view(torch.int8)
        let_rest(m, rest)
        times["int_mm"] = graph_time([partial(torch._int_mm, a8, x.t()) for x in w])
    return times


def compare_tuned(gpu: str, path: Path) -> list[dict]:
    """Rows of the tuned table `gpu` with ratios to times of peers and of dense products.

    x_dense: torch's product of the same 8-bit types, FP8 with fast accumulation; x_exact: without.
    """
    columns = {"int_mm": "x_dense", "scaled_mm-rowwise": "x_dense"}
    columns["scaled_mm-rowwise-slowacc"] = "x_exact"
    operands = {"int_mm": "int8"}
    dense = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["kernel"] in columns:
                operand = operands.get(row["kernel"], "float8_e4m3fn")
                entry = (operand, int(row["K"]), int(row["N"]), int(row["M"]))
                dense[(columns[row["kernel"]], *entry)] = float(list(row.values())[6])
    peers = read_peers(path)
    rows = []
    for (key, k, n, m), row in read_rows(TUNING_DIRECTORY / f"{gpu}.json", *KEYS).items():
        weight, activation, group_size = key.split()
        names = {"weight_type": weight, "activation": activation, "group_size": group_size}
        found = {"x_peer": peers[entry][1]} if (entry := (activation, k, n, m)) in peers else {}
        for ratio in ("x_dense", "x_exact"):
            if (ratio, *entry) in dense:
                found[ratio] = dense[(ratio, *entry)]
        ratios = {ratio: round(us / row["us"], 3) for ratio, us in found.items()}
        rows.append({**names, "k": k, "n": n, "m": m, "us": row["us"], **ratios})
    return rows


def read_peers(path: Path) -> dict[tuple[str, int, int, int], tuple[str, float]]:
    """(activation, K, N, M) -> fastest W4A8 kernel of any group size and its microseconds."""
    best: dict[tuple[str, int, int, int], tuple[str, float]] = {}
    names = {"w4a8-int8": "int8", "w4a8-fp8": "float8_e4m3fn"}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["dtype"] not in names:
                continue
            entry = (names[row["dtype"]], int(row["K"]), int(row["N"]), int(row["M"]))
            us = float(list(row.values())[6])
            if entry not in best or us < best[entry][1]:
                best[entry] = (f"{row['kernel']} g{row['group_size']}", us)
    return best


def measure(
    types: EightBitTypes,
    held: list[Records],
    m: int,
    k: int,
    n: int,
    dense: dict[str, float],
    rest: float,
) -> dict:
    """One row; rest: as of `let_rest`."""
    tokens = random_tokens(types, m, k)
    out = torch.full((m, n), float("nan"), device="cuda", dtype=torch.float16)
    half = torch.randn(m, k, device="cuda", dtype=torch.float16)

    def product(copy: Records, codes: Tensor, scales: Tensor) -> None:
        sm90_8bit_path.gemm(codes, scales, copy.weights, copy.scales, None, out, types)

    def both(copy: Records) -> None:
        quantized = sm80_path.quantize_activations(half, DTYPES[types.activation], k)
        product(copy, *quantized)

    product(held[0], *tokens)
    error = check(held[0], types, tokens, out, k)
    assert error < 5e-3, f"{types} at M={m}, {k}x{n}: error {error}"
    used = held[: max(2, len(held) // 8)] if 2 * m * n * k > 3e11 else held
    config = select_config(
        m, n, k, types, gpu=scaled_mm._gpu_name(0), multiprocessors=launch.multiprocessors(0)
    )
    let_rest(m, rest)
    us = graph_time([partial(product, copy, *tokens) for copy in used])
    let_rest(m, rest)
    name = DENSE[types.activation]
    return {
        **{"weight_type": types.weight_type, "activation": types.activation},
        **{"group_size": types.group_size, "k": k, "n": n, "m": m, "us": round(us, 2)},
        "us_fp16": round(graph_time([partial(both, copy) for copy in used]), 2),
        "tflops": round(2e-6 * m * n * k / us, 1),
        "gb_per_s": round(held[0].weights.nbytes / us * 1e-3),
        "error": error,
        "config": as_row(config),
        **{f"us_{key}": round(value, 2) for key, value in dense.items()},
        **({"x_dense": round(dense[name] / us, 3)} if name in dense else {}),
        **({"x_exact": round(dense["scaled_mm_slow"] / us, 3)} if name == "scaled_mm" else {}),
    }


def summarize(rows: list[dict]) -> None:
    """Geometric mean and worst of the speed-ups, by types and tokens."""
    keys = dict.fromkeys((r["weight_type"], r["activation"], r["group_size"], r["m"]) for r in rows)
    for key in keys:
        members = [
            r for r in rows if (r["weight_type"], r["activation"], r["group_size"], r["m"]) == key
        ]
        text = f"{'-'.join(map(str, key[:3])):>32} M={key[3]:<5}"
        for ratio in ("x_dense", "x_exact", "x_peer"):
            values = [r[ratio] for r in members if ratio in r]
            if values:
                mean = math.exp(sum(map(math.log, values)) / len(values))
                text += f" {ratio} {mean:.2f} (worst {min(values):.2f})"
        print(text)


def main() -> None:
    parser = make_parser(__doc__)
    add_problems(parser, DEFAULT_TYPES)
    parser.add_argument(
        "--peers",
        type=Path,
        help="times of other kernels, as docs/results/h200_peers.csv: "
        "kernel,dtype,group_size,K,N,M,us",
    )
    parser.add_argument(
        "--tuned", metavar="GPU", help="compare this tuned table, as h200; measure nothing"
    )
    parser.add_argument("--rest", **REST_OPTION)
    parser.add_argument("--output", type=Path, help="JSON file for rows and circumstances")
    options = parser.parse_args()
    if options.tuned:
        if not options.peers:
            parser.error("--tuned: there is nothing to compare with; name a CSV file by --peers")
        if not (TUNING_DIRECTORY / f"{options.tuned}.json").is_file():
            known = ", ".join(sorted(path.stem for path in TUNING_DIRECTORY.glob("*.json")))
            parser.error(f"--tuned {options.tuned}: there is no such table; choose from {known}")
        summarize(compare_tuned(options.tuned, options.peers))
        return
    require_gpu("scripts/bench_w4a8.py", capability=(9, 0))
    peers = read_peers(options.peers) if options.peers else {}
    rows: list[dict] = []
    # Few tokens first: minutes of large products leave the chip hot, and its clock low.
    for part in ([m for m in options.m if m <= 64], [m for m in options.m if m > 64]):
        for k, n in options.shapes if part else ():
            dense = {m: dense_times(m, k, n, options.rest) for m in part}
            torch.cuda.empty_cache()
            for types in options.types:
                held = rotating_records(types, k, n)
                for m in part:
                    row = measure(types, held, m, k, n, dense[m], options.rest)
                    peer = peers.get((types.activation, k, n, m))
                    if peer:
                        row |= {"peer": peer[0], "us_peer": peer[1]}
                        row["x_peer"] = round(peer[1] / row["us"], 3)
                    rows.append(row)
                    print({key: row[key] for key in row if key != "config"}, flush=True)
                del held
                torch.cuda.empty_cache()
            if options.output:
                facts = circumstances("scripts/bench_w4a8.py", options)
                write_json(options.output, {"circumstances": facts, "rows": rows})
    summarize(rows)


if __name__ == "__main__":
    main()
