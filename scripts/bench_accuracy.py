"""Accuracy of quantization recipes on one model: KL divergence, top-1 agreement, perplexity.

The protocol, so that numbers compare: calibration text is one document per line, shuffled with seed
0, tokenised without special tokens, joined by the tokens of a blank line and cut into rows; seed 0
calibrates with the first rows, any other seed with as many drawn from the first 64. "C4" evaluates
the documents behind those 64 rows, joined alike, in 8 windows of 2048; "wiki" the first 16 windows
of 2048 of the second file. Other domains: "code", sources of this Python's standard library,
"technical", its reference manual, and files of --text (of a folder: MMLU's questions), 8 windows
each. No BOS. Everything in float32.

    python scripts/bench_accuracy.py MODEL --c4 c4_sample.txt --wiki wikitext2_test.txt

Variants and their seeds come from configs/bench/accuracy.yaml. Writes docs/results/accuracy.json
after every run, and then the tables of docs/accuracy.md; without MODEL only those.

    python scripts/bench_accuracy.py MODEL --c4 c4_sample.txt --wiki wikitext2_test.txt \\
        --only "fast;best" --peers autoround llm-compressor --stem accuracy_peers

Other quantizers beside them: the same rows calibrate, and their codes and scales take the place of
ours in the same model (scripts/peers.py).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval.perplexity import WindowScores, score_windows, summarize  # noqa: E402
from eval.tasks import mmlu_questions  # noqa: E402
from gptq.calibration import joined_rows  # noqa: E402
from gptq.config import QuantizeConfig, load_recipe, resolve  # noqa: E402
from gptq.models import StreamedModel, resolve_source  # noqa: E402
from gptq.refine import refine_model  # noqa: E402
from gptq.run import choose_device  # noqa: E402
from gptq.sequential import STEP_TOKENS, Walker  # noqa: E402
from gptq.solver import Solution  # noqa: E402
from gptq.texts import documents  # noqa: E402
from marlin_kernel import formats  # noqa: E402
from marlin_kernel.formats import QuantizedLinear  # noqa: E402
from marlin_kernel.hf import load_model, load_tokenizer  # noqa: E402
from marlin_kernel.layer import Layer  # noqa: E402
from scripts import peers  # noqa: E402
from scripts.command_line import (  # noqa: E402
    command,
    commit_and_environment,
    make_parser,
    positive,
)

HELDOUT_ROWS = 64  # calibration rows whose documents are never evaluated
WINDOW = 2048
WINDOWS = {"wiki": 16}
OTHER_WINDOWS = 8  # of every other text
SERVED = ("fast", "best")  # variants that are also measured through the packed layers


@dataclass(frozen=True)
class Task:
    """One run: a variant of the settings with one calibration seed."""

    name: str
    config: QuantizeConfig
    rows: int
    seed: int

    @property
    def settings(self) -> dict:
        return self.config.fingerprint()


@dataclass(frozen=True)
class PeerTask:
    """One run of another quantizer (scripts/peers.py): `options` are its own settings."""

    name: str
    peer: str
    options: dict
    groupsize: int
    rows: int
    seed: int

    @property
    def settings(self) -> dict:
        return {"peer": self.peer, **self.options, "groupsize": self.groupsize}


def texts(args: argparse.Namespace, tokenizer, row_length: int):
    """(calibration rows [64, row_length], windows [W, 2048] by name of the text)."""
    lines = [line for line in args.c4.read_text(encoding="utf-8").split("\n") if line]
    random.Random(0).shuffle(lines)
    separator = len(tokenizer("\n\n", add_special_tokens=False).input_ids)
    used, count = 0, 0
    while used < HELDOUT_ROWS * row_length:
        used += len(tokenizer(lines[count], add_special_tokens=False).input_ids) + separator
        count += 1
    rows = joined_rows(lines[:count], tokenizer, length=row_length)
    sources = {"wiki": [_whole(args.wiki)], "C4": lines[count:], "code": _library()}
    sources["technical"] = documents("pydoc", "heldout").texts
    for name, path in args.text:
        sources[name] = [_questions(Path(path)) if Path(path).is_dir() else _whole(Path(path))]
    windows = {}
    for name, source in sources.items():
        limit = args.windows or WINDOWS.get(name, OTHER_WINDOWS)
        windows[name] = joined_rows(
            _enough(source, limit * WINDOW * 12), tokenizer, length=args.window
        )[:limit]
    return rows[:HELDOUT_ROWS], windows


def _whole(path: Path) -> str:
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def _questions(folder: Path) -> str:
    """1,500 of MMLU's test questions with their choices and answers, from its CSV files."""
    rows = [row for path in sorted(folder.glob("*_test.csv")) for row in mmlu_questions(path)]
    if not rows:
        raise SystemExit(f"--text: {folder} holds no *_test.csv (question, choice0..3, answer)")
    random.Random(0).shuffle(rows)
    texts = []
    for row in rows[:1500]:
        choices = [f"{c}. {text}" for c, text in zip("ABCD", row["choices"], strict=True)]
        answer = "Answer: " + "ABCD"[row["answer"]]
        texts.append("\n".join([row["question"], *choices, answer]))
    return "\n\n".join(texts)


