"""PEFT's adapters in a compiled model that is inside a checkpoint."""

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qlora_native.hf  # noqa: F401 (installs the layers)
from qlora_native import quantize_model, set_lora


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_another_routing_at_the_recomputation_is_refused(use_reentrant):
    torch._dynamo.reset()
    model = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)))
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    by_peft = peft.get_peft_model(model, config)
    by_peft.add_adapter("other", config)
    by_peft.base_model.set_adapter(["default", "other"])  # both are trained
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def loss(function) -> torch.Tensor:
        x = torch.ones(4, 64, requires_grad=True)
        return function(x).square().sum()

    def run(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(compiled, x, use_reentrant=use_reentrant)

    for name in ("other", "default"):
        set_lora(by_peft, name)
        by_peft.zero_grad()
        loss(model).backward()
        expected = [p.grad for p in by_peft.parameters()]
        by_peft.zero_grad()
        loss(run).backward()
        for parameter, gradient in zip(by_peft.parameters(), expected, strict=True):
            assert (parameter.grad is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient)
    of_default = loss(run)
    set_lora(by_peft, "other")
    with pytest.raises(RuntimeError, match="had put 'default' in force at the forward, now it is"):
        of_default.backward()
    torch._dynamo.reset()
