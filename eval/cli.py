"""Command line of the evaluation: lm-eval's options, and ours for packed models and text."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from eval.config import OWN_KEYS, EvalConfig, choose_seqlen, resolve
from gptq.recipes import read_recipe
from gptq.texts import documents
from marlin_kernel.errors import ConfigError, MarlinError

log = logging.getLogger(__name__)

HF_NAMES = (None, "hf", "hf-auto", "huggingface")
# What perplexity takes of --model_args; lm-eval's model classes take more
PERPLEXITY_ARGS = ("pretrained", "tokenizer", "dtype", "gguf_file")
_EXAMPLES = """
examples:
  # full precision, then the packed checkpoint (same options), on MMLU
  python eval/eval.py --model hf --model_args pretrained=CKPT --tasks mmlu --num_fewshot 5
  python eval/eval.py --model hf --model_args pretrained=CKPT --tasks mmlu --num_fewshot 5 \\
      --marlin_checkpoint OUT
  # perplexity of both on the same text, KL divergence, and a report; no lm-eval needed
  python eval/eval.py --model_args pretrained=CKPT --marlin_checkpoint OUT \\
      --perplexity wikitext2,red --report DIR
  # everything from local copies
  python eval/eval.py --model marlin --model_args pretrained=OUT --tasks mmlu --data_dir DATA
"""


def has_lm_eval() -> bool:
    """Whether lm-eval is installed; only tasks need it."""
    return importlib.util.find_spec("lm_eval") is not None


def parser() -> argparse.ArgumentParser:
    """lm-eval's parser with our options added; without lm-eval only what perplexity needs."""
    if has_lm_eval():
        from eval.harness import run_parser

        top = run_parser()
        top.usage = None
    else:
        top = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
        top.add_argument(
            "--config", help="YAML recipe, or the name of one in configs/eval; flags override it"
        )
        top.add_argument("--model", help="hf or marlin")
        top.add_argument("--model_args", action=_KeyValues, nargs="+", help="pretrained=CKPT,...")
        top.add_argument("--tasks", nargs="+", help="needs the extra [eval]")
        top.add_argument("--device", help="cpu, cuda, cuda:1 ...")
    top.prog = "eval.py"
    top.description = "Evaluate a packed or plain checkpoint: perplexity, tasks, report."
    top.epilog = _EXAMPLES
    group = top.add_argument_group("packed checkpoints, text and report")
    add = group.add_argument
    add("--marlin_checkpoint", metavar="OUT", help="evaluate this packed checkpoint")
    add("--data_dir", metavar="DIR", help="local copies of task data and texts: no hub is asked")
    add(
        "--perplexity",
        nargs="+",
        metavar="TEXT",
        help="wikitext2, red, c4, pydoc, or a text file; comma or space separated",
    )
    add(
        "--seqlen",
        type=int,
        metavar="N",
        help="tokens per window (default: the model's context, at most 4096)",
    )
    add(
        "--max_tokens", type=int, metavar="N", help="at most so many tokens per text (default: all)"
    )
    add(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="with --marlin_checkpoint, also run the original for KL divergence (default: on)",
    )
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="check hashes and probe logits of the packed checkpoint",
    )
    add("--report", metavar="DIR", help="write report.html, report.md and report.json")
    add("--baseline", metavar="JSON", help="report.json of an earlier run to show beside this one")
    return top


def parse(argv: Sequence[str]) -> tuple[EvalConfig, argparse.Namespace]:
    """Flags over recipe over defaults: (our settings, arguments for lm-eval).

    Raises ConfigError naming the option, its value and the rule.
    """
    top = parser()
    args = top.parse_args(list(argv))
    known = {a.dest: a for a in top._actions if a.dest not in ("help", "config")}
    recipe = read_recipe(args.config, "eval", known) if args.config else {}
    own = {key: getattr(args, key) for key in OWN_KEYS}
    config = resolve(
        {
            **recipe_part(recipe, own=True),
            **{key: value for key, value in own.items() if value is not None},
        }
    )
    rest = {k: v for k, v in vars(args).items() if k not in (*OWN_KEYS, "config")}
    for key, value in recipe_part(recipe, own=False).items():
        if rest.get(key) is None:
            rest[key] = value
    if isinstance(rest.get("tasks"), str):
        rest["tasks"] = rest["tasks"].split(",")
    rest["tasks"] = [name for task in rest.get("tasks") or [] for name in task.split(",") if name]
    if isinstance(rest.get("model_args"), str):
        rest["model_args"] = _key_values(rest["model_args"].split(","))
    rest["model_args"] = dict(rest.get("model_args") or {})
    return config, argparse.Namespace(**rest)


