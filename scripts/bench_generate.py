"""Time per token of a decoder with packed linears and with plain ones, in the same harness.

    python scripts/bench_generate.py                      # sizes of Llama-2-7B, batch 1 and 16
    python scripts/bench_generate.py --batch 1 2 4 8 16 32 64 --variants graph compile
    python scripts/bench_generate.py --layers 4 --profile # where the time of a step goes

Weights are random 4-bit codes; the plain model holds the same weights dequantized, and the logits
of both are compared before anything is timed. A decode step is one call of the transformers model
with a static cache, and the greedy choice of the next token. Variants of it:

    eager          as it is
    graph          the eager step, captured once in a CUDA graph
    compile        torch.compile(mode="reduce-overhead") of the whole step
    compile_graph  torch.compile of the whole step, captured once in a CUDA graph

--attention and --pdl set how attention is computed and how torch.compile's kernels are launched,
for all models alike. A time is the median over --repeats runs of --new_tokens consecutive steps
that follow a prompt of --context tokens. Prefill is timed eagerly, for one sequence.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._functorch.config
import torch._inductor.config
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, StaticCache

from marlin_kernel import Layer, QuantizedLinear, hf, weight_type
from scripts.command_line import make_parser, positive, require_gpu, write_json
from scripts.gpu_timing import circumstances

ROOT = Path(__file__).resolve().parent.parent
SIZES = ROOT / "configs" / "bench" / "generate.yaml"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
MODELS = ("plain", "packed", "unfused")
VARIANTS = ("eager", "graph", "compile", "compile_graph")
ATTENTION = ("sdpa", "efficient", "cudnn", "math")
LARGEST_DIFFERENCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of logits, |a - b| / |b|
SCALE = 0.02 / 4.6  # weights of standard deviation 0.02 from codes spread evenly over -8..7


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser().parse_args(arguments)
    if torch.device(options.device).type == "cuda":
        require_gpu("scripts/bench_generate.py")
    sizes = yaml.safe_load(SIZES.read_text())[options.size]
    if options.layers:
        sizes["num_hidden_layers"] = options.layers
    config = AutoConfig.for_model(**sizes)
    set_up_torch(config, options)
    report: dict[str, Any] = {
        "circumstances": circumstances("scripts/bench_generate.py", options),
        "rows": [],
        "prefill": [],
        "memory": [],
        "profiles": [],
    }
    expected: dict[int, Tensor] = {}
    for name in options.models:
        bench_model(name, config, options, report, expected)
    print_tables(report)
    return report


def write(report: dict[str, Any], path: Path | None) -> None:
    """Write what has been measured so far."""
    if path:
        write_json(path, report)


def set_up_torch(config: PretrainedConfig, options: argparse.Namespace) -> None:
    """What is the same for all models: kernels of attention, launches of compiled kernels."""
    torch._inductor.config.triton.enable_pdl = options.pdl
    # compiled graphs are kept on disk under keys that do not know of the choices below
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    config._attn_implementation = "sdpa"
    if options.attention != "sdpa":
        cuda = torch.backends.cuda
        cuda.enable_flash_sdp(False)
        cuda.enable_mem_efficient_sdp(options.attention == "efficient")
        cuda.enable_cudnn_sdp(options.attention == "cudnn")
        cuda.enable_math_sdp(options.attention == "math")


def parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--size",
        choices=yaml.safe_load(SIZES.read_text()),
        default="llama2-7b",
        help="an entry of configs/bench/generate.yaml",
    )
    parser.add_argument("--layers", type=int, help="decoder layers, instead of the size's own")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=["plain", "packed"],
        help="unfused: packed, but q, k, v and gate, up each by itself",
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS[:3]), help="see above"
    )
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 16], help="sequences")
    parser.add_argument("--context", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new_tokens", type=int, default=64, help="decode steps of one run")
    parser.add_argument("--repeats", type=int, default=5, help="runs, of which the median counts")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens; 0: do not time prefill")
    parser.add_argument(
        "--attention",
        choices=ATTENTION,
        default="sdpa",
        help="sdpa: torch chooses the kernel; efficient, cudnn, math: that kernel of torch's",
    )
    parser.add_argument(
        "--pdl",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile's kernels start while their predecessors end",
    )
    parser.add_argument("--group_size", type=int, default=128, help="of packed weights")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of activations")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="list the kernels of a decode step; slows the launches of what is timed after it",
    )
    parser.add_argument("--output", type=Path, help="JSON file for rows and circumstances")
    return parser


# ---- models --------------------------------------------------------------------------------------


def make_model(name: str, config: PretrainedConfig, options: argparse.Namespace) -> nn.Module:
    """A decoder on the device: "plain", "packed" (as hf.load_model leaves it) or "unfused".

    All hold the same weights.
    """
    torch.manual_seed(0)
    dtype = DTYPES[options.dtype]
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    linears = [(n, m) for n, m in model.model.named_modules() if isinstance(m, nn.Linear)]
    for seed, (path, linear) in enumerate(linears):
        quantized = random_weights(linear, options.group_size, seed)
        if name == "plain":
            linear.weight.copy_(quantized.dequantize().T)
        else:
            model.model.set_submodule(path, Layer.from_quantized(quantized))
    if name != "plain":
        del linears, linear
        hf.prepare_layers(model, fuse=name == "packed")
    return model


def random_weights(linear: nn.Linear, group_size: int, seed: int) -> QuantizedLinear:
    k, n, device = linear.in_features, linear.out_features, linear.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    groups = 1 if group_size == -1 else -(-k // group_size)
    codes = torch.randint(0, 16, (k, n), generator=generator, device=device, dtype=torch.uint8)
    scales = torch.rand(groups, n, generator=generator, device=device) * 0.4 + 0.8
    return QuantizedLinear.of(codes, (scales * SCALE).half(), weight_type("uint4b8"), group_size)


class Decoder:
    """Greedy decoding of one model and batch size with a static cache.

    token: int64 [batch, 1], the newest token of each sequence.
    """

    def __init__(self, model: nn.Module, batch: int, options: argparse.Namespace) -> None:
        self.model, self.context = model, options.context
        device = options.device
        generator = torch.Generator(device).manual_seed(batch)
        shape = (batch, options.context)
        vocabulary = model.config.vocab_size
        self.prompt = torch.randint(vocabulary, shape, generator=generator, device=device)
        length = options.context + options.new_tokens + 1
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._compiled: dict[str, Callable[[Tensor], Tensor]] = {}

    def prefill(self) -> Tensor:
        """Read the prompt. Returns the logits of its last position, float [batch, V]."""
        self.cache.reset()
        out = self.model(self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1]
        self.first = logits.argmax(-1, keepdim=True)
        return logits

    def rewind(self) -> None:
        """Go back to the end of the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        self.token.copy_(self.first)

    def next_token(self, token: Tensor) -> Tensor:
        out = self.model(token, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def step(self, next_token: Callable[[Tensor], Tensor]) -> None:
        self.token.copy_(next_token(self.token))

    def variant(self, name: str) -> Callable[[], None]:
        """A function that decodes one token, ready to be timed."""
        eager = functools.partial(self.step, self.next_token)
        if name == "eager":
            return eager
        if name == "graph":
            return self._captured(eager)
        mode = "reduce-overhead" if name == "compile" else None
        torch._dynamo.reset()
        torch._dynamo.mark_static_address(self.token)
        compiled = torch.compile(self.next_token, mode=mode, fullgraph=True)
        step = functools.partial(self.step, compiled)
        if name == "compile_graph":
            return self._captured(step)
        for _ in range(4):  # compile, warm up, record
            self.rewind()
            step()
        return step

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        self.rewind()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


# ---- measurements --------------------------------------------------------------------------------


@torch.no_grad()
def bench_model(
    name: str,
    config: PretrainedConfig,
    options: argparse.Namespace,
    report: dict[str, Any],
    expected: dict[int, Tensor],
) -> None:
    """Measure one model and add what was found to `report`.

    expected: logits after the prompt by batch, filled in by the first model, compared with after.
    """
    cuda = torch.device(options.device).type == "cuda"
    gc.collect()
    before = torch.cuda.memory_allocated() if cuda else 0
    model = make_model(name, config, options)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        weights = torch.cuda.memory_allocated() - before
        report["memory"].append({"model": name, "weights_bytes": weights})
    for batch in options.batch:
        decoder = Decoder(model, batch, options)
        logits = decoder.prefill().float()
        difference = compare(logits, expected.setdefault(batch, logits), name, options)
        tokens = None
        for variant in options.variants:
            start = time.perf_counter()
            decode = decoder.variant(variant)
            ready = time.perf_counter() - start
            ms, chosen = time_steps(decoder, decode, options)
            tokens = chosen if tokens is None else tokens
            row = {
                "model": name,
                "batch": batch,
                "variant": variant,
                "ms_per_token": ms,
                "tokens_per_s": 1e3 * batch / ms,
                "seconds_to_prepare": ready,
                "logits_difference": difference,
                "same_tokens": (chosen == tokens).float().mean().item(),
            }
            if cuda:
                row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            report["rows"].append(row)
            print_row(row)
            if options.profile and cuda:
                profile = profile_step(decoder, decode)
                report["profiles"].append({**{k: row[k] for k in KEYS}, "kernels": profile})
                print_profile(profile)
            write(report, options.output)
            del decode
        del decoder
    if options.prefill:
        report["prefill"].append({"model": name, **time_prefill(model, options)})
        write(report, options.output)


KEYS = ("model", "batch", "variant")


def compare(logits: Tensor, expected: Tensor, name: str, options: argparse.Namespace) -> float:
    """|logits - expected| / |expected|; raises AssertionError if a model computes other things."""
    difference = ((logits - expected).norm() / expected.norm()).item()
    limit = LARGEST_DIFFERENCE[DTYPES[options.dtype]]
    if not difference < limit:
        raise AssertionError(f"logits of the {name} model differ by {difference:.3g}")
    return difference


def time_steps(
    decoder: Decoder, decode: Callable[[], None], options: argparse.Namespace
) -> tuple[float, Tensor]:
    """Median milliseconds of a decode step, and the tokens chosen, int64 [new_tokens, batch]."""
    cuda = decoder.token.is_cuda
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    decoder.rewind()
    chosen = []
    for _ in range(options.new_tokens):
        decode()
        chosen.append(decoder.token.flatten().clone())
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(options.repeats):
        decoder.rewind()
        synchronize()
        start = time.perf_counter()
        for _ in range(options.new_tokens):
            decode()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3 / options.new_tokens)
    return statistics.median(times), torch.stack(chosen)


