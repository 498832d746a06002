"""Text for calibration and for held-out evaluation: the one place that knows where it comes from.

Calibration text (`gptq/calibration.py`) and evaluation text (`eval/perplexity.py`) must never
overlap. That is one fact about one source, so `documents` here decides both sides of it.

Local copies live in a folder given as `data_dir` or by the environment variable MARLIN_DATA_DIR
(layout: docs/evaluation.md). Without one, named sources come from the hub as plain parquet or JSON
files; dataset scripts and other remote code are never executed.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from marlin_kernel.errors import DataError

Split = Literal["calibration", "heldout"]

DATA_DIR_VARIABLE = "MARLIN_DATA_DIR"
SEPARATOR = "\n\n"  # what the perplexity papers put between the rows of WikiText-2
HELDOUT_DOCUMENTS = 1024  # of the fixed permutation; Marlin's choice for RedPajama
MAX_CALIBRATION_DOCUMENTS = 8192  # a prefix of the permutation: no recipe needs more
PERMUTATION_SEED = 0
TEXT_FIELDS = ("text", "content", "page")
SUFFIXES = (".txt", ".raw", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
SPLIT_WORDS = {
    "calibration": frozenset({"train", "training", "calib", "calibration"}),
    "heldout": frozenset({"test", "valid", "validation", "val", "heldout", "eval"}),
}


@dataclass(frozen=True)
class Documents:
    """One side of a text source.

    `texts` are the documents in their fixed order. `joined` says how perplexity reads them: True
    means one stream, joined by a blank line and cut into non-overlapping windows; False means one
    document at a time. `origin` names the files, `sha256` covers the texts (UTF-8, each one
    followed by a zero byte).
    """

    name: str
    split: Split
    texts: Sequence[str]
    joined: bool
    protocol: str
    origin: str
    sha256: str

    def text(self) -> str:
        """All documents as one string, joined by a blank line."""
        return SEPARATOR.join(self.texts)


@dataclass(frozen=True)
class _Source:
    """How one source is split and read.

    `split`: "marked" takes files by the split word in their name; "divided" divides all documents
    by the fixed permutation; "either" is marked if any file name holds a split word, else divided.
    `whole` keeps every row exactly, empty ones too. `hub` holds (split or "both", repository,
    revision, glob of files); entries for one split are alternatives, tried in order.
    """

    protocol: str
    joined: bool = True
    split: Literal["marked", "divided", "either"] = "either"
    whole: bool = False
    hub: tuple[tuple[str, str, str, str], ...] = ()


_WINDOWS = "joined by a blank line, non-overlapping windows"
_BY_DOCUMENT = "one document at a time, truncated to the sequence length"
_RED = "togethercomputer/RedPajama-Data-1T-Sample"
SOURCES: dict[str, _Source] = {
    "wikitext2": _Source(
        protocol=f"WikiText-2 raw, rows {_WINDOWS}",
        split="marked",
        whole=True,
        hub=(
            ("calibration", "Salesforce/wikitext", "main", "wikitext-2-raw-v1/train-*.parquet"),
            ("heldout", "Salesforce/wikitext", "main", "wikitext-2-raw-v1/test-*.parquet"),
        ),
    ),
    "red": _Source(
        protocol=f"RedPajama sample, {_BY_DOCUMENT}",
        joined=False,
        split="divided",
        hub=(
            ("both", _RED, "refs/convert/parquet", "*train/*.parquet"),
            ("both", _RED, "main", "*.jsonl"),
        ),
    ),
    "c4": _Source(
        protocol=f"C4 (en), {_BY_DOCUMENT}",
        joined=False,
        hub=(
            ("calibration", "allenai/c4", "main", "en/c4-train.00000-of-*.json.gz"),
            ("heldout", "allenai/c4", "main", "en/c4-validation.00000-of-*.json.gz"),
        ),
    ),
}
NAMES = (*SOURCES, "pydoc")


def documents(source: str, split: Split, *, data_dir: str | None = None) -> Documents:
    """Return one side of a text source; the two sides never share a document.

    source: "wikitext2", "red", "c4", "pydoc", or the path of a .txt, .jsonl, .json.gz or .parquet
    file or of a folder of them. data_dir: folder of local copies (default: $MARLIN_DATA_DIR).

    - Files whose name holds a split word (train, calib | test, valid, heldout, ...) belong wholly
      to that split, and files without one are then left out. A joined .txt of the held-out split
      is kept verbatim, as one document.
    - Without such names (and always for red) the first min(1024, n // 4) of a fixed permutation
      of all n documents are held out; the rest calibrates.
    - A .txt file with blank lines holds one document per block between them; one without holds
      one document per line. JSON lines: the field "text". Parquet: the column "text".

    At most 8192 calibration and 1024 held-out documents are returned, except that WikiText-2 is
    always whole. Raises DataError saying what was looked for, where, and how to provide it.
    """
    if split not in SPLIT_WORDS:
        raise DataError(f"split={split!r} is not one of {sorted(SPLIT_WORDS)}")
    if source == "pydoc":
        return _pydoc(split)
    if source in SOURCES:
        return _named(source, split, data_dir or os.environ.get(DATA_DIR_VARIABLE))
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"text source {source!r} is neither one of {', '.join(NAMES)} nor an existing file or "
            f"folder; give a path to {', '.join(SUFFIXES)} or a folder of such files"
        )
    if path.is_file() and not path.name.endswith(SUFFIXES):
        raise DataError(
            f"text source {source!r} ends in none of {', '.join(SUFFIXES)}, which say how to read "
            "it; rename it"
        )
    files = _files_in(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"folder {source!r} holds no file ending in {', '.join(SUFFIXES)}")
    return _from_files(path.name, _Source(f"local text, {_WINDOWS}"), split, files, str(path))


def _named(name: str, split: Split, data_dir: str | None) -> Documents:
    files: list[Path] = []
    if data_dir is not None:
        root = Path(data_dir).expanduser()
        prefix = re.compile(rf"{name}(?![a-z0-9])")
        files = _files_in(root / name) or [
            f for f in _files_in(root, deep=False) if prefix.match(f.name.lower())
        ]
    origin = ", ".join(str(f) for f in files[:4])
    if not files:
        files, origin = _download(name, split, data_dir)
    return _from_files(name, SOURCES[name], split, files, origin)


def _from_files(
    name: str, source: _Source, split: Split, files: list[Path], origin: str
) -> Documents:
    """Take whole files by the split word in their name, or divide all of them."""
    marked: dict[str, list[Path]] = {s: [] for s in SPLIT_WORDS}
    if source.split != "divided":
        for file in files:
            if (side := _split_of(file)) is not None:
                marked[side].append(file)
    limit = HELDOUT_DOCUMENTS if split == "heldout" else MAX_CALIBRATION_DOCUMENTS
    protocol = source.protocol
    texts: list[str] = []
    if marked[split]:
        for file in marked[split]:
            if file.name.endswith(".txt") and (
                source.whole or (source.joined and split == "heldout")
            ):
                texts.append(_read_text(file))
            else:
                texts += islice(_iterate(file), None if source.whole else limit - len(texts))
    elif any(marked.values()) or source.split == "marked":
        words = ", ".join(sorted(SPLIT_WORDS[split]))
        raise DataError(
            f"{name}: no {split} text: none of {', '.join(str(f) for f in files[:3])} has one of "
            f"the words {words} in its name; put such a file beside it"
            + ("" if source.split == "marked" else ", or rename the file to have it divided")
        )
    else:
        texts = _divide(name, files)[split]
        protocol += "; held out by a fixed permutation"
    if not source.whole:
        texts = [text for text in texts if text.strip()]
    if not any(text.strip() for text in texts):
        raise DataError(f"{name}: the {split} split of {origin} holds no text")
    return Documents(name, split, tuple(texts), source.joined, protocol, origin, _sha256(texts))


def _divide(name: str, files: list[Path]) -> dict[str, list[str]]:
    """Both sides of unsplit files, read in one pass, without texts that occur on both."""
    counts = [_count(file) for file in files]
    total = sum(counts)
    if total < 4:
        raise DataError(
            f"{name}: {', '.join(map(str, files[:3]))} holds {total} document(s), too few to "
            "divide into a calibration and a held-out part (4 or more); a .txt without blank lines "
            "holds one document per line, JSON one object per line; or provide two files named "
            "*train* and *test*"
        )
    # RandomState's stream is frozen by NumPy's compatibility policy: the split never moves.
    order = np.random.RandomState(PERMUTATION_SEED).permutation(total)
    boundary = min(HELDOUT_DOCUMENTS, total // 4)
    order = order[: boundary + MAX_CALIBRATION_DOCUMENTS]
    picked: dict[int, str] = {}
    start = 0
    for file, count in zip(files, counts, strict=True):
        wanted = np.sort(order[(order >= start) & (order < start + count)]) - start
        picked.update((start + index, text) for index, text in _pick(file, wanted))
        start += count
    heldout = [picked[i] for i in order[:boundary].tolist()]
    seen = {text.strip() for text in heldout}
    calibration = [picked[i] for i in order[boundary:].tolist()]
    return {"heldout": heldout, "calibration": [t for t in calibration if t.strip() not in seen]}


def _pydoc(split: Split) -> Documents:
    """English prose of CPython's language reference, split by topic.

    Topics quote each other (specialnames contains customization), so a paragraph is kept only
    where it appears first, held-out topics before calibration topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python carries no pydoc_data; give --dataset and --eval a text file instead"
        ) from error
    sides: dict[str, list[str]] = {"heldout": [], "calibration": []}
    for topic in sorted(topics):
        is_heldout = hashlib.sha256(topic.encode()).digest()[0] % 4 == 0
        sides["heldout" if is_heldout else "calibration"].append(topic)
    seen: set[str] = set()
    texts: dict[str, list[str]] = {}
    for side, names in sides.items():  # held-out first
        texts[side] = []
        for topic in names:
            blocks = []
            for block in _blocks(topics[topic]):
                key = " ".join(block.split())
                if key not in seen:
                    seen.add(key)
                    blocks.append(block)
            if blocks:
                texts[side].append(SEPARATOR.join(blocks))
    version = ".".join(map(str, sys.version_info[:3]))
    return Documents(
        "pydoc",
        split,
        tuple(texts[split]),
        True,
        f"topics of pydoc_data (CPython {version}), {_WINDOWS}",
        f"pydoc_data.topics of CPython {version}",
        _sha256(texts[split]),
    )


