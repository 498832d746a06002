"""Time and memory of quantizing one model, against the work that cannot be avoided.

The floor is two forward passes over the calibration tokens (one feeds the statistics, one carries
the quantized activations on) plus the Hessian products 2 X Xᵀ, both timed here in the same process
before the quantizer runs. Peak memory is counted over an interpreter that has torch loaded.

    python scripts/bench_quantize.py MODEL --dataset c4_sample.txt --nsamples 32 --seqlen 1024

Writes bench_quantize.json into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from gptq.run import peak_host, reset_peak_host  # noqa: E402

BASE_BYTES = peak_host()  # an interpreter with torch loaded

from gptq.config import load_recipe, resolve  # noqa: E402
from gptq.hessian import Hessian  # noqa: E402
from gptq.models import Stages, StreamedModel, resolve_source  # noqa: E402
from gptq.run import choose_device, choose_dtype, environment, run  # noqa: E402


@torch.no_grad()
def forward_seconds(model: StreamedModel, count: int, length: int) -> float:
    """One pass of `count` sequences of `length` tokens through all decoder layers."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (count, length), generator=generator)
    hidden = [model.embed(row) for row in ids]
    spent = 0.0
    for index in range(model.num_layers):
        stages = Stages(model.layer(index), model.family)
        arguments = model.layer_arguments(length, index)
        began = time.perf_counter()
        for i, x in enumerate(hidden):
            hidden[i] = stages.forward(x, arguments)
        _wait(model.device)
        spent += time.perf_counter() - began
    return spent


@torch.no_grad()
def hessian_seconds(
    model: StreamedModel, count: int, length: int, layers: int, asymmetric: bool
) -> float:
    """Products of all layers' statistics; `layers` are timed and scaled up to the model."""
    stages = [
        (model.skeleton.get_submodule(f"{model.layer_name(0)}.{stage[0]}"), stage)
        for stage in model.family.stages
    ]
    spent = 0.0
    for linear, stage in stages:
        k = linear.in_features
        added = asymmetric and stage[0].endswith(("o_proj", "down_proj"))
        x = torch.randn(length, k, device=model.device, dtype=model.dtype)
        y = torch.randn_like(x) if asymmetric else None
        r = torch.randn(length, linear.out_features, device=model.device) if added else None
        h = Hessian(k, model.device, asymmetric=asymmetric)
        h.add(x, y, r)
        began = time.perf_counter()
        for _ in range(layers):
            for _ in range(count):
                h.add(x, y, r)
        _wait(model.device)
        spent += time.perf_counter() - began
    return spent / layers * model.num_layers


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder, hub name or GGUF file")
    parser.add_argument("--config", default=str(ROOT / "configs/quantize/default.yaml"))
    parser.add_argument("--dataset", default="pydoc")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--groupsize", type=int, default=64)
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    args = parser.parse_args()

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
        forward = forward_seconds(model, count, args.seqlen)
        plain = hessian_seconds(model, count, args.seqlen, 2, False)
        full = hessian_seconds(model, count, args.seqlen, 2, True) if config.asymmetric else plain
    totals = report["totals"]
    floor = 2 * forward + plain
    floor_full = 2 * forward + full
    result = {
        "command": f"python scripts/bench_quantize.py {Path(args.model).name} --dataset "
        f"{Path(args.dataset).name} --nsamples {args.nsamples} --seqlen {args.seqlen} "
        f"--groupsize {args.groupsize} --config {Path(args.config).name}",
        "environment": report["environment"] | environment(device),
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
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "bench_quantize.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for key, value in result["seconds"].items():
        print(f"{key:<30} {value:8.1f} s")
    print(f"{'quantize / floor':<30} {result['ratio']:8.2f}")
    print(f"{'quantize / floor with targets':<30} {result['ratio_with_target_products']:8.2f}")
    print(f"{'peak memory over torch':<30} {result['peak_bytes_over_torch'] / 1e9:8.2f} GB")
    print(path)


if __name__ == "__main__":
    main()
