"""Quantise, and dequantise with `out=`, on a GPU."""

from collections.abc import Iterator

import torch
from torch import Tensor

import qlora_native as q
from checks import PEER_TOLERANCE, assert_close
from cuda_clock import GRAPH, KERNELS, Round
from cuda_device import copies_past_l2
from cuda_harness import CudaCase
from cuda_peers import add_peer
from cuda_peers import bitsandbytes as bnb
from cuda_weights import CudaWeights
from goals import BNB
from harness import OURS, Work
from qlora_native.ops.storage import NF4Tensors

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def works(weights: CudaWeights) -> Iterator[Work]:
    yield Work("quantise", weights.size, lambda: _quantise(weights))
    for name in _DTYPES:
        yield Work(
            f"dequantise to {name}", weights.size, lambda name=name: _dequantise(weights, name)
        )
    yield Work("dequantise to bf16, plain scales", weights.size, lambda: _dequantise_plain(weights))


def _quantise(weights: CudaWeights) -> CudaCase:
    """From bf16, with nested scales. It waits for the GPU, so that its kernels alone are timed."""
    ours = Round(weights.dense, q.nf4_quantize)
    _require_same_tensors(ours.first().tensors, weights.nf4_on_cpu.tensors)

    def theirs(w: Tensor) -> object:
        return bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)

    def check(result: tuple) -> None:
        share = (result[0].view(-1).cpu() == weights.nf4_on_cpu.codes.view(-1)).double().mean()
        if share < 0.999:
            raise SystemExit(f"only {share:.4%} of its bytes are ours")

    case = CudaCase(
        {OURS: ours}, clock=KERNELS, bytes_moved=weights.on_cpu.nbytes + weights.nf4_bytes
    )
    add_peer(case.contenders, case.notes, BNB, lambda: Round(weights.dense, theirs), check)
    return case


def _require_same_tensors(actual: NF4Tensors, expected: NF4Tensors) -> None:
    """The bytes of the CPU backend, which is tested against references of its own."""
    for name, mine, wanted in zip(NF4Tensors._fields, actual, expected, strict=True):
        if isinstance(wanted, Tensor) and not torch.equal(mine.cpu(), wanted):
            raise SystemExit(f"WRONG: quantise: {name} has other bytes than on the CPU")


def _dequantise(weights: CudaWeights, name: str) -> CudaCase:
    """With nested scales, into buffers that exist and are not in L2."""
    dtype = _DTYPES[name]
    case = _dequantise_case(weights, [layer.nf4_weight for layer in weights.ours], dtype)

    def make() -> Round:
        dense = weights.on_cpu.to(weights.device, dtype)
        quantised = copies_past_l2(
            lambda: bnb.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True),
            weights.n * weights.k // 2,
            weights.device,
        )
        out = torch.empty_like(dense)
        return Round(quantised, lambda one: bnb.functional.dequantize_4bit(*one, out=out))

    add_peer(
        case.contenders,
        case.notes,
        BNB,
        make,
        lambda out: assert_close(BNB, out, weights.decoded, PEER_TOLERANCE),
    )
    return case


def _dequantise_plain(weights: CudaWeights) -> CudaCase:
    """With a scale of fp32 a block."""
    on_cpu = q.nf4_quantize(weights.on_cpu, double_quant=False)
    ours = copies_past_l2(lambda: on_cpu.to(weights.device), on_cpu.nbytes, weights.device)
    return _dequantise_case(weights, ours, torch.bfloat16)


def _dequantise_case(weights: CudaWeights, ours: list[q.NF4Weight], dtype: torch.dtype) -> CudaCase:
    out_bytes = weights.n * weights.k * dtype.itemsize
    outs = copies_past_l2(
        lambda: torch.empty(weights.n, weights.k, dtype=dtype, device=weights.device),
        out_bytes,
        weights.device,
    )
    count = max(len(ours), len(outs))
    pairs = [(ours[i % len(ours)], outs[i % len(outs)]) for i in range(count)]
    one = Round(pairs, lambda pair: q.nf4_dequantize(pair[0], dtype, out=pair[1]))
    expected = ours[0].to("cpu").dequantize(dtype)
    if not torch.equal(one.first().cpu(), expected):
        raise SystemExit("WRONG: dequantise: other bits than on the CPU")
    return CudaCase({OURS: one}, clock=GRAPH, bytes_moved=ours[0].nbytes + out_bytes)
