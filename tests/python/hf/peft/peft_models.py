"""Tiny models for the tests of PEFT: one on NF4, and a dense twin that stands for the same."""

import copy
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_native.hf  # noqa: F401 - installs the layers
from qlora_native import NF4Linear, quantize_model

HIDDEN = 64
VOCABULARY = 48
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

# fp32: a value passes some 20 products in a row, each of sums of at most 96 terms in another
# order, which differ by 96 * 2**-24 of the terms' magnitude at most.
RELATIVE = 20 * 96 * 2.0**-24


def tiny_llama(bias: bool = False, **settings) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    config = LlamaConfig(attention_bias=bias, mlp_bias=bias, **{**sizes, **settings})
    torch.manual_seed(7)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def twins(bias: bool = False, **quantization) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """(a model on NF4, the dense model that has its dequantised weights)."""
    dense = tiny_llama(bias)
    nf4 = quantize_model(copy.deepcopy(dense), **quantization)
    with torch.no_grad():
        for name, layer in nf4.named_modules():
            if isinstance(layer, NF4Linear):
                dense.get_submodule(name).weight.copy_(layer.dequantize())
    return nf4, dense


def peft_twins(config: LoraConfig, bias: bool = False, **quantization) -> tuple[PeftModel, ...]:
    return tuple(with_adapter(model, config) for model in twins(bias, **quantization))


def with_adapter(model: nn.Module, config: LoraConfig, **settings) -> PeftModel:
    """`get_peft_model` with a config of its own and the same random numbers at each call."""
    torch.manual_seed(3)
    return get_peft_model(model, copy.deepcopy(config), **settings)


def add_adapter(model: PeftModel, name: str, config: LoraConfig, seed: int = 4) -> None:
    torch.manual_seed(seed)
    model.add_adapter(name, copy.deepcopy(config))


def lora(**settings) -> LoraConfig:
    """A LoraConfig whose B is random, so that the adapter does something."""
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(**{**defaults, **settings})


def stretch_magnitudes(*models: nn.Module) -> None:
    """As training would: a new DoRA's magnitude is the norm, by which it is divided."""
    with torch.no_grad():
        for model in models:
            for name, parameter in model.named_parameters():
                if "lora_magnitude_vector" in name:
                    parameter.mul_(torch.linspace(0.5, 1.5, len(parameter)))


def tokens(rows: int = 3, columns: int = 9) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module, ids: Tensor, **arguments) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **arguments).logits


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Of every parameter that has one, after one backward of the loss."""
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(ours: Tensor, theirs: Tensor, relative: float = RELATIVE) -> None:
    """Equal to the order of fp32 sums, of the largest magnitude that there is."""
    limit = relative * theirs.abs().max().item()
    assert limit > 0
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert (ours - theirs).abs().max().item() <= limit


def assert_same_model(ours: PeftModel, theirs: PeftModel, ids: Tensor) -> None:
    """The same logits, and the same gradients for the same parameters."""
    assert_near(logits(ours, ids), logits(theirs, ids))
    mine, wanted = gradients(ours, ids), gradients(theirs, ids)
    assert mine.keys() == wanted.keys()
    assert wanted
    for name, gradient in wanted.items():
        if gradient.abs().max() > 0:
            assert_near(mine[name], gradient)
        else:
            assert not mine[name].any()


def base_bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every 4-bit parameter, by its name without PEFT's parts."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if p.dtype == torch.uint8
    }


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def anatomy(model: nn.Module) -> tuple:
    """All by which a model that was changed and one that was not differ."""
    return (
        [(name, id(module), type(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        [(name, p.detach().clone()) for name, p in model.state_dict().items()],
    )


def assert_untouched(model: nn.Module, before: tuple) -> None:
    now = anatomy(model)
    assert now[:2] == before[:2]
    for (name, tensor), (name_before, tensor_before) in zip(now[2], before[2], strict=True):
        assert name == name_before
        bits = tensor.contiguous().view(torch.uint8), tensor_before.contiguous().view(torch.uint8)
        assert torch.equal(*bits), name  # NaN is NaN


def quietly(function, *arguments, **settings):
    """Call it without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **settings)
