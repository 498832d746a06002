"""Fused q/k/v and gate/up: the same codes, the same outputs, saved under the same names."""

from __future__ import annotations

import copy
import itertools
import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

from marlin_kernel import INTEGER_TYPES, WEIGHT_TYPES, ConfigError, Layer, formats, hf
from marlin_kernel.formats import QuantizedLinear
from marlin_kernel.fusion import (
    FusedLayer,
    FusedPart,
    fuse_layers,
    obstacle,
    packed_paths,
    unfuse_layers,
)
from tests.cases import GROUP_SIZES, random_layer, same_layer, tiny_config, tiny_model, write_packed

U4B8 = WEIGHT_TYPES["uint4b8"]
WIDTHS = (96, 32, 40)  # no multiple of the 64 columns of a tile: padding stays between the parts


def layers(wtype=U4B8, group_size=32, k=96, **options) -> list[Layer]:
    made = [random_layer(k, n, wtype, group_size, **options) for n in WIDTHS]
    if options.get("act_order"):  # the index must be common
        made = [
            type(q)(q.codes, q.scales, q.zeros, made[0].g_idx, q.bias, wtype, q.group_size)
            for q in made
        ]
    return [Layer.from_quantized(q) for q in made]


class Attention(nn.Module):
    """What the parts see of a decoder."""

    def __init__(self, parts: list[Layer]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = parts

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("bias, act_order", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("wtype", list(INTEGER_TYPES.values()), ids=lambda t: t.name)
def test_codes_and_outputs_are_those_of_the_parts(wtype, group_size, bias, act_order, prepared):
    k = 160
    parts = layers(wtype, group_size, k, bias=bias, act_order=act_order)
    before = [part.quantized() for part in parts]
    if prepared:
        for part in parts:
            part.prepare(torch.float32)
    x = torch.randn(2, 3, k)
    model = Attention(parts)
    stored = {name: t.clone() for name, t in model.state_dict().items()}
    expected = model(x)
    assert fuse_layers(model) == ["qkv_proj"]
    assert model.qkv_proj.layout == ("codes" if prepared else None)
    assert all(isinstance(m, FusedPart) for m in (model.q_proj, model.k_proj, model.v_proj))
    for part, quantized in zip((model.q_proj, model.k_proj, model.v_proj), before, strict=True):
        assert same_layer(part.quantized(), quantized)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    assert model.qkv_proj._shared is None  # activations are not kept alive
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert unfuse_layers(model) == ["qkv_proj"]
    assert not hasattr(model, "qkv_proj")
    assert torch.equal(model(x), expected)


def test_weights_are_stored_once():
    model = Attention([layer.prepare() for layer in layers()])

    def held() -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in model.buffers()}
        return sum(storage.nbytes() for storage in storages.values())

    before = held()
    fuse_layers(model)
    # between the parts: columns 96..127 and 160..191, one byte for each code, 3 scales
    assert held() - before == (32 + 32) * (96 + 3 * 2)


def test_old_tensors_go_before_the_next_layout_is_made(monkeypatch):
    """No second copy: the parts are gone when the fused layer is converted."""
    import weakref

    model = Attention([layer.prepare() for layer in layers()])
    parts = [weakref.ref(m.weights) for m in (model.q_proj, model.k_proj, model.v_proj)]
    prepare = FusedLayer.prepare

    def prepare_alone(self, dtype=None):
        assert [part() for part in parts] == [None] * 3
        return prepare(self, dtype)

    monkeypatch.setattr(FusedLayer, "prepare", prepare_alone)
    assert fuse_layers(model)


def test_one_multiplication_for_all_parts(monkeypatch):
    model = Attention(layers())
    fuse_layers(model)
    calls = []
    forward = FusedLayer.forward
    monkeypatch.setattr(FusedLayer, "forward", lambda self, x: calls.append(x) or forward(self, x))
    x = torch.randn(2, 96)
    for _ in range(3):
        model(x)
    assert len(calls) == 3


def test_parts_may_be_called_in_any_order_and_with_any_input():
    parts = layers()
    apart = copy.deepcopy(parts)
    model = Attention(parts)
    fuse_layers(model)
    fused = [model.q_proj, model.k_proj, model.v_proj]
    inputs = [torch.randn(2, 96), torch.randn(3, 96)]
    torch.manual_seed(3)
    for i, j in torch.stack([torch.randint(3, (60,)), torch.randint(2, (60,))], 1).tolist():
        torch.testing.assert_close(fused[i](inputs[j]), apart[i](inputs[j]), rtol=0, atol=1e-5)
    # the same tensor with other values: each result is handed out once
    x = inputs[0]
    for part, alone in zip(fused * 2, apart * 2, strict=True):
        x.normal_()
        model.qkv_proj._shared = None
        torch.testing.assert_close(part(x), alone(x), rtol=0, atol=1e-5)
        x.normal_()
        torch.testing.assert_close(part(x), alone(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prepared", [False, True])
def test_loads_a_state_dict(prepared):
    source = Attention(layers(bias=True))
    target = Attention(layers(bias=True))
    fuse_layers(target)
    if prepared:
        target.qkv_proj.prepare()
    target.load_state_dict(source.state_dict())
    assert (target.qkv_proj.layout is not None) == prepared
    x = torch.randn(2, 96)
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=1e-5)
    state = source.state_dict()
    state["other"] = state.pop("k_proj.B")
    with pytest.raises(RuntimeError, match="(?s)Missing.*k_proj.B.*Unexpected.*other"):
        target.load_state_dict(state)


def test_moves_copies_and_pickles(tmp_path):
    model = Attention([layer.prepare(torch.float16) for layer in layers(bias=True)])
    fuse_layers(model)
    x = torch.randn(2, 96)
    twin = copy.deepcopy(model)
    assert twin.q_proj.fused is twin.qkv_proj is not model.qkv_proj
    assert torch.equal(twin(x), model(x))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert again.v_proj.fused is again.qkv_proj
    assert torch.equal(again(x), model(x))
    before = model.state_dict()
    model.to(torch.bfloat16)
    assert model.qkv_proj._dtype == torch.bfloat16
    assert torch.equal(model.state_dict()["q_proj.s"], before["q_proj.s"])


def test_compiles_as_one_graph():
    model = Attention([layer.prepare() for layer in layers(bias=True)])
    fuse_layers(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for x in (torch.randn(2, 96), torch.randn(2, 96)):
            torch.testing.assert_close(compiled(x), model(x))
    assert model.qkv_proj._shared is None


def change(layer: Layer, **options) -> Layer:
    for name, value in options.items():
        setattr(layer, name, value)
    return layer


def test_settings_of_the_parts_are_kept():
    parts = layers()
    for part in parts:
        change(part, batch_invariant=True, activation="int8", reduce_half=True).prepare()
    model, x = Attention(parts), torch.randn(3, 96)
    expected = model(x)
    fuse_layers(model)
    assert torch.equal(model(x), expected)
    assert model.k_proj.unfused().activation == "int8"
    unfuse_layers(model)
    assert torch.equal(model(x), expected)
    for part in (model.q_proj, model.k_proj, model.v_proj):
        assert (part.batch_invariant, part.activation, part.reduce_half) == (True, "int8", True)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: Layer(96, 32, 64), "differ in group sizes: 32, 32, 64"),
        (lambda: Layer(64, 32, 32), "differ in inputs: 96, 96, 64"),
        (lambda: Layer(96, 32, 32, weight_type="uint4"), "weight types: uint4b8, uint4b8, uint4"),
        (lambda: Layer(96, 32, 32, True), "presence of a bias: False, False, True"),
        (lambda: Layer(96, 32, 32, act_order=True), "act-order: False, False, True"),
        (lambda: change(Layer(96, 32, 32), batch_invariant=True), "differ in batch invariant"),
        (lambda: Layer(96, 32, 32, activation="int8"), "activation: None, None, int8"),
        (lambda: change(Layer(96, 32, 32), reduce_half=True), "reduce half: False, False, True"),
        (lambda: Layer(96, 32, 32, device="meta"), "devices: cpu, cpu, meta"),
        (lambda: nn.Linear(96, 32), "not all of them are packed"),
    ],
)
def test_what_differs_stays_apart_and_is_said(caplog, other, reason):
    parts = [*layers()[:2], other()]
    model = Attention(parts)
    with caplog.at_level(logging.INFO, logger="marlin_kernel.fusion"):
        assert fuse_layers(model) == []
    assert "q_proj, k_proj, v_proj of model stay apart" in caplog.text and reason in caplog.text
    assert [model.q_proj, model.k_proj, model.v_proj] == parts
    with pytest.raises(ConfigError, match="layers cannot be fused"):
        FusedLayer.of(parts)


