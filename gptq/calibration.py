"""Calibration text -> token sequences -> batches. Seeded; lengths are those of the documents."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_kernel.errors import DataError


def sample_documents(
    texts: Iterable[str], tokenizer, *, nsamples: int, seqlen: int, seed: int
) -> list[Tensor]:
    """Documents of their natural length, as in Marlin's GPTQ: each 2..seqlen tokens, taken whole.

    Texts are drawn in a seeded order; those that tokenise to more than `seqlen` or fewer than 2
    tokens are passed over. Returns at most `nsamples` int64 [T] tensors.
    Raises DataError if no text qualifies.
    """
    order = list(texts)
    random.Random(seed).shuffle(order)
    samples: list[Tensor] = []
    for text in order:
        if len(samples) == nsamples:
            break
        if len(text) > 16 * seqlen:  # longer than any tokenizer makes of seqlen tokens of prose
            continue
        ids = tokenizer(text, return_tensors="pt", truncation=False).input_ids[0]
        if 2 <= ids.numel() <= seqlen:
            samples.append(ids)
    if not samples:
        raise DataError(
            f"none of {len(order)} calibration documents has 2..{seqlen} tokens; raise "
            "--seqlen, or choose "
            "another --dataset (wikitext2 and plain .txt files are cut into windows instead)"
        )
    return samples


def sample_windows(text: str, tokenizer, *, nsamples: int, seqlen: int, seed: int) -> list[Tensor]:
    """`nsamples` windows, int64 [seqlen] each, at seeded random places of one joined text.

    When the text is shorter than nsamples windows, it is cut into consecutive windows instead.
    Raises DataError if it has fewer than 2 tokens.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if ids.numel() < 2:
        raise DataError("the calibration text has fewer than 2 tokens; give more text")
    if ids.numel() < (nsamples + 1) * seqlen:
        windows = [ids[i : i + seqlen] for i in range(0, ids.numel(), seqlen)]
        return [w for w in windows if w.numel() >= 2][:nsamples]
    generator = random.Random(seed)
    starts = [generator.randint(0, ids.numel() - seqlen - 1) for _ in range(nsamples)]
    return [ids[i : i + seqlen].clone() for i in starts]


def joined_rows(texts: Iterable[str], tokenizer, *, length: int, separator: str = "\n\n") -> Tensor:
    """Token rows [R, length] of all texts joined by `separator`, without special tokens."""
    between = tokenizer(separator, add_special_tokens=False).input_ids
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False).input_ids + between
    rows = len(stream) // length
    if not rows:
        raise DataError(f"the text has {len(stream)} tokens, less than one row of {length}")
    return torch.tensor(stream[: rows * length], dtype=torch.int64).reshape(rows, length)


@dataclass(frozen=True)
class Batch:
    """Samples that pass the model together.

    ids: int64 [B, T], shorter samples padded at the end, where causal attention lets no token see
    them. valid: int64, places of the real tokens in the flattened batch, or None if all are real.
    """

    ids: Tensor
    valid: Tensor | None

    @property
    def tokens(self) -> int:
        return self.ids.numel() if self.valid is None else self.valid.numel()

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each sample."""
        count, length = self.ids.shape
        if self.valid is None:
            return [length] * count
        return torch.bincount(self.valid // length, minlength=count).tolist()


def make_batches(samples: Sequence[Tensor], step_tokens: int) -> list[Batch]:
    """Batches of about `step_tokens` tokens, padding included; every sample in exactly one.

    samples: int64 [T] each. Samples of like length come together; when each would be alone anyway
    (step_tokens no larger than the shortest sample) they keep their order.
    """
    order = list(samples)
    if order and step_tokens > min(ids.numel() for ids in order):
        order.sort(key=lambda ids: -ids.numel())
    batches: list[Batch] = []
    while order:
        longest = max(order[0].numel(), 1)
        count = max(step_tokens // longest, 1)
        rows, order = order[:count], order[count:]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([row.numel() for row in rows])
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        valid = None if bool(real.all()) else real.flatten().nonzero().squeeze(1)
        batches.append(Batch(ids, valid))
    return batches
