"""Perplexity, KL divergence and top-1 agreement against slow obvious references."""

from __future__ import annotations

import math

import pytest
import torch
from cases import tiny_model
from eval_cases import VOCABULARY, byte_tokenizer

from eval import perplexity
from eval.perplexity import evaluate, evaluate_models, score_models, score_windows, windows_of
from gptq.texts import Documents, documents
from marlin_kernel.errors import ConfigError, DataError, NumericalError


def brute_force(model, window, reference=None):
    """Sums over one window: nll, KL, agreements, each prediction by itself in float64."""
    with torch.no_grad():
        logits = model(window[None]).logits[0, :-1].double()
        expected = None if reference is None else reference(window[None]).logits[0, :-1].double()
    nll = kl = top1 = 0.0
    for t, target in enumerate(window[1:].tolist()):
        log_q = logits[t].log_softmax(-1)
        nll -= log_q[target].item()
        if expected is not None:
            log_p = expected[t].log_softmax(-1)
            kl += (log_p.exp() * (log_p - log_q)).sum().item()
            top1 += float(log_p.argmax() == log_q.argmax())
    return nll, kl, top1


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(1)
    return tiny_model(vocab_size=VOCABULARY), tiny_model(vocab_size=VOCABULARY)


@pytest.fixture
def windows():
    lengths = (17, 40, 2, 40, 9)  # of different lengths, so that batches are padded
    return [torch.randint(3, VOCABULARY, (n,)) for n in lengths]


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
@pytest.mark.parametrize("elements", [1, 5 * VOCABULARY, 1 << 23])
def test_scores_equal_brute_force(models, windows, batch_tokens, elements, monkeypatch):
    monkeypatch.setattr(perplexity, "LOGIT_ELEMENTS", elements)
    model, reference = models
    scores = score_windows(model, windows, reference, batch_tokens=batch_tokens)
    assert scores.predictions.tolist() == [len(w) - 1 for w in windows]
    for i, window in enumerate(windows):
        nll, kl, top1 = brute_force(model, window, reference)
        assert scores.nll[i].item() == pytest.approx(nll, rel=1e-5)
        assert scores.kl[i].item() == pytest.approx(kl, rel=1e-4, abs=1e-5)
        assert scores.top1[i].item() == top1


def test_a_model_against_itself_is_exact(models, windows):
    scores = score_windows(models[0], windows, models[0])
    assert scores.kl.abs().max() == 0
    assert torch.equal(scores.top1, scores.predictions.double())


def test_several_models_at_once_equal_one_by_one(models, windows):
    together = score_models(dict(zip("ab", models, strict=True)), windows, reference="b")
    alone = score_windows(models[0], windows, models[1])
    assert torch.equal(together["a"].nll, alone.nll)
    assert torch.equal(together["a"].kl, alone.kl)
    assert list(together) == ["a", "b"]


def test_unusual_heads_run_whole(models, windows):
    """A model that scales its logits after the head must not be scored by the head alone."""

    class Scaled(torch.nn.Module):
        base_model_prefix = "model"

        def __init__(self, inner):
            super().__init__()
            self.inner, self.model = inner, inner.model

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def forward(self, ids, **kwargs):
            output = self.inner(ids, **kwargs)
            output.logits = output.logits / 3
            return output

    model = Scaled(models[0])
    scores = score_windows(model, windows)
    for i, window in enumerate(windows):
        assert scores.nll[i].item() == pytest.approx(brute_force(model, window)[0], rel=1e-5)


def test_standard_error_is_clustered_by_window():
    scores = perplexity.WindowScores(
        torch.tensor([10, 10, 10, 10]),
        torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64),
        None,
        None,
        0.0,
    )
    found = scores.estimate(scores.nll)
    means = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert found.mean == pytest.approx(2.5)
    assert found.se == pytest.approx((means.std() / 2).item())


def test_one_window_has_no_error(models):
    scores = score_windows(models[0], [torch.arange(3, 30)])
    assert scores.estimate(scores.nll).se is None


def test_evaluate_reports_protocol_and_reads_whole_windows(models):
    text = documents("pydoc", "heldout").text()
    result = evaluate(
        models[0], byte_tokenizer(), ["pydoc"], seqlen=64, max_tokens=300, progress=False
    )[0]
    ids = byte_tokenizer()(text)["input_ids"]
    windows = [torch.tensor(ids[i * 64 : i * 64 + 64]) for i in range(4)]
    nll = sum(brute_force(models[0], w)[0] for w in windows) / (4 * 63)
    assert result.tokens == 4 * 63
    assert result.nll == pytest.approx(nll, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    assert result.kl is None and result.top1 is None
    assert "no BOS" in result.protocol and "first 4 of" in result.protocol


def test_evaluate_models_compares_with_the_reference(models):
    named = {"FP32": models[0], "INT4": models[1]}
    results = evaluate_models(
        named,
        byte_tokenizer(),
        ["pydoc"],
        seqlen=64,
        max_tokens=128,
        reference="FP32",
        progress=False,
    )
    assert results["FP32"][0].kl == 0 and results["FP32"][0].top1 == 1
    assert results["INT4"][0].kl > 0


def test_documents_are_truncated_and_tiny_ones_left_out():
    docs = Documents("d", "heldout", ("abcdefgh", "x", "abc"), False, "p", "o", "0")
    windows, protocol = windows_of(docs, byte_tokenizer(), 5)
    assert [len(w) for w in windows] == [5, 3]
    assert "2 documents" in protocol


def test_text_shorter_than_a_window_is_one_window():
    docs = Documents("d", "heldout", ("abc", "de"), True, "p", "o", "0")
    windows, protocol = windows_of(docs, byte_tokenizer(), 100)
    assert [len(w) for w in windows] == [7]  # "abc", blank line, "de"
    assert "all 7 tokens, less than one window" in protocol


@pytest.mark.parametrize("joined", [True, False])
def test_max_tokens_is_never_exceeded(joined):
    docs = Documents("d", "heldout", ("abcdefgh", "ijklmnop"), joined, "p", "o", "0")
    windows, _ = windows_of(docs, byte_tokenizer(), 8, max_tokens=8)
    assert [len(w) for w in windows] == [8]
    windows, protocol = windows_of(docs, byte_tokenizer(), 8, max_tokens=7)
    assert [len(w) for w in windows] == [7] and "cut to 7 tokens, first 1 of 2 windows" in protocol


def test_errors(models):
    empty = Documents("d", "heldout", ("x",), True, "p", "o", "0")
    with pytest.raises(DataError, match="shorter than two tokens"):
        windows_of(empty, byte_tokenizer(), 8)
    with pytest.raises(ConfigError, match="seqlen=1"):
        windows_of(empty, byte_tokenizer(), 1)
    other = tiny_model(vocab_size=64)
    with pytest.raises(ConfigError, match="only models of one vocabulary"):
        score_windows(other, [torch.arange(3, 20)], models[0])
    broken = tiny_model(vocab_size=VOCABULARY)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="model gives NaN"):
        score_windows(broken, [torch.arange(3, 20)])
