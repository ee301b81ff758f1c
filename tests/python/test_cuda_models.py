"""Whole models on a GPU: stored, moved, merged and trained as on the CPU."""

import copy

import pytest
import torch
from torch import nn

from cuda_layers import over_optimizers
from qlora_native import add_lora, merge_lora, quantize_model
from support import Model, assert_near, same_bits, state_bits

pytestmark = pytest.mark.cuda  # conftest.py skips these where there is no GPU, or no CUDA build


def test_a_model_gets_the_bytes_of_the_cpu(device):
    torch.manual_seed(1)
    model = Model(width=64)
    on_gpu = quantize_model(copy.deepcopy(model).to(device))
    on_cpu = quantize_model(model)
    assert state_bits(on_gpu) == state_bits(on_cpu)
    assert all(p.device.type == device.type for p in on_gpu.parameters())


def test_a_state_dict_crosses_devices(device):
    source = add_lora(quantize_model(Model()), r=4).to(device)
    target = add_lora(quantize_model(Model()), r=4)
    target.load_state_dict(source.state_dict())
    assert state_bits(target) == state_bits(source)
    back = add_lora(quantize_model(Model()), r=4).to(device)
    back.load_state_dict(target.state_dict())
    tokens = torch.arange(21, device=device).view(3, 7)
    assert same_bits(back.eval()(tokens), source.eval()(tokens))


def test_a_merged_model_is_what_was_trained(device):
    model = add_lora(quantize_model(Model()), r=4).to(device).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    tokens = torch.arange(21, device=device).view(3, 7)
    expected = model(tokens)
    report = merge_lora(model, batch=tokens)
    assert all(p.device.type == device.type for p in model.parameters())
    assert_near(model(tokens), expected)
    assert report.outputs.max_difference <= 1e-4 * expected.abs().max()


@over_optimizers
def test_training_on_the_gpu_follows_the_cpu(device, optimizer_class):
    def losses_on(place: torch.device) -> list[float]:
        torch.manual_seed(2)
        model = add_lora(quantize_model(Model()), r=4).to(place)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer_class(trained, lr=1e-2)
        tokens = torch.arange(42, device=place).view(6, 7)
        losses = []
        for _ in range(20):
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    actual, expected = losses_on(device), losses_on(torch.device("cpu"))
    assert expected[-1] < 0.9 * expected[0]
    assert actual == pytest.approx(expected, rel=0.02)
