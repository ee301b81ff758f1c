"""prepare_model: what a quantised transformers model needs before its adapters are trained."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.nn import LoRALinear, NF4Linear
from qlora_native.nn.add_lora import is_layer_of_peft

_HALVES = (torch.bfloat16, torch.float16)


def prepare_model(
    model: nn.Module,
    gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Freeze a quantised model, keep its norms in fp32 and switch gradient checkpointing on.

    It takes the place of `peft.prepare_model_for_kbit_training`, which makes fp32 of every 16-bit
    parameter, embeddings and output head included: gigabytes that training has no use for, as the
    gradients that pass them are not kept. Here a norm alone is cast. It computes in fp32 and gives
    its result in the dtype that its weight had, so that the layers after it go on in 16 bits.

    Call it before adapters are added: `get_peft_model(prepare_model(model), config)`. Calling it
    twice is harmless. The key-value cache is switched off with checkpointing, as the two exclude
    each other.

    Args:
        model: a transformers model with NF4Linear layers; changed in place and returned.
        gradient_checkpointing: recompute activations in backward instead of keeping them.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`; `use_reentrant` is
            False unless given.

    Raises:
        ValueError: the model has no NF4Linear, has adapters already (they would be frozen), or
            cannot checkpoint. It is then as it was.
    """
    if not any(isinstance(module, NF4Linear) for module in model.modules()):
        raise ValueError(
            "prepare_model: the model has no NF4Linear; load it with "
            "quantization_config=NF4Config() or call quantize_model first"
        )
    adapted = next((name for name, module in model.named_modules() if _has_adapter(module)), None)
    if adapted is not None:
        raise ValueError(
            f"prepare_model: {adapted or 'the model'} has an adapter already, which would be "
            "frozen; call prepare_model before add_lora or get_peft_model"
        )
    if gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"prepare_model: {type(model).__name__} has no gradient checkpointing; "
            "pass gradient_checkpointing=False"
        )
    model.requires_grad_(False)
    for norm in _norms(model):
        _compute_in_fp32(norm)
    if gradient_checkpointing:
        _enable_checkpointing(
            model, {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        )
    return model


def _has_adapter(module: nn.Module) -> bool:
    # A PeftModel is known by its configs: one with a prompt has no layer of PEFT.
    return (
        isinstance(module, LoRALinear) or hasattr(module, "peft_config") or is_layer_of_peft(module)
    )


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    """LayerNorm, RMSNorm, GroupNorm and the many that transformers' models define by such names."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        is_norm = type(module).__name__.lower().rstrip("0123456789d_").endswith("norm")
        if is_norm and own and all(parameter.dim() == 1 for parameter in own):
            yield module


# An empty buffer of a norm, whose dtype is that of its results: it follows casts of the model.
_RESULT = "result_like"


def _compute_in_fp32(norm: nn.Module) -> None:
    dtype = next(norm.parameters(recurse=False)).dtype
    if dtype not in _HALVES:
        return
    is_new = _RESULT not in norm._buffers
    norm.float()
    norm.register_buffer(_RESULT, torch.empty(0, dtype=dtype), persistent=False)
    if is_new:
        norm.register_forward_pre_hook(_to_dtype_of_weight)
        norm.register_forward_hook(_to_dtype_of_result)


def restore_norms(model: nn.Module) -> None:
    """Give the norms that `prepare_model` has cast their dtype back, for a model that is merged."""
    for norm in model.modules():
        result = norm._buffers.get(_RESULT)
        if result is None:
            continue
        delattr(norm, _RESULT)
        for hooks in (norm._forward_pre_hooks, norm._forward_hooks):
            for key, hook in list(hooks.items()):
                if hook in (_to_dtype_of_weight, _to_dtype_of_result):
                    del hooks[key]
        norm.to(result.dtype)


def _to_dtype_of_weight(norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: 16-bit tensors among its positional arguments become fp32.

    Or what its weight is: 16-bit again after a cast of the model, or under FSDP2's mixed precision.
    """
    dtype = next(norm.parameters(recurse=False)).dtype
    return tuple(
        arg.to(dtype) if isinstance(arg, Tensor) and arg.dtype in _HALVES else arg for arg in args
    )


def _to_dtype_of_result(norm: nn.Module, _: Any, output: Any) -> Any:
    """A forward hook: its result in the dtype that its weight had."""
    return output.to(norm._buffers[_RESULT].dtype) if isinstance(output, Tensor) else output


def _enable_checkpointing(model: Any, given: Mapping[str, Any]) -> None:
    """By the method's new name, or by that of older transformers."""
    settings = {"use_reentrant": False, **given}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if settings["use_reentrant"]:  # records nothing unless a segment's input requires a gradient
        model.enable_input_require_grads()
    if getattr(model, "config", None) is not None:
        model.config.use_cache = False
