"""Writes the golden bytes that the C++ tests compare with: `python make_golden.py [--check]`.

Needs numpy and bitsandbytes (0.50.2 wrote the committed files). `--check` only compares.

- `nf4_levels.bin`, `dynamic_map_signed.bin`, `dynamic_map_unsigned.bin`: fp32, from bitsandbytes.
- `nf4_<dtype>.bin`: from the numpy implementation below, which knows nothing of this library. Every
  run asserts that bitsandbytes' CPU backend writes the same bytes, but for its known deviations:
  it divides by absmax in a trailing partial block where its CUDA multiplies by the reciprocal, and
  its 8-bit quantiser errs in a few nested scales that lie close to a midpoint.

A `nf4_<dtype>.bin` holds, for each block size of BLOCK_SIZES in order and little-endian:
codes, absmax (fp32), nested offset (fp32), nested absmax (fp32), nested codes (uint8), and the
scales that the nested ones decode to (fp32).

The input, which the tests compute too, is exact in its dtype. Element i of N * K, row-major:
    state_i = state_{i-1} * 1664525 + 1013904223 mod 2^32, state_{-1} = 12345
    s = (state_i >> (32 - p)) - 2^(p-1), p significand bits: 24 (fp32), 8 (bf16), 11 (fp16)
    h = ((i // 48) * 2654435761 mod 2^32) >> 29
    value = s * 2^(1-p-h), but 0 for ZERO_BEGIN <= i < ZERO_END
"""

import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

N, K = 51, 167  # an odd count, 267 blocks of 32: two groups of nested scales
ZERO_BEGIN, ZERO_END = 2048, 3072
BLOCK_SIZES = (32, 64, 256, 4096)
SIGNIFICAND_BITS = {"float32": 24, "bfloat16": 8, "float16": 11}
NESTED_BLOCK = 256
ZERO_CODE, NESTED_ZERO_CODE = 7, 127

LEVELS = bnb.get_4bit_type("nf4", device="cpu").numpy()
SIGNED_MAP = bnb.create_dynamic_map(signed=True).numpy()
UNSIGNED_MAP = bnb.create_dynamic_map(signed=False).numpy()


def make_input(significand_bits: int) -> np.ndarray:
    values = np.zeros(N * K, dtype=np.float32)
    state = 12345
    for i in range(N * K):
        state = (state * 1664525 + 1013904223) % 2**32
        s = (state >> (32 - significand_bits)) - 2 ** (significand_bits - 1)
        h = ((i // 48) * 2654435761 % 2**32) >> 29
        if not ZERO_BEGIN <= i < ZERO_END:
            values[i] = np.ldexp(float(s), 1 - significand_bits - h)
    return values


def nearest(entries: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The index of the entry nearest to x by fp32 midpoints; a tie goes down."""
    midpoints = (entries[:-1] + entries[1:]) / np.float32(2)
    return np.searchsorted(midpoints, x, side="left").astype(np.uint8)


def absmax_of_blocks(values: np.ndarray, block: int) -> np.ndarray:
    return np.maximum.reduceat(np.abs(values), np.arange(0, len(values), block))


def encode(entries: np.ndarray, values: np.ndarray, block: int, zero: int) -> tuple:
    """Codes and absmax of each block: x * (1 / absmax), both operations in fp32."""
    absmax = absmax_of_blocks(values, block)
    with np.errstate(divide="ignore", invalid="ignore"):
        reciprocal = np.repeat(np.float32(1) / absmax, block)[: len(values)]
        codes = nearest(entries, values * reciprocal)
    codes[np.repeat(absmax == 0, block)[: len(values)]] = zero
    return codes, absmax


def mean(absmax: np.ndarray) -> np.float32:
    """Fp64 sums of 256 in index order, then of those, rounded once."""
    total = 0.0
    for begin in range(0, len(absmax), NESTED_BLOCK):
        partial = 0.0
        for value in absmax[begin : begin + NESTED_BLOCK]:
            partial += float(value)
        total += partial
    return np.float32(total / len(absmax))


def quantize(values: np.ndarray, block_size: int) -> list:
    codes, absmax = encode(LEVELS, values, block_size, ZERO_CODE)
    padded = np.append(codes, np.uint8(ZERO_CODE))[: len(codes) + len(codes) % 2]
    packed = padded[0::2] << 4 | padded[1::2]
    offset = mean(absmax)
    nested, nested_absmax = encode(SIGNED_MAP, absmax - offset, NESTED_BLOCK, NESTED_ZERO_CODE)
    scales = SIGNED_MAP[nested] * np.repeat(nested_absmax, NESTED_BLOCK)[: len(nested)] + offset
    return [packed, absmax, np.array([offset]), nested_absmax, nested, scales]


def compare_with_bitsandbytes(values: np.ndarray, dtype: torch.dtype, block_size: int) -> None:
    packed, absmax, offset, nested_absmax, nested, _ = quantize(values, block_size)
    w = torch.from_numpy(values).to(dtype)
    codes, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
    whole_bytes = len(values) // block_size * block_size // 2
    codes = codes.flatten().numpy()
    assert (codes[:whole_bytes] == packed[:whole_bytes]).all()
    assert codes[-1] & 0x0F == packed[-1] & 0x0F == ZERO_CODE  # the padding of an odd count
    assert (codes != packed).sum() <= 2
    assert (state.absmax.numpy() == absmax).all()

    centred = torch.from_numpy(absmax - offset[0])
    nested_codes, nested_state = bnb.quantize_blockwise(centred, blocksize=NESTED_BLOCK)
    assert (nested_state.absmax.numpy() == nested_absmax).all()
    difference = nested_codes.numpy().astype(int) - nested.astype(int)
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() <= 0.02


def main() -> None:
    folder = Path(__file__).parent
    files = {
        "nf4_levels": [LEVELS],
        "dynamic_map_signed": [SIGNED_MAP],
        "dynamic_map_unsigned": [UNSIGNED_MAP],
    }
    for name, significand_bits in SIGNIFICAND_BITS.items():
        values = make_input(significand_bits)
        dtype = getattr(torch, name)
        assert (torch.from_numpy(values).to(dtype).float().numpy() == values).all()
        for block_size in BLOCK_SIZES:
            compare_with_bitsandbytes(values, dtype, block_size)
            files.setdefault(f"nf4_{name}", []).extend(quantize(values, block_size))
    for name, arrays in files.items():
        content = b"".join(a.astype(a.dtype.newbyteorder("<")).tobytes() for a in arrays)
        path = folder / f"{name}.bin"
        if "--check" in sys.argv:
            assert path.read_bytes() == content, f"{path} differs"
        else:
            path.write_bytes(content)
        print(f"{path.name}: {len(content)} bytes")


if __name__ == "__main__":
    main()
