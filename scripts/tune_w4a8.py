"""Time the sm_90a kernels for 8-bit activations and keep the fastest: tuning/sm90_8bit/<gpu>.json.

    python scripts/tune_w4a8.py                          # all types, shapes and token counts below
    python scripts/tune_w4a8.py --types uint4b8-int8-0   # these only; other rows of the table stay
    python scripts/tune_w4a8.py --candidates 30          # more configurations of each entry

FP16 results, bias-free. Weights rotate so that none is in the L2 cache (scripts/gpu_timing.py);
activations are quantized beforehand. Of every entry the configurations of least estimated time are
tried; their results must agree before they are timed. The table is written after every shape.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from marlin_kernel import (  # noqa: E402
    launch,
    scaled_mm,
    sm80_path,
    sm90_8bit_path,
)
from marlin_kernel.formats import LayerSpec  # noqa: E402
from marlin_kernel.packing import pack_rows  # noqa: E402
from marlin_kernel.sm90_8bit_configs import (  # noqa: E402
    TUNING_DIRECTORY,
    EightBitConfig,
    EightBitTypes,
    as_row,
    estimate,
    supported_configs,
    tuned_key,
)
from marlin_kernel.sm90_8bit_layout import Records, records  # noqa: E402
from marlin_kernel.validity import Combination, violated_rule  # noqa: E402
from marlin_kernel.weight_types import WEIGHT_TYPES  # noqa: E402
from scripts.command_line import make_parser, positive, require_gpu, shape  # noqa: E402
from scripts.gpu_timing import ROTATE_BYTES, compile_first, graph_time  # noqa: E402
from scripts.tuned_tables import read_rows, write_rows  # noqa: E402

SHAPES = (
    *((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096)),
    *((8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)),
)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TYPES = (
    *("uint4b8-int8-0", "uint4b8-int8-128", "uint4b8-float8_e4m3fn-128"),
    *("uint4b8-float8_e4m3fn-0", "uint4-int8-128", "uint8b128-int8-0"),
    "float8_e4m3fn-float8_e4m3fn-0",
)
KEYS = ("types", "k", "n", "m")  # of a row
DTYPES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
TOLERANCE = 1e-3  # between configurations, relative to the norm; integer sums must be equal


def parse_types(text: str) -> EightBitTypes:
    """Types of "weight type-activation-group size" (0: one group), as a type of argparse."""
    try:
        name, activation, size = text.rsplit("-", 2)
        found = EightBitTypes(name, activation, "float16", int(size))
        rule = violated_rule(
            Combination(WEIGHT_TYPES[name], activation, group_size=int(size) or -1)
        )
    except (KeyError, ValueError):
        rule = "expected weight type-activation-group size, such as uint4b8-int8-128"
    if rule is None and activation not in DTYPES:
        rule = f"activation={activation!r} is not one of {', '.join(DTYPES)}"
    if rule is not None:
        raise argparse.ArgumentTypeError(f"{text!r}: {rule}")
    return found


def random_records(types: EightBitTypes, k: int, n: int) -> Records:
    """A random layer; K is a multiple of 128, N of 64."""
    wtype = WEIGHT_TYPES[types.weight_type]
    groups = k // types.group_size if types.group_size else 1
    words = torch.empty(k // 16, n * wtype.bits // 2, dtype=torch.int32, device="cuda")
    words.random_(-(2**31), 2**31 - 1)
    if wtype.is_float:
        words &= ~0x40404040  # no exponent that belongs to NaN
    tensors = {"B": words, "s": (torch.rand(groups, n, device="cuda") + 0.5).half() / 64}
    if not wtype.symmetric:
        zeros = torch.randint(0, wtype.levels, (groups, n), device="cuda", dtype=torch.uint8)
        tensors["z"] = pack_rows(zeros, wtype.bits)
    spec = LayerSpec(k, n, wtype, types.group_size or k)
    return records(tensors, spec, types.activation)


def rotating_records(types: EightBitTypes, k: int, n: int) -> list[Records]:
    """A random layer in so many places that it is in no cache when it is read."""
    first = random_records(types, k, n)
    copies = min(64, max(2, -(-ROTATE_BYTES // first.weights.nbytes)))
    return [first] + [
        Records(first.weights.clone(), first.scales.clone()) for _ in range(copies - 1)
    ]


def random_tokens(types: EightBitTypes, m: int, k: int) -> tuple[Tensor, Tensor]:
    """Quantized activations and their scales."""
    a = torch.randn(m, k, device="cuda", dtype=torch.float16)
    return sm80_path.quantize_activations(a, DTYPES[types.activation], k)


def candidates(types: EightBitTypes, m: int, n: int, k: int, count: int) -> list[EightBitConfig]:
    """Configurations of least estimated time."""
    processors = launch.multiprocessors(0)
    usable = [c for c in supported_configs(types) if c.fits(types, -(-k // 128))]
    return sorted(usable, key=lambda c: estimate(c, types, m, n, k, processors))[:count]


def time_configs(
    types: EightBitTypes, held: list[Records], m: int, k: int, n: int, count: int
) -> dict[EightBitConfig, float]:
    """Microseconds of each candidate."""
    tokens = random_tokens(types, m, k)
    out = torch.empty(m, n, dtype=torch.float16, device="cuda")
    used = held[: max(2, len(held) // 8)] if 2 * m * n * k > 3e11 else held  # few launches suffice
    times: dict[EightBitConfig, float] = {}
    first: Tensor | None = None
    for config in candidates(types, m, n, k, count):
        calls = [
            partial(
                *(sm90_8bit_path.launch_config, config, types),
                *(*tokens, copy.weights, copy.scales, None, out),
            )
            for copy in used
        ]
        out.fill_(float("nan"))
        calls[0]()
        first = out.clone() if first is None else first
        error = float((out.float() - first.float()).norm() / first.float().norm())
        if not error <= (TOLERANCE if types.promote else 0.0):
            raise RuntimeError(f"{config} differs by {error:.2g} at M={m}, K={k}, N={n}, {types}")
        times[config] = graph_time(calls, 5)
    return times


def compile_candidates(chosen: list[EightBitTypes], shapes, tokens, count: int) -> None:
    """Everything that will be timed, in parallel."""
    compile_first(
        config.source(types)
        for types in chosen
        for k, n in shapes
        for m in tokens
        for config in candidates(types, m, n, k, count)
    )


def add_problems(parser: argparse.ArgumentParser, types: Sequence[str]) -> None:
    """The options --types (default: `types`), --shapes and --m."""
    parser.add_argument(
        "--types",
        nargs="+",
        type=parse_types,
        metavar="TYPES",
        default=list(map(parse_types, types)),
        help=f"weight-activation-group (0: one group; default: {' '.join(types)})",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape,
        metavar="KxN",
        default=SHAPES,
        help="default: the fused linears of Llama-2-7B and 70B",
    )
    parser.add_argument("--m", nargs="+", type=positive, default=TOKENS, help="numbers of tokens")


def main() -> int:
    """Write the table. Returns the process exit status."""
    parser = make_parser(__doc__)
    add_problems(parser, TYPES)
    parser.add_argument("--candidates", type=int, default=16, help="timed for each entry")
    parser.add_argument("--verbose", action="store_true", help="print every candidate's time")
    parser.add_argument(
        "--output",
        type=Path,
        help="the table (default: this GPU's of marlin_kernel/tuning/sm90_8bit)",
    )
    options = parser.parse_args()
    require_gpu("scripts/tune_w4a8.py", capability=(9, 0))
    gpu = scaled_mm._gpu_name(0)
    path = options.output or TUNING_DIRECTORY / f"{gpu}.json"
    rows = read_rows(path, *KEYS)
    shapes, chosen = options.shapes, options.types
    start = time.time()
    compile_candidates(chosen, shapes, options.m, options.candidates)
    print(f"compiled after {time.time() - start:.0f} s", flush=True)
    # Few tokens first: minutes of large products leave the chip hot, and its clock low.
    for part in ([m for m in options.m if m <= 64], [m for m in options.m if m > 64]):
        for types in chosen:
            for k, n in shapes if part else ():
                held = rotating_records(types, k, n)
                for m in part:
                    times = time_configs(types, held, m, k, n, options.candidates)
                    best = min(times, key=times.get)
                    rows[tuned_key(types), k, n, m] = {
                        **{"types": tuned_key(types), "k": k, "n": n, "m": m},
                        "config": as_row(best),
                        "us": round(times[best], 2),
                    }
                    place = sorted(times, key=times.get).index(next(iter(times)))
                    for config in sorted(times, key=times.get) if options.verbose else ():
                        print(f"    {times[config]:.2f} us", *as_row(config).values())
                    print(
                        *(tuned_key(types), f"{k}x{n}", m, f"{times[best]:.2f} us"),
                        *(*as_row(best).values(), f"estimate's first choice is number {place + 1}"),
                        flush=True,
                    )
                del held
                torch.cuda.empty_cache()
                ordered = dict(sorted(rows.items()))
                write_rows(path, gpu, "scripts/tune_w4a8.py", ordered)
    print(f"{len(rows)} rows in {path.name} after {time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
