"""Several adapters on one frozen base: which numbers, which gradients, in one batch."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from qlora_native import LoRALinear, NF4Linear, add_lora, quantize_model, set_lora
from qlora_native.nn.routing import BASE
from support import (
    K,
    Model,
    N,
    assert_near,
    dense_weight,
    make_base,
    nf4_layer,
    over_bases,
    same_bits,
    state_bits,
)

ADAPTERS = {
    "plain": {"r": 4},
    "wide": {"r": 7, "lora_alpha": 3, "use_rslora": True},
    "one": {"r": 1, "lora_alpha": 2},
    "dora": {"r": 3, "use_dora": True},
}


def make_layer(kind: str = "nf4", names=tuple(ADAPTERS), **options) -> LoRALinear:
    first, *others = names
    layer = LoRALinear(make_base(kind), **{**ADAPTERS[first], **options}, adapter_name=first)
    for name in others:
        layer.add_adapter(name, **{**ADAPTERS[name], **options})
    for adapter in layer.adapters.values():
        nn.init.normal_(adapter.lora_b, std=0.5)
        if adapter.use_dora:
            adapter.magnitude.data *= torch.rand(N) + 0.5
    return layer


def composition(layer: LoRALinear, name: str, x: Tensor) -> Tensor:
    """The layer's formula in dense operations that autograd follows."""
    w = dense_weight(layer.base, torch.float32)
    if name in layer.adapters:
        adapter = layer.adapters[name]
        w = w + adapter.scaling * adapter.lora_b @ adapter.lora_a
        if adapter.use_dora:
            norms = torch.linalg.vector_norm(w.detach(), dim=1)  # constant in backward
            w = (adapter.magnitude / norms)[:, None] * w
    return nn.functional.linear(x, w, layer.base.bias)


def gradients(layer: nn.Module, y: Tensor, dy: Tensor) -> dict[str, Tensor | None]:
    for parameter in layer.parameters():
        parameter.grad = None
    y.backward(dy)
    return {
        name: p.grad for name, p in layer.named_parameters() if ".lora_" in name or "mag" in name
    }


@over_bases
@pytest.mark.parametrize("name", ADAPTERS)
def test_one_adapter_for_all_rows_follows_its_formula(kind, name):
    layer = make_layer(kind)
    set_lora(layer, name)
    x, dy = torch.randn(3, 5, K, requires_grad=True), torch.randn(3, 5, N)
    y = layer(x)
    expected = composition(layer, name, x)
    assert_near(y, expected)
    actual = gradients(layer, y, dy)
    dx, x.grad = x.grad, None
    reference = gradients(layer, expected, dy)
    assert_near(dx, x.grad)
    for parameter, gradient in reference.items():
        assert (gradient is None) == (actual[parameter] is None), parameter
        if gradient is not None:
            assert_near(actual[parameter], gradient)
    in_force = {n for n, g in actual.items() if g is not None}
    assert in_force == {n for n in actual if n.startswith(f"adapters.{name}.")}


BATCHES_OF_NAMES = [
    ["plain", "wide", "plain", BASE, "one", "one"],
    ["one", BASE, BASE, "wide", "one", "plain"],
    [BASE, "dora", "dora", "plain", "dora", "one"],
    ["dora"] * 6,
]


@over_bases
@pytest.mark.parametrize("names", BATCHES_OF_NAMES, ids=str)
@pytest.mark.parametrize("shape", [(6, K), (6, 5, K)], ids=str)
def test_a_mixed_batch_is_each_element_by_its_own_adapter(kind, names, shape):
    layer = make_layer(kind)
    set_lora(layer, names)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], N)
    y = layer(x)
    expected = torch.stack([composition(layer, n, x[i]) for i, n in enumerate(names)])
    assert_near(y, expected)
    actual = gradients(layer, y, dy)
    dx, x.grad = x.grad, None
    reference = gradients(layer, expected, dy)
    assert_near(dx, x.grad)
    for parameter, gradient in reference.items():
        assert (gradient is None) == (actual[parameter] is None), parameter
        if gradient is not None:
            assert_near(actual[parameter], gradient)


def test_a_batch_of_one_name_has_the_bits_of_that_name_for_all_rows():
    layer = make_layer()
    x, dy = torch.randn(4, 5, K), torch.randn(4, 5, N)
    for name in ADAPTERS:
        set_lora(layer, name)
        y = layer(x)
        alone = gradients(layer, y, dy)
        set_lora(layer, [name] * 4)
        y_of_batch = layer(x)
        assert same_bits(y_of_batch, y)
        for parameter, gradient in gradients(layer, y_of_batch, dy).items():
            assert gradient is alone[parameter] or same_bits(gradient, alone[parameter])


