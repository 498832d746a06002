"""lm-eval with packed checkpoints and local task data, through its public registry and parser.

`MarlinLM` is the model class "marlin"; importing this module registers it. lm-eval discovers no
third-party models by itself, so eval/eval.py has its command with the import done, twice: `lm_eval`
is nothing else, `marlin-eval` has our options too.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import get_model, register_model
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.models.huggingface import HFLM

from eval import loading
from eval.report import TaskResult
from eval.tasks import LocalTasks, write_overlays
from marlin_kernel.errors import ConfigError, DataError

log = logging.getLogger(__name__)

TASK_ROOT = Path(lm_eval.tasks.__file__).parent
HF_NAMES = ("hf", "hf-auto", "huggingface")


@register_model("marlin")
class MarlinLM(HFLM):
    """A packed checkpoint (or a plain folder, hub name or GGUF file) as an lm-eval model.

    model_args: pretrained (path), tokenizer (path; default: pretrained), dtype, verify, and those
    of HFLM that concern evaluation (batch_size, max_length, add_bos_token, ...). Raises
    CheckpointError if a packed checkpoint's layers were not built.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: Any = None,
        device: str | None = None,
        dtype: str | None = "auto",
        verify: bool = False,
        **kwargs: Any,
    ) -> None:
        # lm-eval's command line asks for cuda:0 unless told otherwise, GPU or not.
        if (
            device is not None
            and device.startswith("cuda")
            and not loading.torch.cuda.is_available()
        ):
            log.warning("device=%s, but torch sees no GPU: evaluating on the CPU", device)
            device = "cpu"
        model = loading.load(
            pretrained,
            device=loading.choose_device(device),
            dtype=loading.parse_dtype(dtype),
            verify=verify,
        )
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = loading.load_tokenizer(tokenizer, pretrained)
        unknown = sorted(set(kwargs) - set(inspect.signature(HFLM.__init__).parameters))
        if unknown:
            log.warning("model_args: %s do not apply to model marlin: ignored", ", ".join(unknown))
        super().__init__(pretrained=model, tokenizer=tokenizer, **kwargs)
        self.pretrained = str(pretrained)  # for lm-eval's record of the run

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's description of the model, without asking the hub about a local path."""
        return {
            "model_num_parameters": self._model.num_parameters(),
            "model_dtype": str(self._model.dtype),
            "model_revision": self.revision,
            "model_sha": "",
        }


@dataclass(frozen=True)
class TaskRun:
    """Results of one lm-eval run, and where lm-eval wrote them."""

    results: tuple[TaskResult, ...]
    file: Path | None
    seconds: float


def run_parser() -> argparse.ArgumentParser:
    """lm-eval's own parser of `lm-eval run`, to which our options are added by the caller."""
    return HarnessCLI()._subparsers.choices["run"]


def check_arguments(args: argparse.Namespace, *, look_up_tasks: bool) -> None:
    """Raise ConfigError for what lm-eval would refuse later, after a model was loaded.

    look_up_tasks: task names too, which takes lm-eval some seconds; it does so itself before it
    loads a model.
    """
    if args.limit is not None and args.limit <= 0:
        raise ConfigError(f"limit={args.limit:g} must be a number of questions or a share above 0")
    # lm-eval adds to the mapping that it is given
    args = argparse.Namespace(**{**vars(args), "model_args": dict(args.model_args)})
    try:
        get_model(args.model or "hf")
        config = EvaluatorConfig.from_cli(args)
        if look_up_tasks:
            config.process_tasks()
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(_refusal(error)) from error


def _refusal(error: Exception) -> str:
    hint = "; `python eval/eval.py ls tasks` lists them" if _no_such_task(error) else ""
    return f"lm-eval: {error}{hint}"


def _no_such_task(error: Exception) -> bool:
    return str(error).startswith("Tasks not found")


