"""Streaming a checkpoint layer by layer gives the model transformers loads, or a named error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq.cli import main
from gptq.models import FAMILIES, Stages, StreamedModel, config_folder, resolve_source
from marlin_kernel import CheckpointError, ConfigError, NumericalError
from tests.gptq_models import SOURCES, VOCABULARY, Source, tiny_config, write_source

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (9, 2, 17)  # longer than the sliding windows of 4 and 5
FILE = "model.safetensors"


@pytest.fixture(scope="module", params=SOURCES)
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_source(path, SOURCES[request.param])
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_source(path, SOURCES["llama"])
    return path


def stream(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel(folder, dtype, torch.device("cpu"))


def loaded(folder: Path, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def walk(model: StreamedModel, ids: Tensor) -> Tensor:
    """Logits [T, V] through Stages, one layer in memory at a time."""
    hidden = model.embed(ids)
    for index in range(model.num_layers):
        arguments = model.layer_arguments(hidden.shape[1], index)
        hidden = Stages(model.layer(index), model.family).forward(hidden, arguments)
    return model.head()(hidden)[0]


def test_every_family_is_tested():
    assert {source.kind for source in SOURCES.values()} == set(FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_walk_gives_the_logits_of_transformers(folder, dtype):
    """Catches a wrong mask (sliding window), rotary embedding, bias, norm, tie or shard."""
    model, whole = stream(folder, dtype), loaded(folder, dtype)
    for length in LENGTHS:
        ids = torch.arange(length) * 7 % VOCABULARY
        wanted = whole(ids[None], use_cache=False).logits[0]
        found = walk(model, ids)
        assert found.dtype == dtype
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_stages_are_the_layer(folder):
    """The cut layer gives the very bits of the layer, and hands out what each linear receives."""
    model = stream(folder)
    for index in range(model.num_layers):
        layer = model.layer(index)
        stages = Stages(layer, model.family)
        seen: dict[str, Tensor] = {}
        for path in model.family.linears:
            layer.get_submodule(path).register_forward_pre_hook(
                lambda _, args, path=path, seen=seen: seen.__setitem__(path, args[0])
            )
        for length in LENGTHS:
            hidden = torch.randn(1, length, model.config.hidden_size)
            arguments = model.layer_arguments(length, index)
            whole = layer(hidden, **arguments)
            whole = whole[0] if isinstance(whole, tuple) else whole
            inputs = dict(seen)
            assert torch.equal(stages.forward(hidden, arguments), whole)
            normed = stages.attention_input(hidden)
            attended = stages.attend(normed, arguments)
            middle = stages.mlp_input(hidden + stages.project(attended))
            parts = (normed, attended, middle, stages.activate(middle))
            for stage, part in zip(model.family.stages, parts, strict=True):
                for path in stage:
                    assert torch.equal(inputs[path], part)
    names = dict(loaded(folder).named_modules())
    assert set(model.quantizable()) == {
        name for name, module in names.items()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }  # fmt: skip


@torch.no_grad()
def test_many_lengths_do_not_confuse_the_cached_arguments(folder):
    """More different lengths than are remembered: masks must still fit their sequence."""
    model = stream(folder)
    first = {t: model.layer_arguments(t, 1) for t in (3, 5)}
    for length in range(1, 64):
        model.layer_arguments(length, 0)
    layer = model.layer(1)
    for length, arguments in first.items():
        hidden = torch.randn(1, length, model.config.hidden_size)
        again = model.layer_arguments(length, 1)
        assert torch.equal(layer(hidden, **arguments), layer(hidden, **again))


def test_layers_are_read_one_at_a_time(llama):
    """Nothing of a layer may stay behind: the skeleton keeps its meta weights."""
    model = stream(llama)
    layer = model.layer(0)
    assert {p.device.type for p in layer.parameters()} == {"cpu"}
    assert {p.device.type for p in model.skeleton.parameters()} == {"meta"}
    layer.self_attn.q_proj.weight.data.zero_()
    assert bool(model.layer(0).self_attn.q_proj.weight.any())  # the file is not written through


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        (torch.float32, torch.float16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_calibration_reads_the_source_and_storage_rounds_it(tmp_path, dtype, storage):
    """float32 becomes float16 when it is written; what calibrates keeps the source's values."""
    write_source(tmp_path, Source(dtype=dtype, layers=1))
    tensors = load_file(tmp_path / FILE)
    name = "model.embed_tokens.weight"
    tensors[name] = (torch.rand(VOCABULARY, 96) + 1e-5).to(dtype)
    save_file(tensors, tmp_path / FILE)
    model = stream(tmp_path)
    assert model.storage == storage and model.stored(name).dtype == storage
    assert torch.equal(model.stored(name), tensors[name].to(storage))
    assert torch.equal(model.embed(torch.arange(9))[0], tensors[name][:9].float())