# ---- files ------------------------------------------------------------------------------------


def _files_in(folder: Path, *, deep: bool = True) -> list[Path]:
    """Text files in a fixed order (by relative path), hidden ones and READMEs left out."""
    if not folder.is_dir():
        return []
    found = folder.rglob("*") if deep else folder.glob("*")
    return sorted(
        (
            f
            for f in found
            if f.is_file()
            and f.name.endswith(SUFFIXES)
            and not f.name.startswith(".")
            and not f.name.lower().startswith("readme")
        ),
        key=lambda f: f.relative_to(folder).as_posix(),
    )


def _split_of(file: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", file.name.lower()))
    return next((split for split, names in SPLIT_WORDS.items() if words & names), None)


def _read_text(file: Path) -> str:
    """The exact characters of a UTF-8 file; newline="" keeps \\r, which tokenizers see."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from error


def _blocks(text: str) -> list[str]:
    return [b.strip("\r\n") for b in re.split(r"\r?\n(?:[ \t]*\r?\n)+", text) if b.strip()]


def _iterate(file: Path) -> Iterator[str]:
    """Yield the documents of one file, in order."""
    if file.name.endswith(".raw"):
        # The rows of the hub's WikiText: each line with its newline, blank lines as "".
        yield from (line if line.strip() else "" for line in io.StringIO(_read_text(file)))
    elif file.name.endswith(".txt"):
        text = _read_text(file)
        has_blank_line = re.search(r"\n[ \t]*\r?\n", text.strip()) is not None
        yield from _blocks(text) if has_blank_line else filter(str.strip, text.splitlines())
    elif file.name.endswith(".parquet"):
        for batch in _parquet(file).iter_batches(batch_size=1024, columns=[_column(file)]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    else:
        for number, line in enumerate(_json_lines(file), 1):
            yield _json_text(file, number, line)


def _count(file: Path) -> int:
    if file.name.endswith(".parquet"):
        return _parquet(file).metadata.num_rows
    if file.name.endswith((".txt", ".raw")):
        return sum(1 for _ in _iterate(file))
    return sum(1 for _ in _json_lines(file))


def _pick(file: Path, wanted: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yield (index, text) of the wanted documents; int64 [n], ascending. Parses only those."""
    if len(wanted) == 0:
        return
    if file.name.endswith((".jsonl", ".json", ".gz")):
        chosen = set(wanted.tolist())
        for index, line in enumerate(_json_lines(file)):
            if index in chosen:
                yield index, _json_text(file, index + 1, line)
        return
    if file.name.endswith(".parquet"):
        parquet, start = _parquet(file), 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            local = wanted[(wanted >= start) & (wanted < start + rows)] - start
            if len(local):
                column = parquet.read_row_group(group, columns=[_column(file)]).column(0)
                yield from ((int(i) + start, column[int(i)].as_py() or "") for i in local)
            start += rows
        return
    texts = list(_iterate(file))
    yield from ((int(i), texts[int(i)]) for i in wanted)


def _json_lines(file: Path) -> Iterator[str]:
    """Lines that are not blank of a file that may be gzipped."""
    opener = gzip.open if file.name.endswith(".gz") else open
    try:
        with opener(file, "rt", encoding="utf-8", newline="\n") as stream:
            yield from (line for line in stream if line.strip())
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        kind = "gzipped " if opener is gzip.open else ""
        raise DataError(f"{file} is no readable {kind}UTF-8 text: {error}") from error


def _json_text(file: Path, line_number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}, document {line_number}: not one JSON object a line ({error})"
        ) from error
    for field in TEXT_FIELDS:
        if isinstance(record, dict) and isinstance(record.get(field), str):
            return record[field]
    raise DataError(f"{file}, document {line_number}: no string field named 'text'")


