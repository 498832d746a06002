"""Compile device code with NVRTC to cubins, and keep them in a cache on disk.

Nothing but torch's own dependencies is needed: NVRTC, its bindings and the cuda_fp16/bf16 headers
come with every CUDA torch. No GPU and no driver take part, so cubins can be built ahead of time:

    python -m marlin_kernel.compiler --arch sm_80 sm_90a    # fills the cache of this machine
    python scripts/generate_kernels.py "8.0,9.0" --compile  # fills a folder to ship

A folder to ship has an `index.txt`: one line "<source key> <cache key> <symbol>" for each kernel.
Its cubins are used whatever compiler this machine has, and need none.

Environment:
    MARLIN_KERNEL_CACHE     directory of the cache (default: $XDG_CACHE_HOME/marlin_kernel, else
                            ~/.cache/marlin_kernel)
    MARLIN_KERNEL_PREBUILT  directory of cubins that is only read, instead of the default places
                            (PREBUILT_PLACES)
    MARLIN_KERNEL_LINEINFO  "1": embed source lines for profilers (a debug switch: cubins grow
                            fivefold)
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import logging
import multiprocessing
import os
import re
import struct
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from marlin_kernel.errors import MarlinError

logger = logging.getLogger(__name__)

SOURCE_ROOT = (Path(__file__).parent / "csrc").resolve()
# Where prebuilt cubins are looked for: in an installed package, and in a checkout.
PREBUILT_PLACES = (
    Path(__file__).parent / "cubins",
    Path(__file__).parents[1] / "build" / "kernels" / "cubins",
)
INDEX = "index.txt"
CUDA_HEADERS = ("cuda_fp16.h", "cuda_fp16.hpp", "cuda_bf16.h", "cuda_bf16.hpp")


class CompileError(MarlinError, RuntimeError):
    """NVRTC is missing or rejected a kernel; the message holds its log."""


@dataclass(frozen=True)
class KernelSource:
    """One kernel to compile: the header that defines it and the C++ expression that names it."""

    header: str  # relative to csrc, for example "sm90/decode.cuh" or "../../gptq/csrc/search.cuh"
    expression: str  # for example "sm90::decode_kernel<sm90::DecodeConfig<__half, 128, ...>>"


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel.

    image: the ELF file; symbol: the mangled kernel name in it; registers: per thread; stack_bytes:
    local frame per thread (0 means no spills); log: what the compiler said.
    """

    image: bytes
    symbol: str
    registers: int
    stack_bytes: int
    log: str = ""


def cache_directory() -> Path:
    """Directory that compiled kernels are kept in; not created by this function."""
    explicit = os.environ.get("MARLIN_KERNEL_CACHE")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "marlin_kernel"


def compile_kernel(source: KernelSource, arch: str, *, force: bool = False) -> Cubin:
    """Return the machine code of `source` for `arch`: prebuilt, from the cache, or compiled now.

    source: header and name expression; arch: "sm_80", "sm_90a", ...; force: compile in any case.
    Several processes may ask for the same kernel: one compiles, the others wait for its file. A
    cache that cannot be written is left alone, with a warning.
    Raises CompileError with NVRTC's log, or if NVRTC or the CUDA headers cannot be found.
    """
    directory = cache_directory()
    if not force:
        found = _prebuilt(source, arch)
        if found is not None:
            return found
    key = cache_key(source, arch)
    if not force:
        for place in (directory, *_prebuilt_directories()):
            found = _read(place, key)
            if found is not None:
                return found
    found = None
    try:
        with _lock(directory, key):
            found = None if force else _read(directory, key)
            if found is None:
                found = _compile(source, arch)
                _write(directory, key, found, source, arch)
    except OSError as error:
        _warn_of_cache(directory, error.strerror or str(error))
    return _compile(source, arch) if found is None else found


@functools.cache
def _warn_of_cache(directory: Path, reason: str) -> None:
    logger.warning(
        "compiled kernels cannot be kept in %s (%s): each process compiles them anew; let "
        "MARLIN_KERNEL_CACHE name a directory that can be written",
        directory,
        reason,
    )


def source_key(source: KernelSource, arch: str) -> str:
    """Hash of everything but the compiler that decides the machine code of `source` for `arch`."""
    text = _sources_digest(source.header)
    return _hash(text, source.header, source.expression, arch, *_options(arch))


def cache_key(source: KernelSource, arch: str) -> str:
    """Hash of everything that decides the machine code of `source` for `arch`.

    Raises CompileError if NVRTC or the CUDA headers cannot be found.
    """
    return _hash(source_key(source, arch), _compiler_fingerprint())


