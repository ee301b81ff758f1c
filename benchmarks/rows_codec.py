"""Quantise, and dequantise with `out=`."""

import ctypes
from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from bitsandbytes.cextension import lib
from torch import Tensor, nn

import qlora_native as q
from checks import PEER_TOLERANCE, assert_close
from harness import OURS, Case, Work, copies_past_l3, in_turn
from weights import Weights

# Half the widest gap between NF4 levels (-1 and -0.6962), plus what rounding a scale may add.
_LARGEST_ERROR = (1 - 0.6961928) / 2 + 0.02


def works(weights: Weights) -> Iterator[Work]:
    yield Work("quantise", weights.size, lambda: _quantise(weights))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        yield Work(
            f"dequantise to {name}",
            weights.size,
            lambda dtype=dtype: _dequantise(weights, dtype),
        )


def _quantise(weights: Weights) -> Case:
    """From fp32, with nested scales; the result is allocated, as users do."""

    def theirs(w: torch.Tensor) -> object:
        return bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)

    w = weights.dense
    ours = q.nf4_quantize(w)
    blocks = w.view(-1, 64)
    error = (ours.dequantize().view(-1, 64) - blocks).abs() / blocks.abs().amax(1, keepdim=True)
    assert_close("quantise: scales", ours.absmax, blocks.abs().amax(1), 0.02)
    if not error.max() <= _LARGEST_ERROR:
        raise SystemExit(f"WRONG: quantise: an element is {error.max():.3f} of its absmax off")
    codes, _ = theirs(w)
    share = (codes.view(-1) == ours.codes.view(-1)).double().mean()
    if share < 0.9999:
        raise SystemExit(f"WRONG: quantise: only {share:.4%} of the bytes are bitsandbytes'")
    return Case(
        {
            OURS: in_turn(weights.fp32_tensors, q.nf4_quantize),
            "bitsandbytes": in_turn(weights.fp32_tensors, theirs),
        },
        bytes_moved=w.nbytes,
    )


def _dequantise(weights: Weights, dtype: torch.dtype) -> Case:
    """Both into buffers that exist, and that are not in L3."""
    ours = weights.ours[0].nf4_weight
    levels = bnb.functional.get_4bit_type("nf4", device="cpu")
    codes = torch.stack((ours.codes >> 4, ours.codes & 15), -1)
    reference = levels[codes.view(-1, 64).int()] * ours.absmax.view(-1, 1)
    reference = reference.view(weights.dense.shape)
    count = reference.numel() * dtype.itemsize
    outs = copies_past_l3(lambda: torch.empty_like(reference, dtype=dtype).zero_(), count)
    next_out = in_turn(outs, lambda out: out)

    def dequantise_ours(layer: q.NF4Linear) -> Tensor:
        return layer.dequantize(dtype, next_out())

    def dequantise_theirs(layer: nn.Module) -> Tensor:
        return _bitsandbytes_dequantise(layer.weight, next_out())

    if not torch.equal(dequantise_ours(weights.ours[0]), reference.to(dtype)):
        raise SystemExit("WRONG: dequantise: not level · absmax, rounded once")
    result = dequantise_theirs(weights.theirs_training[0])
    assert_close("bitsandbytes' dequantise", result, reference, PEER_TOLERANCE)
    return Case(
        {
            OURS: in_turn(weights.ours, dequantise_ours),
            "bitsandbytes": in_turn(weights.theirs_training, dequantise_theirs),
        },
        bytes_moved=ours.nbytes + count,
        bandwidth="copy",
    )


def _bitsandbytes_dequantise(weight: bnb.nn.Params4bit, out: Tensor) -> Tensor:
    """What its dequantize_4bit does on a CPU, but into `out`.

    Its own `out=` is for GPUs, and with a fresh tensor a call faults its pages in, which takes up
    to ten times as long as decoding (even a warm malloc does not always have so large a piece).
    """
    state = weight.quant_state
    absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
    absmax += state.offset
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[out.dtype]
    decode = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{name}")
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, absmax, out))
    decode(*pointers, *map(ctypes.c_longlong, (state.blocksize, *out.shape)))
    return out