def _parquet(file: Path):
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"reading {file} needs pyarrow, which the extra [data] brings: "
            "pip install 'marlin-gptq[data]'"
        ) from error
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{file} is not a readable parquet file: {error}") from error


def _column(file: Path) -> str:
    names = _parquet(file).schema_arrow.names
    for field in TEXT_FIELDS:
        if field in names:
            return field
    raise DataError(f"{file} has no column named 'text'; its columns are {', '.join(names)}")


# ---- hub --------------------------------------------------------------------------------------


def _download(name: str, split: Split, data_dir: str | None) -> tuple[list[Path], str]:
    """Fetch the plain data files of a named source, or find them in the hub's cache.

    Returns (files, origin). Only files matching the table's globs are fetched: data, never code.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise DataError(
            f"{name} needs a local copy or huggingface_hub: pip install 'marlin-gptq[data]'"
        ) from error
    # The base class is the HTTP client's own: failed connections raise it (httpx or requests).
    network_errors = (HfHubHTTPError, HfHubHTTPError.__base__, OSError)
    tried = []
    for where, repository, revision, pattern in SOURCES[name].hub:
        if where not in (split, "both"):
            continue
        try:
            folder = snapshot_download(
                repository, repo_type="dataset", revision=revision, allow_patterns=[pattern]
            )
        except network_errors as error:
            tried.append(f"{repository}@{revision}: {type(error).__name__}")
            continue
        root = Path(folder)
        names = [f.relative_to(root).as_posix() for f in _files_in(root)]
        chosen = [n for n in names if fnmatch.fnmatch(n, pattern)]
        if chosen:
            return [root / n for n in chosen], f"{repository}@{revision}: {', '.join(chosen[:4])}"
        tried.append(f"{repository}@{revision}: no file matches {pattern}")
    looked = (
        f"{Path(data_dir) / name}/ and {Path(data_dir) / name}*"
        if data_dir
        else f"no local folder (data_dir and ${DATA_DIR_VARIABLE} are unset)"
    )
    raise DataError(
        f"no {split} text for {name!r}. Looked at: {looked}; hub: {'; '.join(tried)}. Way out: put "
        f"a copy ({', '.join(SUFFIXES)}) into DATA_DIR/{name}/ and pass --data_dir DATA_DIR, or "
        "use another source: 'pydoc' needs no files, or give the path of a text file"
    )


def _sha256(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
