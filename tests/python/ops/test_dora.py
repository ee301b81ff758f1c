"""dora_linear against PEFT's DoRA layer on a dense nn.Linear, and row_norms_squared."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_native import _core, ops
from qlora_native.ops import dora_linear, quantize, row_norms_squared
from support import BLOCK_SIZES, assert_near, over_dtypes, over_nesting, same_bits

peft = pytest.importorskip("peft")

N, K, M, R = 48, 96, 10, 6
SCALING = 0.5


class Case:
    """A base and trained tensors away from the start, and a PEFT layer of the same numbers."""

    def __init__(self, dtype: torch.dtype, p: float = 0.0, use_bias: bool = True) -> None:
        self.p = p
        self.weight = quantize(torch.randn(N, K) / K**0.5, 64, True)
        self.squared = row_norms_squared(self.weight)
        self.dense = ops.dequantize(self.weight, dtype)
        self.bias = torch.randn(N).to(dtype).requires_grad_() if use_bias else None
        self.lora_a = (torch.randn(R, K) / K**0.5).to(dtype).requires_grad_()
        self.lora_b = (0.5 * torch.randn(N, R)).to(dtype).requires_grad_()
        gains = 0.5 + torch.rand(N)
        self.magnitude = (gains * self.squared.sqrt()).to(dtype).requires_grad_()
        self.seed = torch.randint(2**63 - 1, (1,)) if p else None

    def trained(self) -> list[Tensor]:
        every = [self.lora_a, self.lora_b, self.magnitude, self.bias]
        return [tensor for tensor in every if tensor is not None]

    def __call__(self, x: Tensor) -> Tensor:
        return dora_linear(
            x,
            self.weight,
            self.bias,
            self.lora_a,
            self.lora_b,
            self.magnitude,
            SCALING,
            self.squared,
            self.p,
            self.seed,
        )

    def mask(self, x: Tensor) -> Tensor:
        """What a batch of ones becomes by the operation's dropout."""
        if self.seed is None:
            return torch.ones_like(x)
        out = torch.empty_like(x)
        _core.dropout(torch.ones_like(x), self.p, self.seed, out, 1, 0)
        return out

    def peft_layer(self, x: Tensor, dtype: torch.dtype) -> nn.Module:
        """PEFT's layer in `dtype`, whose dropout drops what the operation drops."""
        base = nn.Linear(K, N, bias=self.bias is not None, dtype=dtype)
        base.weight.data.copy_(self.dense)
        if self.bias is not None:
            base.bias.data.copy_(self.bias)
        layer = peft.tuners.lora.Linear(
            base,
            "default",
            r=R,
            lora_alpha=R * SCALING,
            lora_dropout=self.p,
            use_dora=True,
            config=peft.LoraConfig(r=R, lora_alpha=R * SCALING, use_dora=True),
        ).to(dtype)
        layer.lora_A["default"].weight.data.copy_(self.lora_a)
        layer.lora_B["default"].weight.data.copy_(self.lora_b)
        layer.lora_magnitude_vector["default"].weight.data.copy_(self.magnitude)
        if self.bias is not None:
            base.bias.requires_grad_()
        if self.p:
            mask = self.mask(x).to(dtype)

            class Dropout(nn.Module):
                def forward(self, x: Tensor) -> Tensor:
                    return x * mask

            layer.lora_dropout["default"] = Dropout()
        return layer


def peft_trained(layer: nn.Module) -> list[Tensor]:
    every = [
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.lora_magnitude_vector["default"].weight,
        layer.base_layer.bias,
    ]
    return [tensor for tensor in every if tensor is not None]


def results(function, trained: list[Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy)]


