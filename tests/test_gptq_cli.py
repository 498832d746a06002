"""The command line end to end on tiny folders: what is written is what was computed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptq.calibration import sample_documents, sample_windows
from gptq.cli import main
from marlin_kernel import DataError, open_checkpoint, read_manifest
from marlin_kernel.checkpoint import packed_scheme, read_layer, read_probe
from marlin_kernel.hf import load_model, probe_logits
from tests.cases import same_layer
from tests.gptq_models import SOURCES, VOCABULARY, Source, prose, write_source, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
FILE = "model.safetensors"
IDS = torch.arange(3, 40) * 11 % VOCABULARY


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Text files: calibration.txt, calibration.jsonl (other documents), heldout.txt, and
    tiny.txt."""
    folder = tmp_path_factory.mktemp("data")
    write_text(folder / "calibration.txt")
    write_text(folder / "calibration.jsonl", seed=1)
    write_text(folder / "heldout.txt", seed=2)
    write_text(folder / "tiny.txt", documents=2)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for name, source in SOURCES.items():
        found[name] = tmp_path_factory.mktemp(name)
        write_source(found[name], source)
    return found


@pytest.fixture(scope="module")
def llama(sources) -> Path:
    return sources["llama"]


@pytest.fixture(scope="module")
def packed(llama, data, tmp_path_factory) -> Path:
    """The default method on the llama, group size 32."""
    out = tmp_path_factory.mktemp("packed") / "out"
    assert quantize(llama, data, out) == 0
    return out


def arguments(source: Path, data: Path, *flags: str) -> list[str]:
    """Of a small run on the calibration text; later flags override."""
    few = ["--wbits", "4", "--groupsize", "32", "--nsamples", "8", "--seqlen", "32"]
    return [str(source), *few, "--dataset", str(data / "calibration.txt"), *flags]


def quantize(source: Path, data: Path, out: Path, *flags: str) -> int:
    return main(arguments(source, data, "--save", str(out), *flags))


def layers(folder: Path) -> dict:
    checkpoint = open_checkpoint(folder)
    scheme = packed_scheme(checkpoint)
    return {name: read_layer(checkpoint, scheme, name) for name in scheme.modules}


@torch.no_grad()
def logits(model) -> Tensor:
    return model(IDS[None], use_cache=False).logits[0].float()


