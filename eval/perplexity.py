"""Perplexity on held-out text, with KL divergence and top-1 agreement against a reference model.

All models read exactly the same windows of tokens. Sums are kept per window, because tokens of one
window are not independent: standard errors treat the window as the unit (clustered).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gptq.texts import Documents, documents
from marlin_kernel.errors import ConfigError, DataError, NumericalError

log = logging.getLogger(__name__)

LOGIT_ELEMENTS = 1 << 23  # fp32 logits held at once per model: 32 MiB, whatever the vocabulary
BATCH_TOKENS = 2048  # padded tokens of one forward pass: one classic window; raise it on a GPU


@dataclass(frozen=True)
class Estimate:
    """A mean per predicted token and its standard error (None with fewer than two windows)."""

    mean: float
    se: float | None


@dataclass(frozen=True)
class WindowScores:
    """Sums over the predictions of each window, in the order the windows were given.

    predictions: int64 [W]; nll, kl: float64 [W] in nats; top1: float64 [W], number of predictions
    whose most likely token is the reference's. kl and top1 are None without a reference.
    seconds: time spent in this model's forward passes and on its logits.
    """

    predictions: Tensor
    nll: Tensor
    kl: Tensor | None
    top1: Tensor | None
    seconds: float

    def estimate(self, sums: Tensor) -> Estimate:
        """Mean per prediction of `sums` [W], with the clustered error of a ratio estimator.

        With n_w predictions and sum s_w in window w, mean m = Σ s_w / Σ n_w and
        se² = W / (W - 1) · Σ (s_w - m n_w)² / (Σ n_w)²  (Cochran, Sampling Techniques, 6.4).
        """
        counts = self.predictions.double()
        total, windows = counts.sum(), len(counts)
        mean = sums.sum() / total
        if windows < 2:
            return Estimate(mean.item(), None)
        squares = (sums - mean * counts).square().sum() * windows / (windows - 1)
        return Estimate(mean.item(), (squares.sqrt() / total).item())


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one model on one text, with the protocol that makes the number comparable.

    tokens: predicted tokens. nll: mean negative log-likelihood, nats per token; perplexity =
    exp(nll). kl: mean KL(reference || model), nats per token; top1: share of predictions on which
    both models rank the same token first. *_se: standard errors over windows. None where there is
    no reference, or only one window. seconds: this model's share of the run.
    """

    dataset: str
    protocol: str
    seqlen: int
    tokens: int
    perplexity: float
    nll: float
    nll_se: float | None
    kl: float | None
    kl_se: float | None
    top1: float | None
    top1_se: float | None
    seconds: float


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    sources: Sequence[str],
    *,
    seqlen: int,
    data_dir: str | None = None,
    reference: nn.Module | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
    batch_tokens: int = BATCH_TOKENS,
) -> list[PerplexityResult]:
    """Perplexity of a causal language model on the held-out side of each text source.

    sources: names or paths of `gptq.texts.documents`. seqlen: tokens per window. reference: model
    to compare with on the same tokens. max_tokens: use only the leading windows that fit.
    Raises DataError (no such text, text too short), ConfigError (seqlen, vocabularies differ).
    """
    models = {"model": model} if reference is None else {"reference": reference, "model": model}
    results = evaluate_models(
        models,
        tokenizer,
        sources,
        seqlen=seqlen,
        reference=None if reference is None else "reference",
        data_dir=data_dir,
        max_tokens=max_tokens,
        progress=progress,
        batch_tokens=batch_tokens,
    )
    return results["model"]


def evaluate_models(
    models: Mapping[str, nn.Module],
    tokenizer: Any,
    sources: Sequence[str],
    *,
    seqlen: int,
    reference: str | None = None,
    data_dir: str | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, list[PerplexityResult]]:
    """Like `evaluate` for several models at once, so that the reference runs only once.

    reference: key of `models` that the others are compared with. Returns one list per model, in
    the order of `sources`.
    """
    # All sources are found and cut before the first forward pass: a missing one costs no time.
    prepared = []
    for source in sources:
        docs = documents(source, "heldout", data_dir=data_dir)
        prepared.append((docs, *windows_of(docs, tokenizer, seqlen, max_tokens)))
    results: dict[str, list[PerplexityResult]] = {name: [] for name in models}
    for docs, windows, protocol in prepared:
        scores = score_models(
            models,
            windows,
            reference=reference,
            batch_tokens=batch_tokens,
            progress=docs.name if progress else None,
        )
        for name, score in scores.items():
            results[name].append(summarize(score, docs.name, protocol, seqlen))
    return results


