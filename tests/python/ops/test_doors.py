"""An operation's two doors: which one a call takes, and that both lead to the same numbers."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

from qlora_native import PagedAdamW, nf4_quantize
from qlora_native.ops.doors import needs_dispatcher
from support import (
    BATCHES,
    K,
    N,
    dispatcher,
    lora_layer,
    lora_results,
    make_base,
    nf4_layer,
    over_bases,
    over_dtypes,
    same_bits,
)

DIRECT = {"_NF4LinearBackward", "_LoRALinearBackward"}


def door_of(y: torch.Tensor) -> str:
    return "direct" if y.grad_fn.name() in DIRECT else "dispatcher"


@pytest.fixture(params=["nf4", "lora over nf4", "lora over dense"])
def layer(request):
    if request.param == "nf4":
        return nf4_layer(N, K)
    return lora_layer(make_base(request.param.split()[-1]))


def test_plain_eager_calls_take_the_direct_door(layer, monkeypatch):
    class Closed:
        def __getattr__(self, name):
            raise AssertionError(f"{name}: the dispatcher was called")

    monkeypatch.setattr(torch.ops, "qlora_native", Closed())
    for m in BATCHES:
        x = torch.randn(m, K, requires_grad=True)
        y = layer(x)
        assert door_of(y) == "direct"
        y.sum().backward()
        with torch.no_grad():
            layer(x)
    nf4_quantize(torch.randn(4, 64)).dequantize()


def test_under_a_dispatch_mode_calls_take_the_dispatcher(layer):
    x = torch.randn(3, K, requires_grad=True)
    with dispatcher() as seen:
        y = layer(x)
        assert door_of(y) == "dispatcher"
        y.sum().backward()
    forward, backward = seen
    assert (
        backward
        == {
            "nf4_linear": "nf4_linear_grad_input",
            "lora_linear": "lora_linear_backward",
        }[forward]
    )


def test_the_codec_takes_the_dispatcher_under_a_dispatch_mode():
    w = torch.randn(8, 64)
    expected = nf4_quantize(w)
    with dispatcher() as seen:
        weight = nf4_quantize(w)
        dense, absmax = weight.dequantize(), weight.absmax
        out = weight.dequantize(out=torch.empty(8, 64))
    assert seen == ["nf4_quantize", "nf4_dequantize", "nf4_dequantize_absmax", "nf4_dequantize"]
    assert torch.equal(weight.codes, expected.codes)
    assert same_bits(absmax, expected.absmax)
    assert same_bits(dense, expected.dequantize())
    assert same_bits(out, dense)


@over_bases
@over_dtypes
@pytest.mark.parametrize("m", BATCHES)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_both_doors_give_the_same_bits(kind, m, p, dtype):
    layer = lora_layer(make_base(kind, dtype), lora_dropout=p)
    x, dy = torch.randn(m, K, dtype=dtype), torch.randn(m, N, dtype=dtype)
    torch.manual_seed(5)
    direct = lora_results(layer, x, dy)
    torch.manual_seed(5)
    with dispatcher():
        dispatched = lora_results(layer, x, dy)
    for name in direct:
        assert same_bits(direct[name], dispatched[name])


@pytest.mark.parametrize("shape", [(K,), (3, K), (9, K), (2, 5, K)], ids=str)
@pytest.mark.parametrize("through_dispatcher", [False, True], ids=["direct", "dispatcher"])
def test_a_result_may_be_written_in_place(layer, shape, through_dispatcher):
    # As nn.ReLU(inplace=True) does: autograd forbids it for a view made in an autograd.Function.
    x = torch.randn(shape, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.relu(layer(x)).sum(), x)
    with dispatcher() if through_dispatcher else contextlib.nullcontext():
        (actual,) = torch.autograd.grad(torch.relu_(layer(x)).sum(), x)
        y = layer(x)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        dx.mul_(2)
    assert same_bits(actual, expected)


@over_dtypes
def test_both_doors_of_nf4_linear_give_the_same_bits(dtype):
    layer = nf4_layer(N, K).to(dtype)
    layer.bias.requires_grad_()
    for m in BATCHES:
        x = torch.randn(m, K, dtype=dtype, requires_grad=True)
        dy = torch.randn(m, N, dtype=dtype)
        direct = torch.autograd.grad(layer(x), (x, layer.bias), dy)
        with dispatcher():
            y = layer(x)
            dispatched = torch.autograd.grad(y, (x, layer.bias), dy)
        assert same_bits(y, layer(x))
        for a, b in zip(direct, dispatched, strict=True):
            assert same_bits(a, b)


def test_a_subclass_and_the_meta_device_need_the_dispatcher():
    plain = torch.randn(3)
    assert not needs_dispatcher(plain, None, nn.Parameter(plain))
    assert needs_dispatcher(plain, TwoTensor(plain, plain))
    assert needs_dispatcher(plain.to("meta"))


def test_a_wrapper_subclass_passes_through(layer):
    a, b = torch.randn(9, K), torch.randn(9, K)
    y = layer(TwoTensor(a, b))
    assert isinstance(y, TwoTensor)
    assert same_bits(y.a, layer(a))
    assert same_bits(y.b, layer(b))


def test_fake_tensors_give_shapes_and_touch_no_memory(layer):
    mode = FakeTensorMode()
    for name, parameter in list(layer.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        fake = mode.from_tensor(parameter.detach()).requires_grad_(parameter.requires_grad)
        setattr(layer.get_submodule(parent), leaf, nn.Parameter(fake, parameter.requires_grad))
    with mode:
        x = torch.randn(2, 3, K, requires_grad=True)
        y = layer(x)
        assert y.shape == (2, 3, N)
        y.sum().backward()
        assert x.grad.shape == x.shape


def test_a_fake_weight_is_quantised_and_dequantised_to_shapes():
    with FakeTensorMode():
        weight = nf4_quantize(torch.randn(4, 64))
        assert weight.codes.shape == (4, 32)
        assert weight.absmax.shape == (4,)
        assert weight.absmax.dtype == torch.float32
        assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16
        out = torch.empty(4, 64)
        assert weight.dequantize(out=out) is out


def test_the_optimiser_refuses_fake_parameters():
    with FakeTensorMode():
        parameter = nn.Parameter(torch.ones(300))
        parameter.grad = torch.ones(300)
        with pytest.raises(NotImplementedError, match="a parameter is a FakeTensor"):
            PagedAdamW([parameter]).step()


# ---- functorch


def test_vmap_gives_the_rows_of_the_batch(layer):
    for m in BATCHES:
        x = torch.randn(5, m, K)
        torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    x = torch.randn(5, K)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))


FACTORS = ("adapters.default.lora_a", "adapters.default.lora_b")


def test_vmap_over_factors_is_an_ensemble():
    layer = lora_layer(nf4_layer(N, K))
    x = torch.randn(9, K)
    factors = {name: torch.randn(3, *layer.get_parameter(name).shape) for name in FACTORS}
    together = torch.vmap(lambda f: torch.func.functional_call(layer, f, (x,)))(factors)
    for i in range(3):
        alone = torch.func.functional_call(layer, {k: v[i] for k, v in factors.items()}, (x,))
        torch.testing.assert_close(together[i], alone)


def test_vmap_with_dropout_asks_for_a_choice_of_randomness():
    layer = lora_layer(nf4_layer(N, K), lora_dropout=0.5)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(layer)(torch.randn(3, 5, K))


def test_functional_call_uses_the_given_parameters_and_differentiates_them():
    layer = lora_layer(nf4_layer(N, K))
    given = {name: torch.randn_like(layer.get_parameter(name)).requires_grad_() for name in FACTORS}
    x, dy = torch.randn(9, K), torch.randn(9, N)
    y = torch.func.functional_call(layer, given, (x,))
    gradients = torch.autograd.grad(y, list(given.values()), dy)
    other = copy.deepcopy(layer)
    for name, value in given.items():
        other.get_parameter(name).data.copy_(value)
    expected = lora_results(other, x, dy)
    assert same_bits(y, expected["y"])
    assert same_bits(gradients[0], expected["da"])
    assert same_bits(gradients[1], expected["db"])


def test_gradients_under_functorch_are_refused(layer):
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(3, K))


def test_forward_mode_is_refused_and_not_dropped_in_silence(layer):
    x, v = torch.randn(3, K), torch.randn(3, K)
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jvp(layer, (x,), (v,))
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jacfwd(layer)(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        with pytest.raises(NotImplementedError, match="jvp"):
            layer(dual)
        with dispatcher(), pytest.raises(NotImplementedError, match="no forward-mode"):
            layer(dual)


def test_forward_mode_is_refused_without_gradients_too(layer):
    x = torch.randn(3, K)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.randn(3, K))
        with pytest.raises(NotImplementedError, match="jvp"):
            layer(dual)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_has_leaked_out_of_a_transform_is_what_it_wrapped(layer, mode):
    leaked = []

    def leak(x):
        leaked.append(x)
        return x.sum()

    x = torch.randn(3, K)
    torch.func.grad(leak)(x)
    with mode():
        assert same_bits(layer(leaked[0]), layer(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 9, K)], ids=str)
def test_without_gradients_the_bits_are_those_with_them(layer, mode, shape):
    x = torch.randn(shape)
    expected = layer(x.clone().requires_grad_())
    with mode():
        y = layer(x.requires_grad_())
    assert not y.requires_grad
    assert y.is_inference() == (mode is torch.inference_mode)
    assert same_bits(y, expected)


def test_without_anything_that_requires_a_gradient_nothing_is_recorded():
    layer = lora_layer(nf4_layer(N, K)).requires_grad_(False)
    x = torch.randn(3, K)
    assert layer(x).grad_fn is None
    assert layer.base(x).grad_fn is None
    layer.base.bias.requires_grad_()
    assert layer(x).grad_fn is not None
    assert layer.base(x).grad_fn is not None


def test_a_weight_that_was_changed_before_backward_is_noticed(layer):
    y = layer(torch.randn(3, K, requires_grad=True))
    with torch.no_grad():
        next(p for name, p in layer.named_parameters() if name.endswith("weight")).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saved_tensor_hooks_see_the_weight(layer):
    seen = []

    def pack(tensor):
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(3, K, requires_grad=True))
    weight = next(p for name, p in layer.named_parameters() if name.endswith("weight"))
    assert any(tensor.data_ptr() == weight.data_ptr() for tensor in seen)


def test_tracing_records_the_operator(layer):
    x = torch.randn(5, K)
    with pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(layer, (x,))
    torch.testing.assert_close(traced(x), layer(x))
    assert "qlora_native::" in str(traced.graph)
