"""prepare_model: what it casts, what it leaves, and that gradients flow."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qlora_native import NF4Linear, add_lora, merge_lora, quantize_model
from qlora_native.hf import prepare_model
from support import Model, same_bits

TOKENS = torch.arange(2 * 12).reshape(2, 12) * 5 % 96


def make_llama(dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return quantize_model(LlamaForCausalLM(config).to(dtype))


def make_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32)
    model = GPT2LMHeadModel(config).to(torch.bfloat16)
    block = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    model.add_module("probe", quantize_model(block))  # its Conv1D are no nn.Linear
    return model


def checkpoints(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def dtypes(model):
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def test_norms_alone_become_fp32():
    model = make_llama()
    before = dtypes(model)
    assert prepare_model(model) is model
    after = dtypes(model)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {name for name in after if "norm" in name}
    assert {after[name] for name in changed} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.config.use_cache
    assert checkpoints(model)


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_activations_stay_in_16_bits(make):
    model = make().eval()
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
    prepare_model(model)
    seen = {}

    def record(module, _, output):
        seen[names[module]] = output.dtype

    names = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | NF4Linear) or "norm" in type(module).__name__.lower()
    }
    for module in names:
        module.register_forward_hook(record)
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    assert len(seen) > 4
    assert set(seen.values()) == {torch.bfloat16}, seen
    # The norms' weights are exact in both dtypes; a product with them is rounded once in both.
    torch.testing.assert_close(logits, expected, rtol=2**-6, atol=2**-6 * expected.abs().max())


def test_a_norm_is_computed_in_fp32():
    model = make_llama()
    prepare_model(model)
    norm = model.model.norm
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    exact = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x).double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_a_prepared_model_follows_casts(make, dtype):
    """As Trainer's with `bf16_full_eval`; torch's LayerNorm wants one dtype of weight and input."""
    model = prepare_model(make()).to(dtype).eval()
    expected = make().to(dtype).eval()
    with torch.no_grad():
        logits, want = (each(input_ids=TOKENS).logits for each in (model, expected))
    assert logits.dtype == dtype
    # What bf16 rounded at the start is the same; prepared norms round their result once more.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits, want, rtol=4 * eps, atol=4 * eps * want.abs().max())
    again = prepare_model(model)
    norms = [module for name, module in again.named_modules() if name.endswith("norm")]
    assert all(len(norm._forward_hooks) <= 1 for norm in norms)
    with torch.no_grad():
        assert again(input_ids=TOKENS).logits.dtype == dtype


def test_an_fp32_model_gets_no_hooks():
    model = make_llama(torch.float32)
    prepare_model(model)
    norms = [module for name, module in model.named_modules() if name.endswith("norm")]
    assert norms
    assert not any(norm._forward_hooks or norm._forward_pre_hooks for norm in norms)


def test_twice_is_once():
    once, twice = make_llama(), make_llama()
    prepare_model(once)
    prepare_model(prepare_model(twice))
    for a, b in zip(once.modules(), twice.modules(), strict=True):
        if "norm" in type(a).__name__.lower():
            assert len(a._forward_hooks) == len(b._forward_hooks) == 1
    with torch.no_grad():
        assert same_bits(once(input_ids=TOKENS).logits, twice(input_ids=TOKENS).logits)


def test_a_prepared_model_can_be_copied():
    model = prepare_model(make_llama())
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        assert same_bits(copy.deepcopy(model)(input_ids=TOKENS).logits, expected)


def gradients(model):
    model.train()
    torch.manual_seed(3)  # dropout's seeds
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def with_lora(model):
    torch.manual_seed(1)
    add_lora(model, r=4, lora_dropout=0.2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_equal_gradients(use_reentrant):
    plain = with_lora(prepare_model(make_llama(), gradient_checkpointing=False))
    assert not checkpoints(plain)
    recomputing = with_lora(
        prepare_model(make_llama(), gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    )
    expected, actual = gradients(plain), gradients(recomputing)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert same_bits(gradient, actual[name]), name


def test_a_dense_model_is_refused():
    config = make_llama().config
    with pytest.raises(ValueError, match=r"no NF4Linear.*NF4Config"):
        prepare_model(LlamaForCausalLM(config))


def test_a_model_with_adapters_is_refused_and_left():
    model = with_lora(make_llama())
    before = dtypes(model)
    with pytest.raises(ValueError, match=r"q_proj has an adapter already"):
        prepare_model(model)
    assert dtypes(model) == before
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_cannot_checkpoint_is_refused_and_left():
    model = quantize_model(Model())
    with pytest.raises(ValueError, match="no gradient checkpointing"):
        prepare_model(model)
    assert model.embed.weight.requires_grad
    prepare_model(model, gradient_checkpointing=False)
    assert not model.embed.weight.requires_grad
    assert any(isinstance(module, NF4Linear) for module in model.modules())


def merged_by_peft(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules="all-linear")
    ).merge_and_unload()


def merged_natively(model):
    return merge_lora(with_lora(model)).model


def dequantized(model):
    return model.dequantize()


@pytest.mark.parametrize("make_dense", [merged_by_peft, merged_natively, dequantized])
def test_a_dense_model_has_its_norms_back(make_dense):
    dense = make_dense(prepare_model(make_llama()))
    assert set(dtypes(dense).values()) == {torch.bfloat16}
    norms = [module for module in dense.modules() if "Norm" in type(module).__name__]
    assert norms
    assert not any(norm._forward_hooks or norm._forward_pre_hooks for norm in norms)
    assert not any(list(norm.buffers()) for norm in norms)
    with torch.no_grad():
        assert dense(input_ids=TOKENS).logits.dtype == torch.bfloat16
