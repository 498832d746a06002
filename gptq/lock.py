"""What lies beside a folder OUT while a run writes it: its lock, and its finished layers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from marlin_kernel.errors import ConfigError


def unfinished_folder(out: Path) -> Path:
    """Where a run keeps its finished layers until OUT is complete."""
    return out.with_name(f".{out.name}.unfinished")


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold OUT for this process: the file ``.OUT.lock`` beside it, which says who holds it.

    The system releases it with the process, however that dies: what a dead run left is taken over.
    Raises ConfigError naming the other process, or if the folder above OUT cannot be made.
    """
    made = _make_parents(out)
    path = out.with_name(f".{out.name}.lock")
    handle = _acquire(path, out)
    try:
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: who waits for this file finds another
        os.close(handle)
        with contextlib.suppress(OSError):  # not empty: the run has left something
            for folder in made:
                folder.rmdir()


def _acquire(path: Path, out: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(f"save={str(out)!r}: {error}; choose another folder") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(handle)
            os.close(handle)
            raise ConfigError(
                f"save={str(out)!r}: another run writes there ({holder}); wait for it, end it and "
                "continue with --resume, or choose another folder"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                return handle
        os.close(handle)  # its holder has just removed it


def _holder(handle: int) -> str:
    try:
        facts = json.loads(os.pread(handle, 4096, 0))
        return f"process {facts['pid']} on {facts['host']}, since {facts['since']}"
    except (ValueError, KeyError):  # it has only begun
        return "a process that has just started"


def _make_parents(out: Path) -> list[Path]:
    """Make the folders above `out`; returns those that were missing, deepest first."""
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(folder for folder in out.parents if folder.exists())
        raise ConfigError(f"save={str(out)!r}: {file} is a file; choose another folder") from None
    except OSError as error:
        raise ConfigError(f"save={str(out)!r}: {error}; choose another folder") from None
    return missing
