"""What bitsandbytes stores of an NF4 weight: read, written, and refused where it is not that."""

import json

import pytest
import torch

from qlora_native import NF4Weight, nf4_quantize
from qlora_native.hf.bitsandbytes import format as bnb_format
from qlora_native.hf.bitsandbytes.format import (
    ABSMAX,
    NESTED_ABSMAX,
    NESTED_QUANT_MAP,
    QUANT_MAP,
    QUANT_STATE,
    WEIGHT,
    StoredWeight,
    read_weight,
    write_weight,
)
from qlora_native.hf.bitsandbytes.layers import find_layers, shared_settings
from support import BLOCK_SIZES, import_bitsandbytes, over_dtypes, over_nesting, same_bits

STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
over_storages = pytest.mark.parametrize("storage", STORAGES, ids=lambda d: str(d)[6:])


@pytest.fixture(scope="module")
def bnb():
    with import_bitsandbytes():
        bitsandbytes = pytest.importorskip("bitsandbytes")
    with torch.compiler.set_stance("force_eager"):
        yield bitsandbytes


def stored_by_bitsandbytes(bnb, w, block_size=64, nested=True, storage=torch.uint8):
    """The state of bitsandbytes' own layer, without its name."""
    n, k = w.shape
    layer = bnb.nn.Linear4bit(k, n, bias=False, compress_statistics=nested, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        w,
        requires_grad=False,
        blocksize=block_size,
        compress_statistics=nested,
        quant_type="nf4",
        quant_storage=storage,
    )
    return dict(layer.to("cpu").state_dict())


def parts(nested=True, n=8, k=64, block_size=64, storage=torch.uint8):
    """As bitsandbytes would write them, of a random weight."""
    weight = nf4_quantize(torch.randn(n, k), block_size, nested)
    return write_weight(StoredWeight(weight.tensors, torch.float32, storage))


def with_state(parts, **changes):
    state = json.loads(bytes(parts[QUANT_STATE].tolist()))
    state |= changes
    state = {key: value for key, value in state.items() if value is not ...}
    return parts | {QUANT_STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


# ---- the maps


def test_maps_are_those_of_bitsandbytes(bnb):
    assert same_bits(bnb_format.nf4_levels(), bnb.functional.get_4bit_type("nf4", device="cpu"))
    assert same_bits(bnb_format.dynamic_map(), bnb.functional.create_dynamic_map(signed=True))


# ---- there and back


@over_nesting
@over_storages
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(64, 128), (48, 40), (8, 1000)], ids=str)
def test_what_bitsandbytes_stores_is_read_and_written_byte_for_byte(
    bnb, shape, block_size, storage, double_quant
):
    stored = stored_by_bitsandbytes(
        bnb, torch.randn(shape, dtype=torch.bfloat16), block_size, double_quant, storage
    )
    weight = read_weight("layer", stored)
    assert weight.dtype == torch.bfloat16
    assert weight.storage == storage
    assert (weight.tensors.n, weight.tensors.k) == shape
    assert weight.tensors.block_size == block_size
    written = write_weight(weight)
    assert list(written) == list(stored)
    for name in stored:
        assert same_bits(written[name], stored[name]), name


@over_dtypes
@over_nesting
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantised_weights_have_the_bits_of_bitsandbytes(bnb, block_size, double_quant, dtype):
    n, k = 24, 4096  # a row is whole blocks: bitsandbytes' fast decoder is wrong where it is not
    w = torch.randn(n, k, dtype=dtype)
    stored = stored_by_bitsandbytes(bnb, w, block_size, double_quant)
    state = bnb.functional.QuantState.from_dict(
        {name: part for name, part in stored.items() if name != WEIGHT}, torch.device("cpu")
    )
    theirs = bnb.functional.dequantize_4bit(stored[WEIGHT], state)
    ours = NF4Weight(read_weight("layer", stored).tensors, torch.Size((n, k)))
    assert same_bits(ours.dequantize(dtype), theirs)