def test_tensors_that_are_not_per_column_stay_apart(monkeypatch):
    """A table of the whole layer, for example, cannot serve three."""
    shapes = formats.tensor_shapes
    monkeypatch.setattr(
        formats, "tensor_shapes", lambda *a: shapes(*a) | {"table": ((1,), torch.float32)}
    )
    assert "they hold table, which are not per column" in obstacle(layers())


@pytest.mark.parametrize("prepared", [False, True])
def test_a_common_global_scale_is_kept(prepared):
    nvfp4 = WEIGHT_TYPES["nvfp4"]
    weights = [torch.randn(96, n) / 10 for n in WIDTHS]
    alone = [QuantizedLinear.quantize(w, nvfp4, 16) for w in weights]
    assert obstacle([Layer.from_quantized(q) for q in alone]) == "their global scales differ"
    together = QuantizedLinear.quantize(torch.cat(weights, 1), nvfp4, 16)
    columns = [slice(0, 96), slice(96, 128), slice(128, 168)]
    parts = [
        Layer.from_quantized(
            QuantizedLinear.of(
                together.codes[:, c], together.scales[:, c], nvfp4, 16,
                global_scale=together.global_scale,
            )
        )
        for c in columns
    ]  # fmt: skip
    if prepared:
        parts = [part.prepare(torch.float32) for part in parts]
    x = torch.randn(3, 96)
    model = Attention(parts)
    expected, stored = model(x), {name: t.clone() for name, t in model.state_dict().items()}
    assert fuse_layers(model) == ["qkv_proj"]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    state = model.state_dict()
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_group_indices_must_be_common():
    apart = [Layer.from_quantized(random_layer(96, n, U4B8, 32, act_order=True)) for n in WIDTHS]
    assert "assign inputs to groups differently" in obstacle(apart)
    source = Attention(apart)
    target = Attention(layers(act_order=True))
    fuse_layers(target)
    with pytest.raises(ConfigError, match="apply unfuse_layers"):
        target.load_state_dict(source.state_dict())


