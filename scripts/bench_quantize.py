"""Time and memory of quantizing one model, against the work that cannot be avoided.

    python scripts/bench_quantize.py MODEL --dataset c4_sample.txt --nsamples 32 --seqlen 1024

A real model, through the whole pipeline. The floor is two forward passes over the calibration
tokens (one feeds the statistics, one carries the quantized activations on) plus the Hessian
products 2 X Xᵀ, both timed in the same process. Peak memory is counted over an interpreter that has
torch loaded. Writes bench_quantize_<recipe>.json into --out. --peers also times other quantizers
(scripts/peers.py), with their own settings, on as many tokens and on the same device.

    python scripts/bench_quantize.py MODEL --dataset c4_sample.txt --layers 2

The first layers of a real model alone, in process CPU time: for busy machines. Writes
bench_quantize_layers.json.

    python scripts/bench_quantize.py --from_config configs/bench/llama2-7b.json \\
        --config configs/quantize/marlin.yaml --true-sequential --reference

A shape with random weights and tokens on a GPU, from the first to the last layer (or the first
--layers of them), finished layers written to disk. The floor is the counted FLOPs over the rates of
matrix products measured in the same process. --reference also times one layer's linears with the
solver in plain torch, and counts where the codes differ. Under torchrun, processes share the work,
and the one JSON holds the time split and the peak memory of every rank. --profile walks one layer
more, not counted, and lists the kernels that take longest:

    torchrun --nproc-per-node 4 scripts/bench_quantize.py --true-sequential \\
        --from_config configs/bench/llama2-7b.json --config configs/quantize/marlin.yaml

Writes bench_quantize_<shape>_<recipe>[...].json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from gptq.run import peak_host, reset_peak_host  # noqa: E402

BASE_BYTES = peak_host()  # an interpreter with torch loaded

from gptq import products  # noqa: E402
from gptq.activations import store_of  # noqa: E402
from gptq.config import QuantizeConfig, load_recipe, resolve  # noqa: E402
from gptq.distributed import join, leave  # noqa: E402
from gptq.hessian import Hessian  # noqa: E402
from gptq.models import Stages, StreamedModel, config_folder, resolve_source  # noqa: E402
from gptq.run import (  # noqa: E402
    STEP_TOKENS,
    calibration_samples,
    choose_device,
    choose_dtype,
    load_tokenizer,
    random_samples,
    run,
    spent,
)
from gptq.sequential import Walker  # noqa: E402
from gptq.solver import solve  # noqa: E402
from gptq.storage import BackgroundWriter, FinishedLayers  # noqa: E402
from scripts import peers  # noqa: E402
from scripts.command_line import (  # noqa: E402
    command,
    commit_and_environment,
    make_parser,
    positive,
)

# ---- a real model --------------------------------------------------------------------------------


Now = Callable[[], float]  # seconds: time.perf_counter, or time.process_time on a busy machine


@torch.no_grad()
def forward_seconds(
    model: StreamedModel, count: int, length: int, layers: int, now: Now = time.perf_counter
) -> float:
    """One pass of `count` sequences of `length` tokens through the first decoder layers."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (count, length), generator=generator)
    hidden = [model.embed(row) for row in ids]
    total = 0.0
    for index in range(layers):
        stages = Stages(model.layer(index), model.family)
        arguments = model.layer_arguments(length, index)
        began = now()
        for i, x in enumerate(hidden):
            hidden[i] = stages.forward(x, arguments)
        wait(model.device)
        total += now() - began
    return total


