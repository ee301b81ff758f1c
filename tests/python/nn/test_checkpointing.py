"""Gradient checkpointing, reentrant and not: the adapters of the forward, or an error."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_native import add_lora, quantize_model, set_lora
from qlora_native.nn.routing import BASE
from support import Block, same_bits

WIDTH, BATCH = 32, 4
both_kinds = pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
ROUTINGS = ["a", "d", ["a", "b", "b", BASE], ["b", "d", "a", "d"], None]


class Blocks(nn.Module):
    """Blocks that are checkpointed each, all at once, or both at a time."""

    def __init__(self, use_reentrant: bool | None = None, outer: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(3))
        self.use_reentrant = use_reentrant
        self.outer = outer

    def forward(self, x: Tensor) -> Tensor:
        if self.outer:
            return checkpoint(self._forward, x, use_reentrant=self.use_reentrant)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.use_reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def make_model(lora_dropout: float = 0.0) -> Blocks:
    torch.manual_seed(0)
    model = quantize_model(Blocks())
    add_lora(model, r=4, lora_dropout=lora_dropout, adapter_name="a")
    add_lora(model, r=4, lora_dropout=lora_dropout, target_modules=["up"], adapter_name="b")
    add_lora(model, r=2, lora_dropout=lora_dropout, adapter_name="d", use_dora=True)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.3)
    return model


def with_checkpoints(model: Blocks, use_reentrant: bool, outer: bool = False) -> Blocks:
    other = copy.deepcopy(model)
    other.use_reentrant, other.outer = use_reentrant, outer
    return other


def inputs(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 3, WIDTH, generator=generator).requires_grad_()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(model: nn.Module, expected: nn.Module) -> None:
    actual = gradients(model)
    for name, gradient in gradients(expected).items():
        if gradient is None:
            assert actual[name] is None, name
        else:
            assert same_bits(actual[name], gradient), name


@both_kinds
@pytest.mark.parametrize("outer", [False, True], ids=["each", "nested"])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
@pytest.mark.parametrize("names", ROUTINGS, ids=str)
def test_gradients_have_the_bits_of_those_without(use_reentrant, outer, lora_dropout, names):
    plain = make_model(lora_dropout)
    results = []
    for model in (plain, with_checkpoints(plain, use_reentrant, outer)):
        set_lora(model, names)
        torch.manual_seed(3)
        x = inputs()
        y = model(x)
        y.square().sum().backward()
        results.append((y, x.grad, model))
    assert same_bits(results[0][0], results[1][0])
    assert same_bits(results[0][1], results[1][1])
    assert_same_gradients(results[1][2], plain)
    assert any(g is not None for g in gradients(plain).values()) == (names is not None)


@both_kinds
def test_several_forwards_before_one_backward(use_reentrant):
    plain = make_model(lora_dropout=0.5)
    for model in (plain, with_checkpoints(plain, use_reentrant)):
        set_lora(model, ["a", "b", BASE, "d"])
        torch.manual_seed(3)
        sum(model(inputs(seed)).square().sum() for seed in range(3)).backward()
    assert_same_gradients(model, plain)


@both_kinds
def test_accumulating_over_backwards_with_another_routing_each(use_reentrant):
    plain = make_model()
    for model in (plain, with_checkpoints(plain, use_reentrant)):
        for seed, names in enumerate(ROUTINGS * 2):
            set_lora(model, names)
            model(inputs(seed)).square().sum().backward()
    assert_same_gradients(model, plain)


@both_kinds
@pytest.mark.parametrize("outer", [False, True], ids=["each", "nested"])
@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("a", "d"),
        ("a", "b"),
        ("a", None),
        (None, "a"),
        (["a", "b", "b", BASE], ["a", "b", "a", BASE]),
        ("a", ["a"] * BATCH),
    ],
    ids=str,
)
def test_another_routing_at_backward_is_refused(use_reentrant, outer, then, now):
    model = with_checkpoints(make_model(), use_reentrant, outer)
    set_lora(model, then)
    loss = model(inputs()).square().sum()
    set_lora(model, now)
    with pytest.raises(RuntimeError, match="under another routing: set_lora had put") as error:
        loss.backward()
    as_kept = tuple(then) if isinstance(then, list) else then
    assert f"set_lora(model, {as_kept!r}) before backward" in str(error.value)
    assert all(gradient is None for gradient in gradients(model).values())


@both_kinds
def test_forwards_under_two_routings_and_one_backward_are_refused(use_reentrant):
    model = with_checkpoints(make_model(), use_reentrant)
    losses = []
    for names in ("a", "b", "a", "b"):
        set_lora(model, names)
        losses.append(model(inputs()).square().sum())
    with pytest.raises(RuntimeError, match="had put 'a' in force at the forward, now it is 'b'"):
        sum(losses).backward()


@both_kinds
def test_each_backward_under_its_own_routing_is_right_in_any_order(use_reentrant):
    plain = make_model()
    for model in (plain, with_checkpoints(plain, use_reentrant)):
        losses = {}
        for name in ("a", "b", "d"):
            set_lora(model, name)
            losses[name] = model(inputs()).square().sum()
        for name in ("b", "d", "a"):
            set_lora(model, name)
            losses[name].backward()
    assert_same_gradients(model, plain)


@both_kinds
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_an_evaluation_between_forward_and_backward_does_no_harm(use_reentrant, grad):
    plain = make_model()
    set_lora(plain, "a")
    plain(inputs()).square().sum().backward()
    model = with_checkpoints(plain, use_reentrant)
    model.zero_grad()
    loss = model(inputs()).square().sum()
    set_lora(model, None)
    with torch.set_grad_enabled(grad):
        model(inputs(1))
    set_lora(model, "a")
    loss.backward()
    assert_same_gradients(model, plain)


@both_kinds
def test_a_checkpointed_function_may_call_set_lora_itself(use_reentrant):
    plain = make_model()

    def run(model: Blocks, use_reentrant: bool | None) -> None:
        def under(name: str, x: Tensor) -> Tensor:
            set_lora(model, name)
            return model(x)

        x = inputs()
        for name in ("a", "b", "a"):
            if use_reentrant is None:
                x = under(name, x)
            else:
                x = checkpoint(under, name, x, use_reentrant=use_reentrant)
        x.square().sum().backward()

    run(plain, None)
    model = copy.deepcopy(plain)
    model.zero_grad()
    run(model, use_reentrant)
    assert_same_gradients(model, plain)


@both_kinds
def test_what_a_recomputation_puts_in_force_is_not_taken_for_anothers(use_reentrant):
    model = make_model()

    def under_b(x: Tensor) -> Tensor:
        set_lora(model, "b")
        return model.blocks[1](x)

    set_lora(model, "a")
    x = checkpoint(model.blocks[0], inputs(), use_reentrant=use_reentrant)
    x = checkpoint(under_b, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="had put 'a' in force at the forward, now it is 'b'"):
        x.square().sum().backward()


@both_kinds
def test_set_lora_between_two_layers_of_a_checkpointed_function_is_refused(use_reentrant):
    model = make_model()

    def first_a_then_b(x: Tensor) -> Tensor:
        x = model.blocks[0](x)
        set_lora(model, "b")
        return model.blocks[1](x)

    set_lora(model, "a")
    x = checkpoint(first_a_then_b, inputs(), use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="gradient checkpointing computes a forward again"):
        x.square().sum().backward()
    # Once set again from outside all is well.
    set_lora(model, "b")
    x = checkpoint(model.blocks[0], inputs(), use_reentrant=use_reentrant)
    x.square().sum().backward()


@both_kinds
def test_more_changes_than_are_remembered_are_refused_unless_they_are_too_old(use_reentrant):
    model = with_checkpoints(make_model(), use_reentrant)
    loss = model(inputs()).square().sum()
    for i in range(100):
        set_lora(model, ["b", "d", "a"][i % 3])
    with pytest.raises(RuntimeError, match="more than 64 times between a forward and its backward"):
        loss.backward()
    model(inputs()).square().sum().backward()


@both_kinds
def test_parts_of_a_model_remember_each_their_own(use_reentrant):
    model = with_checkpoints(make_model(), use_reentrant)
    set_lora(model.blocks[0], "b")
    loss = model(inputs()).square().sum()
    set_lora(model.blocks[1], "a")  # no change
    loss.backward()
    loss = model(inputs()).square().sum()
    set_lora(model.blocks[0], "d")
    with pytest.raises(RuntimeError, match="had put 'b' in force"):
        loss.backward()


@both_kinds
def test_a_backward_in_another_thread_is_held_to_the_same_rule(use_reentrant):
    plain = make_model()
    set_lora(plain, "a")
    plain(inputs()).square().sum().backward()
    model = with_checkpoints(plain, use_reentrant)
    model.zero_grad()
    losses = [model(inputs()).square().sum() for _ in range(2)]
    errors: list[BaseException] = []

    def backward(loss: Tensor) -> None:
        try:
            loss.backward()
        except RuntimeError as error:
            errors.append(error)

    for loss, names in zip(losses, ("a", "b"), strict=True):
        set_lora(model, names)
        thread = threading.Thread(target=backward, args=(loss,))
        thread.start()
        thread.join()
    assert_same_gradients(model, plain)
    assert len(errors) == 1
    assert "under another routing" in str(errors[0])


@both_kinds
def test_without_checkpointing_a_forward_keeps_its_own_adapters(use_reentrant):
    model = make_model()
    expected = copy.deepcopy(model)
    set_lora(model, "a")
    loss = model(inputs()).square().sum()
    set_lora(model, "b")
    loss.backward()
    set_lora(expected, "a")
    expected(inputs()).square().sum().backward()
    assert_same_gradients(model, expected)


@both_kinds
def test_transformers_own_checkpointing(use_reentrant):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    plain = quantize_model(LlamaForCausalLM(config)).train()
    for name in ("a", "b"):
        add_lora(plain, r=4, adapter_name=name)
    for name, parameter in plain.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.3)
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # for the reentrant kind
    tokens = torch.arange(BATCH * 6).reshape(BATCH, 6)
    for each in (plain, model):
        set_lora(each, ["b", "a", BASE, "a"])
        each(input_ids=tokens, labels=tokens).loss.backward()
    assert_same_gradients(model, plain)
    assert any(gradient is not None for gradient in gradients(plain).values())
    loss = model(input_ids=tokens, labels=tokens).loss
    set_lora(model, "b")
    with pytest.raises(RuntimeError, match="under another routing"):
        loss.backward()
