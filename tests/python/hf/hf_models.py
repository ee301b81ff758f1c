"""Tiny models of transformers, one for each kind of architecture that the tests need."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from qlora_native.hf import NF4Config
from qlora_native.nn import NF4Experts, NF4Linear

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def build(kind: str, config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model of class `kind` in evaluation mode, the same one at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, kind)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # which would be zero
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
    return model.to(dtype).eval()


def tiny_llama(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    settings = {**SIZES, **HEADS, **TOKENS, "attention_bias": True, **settings}
    return build("LlamaForCausalLM", transformers.LlamaConfig(**settings), dtype)


def tiny_gpt2(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    settings = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, **TOKENS, **settings}
    return build("GPT2LMHeadModel", transformers.GPT2Config(**settings), dtype)


def tiny_mixtral(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    settings = {**SIZES, **HEADS, **TOKENS, **experts, **settings}
    return build("MixtralForCausalLM", transformers.MixtralConfig(**settings), dtype)


def tiny_qwen2_moe(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    shared = {"shared_expert_intermediate_size": 96, "decoder_sparse_step": 1}
    settings = {**SIZES, **HEADS, **TOKENS, **experts, **shared, **settings}
    return build("Qwen2MoeForCausalLM", transformers.Qwen2MoeConfig(**settings), dtype)


def tiny_gpt_oss(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    settings = {**SIZES, **HEADS, **TOKENS, **experts, **settings}
    return build("GptOssForCausalLM", transformers.GptOssConfig(**settings), dtype)


def tiny_t5(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    tokens = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}
    settings = {**sizes, "vocab_size": 96, **tokens, **settings}
    return build("T5ForConditionalGeneration", transformers.T5Config(**settings), dtype)


def tiny_bert(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    settings = {**SIZES, "num_attention_heads": 4, **settings}
    return build("BertForSequenceClassification", transformers.BertConfig(**settings), dtype)


def saved(model: Any, folder: Any, **settings: Any) -> Any:
    """The model saved and loaded again in 4 bits."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=NF4Config(**settings))


def nf4_names(model: torch.nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, NF4Linear | NF4Experts)]
