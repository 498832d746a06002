"""Local copies of task data for lm-eval: overlays over its own task files, so that no hub is asked.

For every task with a local copy a small YAML file is written that includes lm-eval's own (prompt,
metrics and grouping stay theirs) and changes only where the data lie. lm-eval takes a folder of
such files as `include_path`. The accepted layouts are documented in docs/evaluation.md.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from marlin_kernel.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalTasks:
    """Overlays written to `folder`: names of tasks with local data, and what is incomplete.

    notes: group or task name → one sentence on what its local copy lacks.
    """

    folder: Path
    names: frozenset[str]
    notes: dict[str, str]


def write_overlays(data_dir: str | Path, folder: Path, task_root: Path) -> LocalTasks:
    """Write one overlay per task that has a copy under data_dir.

    task_root: lm-eval's folder of task files. Raises DataError for a malformed copy, or if there
    is none at all.
    """
    data = Path(data_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    names: set[str] = set()
    notes: dict[str, str] = {}
    _write_mmlu(data, folder, task_root, names, notes)
    for task in _QUESTION_TASKS:
        _write_question_task(task, data, folder, task_root, names, notes)
    if not names:
        raise DataError(
            f"data_dir={str(data)!r} holds no task data: neither mmlu/test/*_test.csv, "
            "cais/mmlu/<subject>/test-*.parquet nor lm_tasks/<task>.jsonl (docs/evaluation.md has "
            "the layouts); leave --data_dir out to use the hub (the environment variable "
            "MARLIN_DATA_DIR names a folder for texts alone)"
        )
    return LocalTasks(folder, frozenset(names), notes)


# ---- MMLU ---------------------------------------------------------------------------------------


def _write_mmlu(
    data: Path, folder: Path, task_root: Path, names: set[str], notes: dict[str, str]
) -> None:
    defaults = task_root / "mmlu" / "default"
    subjects = {}
    for file in sorted(defaults.glob("mmlu_*.yaml")):
        subjects[_plain_yaml(file)["dataset_name"]] = file
    present: dict[str, str] = {}  # subject → category tag
    lacking = []
    for subject, file in subjects.items():
        files = {split: _mmlu_files(data, folder, subject, split) for split in ("test", "dev")}
        if not files["test"]:
            continue
        if not files["dev"]:
            lacking.append(subject)
            continue
        _write_task(folder, file, f"mmlu_{subject}", files)
        names.add(f"mmlu_{subject}")
        present[subject] = _plain_yaml(file)["tag"]
    if lacking:
        log.warning("mmlu: no dev (few-shot) questions for %s: left out", ", ".join(lacking))
    if not present:
        return
    tags = set(present.values())
    categories = []
    for file in sorted(defaults.glob("_mmlu_*.yaml")):
        group = _plain_yaml(file)
        if set(group["task"]) & tags:
            _write_yaml(folder / file.name, group)
            categories.append(group["group"])
            names.add(group["group"])
    group = _plain_yaml(defaults / "_mmlu.yaml")
    group["task"] = categories
    if len(present) < len(subjects):
        group["group_alias"] = f"mmlu (partial: {len(present)} of {len(subjects)} subjects)"
        notes["mmlu"] = (
            f"partial: local data has {len(present)} of {len(subjects)} subjects; not comparable "
            "with published MMLU"
        )
    _write_yaml(folder / "_mmlu.yaml", group)
    names |= {"mmlu", *tags}


def _mmlu_files(data: Path, folder: Path, subject: str, split: str) -> list[str]:
    """Data files of one subject and split: a parquet copy as on the hub, or a converted CSV."""
    for root in (data / "cais" / "mmlu", data / "mmlu"):
        found = sorted((root / subject).glob(f"{split}-*.parquet"))
        if found:
            return [str(file.resolve()) for file in found]
    file = data / "mmlu" / split / f"{subject}_{split}.csv"
    if not file.is_file():
        return []
    target = folder / "data" / f"{subject}_{split}.jsonl"
    _write_jsonl(target, mmlu_questions(file))
    return [str(target.resolve())]


_ANSWERS = {key: i for keys in ("0123", "ABCD") for i, key in enumerate(keys)}


def mmlu_questions(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a CSV: question, four choices, answer 0..3 or A..D; a header is skipped."""
    with file.open(encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.reader(stream), 1):
            if number == 1 and row and row[-1].strip().lower() == "answer":
                continue
            if not row:
                continue
            answer = row[-1].strip().upper()
            index = _ANSWERS.get(answer)
            if len(row) != 6 or index is None:
                raise DataError(
                    f"{file}, row {number}: expected question, four choices and an answer (0..3 or "
                    f"A..D), found {len(row)} fields ending in {answer[:20]!r}"
                )
            yield {"question": row[0], "choices": row[1:5], "answer": index}


# ---- questions as JSON lines --------------------------------------------------------------------


