"""lm-eval on local copies of task data, with the packed model class."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marlin_kernel.errors import CheckpointError, DataError
from tests.eval_cases import VOCABULARY, save_packed, save_tiny, write_jsonl, write_mmlu

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra [eval])")

from eval.harness import TASK_ROOT, MarlinLM, collect_results  # noqa: E402
from eval.tasks import write_overlays  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "out"
    return save_packed(folder, max_position_embeddings=1024)


def run_local(model, overlays, tasks, **options):
    """simple_evaluate on overlays only: without lm-eval's index of all tasks it is quick."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(overlays.folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options
    )


def test_mmlu_group_from_csv_says_that_it_is_partial(tmp_path, packed):
    write_mmlu(tmp_path / "data")
    overlays = write_overlays(tmp_path / "data", tmp_path / "tasks", TASK_ROOT)
    assert "partial: local data has 2 of 57" in overlays.notes["mmlu"]
    model = MarlinLM(str(packed), device="cpu", batch_size=4)
    found = run_local(model, overlays, ["mmlu"], num_fewshot=2, log_samples=True)
    assert set(found["results"]) >= {"mmlu", "mmlu_virology", "mmlu_anatomy", "mmlu_stem"}
    assert found["n-samples"]["mmlu_virology"]["effective"] == 3
    prompt = found["samples"]["mmlu_virology"][0]["arguments"][0][0]
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about virology.\n\n"
        "virology question 0?\nA. one\nB. two\nC. 3\nD. 4\nAnswer: A\n\n"
    )
    assert prompt.endswith("virology question 0?\nA. one\nB. two\nC. 3\nD. 4\nAnswer:")
    rows = collect_results(found, overlays.notes)
    group = next(row for row in rows if row.task == "mmlu")
    assert group.note == overlays.notes["mmlu"] and group.metric == "acc"
    single = next(row for row in rows if row.task == "mmlu_anatomy")
    assert single.examples == 3 and single.fewshot == 2 and single.group is not None


def test_all_subjects_are_not_partial(tmp_path):
    names = [p.stem.removeprefix("mmlu_") for p in (TASK_ROOT / "mmlu/default").glob("mmlu_*.yaml")]
    write_mmlu(tmp_path / "data", subjects=names, questions=1)
    overlays = write_overlays(tmp_path / "data", tmp_path / "tasks", TASK_ROOT)
    assert not overlays.notes
    assert {"mmlu", "mmlu_stem", "mmlu_humanities", "mmlu_other"} <= overlays.names


def test_parquet_copy_as_on_the_hub(tmp_path, packed):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    folder = tmp_path / "data/cais/mmlu/virology"
    folder.mkdir(parents=True)
    rows = {"question": ["q?"] * 5, "choices": [list("wxyz")] * 5, "answer": [0, 1, 2, 3, 0]}
    for split in ("test", "dev"):
        parquet.write_table(pyarrow.table(rows), folder / f"{split}-00000-of-00001.parquet")
    overlays = write_overlays(tmp_path / "data", tmp_path / "tasks", TASK_ROOT)
    model = MarlinLM(str(packed), device="cpu")
    found = run_local(model, overlays, ["mmlu_virology"], limit=2)
    assert found["results"]["mmlu_virology"]["acc,none"] in (0.0, 0.5, 1.0)


def test_question_files_give_the_standard_prompts(tmp_path, packed):
    data = tmp_path / "lm_tasks"
    write_jsonl(
        data / "arc_easy.jsonl",
        [{"query": "Question: Why?", "choices": ["a", "b", "c"], "gold": 2}],
    )
    write_jsonl(
        data / "arc_challenge.jsonl",
        [
            {"question": "First?", "answer": "yes", "label": 0},
            {"question": "First?", "answer": "no", "label": 1},
            {"question": "Second?", "answer": "x", "label": 1},
            {"question": "Second?", "answer": "y", "label": 0},
        ],
    )
    write_jsonl(
        data / "piqa.jsonl",
        [{"query": "Question: Open it.", "choices": ["turn", "push"], "gold": 1}],
    )
    write_jsonl(
        data / "winogrande.jsonl",
        [
            {
                "context_options": ["Ann told Bea that Ann", "Ann told Bea that Bea"],
                "continuation": "was late.",
                "gold": 1,
            }
        ],
    )
    overlays = write_overlays(tmp_path, tmp_path / "tasks", TASK_ROOT)
    model = MarlinLM(str(packed), device="cpu")
    names = ["arc_easy", "arc_challenge", "piqa", "winogrande"]
    samples = run_local(model, overlays, names, log_samples=True)["samples"]

    def texts(name, index=0):
        sample = next(s for s in samples[name] if s["doc_id"] == index)
        return [tuple(pair) for pair in sample["arguments"]], str(sample["target"])

    easy = "Question: Why?\nAnswer:"
    assert texts("arc_easy") == ([(easy, " a"), (easy, " b"), (easy, " c")], "2")
    assert texts("arc_challenge", 0)[1] == "1" and texts("arc_challenge", 1)[1] == "0"
    assert texts("piqa")[0][1] == ("Question: Open it.\nAnswer:", " push")
    arguments, _ = texts("winogrande")
    assert arguments == [
        ("Ann told Bea that Ann", " was late."),
        ("Ann told Bea that Bea", " was late."),
    ]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("mmlu/test/virology_test.csv", "q,a,b,c,d,E\n", "row 1: expected question"),
        ("mmlu/test/virology_test.csv", "q,a,b,c,d,12\n", "row 1: .* ending in '12'"),
        ("mmlu/test/virology_test.csv", "q,a,b,c,d,0\n\nq,a,b,0\n", "row 3: .* found 4 fields"),
        ("lm_tasks/piqa.jsonl", '{"x": 1}\n', "does not hold piqa questions"),
        ("other.txt", "", "holds no task data"),
    ],
)
def test_malformed_copies(tmp_path, file, content, message):
    path = tmp_path / "data" / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        write_overlays(tmp_path / "data", tmp_path / "tasks", TASK_ROOT)