# ---- numbers


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(1,), (M,), (2, 5)], ids=str)
def test_everything_matches_peft_in_fp32(use_bias, p, shape):
    case = Case(torch.float32, p, use_bias)
    x, dy = torch.randn(*shape, K), torch.randn(*shape, N)
    layer = case.peft_layer(x, torch.float32)
    actual = results(case, case.trained(), x, dy)
    expected = results(layer, peft_trained(layer), x, dy)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype
        assert_near(got, want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_in_16_bits_it_is_no_further_from_fp64_than_peft(dtype, p):
    case = Case(dtype, p)
    x, dy = torch.randn(64, K).to(dtype), torch.randn(64, N).to(dtype)
    actual = results(case, case.trained(), x, dy)
    layer = case.peft_layer(x, dtype)
    theirs = results(layer, peft_trained(layer), x, dy)
    # In fp64 its dropout mask is of fp64 as well, 1 / (1 - p) not rounded.
    exact_layer = case.peft_layer(x, torch.float64)
    exact = results(exact_layer, peft_trained(exact_layer), x.double(), dy.double())
    for got, other, want in zip(actual, theirs, exact, strict=True):
        assert got.dtype == other.dtype
        error, their_error = ((tensor.double() - want).norm() for tensor in (got, other))
        assert error <= 1.1 * their_error + torch.finfo(dtype).eps / 2 * want.norm()


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_fp32_factors_beside_activations_of_16_bits(p):
    case = Case(torch.float32, p)
    bias = case.bias.detach().bfloat16()
    x, dy = torch.randn(64, K).bfloat16(), torch.randn(64, N).bfloat16()
    case.bias = bias.requires_grad_()
    rough = results(case, case.trained(), x, dy)
    layer = case.peft_layer(x, torch.float32)
    exact = results(layer, peft_trained(layer), x.float(), dy.float())
    dtypes = [torch.bfloat16] * 2 + [torch.float32] * 3 + [torch.bfloat16]
    for got, want, dtype in zip(rough, exact, dtypes, strict=True):
        assert got.dtype == dtype
        assert (got.float() - want).norm() <= 4 * 2**-8 * want.norm()


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_dense_base_gives_what_the_nf4_one_does(p):
    case = Case(torch.float32, p)
    x, dy = torch.randn(M, K), torch.randn(M, N)
    expected = results(case, case.trained(), x, dy)
    assert_near(row_norms_squared(case.dense), case.squared, 1e-6)
    case.weight = case.dense
    for got, want in zip(results(case, case.trained(), x, dy), expected, strict=True):
        assert_near(got, want, 1e-5)


@over_dtypes
def test_at_the_start_it_is_the_base(dtype):
    case = Case(dtype)
    case.lora_b.data.zero_()
    magnitude = case.squared.sqrt()
    x = torch.randn(M, K).to(dtype)
    arguments = x, case.weight, case.bias, case.lora_a, case.lora_b, magnitude, SCALING
    y = dora_linear(*arguments, case.squared)
    base = F.linear(x.double(), case.dense.double(), case.bias.double())
    torch.testing.assert_close(y.double(), base, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


@over_dtypes
@pytest.mark.parametrize("magnitude", [0.0, 5.0])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_row_of_zeros_stays_zero(dtype, magnitude, p):
    case = Case(dtype, p, use_bias=False)
    w = ops.dequantize(case.weight, torch.float32)
    w[3] = 0
    case.weight = quantize(w, 32, False)
    case.squared = row_norms_squared(case.weight)
    case.lora_b.data[3] = 0
    case.magnitude.data[3] = magnitude
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    y, dx, grad_a, grad_b, grad_magnitude = results(case, case.trained(), x, dy)
    assert (y[:, 3] == 0).all()
    assert (grad_b[3] == 0).all()
    assert grad_magnitude[3] == 0
    assert all(gradient.isfinite().all() for gradient in (dx, grad_a, grad_b, grad_magnitude))


def test_without_a_gradient_of_the_magnitude_the_others_are_the_same():
    case = Case(torch.float32)
    x, dy = torch.randn(M, K), torch.randn(M, N)
    expected = results(case, case.trained(), x, dy)
    case.magnitude.requires_grad_(False)
    trained = [case.lora_a, case.lora_b, case.bias]
    for got, want in zip(results(case, trained, x, dy), expected[:4] + expected[5:], strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_second_derivatives_are_right(p):
    case = Case(torch.float32, p)
    x = torch.randn(2, 3, K, requires_grad=True)
    mask = case.mask(x)
    norms = (case.dense + SCALING * case.lora_b @ case.lora_a).detach().norm(dim=1)

    def composition(x: Tensor) -> Tensor:
        gain = case.magnitude / norms
        base, dropped = F.linear(x, case.dense, case.bias), x * mask
        update = dropped @ case.lora_a.t() @ case.lora_b.t() * SCALING
        return base + (gain - 1) * F.linear(dropped, case.dense) + gain * update

    found = []
    inputs = (x, case.lora_a, case.lora_b, case.magnitude)
    for y in (case(x), composition(x)):
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        found.append(torch.autograd.grad(penalty, inputs))
    for actual, expected in zip(*found, strict=True):
        assert_near(actual, expected)


# ---- norms


@over_nesting
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (37, 70), (33, 128), (5, 4096)], ids=str)
def test_row_norms_are_those_of_the_dense_weight(shape, block_size, double_quant, monkeypatch):
    monkeypatch.setattr(ops.dora, "_NORM_ELEMENTS", 512)  # in many pieces
    weight = quantize(torch.randn(shape), block_size, double_quant)
    expected = ops.dequantize(weight, torch.float32).double().square().sum(1)
    assert_near(row_norms_squared(weight).double(), expected, 1e-6)


@over_dtypes
def test_row_norms_of_a_dense_weight(dtype):
    w = torch.randn(N, K).to(dtype)
    norms = row_norms_squared(w)
    assert norms.dtype == torch.float32
    assert_near(norms.double(), w.double().square().sum(1), 1e-6)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=str)
def test_row_norms_of_an_empty_weight(shape):
    assert same_bits(row_norms_squared(torch.empty(shape)), torch.zeros(shape[0]))


# ---- bad input


@pytest.mark.parametrize("argument", ["magnitude", "squared"])
def test_rows_of_another_length_are_refused(argument):
    case = Case(torch.float32)
    name = {"squared": "weight_norm_squared"}.get(argument, argument)
    setattr(case, argument, torch.ones(N + 1))
    with pytest.raises(ValueError, match=rf"dora_linear: {name} is .*\[49\].*want .*\[48\]"):
        case(torch.randn(M, K))
    setattr(case, argument, torch.ones(N, dtype=torch.float64))
    with pytest.raises(ValueError, match=rf"dora_linear: {name} is torch.float64"):
        case(torch.randn(M, K))