def _hash(*parts: str) -> str:
    return hashlib.sha256(b"".join(part.encode() + b"\0" for part in parts)).hexdigest()[:32]


def compile_all(
    work: Sequence[tuple[KernelSource, str]],
    jobs: int,
    directory: Path | None = None,
    *,
    force: bool = False,
) -> Iterator[tuple[int, Cubin | CompileError]]:
    """Compile (source, architecture) pairs in `jobs` processes, into `directory` or the cache.

    Yields (position in `work`, machine code, or why there is none) as they are ready.
    """
    tasks = [(i, source, arch, directory, force) for i, (source, arch) in enumerate(work)]
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        yield from map(_compile_one, tasks)
        return
    # Processes, because NVRTC compiles one kernel at a time in each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for done in as_completed([pool.submit(_compile_one, task) for task in tasks]):
            yield done.result()


def _compile_one(
    task: tuple[int, KernelSource, str, Path | None, bool],
) -> tuple[int, Cubin | CompileError]:
    position, source, arch, directory, force = task
    try:
        if directory is None:
            return position, compile_kernel(source, arch, force=force)
        key = cache_key(source, arch)
        found = None if force else _read(directory, key)
        if found is None:
            found = _compile(source, arch)
            _write(directory, key, found, source, arch)
        return position, found
    except CompileError as error:
        return position, error


def resource_usage(image: bytes, symbol: str) -> tuple[int, int]:
    """Registers and stack bytes per thread of kernel `symbol`, read from the cubin's ELF sections.

    Raises CompileError if `image` holds no such kernel.
    """
    sections = _elf_sections(image)
    symbols = _elf_symbols(image, sections)
    index = next((i for i, name in enumerate(symbols) if name == symbol), None)
    registers = stack = None
    if index is not None and ".nv.info" in sections:
        offset, size = sections[".nv.info"]
        for attribute, owner, value in _nv_info(image[offset : offset + size]):
            if owner == index and attribute == 0x2F:
                registers = value
            elif owner == index and attribute == 0x11:
                stack = value
    if registers is None:
        raise CompileError(f"no register count for kernel {symbol!r} in the cubin")
    return registers, stack or 0


# ---- NVRTC ---------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except ImportError as error:
        raise CompileError(
            "cuda.bindings is not installed; it comes with CUDA builds of torch >= 2.10, or "
            "`pip install cuda-bindings nvidia-cuda-nvrtc nvidia-cuda-runtime`"
        ) from error
    except RuntimeError as error:  # of cuda.pathfinder
        reason = str(error).partition("\n")[0]
        raise CompileError(
            f"NVRTC cannot be loaded ({reason}); `pip install nvidia-cuda-nvrtc`"
        ) from error
    return nvrtc


def _call(result: tuple[Any, ...]) -> Any:
    nvrtc = _nvrtc()
    code, *values = result
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC: {nvrtc.nvrtcGetErrorString(code)[1].decode()}")
    return values[0] if len(values) == 1 else tuple(values)


@functools.lru_cache(maxsize=1)
def _include_directory() -> Path:
    """Directory of cuda_fp16.h: the runtime wheel's, else a toolkit's."""
    candidates = []
    with contextlib.suppress(Exception):  # it raises its own types if nothing is there
        from cuda.pathfinder import find_nvidia_header_directory

        found = find_nvidia_header_directory("cudart")
        if found:
            candidates.append(Path(found))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append(Path(os.environ[variable]) / "include")
    candidates.append(Path("/usr/local/cuda/include"))
    for candidate in candidates:
        if (candidate / CUDA_HEADERS[0]).is_file():
            return candidate
    raise CompileError(
        f"cuda_fp16.h was not found in {[str(c) for c in candidates]}; "
        "`pip install nvidia-cuda-runtime` or set CUDA_HOME"
    )


@functools.lru_cache(maxsize=1)
def _compiler_fingerprint() -> str:
    version = _call(_nvrtc().nvrtcVersion())
    digest = hashlib.sha256()
    for name in CUDA_HEADERS:
        path = _include_directory() / name
        if path.is_file():
            digest.update(path.read_bytes())
    return f"nvrtc {version} headers {digest.hexdigest()}"