def test_plain_models_are_left_alone(caplog):
    model = tiny_model()
    with caplog.at_level(logging.INFO):
        assert fuse_layers(model) == []
    assert not caplog.text


# ---- whole models --------------------------------------------------------------------------------


def family_model(kind: str):
    """A tiny random model of a family."""
    if kind in ("llama", "qwen2"):
        return tiny_model(kind)
    config = {"mistral": MistralConfig, "qwen3": Qwen3Config}[kind]
    sizes = tiny_config().to_dict()
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "vocab_size max_position_embeddings tie_word_embeddings bos_token_id eos_token_id"
    )
    model = AutoModelForCausalLM.from_config(
        config(**{name: sizes[name] for name in names.split()}, head_dim=16)
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.1)
        parameter.data = parameter.data.half().float()
    return model


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def packed(request, tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("packed") / request.param
    token_ids, logits = write_packed(family_model(request.param), folder)
    return folder, token_ids, logits


def test_every_family_loads_fused_and_saves_the_standard_names(packed, tmp_path):
    folder, token_ids, logits = packed
    model = hf.load_model(folder, fuse=True, verify=True)
    fused = [name for name, m in model.named_modules() if isinstance(m, FusedLayer)]
    assert fused == [
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")
    ]
    torch.testing.assert_close(hf.probe_logits(model, token_ids), logits, rtol=1e-5, atol=1e-5)
    assert set(packed_paths(model)) == set(model.config.quantization_config.modules)
    model.save_pretrained(tmp_path / "saved")
    original = load_file(folder / "model.safetensors")
    saved = load_file(tmp_path / "saved/model.safetensors")
    packed_tensors = [n for n in original if n.rpartition(".")[2] in ("B", "s", "bias")]
    assert original.keys() == saved.keys() and len(packed_tensors) >= 28
    assert all(torch.equal(original[name], saved[name]) for name in packed_tensors)
    config = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert not {"fuse", "foreign", "prepare"} & config.keys()
    apart = hf.load_model(tmp_path / "saved", fuse=False)
    assert not any(isinstance(m, FusedLayer) for m in apart.modules())
    torch.testing.assert_close(hf.probe_logits(apart, token_ids), logits, rtol=1e-5, atol=1e-5)


def test_generation_uses_the_cache(packed):
    folder, token_ids, _ = packed
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    ids = token_ids[None]
    expected = hf.load_model(folder, fuse=False).generate(ids, **options)
    fused = hf.load_model(folder, fuse=True)
    assert torch.equal(fused.generate(ids, **options), expected)
    assert torch.equal(
        fused.generate(ids, cache_implementation="static", disable_compile=True, **options),
        expected,
    )


@pytest.mark.parametrize("fuse", [None, True, False])
def test_option_of_the_registered_quantizer(packed, fuse):
    from transformers import AutoConfig

    folder, token_ids, logits = packed
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["fuse"] = fuse
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    fused = any(isinstance(m, FusedLayer) for m in model.modules())
    assert fused == bool(fuse)  # by default on GPUs only
    torch.testing.assert_close(hf.probe_logits(model, token_ids), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_fused_on_gpus_by_default(packed):
    folder, token_ids, logits = packed
    fused, apart = (hf.load_model(folder, device="cuda", fuse=fuse) for fuse in (None, False))
    assert any(isinstance(m, FusedLayer) for m in fused.modules())
    assert not any(isinstance(m, FusedLayer) for m in apart.modules())
    limit = hf.PROBE_TOLERANCE[torch.float16] * logits.abs().max()
    for model in (fused, apart):
        assert (hf.probe_logits(model, token_ids) - logits).abs().max() < limit
    with torch.device("cuda"):
        direct = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float16, device_map="cuda"
        )
    assert any(isinstance(m, FusedLayer) for m in direct.modules())