def run_tasks(
    args: argparse.Namespace, *, data_dir: str | None = None, results_dir: Path | None = None
) -> TaskRun:
    """Run lm-eval as its own command line does, on parsed arguments of its own parser.

    data_dir: local copies of task data. results_dir: where lm-eval writes its results if
    --output_path does not say; None leaves them unwritten and the returned results empty.
    Raises DataError if a task's local copy is malformed or none was found, ConfigError for a task
    that lm-eval does not know.
    """
    args = argparse.Namespace(**vars(args))
    if not args.output_path and results_dir is not None:
        args.output_path = str(results_dir)
    with tempfile.TemporaryDirectory(prefix="marlin-eval-") as scratch:
        local = None
        if data_dir is not None:
            local = write_overlays(data_dir, Path(scratch) / "tasks", TASK_ROOT)
            _say_what_is_local(args.tasks, local)
            # Overlays replace lm-eval's files of the same name on purpose.
            logging.getLogger("lm_eval.tasks._index").setLevel(logging.ERROR)
            extra = [args.include_path] if args.include_path else []
            args.include_path = [*extra, str(local.folder)]
        start = time.time()
        try:
            args.func(args)
        except ConnectionError as error:
            raise DataError(
                f"tasks={args.tasks}: their data is neither in data_dir={data_dir!r} nor could the "
                f"hub be reached ({str(error)[:200]}); docs/evaluation.md has the local layouts"
            ) from error
        except ValueError as error:
            if not _no_such_task(error):
                raise
            raise ConfigError(_refusal(error)) from error
        seconds = time.time() - start
    file = _newest_results(args.output_path, start)
    results = () if file is None else read_results(file, local.notes if local else {})
    return TaskRun(results, file, seconds)


def read_results(file: Path, notes: dict[str, str]) -> tuple[TaskResult, ...]:
    """Task and group results of lm-eval's aggregated JSON; the first metric of each first."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return collect_results(content, notes)


def collect_results(content: dict[str, Any], notes: dict[str, str]) -> tuple[TaskResult, ...]:
    """Rows of lm-eval's results dictionary. Subtasks of a group are marked by `group`."""
    parents = {
        child: group
        for group, children in content.get("group_subtasks", {}).items()
        for child in children
    }
    rows = []
    for task, metrics in content.get("results", {}).items():
        higher = content.get("higher_is_better", {}).get(task, {})
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, (int, float)) or not filtered:
                continue
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            samples = content.get("n-samples", {}).get(task, {}).get("effective")
            if samples is None:  # a group: the sum of its tasks
                samples = metrics.get("sample_len")
            rows.append(
                TaskResult(
                    task=task,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                    examples=samples,
                    fewshot=_fewshot(content, task),
                    group=parents.get(task),
                    higher_is_better=higher.get(metric, True) is not False,
                    note=notes.get(task),
                )
            )
    return tuple(rows)


def _fewshot(content: dict[str, Any], task: str) -> int | None:
    """Examples in the prompts of a task; of a group, if those of all its tasks are as many."""
    shots = content.get("n-shot", {})
    if task in shots:
        return shots[task]
    found = {_fewshot(content, child) for child in content.get("group_subtasks", {}).get(task, ())}
    return found.pop() if len(found) == 1 else None


def use_packed(args: argparse.Namespace, checkpoint: str, *, verify: bool) -> argparse.Namespace:
    """Point parsed arguments at a packed checkpoint, keeping the tokenizer of the original.

    Raises ConfigError for a model class that cannot read it.
    """
    if args.model not in (None, "marlin", *HF_NAMES):
        raise ConfigError(
            f"model={args.model!r} cannot read a packed checkpoint; use --model hf or marlin"
        )
    given = dict(args.model_args or {})
    original = given.pop("pretrained", None)
    given.pop("gguf_file", None)
    has_tokenizer = any(Path(checkpoint).expanduser().glob("tokenizer*"))
    if original and not has_tokenizer and "tokenizer" not in given:
        given["tokenizer"] = original
    given.update(pretrained=checkpoint, verify=verify)
    return argparse.Namespace(**{**vars(args), "model": "marlin", "model_args": given})


def _say_what_is_local(tasks: list[str], local: LocalTasks) -> None:
    for task in tasks:
        if task in local.names:
            log.info(
                "%s: local data%s", task, f" ({local.notes[task]})" if task in local.notes else ""
            )
        else:
            log.warning("%s: no local copy in data_dir, lm-eval will ask the hub", task)
    for name, note in local.notes.items():
        if name in tasks:
            log.warning("%s: %s", name, note)


def _newest_results(output_path: str | None, start: float) -> Path | None:
    """The aggregated results that lm-eval wrote since `start` (its file names carry the time)."""
    if not output_path:
        return None
    path = Path(output_path)
    if path.suffix == ".json":
        found = path.parent.glob(f"{path.stem}_*.json")
    else:
        found = path.rglob("results_*.json")
    fresh = [file for file in found if file.stat().st_mtime >= start - 1]
    return max(fresh, key=lambda file: file.stat().st_mtime, default=None)
