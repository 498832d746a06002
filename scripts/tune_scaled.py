"""Time every configuration of the scaled GEMM and keep the fastest: tuning/scaled/<gpu>.json.

    python scripts/tune_scaled.py                # the shapes and token counts below
    python scripts/tune_scaled.py --limit 1.5    # only those estimated within 1.5x of the best

FP8 operands, BF16 results, one scale per token and feature; weights rotate so that none is in the
L2 cache (scripts/gpu_timing.py). Results of all configurations must agree before they are timed.
The table is written after every shape; rows that are not measured again stay.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from marlin_kernel import launch, scaled_configs, scaled_mm  # noqa: E402
from marlin_kernel.scaled_configs import ScaledConfig  # noqa: E402
from marlin_kernel.sparse import compress_2_4, prune_2_4  # noqa: E402
from scripts.command_line import make_parser, require_gpu  # noqa: E402
from scripts.gpu_timing import ROTATE_BYTES, compile_first, graph_time  # noqa: E402
from scripts.tuned_tables import read_rows, write_rows  # noqa: E402

SHAPES = (
    *((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096)),
    *((8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)),
)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
FP8 = torch.float8_e4m3fn
TOLERANCE = 6e-3  # of FP8 sums with the tensor cores' short mantissa


def rotating_weights(k: int, n: int, sparse: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Copies of one random weight: dense, or kept values and metadata."""
    w = torch.randn(n, k, device="cuda")
    tensors: tuple[Tensor, Tensor | None] = (w.to(FP8), None)
    if sparse:
        tensors = compress_2_4(prune_2_4(w).to(FP8))
    size = sum(t.nbytes for t in tensors if t is not None)
    copies = min(64, max(2, -(-ROTATE_BYTES // size)))
    return [tuple(None if t is None else t.clone() for t in tensors) for _ in range(copies)]


def time_configs(
    weights: list[tuple[Tensor, Tensor | None]], m: int, k: int, n: int, limit: float
) -> dict[ScaledConfig, float]:
    """Microseconds of what the library chooses now, and of each configuration estimated within
    `limit` of the best estimate.
    """
    sparse = weights[0][1] is not None
    a = torch.randn(m, k, device="cuda").to(FP8)
    scale_a, scale_b = torch.rand(m, device="cuda"), torch.rand(n, device="cuda") / 64
    usable = [c for c in scaled_configs.supported_configs(sparse) if c.fits(-(-k // 128), sparse)]
    guess = {c: scaled_configs.estimate(c, m, n, k, sparse) for c in usable}
    least = min(guess.values())
    gpu, count = scaled_mm._gpu_name(0), launch.multiprocessors(0)
    chosen = scaled_configs.select(m, n, k, sparse, gpu, count)
    long = 2 * m * n * k > 3e11  # few launches suffice
    used = weights[: max(2, len(weights) // 8)] if long else weights
    times: dict[ScaledConfig, float] = {}
    first: Tensor | None = None
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")

    def multiply(config: ScaledConfig, w: tuple[Tensor, Tensor | None]) -> None:
        scaled_mm.launch_config(config, a, *w, scale_a, scale_b, None, out)

    for config in sorted(usable, key=guess.get):
        if guess[config] > limit * least + 2 and config != chosen:
            continue
        out.fill_(float("nan"))
        multiply(config, weights[0])
        first = out.clone() if first is None else first
        error = float((out - first).norm() / first.norm())
        if not error < TOLERANCE:
            raise RuntimeError(f"{config} differs by {error:.2g} at M={m}, K={k}, N={n}")
        calls = [partial(multiply, config, w) for w in used]
        times[config] = graph_time(calls, 5)
    return times


def main() -> int:
    """Write the table. Returns the process exit status."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--limit", type=float, default=2.0, help="time what is estimated within LIMIT of the best"
    )
    parser.add_argument(
        "--output", type=Path, help="the table (default: this GPU's of marlin_kernel/tuning/scaled)"
    )
    options = parser.parse_args()
    require_gpu("scripts/tune_scaled.py", capability=(9, 0))
    gpu = scaled_mm._gpu_name(0)
    path = options.output or scaled_configs.TUNING_DIRECTORY / f"{gpu}.json"
    rows = read_rows(path, "sparse", "k", "n", "m")
    compile_first(
        config.source("float8_e4m3fn", "bfloat16", sparse)
        for sparse in (True, False)
        for config in scaled_configs.supported_configs(sparse)
    )
    for k, n in SHAPES:
        for sparse in (True, False):
            weights = rotating_weights(k, n, sparse)
            for m in TOKENS:
                times = time_configs(weights, m, k, n, options.limit)
                best = min(times, key=times.get)
                us = round(times[best], 2)
                rows[sparse, k, n, m] = {
                    **{"sparse": sparse, "k": k, "n": n, "m": m},
                    "config": scaled_configs.as_row(best),
                    "us": us,
                }
                print(sparse, k, n, m, *scaled_configs.as_row(best).values(), us, flush=True)
            del weights
            write_rows(path, gpu, "scripts/tune_scaled.py", rows)
    print(f"{len(rows)} rows in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