@torch.no_grad()
def hessian_seconds(
    model: StreamedModel,
    count: int,
    length: int,
    layers: int,
    asymmetric: bool,
    now: Now = time.perf_counter,
) -> float:
    """Products of the statistics of so many layers."""
    total = 0.0
    for number, stage in enumerate(model.family.stages):
        linear = model.skeleton.get_submodule(f"{model.layer_name(0)}.{stage[0]}")
        k, n = linear.in_features, linear.out_features
        x = torch.randn(length, k, device=model.device, dtype=model.dtype)
        extra = {}
        adds = model.family.adds_to_residual(number)
        weight = torch.randn(n, k, device=model.device, dtype=model.dtype)
        if asymmetric and adds:
            extra["lack"] = torch.randn(length, n, device=model.device, dtype=model.dtype)
        elif asymmetric:
            extra["delta"] = torch.randn_like(x)
        h = Hessian(k, model.device)
        h.add(x, **extra)
        began = now()
        for _ in range(layers):
            for _ in range(count):
                if "lack" in extra and model.dtype != torch.float32:  # else W X Xᵀ is W H
                    extra["lack"] = torch.nn.functional.linear(x, weight)
                h.add(x, **extra)
        wait(model.device)
        total += now() - began
    return total


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench_model(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Quantize args.model. Returns the name of the result's file and the result."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "checkpoint": args.model, "dataset": args.dataset, "nsamples": args.nsamples,
            "seqlen": args.seqlen, "groupsize": args.groupsize, "device": args.device,
            "save": f"{folder}/packed",
        }  # fmt: skip
        config = resolve(load_recipe(args.config), flags)
        device = choose_device(config)
        source = resolve_source(config.checkpoint)
        dtype = choose_dtype(config, source, device)
        reset_peak_host()
        report = run(config, Path(config.save))
        peak = peak_host()
        model = StreamedModel(source, dtype, device)
        tokens = report["totals"]["calibration_tokens"]
        count = round(tokens / args.seqlen)
        forward = forward_seconds(model, count, args.seqlen, model.num_layers)
        scale = model.num_layers / 2  # two layers are timed
        plain = full = hessian_seconds(model, count, args.seqlen, 2, False) * scale
        if config.asymmetric:
            full = hessian_seconds(model, count, args.seqlen, 2, True) * scale
        others = {name: peer_seconds(name, model, count, args) for name in args.peers}
    totals = report["totals"]
    floor = 2 * forward + plain
    floor_full = 2 * forward + full
    result = {
        "command": noted_command(),
        **commit_and_environment(device),
        "settings": config.fingerprint(),
        "calibration_tokens": tokens,
        "seconds": {
            "quantize": totals["seconds"],
            "quantize_forward": totals["seconds_forward"],
            "quantize_hessian": totals["seconds_hessian"],
            "quantize_solve": totals["seconds_solve"],
            "one_forward": forward,
            "hessian_products": plain,
            "hessian_and_target_products": full,
            "floor": floor,
            "floor_with_target_products": floor_full,
        },
        "ratio": totals["seconds"] / floor,
        "ratio_with_target_products": totals["seconds"] / floor_full,
        "peak_bytes_over_torch": max(peak - BASE_BYTES, 0),
        "peers": others,
    }
    return f"bench_quantize_{Path(args.config).stem}.json", result


def peer_seconds(
    name: str, model: StreamedModel, count: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Version and seconds of another quantizer that is given the loaded model and random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, model.config.vocab_size, (count, args.seqlen), generator=generator)
    spent, _ = peers.quantize(
        name, model.folder, rows, args.groupsize, settings={}, device=str(model.device),
        threads=torch.get_num_threads(), python=args.peer_python,
    )  # fmt: skip
    return spent


