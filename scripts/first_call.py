"""Time the first call of a packed layer in a new process: empty kernel cache, and full one.

    python scripts/first_call.py --json first_call.json
    python scripts/first_call.py --m 1 --types uint8b128 --repeats 1

Every number is a process of its own, in which torch is loaded and the GPU in use already: "prepare"
puts the weights into the order of the kernels, "call" is the first product, each until the GPU is
done. Compiling takes nearly all of it; a second process finds the kernels in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from marlin_kernel import WEIGHT_TYPES  # noqa: E402
from scripts.command_line import (  # noqa: E402
    command,
    commit_and_environment,
    make_parser,
    positive,
    require_gpu,
    shape,
    write_json,
)

TYPES = [t.name for t in WEIGHT_TYPES.values() if t.symmetric and not t.is_float]

CHILD = """
import json, sys, time
import torch
name, k, n, m = sys.argv[1], *map(int, sys.argv[2:])
x = torch.randn(m, k, device="cuda", dtype=torch.float16)
torch.matmul(x, x.T)
torch.cuda.synchronize()
marks = [time.perf_counter()]
def mark():
    torch.cuda.synchronize()
    marks.append(time.perf_counter())
from marlin_kernel import Layer, QuantizedLinear, weight_type
mark()
wtype = weight_type(name)
codes = torch.randint(0, 2**wtype.bits, (k, n), dtype=torch.uint8, device="cuda")
scales = torch.full((k // 128, n), 0.01, device="cuda", dtype=torch.float16)
layer = Layer.from_quantized(QuantizedLinear.of(codes, scales, wtype, 128))
mark()
layer = layer.prepare(torch.float16)
mark()
layer(x)
mark()
layer(x)
mark()
taken = [after - before for before, after in zip(marks, marks[1:])]
print(json.dumps(dict(zip(("import", "pack", "prepare", "call", "second_call"), taken))))
"""


def first_call(name: str, k: int, n: int, m: int, cache: str) -> dict[str, float]:
    """Seconds of a new process; cache: the folder of compiled kernels."""
    environment = {**os.environ, "MARLIN_KERNEL_CACHE": cache, "MARLIN_KERNEL_PREBUILT": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    call = [sys.executable, "-c", CHILD, name, *map(str, (k, n, m))]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, {m} tokens: the process ended:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, k: int, n: int, m: int, repeats: int) -> dict[str, object]:
    """One row: medians of `repeats` processes with an empty cache, and of as many with a full one.

    "first_s" is what a user waits for: `prepare` and the first call together.
    """
    row: dict[str, object] = {"type": name, "k": k, "n": n, "m": m}
    seconds: dict[str, list[dict[str, float]]] = {"empty": [], "full": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            seconds["empty"].append(first_call(name, k, n, m, cache))
            row["kernels"] = sum(1 for _ in Path(cache).rglob("*.cubin"))
            seconds["full"].append(first_call(name, k, n, m, cache))
    for kind, runs in seconds.items():
        median = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        first = [run["prepare"] + run["call"] for run in runs]
        row[f"{kind}_cache"] = {
            "first_s": round(statistics.median(first), 3),
            "most_s": round(max(first), 3),
            **{f"{part}_s": round(value, 4) for part, value in median.items()},
        }
    return row


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--m", nargs="+", type=positive, default=(1, 16, 1024), help="tokens")
    parser.add_argument(
        "--types", nargs="+", choices=TYPES, default=TYPES, help="of weights, with groups of 128"
    )
    parser.add_argument(
        "--shape", type=shape, metavar="KxN", default="4096x12288", help="inputs x features"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="processes of each kind")
    parser.add_argument("--json", type=Path, help="write the rows there")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    require_gpu("scripts/first_call.py")
    rows = []
    print("first prepare + call of a process, seconds: empty cache, full cache, kernels compiled")
    for name in options.types:
        for m in options.m:
            row = measure(name, *options.shape, m, options.repeats)
            rows.append(row)
            empty, full = row["empty_cache"]["first_s"], row["full_cache"]["first_s"]
            print(f"{name:10} M = {m:5}: {empty:6.2f} {full:6.2f} {row['kernels']:4}", flush=True)
    if options.json:
        facts = commit_and_environment(torch.device("cuda"))
        said = {"command": command("scripts/first_call.py"), **facts, "rows": rows}
        write_json(options.json, said)


if __name__ == "__main__":
    main()
