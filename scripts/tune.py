"""Measure the kernel's configurations on this GPU and write marlin_kernel/tuning/<gpu>.json.

    python scripts/tune.py                          # the shapes below, group size 128, float16
    python scripts/tune.py --shapes 4096x4096 --m 1 16
    python scripts/tune.py --type uint8b128         # to tuning/<type>/<gpu>.json
    python scripts/tune.py --dtype bfloat16 --m 64 256  # to tuning/bfloat16/<gpu>.json; all other
                                                        # numbers of tokens as for float16

For every shape (K x N) and number of tokens the `--candidates` configurations that
kernel_configs.estimate ranks first (0: all), the present choice, and all of the small-batch kernel
that fit, are timed, and the fastest becomes the table's choice, unless the present one comes within
`--keep` of it. A type's second dtype of activations has a choice of its own only where it is faster
than the first one's by more than that. Choices for other numbers of tokens are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from marlin_kernel import WEIGHT_TYPES, kernel_configs, launch
from marlin_kernel.compiler import CompileError
from marlin_kernel.kernel_configs import DecodeConfig, KernelConfig
from scripts.command_line import (
    command,
    make_parser,
    percent,
    positive,
    require_gpu,
    shape,
    write_json,
)
from scripts.gpu_timing import (
    REST_OPTION,
    RotatingWeights,
    compile_first,
    graph_time,
    launch_count,
    let_rest,
)

SHAPES = (
    "4096x12288 4096x4096 4096x22016 11008x4096 "  # Llama-2-7B, fused
    "8192x10240 8192x8192 8192x57344 28672x8192"  # Llama-2-70B, fused
)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def candidates(
    m: int,
    k: int,
    n: int,
    group_size: int,
    limit: int,
    weight_type: str = "uint4b8",
    dtype: str = "float16",
    gpu: str = "h200",
) -> list[KernelConfig]:
    """Configurations worth timing: that which stays if it is as fast, what the library chooses now,
    and the best by estimate."""
    k_tiles, column_tiles = k // kernel_configs.TILE_K, n // kernel_configs.TILE_N

    def estimate(config: KernelConfig) -> float:
        sizes = (m, k_tiles, column_tiles)
        return kernel_configs.estimate(config, *sizes, weight_type=weight_type)

    fitting = [
        config
        for config in kernel_configs.supported_configs(weight_type)
        if config.fits(m, k_tiles, group_size, weight_type)
        and kernel_configs.affordable(config, m, column_tiles)
        and _plausible(config, m)
        and estimate(config) < math.inf
    ]
    fitting.sort(key=estimate)
    if m >= 1024:  # few differ there, and each takes long
        limit = min(limit or 8, 8)
    small = [config for config in fitting if isinstance(config, DecodeConfig)]
    known = [
        kernel_configs.select_config(
            m, k_tiles, column_tiles, group_size, weight_type=weight_type, dtype=each, gpu=gpu
        )
        for each in (WEIGHT_TYPES[weight_type].activations[0], dtype)
    ]
    return list(dict.fromkeys([*known, *(fitting[:limit] if limit else fitting), *small]))


def _plausible(config: KernelConfig, m: int) -> bool:
    """Not absurdly far from the number of tokens."""
    if isinstance(config, DecodeConfig):
        return True
    return config.tokens >= min(m, 128) // 2 and config.tokens < 8 * max(m, 4)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape,
        metavar="KxN",
        default=list(map(shape, SHAPES.split())),
        help="default: the fused linears of Llama-2-7B and 70B",
    )
    parser.add_argument("--m", nargs="+", type=positive, default=TOKENS, help="numbers of tokens")
    parser.add_argument(
        "--type", choices=WEIGHT_TYPES, default="uint4b8", help="of weights (default: uint4b8)"
    )
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16"), help="of activations; default: the type's first"
    )
    parser.add_argument("--group_size", type=int, help="default: the type's largest")
    parser.add_argument(
        "--candidates", type=int, default=40, help="timed for each entry; 0: all that fit"
    )
    parser.add_argument(
        "--keep", type=percent, default=1, help="percent by which another choice must be faster"
    )
    parser.add_argument("--rest", **REST_OPTION)
    parser.add_argument(
        "--output", type=Path, help="the table (default: this GPU's of marlin_kernel/tuning)"
    )
    parser.add_argument("--measurements", type=Path, help="also write every time that was taken")
    options = parser.parse_args()
    served = WEIGHT_TYPES[options.type].activations
    options.dtype = options.dtype or served[0]
    if options.dtype not in served:
        parser.error(f"--dtype {options.dtype}: {options.type} takes {' or '.join(served)}")
    known = kernel_configs.group_sizes(options.type)
    options.group_size = options.group_size or max(known)
    if options.group_size not in known:
        parser.error(f"--group_size {options.group_size} is not in {known} for {options.type}")
    require_gpu("scripts/tune.py", capability=(9, 0))
    gpu = torch.cuda.get_device_name()
    key = kernel_configs.gpu_key(gpu)
    output = options.output or kernel_configs.tuning_path(key, options.type, options.dtype)
    table, measurements = {}, []
    if output.is_file():  # keep what is not measured again
        for row in json.loads(output.read_text())["rows"]:
            table[row["k"], row["n"]] = {choice["m"]: choice for choice in row["choices"]}
    for k, n in options.shapes:
        choices = table.setdefault((k, n), {})
        found = tune_shape(k, n, options, measurements)
        for m in options.m:
            choices.pop(m, None)
        choices.update((choice["m"], choice) for choice in found)
        write(output, gpu, options, table)
    if options.measurements:
        write_json(options.measurements, measurements)


def tune_shape(k: int, n: int, options: argparse.Namespace, measurements: list) -> list[dict]:
    """The table's choices for one shape: for each limit of m a configuration and its time.

    None where the type's first dtype has the same.
    """
    weights = RotatingWeights.make(k, n, options.group_size, weight_type=options.type)
    dtype = getattr(torch, options.dtype)
    types = (options.type, options.dtype, kernel_configs.gpu_key(torch.cuda.get_device_name()))
    tried_for = {
        m: candidates(m, k, n, options.group_size, options.candidates, *types) for m in options.m
    }
    compile_first(
        config.source(options.dtype, options.group_size, options.type)
        for tried in tried_for.values()
        for config in tried
    )
    choices = []
    for m, tried in tried_for.items():
        a = torch.randn(m, k, device="cuda").to(dtype)
        out = a.new_empty(m, n)
        launches = launch_count(m, weights.copies)
        times = {}
        for config in tried:
            let_rest(m, options.rest)
            try:
                times[config] = graph_time(
                    [_launch(config, a, weights, i, out) for i in range(launches)], replays=5
                )
            except (launch.LaunchError, CompileError) as error:
                print(f"{config}: {str(error)[:120]}", file=sys.stderr)
        best = min(times, key=times.__getitem__)
        if times.get(tried[0], math.inf) <= (1 + options.keep / 100) * times[best]:
            best = tried[0]
        flops = 2 * m * n * k / times[best] * 1e-6
        print(f"{k}x{n} m={m}: {times[best]:.2f} us, {flops:.0f} TFLOP/s, {best}", flush=True)
        if options.dtype == WEIGHT_TYPES[options.type].activations[0] or best != tried[0]:
            kind = "decode" if isinstance(best, DecodeConfig) else "gemm"
            us = round(times[best], 2)
            choices.append({"m": m, "us": us, "kind": kind, "config": asdict(best)})
        measurements += [[k, n, m, round(us, 3), repr(config)] for config, us in times.items()]
    return choices


def _launch(config: KernelConfig, a: torch.Tensor, w: RotatingWeights, i: int, out: torch.Tensor):
    return lambda: launch.launch_config(
        *(config, a, w.codes[i], w.scales[i], None, out, w.k, w.n, w.k, w.n, w.group_size),
        weight_type=w.weight_type,
        global_scale=w.global_scale,
    )


def write(
    path: Path,
    gpu: str,
    options: argparse.Namespace,
    table: dict[tuple[int, int], dict[int, dict]],
) -> None:
    """Write the table, one choice a line."""
    head = {
        "gpu": gpu,
        "weight_type": options.type,
        "group_size": options.group_size,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "driver": _driver_version(),
        "host": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "command": command("scripts/tune.py"),
    }
    lines = []
    for (k, n), by_tokens in sorted(table.items()):
        if not by_tokens:
            continue
        text = ",\n   ".join(json.dumps(by_tokens[m]) for m in sorted(by_tokens))
        lines.append(f' {{"k": {k}, "n": {n}, "choices": [\n   {text}]}}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n")


def _driver_version() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except (ImportError, RuntimeError):
        return "unknown"


if __name__ == "__main__":
    main()
