"""What a run was measured with: software, hardware, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch


def environment(device: str | None = None) -> dict[str, Any]:
    """Software and hardware that the numbers of this process were measured with."""
    import transformers

    import marlin_kernel

    packages = ("lm-eval", "datasets")  # what tasks run with, if it is there
    found: dict[str, Any] = {
        "marlin-gptq": marlin_kernel.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: version for name in packages if (version := _version(name))},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": _cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available() and (device is None or device.startswith("cuda")):
        found["GPU"] = torch.cuda.get_device_name(torch.device(device or "cuda"))
        found["CUDA"] = torch.version.cuda
    return found


def command_line() -> str:
    """The command that runs now, ready to paste."""
    program = Path(sys.argv[0])
    start = ["python", os.path.relpath(program)] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            name = next((x.split(":", 1)[1].strip() for x in stream if "model name" in x), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} logical cores"