# ---- damaged and foreign folders -----------------------------------------------------------------


def damaged(source: Path, target: Path, change) -> StreamedModel:
    """The streamed model of a copy whose tensors `change(dict)` has edited."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(target / FILE)
    change(tensors)
    save_file(tensors, target / FILE, {"format": "pt"})
    return stream(target)


NAMES = (
    "model.layers.0.self_attn.q_proj.weight",  # the one whose dtype decides the storage
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(llama, tmp_path, name):
    """An untied head that is missing must not silently become the embedding."""
    with pytest.raises(CheckpointError, match=rf"'{name}' is missing"):
        walk(damaged(llama, tmp_path, lambda tensors: tensors.pop(name)), torch.arange(5))


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_shape_is_named(llama, tmp_path, name):
    def shorten(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[.*, the config says \["):
        walk(damaged(llama, tmp_path, shorten), torch.arange(5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_value_is_named(llama, tmp_path, name, bad):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = bad

    model = damaged(llama, tmp_path, spoil)
    with pytest.raises(NumericalError, match=rf"{name}.*NaN or Inf"):
        if ".layers." in name:
            walk(model, torch.arange(5))
        else:  # what every run reads beforehand
            model.stored(name)


def test_values_that_storage_cannot_hold_are_refused(tmp_path):
    """float32 sources are stored as fp16: a norm weight of 1e5 would become Inf in silence."""
    write_source(tmp_path / "source", Source(dtype=torch.float32, layers=1))

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][0] = 1e5

    model = damaged(tmp_path / "source", tmp_path, enlarge)
    with pytest.raises(NumericalError, match=r"model\.norm\.weight.*float16"):
        model.stored("model.norm.weight")


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_unsupported_architecture_names_itself_and_the_supported(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20, n_positions=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3"):
        stream(tmp_path)


def test_a_config_with_a_wrong_value_is_named(llama, tmp_path):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, num_hidden_layers="two")
    with pytest.raises(CheckpointError, match=r"cannot read its config\.json.*num_hidden_layers"):
        stream(tmp_path)


def test_a_quantized_source_is_refused(llama, tmp_path):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="already quantized"):
        stream(tmp_path)


def test_a_pickled_source_is_refused_unread(llama, tmp_path):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    (tmp_path / FILE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        stream(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_source(tmp_path, SOURCES["llama-tied-sharded"])
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        stream(tmp_path)


@pytest.mark.parametrize("given", ["missing/folder/deep", "./nowhere", "/nowhere/at/all"])
def test_paths_that_are_not_there_do_not_ask_the_hub(given):
    with pytest.raises(CheckpointError, match="is no folder and no .gguf file"):
        resolve_source(given)


def test_folders_and_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        resolve_source(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such GGUF file"):
        resolve_source(str(tmp_path / "model.gguf"))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is no folder and no .gguf file"):
        resolve_source(str(tmp_path / "weights.bin"))


def test_a_hub_name_without_network_says_what_to_do():
    with pytest.raises(CheckpointError, match="nobody/nothing.*local folder") as caught:
        resolve_source("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_all_files_of_a_model_come_from_the_hub_and_no_weight_twice(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    wanted = {
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer.model", "merges.txt", "chat_template.jinja",
    }  # fmt: skip
    others = {
        "consolidated.safetensors", "consolidated.00.pth", "original/params.json",
        "pytorch_model.bin", "modeling.py", "README.md",
    }  # fmt: skip

    def download(name: str, **patterns) -> str:
        assert name == "owner/model"
        found = hub.utils.filter_repo_objects(sorted(wanted | others), **patterns)
        assert set(found) == wanted
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_source("owner/model") == tmp_path


# ---- GGUF ----------------------------------------------------------------------------------------


def write_gguf(path: Path, model) -> None:
    """A llama GGUF file in float32, as the converters write it (q and k rows interleaved)."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(VOCABULARY)
    words = ["<unk>", "<s>", "</s>", *(f"\u2581w{i}" for i in range(VOCABULARY - 3))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *[1] * (VOCABULARY - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        for part, count in heads.items():
            if part in name:
                rows = tensor.reshape(count, 2, -1, tensor.shape[1])
                tensor = rows.transpose(1, 2).reshape(tensor.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_the_same_model_once(tmp_path, monkeypatch):
    from tests.gptq_models import tiny_model

    monkeypatch.setenv("MARLIN_CACHE", str(tmp_path / "cache"))
    source = tiny_model(SOURCES["llama"])
    write_gguf(tmp_path / "tiny.gguf", source)
    folder = resolve_source(str(tmp_path / "tiny.gguf"))
    ids = torch.arange(9)
    with torch.no_grad():
        wanted = source(ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(walk(stream(folder), ids), wanted, rtol=1e-2, atol=1e-2)
    for name, tensor in source.state_dict().items():
        if "q_proj" not in name and "k_proj" not in name:  # their rows are interleaved and back
            assert torch.equal(stream(folder).tensors[name], tensor), name
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert resolve_source(str(tmp_path / "tiny.gguf")) == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    assert tiny_config(SOURCES["llama"]).hidden_size == stream(folder).config.hidden_size
    assert not list(folder.parent.glob("*.partial"))


@pytest.mark.parametrize("content", ["", "no GGUF at all", "truncated"])
def test_a_damaged_gguf_is_named(content, tmp_path, monkeypatch):
    from tests.gptq_models import tiny_model

    monkeypatch.setenv("MARLIN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "bad.gguf"
    if content == "truncated":
        write_gguf(file, tiny_model(SOURCES["llama"]))
        file.write_bytes(file.read_bytes()[:-4000])
    else:
        file.write_text(content)
    with pytest.raises(CheckpointError, match=r"bad\.gguf'.*cannot read this GGUF file"):
        resolve_source(str(file))
    assert not (tmp_path / "cache").exists()


# ---- a config without weights --------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "shape.json"
    path.write_text(tiny_config(SOURCES["llama-tied-sharded"]).to_json_string())
    return path


def test_random_weights_follow_from_seed_and_name(config_file, monkeypatch, tmp_path):
    monkeypatch.setenv("MARLIN_CACHE", str(tmp_path / "cache"))
    folder = config_folder(str(config_file))
    assert (folder / "config.json").read_bytes() == config_file.read_bytes()
    cpu = torch.device("cpu")
    one, same, other = (
        StreamedModel(folder, torch.float32, cpu, random_seed=seed) for seed in (3, 3, 4)
    )
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(one.tensors[name], same.tensors[name])
    assert not torch.equal(one.tensors[name], other.tensors[name])
    assert not torch.equal(one.tensors[name], one.tensors[name.replace("1", "0")])
    assert float(one.tensors[name].std()) == pytest.approx(160**-0.5, rel=0.05)
    assert bool((one.layer(0).input_layernorm.weight == 1).all())
    assert "lm_head.weight" not in one.tensors  # tied
    assert torch.isfinite(one.head()(one.embed(torch.arange(5)))).all()


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match="from_config=.*none.json.*no such file"):
        config_folder(str(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"broken\.json: transformers cannot read"):
        config_folder(str(tmp_path / "broken.json"))


def test_a_shape_is_quantized_from_the_command_line(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MARLIN_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    few = ["--nsamples", "3", "--seqlen", "16", "--groupsize", "32", "--wbits", "4"]
    flags = ["--from_config", str(config_file), *few, "--device", "cpu"]
    assert main([*flags, "--save", str(out)]) == 0
    assert "random ids" in capsys.readouterr().out
    assert (out / "model.safetensors").is_file()
    for wrong, message in {
        "model": "one model at a time",
        "--offload_activations": "they are in host memory already",
        "--wbits=16": "nothing to evaluate",
    }.items():
        assert main([*flags, "--save", str(tmp_path / "other"), wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["--wbits", "4"]) == 2
    assert "no model; give a checkpoint, or --from_config" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_norms_of_a_gpu_are_those_of_the_modules(llama, dtype):
    """But for their second rounding, and in one kernel: what makes them fast."""
    model = StreamedModel(llama, dtype, torch.device("cuda"))
    stages = Stages(model.layer(0), model.family)
    draw = torch.Generator("cuda").manual_seed(0)
    shape = 3, 50, model.config.hidden_size
    hidden = (torch.randn(shape, device="cuda", generator=draw) * 30).to(dtype)
    for norm, found in (
        (stages.attention_norm, stages.attention_input),
        (stages.mlp_norm, stages.mlp_input),
    ):
        norm.weight.data.uniform_(-2, 2, generator=draw)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            ours = found(hidden)
            torch.cuda.synchronize()
        kernels = [e for e in profile.key_averages() if e.self_device_time_total > 0]
        assert sum(kernel.count for kernel in kernels) == 1
        wanted = norm(hidden)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, wanted, rtol=3 * torch.finfo(dtype).eps, atol=0)
