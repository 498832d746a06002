"""Accuracy of quantization recipes on one model: KL divergence, top-1 agreement, perplexity.

The protocol, so that numbers compare: calibration text is one document per line, shuffled with seed
0, tokenised without special tokens, joined by the tokens of a blank line and cut into rows; the
first rows calibrate. "C4" evaluates the documents behind the first 64 rows, joined alike, in 8
windows of 2048; "wiki" the first 16 windows of 2048 of the second file. No BOS. Everything in
float32.

    python scripts/bench_accuracy.py MODEL --c4 c4_sample.txt --wiki wikitext2_test.txt --out
    docs/results

Writes accuracy.json and accuracy.md; variants come from configs/bench/accuracy.yaml.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval.perplexity import WindowScores, score_windows, summarize  # noqa: E402
from gptq.calibration import joined_rows  # noqa: E402
from gptq.config import QuantizeConfig, load_recipe, resolve  # noqa: E402
from gptq.models import StreamedModel, resolve_source  # noqa: E402
from gptq.run import choose_device, environment  # noqa: E402
from gptq.sequential import Walker  # noqa: E402
from gptq.solver import Solution  # noqa: E402
from marlin_kernel import formats  # noqa: E402
from marlin_kernel.formats import QuantizedLinear  # noqa: E402
from marlin_kernel.hf import load_model, load_tokenizer  # noqa: E402
from marlin_kernel.layer import Layer  # noqa: E402

HELDOUT_ROWS = 64  # calibration rows whose documents are never evaluated
WINDOW = 2048
C4_WINDOWS, WIKI_WINDOWS = 8, 16


def texts(c4: Path, wiki: Path, tokenizer, row_length: int):
    """(calibration rows [R, row_length], {"wiki", "C4"} -> windows [W, 2048])."""
    lines = [line for line in c4.read_text(encoding="utf-8").split("\n") if line]
    random.Random(0).shuffle(lines)
    separator = len(tokenizer("\n\n", add_special_tokens=False).input_ids)
    used, count = 0, 0
    while used < HELDOUT_ROWS * row_length:
        used += len(tokenizer(lines[count], add_special_tokens=False).input_ids) + separator
        count += 1
    rows = joined_rows(lines[:count], tokenizer, length=row_length)
    c4_windows = joined_rows(lines[count:], tokenizer, length=WINDOW)[:C4_WINDOWS]
    with open(wiki, encoding="utf-8", newline="") as file:
        wiki_windows = joined_rows([file.read()], tokenizer, length=WINDOW)[:WIKI_WINDOWS]
    return rows, {"wiki": wiki_windows, "C4": c4_windows}


def figures(scores: WindowScores, name: str) -> dict[str, float]:
    found = summarize(scores, name, "windows of 2048, no BOS", WINDOW)
    return {
        key: round(getattr(found, key), 6)
        for key in ("perplexity", "kl", "kl_se", "top1", "tokens")
        if getattr(found, key) is not None
    }


@torch.no_grad()
def quantize(
    model, folder: Path, config: QuantizeConfig, rows: torch.Tensor
) -> tuple[dict[str, float], dict[str, Solution]]:
    """Put the quantized weights of a run into `model`.

    Returns seconds by kind of work, and the solutions by name of the linear.
    """
    device = model.device
    began = time.perf_counter()
    streamed = StreamedModel(folder, torch.float32, device)
    walker = Walker(
        streamed, list(rows), config.solver_options(), true_sequential=config.true_sequential
    )
    errors, layers = [], {}
    for index in range(streamed.num_layers):
        for result in walker.quantize_layer(index, lambda path: None):
            model.get_submodule(result.name).weight.copy_(result.solution.weight().T)
            errors.append(result.solution.statistics.relative_error)
            layers[result.name] = result.solution
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = walker.clock
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "seconds_forward": round(clock.forward, 2),
        "seconds_hessian": round(clock.hessian, 2),
        "seconds_solve": round(clock.solve, 2),
        "relative_error": round(sum(errors) / len(errors), 5),
    }, layers


def pack(model, solutions: dict[str, Solution], config: QuantizeConfig) -> dict[str, nn.Module]:
    """Swap quantized linears for packed layers (through the on-disk tensors and back).

    Returns the linears that were there.
    """
    before = {}
    for name, solution in solutions.items():
        wtype = config.weight_type
        layer = QuantizedLinear.of(
            solution.codes, solution.scales, wtype, config.groupsize,
            zeros=solution.zeros, g_idx=solution.g_idx,
        )  # fmt: skip
        stored = formats.read(formats.write(layer, "marlin"), "marlin", layer.spec)
        before[name] = model.get_submodule(name)
        packed = Layer.from_quantized(stored).to(model.device).prepare(torch.float32)
        model.set_submodule(name, packed)
    return before


def table(results: Sequence[dict]) -> str:
    lines = [
        "| recipe | wiki PPL | wiki KL | wiki top-1 | C4 PPL | C4 KL |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        wiki, c4 = r["wiki"], r["C4"]
        lines.append(
            f"| {r['name']} | {wiki['perplexity']:.3f} | {wiki.get('kl', 0):.4f} | "
            f"{wiki.get('top1', 1):.3f} | {c4['perplexity']:.3f} | {c4.get('kl', 0):.4f} |"
        )
    return "\n".join(lines)


def write(args: argparse.Namespace, recipe: dict, device: torch.device, results: list) -> None:
    """accuracy.json and accuracy.md with all results so far."""
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": f"python scripts/bench_accuracy.py {Path(args.model).name} "
        f"--c4 {args.c4.name} --wiki {args.wiki.name}",
        "environment": environment(device),
        "model": Path(args.model).name,
        "calibration": f"{recipe['rows']} rows of {recipe['row_length']} tokens",
        "results": results,
    }
    text = json.dumps(facts, indent=1) + "\n"
    (args.out / "accuracy.json").write_text(text, encoding="utf-8")
    heading = (
        f"# Accuracy of quantization recipes\n\n{facts['model']}, group size "
        f"{recipe['groupsize']} unless said, {facts['calibration']}; "
        f"{facts['environment'].get('gpu', 'CPU')}, torch {torch.__version__}. Protocol: "
        "`scripts/bench_accuracy.py`. KL and top-1 against full precision on the same tokens "
        "(wiki 32,752, C4 16,376 predictions).\n\n"
    )
    (args.out / "accuracy.md").write_text(heading + table(results) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder, hub name or GGUF file")
    parser.add_argument("--c4", type=Path, required=True, help="web text, one document per line")
    parser.add_argument("--wiki", type=Path, required=True, help="WikiText-2 test as one string")
    parser.add_argument("--variants", type=Path, default=ROOT / "configs/bench/accuracy.yaml")
    parser.add_argument("--only", help="names of variants, separated by ;")
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    args = parser.parse_args()

    recipe = yaml.safe_load(args.variants.read_text(encoding="utf-8"))
    chosen = recipe["variants"]
    if args.only:
        chosen = {name.strip(): chosen[name.strip()] for name in args.only.split(";")}
    device = choose_device(QuantizeConfig(device=args.device))
    folder = resolve_source(args.model)
    tokenizer = load_tokenizer(folder)
    rows, windows = texts(args.c4, args.wiki, tokenizer, recipe["row_length"])
    reference = load_model(folder, device=device, dtype=torch.float32)
    model = load_model(folder, device=device, dtype=torch.float32)
    original = {name: p.clone() for name, p in model.named_parameters()}

    def score(compared: bool) -> dict[str, dict[str, float]]:
        other = reference if compared else None
        return {
            name: figures(score_windows(model, list(w), other), name) for name, w in windows.items()
        }

    results = [{"name": "full precision", **score(False)}]
    for name, changes in chosen.items():
        changes = dict(changes)
        base = load_recipe(ROOT / "configs" / "quantize" / f"{changes.pop('recipe')}.yaml")
        count = changes.pop("rows", recipe["rows"])
        config = resolve({**base, "groupsize": recipe["groupsize"], **changes}, {})
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.copy_(original[parameter_name])
        spent, solutions = quantize(model, folder, config, rows[:count])
        results.append({"name": name, **score(True), **spent, "settings": config.fingerprint()})
        if name == "default":  # the same codes, served by the packed layers
            linears = pack(model, solutions, config)
            results.append({"name": "default, served packed", **score(True)})
            for path, linear in linears.items():
                model.set_submodule(path, linear)
        write(args, recipe, device, results)  # after every variant: a long run may be cut short
        print(table(results[-1:]).splitlines()[-1], f"{spent['seconds']:.0f} s", flush=True)
    print(f"\n{args.out / 'accuracy.md'}")


if __name__ == "__main__":
    main()
