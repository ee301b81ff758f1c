"""NF4LoraLinear against PEFT's own layers on the dense model that the NF4 one stands for."""

import copy
import io
import math

import pytest
import torch
from peft import LoraConfig
from peft_models import (
    ATTENTION,
    LINEARS,
    assert_near,
    assert_same_model,
    gradients,
    logits,
    lora,
    peft_twins,
    tiny_llama,
    tokens,
    twins,
    with_adapter,
)
from torch import nn

from qlora_native import LoRALinear, NF4Linear, quantize_model
from qlora_native.hf.peft import NF4LoraLinear


def adapted(model: nn.Module) -> set[str]:
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


CONFIGS = {
    "all-linear": lora(),
    "All-Linear": lora(target_modules="All-Linear"),
    "names": lora(target_modules=["q_proj", "down_proj"]),
    "whole names": lora(target_modules=["model.layers.1.mlp.up_proj"]),
    "regex": lora(target_modules=r".*\.layers\.1\..*(q|gate)_proj"),
    "default of the architecture": lora(target_modules=None),
    "with the head": lora(target_modules=["v_proj", "lm_head"]),
    "with the embedding": lora(target_modules=["v_proj", "embed_tokens"]),
    "excluded": lora(exclude_modules=["o_proj", "down_proj"]),
    "excluded by regex": lora(exclude_modules=r".*layers\.0.*"),
    "layers_to_transform": lora(
        target_modules=list(ATTENTION), layers_to_transform=[1], layers_pattern="layers"
    ),
    "patterns": lora(
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}, alpha_pattern={"v_proj": 3}
    ),
    "rslora": lora(use_rslora=True),
    "bias of adapted layers": lora(bias="lora_only", target_modules=["q_proj", "up_proj"]),
    "all biases": lora(bias="all", target_modules=["q_proj", "up_proj"]),
    "lora_bias": lora(lora_bias=True),
    "dense copies": lora(modules_to_save=["lm_head", "embed_tokens", "norm"]),
    "tokens": lora(trainable_token_indices=[3, 7, 11]),
    "layer_replication": lora(layer_replication=[[0, 2], [1, 2]]),
    "orthogonal": lora(init_lora_weights="orthogonal"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_logits_and_gradients_are_those_of_peft_on_the_dense_twin(name):
    has_bias = "bias" in name
    ours, theirs = peft_twins(CONFIGS[name], bias=has_bias)
    assert adapted(ours) == adapted(theirs)
    for path in adapted(ours):
        layer = ours.base_model.model.get_submodule(path)
        is_nf4 = path.rpartition(".")[2] in LINEARS
        assert isinstance(layer, NF4LoraLinear) == is_nf4
    mine, wanted = ours.state_dict(), theirs.state_dict()
    for key in wanted:
        if "lora_" in key:
            assert torch.equal(mine[key], wanted[key]), key
    assert_same_model(ours, theirs, tokens())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initialisations_leave_the_start_at_the_base(dtype):
    for init in (True, "gaussian", "eva"):
        nf4, _ = twins(compute_dtype=dtype)
        before = logits(nf4, tokens())
        model = with_adapter(nf4, lora(init_lora_weights=init))
        assert torch.equal(logits(model, tokens()), before)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32 or "lora_" not in name


def test_all_linear_leaves_a_quantised_head_out_and_so_does_peft():
    model = quantize_model(tiny_llama(), skip=[])
    assert isinstance(model.lm_head, NF4Linear)
    assert "lm_head" not in adapted(with_adapter(model, lora()))


def test_a_classifiers_head_is_left_out_and_trained():
    from transformers import LlamaForSequenceClassification

    def build() -> nn.Module:
        torch.manual_seed(1)
        return LlamaForSequenceClassification(tiny_llama().config)

    config = lora(task_type="SEQ_CLS")
    ours = with_adapter(quantize_model(build(), skip=["score"]), config)
    theirs = with_adapter(build(), config)
    assert adapted(ours) == adapted(theirs)
    assert ours.base_model.model.score.modules_to_save["default"].weight.requires_grad

    # All is quantised, the head too: "all-linear" leaves it out, and nothing can train it.
    with pytest.raises(NotImplementedError, match=r"modules_to_save has 'score'.*NF4Linear"):
        with_adapter(quantize_model(build(), skip=[]), config)


def test_dropout_is_the_fused_one():
    nf4, _ = twins()
    layer = with_adapter(nf4, lora(lora_dropout=0.4, target_modules=["q_proj"])).get_submodule(
        "base_model.model.model.layers.0.self_attn.q_proj"
    )
    native = LoRALinear(copy.deepcopy(layer.base_layer), 4, 8, lora_dropout=0.4)
    with torch.no_grad():
        native.lora_a.copy_(layer.lora_A["default"].weight)
        native.lora_b.copy_(layer.lora_B["default"].weight)
    x = torch.randn(5, 11, layer.in_features)
    results = []
    for one in (layer.train(), native.train()):
        torch.manual_seed(1)
        results.append(one(x))
    assert torch.equal(*results)
    assert not torch.equal(results[0], layer(x))  # another mask

    plain = layer.eval()(x)
    assert not torch.equal(plain, results[0])
    layer.train()
    layer.lora_dropout["default"].p = 0.0  # as TRL's disable_dropout_in_model does
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("use_dora", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant, use_dora):
    model = with_adapter(twins()[0], lora(lora_dropout=0.3, use_dora=use_dora)).train()
    torch.manual_seed(1)
    plain = gradients(model, tokens())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(1)
    again = gradients(model, tokens())
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


class _Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(96, 64)
        self.second = nn.Linear(64, 128, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


def saved_bytes(function) -> int:
    """Of all tensors kept for backward that are no parameters, each memory once."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output.grad_fn is not None
    return sum(kept.values())


@pytest.mark.parametrize("m", [2, 40])
@pytest.mark.parametrize(("p", "bias"), [(0.0, "none"), (0.25, "none"), (0.0, "lora_only")])
def test_a_layer_saves_its_input_and_x_a_and_nothing_else(m, p, bias):
    config = lora(target_modules=["first", "second"], lora_dropout=p, bias=bias)
    model = with_adapter(quantize_model(_Chain(), skip=[]), config).train()
    x = torch.randn(m, 96)
    want = 4 * m * (96 + 64 + 4 + 4)  # both inputs, and both x · Aᵀ
    seeds = 2 * 8 if p else 0
    assert saved_bytes(lambda: model(x)) == want + seeds


def test_a_layer_is_one_autograd_node():
    model = with_adapter(quantize_model(_Chain(), skip=[]), lora(target_modules=["first"])).train()
    layer = model.base_model.model.first
    node = layer(torch.randn(3, 96, requires_grad=True)).grad_fn
    assert "LoRALinear" in type(node).__name__
    inputs = {type(each).__name__ for each, _ in node.next_functions if each is not None}
    assert inputs == {"AccumulateGrad"}


@pytest.mark.parametrize("use_dora", [False, True])
def test_it_compiles_without_a_break(use_dora):
    model = with_adapter(
        quantize_model(_Chain(), skip=[]),
        lora(target_modules=["first", "second"], use_dora=use_dora),
    )
    x = torch.randn(6, 96)
    eager = model(x)
    eager.square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = compiled(x)
    assert_near(result.detach(), eager.detach())
    result.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_near(parameter.grad, wanted[name])


def test_autocast_and_compute_dtype_decide_what_is_computed_in():
    model = with_adapter(quantize_model(_Chain(), skip=[]), lora(target_modules=["first"]))
    layer = model.base_model.model.first
    x = torch.randn(4, 96)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer(x)
    assert under_autocast.dtype == torch.bfloat16
    assert torch.equal(under_autocast, layer(x.bfloat16()))
    assert layer(x).dtype == torch.float32

    half = quantize_model(_Chain(), skip=[], compute_dtype=torch.bfloat16)
    layer = with_adapter(half, lora(target_modules=["first"])).base_model.model.first
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), layer(x.bfloat16()).float())


def test_factors_are_fp32_unless_autocast_adapter_dtype_is_off():
    for off, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        chain = quantize_model(_Chain().bfloat16(), skip=[], compute_dtype=torch.bfloat16)
        model = with_adapter(
            chain, lora(target_modules=["first", "second"]), autocast_adapter_dtype=not off
        )
        factors = [p for name, p in model.named_parameters() if "lora_" in name]
        assert {p.dtype for p in factors} == {dtype}
        model(torch.randn(4, 96, dtype=torch.bfloat16)).float().sum().backward()
        assert {p.grad.dtype for p in factors} == {dtype}


def test_a_copy_and_a_pickle_compute_the_same():
    model = with_adapter(twins()[0], lora(use_dora=True))
    wanted = logits(model, tokens())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other, tokens()), wanted)


def test_training_lowers_the_loss_and_leaves_the_base_alone():
    model = with_adapter(twins()[0], LoraConfig(r=8, target_modules="all-linear")).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name


def test_scale_and_rescale_are_heard():
    ours, theirs = peft_twins(lora())
    for model in (ours, theirs):
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(0.5)
    assert_same_model(ours, theirs, tokens())


def test_hooks_on_the_base_are_refused_and_not_passed_over():
    model = with_adapter(quantize_model(_Chain(), skip=[]), lora(target_modules=["first"]))
    layer = model.base_model.model.first
    handle = layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="has hooks"):
        layer(torch.randn(2, 96))
    handle.remove()
    assert layer(torch.randn(2, 96)).shape == (2, 64)


def test_second_derivatives_are_right():
    model = with_adapter(quantize_model(_Chain(), skip=[]), lora(target_modules=["first"]))
    layer = model.base_model.model.first
    x = torch.randn(2, 96, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    weight = layer.merged_weight(["default"])
    assert_near(dx.detach(), 2 * (x @ weight.t() + layer.bias).detach() @ weight)
    dx.square().sum().backward()
    assert layer.lora_A["default"].weight.grad.isfinite().all()


def test_eva_initialisation_works_on_nf4():
    from peft import EvaConfig, initialize_lora_eva_weights

    model = with_adapter(
        twins()[0],
        lora(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), target_modules=["q_proj"]),
    )
    batches = [{"input_ids": tokens(8, 12)} for _ in range(3)]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            gram = parameter @ parameter.t()  # right singular vectors: orthonormal rows
            assert_near(gram.detach(), torch.eye(4), relative=math.sqrt(RELATIVE_OF_SVD))


RELATIVE_OF_SVD = 1e-6  # of fp32 vectors from an incremental decomposition
