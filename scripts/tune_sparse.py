"""Time every configuration of the 2:4 Marlin kernels, keep the fastest: tuning/sparse/<gpu>.json.

    python scripts/tune_sparse.py               # the shapes and token counts below, 4 and 8 bits

FP16, group size 128; weights rotate so that none is in the L2 cache (scripts/gpu_timing.py). A
result is compared with float32 before it is timed. The table is written after every shape; rows
that are not measured again stay.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from tune_scaled import SHAPES  # noqa: E402

from marlin_kernel import launch, scaled_mm, sparse_configs, sparse_marlin  # noqa: E402
from marlin_kernel.sparse import positions_2_4, prune_2_4  # noqa: E402
from marlin_kernel.sparse_configs import AnyConfig  # noqa: E402
from marlin_kernel.sparse_format import pack_codes, pack_positions  # noqa: E402
from marlin_kernel.weight_types import weight_type  # noqa: E402
from scripts.command_line import make_parser, positive, require_gpu  # noqa: E402
from scripts.gpu_timing import ROTATE_BYTES, compile_first, graph_time  # noqa: E402
from scripts.tuned_tables import read_rows, write_rows  # noqa: E402

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TYPES = {4: "uint4b8", 8: "uint8b128"}
GROUP = 128


def random_weight(k: int, n: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, scales) in the device layout and the dense float16 weight [N, K]."""
    wtype = weight_type(TYPES[bits])
    half = wtype.levels // 2
    centred = torch.randint(1 - half, half, (n, k), device="cuda", dtype=torch.int16)
    centred = prune_2_4(centred)
    positions = positions_2_4(centred)
    kept = centred.unflatten(1, (-1, 4)).gather(2, positions.long()).flatten(1)
    scales = (torch.rand(k // GROUP, n, device="cuda") + 0.5).mul_(0.01).half()
    dense = (centred.view(n, -1, GROUP) * scales.t()[:, :, None]).view(n, k)
    codes = pack_codes(kept + wtype.bias, wtype)
    weights, own = sparse_marlin.device_weights(codes, pack_positions(positions), scales, GROUP)
    return weights, own, dense


def copies_of(weights: Tensor) -> int:
    """So many that they do not fit the L2 cache together."""
    return min(64, max(2, -(-ROTATE_BYTES // weights.nbytes)))


def time_configs(
    weights: list[Tensor], scales: Tensor, dense: Tensor, m: int, bits: int, limit: float
) -> dict[AnyConfig, float]:
    """Microseconds of what the library chooses now, and of each configuration estimated within
    `limit` of the best estimate.
    """
    n, k = dense.shape
    gpu, count = scaled_mm._gpu_name(0), launch.multiprocessors(0)
    chosen = sparse_configs.select(m, n, k, bits, GROUP, gpu, count)
    a = torch.randn(m, k, device="cuda", dtype=torch.float16)
    expected = (a[:64].float() @ dense.float().t()) if m <= 64 or n * k < 1e8 else None
    size = m, -(-k // 128), bits, GROUP
    usable = [c for c in sparse_configs.supported_configs(bits, GROUP) if c.fits(*size)]
    guess = {c: sparse_configs.estimate(c, m, n, k, bits) for c in usable}
    least = min(guess.values())
    used = weights[: max(2, len(weights) // 8)] if 2 * m * n * k > 3e11 else weights
    out = torch.empty(m, n, dtype=torch.float16, device="cuda")

    def multiply(config: AnyConfig, w: Tensor) -> None:
        sparse_marlin.launch_config(config, a, w, scales, None, out, bits, GROUP)

    times: dict[AnyConfig, float] = {}
    for config in sorted(usable, key=guess.get):
        if guess[config] > limit * least + 2 and config != chosen:
            continue
        out.fill_(float("nan"))
        multiply(config, weights[0])
        if expected is not None:
            error = float((out[:64] - expected).norm() / expected.norm())
            if not error < 1e-3:
                raise RuntimeError(f"{config}: error {error:.2g} at M={m}, K={k}, N={n}")
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
        "--bits", type=int, nargs="+", default=[4, 8], choices=(4, 8), help="of a weight"
    )
    parser.add_argument(
        "--tokens", type=positive, nargs="+", metavar="M", default=TOKENS, help="numbers of tokens"
    )
    parser.add_argument(
        "--output", type=Path, help="the table (default: this GPU's of marlin_kernel/tuning/sparse)"
    )
    options = parser.parse_args()
    require_gpu("scripts/tune_sparse.py", capability=(9, 0))
    gpu = scaled_mm._gpu_name(0)
    path = options.output or sparse_configs.TUNING_DIRECTORY / f"{gpu}.json"
    rows = read_rows(path, "bits", "k", "n", "m")
    compile_first(
        config.source("float16", bits, GROUP)
        for bits in options.bits
        for config in sparse_configs.supported_configs(bits, GROUP)
    )
    for bits in options.bits:
        for k, n in SHAPES:
            weights, scales, dense = random_weight(k, n, bits)
            rotating = [weights.clone() for _ in range(copies_of(weights))]
            for m in options.tokens:
                times = time_configs(rotating, scales, dense, m, bits, options.limit)
                best = min(times, key=times.get)
                us = round(times[best], 2)
                rows[bits, k, n, m] = {
                    **{"bits": bits, "k": k, "n": n, "m": m},
                    "config": sparse_configs.as_row(best),
                    "us": us,
                }
                print(bits, k, n, m, *sparse_configs.as_row(best).values(), us, flush=True)
            del rotating
            write_rows(path, gpu, "scripts/tune_sparse.py", rows)
    print(f"{len(rows)} rows in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