def time_prefill(model: nn.Module, options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds to read a prompt of one sequence into an empty static cache."""
    vocabulary = model.config.vocab_size
    prompt = torch.randint(vocabulary, (1, options.prefill), device=options.device)
    cache = StaticCache(config=model.config, max_cache_len=options.prefill)
    synchronize = torch.cuda.synchronize if prompt.is_cuda else lambda: None
    times = []
    for _ in range(options.repeats + 2):
        cache.reset()
        synchronize()
        start = time.perf_counter()
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    ms = statistics.median(times[2:])
    return {"tokens": options.prefill, "ms": ms, "tokens_per_s": 1e3 * options.prefill / ms}


def profile_step(decoder: Decoder, decode: Callable[[], None]) -> list[dict[str, Any]]:
    """Kernels of a decode step by name: how many, and microseconds until the next one starts.

    Time until the next start counts gaps and does not count overlaps twice.
    """
    decoder.rewind()
    decode()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(2):
            decode()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: e.time_range.start)
    kernels = kernels[len(kernels) // 2 :]
    starts = [e.time_range.start for e in kernels] + [kernels[-1].time_range.end]
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for i, event in enumerate(kernels):
        entry = found[event.name]
        entry[0] += 1
        entry[1] += event.time_range.end - event.time_range.start
        entry[2] += starts[i + 1] - starts[i]
    rows = [
        {"name": name, "count": int(count), "us": us, "us_to_next": to_next}
        for name, (count, us, to_next) in found.items()
    ]
    return sorted(rows, key=lambda r: -r["us_to_next"])


# ---- output --------------------------------------------------------------------------------------


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['model']:>8} batch {row['batch']:3} {row['variant']:>14}: "
        f"{row['ms_per_token']:8.3f} ms, {row['tokens_per_s']:8.0f} tokens/s, "
        f"logits differ by {row['logits_difference']:.4f}, "
        f"{row['same_tokens']:.0%} same tokens, ready after {row['seconds_to_prepare']:.0f} s",
        flush=True,
    )


def print_profile(kernels: list[dict[str, Any]]) -> None:
    total = sum(kernel["us_to_next"] for kernel in kernels)
    print(f"{'count':>6} {'us':>9} {'us to next':>11}  of {total:.0f} us")
    for kernel in kernels[:25]:
        print(
            f"{kernel['count']:6} {kernel['us']:9.1f} {kernel['us_to_next']:11.1f}  "
            f"{kernel['name'][:100]}",
            flush=True,
        )


def print_tables(report: dict[str, Any]) -> None:
    """Milliseconds per token by batch and variant, and the speed-up over the plain model."""
    rows = {tuple(row[key] for key in KEYS): row for row in report["rows"]}
    models = list(dict.fromkeys(model for model, _, _ in rows))
    print(f"\n{'batch':>5} {'variant':>14}" + "".join(f"{m + ' ms':>13}{'':>7}" for m in models))
    for batch, variant in dict.fromkeys(key[1:] for key in rows):
        line = f"{batch:5} {variant:>14}"
        plain = rows.get(("plain", batch, variant))
        for model in models:
            ms = rows[model, batch, variant]["ms_per_token"]
            ratio = f"{plain['ms_per_token'] / ms:.2f}x" if plain else ""
            line += f"{ms:13.3f}{ratio:>7}"
        print(line)
    for entry in report["prefill"]:
        print(
            f"prefill of {entry['tokens']} tokens, {entry['model']}: {entry['ms']:.2f} ms, "
            f"{entry['tokens_per_s']:.0f} tokens/s"
        )
    for entry in report["memory"]:
        print(f"weights, {entry['model']}: {entry['weights_bytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