def _library() -> Iterator[str]:
    """Sources of the standard library's top level, by name."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def _enough(source, characters: int) -> Iterator[str]:
    """Leading texts of so many characters: the rest would be tokenised and dropped."""
    for text in source:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)


def calibration(rows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """The rows that calibrate: the first for seed 0, drawn for any other."""
    if seed == 0:
        return rows[:count]
    return rows[random.Random(seed).sample(range(len(rows)), count)]


def figures(scores: WindowScores, name: str) -> dict[str, float]:
    found = summarize(scores, name, "", WINDOW)
    return {
        key: round(getattr(found, key), 6)
        for key in ("perplexity", "kl", "kl_se", "top1", "tokens")
        if getattr(found, key) is not None
    }


@torch.no_grad()
def quantize(
    model, folder: Path, config: QuantizeConfig, rows: torch.Tensor, count: int | None = None
) -> tuple[dict[str, float], dict[str, Solution]]:
    """Put the quantized weights of a run into `model`, or those of its first `count` layers.

    Returns seconds by kind of work, and the solutions by name of the linear.
    """
    device = model.device
    cuda = device.type == "cuda"
    began, cpu = time.perf_counter(), time.process_time()
    streamed = StreamedModel(folder, torch.float32, device)
    walker = Walker(
        streamed,
        list(rows),
        config.solver_options(),
        true_sequential=config.true_sequential,
        step_tokens=STEP_TOKENS if cuda else 1,
        refine=config.refine_options(config.refine),
    )
    layers: dict[str, Solution] = {}
    for index in range(count or streamed.num_layers):
        for result in walker.quantize_layer(index, lambda path: None):
            layers[result.name] = result.solution
    errors = [solution.statistics.relative_error for solution in layers.values()]
    if config.refine_norms:

        def of_layer(index: int) -> dict[str, Solution]:
            prefix = f"{streamed.layer_name(index)}."
            return {n.removeprefix(prefix): s for n, s in layers.items() if n.startswith(prefix)}

        scales, norms, _ = refine_model(
            streamed,
            of_layer,
            [walker.batches[batch].ids[row, :length] for batch, row, length in walker.places],
            lambda i: walker.sample(walker.target, i),
            config.refine_options(config.refine_norms),
        )
        layers = {name: replace(s, scales=scales[name]) for name, s in layers.items()}
        for name, norm in norms.items():
            model.get_parameter(name).copy_(norm)
    for name, solution in layers.items():
        model.get_submodule(name).weight.copy_(solution.weight().T)
    if cuda:
        torch.cuda.synchronize(device)
    clock = walker.clock
    spent = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "seconds_forward": clock.forward,
        "seconds_hessian": clock.hessian,
        "seconds_solve": clock.solve,
        "seconds_refine": clock.refine,
        "relative_error": sum(errors) / len(errors),
    }
    return {key: round(value, 5) for key, value in spent.items()}, layers


def pack(model, solutions: dict[str, Solution], config: QuantizeConfig) -> dict[str, nn.Module]:
    """Swap quantized linears for packed layers (through the on-disk tensors and back).

    Returns the linears that were there.
    """
    before = {}
    for name, solution in solutions.items():
        before[name] = model.get_submodule(name)
        layer = QuantizedLinear.of(
            solution.codes, solution.scales, config.wtype, config.groupsize,
            zeros=solution.zeros, g_idx=solution.g_idx, bias=before[name].bias,
        )  # fmt: skip
        stored = formats.read(formats.write(layer, "marlin"), "marlin", layer.spec)
        packed = Layer.from_quantized(stored).to(model.device).prepare(torch.float32)
        model.set_submodule(name, packed)
    return before


class Bench:
    """A model, its original, and texts: everything that the runs of one process share."""

    def __init__(self, args: argparse.Namespace, row_length: int) -> None:
        device = choose_device(QuantizeConfig(device=args.device))
        self.folder = resolve_source(args.model)
        self.rows, self.windows = texts(args, load_tokenizer(self.folder), row_length)
        self.reference = load_model(self.folder, device=device, dtype=torch.float32)
        self.model = load_model(self.folder, device=device, dtype=torch.float32)
        self.layers, self.python = args.layers, args.peer_python
        self.original = {name: p.clone() for name, p in self.model.named_parameters()}

    def score(self, compared: bool = True) -> dict[str, dict[str, float]]:
        other = self.reference if compared else None
        return {
            name: figures(score_windows(self.model, list(windows), other), name)
            for name, windows in self.windows.items()
        }

    def run(self, task: Task | PeerTask) -> list[tuple[str, int, dict]]:
        """(name, seed, figures) of a task, and of the same codes in packed layers."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.original[name])
        rows = calibration(self.rows, task.rows, task.seed)
        if isinstance(task, PeerTask):
            spent = self.run_peer(task, rows)
            return [(task.name, task.seed, {**self.score(), **spent})]
        spent, solutions = quantize(self.model, self.folder, task.config, rows, self.layers)
        found = [(task.name, task.seed, {**self.score(), **spent})]
        if task.name in SERVED and task.seed == 0:
            linears = pack(self.model, solutions, task.config)
            found.append((f"{task.name}, served packed", 0, self.score()))
            for path, linear in linears.items():
                self.model.set_submodule(path, linear)
        return found

    @torch.no_grad()
    def run_peer(self, task: PeerTask, rows: torch.Tensor) -> dict[str, float]:
        """Put the weights that a peer finds into the model. Returns seconds."""
        spent, found = peers.quantize(
            task.peer, self.folder, rows, task.groupsize, settings=task.options, seed=task.seed,
            layers=self.layers, device=str(self.model.device), threads=torch.get_num_threads(),
            python=self.python,
        )  # fmt: skip
        for name, (weight, scales) in found.items():
            layer = peers.read_back(name, weight, scales, task.groupsize)
            self.model.get_submodule(name).weight.copy_(layer.dequantize().T)
        return spent


