"""Samples in batches, and where their activations lie."""

from __future__ import annotations

import pytest
import torch

from gptq.activations import Activations
from gptq.calibration import make_batches
from tests.gptq_models import token_samples


@pytest.mark.parametrize("step_tokens", [1, 30, 64, 1000])
def test_every_token_is_in_exactly_one_batch(step_tokens):
    samples = token_samples(count=20, length=30)
    batches = make_batches(samples, step_tokens)
    found = []
    for batch in batches:
        flat = batch.ids.flatten()
        real = flat if batch.valid is None else flat[batch.valid]
        assert batch.tokens == real.numel()
        assert batch.ids.numel() <= max(step_tokens, batch.ids.shape[1])
        found.append(real)
    assert sorted(torch.cat(found).tolist()) == sorted(torch.cat(samples).tolist())


def test_single_samples_keep_their_order_and_need_no_padding():
    samples = token_samples()
    batches = make_batches(samples, 1)
    assert all(torch.equal(b.ids[0], s) for b, s in zip(batches, samples, strict=True))
    assert all(b.valid is None for b in batches)


def test_padding_stands_behind_the_tokens():
    (batch,) = make_batches([torch.tensor([5, 6]), torch.tensor([7, 8, 9])], 100)
    assert batch.ids.tolist() == [[7, 8, 9], [5, 6, 0]]
    assert batch.valid.tolist() == [0, 1, 2, 3, 4]
    assert make_batches([], 100) == []


def test_activations_are_set_taken_and_copied():
    first = Activations(2)
    first[0], first[1] = torch.zeros(1), torch.ones(1)
    second = first.copy()
    second[0] = torch.full((1,), 7.0)
    assert [float(x) for x in first] == [0, 1] and [float(x) for x in second] == [7, 1]
    assert float(first.take(1)) == 1 and first[1] is None and float(second[1]) == 1
    assert len(first.like()) == 2
