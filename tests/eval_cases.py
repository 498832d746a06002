"""A tiny checkpoint with a tokenizer of bytes, and small copies of task data, made on the fly."""

from __future__ import annotations

import csv
import json
from pathlib import Path

SUBJECTS = {"virology": "mmlu_other", "anatomy": "mmlu_stem"}  # subject → lm-eval's category
VOCABULARY = 259  # 256 bytes, then padding, beginning, end


def byte_tokenizer():
    """Every UTF-8 byte is one token; id 0 <pad>, 1 <s>, 2 </s>; adds no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save_tiny(folder: Path, **changes) -> Path:
    """A plain checkpoint folder: the tiny model of `cases` with the byte tokenizer."""
    from tests.cases import tiny_model

    tiny_model(vocab_size=VOCABULARY, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_packed(folder: Path, **changes) -> Path:
    """A packed checkpoint of the same model, rounded to nearest."""
    from tests.cases import tiny_model, write_packed

    write_packed(tiny_model(vocab_size=VOCABULARY, **changes), folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_mmlu(data_dir: Path, subjects=tuple(SUBJECTS), questions: int = 3) -> None:
    """CSV copies: dev of five rows, test of `questions`, header as in the documented layout."""
    for split, count in (("dev", 5), ("test", questions)):
        folder = data_dir / "mmlu" / split
        folder.mkdir(parents=True, exist_ok=True)
        for subject in subjects:
            with (folder / f"{subject}_{split}.csv").open(
                "w", newline="", encoding="utf-8"
            ) as file:
                writer = csv.writer(file)
                writer.writerow(["question", *(f"choice{i}" for i in range(4)), "answer"])
                for i in range(count):
                    writer.writerow([f"{subject} question {i}?", "one", "two", "3", "4", i % 4])


def write_jsonl(file: Path, records) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return file