def windows_of(
    docs: Documents, tokenizer: Any, seqlen: int, max_tokens: int | None = None
) -> tuple[list[Tensor], str]:
    """Cut held-out text into windows of int64 [<= seqlen]; returns (windows, full protocol).

    Joined text is one string, tokenized once with the tokenizer's own special tokens (Llama-2 puts
    one BOS before the whole stream, SmolLM2 none: the usual protocol of perplexity papers, from
    GPTQ's wikitext2 loader), cut into windows of exactly seqlen; the incomplete rest is dropped.
    Otherwise each document is tokenized the same way and truncated. max_tokens: only the leading
    windows that fit, or as much of the first. Raises DataError if fewer than two tokens are left.
    """
    if seqlen < 2:
        raise ConfigError(f"seqlen={seqlen} must be at least 2: one token predicts the next")
    if docs.joined:
        ids = _token_ids(tokenizer, docs.text())
        windows = (
            list(ids[: len(ids) // seqlen * seqlen].split(seqlen)) if len(ids) >= seqlen else []
        )
        whole = bool(windows)
        if not windows and len(ids) >= 2:
            windows = [ids]
        special = len(ids) > 0 and ids[0].item() in getattr(tokenizer, "all_special_ids", [])
        notes = ["one BOS before the stream" if special else "no BOS"]
        if not whole:
            notes.append(f"all {len(ids)} tokens, less than one window")
    else:
        cut = (_token_ids(tokenizer, text)[:seqlen] for text in docs.texts)
        windows = [ids for ids in cut if len(ids) >= 2]
        notes = [f"{len(windows)} documents"]
    available = len(windows)
    if max_tokens is not None:
        kept, total = [], 0
        for window in windows:
            if total + len(window) > max_tokens:
                break
            kept.append(window)
            total += len(window)
        if windows and not kept and max_tokens >= 2:
            kept = [windows[0][:max_tokens]]
            notes.append(f"cut to {max_tokens} tokens")
        windows = kept
    if not windows:
        raise DataError(
            f"{docs.name}: its held-out text ({docs.origin}) is shorter than two tokens"
        )
    if len(windows) < available:
        notes.append(f"first {len(windows)} of {available} windows")
    return windows, f"{docs.protocol}; {', '.join(notes)}"


def score_windows(
    model: nn.Module,
    windows: Sequence[Tensor],
    reference: nn.Module | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: str | None = None,
) -> WindowScores:
    """Score one model on token windows (each int64 [T], T >= 2; T - 1 predictions)."""
    models = {"model": model} if reference is None else {"reference": reference, "model": model}
    scores = score_models(
        models,
        windows,
        reference=None if reference is None else "reference",
        batch_tokens=batch_tokens,
        progress=progress,
    )
    return scores["model"]


def summarize(scores: WindowScores, dataset: str, protocol: str, seqlen: int) -> PerplexityResult:
    """Means and standard errors of window scores."""
    nll = scores.estimate(scores.nll)
    kl = None if scores.kl is None else scores.estimate(scores.kl)
    top1 = None if scores.top1 is None else scores.estimate(scores.top1)
    return PerplexityResult(
        dataset=dataset,
        protocol=protocol,
        seqlen=seqlen,
        tokens=int(scores.predictions.sum()),
        perplexity=math.exp(nll.mean) if nll.mean < 700 else math.inf,
        nll=nll.mean,
        nll_se=nll.se,
        kl=kl and kl.mean,
        kl_se=kl and kl.se,
        top1=top1 and top1.mean,
        top1_se=top1 and top1.se,
        seconds=scores.seconds,
    )


@torch.inference_mode()
def score_models(
    models: Mapping[str, nn.Module],
    windows: Sequence[Tensor],
    *,
    reference: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: str | None = None,
) -> dict[str, WindowScores]:
    """Score several models on the same windows; the reference's logits are computed once.

    windows: int64 [T] each, on any device. reference: key of `models`. progress: label of a
    progress bar, or None. Softmax and sums are fp32 and fp64 whatever the models' dtype.
    Raises ConfigError if the vocabularies differ, NumericalError if a model gives NaN.
    """
    if reference is not None and reference not in models:
        raise ConfigError(f"reference={reference!r} is not one of the models {list(models)}")
    if not windows or min(len(w) for w in windows) < 2:
        raise DataError("every window needs at least two tokens")
    order = [name for name in models if name == reference] + [n for n in models if n != reference]
    runners = {name: _Runner(models[name], name) for name in order}
    count = len(windows)
    compared = [name for name in order if reference is not None]
    nll = {name: torch.zeros(count, dtype=torch.float64) for name in order}
    kl = {name: torch.zeros(count, dtype=torch.float64) for name in compared}
    top1 = {name: torch.zeros(count, dtype=torch.float64) for name in compared}
    seconds = dict.fromkeys(order, 0.0)

    total = sum(len(w) for w in windows)
    with tqdm(
        total=total,
        desc=progress,
        unit="tok",
        disable=progress is None,
        unit_scale=True,
        dynamic_ncols=True,
    ) as bar:
        for indices in _batches(windows, batch_tokens):
            batch = _pad([windows[i] for i in indices])
            hidden = {}
            for name in order:
                start = time.perf_counter()
                hidden[name] = runners[name].hidden(batch)
                seconds[name] += time.perf_counter() - start
            for row, index in enumerate(indices):
                targets = windows[index][1:]
                for begin, end in _spans(len(targets), runners[order[0]].vocabulary):
                    expected: _Reference | None = None
                    for name in order:
                        start = time.perf_counter()
                        logits = runners[name].logits(hidden[name], row, begin, end)
                        target = targets[begin:end].to(logits.device)
                        lse = logits.logsumexp(-1)
                        chosen = logits.gather(-1, target[:, None]).squeeze(-1)
                        nll[name][index] += (lse - chosen).double().sum().item()
                        if name == reference:
                            expected = _Reference(logits, lse)
                        if expected is not None:
                            divergence, agreement = expected.compare(logits, lse, name)
                            kl[name][index] += divergence
                            top1[name][index] += agreement
                        seconds[name] += time.perf_counter() - start
            bar.update(sum(len(windows[i]) for i in indices))
    predictions = torch.tensor([len(w) - 1 for w in windows])
    for name in order:
        if not torch.isfinite(nll[name]).all():
            raise NumericalError(
                f"{name} gives NaN or Inf logits; if it runs in fp16, try bf16 or fp32"
            )
    return {
        name: WindowScores(predictions, nll[name], kl.get(name), top1.get(name), seconds[name])
        for name in models
    }


class _Reference:
    """Log-probabilities of the reference for one span of tokens: fp32 logits [T, V], lse [T]."""

    def __init__(self, logits: Tensor, lse: Tensor) -> None:
        self.logits, self.lse = logits, lse
        self.probabilities = (logits - lse[:, None]).exp_()
        self.top = logits.argmax(-1)

    def compare(self, logits: Tensor, lse: Tensor, name: str) -> tuple[float, float]:
        """Sums over the span of KL(reference || model), in nats, and of top-1 agreement."""
        if logits.shape[-1] != self.logits.shape[-1]:
            raise ConfigError(
                f"{name} has {logits.shape[-1]} logits, the reference {self.logits.shape[-1]}: "
                "only models of one vocabulary can be compared"
            )
        device = self.logits.device
        logits, lse = logits.to(device), lse.to(device)
        # Σ p (log p - log q) = Σ p (x - y) - lse(x) + lse(y), with x, y the two logits.
        gap = (self.logits - logits).mul_(self.probabilities).sum(-1)
        divergence = (gap - self.lse + lse).double().sum().item()
        return divergence, (logits.argmax(-1) == self.top).sum().item()


class _Runner:
    """Backbone and output head of one causal language model.

    Logits of a whole window are large (2048 x 49152 fp32: 400 MB), hidden states are not: the
    head is applied to a few tokens at a time. Models whose logits are more than head(hidden), such
    as those that cap or scale them, are found by trying, and run whole.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device
        backbone = getattr(model, getattr(model, "base_model_prefix", None) or "model", None)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        probe = torch.arange(4, device=self.device)[None]
        whole = model(probe, use_cache=False).logits
        self.vocabulary = whole.shape[-1]
        self.backbone, self.head = backbone, head
        if not isinstance(backbone, nn.Module) or backbone is model or head is None:
            self.backbone = None
        else:
            parts = head(backbone(probe, use_cache=False).last_hidden_state)
            scale = whole.float().abs().max().item()
            if parts.shape != whole.shape or (parts - whole).abs().max().item() > 0.02 * scale:
                self.backbone = None
        if self.backbone is None:
            log.info("%s: its head cannot be applied apart; whole logits are kept", name)

    def hidden(self, batch: Tensor) -> Tensor:
        """int64 [B, T] → hidden states [B, T, H], or logits [B, T, V] of an unusual model."""
        batch = batch.to(self.device)
        if self.backbone is None:
            return self.model(batch, use_cache=False).logits
        return self.backbone(batch, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor, row: int, begin: int, end: int) -> Tensor:
        """fp32 logits [end - begin, V] of one row of `hidden`'s batch."""
        part = hidden[row, begin:end]
        return (part if self.backbone is None else self.head(part)).float()


def _batches(windows: Sequence[Tensor], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of windows of similar length, longest first; padded size <= batch_tokens."""
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
    begin = 0
    while begin < len(order):
        size = max(1, batch_tokens // len(windows[order[begin]]))
        yield order[begin : begin + size]
        begin += size


def _pad(rows: list[Tensor]) -> Tensor:
    """int64 [B, T]: padding stands on the right, where causal attention never looks back from."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)


def _spans(length: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    step = max(1, LOGIT_ELEMENTS // vocabulary)
    return ((begin, min(begin + step, length)) for begin in range(0, length, step))


def _token_ids(tokenizer: Any, text: str) -> Tensor:
    """int64 [T] with the tokenizer's own special tokens, without its length warning."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