def test_autocast_and_the_compute_dtype_hold_in_a_mixed_batch_too():
    names = ["plain", BASE, "wide", "one"]
    base = nf4_layer(N, K, compute_dtype=torch.bfloat16)
    layer = make_layer(names=("plain", "wide", "one"))
    x = torch.randn(4, 5, K)
    set_lora(layer, names)
    in_16_bits = layer(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(layer(x), in_16_bits)
    base.load_state_dict(layer.base.state_dict())
    layer.base = base
    y = layer(x)
    assert y.dtype == torch.float32
    assert same_bits(y, in_16_bits.float())


@pytest.mark.parametrize("names", BATCHES_OF_NAMES[:3], ids=str)
def test_dropout_draws_a_mask_for_each_element(names):
    layer = make_layer(lora_dropout=0.5)
    set_lora(layer, names)
    x = torch.ones(6, 3, K)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    assert same_bits(layer(x), y)
    of_one = [y[i] for i, name in enumerate(names) if name == "one"]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(of_one))
    layer.eval()
    assert_near(layer(x), torch.stack([composition(layer, n, x[i]) for i, n in enumerate(names)]))


def test_a_layer_that_lacks_a_name_does_its_rows_by_the_base_alone():
    model = nn.Sequential(make_layer(names=("plain", "one")), nn.Linear(N, N))
    add_lora(model, r=2, target_modules=["1"], adapter_name="elsewhere")
    nn.init.normal_(model[1].adapters["elsewhere"].lora_b)
    x = torch.randn(3, K)
    set_lora(model, "elsewhere")
    assert same_bits(model[0](x), model[0].base(x))
    set_lora(model, ["elsewhere", "one", "plain"])
    hidden = model[0](x)
    assert_near(hidden[0], model[0].base(x[:1])[0])
    assert same_bits(model[1](hidden)[1:], model[1].base(hidden)[1:])
    assert not torch.allclose(model[1](hidden)[0], model[1].base(hidden)[0])


# ---- training


def test_adapters_trained_together_end_where_each_ends_alone():
    names = ["a", "b", "c"]

    def make_model() -> nn.Module:
        torch.manual_seed(0)
        model = quantize_model(Model(width=16, blocks=2))
        for i, name in enumerate(names):
            torch.manual_seed(i)
            add_lora(model, r=2 + i, adapter_name=name)
        return model

    def train(model: nn.Module, batches: list[tuple[object, Tensor]]) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for in_force, tokens in batches:
            set_lora(model, in_force)
            logits = model(tokens)
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
            )
            optimizer.zero_grad()
            (loss / 8).backward()
            optimizer.step()

    data = torch.randint(50, (4, 3, 8))  # step, adapter, tokens
    together = make_model()
    before = state_bits(together)
    train(together, [(names, tokens) for tokens in data])
    for i, name in enumerate(names):
        alone = make_model()
        train(alone, [(name, tokens[i : i + 1]) for tokens in data])
        for parameter, value in alone.named_parameters():
            if f".adapters.{name}." in parameter:
                assert_near(together.get_parameter(parameter), value, relative=1e-4)
            else:
                assert (
                    bytes(value.detach().flatten().view(torch.uint8).tolist()) == before[parameter]
                )


def test_a_factor_that_needs_no_gradient_gets_none():
    layer = make_layer(names=("plain", "one"))
    layer.adapters["one"].requires_grad_(False)
    set_lora(layer, ["one", "plain", "one"])
    assert layer.adapters["plain"].lora_a.requires_grad, "set_lora routes, no more"
    y = layer(torch.randn(3, K))
    found = gradients(layer, y, torch.randn(3, N))
    assert {name for name, g in found.items() if g is not None} == {
        "adapters.plain.lora_a",
        "adapters.plain.lora_b",
    }


# ---- merged weights


@over_bases
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_weight_computes_what_the_layer_does(kind, name):
    layer = make_layer(kind).eval()
    set_lora(layer, name)
    x = torch.randn(9, K)
    weight = layer.merged_weight(name)
    assert weight.dtype == torch.float32
    assert_near(nn.functional.linear(x, weight, layer.base.bias), layer(x))
    assert same_bits(layer.merged_weight([name, BASE, "unknown"]), weight)


def test_several_merged_adapters_add_up_their_changes():
    layer = make_layer()
    base = layer.base.dequantize()
    changes = sum(layer.merged_weight(name) - base for name in ADAPTERS)
    assert_near(layer.merged_weight(list(ADAPTERS)), base + changes)
    assert same_bits(layer.merged_weight([]), base)


# ---- DoRA's norms


def test_norms_follow_the_base_when_it_is_loaded_written_or_moved():
    layer = make_layer(names=("dora",))
    x = torch.randn(5, K)
    before = layer(x)
    other = nf4_layer(N, K)
    layer.base.load_state_dict(other.state_dict())
    assert_near(layer(x), composition(layer, "dora", x))
    assert not torch.allclose(layer(x), before)
    with torch.no_grad():
        layer.base.weight.copy_(make_base("nf4").weight)
    assert_near(layer(x), composition(layer, "dora", x))
    layer.base = NF4Linear.from_linear(nn.Linear(K, N))
    assert_near(layer(x), composition(layer, "dora", x))
    state = {
        name: value.clone() for name, value in make_layer(names=("dora",)).state_dict().items()
    }
    layer.load_state_dict(state, assign=True)
    assert_near(layer(x), composition(layer, "dora", x))


def test_norms_stay_fp32_when_the_model_is_cast():
    layer = make_layer(names=("dora",))
    layer(torch.randn(5, K))
    layer.to(torch.bfloat16)
    y = layer(torch.randn(5, K, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert layer._weight_norm_squared().dtype == torch.float32
