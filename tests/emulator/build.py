"""Builds the emulated kernels with g++ and runs them on CPU tensors."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from torch import Tensor

EMULATOR = Path(__file__).parent
CSRC = EMULATOR.parents[1] / "marlin_kernel" / "csrc"
FLAGS = (
    *("-std=c++17", "-O2", "-fno-strict-aliasing", "-fPIC", "-shared"),
    *(
        "-fvisibility=hidden",
        "-fno-gnu-unique",
        "-Wno-unknown-pragmas",
        "-Wall",
        "-Werror=return-type",
    ),
)
STATUS = {0: "finished", 1: "deadlock", 2: "endless polling", 3: "violation"}

needs_emulator = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64",
    reason="the emulator needs g++ on x86-64",
)


def pointer(t: Tensor | None) -> int | None:
    """Address of a tensor's first element, as ctypes takes it."""
    return None if t is None else t.data_ptr()


def outcome(library: ctypes.CDLL, status: int, counters: Tensor | None = None) -> str:
    """ "finished", or what went wrong in a launch that returned `status`.

    counters: integers that a kernel must leave at zero.
    """
    if status:
        library.violation.restype = ctypes.c_char_p
        return f"{STATUS.get(status, status)} {library.violation().decode()}".strip()
    if counters is not None and counters.any():
        return "counters not zero on exit"
    return STATUS[0]


def _digest(parts: list[str], roots: list[Path]) -> str:
    digest = hashlib.sha256("\0".join(parts).encode())
    for root in roots:
        for path in sorted(p for p in root.rglob("*") if p.suffix in {".h", ".cuh", ".cpp"}):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def build(
    main: str, defines: dict[str, str], mutation: tuple[str, str, str] | None = None
) -> ctypes.CDLL:
    """Compile tests/emulator/`main` against the kernel sources and load it.

    mutation: (header relative to csrc, text, replacement): the text must occur exactly once; it is
    replaced in a copy of the sources. Libraries are kept in the temporary directory by content.
    Raises RuntimeError with the compiler's output.
    """
    options = [f"-D{name}={value}" for name, value in defines.items()]
    key = _digest([main, *options, *FLAGS, *(mutation or ())], [CSRC, EMULATOR])
    directory = Path(tempfile.gettempdir()) / f"marlin-emulator-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    library = directory / f"{key}.so"
    with open(
        directory / f"{key}.lock", "w"
    ) as lock:  # several test processes want the same library
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(main, options, mutation, library)
    return ctypes.CDLL(str(library))


def _compile(
    main: str, options: list[str], mutation: tuple[str, str, str] | None, library: Path
) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        sources = CSRC
        if mutation is not None:
            sources = Path(scratch) / "csrc"
            shutil.copytree(CSRC, sources)
            header, text, replacement = mutation
            content = (sources / header).read_text()
            if content.count(text) != 1:
                raise RuntimeError(f"{text!r} occurs {content.count(text)} times in {header}")
            (sources / header).write_text(content.replace(text, replacement))
        output = Path(scratch) / "out.so"
        includes = [f"-I{EMULATOR / 'include'}", f"-I{sources}"]
        inputs = [str(EMULATOR / main), "-o", str(output)]
        command = ["g++", *FLAGS, *options, *includes, *inputs]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ failed:\n{done.stderr[:4000]}")
        os.replace(output, library)
