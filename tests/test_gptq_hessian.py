"""Accumulating H = 2 X Xᵀ and factorizing it, including when it cannot be."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gptq.distributed import Workers
from gptq.hessian import _STRIPE, Factor, Hessian, factorize, invert_upper, is_finite
from marlin_kernel import NumericalError


@pytest.mark.parametrize("k", [8, _STRIPE, _STRIPE + 40, 2 * _STRIPE + 1])
def test_random_splits_sum_to_the_direct_product(k):
    """Stripes narrower, equal, and wider than K; samples of any length and shape."""
    draw = torch.Generator().manual_seed(k)
    x = torch.randn(300, k, generator=draw)
    h = Hessian(k, torch.device("cpu"))
    for part in x.split([1, 120, 79, 100]):
        h.add(part[None])
    exact = 2 * x.double().T @ x.double()
    assert h.tokens == 300 and h.matrix().dtype == torch.float32
    torch.testing.assert_close(h.matrix().double(), exact, rtol=1e-4, atol=1e-3)
    assert torch.equal(h.matrix(), h.matrix().T)


def test_half_precision_inputs_are_summed_in_float32():
    """Products of fp16 activations overflow fp16 (300² > 65504) and lose digits in bf16."""
    for dtype in (torch.float16, torch.bfloat16):
        x = (torch.randn(64, 16) * 300).to(dtype)
        h = Hessian(16, torch.device("cpu"))
        h.add(x)
        torch.testing.assert_close(h.matrix(), 2 * x.float().T @ x.float(), rtol=1e-5, atol=1)


def test_shift_and_lack_accumulate_what_they_say():
    k, n = 24, 10
    x, delta, lack = torch.randn(60, k), torch.randn(60, k), torch.randn(60, n)
    h = Hessian(k, torch.device("cpu"))
    assert h.shift is None and h.lack is None
    for rows in torch.arange(60).split([7, 30, 23]):
        h.add(x[rows][None], delta[rows][None], lack[rows][None])
    torch.testing.assert_close(h.shift, 2 * delta.T @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(h.lack, 2 * lack.T @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(h.matrix(), 2 * x.T @ x, rtol=1e-4, atol=1e-3)
    assert len(list(h.sums())) == 3


def test_more_tokens_may_come_after_a_look():
    """`matrix` mirrors in place; what it wrote below the diagonal must not be counted again."""
    k = _STRIPE + 40
    x = torch.randn(2, 50, k)
    h = Hessian(k, torch.device("cpu"))
    h.add(x[0])
    h.matrix()
    h.add(x[1])
    flat = x.reshape(-1, k)
    torch.testing.assert_close(h.matrix(), 2 * flat.T @ flat, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1000, 4096])
def test_error_of_tensor_core_sums(dtype, k):
    """Products are exact, sums of 8192 tokens lose up to a few ulps: tensor cores cut, not round.

    Inputs of one sign, whose sums only grow, are the worst case.
    """
    draw = torch.Generator("cuda").manual_seed(0)
    x = torch.rand(4, 8192, k, device="cuda", generator=draw).to(dtype)
    h = Hessian(k, x.device)
    for part in x:
        h.add(part)
    exact = sum(2 * part.double().T @ part.double() for part in x)
    assert float((h.matrix() - exact).norm() / exact.norm()) < 1e-4
    assert torch.equal(h.matrix(), h.matrix().T)


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "panel"), [(2000, None), (9000, None), (9000, 1024), (5100, 300)])
def test_factor_on_the_gpu(k, panel, monkeypatch):
    """R Rᵀ is the damped H, U its inverse: by the library and by panels, corners one by one and
    together."""
    if panel is not None:
        monkeypatch.setattr("gptq.hessian._BY_PANELS", k)
        monkeypatch.setattr("gptq.hessian._PANEL", panel)
    x = torch.randn(2 * k, k, device="cuda")
    h = 2 * x.T @ x
    factor = factorize(h, 0.01)
    r = factor.r.double()
    error = factor.u.double() @ r - torch.eye(k, device="cuda")
    assert float(error.abs().max()) < 1e-3
    damped = h.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    assert float((r @ r.T - damped).norm() / damped.norm()) < 1e-5
    assert torch.equal(factor.r, factor.r.triu()) and torch.equal(factor.u, factor.u.triu())
    h[k // 2, k // 2] = -1.0  # not positive definite, until damping is raised in vain
    with pytest.raises(NumericalError, match="cannot be factorized"):
        monkeypatch.setattr("gptq.hessian._MAX_RETRIES", 2)
        factorize(h, 0.01)


@pytest.mark.parametrize("k", [1, 511, 512, 513, 1100, 2300])
@pytest.mark.parametrize("batched", [0, 512, 1024])
def test_inverse_of_a_triangle(k, batched, monkeypatch):
    monkeypatch.setattr("gptq.hessian._BATCHED", batched)
    r = torch.randn(k, k, dtype=torch.float64).triu() / k**0.5 + 2 * torch.eye(k)
    for given in (r.float(), r.float().T.contiguous().T):
        u = invert_upper(given)
        assert torch.equal(u, u.triu())
        torch.testing.assert_close(u.double(), torch.linalg.inv(r), rtol=1e-4, atol=1e-5)


class Together(Workers):
    """Workers that are threads of this process."""

    def __init__(self, rank: int, barrier: threading.Barrier, parts: dict):
        self.rank, self.count, self._barrier, self._parts = rank, barrier.parties, barrier, parts

    def stack(self, part):
        assert part.is_contiguous()
        self._parts[self.rank] = part
        self._barrier.wait(60)
        whole = torch.stack([self._parts[rank] for rank in range(self.count)])
        self._barrier.wait(60)
        return whole


@pytest.mark.parametrize("k", [513, 700, 900])
def test_workers_share_the_inverse_of_a_triangle(k, monkeypatch):
    monkeypatch.setattr("gptq.hessian._LEAF", 64)
    monkeypatch.setattr("gptq.hessian._STEP", 32)
    monkeypatch.setattr("gptq.hessian._SHARED", 128)
    monkeypatch.setattr("gptq.hessian._BATCHED", 64)
    r = (torch.randn(k, k).triu() / k**0.5 + 2 * torch.eye(k)).contiguous()
    barrier, parts = threading.Barrier(3), {}
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda n: invert_upper(r, Together(n, barrier, parts)), range(3)))
    expected = torch.linalg.inv(r.double())
    for u in (invert_upper(r), *found):
        assert torch.equal(u, u.triu())
        torch.testing.assert_close(u.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_activation_is_noticed(bad):
    h = Hessian(2 * _STRIPE, torch.device("cpu"))
    x = torch.randn(4, 2 * _STRIPE)
    h.add(x)
    assert h.finite()
    x[2, _STRIPE + 3] = bad
    h.add(x)
    assert not h.finite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_value_anywhere_is_seen(dtype):
    largest = torch.finfo(dtype).max
    x = torch.full((9, 30), largest, dtype=dtype)
    assert is_finite(x) and is_finite(-x.T)
    for place in (0, 137, 269):
        for bad in (float("nan"), float("inf"), -float("inf")):
            wrong = x.clone()
            wrong.view(-1)[place] = bad
            assert not is_finite(wrong)


def check_factor(factor: Factor, h: torch.Tensor) -> None:
    """R Rᵀ is the damped H, U its inverse, both upper triangular."""
    k = h.shape[0]
    r, u = factor.r.double(), factor.u.double()
    assert torch.equal(r, r.triu()) and torch.equal(u, u.triu())
    damped = h.double() + factor.damping * h.double().diagonal().mean() * torch.eye(k)
    torch.testing.assert_close(r @ r.T, damped, rtol=1e-4, atol=1e-4 * float(damped.max()))
    identity = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u @ damped, identity, rtol=0, atol=5e-3)


@pytest.mark.parametrize("percdamp", [0.0, 0.01, 1.0])
def test_factor_of_a_good_hessian(percdamp, caplog):
    x = torch.randn(400, 50)
    h = 2 * x.T @ x
    factor = factorize(h, percdamp)
    check_factor(factor, h)
    assert (factor.damping, factor.retries) == (percdamp, 0) and not caplog.records


@pytest.mark.parametrize("h", [
    torch.ones(20, 20),
    torch.diag(torch.tensor([1.0] * 19 + [-0.02])),
    torch.eye(20) + torch.eye(20).roll(1, 0) + torch.eye(20).roll(-1, 0),
], ids=["rank 1", "negative", "indefinite"])  # fmt: skip
def test_damping_is_raised_until_it_works_and_logged(h, caplog):
    with caplog.at_level(logging.WARNING):
        factor = factorize(h, 0.0, "layers.1.mlp.down_proj")
    check_factor(factor, h)
    assert factor.damping > 0
    assert factor.retries == len(caplog.records) > 0
    assert all("layers.1.mlp.down_proj" in r.getMessage() for r in caplog.records)
    assert f"{factor.damping:.2g}" in caplog.records[-1].getMessage()


def test_few_tokens_with_the_default_damping_are_no_event(caplog):
    """5 tokens, 64 inputs: singular, but damping 0.1 makes it well-conditioned at once."""
    x = torch.randn(5, 64)
    h = 2 * x.T @ x
    factor = factorize(h, 0.1)
    check_factor(factor, h)
    assert factor.retries == 0 and not caplog.records


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_names_the_layer_and_the_way_out(bad):
    h = torch.eye(8)
    h[3, 4] = bad
    with pytest.raises(NumericalError, match=r"layers\.2\.x: .*NaN or Inf.*--dtype"):
        factorize(h, 0.1, "layers.2.x")


def test_a_hopeless_hessian_names_the_layer_and_the_way_out():
    h = torch.diag(torch.tensor([1.0] * 10 + [-1e6, 1e6 - 9]))
    with pytest.raises(NumericalError, match=r"layers\.2\.x: .*cannot be factorized.*--nsamples"):
        factorize(h, 0.1, "layers.2.x")