def test_fails_when_the_quantizer_was_not_applied(tmp_path, packed, monkeypatch):
    """transformers alone leaves random weights; a loader that does so must be noticed."""
    from eval import loading
    from marlin_kernel import hf

    plain = save_tiny(tmp_path / "plain")
    monkeypatch.setattr(hf, "load_model", lambda *_, **__: hf_plain(plain))

    def hf_plain(folder):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder)

    with pytest.raises(CheckpointError, match="none of its packed layers is in the model"):
        loading.load(str(packed))


def test_a_weight_file_cut_short_is_named(tmp_path, packed):
    from eval import loading

    cut = tmp_path / "cut"
    shutil.copytree(packed, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:50_000])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        loading.load(str(cut))
    plain = save_tiny(tmp_path / "plain")
    assert loading.weights_dtype(str(plain)) == "float32" and not loading.weights_dtype(str(packed))
    (plain / "model.safetensors").write_bytes(b"\x20" + bytes(20))
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        loading.weights_dtype(str(plain))


def test_arguments_that_do_not_apply_are_named(packed, caplog):
    MarlinLM(str(packed), device="cpu", dtyp="float16", max_length=64)
    assert "model_args: dtyp do not apply" in caplog.text


def test_tokenizer_of_the_original_serves_a_folder_without_one(tmp_path, packed):
    plain = save_tiny(tmp_path / "plain")
    bare = tmp_path / "bare"
    shutil.copytree(packed, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    model = MarlinLM(str(bare), tokenizer=str(plain), device="cpu")
    assert len(model.tokenizer) == VOCABULARY


@pytest.mark.slow
def test_command_line_end_to_end(tmp_path, packed):
    """The README's command, from another directory, without a hub, on local MMLU."""
    write_mmlu(tmp_path / "data", questions=2)
    plain = save_tiny(tmp_path / "plain", max_position_embeddings=1024)
    command = [
        sys.executable, str(ROOT / "eval" / "eval.py"),
        "--model", "hf", "--model_args", f"pretrained={plain}", "--tasks", "mmlu",
        "--marlin_checkpoint", str(packed), "--data_dir", str(tmp_path / "data"),
        "--perplexity", "pydoc", "--seqlen", "64", "--max_tokens", "256",
        "--device", "cpu", "--limit", "1", "--report", "report", "--verify",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mmlu (partial: 2 of 57 subjects)" in done.stdout
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["original", "packed INT4"]
    tasks = {t["task"]: t for t in report["rows"][1]["tasks"]}
    assert tasks["mmlu"]["note"].startswith("partial")
    assert report["rows"][1]["perplexity"][0]["kl"] > 0
    assert (tmp_path / "report" / "eval_config.yaml").is_file()


@pytest.mark.slow
def test_unknown_tasks_are_refused_before_a_model_is_loaded(tmp_path, packed, capsys):
    from eval import cli

    for more in ([], ["--perplexity", "pydoc"]):
        flags = ["--model_args", f"pretrained={tmp_path}", "--tasks", "list", *more]
        assert cli.main(flags) == 2
        assert "Tasks not found: list; `python eval/eval.py ls tasks`" in capsys.readouterr().err


@pytest.mark.slow
def test_lm_evals_own_command_knows_packed_checkpoints(tmp_path, packed):
    """`lm_eval --model marlin`, as pip installs it."""
    scripts = (ROOT / "pyproject.toml").read_text()
    assert 'lm_eval = "eval.eval:lm_eval"' in scripts
    write_jsonl(tmp_path / "rows.jsonl", [{"q": f"one {i}", "c": ["a", "b"]} for i in range(3)])
    (tmp_path / "letters.yaml").write_text(
        f"""
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {tmp_path / "rows.jsonl"}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
    )
    command = [
        sys.executable, "-c", "from eval.eval import lm_eval; lm_eval()",
        "--model", "marlin", "--model_args", f"pretrained={packed}", "--device", "cpu",
        "--include_path", str(tmp_path), "--tasks", "letters",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1200,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "letters" in done.stdout and "marlin (" in done.stdout
