"""Float32 products from TF32 ones: as exact as float32's own, on a CPU that cuts operands alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptq import products


def cut(a: Tensor) -> Tensor:
    """What a tensor core sees of a float32: the 13 last bits are gone."""
    return a.view(torch.int32).bitwise_and(-1 << 13).view(torch.float32)


@pytest.fixture
def tensor_cores(monkeypatch):
    """Run the products of tensor cores on CPU tensors."""

    def product(out: Tensor, a: Tensor, b: Tensor, alpha: float, add: bool) -> None:
        out.addmm_(cut(a), cut(b), beta=1.0 if add else 0.0, alpha=alpha)

    monkeypatch.setattr(products, "_on_tensor_cores", lambda device: True)
    monkeypatch.setattr(products, "_tf32_product", product)


def matrices(p: int, q: int, r: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Entries of very different size, signs and all."""
    draw = torch.Generator().manual_seed(p + q + r)
    a = torch.randn(p, q, generator=draw) * torch.rand(q, generator=draw).mul(20).exp()
    b = torch.randn(q, r, generator=draw) * torch.rand(r, generator=draw).mul(20).exp()
    return a.to(device), b.to(device)


def relative_error(found: Tensor, a: Tensor, b: Tensor) -> float:
    """Largest error of an entry, relative to the sum of its terms' magnitudes."""
    magnitude = a.double().abs() @ b.double().abs()
    return float(((found - a.double() @ b.double()).abs() / magnitude).max())


@pytest.mark.parametrize("shape", [(40, 30, 20), (33, 300, 70), (1, 1, 1)])
def test_split_products_lose_no_more_than_float32(shape, tensor_cores, monkeypatch):
    a, b = matrices(*shape)
    monkeypatch.setattr(products, "_ROWS", 16)
    limit = 2.0**-20
    assert relative_error(products.multiply(a, b), a, b) < limit
    assert relative_error(products.multiply(products.split(a), products.split(b)), a, b) < limit
    left = torch.randn(shape[1], shape[0])
    assert relative_error(products.multiply(left.T, b), left.T, b) < limit
    if shape[1] > 1:
        assert relative_error(cut(a) @ cut(b), a, b) > 16 * limit  # guards the fixture
    out = torch.ones(shape[0], shape[2])
    products.accumulate(out, a, b, alpha=-2)
    assert relative_error((1 - out) / 2, a, b) < 2 * limit + 1e-6


def test_short_operands_are_not_split(tensor_cores):
    a, _ = matrices(50, 60, 1)
    codes = torch.randint(-255, 256, (60, 30)).float()
    operand = products.split(codes, short=True)
    assert operand.tail is None and operand[3:7].shape == (4, 30)
    assert relative_error(products.multiply(a, operand), a, codes) < 2.0**-20


def test_a_split_is_exact_and_its_head_short():
    a = matrices(64, 64, 1)[0]
    part = a.view(torch.int32).add(1 << 12).bitwise_and(-1 << 13).view(torch.float32)
    assert torch.equal(cut(part), part)
    assert torch.equal(part + (a - part), a)
    assert float(((a - part) / a).abs().max()) <= 2.0**-11


def test_what_is_not_finite_stays_so(tensor_cores):
    a, b = matrices(4, 8, 3)
    a[1, 2], a[2, 3] = float("nan"), float("inf")
    found = products.multiply(a, b)
    assert not bool(torch.isfinite(found[1:3]).any()) and bool(torch.isfinite(found[[0, 3]]).all())


@pytest.mark.parametrize("k", [5, 512, 700, 1300])
def test_triangles(k, tensor_cores):
    draw = torch.Generator().manual_seed(k)
    a, b = torch.randn(k, k, generator=draw).triu(), torch.randn(k, 9, generator=draw)
    assert relative_error(products.upper_times(a, b), a, b) < 2.0**-20
    assert relative_error(products.transposed_upper_times(a, b), a.T, b) < 2.0**-20


def test_elsewhere_products_are_plain():
    a, b = matrices(20, 30, 10)
    assert products.split(a) is a and not products.on_tensor_cores(a)
    assert torch.equal(products.multiply(a, b), a @ b)
    out = torch.ones(20, 10)
    products.accumulate(out, a, b, alpha=-1)
    assert torch.equal(out, torch.ones(20, 10).addmm_(a, b, alpha=-1))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 4096, 1000), (1000, 128, 4096), (257, 11008, 512)])
def test_products_on_the_gpu(shape):
    """Sums of tensor cores are cut instead of rounded: a few units more for long ones."""
    a, b = matrices(*shape, device="cuda")
    split = products.multiply(a, b)
    assert relative_error(split, a, b) < 2.0**-19
    codes = torch.randint(-8, 8, b.shape, device="cuda").float()
    found = products.multiply(a, products.split(codes, short=True))
    assert relative_error(found, a, codes) < 2.0**-19
    assert not torch.backends.cuda.matmul.allow_tf32
