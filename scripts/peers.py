"""Other quantizers in the same format and on the same rows, for bench_accuracy.py, bench_peers.py.

Neither is a dependency of this project. Each runs in a process of its own, because they patch the
libraries that they import, and maybe under another interpreter (`--peer_python`) whose environment
needs the peer, torch, transformers and safetensors. That process writes nothing but weights, scales
and the time it took; `read_back` turns them into codes and refuses what the format cannot hold, so
that quantizers differ in nothing but codes and scales when they are evaluated.

    python scripts/peers.py --check autoround     # prints its version, or why it cannot run
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from marlin_kernel.formats import QuantizedLinear

MAX_FRACTION = 0.1  # of a step: how far a weight may be from a code (bfloat16 weights: 0.03)

# name of a linear -> (weight [N, K], scales [N, G]) as the peer left them
Quantized = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Peer:
    """A quantizer: what pip installs, what Python imports, and how it is called.

    run(model, tokenizer, rows int64 [R, T], job) quantizes all linears of the decoder layers to 4
    bits, symmetric; job: group_size, seed, device and the peer's own settings.
    """

    package: str
    module: str
    run: Callable[..., Quantized]


def autoround(model: Any, tokenizer: Any, rows: Tensor, job: Mapping[str, Any]) -> Quantized:
    """AutoRound (arXiv 2309.05516); settings: its own arguments, `iters` above all."""
    from auto_round import AutoRound

    batch = job["settings"].get("batch_size", 8)  # AutoRound's default
    quantizer = AutoRound(
        model, tokenizer, bits=4, group_size=job["group_size"], sym=True, seed=job["seed"],
        device_map=job["device"], dataset=list(rows.split(batch)), nsamples=len(rows),
        seqlen=rows.shape[1], **job["settings"],
    )  # fmt: skip
    model, _ = quantizer.quantize()
    return {
        name: (linear.weight.detach(), linear.scale.reshape(linear.out_features, -1))
        for name, linear in model.named_modules()
        if isinstance(linear, nn.Linear) and hasattr(linear, "scale")
    }


def llm_compressor(model: Any, tokenizer: Any, rows: Tensor, job: Mapping[str, Any]) -> Quantized:
    """GPTQ as in llm-compressor; settings: arguments of its GPTQModifier."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    if job["device"] == "cpu" and torch.cuda.is_available():
        raise SystemExit("llm-compressor takes a GPU that it sees: set CUDA_VISIBLE_DEVICES=''")
    torch.manual_seed(job["seed"])
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=job["group_size"]
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    modifier = GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"], **job["settings"])
    columns = {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
    oneshot(
        model=model, tokenizer=tokenizer, dataset=Dataset.from_dict(columns), recipe=[modifier],
        num_calibration_samples=len(rows), max_seq_length=rows.shape[1],
        shuffle_calibration_samples=False,
    )  # fmt: skip
    return {
        name: (linear.weight.detach(), linear.weight_scale.detach())
        for name, linear in model.named_modules()
        if isinstance(linear, nn.Linear) and hasattr(linear, "weight_scale")
    }


PEERS = {
    "autoround": Peer("auto-round", "auto_round", autoround),
    "llm-compressor": Peer("llmcompressor", "llmcompressor", llm_compressor),
}


# ---- in this process -----------------------------------------------------------------------------


def version(name: str, python: str = sys.executable) -> str:
    """Package and version of a peer that can be imported by the interpreter `python`.

    Raises SystemExit, with the reason, if there is no such peer or it cannot.
    """
    if name not in PEERS:
        raise SystemExit(f"--peers {name!r} is unknown; choose from {', '.join(PEERS)}")
    command = [python, str(Path(__file__)), "--check", name]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(
            f"--peers {name}: {python} cannot import {PEERS[name].module} ({reason}); install "
            f"{PEERS[name].package} there, name another interpreter by --peer_python, or leave "
            "it out"
        )
    return found.stdout.strip().splitlines()[-1]


def quantize(
    name: str,
    folder: Path,
    rows: Tensor,
    group_size: int,
    *,
    settings: Mapping[str, Any],
    seed: int = 0,
    layers: int | None = None,
    device: str = "cpu",
    threads: int = 1,
    python: str = sys.executable,
) -> tuple[dict[str, float], Quantized]:
    """Quantize the model in `folder`, or its first `layers` decoder layers, in another process.

    rows: int64 [R, T], all of them calibrate. Returns (seconds, cpu_seconds and version of what the
    peer did with a loaded model; what it made). Raises RuntimeError with the end of its output.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        save_file({"rows": rows.contiguous().cpu()}, place / "rows.safetensors")
        job = {
            "model": str(folder), "group_size": group_size, "settings": dict(settings),
            "seed": seed, "layers": layers, "device": device, "threads": threads,
        }  # fmt: skip
        (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [python, str(Path(__file__)), "--work", scratch, name]
        done = subprocess.run(
            command, cwd=scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{name} {settings} failed:\n{done.stdout[-4000:]}")
        tensors = load_file(place / "out.safetensors")
        spent = json.loads((place / "spent.json").read_text(encoding="utf-8"))
    names = sorted({key.rsplit("|", 1)[0] for key in tensors})
    return spent, {n: (tensors[f"{n}|weight"], tensors[f"{n}|scale"]) for n in names}


def read_back(name: str, weight: Tensor, scales: Tensor, group_size: int) -> QuantizedLinear:
    """The linear `name` of a peer in the 4-bit symmetric format.

    weight: [N, K] as the peer computes with it, which rounding to bfloat16 may have blurred;
    scales: [N, G] float, stored as fp16. Raises ValueError unless K is G groups of group_size and
    every weight is within MAX_FRACTION of scale * (code - 8) with a code of 0..15.
    """
    from marlin_kernel import formats  # the process of a peer does without
    from marlin_kernel.weight_types import weight_type

    n, k = weight.shape
    if k % group_size or tuple(scales.shape) != (n, k // group_size):
        raise ValueError(
            f"{name}: scales {list(scales.shape)} for a weight {list(weight.shape)}; groups of "
            f"{group_size} inputs need one scale per group and row, {[n, k / group_size]}"
        )
    stored = scales.half()
    if not bool(torch.isfinite(stored).all()) or bool((stored == 0).any()):
        raise ValueError(f"{name}: a scale is zero or not finite as fp16")
    steps = weight.float().reshape(n, -1, group_size) / scales.float()[..., None]
    nearest = steps.round()
    low, high = int(nearest.min()), int(nearest.max())
    if not -8 <= low <= high <= 7:
        raise ValueError(f"{name}: codes span {low + 8}..{high + 8}, outside 0..15")
    error = float((steps - nearest).abs().max())
    if error > MAX_FRACTION:
        raise ValueError(
            f"{name}: a weight is {error:.3f} steps from the nearest code; these are not weights "
            f"of the 4-bit symmetric format with groups of {group_size}"
        )
    codes = (nearest + 8).to(torch.uint8).reshape(n, k).T.contiguous()
    wtype = weight_type("uint4b8")
    layer = formats.QuantizedLinear.of(codes, stored.T.contiguous(), wtype, group_size)
    again = formats.read(formats.write(layer, "marlin"), "marlin", layer.spec, name=name)
    if not torch.equal(again.dequantize(), layer.dequantize()):
        raise ValueError(f"{name}: the on-disk format gives back other weights")
    return layer


# ---- in the process of the peer ------------------------------------------------------------------


def work(name: str, place: Path) -> None:
    """Do the job that `quantize` left in `place`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = json.loads((place / "job.json").read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    rows = load_file(place / "rows.safetensors")["rows"]
    peer = PEERS[name]
    importlib.import_module(peer.module)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    if job["layers"]:
        model.model.layers = model.model.layers[: job["layers"]]
        model.config.num_hidden_layers = job["layers"]
    wanted = {
        f"model.layers.{path}"
        for path, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear)
    }
    began, cpu = time.perf_counter(), time.process_time()
    found = peer.run(model, tokenizer, rows, job)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    spent = {
        "seconds": round(time.perf_counter() - began, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "version": f"{peer.package} {importlib.metadata.version(peer.package)}",
    }
    if set(found) != wanted:
        raise SystemExit(
            f"{name} quantized {len(found)} linears, the decoder layers have {len(wanted)}; "
            f"different: {sorted(set(found) ^ wanted)[:4]}"
        )
    tensors = {}
    for path, (weight, scales) in found.items():
        tensors[f"{path}|weight"] = weight.cpu().contiguous()
        tensors[f"{path}|scale"] = scales.detach().cpu().contiguous()
    save_file(tensors, place / "out.safetensors")
    (place / "spent.json").write_text(json.dumps(spent), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=PEERS, help="the quantizer")
    parser.add_argument("--check", action="store_true", help="print the version and end")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="do the job written there")
    args = parser.parse_args()
    if args.check == (args.work is not None):
        parser.error("give --check or --work FOLDER")
    if args.check:
        importlib.import_module(PEERS[args.name].module)
        package = PEERS[args.name].package
        print(f"{package} {importlib.metadata.version(package)}")
        return
    work(args.name, args.work)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
