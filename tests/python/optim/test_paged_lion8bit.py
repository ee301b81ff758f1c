"""PagedLion8bit: how close to 32 bits it stays, and what it stores."""

import pytest
import torch
from optimizers import BLOCK, decode, dynamic_map, make_parameters, set_gradients, take_steps
from torch import nn

from qlora_native import PagedLion, PagedLion8bit
from support import FP32_ROUNDOFF, same_bits


def test_the_first_step_is_that_of_32_bits():
    # The parameter sees the moment before it is encoded.
    p8, p32 = (nn.Parameter(torch.linspace(-1, 1, 5000)) for _ in range(2))
    for p, optimizer_class in ((p8, PagedLion8bit), (p32, PagedLion)):
        p.grad = torch.linspace(1, -2, 5000) ** 3
        optimizer_class([p], lr=0.1).step()
    assert same_bits(p8, p32)


@pytest.mark.parametrize("shape", [(1024, 32), (257, 129)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_each_step_is_that_of_32_bits_on_the_decoded_moment(shape, dtype):
    """Bits of the parameter; and the moment is stored as the nearest entry of its map."""
    p8, p32 = (make_parameters(dtype, [shape])[0] for _ in range(2))
    in_8_bits, in_32_bits = PagedLion8bit([p8], lr=1e-2), PagedLion([p32], lr=1e-2)
    entries = dynamic_map(signed=True).double()
    widest = (entries[1:] - entries[:-1]).max() / 2
    for step in range(10):
        set_gradients(step, [p8], [p32])
        in_8_bits.step()
        in_32_bits.step()
        assert same_bits(p8, p32)
        state, exact = in_8_bits.state[p8], in_32_bits.state[p32]["exp_avg"]
        blocks = nn.functional.pad(exact.flatten(), (0, -exact.numel() % BLOCK)).view(-1, BLOCK)
        assert same_bits(state["exp_avg_absmax"], blocks.abs().amax(1))
        decoded = decode(state, "exp_avg")
        absmax = state["exp_avg_absmax"].repeat_interleave(BLOCK)[: exact.numel()].view(shape)
        error = (decoded.double() - exact.double()).abs()
        assert (error <= (widest + 4 * FP32_ROUNDOFF) * absmax).all()
        exact.copy_(decoded)


def test_training_reaches_the_loss_of_32_bits():
    def train(optimizer_class, **options) -> float:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1))
        x = torch.randn(256, 20)
        y = (x[:, :3].prod(1) + x[:, 4]).unsqueeze(1)
        optimizer = optimizer_class(model.parameters(), lr=1e-3, **options)
        for _ in range(150):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        return loss.item()

    assert train(PagedLion8bit, min_8bit_size=1) < 1.5 * train(PagedLion)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 511, 513, 3000])
def test_blocks_that_are_not_full_are_stepped_to_the_last_element(size):
    (p,) = make_parameters(shapes=[(size,)])
    start = p.detach().clone()
    optimizer = PagedLion8bit([p], lr=0.1, min_8bit_size=1)
    for step in range(3):
        p.grad = torch.linspace(1, 2, size)
        optimizer.step()
        torch.testing.assert_close(p.detach(), start - 0.1 * (step + 1))
    assert optimizer.state[p]["exp_avg_absmax"].shape == (-(-size // BLOCK),)
    take_steps(optimizer, [0])
