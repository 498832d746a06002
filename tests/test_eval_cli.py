"""Command line: flags over recipe over defaults, and errors before any long work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eval_cases import save_packed, save_tiny

from eval import cli
from eval.config import EvalConfig, resolve
from eval.loading import row_name
from marlin_kernel.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(params=["with lm-eval", "without lm-eval"])
def either(request, monkeypatch):
    if request.param == "without lm-eval":
        monkeypatch.setattr(cli, "has_lm_eval", lambda: False)
    elif not cli.has_lm_eval():
        pytest.skip("lm-eval is not installed (extra [eval])")


def test_flags_override_the_recipe(either, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("perplexity: [c4, pydoc]\nseqlen: 512\ntasks: mmlu,piqa\n")
    config, args = cli.parse(
        ["--config", str(recipe), "--perplexity", "pydoc,red", "wikitext2", "--model_args",
         "pretrained=x,dtype=float32"]
    )  # fmt: skip
    assert config.perplexity == ("pydoc", "red", "wikitext2")
    assert config.seqlen == 512
    assert args.tasks == ["mmlu", "piqa"]
    assert args.model_args == {"pretrained": "x", "dtype": "float32"}


def test_recipes_of_the_project_are_valid():
    if not cli.has_lm_eval():
        pytest.skip("lm-eval is not installed (extra [eval])")
    recipes = sorted((ROOT / "configs" / "eval").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        config, _ = cli.parse(["--config", str(recipe)])
        assert config.perplexity


def test_lm_evals_own_options_are_accepted():
    if not cli.has_lm_eval():
        pytest.skip("lm-eval is not installed (extra [eval])")
    _, args = cli.parse(
        "--model hf --model_args pretrained=a --tasks mmlu --num_fewshot 5 --batch_size auto:4 "
        "--limit 10 --apply_chat_template --seed 1,2,3,4 --gen_kwargs temperature=0 "
        "--output_path out --log_samples --include_path x --write_out --cache_requests true".split()
    )
    assert args.num_fewshot == 5 and args.seed == [1, 2, 3, 4] and args.apply_chat_template is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "nothing to do: give --tasks"),
        ("--perplexity pydoc", "no model: give --model_args"),
        ("--perplexity pydoc --seqlen 1 --model_args pretrained=x", "seqlen=1 must be"),
        ("--perplexity pydoc --marlin_checkpoint /nowhere", "marlin_checkpoint='/nowhere'"),
        ("--perplexity pydoc --data_dir /nowhere", "data_dir='/nowhere' is not an existing"),
        ("--perplexity nothing --model_args pretrained=x", "text source 'nothing'"),
        ("--perplexity pydoc --model_args pretrained=x,dtype=int4", "dtype='int4'"),
        ("--perplexity pydoc --model_args pretrained=./gone", "./gone"),
        ("--perplexity pydoc --device warp --model_args pretrained=x", "device='warp'"),
        ("--config /nowhere.yaml", "no such recipe"),
        ("--perplexity pydoc --baseline /nowhere.json", "baseline='/nowhere.json'"),
        (f"--perplexity pydoc --report {__file__}", "is a file; give a folder for the report"),
        (
            "--perplexity pydoc --model_args pretrained=x,revision=old",
            "perplexity does not know revision",
        ),
        (f"--perplexity pydoc --marlin_checkpoint {ROOT}", "holds no packed layers"),
    ],
)
def test_errors_name_the_option_and_the_way_out(either, flags, message, capsys):
    assert cli.main(flags.split()) == 2
    found = capsys.readouterr().err
    assert message in found and "Traceback" not in found


def test_unknown_recipe_keys_are_rejected(either, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("perplexty: [c4]\n")
    assert cli.main(["--config", str(recipe)]) == 2
    assert "unknown keys ['perplexty']" in capsys.readouterr().err


def test_tasks_without_lm_eval_name_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(cli, "has_lm_eval", lambda: False)
    assert cli.main(["--tasks", "mmlu", "--model_args", "pretrained=x"]) == 2
    assert "pip install 'marlin-gptq[eval]'" in capsys.readouterr().err


def test_perplexity_without_lm_eval(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "has_lm_eval", lambda: False)
    plain, packed = save_tiny(tmp_path / "plain"), save_packed(tmp_path / "packed")
    code = cli.main(
        f"--model_args pretrained={plain} --marlin_checkpoint {packed} --perplexity pydoc "
        f"--seqlen 64 --max_tokens 256 --device cpu --report {tmp_path}/report".split()
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "| **packed INT4** |" in printed.out and "KL pydoc" in printed.out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["rows"][1]["perplexity"][0]["tokens"] == 4 * 63
    assert [row["dtype"] for row in report["rows"]] == ["float32", None]

    code = cli.main(  # alone, beside the rows of the earlier report
        f"--model marlin --model_args pretrained={packed} --perplexity pydoc --seqlen 64 "
        f"--max_tokens 256 --device cpu --baseline {tmp_path}/report/report.json".split()
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "| **original** |" in printed.out


def test_seqlen_beyond_the_context_is_refused(tmp_path, capsys):
    plain = save_tiny(tmp_path / "plain")
    code = cli.main(
        f"--model_args pretrained={plain} --perplexity pydoc --seqlen 999 --device cpu".split()
    )
    assert code == 2
    assert "seqlen=999 exceeds the model's context of 128" in capsys.readouterr().err


def test_the_tokenizer_asked_for_is_used(tmp_path, capsys):
    plain = save_tiny(tmp_path / "plain")
    code = cli.main(
        f"--model_args pretrained={plain},tokenizer={tmp_path}/gone --perplexity pydoc "
        "--seqlen 64 --max_tokens 128 --device cpu".split()
    )
    assert code == 2
    assert "no tokenizer found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model warp --model_args pretrained=x", "'warp', but no model for this name found"),
        ("--model_args pretrained=x --limit -3", "limit=-3 must be"),
        ("--model_args pretrained=x --log_samples", "Specify --output_path"),
        ("--model_args pretrained=x --limit 2 --samples {}", "--limit must be None"),
        (
            "--model_args pretrained=x --fewshot_as_multiturn",
            "`apply_chat_template` must be set",
        ),
    ],
)
def test_what_lm_eval_refuses_is_one_line(flags, message, capsys):
    if not cli.has_lm_eval():
        pytest.skip("lm-eval is not installed (extra [eval])")
    flags = flags.format('{"piqa":[0]}') if "{}" in flags else flags
    assert cli.main(f"{flags} --tasks piqa".split()) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ") or "\nerror: " in found
    assert message in found and "Traceback" not in found


def test_perplexity_is_shown_before_tasks_start(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise DataError("the hub could not be reached")

    monkeypatch.setattr(cli, "_check_tasks", lambda *_: None)
    monkeypatch.setattr(cli, "_run_tasks", fail)
    plain = save_tiny(tmp_path / "plain")
    code = cli.main(
        f"--model_args pretrained={plain} --perplexity pydoc --seqlen 64 --max_tokens 128 "
        "--device cpu --tasks piqa".split()
    )
    printed = capsys.readouterr()
    assert code == 2 and "error: the hub" in printed.err
    assert "| **original** |" in printed.out and "pydoc: " in printed.out


def test_names_of_quantized_folders(tmp_path):
    def name(report=None, **stored):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stored}))
        return row_name(str(tmp_path), report and {"config": report})

    assert name() is None
    assert name(quant_method="gptq", bits=8) == "GPTQ INT8"
    assert name(quant_method="awq", bits=4) == "AWQ INT4"
    assert name(quant_method="marlin", bits=4, weight_type="nvfp4") == "packed nvfp4"
    assert name(quant_method="marlin", bits=4, weight_type="uint4b8") == "packed INT4"
    group = {"weights": {"num_bits": 8, "type": "int"}}
    assert name(quant_method="compressed-tensors", config_groups={"g": group}) == "packed INT8"
    assert name({"nearest": True, "wbits": 4}, quant_method="marlin") == "RTN INT4"
    assert name({"wbits": 16, "sparsity": "2:4"}) == "SparseGPT 2:4"
    assert name({"wbits": 4, "sparsity": "2:4"}, quant_method="marlin") == "GPTQ INT4 2:4"


def test_resolve_rejects_wrong_types():
    with pytest.raises(ConfigError, match="max_tokens='many'"):
        resolve({"max_tokens": "many"})
    assert resolve({"perplexity": None}) == EvalConfig()