def original(source: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def fake_quantized(source: Path, packed: Path):
    """The source model with the packed layers' values as plain weights."""
    model = original(source)
    for name, layer in layers(packed).items():
        model.get_submodule(name).weight.data = layer.dequantize().T.contiguous()
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- end to end ----------------------------------------------------------------------------------

RUNS = {
    "default": ("llama", ()),
    "partial groups": ("llama", ("--groupsize", "64")),
    "groups of 128": ("llama", ("--groupsize", "128")),
    "one group per column": ("llama", ("--groupsize", "-1")),
    "8 bits": ("llama", ("--wbits", "8")),
    "zero points": ("llama", ("--no-sym",)),
    "8 bits, zero points": ("llama", ("--wbits", "8", "--no-sym")),
    "moving groups": ("llama", ("--act-order", "--no-static-groups")),
    "moving partial groups": ("llama", ("--no-static-groups", "--groupsize", "64")),
    "moving groups, some layers of one group": (
        "llama", ("--no-static-groups", "--groupsize", "128")
    ),
    "no order": ("llama", ("--no-act-order",)),
    "plain": ("llama", (
        "--no-act-order", "--no-asymmetric", "--no-true-sequential", "--no_clip", "--refit", "0",
        "--sweeps", "0", "--no-signed_scales",
    )),
    "nearest": ("llama", ("--nearest",)),
    "skipped k and v": ("llama", ("--skip_gq",)),
    "tied, float32, sharded": ("llama-tied-sharded", ("--groupsize", "64")),
    "biases": ("llama-biases", ()),
    "sliding window": ("mistral-window", ()),
    "tied with biases": ("qwen2", ()),
    "some windows": ("qwen2-window", ()),
    "norms of heads": ("qwen3", ("--groupsize", "64")),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_loaded_model_equals_the_fake_quantized_one(case, sources, data, tmp_path):
    kind, flags = RUNS[case]
    source, out = sources[kind], tmp_path / "deep" / "out"
    assert quantize(source, data, out, *flags) == 0
    assert [p.name for p in out.parent.iterdir()] == ["out"]  # no unfinished run left
    loaded = load_model(out, verify=True)
    expected = logits(fake_quantized(source, out))
    assert relative(logits(loaded), expected) < 1e-3
    lost = relative(expected, logits(original(source)))
    assert lost < (0.02 if "8 bits" in case else 0.4)  # these are the weights of this model
    manifest = read_manifest(out)
    skipped = ("k_proj", "v_proj") if "skipped" in case else ()
    names = {
        name.removesuffix(".weight")
        for name in open_checkpoint(source)
        if "proj.weight" in name and name.split(".")[-2] not in skipped
    }
    assert set(manifest["layers"]) == names


def test_a_float32_source_passes_its_own_verification(sources, data, tmp_path):
    """Its unquantized tensors are rounded when stored: the probe must not take that for damage."""
    from safetensors.torch import save_file

    source = copied(sources["llama"], tmp_path / "source")
    tensors = {name: t.float() for name, t in load_file(source / FILE).items()}
    for name, tensor in tensors.items():
        tensors[name] = tensor * (1 + 5e-4 * torch.randn_like(tensor))
    save_file(tensors, source / FILE, {"format": "pt"})
    assert quantize(source, data, tmp_path / "out", "--skip_gq") == 0
    loaded = load_model(tmp_path / "out", verify=True)
    token_ids, stored = read_probe(tmp_path / "out")
    assert relative(probe_logits(loaded, token_ids), stored) < 1e-5


@pytest.mark.parametrize("flags", [(), ("--format", "gptq")], ids=["marlin", "gptq"])
def test_tensors_that_the_model_lacks_are_left_out(flags, llama, data, tmp_path, caplog):
    """Neither does transformers use them, nor could the packed folder be loaded with them."""
    from safetensors.torch import save_file

    source = copied(llama, tmp_path / "source")
    tensors = load_file(source / FILE)
    layer, norm = "model.layers.0.self_attn", "model.layers.2.input_layernorm.weight"
    own = {f"{layer}.q_proj.bias": torch.ones(96), norm: torch.ones(96)}
    buffers = {f"{layer}.rotary_emb.inv_freq": torch.ones(8)}  # which old checkpoints have
    save_file(tensors | own | buffers, source / FILE, {"format": "pt"})
    assert quantize(source, data, tmp_path / "out", *flags) == 0
    assert "2 tensors are none of a llama with this config.json, and are left out" in caplog.text
    assert all(name in caplog.text for name in own)
    loaded = load_model(tmp_path / "out", verify=True)
    assert relative(logits(loaded), logits(original(llama))) < 0.4
    assert not (own | buffers).keys() & set(open_checkpoint(tmp_path / "out"))


def test_unquantized_tensors_are_copied(sources, data, tmp_path):
    source = sources["qwen2"]
    assert quantize(source, data, tmp_path / "out", "--skip_gq") == 0
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    for name in before:
        linear = name.rpartition(".")[0]
        if "proj" not in name or linear.endswith(("k_proj", "v_proj")) or "bias" in name:
            assert torch.equal(before[name], after[name]), name
        else:
            assert name not in after, name


def test_skip_gq_is_for_grouped_queries_only(data, tmp_path):
    write_source(tmp_path / "source", Source(changes=(("num_key_value_heads", 6),)))
    assert quantize(tmp_path / "source", data, tmp_path / "out", "--skip_gq", "--nearest") == 0
    assert len(read_manifest(tmp_path / "out")["layers"]) == 14


def test_gptq_serves_better_than_rounding(llama, packed, data, tmp_path):
    """On text of the calibration's distribution, by the divergence from the original model."""
    from transformers import AutoTokenizer

    assert quantize(llama, data, tmp_path / "plain", "--nearest") == 0
    tokenizer = AutoTokenizer.from_pretrained(llama)
    texts = [tokenizer(t, return_tensors="pt").input_ids for t in prose(12, 40, seed=9)]

    @torch.no_grad()
    def log_probabilities(model) -> Tensor:
        return torch.cat([model(ids, use_cache=False).logits[0].log_softmax(-1) for ids in texts])

    wanted = log_probabilities(original(llama))
    kl = [
        float((wanted.exp() * (wanted - log_probabilities(load_model(folder)))).sum(-1).mean())
        for folder in (packed, tmp_path / "plain")
    ]
    assert kl[0] < 0.7 * kl[1]


@pytest.mark.parametrize("flags", [(), ("--no-sym",), ("--wbits", "8")], ids=["sym", "zeros", "8"])
def test_all_formats_decode_to_the_same_values(flags, llama, data, tmp_path):
    written = {}
    for fmt in ("marlin", "gptq", "compressed-tensors"):
        assert quantize(llama, data, tmp_path / fmt, "--format", fmt, *flags) == 0
        written[fmt] = layers(tmp_path / fmt)
    for name, layer in written["marlin"].items():
        assert all(same_layer(layer, other[name]) for other in written.values())
    config = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    version = "gptq_v2" if "--no-sym" in flags else "gptq"  # v1 has no zero point 0
    assert config["checkpoint_format"] == version
    first, *rest = (logits(load_model(tmp_path / fmt, verify=True)) for fmt in written)
    assert all(torch.equal(first, other) for other in rest)


def test_moving_groups_survive_both_formats(llama, data, tmp_path):
    for fmt in ("marlin", "gptq"):
        flags = ("--format", fmt, "--no-static-groups")
        assert quantize(llama, data, tmp_path / fmt, *flags) == 0
    ours, theirs = layers(tmp_path / "marlin"), layers(tmp_path / "gptq")
    assert all(layer.g_idx is not None for layer in ours.values())
    assert all(same_layer(layer, theirs[name]) for name, layer in ours.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(dtype, data, tmp_path):
    """--dtype governs activations; stored tensors keep the source's own type."""
    write_source(tmp_path / "source", Source(dtype=torch.bfloat16))
    out = tmp_path / "out"
    assert quantize(tmp_path / "source", data, out, "--dtype", dtype) == 0
    assert open_checkpoint(out)["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["config"]["dtype"] == dtype
    lost = relative(logits(load_model(out)), logits(original(tmp_path / "source")))
    assert lost < 0.4


# ---- what is written beside the tensors ----------------------------------------------------------


def strict_json(file: Path) -> dict:
    """Content of a JSON file that holds no NaN or Infinity, which other readers refuse."""

    def refuse(constant: str):
        raise AssertionError(f"{file.name} holds {constant}")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def test_report_has_a_row_per_linear(llama, packed):
    report = strict_json(packed / "quantization_report.json")
    rows = [row["name"] for row in report["layers"]]
    assert len(rows) == 14 and set(rows) == set(layers(packed))
    assert rows[:2] == [f"model.layers.0.self_attn.{x}_proj" for x in "qk"]
    expected = {
        "name", "in_features", "out_features", "loss", "relative_error", "relative_weight_error",
        "clip_mean", "clip_fraction", "damping", "damping_retries", "dead_inputs", "seconds",
        "peak_host_bytes", "peak_device_bytes", "refinement",
    }  # fmt: skip
    for row in report["layers"]:
        assert set(row) == expected and row["refinement"] is None
        assert 0 < row["relative_error"] < 0.3 and row["seconds"] > 0
        assert row["peak_host_bytes"] > 1 << 20
    assert report["source"]["path"] == str(llama) and len(report["source"]["sha256"]) == 64
    assert report["config"]["seqlen"] == 32 and report["config"]["nsamples"] == 8
    totals = report["totals"]
    sizes = [row["in_features"] * row["out_features"] for row in report["layers"]]
    assert totals["parameters_quantized"] == sum(sizes)
    assert 0 < totals["calibration_tokens"] <= 8 * 32
    spent = [totals[f"seconds_{part}"] for part in ("forward", "hessian", "solve")]
    assert all(s > 0 for s in spent) and sum(spent) <= totals["seconds"]
    weight_error = {
        name: relative(layer.dequantize().T, open_checkpoint(llama)[f"{name}.weight"].float())
        for name, layer in layers(packed).items()
    }
    for row in report["layers"]:
        assert row["relative_weight_error"] == pytest.approx(weight_error[row["name"]], rel=1e-3)


def test_report_names_the_commit_of_a_checkout(packed):
    found = strict_json(packed / "quantization_report.json")["environment"].get("commit")
    asked = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    assert found == (asked.stdout.strip() or None if (ROOT / ".git").exists() else None)


def test_report_of_nearest_holds_numbers_only(llama, data, tmp_path):
    assert quantize(llama, data, tmp_path / "out", "--nearest") == 0
    report = strict_json(tmp_path / "out" / "quantization_report.json")
    assert report["totals"]["calibration_tokens"] == 0
    assert all(row["relative_error"] > 0 for row in report["layers"])


def test_tokenizer_and_settings_come_along(llama, packed):
    from transformers import AutoTokenizer

    text = "the quick brown fox"
    assert AutoTokenizer.from_pretrained(packed)(text) == AutoTokenizer.from_pretrained(llama)(text)
    settings = read_manifest(packed)["settings"]
    assert settings["groupsize"] == 32 and settings["wbits"] == 4
    assert settings == strict_json(packed / "quantization_recipe.json")


def test_the_recipe_in_a_checkpoint_repeats_it(llama, packed, tmp_path):
    recipe = packed / "quantization_recipe.json"
    assert main([str(llama), "--config", str(recipe), "--save", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / FILE).read_bytes() == (packed / FILE).read_bytes()


def test_flags_override_the_recipe(llama, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("wbits: 8\ngroupsize: 64\nnearest: true\nsym: false\n")
    out = tmp_path / "out"
    flags = ["--config", str(recipe), "--groupsize", "32", "--sym", "--save", str(out)]
    assert main([str(llama), *flags]) == 0
    manifest = read_manifest(out)
    assert (manifest["weight_type"], manifest["group_size"]) == ("uint8b128", 32)


# ---- calibration text ----------------------------------------------------------------------------


def codes(folder: Path) -> Tensor:
    return torch.cat([layer.codes.reshape(-1) for layer in layers(folder).values()])


def test_seed_and_text_decide_the_codes_and_nothing_else(llama, packed, data, tmp_path):
    variants = {
        "same": (),
        "blocksize": ("--blocksize", "48"),
        "seed": ("--seed", "1"),
        "text": ("--dataset", str(data / "calibration.jsonl")),
    }
    for name, flags in variants.items():
        assert quantize(llama, data, tmp_path / name, *flags) == 0
    assert (tmp_path / "same" / FILE).read_bytes() == (packed / FILE).read_bytes()
    wanted = codes(packed)
    changed = {n: float((codes(tmp_path / n) != wanted).float().mean()) for n in variants}
    assert changed["blocksize"] < 0.02  # float32 sums in another order
    assert changed["seed"] > 0.02 and changed["text"] > 0.02


class Words:
    """A tokenizer of one token per word."""

    def __call__(self, text: str, **_):
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=torch.tensor([[int(w) for w in text.split()]]))


def test_documents_are_taken_whole_and_by_their_length():
    texts = [" ".join(map(str, range(100 * n, 100 * n + n))) for n in range(1, 40)]
    found = sample_documents(texts, Words(), nsamples=100, seqlen=20, seed=0)
    assert sorted(len(ids) for ids in found) == list(range(2, 21))
    assert all(torch.equal(ids, torch.arange(len(ids)) + 100 * len(ids)) for ids in found)
    again = sample_documents(texts, Words(), nsamples=5, seqlen=20, seed=0)
    assert all(map(torch.equal, again, found)) and len(again) == 5
    other = sample_documents(texts, Words(), nsamples=5, seqlen=20, seed=1)
    assert [len(a) for a in again] != [len(b) for b in other]
    with pytest.raises(DataError, match=r"2\.\.1 tokens.*--seqlen"):
        sample_documents(texts, Words(), nsamples=5, seqlen=1, seed=0)


def test_windows_are_runs_of_the_text():
    text = " ".join(map(str, range(1000)))
    found = sample_windows(text, Words(), nsamples=10, seqlen=30, seed=0)
    assert len({int(w[0]) for w in found}) > 5
    assert all(torch.equal(w, torch.arange(30) + w[0]) for w in found)
    short = sample_windows(text, Words(), nsamples=50, seqlen=300, seed=0)
    assert torch.equal(torch.cat(short), torch.arange(1000))  # cut up, not repeated


# ---- refusals: before any work, exit code 2, one line --------------------------------------------


@pytest.fixture
def refused(llama, data, tmp_path, monkeypatch, capsys):
    """Runs flags that must be refused; returns the message."""

    def no_work(*_, **__):
        raise AssertionError("quantization began")

    def run(*flags: str, source: Path | str = llama, target: str = "out") -> str:
        monkeypatch.setattr("gptq.run.Walker.quantize_layer", no_work)
        before = sorted(p.name for p in tmp_path.iterdir())
        capsys.readouterr()
        save = () if "--save" in flags else ("--save", str(tmp_path / target))
        assert main(arguments(source, data, *save, *flags)) == 2
        error = capsys.readouterr().err.rstrip("\n")
        lines = error.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), error
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset", "/no/such/file.txt"), r"'/no/such/file\.txt'.*give a path"),
        (("--dataset", "TINY"), r"holds 2 document\(s\), too few"),
        (("--seqlen", "65"), "seqlen=65 exceeds the model's context of 64"),
        (("--device", "toaster"), "device='toaster'"),
        (("--device", "meta"), "device='meta' is not supported; use cpu, cuda"),
        (("--save", ""), "save='' names no folder"),
        (("--report", "--eval", "none"), "report='' compares perplexities.*--eval"),
        (("--report", str(Path(__file__) / "deep")), r"report='.*test_gptq_cli\.py is a file"),
        (("--device", "cuda"), "device='cuda': torch sees no GPU"),
        (("--config", "/no/recipe.yaml"), "no such recipe"),
        (("--wbits", "16"), "with wbits=16.*--wbits 4"),
        (("--no-true-sequential",), "--no-asymmetric"),
        (("--percdamp", "-1"), r"percdamp=-1\.0 is not in"),
        (("--format", "gptq", "--groupsize", "64"), "group_size=64 does not divide the 96 inputs"),
        (
            ("--format", "compressed-tensors", "--groupsize", "64"),
            "does not divide.*--format marlin",
        ),
        (("--format", "compressed-tensors", "--no-static-groups"), "--static-groups"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_settings_that_cannot_work_are_refused(flags, message, refused, data):
    if flags == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    flags = tuple(str(data / "tiny.txt") if flag == "TINY" else flag for flag in flags)
    assert re.search(message, refused(*flags))


@pytest.mark.parametrize("fmt", ["gptq", "compressed-tensors"])
def test_groups_larger_than_a_layer(fmt, refused, tmp_path):
    """Its 96 inputs are one group by our rule; readers of the other formats refuse that."""
    write_source(tmp_path / "source", Source(changes=(("intermediate_size", 128),)))
    message = refused("--format", fmt, "--groupsize", "128", source=tmp_path / "source")
    assert "groupsize=128 is larger than the 96 inputs" in message


@pytest.mark.parametrize("flag", [
    ("--wbits", "5"), ("--groupsize", "48"), ("--format", "zip"), ("--dtype", "int8"),
    ("--nsamples", "x"), ("--unknown",),
], ids=" ".join)  # fmt: skip
def test_flags_that_do_not_parse(flag, llama, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        quantize(llama, data, tmp_path / "out", *flag)
    assert stopped.value.code == 2
    assert flag[0] in capsys.readouterr().err.splitlines()[-1]


def test_sources_that_are_none(refused, tmp_path):
    assert "is no folder" in refused(source=str(tmp_path / "gone"))
    assert "config.json" in refused(source=Path(__file__).parent)


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def test_a_source_without_tokenizer(refused, llama, tmp_path):
    source = copied(llama, tmp_path / "source")
    for file in source.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(source=source)


def test_a_source_with_a_broken_config(refused, llama, tmp_path):
    source = copied(llama, tmp_path / "source")
    (source / "config.json").write_text("{")
    assert "config.json" in refused(source=source)


def test_a_tokenizer_of_another_model(refused, llama, tmp_path):
    """Token ids beyond the embedding must not end in an IndexError."""
    from safetensors.torch import save_file

    source = copied(llama, tmp_path / "source")
    tensors = load_file(source / FILE)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:50].clone()
    save_file(tensors, source / FILE, {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    assert "tokenizer" in refused(source=source)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_a_damaged_tensor_is_found_before_the_work(refused, llama, tmp_path, name):
    """Tensors that are only copied would otherwise fail after hours, when they are written."""
    from safetensors.torch import save_file

    source = copied(llama, tmp_path / "source")
    tensors = load_file(source / FILE)
    tensors[name].view(-1)[7] = float("nan")
    save_file(tensors, source / FILE, {"format": "pt"})
    assert name in refused(source=source)


def test_targets_that_must_not_be_replaced(refused, tmp_path, packed):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "is no checkpoint of this tool" in refused(target="mine")
    assert "is no checkpoint of this tool" in refused("--overwrite", target="mine")
    assert (tmp_path / "mine" / "thesis.txt").is_file()
    copied(packed, tmp_path / "done")
    assert "already holds a checkpoint" in refused(target="done")
    (tmp_path / "file").write_text("")
    assert "is no checkpoint of this tool" in refused(target="file")
    assert "file" in refused(target="file/out")


def test_overwrite_replaces_the_whole_checkpoint(llama, data, packed, tmp_path):
    out = copied(packed, tmp_path / "out")
    (out / "left-over.txt").write_text("")
    assert quantize(llama, data, out, "--wbits", "8", "--nearest", "--overwrite") == 0
    assert read_manifest(out)["weight_type"] == "uint8b128"
    assert not (out / "left-over.txt").exists()
    load_model(out, verify=True)


# ---- the rest of the command line ----------------------------------------------------------------


def test_without_save_nothing_is_left(llama, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []

    def evaluate(config, folder, report):
        assert (folder / FILE).is_file()
        seen.append((config.wbits, len(report["layers"])))

    assert main(arguments(llama, data, "--eval", "pydoc"), evaluate=evaluate) == 0
    assert seen == [(4, 14)] and list(tmp_path.iterdir()) == []
    assert "14 linears" in capsys.readouterr().out


def test_the_plan_is_printed_before_the_summary(llama, data, tmp_path, capsys):
    assert quantize(llama, data, tmp_path / "out") == 0
    output = capsys.readouterr().out
    for word in ("14 linears", "uint4b8", "peak host memory", "disk", "estimated time"):
        assert word in output.partition("quantized 0.1 M weights")[0]
    assert f"packed checkpoint: {tmp_path / 'out'}" in output


@pytest.mark.parametrize("wbits", ["4", "16"])
def test_a_run_that_would_leave_nothing_is_refused(wbits, llama, data, capsys):
    flags = arguments(llama, data, "--wbits", wbits, "--eval", "none")
    assert main(flags) == 2
    assert "nothing to do; add" in (error := capsys.readouterr().err) and "--save OUT" in error


def test_of_several_processes_one_evaluates(llama, monkeypatch):
    seen = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        flags = [str(llama), "--eval", "pydoc"]
        assert main(flags, evaluate=lambda *given: seen.append(given)) == 0
    assert len(seen) == 1


def launch(flags, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The main command, run in `folder` as a process of its own; it must succeed."""
    done = subprocess.run(
        [sys.executable, ROOT / "gptq" / "llama2.py", *flags],
        cwd=folder, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_of_several_processes_one_warns(llama, data, tmp_path):
    few = ["--nsamples", "1", "--percdamp", "0", "--shrinkage", "0", "--eval", "none"]
    for rank in ("0", "1"):
        flags = arguments(llama, data, "--save", rank, *few)
        done = launch(flags, tmp_path, RANK=rank)
        assert ("WARNING gptq.hessian: model.layers.0.self_attn" in done.stderr) == (rank == "0")


def test_verbose_logs_every_step_with_its_time(llama, data, tmp_path):
    flags = arguments(llama, data, "--save", "out", "--eval", "none", "--refine", "1", "--verbose")
    done = launch(flags, tmp_path)
    lines = re.findall(r"^\d{4}-\d\d-\d\d [\d:,]+ INFO gptq\.run: (.*)$", done.stderr, re.M)
    for index in range(2):
        (line,) = [line for line in lines if line.startswith(f"model.layers.{index}: ")]
        assert len(re.findall(r"_proj 0\.\d+ \(", line)) == 7 and "damping up to 0.1," in line
        assert "held-out loss by learning" in line
    assert lines[-1] == "writing the checkpoint"


def test_16_bits_only_evaluate(llama):
    seen = []
    flags = [str(llama), "--eval", "pydoc"]
    assert main(flags, evaluate=lambda *given: seen.append(given[1:])) == 0
    assert seen == [(None, None)]


@pytest.mark.parametrize(("file", "content"), [("config.json", "{"), (FILE, "cut off")])
def test_a_source_that_cannot_be_evaluated_is_named(llama, data, tmp_path, capsys, file, content):
    from gptq.llama2 import evaluate

    source = copied(llama, tmp_path / "source")
    (source / file).write_text(content)
    assert main([str(source), "--eval", str(data / "heldout.txt")], evaluate=evaluate) == 2
    assert f"{source}" in (error := capsys.readouterr().err) and file in error


def test_a_report_without_save_stays(llama, data, tmp_path, monkeypatch):
    """The packed folder is temporary then; the report asked for must not go with it."""
    from gptq.llama2 import evaluate

    monkeypatch.chdir(tmp_path)
    text = ["--eval", str(data / "heldout.txt"), "--eval_tokens", "100", "--report"]
    assert main(arguments(llama, data, *text), evaluate=evaluate) == 0
    assert list((tmp_path / "report").glob("*.html"))


@pytest.mark.parametrize("wbits", ["4", "16"])
def test_missing_evaluation_text_is_found_before_the_work(wbits, llama, data, monkeypatch, capsys):
    def never(*_, **__):
        raise AssertionError("work began")

    monkeypatch.setattr("gptq.run.Walker.quantize_layer", never)
    flags = arguments(llama, data, "--wbits", wbits, "--eval", "pydoc,/no/such/text.txt")
    assert main(flags, evaluate=never) == 2
    error = capsys.readouterr().err
    assert "/no/such/text.txt" in error and "--eval none" in error


def test_evaluation_sees_the_packed_folder(llama, data, tmp_path):
    seen = []
    flags = arguments(llama, data, "--save", str(tmp_path / "out"), "--eval", "pydoc")
    assert main(flags, evaluate=lambda c, out, report: seen.append((c.eval, out, report))) == 0
    ((names, out, report),) = seen
    assert names == ("pydoc",) and out == tmp_path / "out" and len(report["layers"]) == 14


def test_interrupting_without_save_promises_nothing(llama, data, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gptq.run.Walker.quantize_layer", interrupt)
    assert main(arguments(llama, data)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_interrupting_keeps_the_finished_layers(llama, data, tmp_path, monkeypatch, capsys):
    def interrupt(self, index, on_stage):
        raise KeyboardInterrupt

    monkeypatch.setattr("gptq.run.Walker.quantize_layer", interrupt)
    assert quantize(llama, data, tmp_path / "out") == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_launcher_quantizes_evaluates_and_reports(llama, data, tmp_path):
    """The main command, as a newcomer types it, in another directory than the repository."""
    text = ["--eval", str(data / "heldout.txt"), "--eval_tokens", "200", "--report"]
    command = arguments(llama, data, "--save", "out", *text)
    done = launch(command, tmp_path)
    load_model(tmp_path / "out", verify=True)
    assert "original" in done.stdout and "GPTQ INT4" in done.stdout
    (page,) = (tmp_path / "out").rglob("*.html")
    assert str(page.relative_to(tmp_path)) in done.stdout
    assert "model.layers.1.mlp.down_proj" in page.read_text()


def test_the_launcher_runs_from_any_directory(tmp_path):
    """`gptq/` on sys.path would make `import gptq` find no package, and hide others."""
    done = subprocess.run(
        [sys.executable, ROOT / "gptq" / "llama2.py", "--help"],
        cwd=tmp_path, capture_output=True, text=True, env={"PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for option in ("--wbits", "--groupsize", "--true-sequential", "--static-groups", "--no_clip",
                   "--skip_gq", "--no-sym", "--percdamp", "--resume", "--report"):  # fmt: skip
        assert option in done.stdout
