"""NF4Weight: a tensor quantised to 4 bits, and the two functions that make and undo it."""

import torch
from torch import Tensor

from qlora_native import ops
from qlora_native.ops.storage import NF4Tensors


class NF4Weight:
    """A tensor stored as 4-bit NF4 codes and their scales.

    NF4 and double quantisation are by Dettmers et al. 2023, section 3.

    The flattened tensor is cut into blocks of `block_size` elements. Element e of block b is stored
    as the code of the NF4 level nearest to `w[e] / absmax[b]`, so that `w[e] ≈ level[code[e]] *
    absmax[b]`. With `double_quant` the scales themselves are stored in 8 bits, 256 blocks to an
    fp32 scale: 4.127 bits a weight at block 64, against 4.5.
    """

    def __init__(self, tensors: NF4Tensors, shape: torch.Size) -> None:
        self.tensors = tensors
        self.shape = shape

    @property
    def codes(self) -> Tensor:
        """uint8, two codes a byte, even element high: `[n, k/2]`, or `[bytes, 1]` for odd k."""
        return self.tensors.codes

    @property
    def absmax(self) -> Tensor:
        """The scale of every block in fp32, `[blocks]`, decoded where the scales are nested."""
        return ops.dequantize_absmax(self.tensors)

    @property
    def block_size(self) -> int:
        """Elements that share a scale."""
        return self.tensors.block_size

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.tensors.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and nested scales."""
        return sum(part.nbytes for part in self.tensors[:4] if part is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """`level[code] * absmax` in fp32, rounded once to `dtype`; see `nf4_dequantize`."""
        return nf4_dequantize(self, dtype, out)

    def to(self, device: torch.device | str) -> "NF4Weight":
        """The same bytes on another device."""
        moved = {
            name: part.to(device)
            for name, part in self.tensors._asdict().items()
            if isinstance(part, Tensor)
        }
        return NF4Weight(self.tensors._replace(**moved), self.shape)

    def __repr__(self) -> str:
        return (
            f"NF4Weight(shape={list(self.shape)}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}, device='{self.device}')"
        )


def nf4_quantize(w: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantise a tensor to NF4.

    The bits are the same on every device and with every number of threads.

    Args:
        w: float32, bfloat16 or float16, at least one dimension.
        block_size: elements that share a scale: a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.

    Raises:
        ValueError: wrong dtype or block_size; or w has a NaN or Inf (the message names the block).
    """
    return NF4Weight(ops.quantize(w, block_size, double_quant), w.shape)


def nf4_dequantize(
    weight: NF4Weight, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """The dense tensor that `weight` stands for, of its shape.

    Args:
        weight: what `nf4_quantize` returned.
        dtype: float32, bfloat16 or float16.
        out: where to write: a contiguous tensor of this dtype, as many elements, on the weight's
            device.

    Raises:
        ValueError: a dtype that is not one of the three, `out` does not fit, or it requires a
            gradient while gradients are recorded.
    """
    if dtype not in ops.storage.FLOAT_DTYPES:
        raise ValueError(f"nf4_dequantize: dtype is {dtype}, want float32, bfloat16 or float16")
    if out is None:
        return ops.dequantize(weight.tensors, dtype).view(weight.shape)
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "nf4_dequantize: out requires a gradient, which a write to it has none of; use "
            "torch.no_grad()"
        )
    if out.dtype != dtype or out.shape != weight.shape or out.device != weight.device:
        raise ValueError(
            f"nf4_dequantize: out is {out.dtype} {list(out.shape)} on {out.device}, "
            f"want {dtype} {list(weight.shape)} on {weight.device}"
        )
    ops.dequantize(weight.tensors, dtype, out)
    return out
