"""The operator: equal to the reference in every layout, checked arguments, traceable."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from marlin_kernel import (
    INTEGER_TYPES,
    WEIGHT_TYPES,
    ConfigError,
    QuantizedLinear,
    backends,
    dense,
    gemm,
    gradient,
    mul,
    ops,
    reference,
)
from marlin_kernel import Layer as PackedLayer
from marlin_kernel.backends import Prepared, prepare, restore, select_backend
from marlin_kernel.formats import LayerSpec, write
from marlin_kernel.layout import permute_columns
from tests.cases import TYPED_SIZES, random_layer

U4B8 = WEIGHT_TYPES["uint4b8"]
CPU = torch.device("cpu")
LAYOUTS = ("codes", "marlin")
# Largest error relative to the norm of the result, against products accumulated in float64
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def arguments(layer, layout, dtype=torch.float32):
    """Arguments of `gemm` after the activations."""
    act_order = layer.g_idx is not None
    p = prepare(layout, write(layer, "marlin", act_order=act_order), layer.spec, dtype)
    k, n = layer.codes.shape
    tensors = (p.weights, p.scales, p.zeros, p.perm, layer.bias)
    group_size = layer.group_size if p.group_size is None else p.group_size
    return *tensors, k, n, group_size, layer.weight_type.name, p.layout, False, layer.global_scale


def relative_error(out, expected):
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("k", "n", "wtype", "g"), TYPED_SIZES)
@pytest.mark.parametrize("act_order", [False, True])
def test_gemm_equals_the_reference(layout, k, n, wtype, g, act_order):
    layer = random_layer(k, n, wtype, g, act_order=act_order, bias=True)
    a = torch.randn(17, k)
    out = gemm(a, *arguments(layer, layout))
    expected = reference.matmul(a, layer.dequantize(), layer.bias)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 15, 16, 17, 65, 1000])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes_and_batches(layout, m, dtype):
    layer = random_layer(576, 192, U4B8, 64)
    a = torch.randn(m, 576).to(dtype)
    out = gemm(a, *arguments(layer, layout, dtype))
    assert out.dtype == dtype and out.shape == (m, 192)
    assert relative_error(out, reference.matmul(a, layer.dequantize())) < TOLERANCE[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_strides(layout):
    layer = random_layer(96, 40, U4B8, 32, act_order=True)
    args = arguments(layer, layout)
    a = torch.randn(2, 3, 96)
    expected = reference.matmul(a, layer.dequantize())
    torch.testing.assert_close(gemm(a, *args), expected)
    torch.testing.assert_close(gemm(a[0, 0], *args), expected[0, 0])
    wide = torch.randn(2, 3, 200)
    wide[..., ::2][..., :96] = a
    torch.testing.assert_close(gemm(wide[..., ::2][..., :96], *args), expected)
    torch.testing.assert_close(gemm(a.transpose(0, 1), *args), expected.transpose(0, 1))
    assert gemm(torch.randn(0, 96), *args).shape == (0, 40)
    assert gemm(torch.randn(2, 0, 96), *args).shape == (2, 0, 40)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeated_calls_are_bit_equal_and_inputs_untouched(layout):
    layer = random_layer(100, 40, WEIGHT_TYPES["uint8"], 32, bias=True)
    args = arguments(layer, layout)
    kept = [t.clone() for t in args if isinstance(t, torch.Tensor)]
    a = torch.randn(5, 100)
    first = gemm(a, *args)
    assert torch.equal(gemm(a.clone(), *args), first)
    assert all(torch.equal(x, y) for x, y in zip(kept, args, strict=False) if y is not None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act_order", [False, True])
def test_opcheck(layout, act_order):
    layer = random_layer(64, 32, WEIGHT_TYPES["uint4"], 32, act_order=act_order, bias=True)
    torch.library.opcheck(gemm, (torch.randn(3, 64), *arguments(layer, layout)))
    torch.library.opcheck(gemm, (torch.randn(2, 3, 64).half(), *arguments(layer, layout)))


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (torch.zeros(2, 64, dtype=torch.int32), "dtype torch.int32"),
        (torch.zeros(2, 64, dtype=torch.float64), "dtype torch.float64"),
        (torch.zeros(2, 65), r"\[2, 65\] do not end in the 64 inputs"),
        (torch.zeros(2, 64, device="meta"), "activations are on meta, the weights on cpu"),
    ],
)
def test_gemm_rejects_activations(a, message):
    with pytest.raises(ConfigError, match=message):
        gemm(a, *arguments(random_layer(64, 32, U4B8, 32), "codes"))


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*LAYOUTS, "sm80", "sm90"])
@pytest.mark.parametrize(("k", "n", "wtype", "g"), TYPED_SIZES)
@pytest.mark.parametrize("act_order", [False, True])
def test_restore_inverts_prepare(layout, k, n, wtype, g, act_order):
    layer = random_layer(k, n, wtype, g, act_order=act_order)
    tensors = write(layer, "marlin")
    prepared = prepare(layout, tensors, layer.spec, torch.float16)
    back = restore(prepared, layer.spec)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("layout", ["sm80", "sm90"])
@pytest.mark.parametrize(("k", "n"), [(64, 64), (576, 192), (100, 72), (256, 320)])
@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize("act_order", [False, True])
def test_kernel_layouts_are_permutations(layout, k, n, group_size, act_order):
    """The conversion of the kernels themselves, which runs on any device, can be undone."""
    try:
        backends.kernels(layout)
    except ConfigError:
        pytest.skip(f"this build has no {layout} kernels")
    layer = random_layer(k, n, U4B8, group_size, act_order=act_order)
    tensors = write(layer, "marlin")
    prepared = prepare(layout, tensors, layer.spec, torch.bfloat16)
    assert prepared.weights.numel() == tensors["B"].numel()
    assert prepared.scales.dtype == torch.float16
    back = restore(prepared, layer.spec)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


OTHER_TYPES = [t for t in WEIGHT_TYPES.values() if t.name not in INTEGER_TYPES]


def any_layer(k, n, wtype, group_size, bias=False):
    """Random weights rounded to any type."""
    b = torch.randn(n).half() if bias else None
    return QuantizedLinear.quantize(torch.randn(k, n), wtype, group_size, b)


@pytest.mark.parametrize("layout", [*LAYOUTS, "sm80", "sm90"])
@pytest.mark.parametrize("wtype", OTHER_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize(("k", "n"), [(128, 64), (200, 100), (12, 8)])
def test_restore_inverts_prepare_for_other_types(layout, k, n, wtype):
    for group_size in wtype.group_sizes:
        layer = any_layer(k, n, wtype, group_size)
        tensors = write(layer, "marlin")
        prepared = prepare(layout, tensors, layer.spec, torch.bfloat16)
        back = restore(prepared, layer.spec, layer.global_scale)
        assert back.keys() == tensors.keys()
        for name in tensors:
            same = (t.view(torch.uint8) for t in (back[name], tensors[name]))
            assert torch.equal(*same), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("wtype", OTHER_TYPES, ids=lambda t: t.name)
def test_other_types_multiply(layout, dtype, wtype):
    for k, n, group_size in ((200, 100, wtype.group_sizes[0]), (12, 8, wtype.group_sizes[-1])):
        layer = any_layer(k, n, wtype, group_size, bias=True)
        a = torch.randn(3, k).to(dtype)
        out = gemm(a, *arguments(layer, layout, dtype))
        expected = reference.matmul(a, layer.dequantize(), layer.bias)
        assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounded_activations(activation, layout):
    layer = any_layer(200, 100, U4B8, 64, bias=True)
    a = torch.randn(5, 200).half()
    out = gemm(a, *arguments(layer, layout), activation=activation)
    codes, scales = reference.quantize_activations(a, ops.ACTIVATION_DTYPES[activation])
    rounded = codes.double() * scales.double()[:, None]
    expected = rounded @ layer.dequantize(torch.float64) + layer.bias.double()
    assert relative_error(out, expected) < TOLERANCE[torch.float16]
    assert relative_error(out, reference.matmul(a, layer.dequantize(), layer.bias)) > 2e-3


def check_gradients(a, bias, product, weights, tolerance):
    """Gradients of `a` [..., K] and `bias` against a plain product with `weights` [K, N]."""
    a, bias = a.requires_grad_(), bias.to(a.dtype).requires_grad_()
    out = product(a, bias)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (a, bias), grad)
    expected = grad.double() @ weights.double().T, grad.double().reshape(-1, grad.shape[-1]).sum(0)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == a.dtype
        assert relative_error(one, other) < tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,)])
@pytest.mark.parametrize(("k", "n", "wtype", "g"), [s for s in TYPED_SIZES if s[0] < 200][:4])
def test_gradients(layout, shape, k, n, wtype, g, monkeypatch):
    monkeypatch.setattr(gradient, "_ROWS", 50)
    layer = random_layer(k, n, wtype, g, act_order=True, bias=True)
    args = list(arguments(layer, layout))

    def product(a, bias):
        return gemm(a, *args[:4], bias, *args[5:])

    if shape == (0,):
        a = torch.empty(0, k, requires_grad=True)
        gemm(a, *args).sum().backward()
        assert a.grad.shape == a.shape
    else:
        check_gradients(torch.randn(*shape, k), layer.bias, product, layer.dequantize(), 1e-6)


@pytest.mark.parametrize("wtype", OTHER_TYPES, ids=lambda t: t.name)
def test_gradients_of_other_types(wtype):
    layer = any_layer(192, 64, wtype, wtype.group_sizes[0], bias=True)
    a = torch.randn(7, 192, requires_grad=True)
    gemm(a, *arguments(layer, "codes")).sum().backward()
    assert relative_error(a.grad[0], layer.dequantize().sum(1)) < 1e-6


def test_gradients_of_rounded_activations_are_those_without_rounding():
    layer = any_layer(200, 100, U4B8, 64, bias=True)
    a = torch.randn(5, 200, requires_grad=True)
    out = gemm(a, *arguments(layer, "codes"), activation="int8")
    grad = torch.randn_like(out)
    expected = grad @ layer.dequantize().T
    assert relative_error(torch.autograd.grad(out, a, grad)[0], expected) < 1e-6


def test_an_adapter_trains_on_a_compiled_packed_layer():
    """LoRA: two small matrices beside a frozen packed layer."""
    layer = random_layer(128, 64, U4B8, 64)
    packed = PackedLayer.from_quantized(layer).prepare(torch.float32)
    down, up = torch.nn.Linear(128, 4, bias=False), torch.nn.Linear(4, 64, bias=False)
    first = torch.nn.Linear(128, 128)

    def loss(x):
        x = first(x)
        return (packed(x) + up(down(x))).square().mean()

    x, parameters = torch.randn(9, 128), [*first.parameters(), *down.parameters()]
    plain = torch.autograd.grad(loss(x), parameters)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), parameters), plain)
    assert all(bool(g.abs().sum() > 0) for g in plain)


class FakeKernels:
    """Stands in for the module of a GPU kernel: float32 arithmetic."""

    def __init__(self):
        self.calls = []
        self.taken = []

    def supports(self, device, weight_type_name, group_size, dtype, *features):
        self.calls.append((device.type, weight_type_name, group_size, dtype))
        return weight_type_name == "uint4b8" and dtype is torch.float16

    def gemm(
        self,
        a,
        b,
        s,
        bias,
        out,
        k,
        n,
        k_padded,
        n_padded,
        group_size,
        batch_invariant=False,
        **more,
    ):
        assert a.dim() == 2 and a.stride(1) == 1 and out.shape == (a.shape[0], n)
        self.taken.append(a)
        self.calls.append((k, n, k_padded, n_padded, max(group_size, 0), batch_invariant))
        spec_group = k if group_size <= 0 else group_size
        assert more["weight_type"] == "uint4b8"
        if "zeros" in more:  # sm80: the words as on disk, one group in natural order
            assert more["zeros"] is None
            s = s if group_size > 0 else permute_columns(s, grouped=False)
            codes, scales, _ = backends.natural(b, s, None, k, n, U4B8)
        else:
            spec = LayerSpec(k, n, U4B8, spec_group)
            stored = restore(Prepared("sm90", b, s, None, None), spec)
            codes, scales, _ = backends.natural(stored["B"], stored["s"], None, k, n, U4B8)
        out.copy_(dense.multiply(a, codes, scales, None, bias, spec_group, U4B8))

    def product(self, m, sizes, dtype, index, batch_invariant, act_order):
        assert (dtype, index, act_order) == (torch.float16, -1, False)

        def multiply(a, b, s, bias, out, global_scale, perm):
            assert perm is global_scale is None
            assert a.is_contiguous() or (a.dim() == 2 and a.stride(1) == 1)
            assert out.is_contiguous() and out.numel() == m * sizes.n
            a, out = a.reshape(-1, sizes.k), out.view(-1, sizes.n)
            more = {"weight_type": sizes.weight_type}
            self.gemm(a, b, s, bias, out, *sizes[:5], batch_invariant, **more)

        return SimpleNamespace(multiply=multiply)


@pytest.fixture
def fake_kernels(monkeypatch):
    fake = FakeKernels()
    monkeypatch.setattr(backends, "kernels", lambda layout: fake)
    return fake


@pytest.mark.parametrize("layout", ["sm80", "sm90"])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_kernel_layouts_call_their_module(fake_kernels, layout, group_size):
    layer = random_layer(100, 40, U4B8, group_size, bias=True)
    a = torch.randn(5, 200).half()[:, ::2]  # strided: made contiguous for the kernel
    out = gemm(a, *arguments(layer, layout, torch.float16))
    expected = reference.matmul(a, layer.dequantize(), layer.bias)
    assert relative_error(out, expected) < TOLERANCE[torch.float16]
    assert fake_kernels.calls == [(100, 40, 128, 64, max(group_size, 0), False)]
    tensors = write(layer, "marlin")
    prepared = prepare(layout, tensors, layer.spec, torch.float16)
    back = restore(prepared, layer.spec)
    assert torch.equal(back["B"], tensors["B"]) and torch.equal(back["s"], tensors["s"])


@pytest.mark.parametrize("layout", ["sm80", "sm90"])
def test_kernel_layouts_take_activations_of_any_strides(fake_kernels, layout):
    """Kernels read rows of any stride: only what no row stride describes is copied."""
    layer = random_layer(64, 40, U4B8, 32, bias=True)
    of_one, of_three = torch.randn(64).half(), torch.randn(2, 3, 64).half()
    cases = {
        "one row": (of_one, True),
        "two dimensions": (of_three[0], True),
        "rows apart": (of_three[:, 1], True),
        "three dimensions": (of_three, True),
        "no tokens": (of_three[:, :0], True),
        "one row of other strides": (torch.randn(128).half()[::2], False),
        "transposed": (of_three.transpose(0, 1), False),
        "every second input": (torch.randn(2, 3, 128).half()[..., ::2], False),
    }
    for name, (a, in_place) in cases.items():
        fake_kernels.taken.clear()
        out = gemm(a, *arguments(layer, layout, torch.float16))
        assert out.shape == (*a.shape[:-1], 40) and out.is_contiguous(), name
        expected = reference.matmul(a.reshape(-1, 64), layer.dequantize(), layer.bias)
        if a.numel():
            assert relative_error(out.view(-1, 40), expected) < TOLERANCE[torch.float16], name
            (taken,) = fake_kernels.taken
            assert (taken.data_ptr() == a.data_ptr()) == in_place, name


@pytest.mark.parametrize("layout", ["sm80", "sm90"])
def test_kernel_layouts_reject_float32(fake_kernels, layout):
    layer = random_layer(128, 64, U4B8, 32)
    with pytest.raises(ConfigError, match=f"{layout} kernels do not take .*float32.*prepare"):
        gemm(torch.randn(2, 128), *arguments(layer, layout, torch.float16))


def test_selection(fake_kernels, monkeypatch):
    spec = LayerSpec(128, 64, U4B8, 128)
    cuda = torch.device("cuda", 0)
    assert select_backend(CPU, spec, torch.float16).layout == "codes"
    assert select_backend(cuda, spec, torch.float16).layout == "sm90"
    assert fake_kernels.calls[-1] == ("cuda", "uint4b8", -1, torch.float16)
    assert select_backend(cuda, spec, torch.float32).layout == "marlin"
    shard = LayerSpec(128, 64, U4B8, 32, act_order=True, shard_groups=8)
    assert select_backend(cuda, shard, torch.float16).layout == "sm90"
    eight = LayerSpec(128, 64, WEIGHT_TYPES["uint8"], 32)  # fake_kernels refuses it
    chosen = select_backend(cuda, eight, torch.float16)
    assert chosen.layout == "marlin" and "no kernel for uint8" in chosen.reason
    monkeypatch.setenv("MARLIN_KERNEL_BACKEND", "marlin")
    assert select_backend(CPU, spec, torch.float16).layout == "marlin"
    monkeypatch.setenv("MARLIN_KERNEL_BACKEND", "sm80")
    with pytest.raises(ConfigError, match="sm80 cannot serve uint8 with group_size=32"):
        select_backend(cuda, eight, torch.float16)
    monkeypatch.setenv("MARLIN_KERNEL_BACKEND", "cutlass")
    with pytest.raises(ConfigError, match="'cutlass' is not one of codes, marlin"):
        select_backend(CPU, spec, torch.float16)


def test_kernels_that_are_not_installed_are_not_chosen(monkeypatch):
    def absent(layout):
        raise ConfigError("not there")

    monkeypatch.setattr(backends, "kernels", absent)
    spec = LayerSpec(128, 64, U4B8, 128)
    assert select_backend(torch.device("cuda", 0), spec, torch.float16).layout == "marlin"


# ---- mul -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wtype", WEIGHT_TYPES.values(), ids=lambda t: t.name)
def test_mul_of_every_type(wtype):
    layer = any_layer(256, 128, wtype, wtype.group_sizes[-1])
    tensors = write(layer, "marlin")
    a = torch.randn(3, 256).bfloat16()
    out = torch.full((3, 128), 7.0).bfloat16()
    more = {name: tensors.get(name) for name in ("z", "g_idx", "global_scale")}
    mul(a, tensors["B"], out, tensors["s"], weight_type=wtype.name, **more)
    expected = reference.matmul(a, layer.dequantize())
    assert relative_error(out, expected) < TOLERANCE[torch.bfloat16]
    if wtype.global_scale or not wtype.symmetric:
        with pytest.raises(ConfigError, match=f"do not fit {wtype.name}"):
            mul(a, tensors["B"], out, tensors["s"], weight_type=wtype.name)


@pytest.mark.parametrize("group_size", [-1, 128])
def test_mul_of_the_original(group_size):
    layer = random_layer(256, 256, U4B8, group_size)
    tensors = write(layer, "marlin")
    a = torch.randn(3, 256).half()
    out = torch.full((3, 256), 7.0).half()
    workspace = torch.zeros(256 // 128 * 16, dtype=torch.int32)
    assert mul(a, tensors["B"], out, tensors["s"], workspace, -1, -1, -1, 16) is None
    expected = reference.matmul(a, layer.dequantize())
    assert relative_error(out, expected) < TOLERANCE[torch.float16]
    assert not workspace.any()


def test_mul_converts_once_for_a_kernel(fake_kernels, monkeypatch):
    monkeypatch.setenv("MARLIN_KERNEL_BACKEND", "sm90")
    layer = random_layer(128, 256, U4B8, -1)
    tensors = write(layer, "marlin")
    converted = []
    original = backends.prepare
    monkeypatch.setattr(backends, "prepare", lambda *args: converted.append(1) or original(*args))
    a, out = torch.randn(3, 128).half(), torch.zeros(3, 256).half()
    for _ in range(2):
        mul(a, tensors["B"], out, tensors["s"])
    assert len(converted) == 1
    tensors["B"].copy_(write(random_layer(128, 256, U4B8, -1), "marlin")["B"])
    before = out.clone()
    mul(a, tensors["B"], out, tensors["s"])  # new contents: converted again
    assert len(converted) == 2 and not torch.equal(out, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A": torch.zeros(2, 128).half()}, "do not belong together"),
        ({"s": torch.zeros(1, 128).half()}, "do not belong together"),
        ({"s": torch.zeros(0, 256).half()}, "do not belong together"),
        ({"s": torch.zeros(3, 256).half()}, "do not belong together"),  # 256 / 3 inputs
        ({"s": torch.zeros(256, 256).half()}, "group_size=1 is not in"),
        ({"s": torch.zeros(2, 256)}, r"s is torch.float32 \[2, 256\].*torch.float16 \[2, 256\]"),
        ({"s": torch.zeros(2, 256).half().to("meta")}, "s is on meta, A on cpu"),
        ({"B": torch.zeros(16, 512).long()}, "B is torch.int64"),
        ({"B": torch.zeros(16, 512)}, "B is torch.float32"),
        ({"g_idx": torch.zeros(3, dtype=torch.int32)}, r"g_idx is .* \[3\]; .* \[256\]"),
        ({"z": torch.zeros(1, 1, dtype=torch.int32), "weight_type": "uint4"}, r"z is .* \[1, 1\]"),
        ({"C": torch.zeros(3, 256).half()}, "must share the dtype"),
        ({"C": torch.zeros(2, 256)}, "must share the dtype"),
        ({"C": torch.zeros(2, 256).half().to("meta")}, "C is on meta, A on cpu"),
    ],
)
def test_mul_rejects(changes, message):
    tensors = write(random_layer(256, 256, U4B8, 128), "marlin")
    arguments = {
        "A": torch.zeros(2, 256).half(),
        "B": tensors["B"],
        "C": torch.zeros(2, 256).half(),
        "s": tensors["s"],
    }
    with pytest.raises(ConfigError, match=message):
        mul(**(arguments | changes))


# ---- GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("k", "n", "g"), [(576, 192, 64), (576, 1536, -1), (256, 256, 128)])
def test_gpu_layouts_equal_the_reference(dtype, k, n, g):
    layer = random_layer(k, n, U4B8, g, bias=True).to("cuda")
    layout = select_backend(layer.codes.device, layer.spec, dtype).layout
    for chosen in {layout, "marlin", "codes"}:
        stored = write(layer, "marlin")
        del stored["bias"]
        prepared = prepare(chosen, stored, layer.spec, dtype)
        assert isinstance(prepared, Prepared)
        a = torch.randn(33, k, device="cuda", dtype=dtype)
        out = gemm(a, *arguments(layer, chosen, dtype))
        expected = reference.matmul(a, layer.dequantize(), layer.bias)
        assert relative_error(out, expected) < TOLERANCE[dtype], chosen
        back = restore(prepared, layer.spec)
        assert all(torch.equal(back[name], t) for name, t in stored.items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", WEIGHT_TYPES)
def test_gpu_gradients(name):
    wtype = WEIGHT_TYPES[name]
    dtype = torch.bfloat16 if name == "mxfp4" else torch.float16
    layer = any_layer(1152, 192, wtype, wtype.group_sizes[-1], bias=True).to("cuda")
    for layout in ("marlin", "sm80", select_backend(layer.codes.device, layer.spec, dtype).layout):
        args = list(arguments(layer, layout, dtype))

        def product(a, bias, args=args):
            return gemm(a, *args[:4], bias, *args[5:])

        a = torch.randn(2, 33, 1152, device="cuda", dtype=dtype)
        weights = layer.dequantize()
        check_gradients(a, layer.bias, product, weights, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("of_input", [False, True])
def test_gpu_layer_trains_its_bias(of_input):
    quantized = random_layer(256, 192, U4B8, 128, bias=True)
    layer = PackedLayer.from_quantized(quantized).to("cuda").prepare(torch.float16)
    layer.bias = torch.nn.Parameter(layer.bias)
    a = torch.randn(2, 5, 256, device="cuda").half().requires_grad_(of_input)
    out = layer(a)
    with torch.no_grad():
        assert torch.equal(layer(a), out)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected = grad.reshape(-1, 192).float().sum(0)
    torch.testing.assert_close(layer.bias.grad.float(), expected, rtol=1e-2, atol=1e-2)
    assert (a.grad is not None) == of_input
