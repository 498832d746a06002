"""What the scripts share before they measure anything: --help, the GPU, and the command to note."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


class Help(argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and behind each option its default, if it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if "default:" in text or default in (None, False, math.inf, argparse.SUPPRESS):
            return text
        if isinstance(default, str | Path) and Path(default).is_relative_to(ROOT):
            default = Path(default).relative_to(ROOT)  # no folder of this machine
        elif isinstance(default, Sequence) and not isinstance(default, str):
            default = " ".join(map(str, default))
        return f"{text} (default: {default})".replace("%", "%%")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose --help shows `description` (a script's docstring) and every default."""
    return argparse.ArgumentParser(description=description, formatter_class=Help)


def require_gpu(script: str, capability: tuple[int, int] | None = None, hint: str = "") -> None:
    """Exit with one sentence if torch finds no CUDA GPU, or one of another compute capability."""
    if not torch.cuda.is_available():
        raise SystemExit(f"{script} times kernels on a CUDA GPU, and torch finds none{hint}")
    found = torch.cuda.get_device_capability()
    if capability is not None and found != capability:
        wanted, own = (".".join(map(str, version)) for version in (capability, found))
        raise SystemExit(
            f"{script} times kernels for compute capability {wanted}, and this GPU has {own}; "
            "scripts/benchmark_marlin.py times those that serve it"
        )


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, and the folders that lead to it: no run ends for lack of one.

    A file that was there is replaced at once: whatever ends the run, one of the two is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".partial") if path.is_file() else path
    whole.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if whole is not path:
        os.replace(whole, path)


def command(script: str, without: Sequence[str] = ()) -> str:
    """This run's command line with files by name, without the folders of this machine.

    without: options, each with a value, that are left out.
    """
    words = sys.argv[1:]
    for option in without:
        if option in words:
            start = words.index(option)
            words = words[:start] + words[start + 2 :]

    def by_name(word: str) -> str:
        name, equals, path = word.rpartition("=")
        return name + equals + (path.rpartition("/")[2] if path.startswith("/") else path)

    return shlex.join(["python", script, *map(by_name, words)])


def commit() -> str | None:
    """The commit of this checkout; of a copy without git, what BENCH_COMMIT says, if anything."""
    if said := os.environ.get("BENCH_COMMIT"):
        return said
    ask = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(ask, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        return None


def commit_and_environment(device: torch.device) -> dict[str, object]:
    """For JSON: "commit", once and from `commit`, and "environment", versions and hardware."""
    from gptq.run import environment

    facts = {name: fact for name, fact in environment(device).items() if name != "commit"}
    return {"commit": commit(), "environment": facts}


def positive(text: str) -> int:
    """A whole number of at least 1, as a type of argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    """A time of 0 s or more, as a type of argparse."""
    return _not_negative(text, "seconds")


def percent(text: str) -> float:
    """0 % or more, as a type of argparse."""
    return _not_negative(text, "percent")


def _not_negative(text: str, unit: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of {unit}, 0 or more")
    return value


def shape(text: str) -> tuple[int, int]:
    """(K, N) of "KxN", as a type of argparse."""
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isascii() and size.isdigit() for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no K x N such as 4096x12288")
    return int(sizes[0]), int(sizes[1])