_bench: list[Bench] = []  # of this worker process


def _start(args: argparse.Namespace, row_length: int) -> None:
    torch.set_num_threads(max(torch.get_num_threads() // args.jobs, 1))
    _bench.append(Bench(args, row_length))


def _work(task: Task | PeerTask) -> list[tuple[str, int, dict]]:
    return _bench[0].run(task)


def tasks(args: argparse.Namespace, recipe: dict) -> list[Task]:
    """All runs, the first seed of every variant before the others."""
    chosen = recipe["variants"]
    if args.only:
        names = [name.strip() for name in args.only.split(";")]
        unknown = [name for name in names if name not in chosen]
        if unknown:
            raise SystemExit(f"--only {unknown[0]!r} is none of: {'; '.join(chosen)}")
        chosen = {name: chosen[name] for name in names}
    found = []
    for name, changes in chosen.items():
        changes = dict(changes)
        base = load_recipe(changes.pop("recipe"))
        count, seeds = changes.pop("rows", recipe["rows"]), changes.pop("seeds", 1)
        config = resolve({**base, "groupsize": recipe["groupsize"]}, changes)
        found += [Task(name, replace(config, seed=seed), count, seed) for seed in range(seeds)]
    return sorted(found, key=lambda task: task.seed)


def peer_tasks(args: argparse.Namespace, recipe: dict) -> list[PeerTask]:
    """All runs of the peers in args.peers, the first seed of each before the others."""
    found = []
    for name, options in recipe.get("peers", {}).items():
        options = dict(options)
        peer, seeds = options.pop("peer"), options.pop("seeds", 1)
        own = options, recipe["groupsize"], recipe["rows"]
        if peer in args.peers:
            found += [PeerTask(name, peer, *own, seed) for seed in range(seeds)]
    return sorted(found, key=lambda task: task.seed)


def summarized(name: str, runs: dict[int, dict]) -> dict:
    """Means over the seeds of one variant; kl_seed_se: standard error over seeds."""
    first = runs[min(runs)]
    result: dict = {"name": name, "seeds": sorted(runs)}
    for key, value in first.items():
        if isinstance(value, str):
            result[key] = value
            continue
        if not isinstance(value, dict):
            result[key] = round(statistics.fmean(run[key] for run in runs.values()), 4)
            continue
        parts = [run[key] for run in runs.values()]
        result[key] = {k: round(statistics.fmean(p[k] for p in parts), 6) for k in value}
        if len(parts) > 1:
            spread = statistics.stdev(p["kl"] for p in parts) / math.sqrt(len(parts))
            result[key]["kl_seed_se"] = round(spread, 6)
    return result


def table(results: Sequence[dict]) -> str:
    names = [key for key, v in results[0].items() if isinstance(v, dict) and "perplexity" in v]
    timed = any("version" in r for r in results)  # of a peer
    heads = ["recipe", "wiki PPL", "top-1", "C4 PPL", *(f"{n} KL" for n in names)]
    heads += ["seconds", "CPU seconds"] if timed else []
    lines = ["| " + " | ".join([*heads, "seeds"]) + " |", "|---" * (len(heads) + 1) + "|"]
    for r in results:
        wiki = r["wiki"]
        top1 = f"{wiki['top1']:.3f}" if "top1" in wiki else ""
        cells = [r["name"], f"{wiki['perplexity']:.3f}", top1, f"{r['C4']['perplexity']:.3f}"]
        for n in names:
            found = r.get(n, {})
            kl = f"{found['kl']:.4f}" if "kl" in found else ""
            cells.append(kl + (f" ± {found['kl_seed_se']:.4f}" if "kl_seed_se" in found else ""))
        if timed:
            cells += [f"{r[key]:.0f}" if key in r else "" for key in ("seconds", "cpu_seconds")]
            cells[0] += f" ({r['version']})" if "version" in r else ""
        lines.append("| " + " | ".join([*cells, str(len(r.get("seeds", [0])))]) + " |")
    return "\n".join(lines)


def write(args: argparse.Namespace, recipe: dict, results: list[dict]) -> None:
    """The JSON file with all results so far."""
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": command("scripts/bench_accuracy.py", without=("--out",)),
        **commit_and_environment(choose_device(QuantizeConfig(device=args.device))),
        "model": args.name or Path(args.model).name,
        "groupsize": recipe["groupsize"],
        "calibration": f"{recipe['rows']} rows of {recipe['row_length']} tokens",
        "layers": args.layers,
        "results": results,
    }
    text = json.dumps(facts, indent=1) + "\n"
    (args.out / f"{args.stem}.json").write_text(text, encoding="utf-8")


def read_results(args: argparse.Namespace, recipe: dict) -> dict[str, dict]:
    """Rows of an earlier run of the same protocol, by name."""
    path = args.out / f"{args.stem}.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    model = args.name or Path(args.model).name
    rows = f"{recipe['rows']} rows of {recipe['row_length']} tokens"
    if (facts["model"], facts["calibration"]) != (model, rows):
        raise SystemExit(
            f"--add: {path} is of {facts['model']} with {facts['calibration']}, not of {model} "
            f"with {rows}; choose another --stem"
        )
    return {row["name"]: row for row in facts["results"]}


def section(path: Path) -> str:
    """The table of one JSON file, and how it was measured."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    if "peers" in facts:
        return seconds_table(facts)
    where, results = facts["environment"], facts["results"]
    layers = f"; only the first {facts['layers']} layers quantized" if facts.get("layers") else ""
    counts = ", ".join(
        f"{name} {found['tokens']:,.0f}"
        for name, found in results[0].items()
        if isinstance(found, dict) and "tokens" in found
    )
    return (
        f"{table(results)}\n\n{facts['model']}, group size {facts.get('groupsize', 64)} unless "
        f"said, {facts['calibration']}{layers}; {where.get('gpu', 'CPU')}, torch {where['torch']}, "
        f"transformers {where['transformers']}, commit {facts['commit']}"
        + (f"; predictions: {counts}" if counts else "")
        + f": `{facts['command']}`."
    )


def seconds_table(facts: dict) -> str:
    """What scripts/bench_peers.py measured, in process CPU seconds of the whole model."""
    parts, ours = facts["cpu_seconds_of_parts"], facts["cpu_seconds"]
    count, where = facts["layers_of_model"], facts["environment"]
    solver, refine, norms = (
        parts[k] for k in ("solver_per_layer", "refine_per_layer", "refine_norms")
    )
    lines = [
        "| | CPU seconds | of it |",
        "|---|---|---|",
        f"| fast | {ours['fast']:,.0f} | {count} layers x {solver:.1f} |",
        f"| best | {ours['best']:,.0f} | {count} layers x ({solver:.1f} + {refine:.1f} for "
        f"`--refine`) + {norms:,.0f} for `--refine-norms` |",
    ]
    for name, peer in facts["peers"].items():
        lines.append(
            f"| {name}, 200 iterations ({peer['version']}) "
            f"| > {peer['cpu_seconds_of_200_iterations']:,.0f} | {count} layers x 200 x "
            f"{peer['iteration_per_layer']:.2f} |"
        )
    return "\n".join(lines) + (
        f"\n\n{facts['model']}, group size {facts['groupsize']}, {facts['calibration']}; one "
        f"thread each, torch {where['torch']}, transformers {where['transformers']}, commit "
        f"{facts['commit']}; layers timed: {facts['layers']}: `{facts['command']}`."
    )


def write_tables() -> None:
    """Every ``<!-- table: NAME -->`` of docs/accuracy.md from docs/results/NAME.json."""
    document = ROOT / "docs" / "accuracy.md"
    text = document.read_text(encoding="utf-8")

    def fill(match: re.Match) -> str:
        return f"{match[1]}{section(ROOT / 'docs' / 'results' / match[2])}\n{match[3]}"

    pattern = r"(<!-- table: ([\w.-]+\.json) -->\n).*?(<!-- end -->)"
    document.write_text(re.sub(pattern, fill, text, flags=re.S), encoding="utf-8")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", nargs="?", help="folder, hub name or GGUF file")
    parser.add_argument("--c4", type=Path, help="web text, one document per line")
    parser.add_argument("--wiki", type=Path, help="WikiText-2 test as one string")
    parser.add_argument(
        "--text", action="append", default=[], type=_domain,
        metavar="NAME=FILE", help="one more domain to evaluate (may be repeated)",
    )  # fmt: skip
    parser.add_argument(
        "--variants", type=Path, default=ROOT / "configs/bench/accuracy.yaml",
        help="YAML: names of variants, with recipe and settings of each",
    )  # fmt: skip
    parser.add_argument("--only", help="names of variants, separated by ; (default: all)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time on the device")
    parser.add_argument(
        "--limit", type=float, default=math.inf, metavar="S", help="start no run after S seconds"
    )
    parser.add_argument(
        "--windows", type=positive, help="evaluate at most so many windows of each text"
    )
    parser.add_argument("--window", type=positive, default=WINDOW, help="tokens of a window")
    parser.add_argument(
        "--layers", type=positive, help="quantize only the first so many layers (default: all)"
    )
    parser.add_argument("--name", help="of the model, in the tables (default: that of its file)")
    parser.add_argument("--stem", default="accuracy", help="name of the JSON file")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="its folder")
    parser.add_argument("--add", action="store_true", help="keep the file's rows of other variants")
    parser.add_argument(
        "--peers", nargs="+", default=[], metavar="NAME",
        help=f"other quantizers, of those installed: {', '.join(peers.PEERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--peer_python",
        default=sys.executable,
        help="interpreter that has them (default: this one)",
    )
    args = parser.parse_args()
    if args.model is None:
        write_tables()
        return
    if args.c4 is None or args.wiki is None:
        parser.error("a MODEL needs --c4 and --wiki")
    for file in (args.c4, args.wiki, args.variants, *(Path(path) for _, path in args.text)):
        if not file.exists():
            parser.error(f"{file} does not exist")

    began = time.perf_counter()
    recipe = yaml.safe_load(args.variants.read_text(encoding="utf-8"))
    for name in args.peers:
        print(peers.version(name, args.peer_python), flush=True)
    todo = tasks(args, recipe) + peer_tasks(args, recipe)
    resolve_source(args.model)  # convert once, before several processes want it
    order = list(dict.fromkeys(task.name for task in todo))
    order = [n for name in order for n in (name, f"{name}, served packed")]
    runs: dict[str, dict[int, dict]] = {}
    settings = {task.name: task.settings for task in todo}
    full: list[dict] = []
    kept = read_results(args, recipe) if args.add else {}

    def results() -> list[dict]:
        """What was kept stays in its place, what is new follows."""
        done = [*full, *(summarized(name, runs[name]) for name in order if name in runs)]
        rows = {r["name"]: r | {"settings": settings.get(r["name"], {})} for r in done}
        return list((kept | rows).values())

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, _start, (args, recipe["row_length"])) as pool:
        for _ in range(args.jobs):  # all of them load the model at once
            pool.submit(_loaded)
        full.append({"name": "full precision", **pool.submit(_full).result()})
        waiting = {}
        todo.reverse()
        while todo or waiting:
            while todo and len(waiting) < args.jobs and time.perf_counter() - began < args.limit:
                task = todo.pop()
                waiting[pool.submit(_work, task)] = task
            if not waiting:
                print(f"{len(todo)} runs were not started within --limit {args.limit:.0f}")
                break
            future = next(as_completed(waiting))
            del waiting[future]
            for name, seed, found in future.result():
                runs.setdefault(name, {})[seed] = found
                kl = ", ".join(
                    f"{k} {v['kl']:.4f}" for k, v in found.items() if isinstance(v, dict)
                )
                print(
                    f"{time.perf_counter() - began:.0f} s  {name}, seed {seed}: {kl}; "
                    f"{found.get('seconds', 0):.0f} s",
                    flush=True,
                )
            write(args, recipe, results())
    if args.out.resolve() == ROOT / "docs" / "results":
        write_tables()
    print(f"\n{args.out / args.stem}.json")


def _domain(text: str) -> tuple[str, str]:
    """(name, file) of NAME=FILE, as a type of argparse."""
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, file


def _loaded() -> bool:
    return bool(_bench)


def _full() -> dict:
    return _bench[0].score(compared=False)


if __name__ == "__main__":
    main()