_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def included_files(header: str) -> list[Path]:
    """A header (path from csrc) and all that it includes, directly or not, in order of name.

    Includes in quotes are looked for as the compiler does: beside the file, then from csrc.
    """
    found: set[Path] = set()
    waiting = [(SOURCE_ROOT / header).resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in _INCLUDE.findall(path.read_text()):
            places = (path.parent / name, SOURCE_ROOT / name)
            waiting += [place.resolve() for place in places if place.is_file()][:1]
    return sorted(found)


@functools.cache
def _sources_digest(header: str) -> str:
    """Hash of the text of a header and of all that it includes."""
    digest = hashlib.sha256()
    for path in included_files(header):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _options(arch: str) -> list[str]:
    options = [f"--gpu-architecture={arch}", "-std=c++17", "--ptxas-options=-v", "-default-device"]
    if os.environ.get("MARLIN_KERNEL_LINEINFO") == "1":
        options.append("-lineinfo")
    return options


def _compile(source: KernelSource, arch: str) -> Cubin:
    nvrtc = _nvrtc()
    text = f'#include "{source.header}"\n'.encode()
    includes = [f"-I{SOURCE_ROOT}", f"-I{_include_directory()}"]
    options = [option.encode() for option in (*_options(arch), *includes)]
    program = _call(nvrtc.nvrtcCreateProgram(text, b"kernel.cu", 0, [], []))
    try:
        _call(nvrtc.nvrtcAddNameExpression(program, source.expression.encode()))
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = b" " * _call(nvrtc.nvrtcGetProgramLogSize(program))
        _call(nvrtc.nvrtcGetProgramLog(program, log))
        log_text = log.decode(errors="replace").rstrip("\0 \n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC rejected {source.expression} for {arch}:\n{log_text}")
        symbol = _call(nvrtc.nvrtcGetLoweredName(program, source.expression.encode())).decode()
        image = b" " * _call(nvrtc.nvrtcGetCUBINSize(program))
        _call(nvrtc.nvrtcGetCUBIN(program, image))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    registers, stack = resource_usage(image, symbol)
    return Cubin(image, symbol, registers, stack, log_text)


# ---- cache ---------------------------------------------------------------------------------------


def _prebuilt_directories() -> tuple[Path, ...]:
    value = os.environ.get("MARLIN_KERNEL_PREBUILT")
    if value is None:
        return PREBUILT_PLACES
    if value and not Path(value).is_dir():
        _warn_of_prebuilt(value)
    return (Path(value),) if value else ()


@functools.cache
def _warn_of_prebuilt(directory: str) -> None:
    logger.warning("MARLIN_KERNEL_PREBUILT=%s is no directory: kernels are compiled", directory)


def _prebuilt(source: KernelSource, arch: str) -> Cubin | None:
    """A cubin that was built ahead of time for `arch`, or for an older GPU whose code runs there.

    Code for sm_80 runs on sm_86 (same major, higher minor), except with a suffix as in sm_90a.
    """
    arches = [arch]
    if arch[-1].isdigit():
        arches += [f"{arch[:-1]}{minor}" for minor in reversed(range(int(arch[-1])))]
    for directory in _prebuilt_directories():
        index = read_index(directory)
        for runs_there in arches if index else ():
            entry = index.get(source_key(source, runs_there))
            found = _read(directory, entry[0]) if entry is not None else None
            if found is not None:
                return found
    return None


def read_index(directory: Path) -> dict[str, tuple[str, str]]:
    """Source key -> (cache key, symbol) of a folder of prebuilt cubins; empty without index.txt."""
    try:
        modified = (directory / INDEX).stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return _parse_index(directory, modified)


@functools.lru_cache(maxsize=16)
def _parse_index(directory: Path, modified: int) -> dict[str, tuple[str, str]]:
    rows = (line.split() for line in (directory / INDEX).read_text().splitlines())
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def write_index(directory: Path, rows: Iterable[tuple[KernelSource, str, Cubin]]) -> None:
    """Write index.txt of a folder that `compile_all` has filled with these kernels."""
    lines = sorted(
        f"{source_key(source, arch)} {cache_key(source, arch)} {cubin.symbol}\n"
        for source, arch, cubin in rows
    )
    _replace(directory / INDEX, "".join(lines).encode())


def _read(directory: Path, key: str) -> Cubin | None:
    try:
        facts = json.loads((directory / f"{key}.json").read_text())
        image = (directory / f"{key}.cubin").read_bytes()
        if hashlib.sha256(image).hexdigest() != facts["sha256"]:
            return None
        return Cubin(image, facts["symbol"], facts["registers"], facts["stack_bytes"], facts["log"])
    except (OSError, ValueError, LookupError, TypeError):  # absent, unreadable or damaged
        return None


def _write(directory: Path, key: str, cubin: Cubin, source: KernelSource, arch: str) -> None:
    facts = {
        "symbol": cubin.symbol,
        "registers": cubin.registers,
        "stack_bytes": cubin.stack_bytes,
        "sha256": hashlib.sha256(cubin.image).hexdigest(),
        "source": asdict(source),
        "arch": arch,
        "log": cubin.log,
    }
    _replace(directory / f"{key}.cubin", cubin.image)
    _replace(directory / f"{key}.json", json.dumps(facts, indent=1).encode())


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that readers see all of it or nothing."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _lock(directory: Path, key: str) -> Iterator[None]:
    """Exclusive right, among processes and threads, to produce the files of `key`."""
    import fcntl

    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / f"{key}.lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)


# ---- ELF -----------------------------------------------------------------------------------------


def _elf_headers(image: bytes) -> tuple[list[tuple[int, ...]], int]:
    if image[:4] != b"\x7fELF":
        raise CompileError("the compiler's output is not an ELF file")
    (table,) = struct.unpack_from("<Q", image, 0x28)
    entry_size, count, names = struct.unpack_from("<HHH", image, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", image, table + i * entry_size) for i in range(count)
    ]
    return headers, names


def _string(image: bytes, offset: int) -> str:
    return image[offset : image.index(b"\0", offset)].decode()


def _elf_sections(image: bytes) -> dict[str, tuple[int, int]]:
    headers, names = _elf_headers(image)
    base = headers[names][4]
    return {_string(image, base + h[0]): (h[4], h[5]) for h in headers}


def _elf_symbols(image: bytes, sections: dict[str, tuple[int, int]]) -> list[str]:
    offset, size = sections[".symtab"]
    strings = sections[".strtab"][0]
    return [
        _string(image, strings + struct.unpack_from("<I", image, offset + i)[0])
        for i in range(0, size, 24)
    ]


def _nv_info(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (attribute, symbol index, value) of the entries that carry both."""
    at = 0
    while at + 4 <= len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == 4:  # sized value follows; other forms keep the value in the size field
            if size == 8:
                yield attribute, *struct.unpack_from("<II", data, at)
            at += size


# ---- ahead of time -------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Compile the kernels that `prebuilt` lists for some architectures. Returns the exit status."""
    from marlin_kernel.prebuilt import specializations
    from marlin_kernel.validity import ARCHITECTURES

    parser = argparse.ArgumentParser(
        prog="python -m marlin_kernel.compiler", description="Compile kernels ahead of time."
    )
    arches = list(ARCHITECTURES.values())
    parser.add_argument(
        "--arch", nargs="+", choices=arches, default=["sm_90a"], help="targets (default: sm_90a)"
    )
    parser.add_argument(
        "--match", default="", help="only C++ expressions that this regular expression matches"
    )
    parser.add_argument(
        "--complete", action="store_true", help="also kernels that are hardly ever selected"
    )
    parser.add_argument("--output", help="directory to fill instead of the cache")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--force", action="store_true", help="compile even what is cached")
    options = parser.parse_args(arguments)
    directory = Path(options.output) if options.output else None
    target = directory or cache_directory()
    try:
        target.mkdir(parents=True, exist_ok=True)
        _replace(target / "writable", b"")
        (target / "writable").unlink()
    except OSError as error:
        parser.error(f"cannot write to {target}: {error}")
    try:
        pattern = re.compile(options.match)
    except re.error as error:
        parser.error(f"--match {options.match!r} is no regular expression: {error}")
    work = [
        (kernel.source, arch)
        for arch in dict.fromkeys(options.arch)
        for kernel in specializations(arch, complete=options.complete)
        if pattern.search(kernel.source.expression)
    ]
    if not work:
        parser.error(f"no kernel for {', '.join(options.arch)} matches {options.match!r}")
    failures = 0
    for i, cubin in compile_all(work, options.jobs, directory, force=options.force):
        source, arch = work[i]
        if isinstance(cubin, CompileError):
            print(cubin, file=sys.stderr)
            failures += 1
        else:
            print(
                f"{arch} {source.expression}: {cubin.registers} registers, {cubin.stack_bytes} B "
                f"stack, {len(cubin.image)} B"
            )
    print(f"{len(work) - failures} of {len(work)} kernels in {target}")
    return 1 if failures else 0


if __name__ == "__main__":
    # The importable module's classes, not a second copy of them: processes exchange them.
    sys.exit(importlib.import_module("marlin_kernel.compiler").main())