@over_nesting
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 7), (33, 65), (257, 3)], ids=str)
def test_odd_shapes(bnb, shape, double_quant):
    """bitsandbytes' CPU kernels refuse an odd number of weights: its decoder is given the parts."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    ours = nf4_quantize(torch.randn(shape), 64, double_quant)
    stored = write_weight(StoredWeight(ours.tensors, torch.float32, torch.uint8))
    assert stored[WEIGHT].shape == ((ours.shape.numel() + 1) // 2, 1)
    back = read_weight("layer", stored).tensors
    for one, other in zip(back[:4], ours.tensors[:4], strict=True):
        assert (one is None and other is None) or same_bits(one, other)
    state = bnb.functional.QuantState.from_dict(
        {name: part for name, part in stored.items() if name != WEIGHT}, torch.device("cpu")
    )
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = stored[WEIGHT].flatten()
    theirs = _dequantize_4bit_compute(codes, absmax, state.code, 64, state.shape, torch.float32)
    assert same_bits(NF4Weight(back, ours.shape).dequantize(), theirs.view(shape))


def test_a_weight_is_written_on_the_meta_device_as_it_will_be():
    weight = nf4_quantize(torch.randn(48, 40)).tensors
    on_meta = weight._replace(
        codes=weight.codes.to("meta"),
        absmax=weight.absmax.to("meta"),
        nested_absmax=weight.nested_absmax.to("meta"),
    )
    written = write_weight(StoredWeight(weight, torch.float16, torch.bfloat16))
    announced = write_weight(StoredWeight(on_meta, torch.float16, torch.bfloat16))
    for name, part in written.items():
        assert (part.dtype, part.shape) == (announced[name].dtype, announced[name].shape)


def test_codes_that_do_not_fill_a_storage_dtype_are_refused():
    weight = nf4_quantize(torch.randn(3, 2), 64, double_quant=False).tensors  # 3 bytes
    with pytest.raises(ValueError, match=r"bfloat16.*codes of 3 × 2 weights; torch.uint8 does"):
        write_weight(StoredWeight(weight, torch.float32, torch.bfloat16))
    with pytest.raises(ValueError, match=r"quant_storage is torch\.int32"):
        write_weight(StoredWeight(weight, torch.float32, torch.int32))
    stored = write_weight(StoredWeight(weight, torch.float32, torch.uint8))
    stored[WEIGHT] = torch.zeros(2, 1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"layer.weight: is torch.bfloat16.*3 × 2 weights"):
        read_weight("layer", stored)


# ---- what is refused


@pytest.mark.parametrize("name", [WEIGHT, ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP])
def test_a_part_that_is_missing_or_wrong_is_named(name):
    whole = parts()
    without = {part: tensor for part, tensor in whole.items() if part != name}
    with pytest.raises(ValueError, match=r"layer: has \[.*want \[.*scales are nested"):
        read_weight("layer", without)
    wrong_shape = whole | {name: torch.cat([whole[name], whole[name]])}
    with pytest.raises(ValueError, match=rf"layer\.{name}: is .*8 × 64 weights in blocks of 64"):
        read_weight("layer", wrong_shape)
    wrong_dtype = whole | {name: whole[name].to(torch.int32)}
    with pytest.raises(ValueError, match=rf"layer\.{name}: is torch.int32.*want"):
        read_weight("layer", wrong_dtype)


def test_a_quant_state_that_is_missing_is_named():
    whole = parts()
    del whole[QUANT_STATE]
    with pytest.raises(ValueError, match="bitsandbytes__nf4: is missing"):
        read_weight("layer", whole)


def test_nested_parts_of_plain_scales_are_refused():
    plain = parts(nested=False)
    with pytest.raises(ValueError, match="scales are plain"):
        read_weight("layer", plain | {NESTED_ABSMAX: torch.ones(1)})
    with pytest.raises(ValueError, match="scales are plain"):
        read_weight("layer", parts() | {QUANT_STATE: plain[QUANT_STATE]})


@pytest.mark.parametrize("name", [QUANT_MAP, NESTED_QUANT_MAP])
def test_another_map_is_refused(name):
    changed = parts()
    changed[name][3] = changed[name][3].nextafter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=rf"layer\.{name}: is not the .* entry 3 is"):
        read_weight("layer", changed)
    changed[name][3] = torch.nan
    with pytest.raises(ValueError, match=r"entry 3 is nan"):
        read_weight("layer", changed)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_are_not_finite_are_refused(value):
    plain, nested = parts(nested=False), parts()
    plain[ABSMAX][1] = value
    with pytest.raises(ValueError, match=r"layer\.weight\.absmax: has a NaN or Inf"):
        read_weight("layer", plain)
    nested[NESTED_ABSMAX][0] = value
    with pytest.raises(ValueError, match=r"layer\.weight\.nested_absmax: has a NaN or Inf"):
        read_weight("layer", nested)
    with pytest.raises(ValueError, match="nested_offset"):
        read_weight("layer", with_state(parts(), nested_offset=value))


HOSTILE = {
    "blocksize": [0, -64, 63, 8192, 64.0, "64", None, True, [64]],
    "dtype": ["float64", "torch.float32", "int8", 3, None],
    "shape": [[8], [8, 64, 1], [8, -64], [0, 64], [8.0, 64], "8", None, {}, [True, 512]],
    "nested_blocksize": [64, 256.0, None],
    "nested_dtype": ["float16", None],
    "nested_offset": ["1.0", None, [], 10**400, True],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in HOSTILE.items() for value in values]
)
def test_a_hostile_quant_state_is_refused_by_key_and_value(key, value):
    with pytest.raises(ValueError, match=rf"layer\.{QUANT_STATE}: {key} is "):
        read_weight("layer", with_state(parts(), **{key: value}))


@pytest.mark.parametrize("shape", [[64, 9], [2**62, 2**62], [10**30, 10**30], [8, 63], [1, 1]])
def test_a_shape_that_the_codes_do_not_have_is_refused_before_anything_is_made(shape):
    with pytest.raises(ValueError, match=r"layer\.weight: is .* want .* weights in blocks of 64"):
        read_weight("layer", with_state(parts(), shape=shape))


@pytest.mark.parametrize("change", [{"blocksize": ...}, {"extra": 1}, {"nested_offset": ...}])
def test_keys_are_all_there_and_no_others(change):
    with pytest.raises(ValueError, match="its keys are"):
        read_weight("layer", with_state(parts(), **change))


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'"nf4"'])
def test_a_quant_state_that_is_no_json_object_is_refused(text):
    broken = parts() | {QUANT_STATE: torch.tensor(list(text), dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"bitsandbytes__nf4: (is not JSON|holds a)"):
        read_weight("layer", broken)


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8)], ids=str)
def test_a_quant_state_that_is_no_row_of_bytes_is_refused(tensor):
    with pytest.raises(ValueError, match="want a row of uint8"):
        read_weight("layer", parts() | {QUANT_STATE: tensor})


# ---- other kinds of quantisation


def test_fp4_and_int8_are_refused_by_name(bnb):
    layer = bnb.nn.Linear4bit(64, 8, bias=False, quant_type="fp4")
    layer.weight = bnb.nn.Params4bit(torch.randn(8, 64), requires_grad=False, quant_type="fp4")
    with pytest.raises(NotImplementedError, match="FP4"):
        read_weight("layer", dict(layer.to("cpu").state_dict()))
    with pytest.raises(NotImplementedError, match="quant_type is 'fp4', want 'nf4'"):
        read_weight("layer", with_state(parts(), quant_type="fp4"))
    with pytest.raises(NotImplementedError, match=r"layer\.SCB: is of an LLM.int8\(\) weight"):
        find_layers(["layer.weight", "layer.SCB", "layer.weight_format"])


# ---- the layers of a checkpoint


def names_of(layer, parts):
    return {f"{layer}.{part}" for part in parts}


def test_layers_are_found_by_their_quant_states():
    names = (
        names_of("a.q", parts()) | names_of("b", parts(nested=False)) | {"norm.weight", "b.bias"}
    )
    found = find_layers(names)
    assert [layer.name for layer in found] == ["a.q", "b"]
    assert set(found[0].parts) == set(parts())
    assert set(found[1].parts) == set(parts(nested=False))


def test_parts_without_a_quant_state_and_weights_of_no_layer_are_refused():
    with pytest.raises(ValueError, match=r"a\.weight\.absmax: its weight has no quant_state"):
        find_layers(["a.weight", "a.weight.absmax"])
    experts = "experts.gate_up_proj.quant_state.bitsandbytes__nf4"
    with pytest.raises(NotImplementedError, match=experts):
        find_layers(["experts.gate_up_proj", experts])


def test_layers_of_one_kind_are_wanted():
    from qlora_native.hf.bitsandbytes.quant_state import QuantState

    state = QuantState(64, torch.float32, 8, 64, 0.5)
    assert shared_settings({"a": state, "b": state._replace(n=9)}) == (64, True)
    with pytest.raises(ValueError, match=r"a has blocks of 64 and nested.*b has blocks of 128"):
        shared_settings({"a": state, "b": state._replace(block_size=128)})
    with pytest.raises(ValueError, match="b has blocks of 64 and plain scales"):
        shared_settings({"a": state, "b": state._replace(nested_offset=None)})
    with pytest.raises(ValueError, match="no 4-bit weight"):
        shared_settings({})
