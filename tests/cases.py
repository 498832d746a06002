"""What several test files iterate over, and small layers and models to do it with."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor, nn

from marlin_kernel import (
    INTEGER_TYPES,
    WEIGHT_TYPES,
    CheckpointWriter,
    QuantizedLinear,
    Scheme,
    reference,
)
from marlin_kernel.errors import ConfigError
from marlin_kernel.formats import check_exportable

# (K, N): whole tiles; SmolLM2's K and N; nothing divides; one partial group; fewer inputs than a
# group
SIZES = ((128, 256), (576, 192), (100, 72), (160, 40), (24, 8))
GROUP_SIZES = (-1, 32, 64, 128)

TYPED_SIZES = [
    (k, n, wtype, g)
    for (k, n), wtype, g in itertools.product(SIZES, INTEGER_TYPES.values(), GROUP_SIZES)
]


def exportable(layer: QuantizedLinear, fmt: str) -> bool:
    """Whether a format can hold the layer, by the library's own rule."""
    try:
        check_exportable(fmt, layer.spec)
    except ConfigError:
        return False
    return True


def known_codes() -> Tensor:
    """The known-answer codes [128, 256]: q[k, n] = (3 k + 5 n + n // 16) mod 16."""
    k, n = torch.arange(128)[:, None], torch.arange(256)[None]
    return (3 * k + 5 * n + n // 16) % 16


def random_layer(
    k: int, n: int, wtype, group_size: int, *, act_order: bool = False, bias: bool = False
) -> QuantizedLinear:
    """A layer of random codes; scales of both signs; zero points from 1 up (GPTQ v1 has no 0)."""
    groups = -(-k // (k if group_size == -1 else min(group_size, k)))
    scales = (torch.rand(groups, n) * 0.02 + 0.001) * torch.where(
        torch.rand(groups, n) < 0.3, -1, 1
    )
    zeros = None if wtype.symmetric else torch.randint(1, wtype.levels, (groups, n))
    order = torch.randperm(k)
    g_idx = None
    if act_order and groups > 1:
        g_idx = torch.empty(k, dtype=torch.int32)
        g_idx[order] = (torch.arange(k) // min(group_size, k)).int()
    return QuantizedLinear.of(
        torch.randint(0, wtype.levels, (k, n)),
        scales.half(),
        wtype,
        group_size,
        zeros=zeros,
        g_idx=g_idx,
        bias=torch.randn(n).half() if bias else None,
    )


def same_layer(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    """Bit equality of everything but the bias' dtype."""

    def same(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return torch.equal(x.float(), y.float())

    names = ("codes", "scales", "zeros", "g_idx", "bias", "global_scale")
    facts = (a.weight_type, a.group_size) == (b.weight_type, b.group_size)
    return facts and all(same(getattr(a, x), getattr(b, x)) for x in names)


def tiny_config(kind: str = "llama", **changes):
    """Config of two layers whose sizes no tile divides, with GQA and tied embeddings.

    qwen2 has biases.
    """
    from transformers import LlamaConfig, Qwen2Config

    sizes = dict(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](**{**sizes, **changes})


def tiny_model(kind: str = "llama", **changes):
    """A random model in float32 whose unquantized parameters fp16 can hold."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.1)
        parameter.data = parameter.data.half().float()
    return model


def quantizable(model) -> list[str]:
    """Paths of the decoder linears."""
    linears = (name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return [name for name in linears if name != "lm_head"]


def write_packed(
    model,
    out: Path,
    *,
    fmt: str = "marlin",
    wtype=WEIGHT_TYPES["uint4b8"],
    group_size: int = 32,
    act_order: bool = False,
    **options,
):
    """Quantize `model` in place (fake-quantized weights) and write it to `out`. Returns its logits.

    Returns (token_ids [T], logits float32 [T, V]) of the fake-quantized model, also the probe.
    """
    from marlin_kernel.hf import probe_logits

    names = quantizable(model)
    quantized = {}
    for name in names:
        linear = model.get_submodule(name)
        weight = linear.weight.detach().T
        k, n = weight.shape
        bias = None if linear.bias is None else linear.bias.half()
        if wtype.name not in INTEGER_TYPES:
            quantized[name] = QuantizedLinear.quantize(weight, wtype, group_size, bias)
            linear.weight.data = quantized[name].dequantize().T.contiguous()
            continue
        layer = random_layer(k, n, wtype, group_size, act_order=act_order)
        codes, scales, zeros = reference.quantize(weight, wtype, group_size)
        if layer.g_idx is None:
            quantized[name] = QuantizedLinear.of(
                codes, scales, wtype, group_size, zeros=zeros, bias=bias
            )
        else:  # random codes of a random group index serve as well
            quantized[name] = layer
        linear.weight.data = quantized[name].dequantize().T.contiguous()
    token_ids = torch.randint(3, model.config.vocab_size, (9,))
    logits = probe_logits(model, token_ids)
    with CheckpointWriter(out, Scheme(fmt, wtype, group_size, act_order), **options) as writer:
        for name, tensor in model.state_dict().items():
            tied = name == "lm_head.weight" and model.config.tie_word_embeddings
            if name.rpartition(".")[0] not in names and not tied:
                writer.add(name, tensor.half())
        for name, layer in quantized.items():
            writer.add_layer(name, layer)
        writer.add_probe(token_ids, logits)
        config = model.config.to_dict() | {
            "dtype": "float16",
            "architectures": [type(model).__name__],
        }
        writer.finish(config, source={"name": "tiny", "sha256": "0" * 64}, settings={"seed": 0})
    return token_ids, logits
