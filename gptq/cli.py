"""Command line of the quantizer: flags over recipe over defaults, then `gptq.run`."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from marlin_kernel.errors import ConfigError, DataError, MarlinError
from marlin_kernel.formats import FORMATS
from marlin_kernel.weight_types import WEIGHT_TYPES

from .config import DTYPES, WBITS, QuantizeConfig, load_recipe, resolve
from .distributed import launched_by_torchrun, leave, speaks
from .lock import unfinished_folder
from .run import run
from .sparsity import SPARSITIES
from .texts import documents

# evaluate(config, packed folder or None, quantization report or None): prints what it finds
Evaluate = Callable[[QuantizeConfig, "Path | None", "dict[str, Any] | None"], None]

_DEFAULT = {field.name: field.default for field in fields(QuantizeConfig)}
_EPILOG = """
examples:
  python gptq/llama2.py meta-llama/Llama-2-7b-hf --wbits 4 --save llama2-7b-marlin
  python gptq/llama2.py ./model --wbits 4 --dataset ./texts --save out --report
  python gptq/llama2.py model.gguf --wbits 4 --groupsize 64 --dataset pydoc --save out --eval none
"""


def parser() -> argparse.ArgumentParser:
    """The argument parser; every default is None, so that recipes stand below flags."""
    top = argparse.ArgumentParser(
        prog="llama2.py",
        description="Compress a Llama-family checkpoint with GPTQ into 4 or 8 bits per weight. "
        "Options may be spelled with - or _.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "checkpoint",
        nargs="?",
        help="Hugging Face folder, hub name (owner/model), or GGUF file",
    )

    def flag(group, name: str, text: str, **extra: Any) -> None:
        default = _DEFAULT[name.lstrip("-").replace("-", "_")]
        shown = ",".join(default) if isinstance(default, tuple) else default
        note = "" if shown is None or isinstance(shown, bool) else f" (default: {shown})"
        group.add_argument(name, help=text + note, default=None, **extra)

    def switch(group, name: str, text: str) -> None:
        default = _DEFAULT[name.lstrip("-").replace("-", "_")]
        state = {True: "on", False: "off", None: "stop if there is one"}[default]
        group.add_argument(
            name,
            help=f"{text} (default: {state})",
            default=None,
            action=argparse.BooleanOptionalAction,
        )

    what = top.add_argument_group("what to make")
    flag(
        what,
        "--wbits",
        "bits per weight; 16 only evaluates, or prunes with --sparsity",
        type=int,
        choices=WBITS,
    )
    sizes = sorted({size for wtype in WEIGHT_TYPES.values() for size in wtype.group_sizes})
    flag(
        what,
        "--groupsize",
        "inputs per scale; -1: one per column; a weight type that lacks this size takes its own",
        type=int,
        choices=sizes,
    )
    switch(what, "--sym", "symmetric grid; --no-sym stores zero points")
    flag(
        what,
        "--weight_type",
        "type of the codes, instead of --wbits and --sym, which mean an integer type",
        choices=tuple(WEIGHT_TYPES),
    )
    flag(
        what,
        "--sparsity",
        "2:4: two weights of every four inputs become zero; with --nearest the smallest",
        choices=SPARSITIES,
    )
    flag(
        what,
        "--save",
        "folder for the packed checkpoint; without it that is evaluated and gone",
        metavar="OUT",
    )
    flag(what, "--format", "layout of the packed tensors", choices=FORMATS)
    switch(what, "--overwrite", "replace a checkpoint that is already at OUT")
    switch(what, "--skip_gq", "keep k and v projections of grouped-query models unquantized")

    data = top.add_argument_group("calibration text")
    flag(data, "--dataset", "red, wikitext2, c4, pydoc, or a .txt/.jsonl/.parquet file or folder")
    flag(data, "--data_dir", "folder with local copies of named data sets (docs/evaluation.md)")
    flag(data, "--seed", "of the choice of calibration samples", type=int)
    flag(data, "--nsamples", "calibration samples", type=int)
    flag(
        data, "--seqlen", "longest sample, tokens (default: model context, at most 4096)", type=int
    )

    how = top.add_argument_group("method")
    switch(
        how,
        "--nearest",
        "round to nearest without calibration; with --no-signed_scales the usual baseline",
    )
    flag(how, "--percdamp", "damping, relative to the mean Hessian diagonal", type=float)
    switch(how, "--true-sequential", "each stage of a layer sees the quantized stages before it")
    switch(how, "--act-order", "quantize inputs by falling activation energy")
    switch(how, "--static-groups", "keep groups on contiguous inputs whatever the order")
    switch(how, "--asymmetric", "aim at the outputs of the unquantized model")
    flag(how, "--target_damp", "damping of that aim's least-squares problem", type=float)
    flag(
        how, "--shrinkage", "share of the correlations between inputs that is left out", type=float
    )
    switch(how, "--signed_scales", "negative scales where the positive end is the larger")
    switch(how, "--no_clip", "no search for clipped group ranges")
    flag(how, "--clip_steps", "shrink factors tried", type=int)
    flag(how, "--clip_min", "smallest shrink factor", type=float)
    flag(how, "--refit", "rounds of closed-form scale refit after rounding", type=int)
    flag(how, "--sweeps", "coordinate-descent passes over the codes per refit", type=int)
    flag(how, "--refine", "steps that learn the scales of each layer together; 0: none", type=int)
    flag(
        how,
        "--refine-norms",
        "steps that learn all scales and norm weights end to end; 0: none",
        type=int,
    )
    flag(how, "--blocksize", "inputs per lazy update; no effect on the result", type=int)

    run_group = top.add_argument_group("run")
    run_group.add_argument(
        "--config",
        metavar="RECIPE",
        help="YAML recipe, or the name of one in configs/quantize, such as best; flags override it",
    )
    flag(run_group, "--device", "cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    flag(
        run_group,
        "--dtype",
        "of activations (default: float32 on a CPU, on a GPU the checkpoint's half precision)",
        choices=DTYPES,
    )
    run_group.add_argument(
        "--offload_activations",
        nargs="?",
        const="host",
        default=None,
        metavar="WHERE",
        help="keep activations elsewhere than on the device: in host memory (the value host, or no "
        "value), on disk beside OUT (disk), or in a folder (its path) (default: none)",
    )
    run_group.add_argument(
        "--no-offload_activations",
        dest="offload_activations",
        action="store_const",
        const="none",
        help=argparse.SUPPRESS,
    )
    flag(
        run_group,
        "--from_config",
        "no checkpoint: random weights and tokens for a model of this shape (speed tests)",
        metavar="CONFIG.json",
    )
    switch(run_group, "--resume", "continue an interrupted run; --no-resume discards it")
    flag(run_group, "--eval", "data sets for perplexity, comma separated, or none")
    flag(run_group, "--eval_tokens", "at most so many tokens per data set (default: all)", type=int)
    run_group.add_argument(
        "--report",
        nargs="?",
        const="",
        default=None,
        metavar="DIR",
        help="compare with the original model and write an HTML report (default DIR: OUT/report)",
    )
    run_group.add_argument(
        "--verbose", action="store_true", help="log every step, and the losses of every layer"
    )
    return top


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """Flags by name, None where not given. Options may be spelled with either - or _ throughout."""
    top = parser()
    options = {
        option.replace("-", "_"): option
        for action in top._actions
        for option in action.option_strings
    }

    def spelled(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return options.get(name.replace("-", "_"), name) + equals + value

    return vars(top.parse_args([spelled(a) if a.startswith("--") else a for a in argv]))


def main(argv: Sequence[str] | None = None, evaluate: Evaluate | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 with one line about what was wrong."""
    flags = parse(sys.argv[1:] if argv is None else argv)
    verbose = flags.pop("verbose")
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(
        level=level if speaks() else logging.ERROR,  # the others would say the same
        format=("%(asctime)s " if verbose else "") + "%(levelname)s %(name)s: %(message)s",
    )
    recipe, config = flags.pop("config"), None
    try:
        config = resolve(load_recipe(recipe) if recipe else {}, flags)
        _execute(config, evaluate)
    except MarlinError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:2])
        print(
            f"error: {reason}; lower --nsamples or --seqlen, or keep activations elsewhere "
            f"(--offload_activations){_kept(config)}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"interrupted{_kept(config)}", file=sys.stderr)
        return 130
    finally:
        leave()
    return 0


def _kept(config: QuantizeConfig | None) -> str:
    """How a run that has ended early can go on, if it can."""
    if config is None or not config.save:
        return ""
    folder = unfinished_folder(Path(config.save).expanduser().absolute())
    return "; finished layers are kept, continue with --resume" if folder.is_dir() else ""


def _execute(config: QuantizeConfig, evaluate: Evaluate | None) -> None:
    _check_purpose(config)
    if config.from_config:
        evaluate = None  # random weights
    if evaluate is not None:
        _check_evaluation_text(config)
    if config.wbits == 16 and not config.sparsity:
        if evaluate is not None and speaks():
            evaluate(config, None, None)
        return
    if config.save:
        out = Path(config.save).expanduser().absolute()
        report = run(config, out)
        if report is None:  # another process of this run has it
            return
        _summarize(report, out)
        if evaluate is not None:
            evaluate(config, out, report)
        return
    if launched_by_torchrun():
        raise ConfigError("several processes need a folder that all can see; add --save OUT")
    with tempfile.TemporaryDirectory(prefix="marlin-gptq-") as folder:
        out = Path(folder) / "packed"
        report = run(config, out)
        _summarize(report, None)
        if evaluate is not None:
            evaluate(config, out, report)


def _check_purpose(config: QuantizeConfig) -> None:
    """Raise ConfigError if there is no model, or if nothing would be left of the work."""
    if not config.checkpoint and not config.from_config:
        raise ConfigError("no model; give a checkpoint, or --from_config CONFIG.json")
    evaluates = bool(config.eval) and not config.from_config
    if config.save is None and not evaluates and not config.from_config:
        way_out = "add --wbits 4 and --save OUT" if config.wbits == 16 else "add --save OUT"
        raise ConfigError(
            f"eval is none and save is not given: nothing to do; {way_out}, or --eval"
        )
    if config.report is None:
        return
    if not evaluates:
        raise ConfigError(
            f"report={config.report!r} compares perplexities, and none are measured "
            f"({'random weights' if config.from_config else 'eval is none'}); leave it out"
            + ("" if config.from_config else ", or name texts with --eval")
        )
    folder = Path(config.report).absolute()
    found = next(place for place in (folder, *folder.parents) if place.exists())
    if config.report and not found.is_dir():
        raise ConfigError(f"report={config.report!r}: {found} is a file; choose another folder")


def _check_evaluation_text(config: QuantizeConfig) -> None:
    """Find the held-out text before hours of work, not after. Raises DataError with the way out."""
    for source in config.eval:
        try:
            documents(source, "heldout", data_dir=config.data_dir)
        except DataError as error:
            raise DataError(f"{error}; or choose other texts with --eval, or --eval none") from None


def _rank(rank: dict[str, Any]) -> str:
    """What one of several processes did."""
    seconds = rank["seconds"]
    waits = sum(spent for kind, spent in seconds.items() if kind.startswith("collective."))
    memory = rank["peak_device_bytes"] or rank["peak_host_bytes"]
    return (
        f"process {rank['rank']} on {rank['device']}: {rank['tokens']:,} tokens, forward "
        f"{seconds['forward']:.1f} s, Hessians {seconds['hessian']:.1f} s, solver "
        f"{seconds['solve']:.1f} s (exchange {waits:.1f} s of these), peak memory "
        f"{memory / 2**30:.2f} GiB"
    )


def _summarize(report: dict[str, Any], out: Path | None) -> None:
    totals = report["totals"]
    worst = sorted(report["layers"], key=lambda row: -row["relative_error"])[:3]
    mean = sum(row["relative_error"] for row in report["layers"]) / len(report["layers"])
    print(
        f"\n{'pruned' if report['config']['wbits'] == 16 else 'quantized'} "
        f"{totals['parameters_quantized'] / 1e6:,.1f} M weights in "
        f"{totals['seconds']:.0f} s (forward {totals['seconds_forward']:.0f}, Hessians "
        f"{totals['seconds_hessian']:.0f}, solver {totals['seconds_solve']:.0f}); peak memory "
        f"{totals['peak_host_bytes'] / 2**30:.2f} GiB"
    )
    if totals["processes"] > 1:
        for rank in totals["ranks"]:
            print(f"  {_rank(rank)}")
    print(f"mean relative error of a linear {mean:.4f}; largest:")
    for row in worst:
        print(f"  {row['relative_error']:.4f}  {row['name']}")
    raised = [row["name"] for row in report["layers"] if row["damping_retries"]]
    if raised:
        more = ", ..." if len(raised) > 4 else ""
        print(f"damping was raised for {len(raised)} linears: {', '.join(raised[:4])}{more}")
    if out is not None:
        print(f"packed checkpoint: {out}")