@dataclass(frozen=True)
class _QuestionTask:
    """A task with a JSON-lines copy (validation questions) or a parquet copy as on the hub."""

    name: str
    yaml: str  # below lm-eval's task folder
    hub: str  # below data_dir: where a copy of the hub's repository lies
    rows: Callable[[list[dict[str, Any]]], Iterator[dict[str, Any]]]  # → the hub's columns


def _arc_rows(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """From {query, choices, gold}, or one line per answer: {question, answer, label 0/1}."""
    if "query" not in records[0]:
        records = list(_join_answers(records))
    for record in records:
        letters = [chr(ord("A") + i) for i in range(len(record["choices"]))]
        yield {
            "question": record["query"].removeprefix("Question: "),
            "choices": {"text": record["choices"], "label": letters},
            "answerKey": letters[record["gold"]],
        }


def _join_answers(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Collect consecutive lines of one question."""
    current: dict[str, Any] | None = None
    for record in records:
        if current is None or current["query"] != record["question"]:
            if current is not None:
                yield current
            current = {"query": record["question"], "choices": [], "gold": 0}
        if int(record["label"]) == 1:
            current["gold"] = len(current["choices"])
        current["choices"].append(record["answer"])
    if current is not None:
        yield current


def _piqa_rows(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in records:
        first, second = record["choices"]
        goal = record["query"].removeprefix("Question: ")
        yield {"goal": goal, "sol1": first, "sol2": second, "label": record["gold"]}


def _winogrande_rows(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """From two contexts that differ in their last words, and the text that follows both."""
    for record in records:
        first, second = record["context_options"]
        words, others = first.split(" "), second.split(" ")
        shared = 0
        while shared < min(len(words), len(others)) - 1 and words[shared] == others[shared]:
            shared += 1
        before = " ".join(words[:shared])
        yield {
            "sentence": f"{before} _ {record['continuation']}".lstrip(),
            "option1": " ".join(words[shared:]),
            "option2": " ".join(others[shared:]),
            "answer": str(record["gold"] + 1),
        }


_QUESTION_TASKS = (
    _QuestionTask("arc_easy", "arc/arc_easy.yaml", "allenai/ai2_arc/ARC-Easy", _arc_rows),
    _QuestionTask(
        "arc_challenge", "arc/arc_challenge.yaml", "allenai/ai2_arc/ARC-Challenge", _arc_rows
    ),
    _QuestionTask("piqa", "piqa/piqa.yaml", "baber/piqa", _piqa_rows),
    _QuestionTask(
        "winogrande",
        "winogrande/default.yaml",
        "allenai/winogrande/winogrande_xl",
        _winogrande_rows,
    ),
)


def _write_question_task(
    task: _QuestionTask,
    data: Path,
    folder: Path,
    task_root: Path,
    names: set[str],
    notes: dict[str, str],
) -> None:
    copy = data / task.hub
    files = {s: sorted(copy.glob(f"{s}-*.parquet")) for s in ("train", "validation", "test")}
    if any(files.values()):
        found = {split: [str(f.resolve()) for f in paths] for split, paths in files.items()}
        _write_task(folder, task_root / task.yaml, task.name, found)
        names.add(task.name)
        return
    candidates = (data / "lm_tasks" / f"{task.name}.jsonl", data / f"{task.name}.jsonl")
    source = next((file for file in candidates if file.is_file()), None)
    if source is None:
        return
    target = folder / "data" / f"{task.name}_validation.jsonl"
    try:
        with source.open(encoding="utf-8") as stream:
            records = [json.loads(line) for line in stream if line.strip()]
        _write_jsonl(target, task.rows(records))
    except (json.JSONDecodeError, KeyError, IndexError, ValueError, TypeError) as error:
        raise DataError(
            f"{source} does not hold {task.name} questions as docs/evaluation.md describes: "
            f"{type(error).__name__} {error}"
        ) from error
    _write_task(folder, task_root / task.yaml, task.name, {"validation": [str(target.resolve())]})
    names.add(task.name)
    if task.name.startswith("arc"):
        notes[task.name] = (
            f"questions of {source.name}, which may not be the split of published numbers"
        )


# ---- files --------------------------------------------------------------------------------------


def _write_task(folder: Path, original: Path, name: str, files: dict[str, list[str]]) -> None:
    files = {split: paths for split, paths in files.items() if paths}
    parquet = all(path.endswith(".parquet") for paths in files.values() for path in paths)
    overlay: dict[str, Any] = {
        "include": str(original),
        "task": name,
        "dataset_path": "parquet" if parquet else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
    }
    for key, split in (("training", "train"), ("validation", "validation"), ("test", "test")):
        if split not in files:
            overlay[f"{key}_split"] = None
    _write_yaml(folder / f"{name}.yaml", overlay)


def _plain_yaml(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _write_yaml(file: Path, content: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _write_jsonl(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
