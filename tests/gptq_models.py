"""Tiny source checkpoints, tokenizers and texts for the tests of the quantizer."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

VOCABULARY = 200
STORED = {
    torch.float32: torch.float16
}  # dtype of unquantized tensors, where it is not the source's
_SPECIAL = ("<unk>", "<s>", "</s>")
_WORDS = [
    *"the quick brown fox jumps over lazy dog , then writes code : x = 4 + .".split(),
    *(f"w{i}" for i in range(VOCABULARY)),
][: VOCABULARY - len(_SPECIAL)]


@dataclass(frozen=True)
class Source:
    """How to make a tiny model.

    kind: row of `gptq.models.FAMILIES`; changes: of its config; tied: the head is the embedding;
    dtype: of the stored tensors; shards: size of one safetensors file, or None for one file.
    """

    kind: str = "llama"
    tied: bool = False
    dtype: torch.dtype = torch.float16
    shards: str | None = None
    layers: int = 2
    changes: tuple[tuple[str, object], ...] = ()


SOURCES = {
    "llama": Source(),
    "llama-tied-sharded": Source(tied=True, shards="60KB", dtype=torch.float32),
    "llama-biases": Source(changes=(("attention_bias", True), ("mlp_bias", True))),
    "mistral-window": Source("mistral", changes=(("sliding_window", 5),)),
    "qwen2": Source("qwen2", tied=True),
    "qwen2-window": Source(
        "qwen2",
        layers=3,
        changes=(("use_sliding_window", True), ("sliding_window", 4), ("max_window_layers", 1)),
    ),
    "qwen3": Source("qwen3", shards="60KB", changes=(("head_dim", 24),)),
}


def tiny_config(source: Source):
    """Config with grouped queries whose K = 96, 160 are no multiples of the group size 64."""
    from transformers import CONFIG_MAPPING

    sizes = dict(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=source.layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=source.tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CONFIG_MAPPING[source.kind](**{**sizes, **dict(source.changes)})


def tiny_model(source: Source, seed: int = 0):
    """A random model in float32 with values that `source.dtype` holds exactly.

    Those of a float32 source fit fp16 where they will be stored so; its decoder linears need more.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(source), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:  # a few large inputs, as real models have: act-order and clipping have work to do
            nn.init.normal_(parameter, 0, 0.1)
            if "embed" in name:
                parameter.data[:, ::11] *= 4
        fits = source.dtype if "proj" in name else STORED.get(source.dtype, source.dtype)
        parameter.data = parameter.data.to(fits).float()
    return model


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of `VOCABULARY` words, as a folder transformers loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_source(folder: Path, source: Source = SOURCES["llama"], seed: int = 0):
    """Write model and tokenizer to `folder`. Returns the float32 model."""
    model = tiny_model(source, seed)
    stored = tiny_model(source, seed).to(source.dtype)
    stored.save_pretrained(folder, **({"max_shard_size": source.shards} if source.shards else {}))
    write_tokenizer(folder)
    return model


def prose(documents: int, words: int, seed: int = 0) -> list[str]:
    """Random documents of 2..`words` words with a skewed distribution."""
    draw = random.Random(seed)
    return [
        " ".join(
            _WORDS[int(len(_WORDS) * draw.random() ** 2)] for _ in range(draw.randint(2, words))
        )
        for _ in range(documents)
    ]


def write_text(path: Path, documents: int = 40, words: int = 40, seed: int = 0) -> Path:
    """A .txt (blocks between blank lines) or .jsonl file of random documents."""
    texts = prose(documents, words, seed)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    else:
        path.write_text("\n\n".join(texts) + "\n")
    return path


def token_samples(count: int = 6, length: int = 24, seed: int = 0) -> list[Tensor]:
    """Token ids int64 [T] of different lengths T in 2..length; the same ids for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (count,), generator=draw).tolist()
    return [torch.randint(3, VOCABULARY, (t,), generator=draw) for t in lengths]
