"""CPU seconds of `best` beside AutoRound's 200 iterations, without waiting for either to end.

    python scripts/bench_peers.py MODEL --c4 c4_sample.txt

Both cost so much per layer and step, and little else, so two numbers of steps on the first --layers
layers say what a step costs, and their difference holds no start-up. Ours is counted in full: the
solver, the steps, the checks on held-out samples, and the end-to-end pass over the whole model.
Of AutoRound only the iterations count, not its start-up, compilation or caching of inputs: a lower
bound. Both run at the same time, each on one thread, in process CPU time: other work on the machine
slows both alike. Rows are those of bench_accuracy.py. Writes docs/results/bench_peers.json;
bench_accuracy.py makes the table of docs/accuracy.md from it.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from gptq.config import QuantizeConfig, load_recipe, resolve  # noqa: E402
from gptq.models import StreamedModel, resolve_source  # noqa: E402
from gptq.refine import RefineOptions, StoredLinear, refine_model  # noqa: E402
from gptq.sequential import Walker  # noqa: E402
from marlin_kernel.formats import QuantizedLinear  # noqa: E402
from marlin_kernel.hf import load_tokenizer  # noqa: E402
from marlin_kernel.weight_types import weight_type  # noqa: E402
from scripts import peers  # noqa: E402
from scripts.bench_accuracy import calibration, texts  # noqa: E402
from scripts.command_line import (  # noqa: E402
    command,
    commit_and_environment,
    make_parser,
    positive,
)

CPU = torch.device("cpu")
ITERATIONS = 200  # of AutoRound, its default
MEASURED = 10, 30  # iterations; with fewer than 10 it does not compile
SETTINGS: dict[str, dict] = {"AutoRound": {}, "AutoRound in float32": {"amp": False}}


def layer_seconds(folder: Path, rows: Tensor, config: QuantizeConfig, layers: int, steps: int):
    """CPU seconds of the first layers, with so many steps of --refine and two checks."""
    began = time.process_time()
    walker = Walker(
        StreamedModel(folder, torch.float32, CPU),
        list(rows),
        config.solver_options(),
        true_sequential=config.true_sequential,
        step_tokens=1,
        refine=RefineOptions(steps, checks=1) if steps else None,
    )
    for index in range(layers):
        list(walker.quantize_layer(index, lambda path: None))
    return time.process_time() - began


def end_to_end_seconds(folder: Path, rows: Tensor, config: QuantizeConfig, steps: int) -> float:
    """CPU seconds of so many steps of --refine-norms on the whole model, and two checks.

    The time depends on no value, so that weights are rounded to nearest and targets random.
    """
    model = StreamedModel(folder, torch.float32, CPU)
    wtype = weight_type("uint4b8")

    def solutions(index: int) -> dict[str, StoredLinear]:
        layer = model.layer(index)
        found = {}
        for path in (path for stage in model.family.stages for path in stage):
            weight = layer.get_submodule(path).weight.detach().float().T
            q = QuantizedLinear.quantize(weight, wtype, config.groupsize)
            scales = q.scales.float()
            own = torch.zeros_like(scales), q.group_index.long(), wtype
            found[path] = StoredLinear(q.codes, scales, *own)
        return found

    target = torch.randn(1, rows.shape[1], model.config.hidden_size)
    began = time.process_time()
    refine_model(model, solutions, list(rows), lambda i: target, RefineOptions(steps, checks=1))
    return time.process_time() - began


def both(one: float, more: float, few: int, many: int, options: RefineOptions) -> float:
    """Seconds of a whole refinement, from those with `few` and `many` steps and two checks each."""
    step = (more - one) / (many - few)
    check = (one - few * step) / 2  # start-up with it
    return options.steps * step + (options.checks + 1) * check


def ours(folder: Path, rows: Tensor, config: QuantizeConfig, layers: int) -> dict[str, float]:
    """CPU seconds of one layer, and of the end-to-end pass over the whole model."""
    plain = layer_seconds(folder, rows, config, layers, 0)
    few, many = 2, 7
    taught = [layer_seconds(folder, rows, config, layers, s) - plain for s in (few, many)]
    options = config.refine_options(config.refine)
    found = {
        "solver_per_layer": plain / layers,
        "refine_per_layer": both(taught[0], taught[1], few, many, options) / layers,
    }
    few, many = 1, 2
    taught = [end_to_end_seconds(folder, rows, config, s) for s in (few, many)]
    options = config.refine_options(config.refine_norms)
    return found | {"refine_norms": both(taught[0], taught[1], few, many, options)}


def autoround(
    folder: Path, rows: Tensor, config: QuantizeConfig, layers: int, settings: dict, python: str
) -> dict[str, Any]:
    """CPU seconds of one iteration on one layer, and what the last run made, as `found`."""
    seconds = []
    for count in (MEASURED[0], *MEASURED):  # the first run compiles, the others find it in a cache
        spent, found = peers.quantize(
            "autoround", folder, rows, config.groupsize, settings={"iters": count, **settings},
            layers=layers, python=python,
        )  # fmt: skip
        seconds.append(spent["cpu_seconds"])
        print(f"{settings} {count} iterations: {seconds[-1]:.1f} CPU s", flush=True)
    del seconds[0]
    step = (seconds[1] - seconds[0]) / (MEASURED[1] - MEASURED[0]) / layers
    return {
        "version": spent["version"],
        "settings": settings,
        "cpu_seconds": dict(zip(map(str, MEASURED), seconds, strict=True)),
        "iteration_per_layer": step,
        "found": found,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", help="folder, hub name or GGUF file")
    parser.add_argument("--c4", type=Path, required=True, help="web text, one document per line")
    parser.add_argument(
        "--config", default=str(ROOT / "configs/quantize/best.yaml"), help="our recipe"
    )
    parser.add_argument("--rows", type=positive, default=32, help="calibration rows")
    parser.add_argument("--row_length", type=positive, default=1024, help="tokens of a row")
    parser.add_argument("--groupsize", type=int, default=64, help="inputs that share a scale")
    parser.add_argument(
        "--layers", type=positive, default=2, help="how many of the first ones to time"
    )
    parser.add_argument(
        "--peer_python",
        default=sys.executable,
        help="interpreter with AutoRound (default: this one)",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "results", help="folder of the JSON file"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(peers.version("autoround", args.peer_python), flush=True)
    config = resolve({**load_recipe(args.config), "groupsize": args.groupsize}, {})
    folder = resolve_source(args.model)
    args.text, args.windows, args.window, args.wiki = [], 1, 1, args.c4  # nothing is evaluated
    rows = calibration(texts(args, load_tokenizer(folder), args.row_length)[0], args.rows, 0)
    count = StreamedModel(folder, torch.float32, CPU).num_layers

    def of_peer(settings: dict) -> dict[str, Any]:
        return autoround(folder, rows, config, args.layers, settings, args.peer_python)

    with ThreadPoolExecutor(1) as pool:  # it only waits for other processes
        others = {name: pool.submit(of_peer, settings) for name, settings in SETTINGS.items()}
        own = ours(folder, rows, config, args.layers)
        print({key: round(value, 2) for key, value in own.items()}, flush=True)
        found = {name: other.result() for name, other in others.items()}
    fast = count * own["solver_per_layer"]
    best = fast + count * own["refine_per_layer"] + own["refine_norms"]
    result = {
        "command": command("scripts/bench_peers.py", without=("--out",)),
        **commit_and_environment(CPU),
        "model": Path(args.model).name,
        "calibration": f"{args.rows} rows of {args.row_length} tokens",
        "groupsize": args.groupsize,
        "layers": args.layers,
        "layers_of_model": count,
        "cpu_seconds": {"fast": fast, "best": best},
        "cpu_seconds_of_parts": own,
        "peers": {},
    }
    for name, peer in found.items():
        for path, (weight, scales) in peer.pop("found").items():  # is it the format?
            peers.read_back(path, weight, scales, config.groupsize)
        whole = count * ITERATIONS * peer["iteration_per_layer"]
        result["peers"][name] = {**peer, "cpu_seconds_of_200_iterations": whole}
        result["peers"][name]["ratio_of_best"] = best / whole
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    (args.out / "bench_peers.json").write_text(text, encoding="utf-8")
    shown = {name: round(p["cpu_seconds_of_200_iterations"]) for name, p in result["peers"].items()}
    print({"fast": round(fast), "best": round(best), **shown})


if __name__ == "__main__":
    main()