def recipe_part(recipe: dict[str, Any], *, own: bool) -> dict[str, Any]:
    """The keys of a recipe that are ours, or those that are lm-eval's."""
    return {key: value for key, value in recipe.items() if (key in OWN_KEYS) == own}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 with one line about what was wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] and argv[0] in ("ls", "validate") and has_lm_eval():
        return _forward(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config, args = parse(argv[1:] if argv[:1] == ["run"] else argv)
        run(config, args)
    except MarlinError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run(config: EvalConfig, args: argparse.Namespace) -> None:
    """Validate everything, then perplexity, then tasks, then the report."""
    from eval import loading

    if not args.tasks and not config.perplexity:
        raise ConfigError("nothing to do: give --tasks mmlu,... and/or --perplexity wikitext2,...")
    original = args.model_args.get("pretrained")
    evaluated = config.marlin_checkpoint or original
    quantization = loading.quantization_report(evaluated)
    _check_model(config, args, quantization)
    if args.model in HF_NAMES and original is not None and "gguf_file" in args.model_args:
        original = str(Path(original) / args.model_args["gguf_file"])
        evaluated = config.marlin_checkpoint or original
    args.device = loading.choose_device(args.device)
    dtype = loading.parse_dtype(args.model_args.get("dtype"))
    if args.tasks:
        _check_tasks(config, args)

    texts = config.perplexity
    for source in texts:  # before any model is loaded
        documents(source, "heldout", data_dir=config.data_dir)

    from eval.compare import BASELINE, compare, row_of
    from eval.environment import command_line, environment
    from eval.report import Report, join_rows, read_rows, render_tables, write_report

    earlier = read_rows(config.baseline) if config.baseline else []
    label = args.model if evaluated is None else loading.row_name(evaluated, quantization)
    label = label or BASELINE
    checkpoints = {label: evaluated}
    if label != BASELINE and config.marlin_checkpoint and original and config.compare:
        checkpoints = {BASELINE: original, **checkpoints}
    if texts:
        rows = compare(
            checkpoints,
            texts,
            seqlen=choose_seqlen(config, loading.context_length(next(iter(checkpoints.values())))),
            device=args.device,
            dtype=dtype,
            data_dir=config.data_dir,
            max_tokens=config.max_tokens,
            quantization={label: quantization} if quantization else None,
            verify=config.verify,
            tokenizer=args.model_args.get("tokenizer"),
        )
    else:
        rows = [row_of(label, evaluated, quantization)]
    notes = []
    if args.tasks:
        if texts:  # tasks may take hours, or fail
            print(render_tables(Report(model="", rows=rows)), flush=True)
        if args.limit is not None:
            part = f"{args.limit:g}" if args.limit >= 1 else f"{100 * args.limit:g} % of the"
            notes.append(f"Tasks were cut to the first {part} questions each: a test run.")
        rows[-1] = replace(rows[-1], tasks=_run_tasks(config, args))
    if earlier:
        names = ", ".join(row.name for row in earlier)
        notes.append(f"From an earlier run ({config.baseline}): {names}.")
    rows = join_rows(earlier, rows)
    report = Report(
        model=Path(original or evaluated or args.model_args.get("model", args.model)).name,
        rows=rows,
        title="Evaluation report",
        quantization=quantization,
        settings=_settings(config, args),
        environment=environment(args.device),
        command=command_line(),
        notes=notes,
    )
    print(render_tables(report))
    if config.report:
        paths = write_report(config.report, report)
        resolved = yaml.safe_dump(_settings(config, args), sort_keys=False)
        (Path(config.report) / "eval_config.yaml").write_text(resolved, encoding="utf-8")
        print(f"\nreport: {paths['html']}")


def _check_model(
    config: EvalConfig, args: argparse.Namespace, quantization: dict[str, Any] | None
) -> None:
    """Fail where no model is given, or another kind than the options mean.

    quantization: the quantization report of what is evaluated, if it has one.
    """
    from eval.loading import is_packed

    packed = config.marlin_checkpoint
    foreign = args.model not in (*HF_NAMES, "marlin") and not config.perplexity  # a remote one, say
    if packed is None and "pretrained" not in args.model_args and not foreign:
        raise ConfigError(
            "no model: give --model_args pretrained=CKPT and/or --marlin_checkpoint OUT"
        )
    if packed is not None and quantization is None and not is_packed(packed):
        raise ConfigError(
            f"marlin_checkpoint={packed!r} holds no packed layers; a checkpoint in full precision "
            "is given by --model_args pretrained=CKPT alone"
        )
    if not config.perplexity:
        return
    # Perplexity must not ignore in silence what lm-eval's model classes would understand.
    ignored = ", ".join(sorted(set(args.model_args) - set(PERPLEXITY_ARGS)))
    if ignored and args.tasks:
        log.warning("model_args: %s concern the tasks alone, not perplexity", ignored)
    elif ignored:
        raise ConfigError(
            f"model_args: perplexity does not know {ignored}; it takes {', '.join(PERPLEXITY_ARGS)}"
        )


def _check_tasks(config: EvalConfig, args: argparse.Namespace) -> None:
    """Fail on missing packages or local data before any model is loaded."""
    if not has_lm_eval():
        raise ConfigError(
            f"tasks={','.join(args.tasks)} need lm-eval: pip install 'marlin-gptq[eval]'; "
            "--perplexity works without it"
        )
    from eval.harness import TASK_ROOT, check_arguments
    from eval.tasks import write_overlays

    if config.report and not args.output_path:
        args = argparse.Namespace(**{**vars(args), "output_path": config.report})
    check_arguments(args, look_up_tasks=bool(config.perplexity))
    if config.data_dir is None:
        return
    with tempfile.TemporaryDirectory(prefix="marlin-eval-") as scratch:
        write_overlays(config.data_dir, Path(scratch), TASK_ROOT)


def _run_tasks(config: EvalConfig, args: argparse.Namespace) -> tuple:
    from eval.harness import run_tasks, use_packed
    from eval.loading import is_packed

    pretrained = args.model_args.get("pretrained", "")
    if config.marlin_checkpoint:
        args = use_packed(args, config.marlin_checkpoint, verify=config.verify)
    elif args.model in HF_NAMES and (pretrained.endswith(".gguf") or is_packed(pretrained)):
        # lm-eval's own class would leave packed layers random, or not find the file.
        args.model = "marlin"
    with tempfile.TemporaryDirectory(prefix="marlin-eval-") as scratch:
        # The report needs lm-eval's results file, wherever lm-eval was asked to put it.
        folder = Path(config.report) / "lm_eval" if config.report else Path(scratch)
        return run_tasks(args, data_dir=config.data_dir, results_dir=folder).results


def _settings(config: EvalConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was set, in one flat mapping of plain values."""
    ours = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    theirs = {k: v for k, v in vars(args).items() if k not in ("func", "command")}
    return {k: v for k, v in {**ours, **theirs}.items() if v not in (None, [], {}, ())}


def _forward(argv: list[str]) -> int:
    """`ls` and `validate` are lm-eval's own subcommands."""
    from lm_eval._cli import HarnessCLI

    cli = HarnessCLI()
    cli.execute(cli._parser.parse_args(argv))
    return 0


def _key_values(items: Sequence[str]) -> dict[str, str]:
    pairs = [pair for item in items for pair in str(item).split(",") if pair]
    broken = [pair for pair in pairs if "=" not in pair]
    if broken:
        raise ConfigError(f"model_args={broken[0]!r} is not of the form key=value")
    return dict(pair.split("=", 1) for pair in pairs)


class _KeyValues(argparse.Action):
    """key=value pairs, comma or space separated, for installations without lm-eval."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        merged = {**(getattr(namespace, self.dest) or {}), **_key_values(values)}
        setattr(namespace, self.dest, merged)