def bench_layers(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The first layers of args.model in process CPU time, which other work on the machine changes
    little: quantizing them against two forward passes and the Hessian products."""
    flags = {
        "checkpoint": args.model, "dataset": args.dataset, "nsamples": args.nsamples,
        "seqlen": args.seqlen, "groupsize": args.groupsize, "device": "cpu",
    }  # fmt: skip
    config = resolve(load_recipe(args.config), flags)
    source, cpu = resolve_source(config.checkpoint), torch.device("cpu")
    model = StreamedModel(source, choose_dtype(config, source, cpu), cpu)
    tokens = torch.cat(calibration_samples(config, load_tokenizer(source), args.seqlen))
    samples = [row for row in tokens.split(args.seqlen) if row.numel() == args.seqlen]
    layers, now = min(args.layers, model.num_layers), time.process_time
    walker = Walker(model, samples, config.solver_options(), true_sequential=config.true_sequential)
    began = now()
    losses = [
        result.solution.statistics.loss
        for index in range(layers)
        for result in walker.quantize_layer(index, lambda path: None)
    ]
    quantize = now() - began
    forward = forward_seconds(model, len(samples), args.seqlen, layers, now)
    plain = full = hessian_seconds(model, len(samples), args.seqlen, layers, False, now)
    if config.asymmetric:
        full = hessian_seconds(model, len(samples), args.seqlen, layers, True, now)
    result = {
        "command": noted_command(),
        **commit_and_environment(model.device),
        "settings": config.fingerprint(),
        "calibration_tokens": len(samples) * args.seqlen,
        "layers": layers,
        "layers_of_model": model.num_layers,
        "cpu_seconds": {
            "quantize": quantize,
            "one_forward": forward,
            "hessian_products": plain,
            "hessian_and_target_products": full,
        },
        "ratio": quantize / (2 * forward + plain),
        "ratio_with_target_products": quantize / (2 * forward + full),
        "loss_of_each_linear": losses,
    }
    return "bench_quantize_layers.json", result


# ---- a shape -------------------------------------------------------------------------------------


def product_rate(
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul,
) -> float:
    """FLOP/s of a square matrix product, best of five."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        wait(device)
        began = time.perf_counter()
        product(a, a)
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def floor_of_layer(
    model: StreamedModel, config: QuantizeConfig, tokens: int, seqlen: int
) -> dict[str, float]:
    """Seconds that a layer's necessary FLOPs take at measured rates.

    forward: one pass, with half of the attention's products (causal); hessian: one triangle;
    factor: Cholesky and the triangle's inverse; update: GPTQ's error feedback; clipping: one
    triangle per factor tried; refit: normal equations (products with codes, which take two of three
    terms) and the gradient; sweep: the gradient again. With asymmetric calibration, two forwards,
    the target's products, and target: a factor and what it solves.
    """
    sizes = (8192, 4096) if model.device.type == "cuda" else (1024, 1024)
    half = product_rate(model.device, model.dtype, sizes[0])
    single = product_rate(model.device, torch.float32, sizes[1])
    split = product_rate(model.device, torch.float32, sizes[1], products.multiply)
    prefix = model.layer_name(0)
    forward = hessian = target = factor = update = clipping = refit = sweep = solved = 0.0
    starts = 2 if config.signed_scales and config.sym else 1
    for number, stage in enumerate(model.family.stages):
        linears = [model.skeleton.get_submodule(f"{prefix}.{path}") for path in stage]
        k, n = linears[0].in_features, sum(linear.out_features for linear in linears)
        forward += 2 * tokens * k * n
        hessian += tokens * k * k
        adds = model.family.adds_to_residual(number)
        target += 2 * tokens * k * (2 * n if adds else k)
        factor += k**3 / 3 / single + k**3 / 3 / split
        update += k * k * n
        refit += config.refit * (2 / 3 + 2) * k * k * n
        sweep += max(config.refit, 1) * config.sweeps * 2 * k * k * n
        solved += 2 * k * k * n + (2 * k**3 if k < n and not adds else 0)
        clipping += 0 if config.no_clip else k * n * 128 * config.clip_steps * starts
    forward += 2 * tokens * seqlen * model.config.hidden_size
    streams = 2 if config.asymmetric else 1
    return {
        "half_precision_flops_per_second": half,
        "float32_flops_per_second": single,
        "split_float32_flops_per_second": split,
        "forward": streams * forward / half,
        "hessian": (hessian + (target if config.asymmetric else 0)) / half,
        "factor": factor,
        "target": factor + solved / split if config.asymmetric else 0.0,
        "update": update / split,
        "refit": refit / split,
        "sweep": sweep / split,
        "clipping": clipping / single,
    }


@torch.no_grad()
def against_reference(model: StreamedModel, config: QuantizeConfig) -> dict[str, Any]:
    """All linears of layer 0 on Hessians of random inputs: the kernels against plain torch."""
    options = config.solver_options()
    layer = model.layer(0)
    draw = torch.Generator(model.device).manual_seed(0)
    rows = []
    for stage in model.family.stages:
        weight = torch.cat([layer.get_submodule(path).weight for path in stage])
        n, k = weight.shape
        h = Hessian(k, model.device)
        energy = torch.rand(k, device=model.device, generator=draw) + 0.1
        for _ in range(4):
            x = torch.randn(8192, k, device=model.device, generator=draw)
            h.add(((x + 0.5 * x.roll(1, 1)) * energy).to(model.dtype))
        matrix = h.matrix()
        seconds, solutions = [], []
        for fused in (True, False):
            for _ in range(2 if fused else 1):  # the kernels once to warm up
                wait(model.device)
                began = time.perf_counter()
                found = solve(weight, matrix, replace(options, fused=fused), tokens=h.tokens)[0]
                wait(model.device)
                spent = time.perf_counter() - began
            seconds.append(spent)
            solutions.append(found)
        different = solutions[0].codes != solutions[1].codes
        losses = [loss_of(weight, s, matrix) for s in solutions]
        rows.append({
            "linears": list(stage), "inputs": k, "outputs": n,
            "seconds": seconds[0], "seconds_torch": seconds[1],
            "outputs_with_a_tie": int(different.any(0).sum()),
            "ties_per_code": float(different.any(0).sum()) / (k * n),
            "codes_behind_ties": float(different.float().mean()),
            "relative_loss_difference": abs(losses[0] / losses[1] - 1),
        })  # fmt: skip
    total = [sum(row[key] for row in rows) for key in ("seconds", "seconds_torch")]
    return {"seconds": total[0], "seconds_torch": total[1], "speedup": total[1] / total[0],
            "stages": rows}  # fmt: skip


def loss_of(weight: torch.Tensor, solution: Any, h: torch.Tensor) -> float:
    """``(Q - W) H (Q - W)ᵀ`` summed over outputs, float32 products, float64 sum."""
    error = solution.weight() - weight.float().T
    return float((error * (h @ error)).double().sum())


def bench_shape(args: argparse.Namespace) -> tuple[str, dict[str, Any] | None]:
    """Quantize a model of the shape args.from_config. Processes but the first return None."""
    flags = {
        "from_config": args.from_config, "nsamples": args.nsamples, "seqlen": args.seqlen,
        "device": args.device, "true_sequential": args.true_sequential,
        "offload_activations": args.offload_activations,
    }  # fmt: skip
    recipe = load_recipe(args.config)
    if "weight_type" not in recipe:  # which decides both
        flags |= {"wbits": 4, "groupsize": args.groupsize}
    config = resolve(recipe, flags)
    device = choose_device(config)
    workers = join(device)
    folder = config_folder(config.from_config)
    dtype = choose_dtype(config, folder, device)
    model = StreamedModel(folder, dtype, device, random_seed=config.seed)
    samples, probe = random_samples(config, args.seqlen, model.config.vocab_size)
    layers = min(args.layers or model.num_layers, model.num_layers - args.profile)
    tokens = args.nsamples * args.seqlen
    first = workers.rank == 0

    with tempfile.TemporaryDirectory(dir=args.scratch) as own, ExitStack() as held:
        scratch = workers.agree(own)
        folder = Path(scratch) / "layers"
        opened = FinishedLayers(folder, "benchmark", None) if first else None
        finished = FinishedLayers.shared(opened, folder, workers)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        reset_peak_host()
        setup = time.perf_counter()
        place = Path(scratch) / "out"
        store = held.enter_context(
            store_of(config.offload_activations, device, place, workers.rank)
        )
        walker = Walker(
            model,
            samples[workers.rank :: workers.count],
            config.solver_options(),
            true_sequential=config.true_sequential,
            probe=probe,
            step_tokens=STEP_TOKENS if device.type == "cuda" else 1,
            offload=store,
            workers=workers,
        )
        wait(device)
        began = time.perf_counter()
        each, splits, before = [], [], walker.clock.seconds()
        with BackgroundWriter(finished, device) if finished else nullcontext() as writer:
            for index in range(layers):
                start = time.perf_counter()
                results = walker.quantize_layer(index, lambda path: None)
                if writer is not None:
                    with walker.timed("io"), walker.timed("io.write"):
                        writer.save(index, results, [])
                each.append(time.perf_counter() - start)
                after = walker.clock.seconds()
                splits.append({kind: after[kind] - before.get(kind, 0.0) for kind in after})
                before = after
                if first:
                    print(f"layer {index}: {each[-1]:.3f} s", flush=True)
        wait(device)
        seconds = time.perf_counter() - began
        errors = [result.solution.statistics.relative_error for result in results]
        del results
        usual = {  # seconds of a layer by kind of work: the median, without the first layer
            kind: statistics.median(split.get(kind, 0.0) for split in splits[1:] or splits)
            for kind in splits[-1]
        }
        ranks = workers.collect(spent(walker) | {"seconds_of_a_layer": usual})
        slowest = slowest_kernels(walker, layers) if args.profile else None
    result = {
        "command": noted_command(),
        **commit_and_environment(device),
        "settings": config.fingerprint(),
        "processes": workers.count,
        "layers": layers,
        "layers_of_model": model.num_layers,
        "calibration_tokens": tokens,
        "seconds": seconds,
        "seconds_before_the_first_layer": began - setup,
        "seconds_of_each_layer": each,
        "seconds_of_the_first_process": ranks[0]["seconds"],
        "ranks": ranks,
        "peak_device_bytes": max(rank["peak_device_bytes"] for rank in ranks),
        "peak_host_bytes": sum(rank["peak_host_bytes"] for rank in ranks),
        "relative_errors_of_the_last_layer": errors,
    }  # fmt: skip
    del walker
    if slowest is not None:
        result["slowest_kernels"] = slowest
    if first:
        result["floor_of_a_layer"] = floor_of_layer(model, config, tokens, args.seqlen)
        if args.reference:
            result["solver_against_torch"] = against_reference(model, config)
    parts = [Path(args.from_config).stem, Path(args.config).stem]
    parts += {None: [], "host": ["offload"]}.get(args.offload_activations, ["offload_disk"])
    parts += [f"{workers.count}gpus"] if workers.count > 1 else []
    parts += ["twopass"] if not config.true_sequential else []
    name = "_".join(parts)
    return f"bench_quantize_{name}.json", result if first else None


@torch.no_grad()
def slowest_kernels(walker: Walker, index: int, count: int = 40) -> list[dict[str, Any]]:
    """Kernels (on a CPU: operators) of quantizing layer `index`: their seconds, longest first."""
    activities, key = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if walker.model.device.type == "cuda":
        activities, key = [torch.profiler.ProfilerActivity.CUDA], "self_device_time_total"
    with torch.profiler.profile(activities=activities) as profile:
        walker.quantize_layer(index, lambda path: None)
        wait(walker.model.device)
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
    return [
        {"name": event.key[:160], "calls": event.count, "seconds": getattr(event, key) / 1e6}
        for event in events[:count]
    ]


def noted_command() -> str:
    return command("scripts/bench_quantize.py", without=("--out", "--scratch", "--peer_python"))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", nargs="?", help="folder, hub name or GGUF file")
    parser.add_argument("--from_config", help="config.json of a shape to fill with random weights")
    parser.add_argument("--config", default=str(ROOT / "configs/quantize/fast.yaml"), help="recipe")
    parser.add_argument("--dataset", default="pydoc", help="calibration text of a real model")
    parser.add_argument("--nsamples", type=positive, help="default: 32, with --from_config 128")
    parser.add_argument("--seqlen", type=positive, help="default: 1024, with --from_config 2048")
    parser.add_argument("--groupsize", type=int, help="default: 64, with --from_config 128")
    parser.add_argument(
        "--true-sequential", action=argparse.BooleanOptionalAction, help="instead of the recipe's"
    )
    parser.add_argument(
        "--offload_activations", nargs="?", const="host", metavar="WHERE",
        help="host (if nothing is said), disk or a folder",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=positive, help="only the first ones; of a real model: in process CPU time"
    )
    parser.add_argument("--reference", action="store_true", help="time the solver in torch too")
    parser.add_argument("--profile", action="store_true", help="list kernels of one layer more")
    parser.add_argument(
        "--peers", nargs="+", default=[], choices=peers.PEERS,
        help="other quantizers to time on a real model",
    )  # fmt: skip
    parser.add_argument(
        "--peer_python", default=sys.executable, metavar="PYTHON",
        help="interpreter whose environment holds them (default: this one)",
    )  # fmt: skip
    parser.add_argument("--scratch", help="folder for the finished layers (default: the system's)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "results", help="folder of the JSON file"
    )
    args = parser.parse_args()
    if (args.model is None) == (args.from_config is None):
        parser.error("give a model, or --from_config CONFIG.json")
    shape = args.from_config is not None
    if args.profile and not shape:
        parser.error("--profile goes with --from_config")
    if args.peers and (shape or args.layers):
        parser.error("--peers goes with a whole real model")
    for name in args.peers:
        peers.version(name, args.peer_python)
    args.nsamples = args.nsamples or (128 if shape else 32)
    args.seqlen = args.seqlen or (2048 if shape else 1024)
    args.groupsize = args.groupsize or (128 if shape else 64)
    one_model = bench_layers if args.layers else bench_model
    name, result = (bench_shape if shape else one_model)(args)
    leave()
    if result is None:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / name
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k not in ("environment", "settings")}))
    print(path.name)


if __name__ == "__main__":
    main()
