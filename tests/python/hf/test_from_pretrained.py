"""from_pretrained with NF4Config: which layers become 4-bit, and that the model computes right."""

import copy
import warnings

import hf_models
import pytest
import torch
from hf_models import nf4_names, saved
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)

from qlora_native import NF4Linear, nf4_quantize, ops, quantize_model
from qlora_native.hf import NF4Config
from qlora_native.hf.conv1d import NF4Conv1D
from support import assert_near, bits, same_bits, state_bits

KINDS = {
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "mixtral": AutoModelForCausalLM,
    "qwen2_moe": AutoModelForCausalLM,
    "gpt_oss": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "bert": AutoModelForSequenceClassification,
}
LLAMA_LAYERS = [
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in (
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    )
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder for (kind, dtype), written when it is first asked for."""
    folders = {}

    def folder(kind: str, dtype: torch.dtype = torch.float32):
        if (kind, dtype) not in folders:
            folders[kind, dtype] = tmp_path_factory.mktemp(kind)
            model = getattr(hf_models, f"tiny_{kind}")(dtype)
            model.save_pretrained(folders[kind, dtype])
        return folders[kind, dtype]

    return folder


def load(kind: str, folder, **settings):
    return KINDS[kind].from_pretrained(folder, quantization_config=NF4Config(**settings))


def inputs(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "t5" else {})}


def logits(model: nn.Module, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(kind)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_the_checkpoint_quantised(kind, dtype, checkpoints):
    """Every 4-bit weight of every architecture, and every other tensor untouched."""
    folder = checkpoints(kind, dtype)
    dense = KINDS[kind].from_pretrained(folder)
    assert dense.dtype == dtype
    model = load(kind, folder)
    assert not model.training
    expected = dict(dense.state_dict())
    for name in nf4_names(model):
        layer = model.get_submodule(name)
        if isinstance(layer, NF4Linear):
            weight = expected.pop(f"{name}.weight")
            weight = weight.T if isinstance(layer, NF4Conv1D) else weight
            for part, tensor in zip(layer.tensors()[:4], quantised(weight)[:4], strict=True):
                assert same_bits(part.data, tensor)
            continue
        for weight_name in layer.weight_shapes:
            weight = expected.pop(f"{name}.{weight_name}")
            for e, one in enumerate(weight):
                one = one.T if layer.is_transposed else one
                got = layer.tensors(weight_name, e)[:4]
                for part, tensor in zip(got, quantised(one)[:4], strict=True):
                    assert same_bits(part.data, tensor)
    state = model.state_dict()
    for name, tensor in expected.items():
        assert same_bits(state[name], tensor), name
    assert {n for n, t in state.items() if t.is_floating_point()} == set(expected)


def quantised(weight: torch.Tensor) -> ops.storage.NF4Tensors:
    return nf4_quantize(weight.contiguous()).tensors


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_what_its_dequantised_copy_does(kind, checkpoints):
    model = load(kind, checkpoints(kind))
    y = logits(model, kind)
    dense = copy.deepcopy(model).dequantize()
    assert_near(y, logits(dense, kind))
    original = KINDS[kind].from_pretrained(checkpoints(kind))
    assert (y - logits(original, kind)).abs().max() > 1e-3 * y.abs().max()  # it is quantised


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_gradients_pass_through_to_the_embeddings(kind, checkpoints):
    model = load(kind, checkpoints(kind))
    dense = copy.deepcopy(model).dequantize()
    gradients = []
    for each in (model, dense):
        embedding = each.get_input_embeddings().weight
        each(**inputs(kind)).logits.square().sum().backward()
        gradients.append(embedding.grad)
    assert gradients[0].abs().max() > 0
    assert_near(*gradients)


def test_the_layers_that_are_4_bit(checkpoints):
    assert nf4_names(load("llama", checkpoints("llama"))) == LLAMA_LAYERS
    names = nf4_names(load("gpt2", checkpoints("gpt2")))
    assert names == [
        f"transformer.h.{i}.{name}"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    names = nf4_names(load("mixtral", checkpoints("mixtral")))
    assert [n for n in names if "mlp" in n] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    # T5 keeps wo in fp32 and asks for the dtype of its weight.
    names = nf4_names(load("t5", checkpoints("t5")))
    assert "encoder.block.0.layer.1.DenseReluDense.wi" in names
    assert not any(name.endswith(".wo") or name == "lm_head" for name in names)
    names = nf4_names(load("bert", checkpoints("bert")))
    assert "bert.pooler.dense" in names
    assert "classifier" not in names


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_the_settings_reach_every_layer(compute_dtype, checkpoints):
    settings = {"block_size": 32, "double_quant": False, "compute_dtype": compute_dtype}
    model = load("mixtral", checkpoints("mixtral"), **settings)
    for name in nf4_names(model):
        layer = model.get_submodule(name)
        assert {key: getattr(layer, key) for key in settings} == settings
    assert model.config.quantization_config == NF4Config(**settings)
    y = logits(model, "mixtral")
    assert y.dtype == torch.float32
    exact = logits(
        load("mixtral", checkpoints("mixtral"), block_size=32, double_quant=False), "llama"
    )
    assert same_bits(y, exact) == (compute_dtype is None)
    assert_near(y, exact, relative=0.1)


def test_the_dtype_that_is_asked_for_is_what_is_quantised(checkpoints):
    """As by loading in that dtype and quantising then, like bitsandbytes."""
    folder = checkpoints("llama")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=NF4Config()
    )
    assert model.dtype == torch.bfloat16
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert state_bits(model) == state_bits(quantize_model(dense))


def test_a_bias_is_kept_and_nothing_4_bit_is_trained(checkpoints):
    model = load("llama", checkpoints("llama"))
    layer = model.model.layers[0].self_attn.q_proj
    dense = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    assert same_bits(layer.bias, dense.model.layers[0].self_attn.q_proj.bias)
    assert layer.bias.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert model.get_input_embeddings().weight.requires_grad


# ---- skip lists and tied weights


@pytest.mark.parametrize(
    ("skip", "dense"),
    [
        (["lm_head"], set()),
        ([], set()),
        (["lm_head", "layers.0"], {name for name in LLAMA_LAYERS if ".0." in name}),
        (["lm_head", "q_proj"], {name for name in LLAMA_LAYERS if name.endswith("q_proj")}),
        (["lm_head", "model.layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
        (("lm_head", "mlp"), {name for name in LLAMA_LAYERS if "mlp" in name}),
    ],
)
def test_skip_names_what_stays_dense(skip, dense, checkpoints):
    model = load("llama", checkpoints("llama"), skip=skip)
    expected = [name for name in LLAMA_LAYERS if name not in dense]
    assert nf4_names(model) == expected + ([] if "lm_head" in skip else ["lm_head"])
    for name in dense:
        assert type(model.get_submodule(name)) is nn.Linear


@pytest.mark.parametrize("entry", ["head", "layer", "q_pro", "layers.2", "model.layers.0.q_proj"])
def test_a_skip_that_matches_nothing_is_refused(entry, checkpoints):
    with pytest.raises(ValueError, match=f"skip has '{entry}', which matches no module"):
        load("llama", checkpoints("llama"), skip=["lm_head", entry])


def test_a_tied_head_stays_tied(tmp_path):
    model = saved(hf_models.tiny_llama(tie_word_embeddings=True), tmp_path)
    assert nf4_names(model) == LLAMA_LAYERS
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert nf4_names(saved(hf_models.tiny_gpt2(), tmp_path / "gpt2")).count("lm_head") == 0


def test_a_tied_head_that_skip_leaves_out_is_refused(tmp_path):
    hf_models.tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="skip does not have 'lm_head', whose weight is tied"):
        load("llama", tmp_path, skip=[])
    with pytest.raises(ValueError, match="tied"):
        load("llama", tmp_path, skip=["q_proj"])
    assert nf4_names(load("llama", tmp_path, skip=["lm_head"])) == LLAMA_LAYERS


def test_a_model_without_a_linear_layer_is_refused(checkpoints):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer to hold in 4 bits"):
        load("llama", checkpoints("llama"), skip=["model", "lm_head"])


def test_another_head_than_the_checkpoints(checkpoints):
    """Without its head, and with a new one, which stays dense because it is not in the file."""
    model = AutoModel.from_pretrained(checkpoints("llama"), quantization_config=NF4Config())
    assert nf4_names(model) == [name.removeprefix("model.") for name in LLAMA_LAYERS]
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoints("llama"), quantization_config=NF4Config()
    )
    assert nf4_names(model) == LLAMA_LAYERS
    assert type(model.score) is nn.Linear


def test_experts_that_have_no_4_bit_form_are_named(checkpoints, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load("mixtral", checkpoints("mixtral"))
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    monkeypatch.delattr(MixtralExperts, "_apply_gate")  # as a module that is not decorated
    with pytest.warns(UserWarning, match=r"leaves 786,432 bytes .*0\.mlp\.experts\.gate_up"):
        model = load("mixtral", checkpoints("mixtral"))
    assert not any("experts" in name for name in nf4_names(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load("mixtral", checkpoints("mixtral"), skip=["lm_head", "experts"])  # was asked for


# ---- counts


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_dense_model(kind, checkpoints):
    dense = KINDS[kind].from_pretrained(checkpoints(kind))
    model = load(kind, checkpoints(kind))
    assert model.num_parameters() == dense.num_parameters()
    without = model.num_parameters(exclude_embeddings=True)
    assert without == dense.num_parameters(exclude_embeddings=True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters(only_trainable=True) == trainable
    assert 0 < trainable < model.num_parameters()


def test_the_memory_footprint_is_the_bytes_that_are_held(checkpoints):
    model = load("llama", checkpoints("llama"))
    tensors = [*model.parameters(), *model.buffers()]
    assert model.get_memory_footprint() == sum(bits(tensor).numel() for tensor in tensors)
    dense = LlamaForCausalLM.from_pretrained(checkpoints("llama"))
    nf4 = sum(model.get_submodule(name).nf4_weight.nbytes for name in LLAMA_LAYERS)
    floats = sum(4 * model.get_submodule(name).weight_count for name in LLAMA_LAYERS)
    assert model.get_memory_footprint() == dense.get_memory_footprint() - floats + nf4


# ---- where layers are


def test_a_device_map_of_one_device(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints("llama"), device_map={"": "cpu"}, quantization_config=NF4Config()
    )
    assert same_bits(logits(model, "llama"), logits(load("llama", checkpoints("llama")), "llama"))
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints("llama"), device_map="auto", quantization_config=NF4Config()
    )
    assert same_bits(logits(model, "llama"), logits(load("llama", checkpoints("llama")), "llama"))


DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
DISK |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


def test_a_dense_checkpoint_on_the_disk_is_refused(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="puts modules on the disk"):
        AutoModelForCausalLM.from_pretrained(
            checkpoints("llama"),
            device_map=DISK,
            offload_folder=tmp_path,
            quantization_config=NF4Config(),
        )


def test_an_automatic_device_map_counts_4_bit_bytes(checkpoints, tmp_path):
    """Too little memory sends layers to the disk: right for a 4-bit checkpoint, else refused."""
    model = load("llama", checkpoints("llama"))
    model.save_pretrained(tmp_path / "4-bit")
    options = {"device_map": "auto", "offload_folder": tmp_path / "offload"}
    held = model.get_memory_footprint()
    fits = AutoModelForCausalLM.from_pretrained(
        tmp_path / "4-bit", max_memory={"cpu": int(held / 0.9) + 10_000}, **options
    )
    assert not any(parameter.is_meta for parameter in fits.parameters())
    options["max_memory"] = {"cpu": int(0.8 * held)}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "4-bit", **options)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert same_bits(logits(offloaded, "llama"), logits(model, "llama"))
    with pytest.raises(ValueError, match="puts modules on the disk"):
        AutoModelForCausalLM.from_pretrained(
            checkpoints("llama"), quantization_config=NF4Config(), **options
        )


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_4_bit_checkpoint_may_be_left_on_the_disk(kind, checkpoints, tmp_path):
    model = load(kind, checkpoints(kind))
    model.save_pretrained(tmp_path / "4-bit")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "4-bit", device_map=DISK, offload_folder=tmp_path / "offload"
    )
    layer = offloaded.model.layers[1].self_attn.q_proj
    assert layer.weight.is_meta
    assert same_bits(logits(offloaded, kind), logits(model, kind))
    assert layer.weight.is_meta
    with pytest.raises(ValueError, match=r"model\.layers\.1.*without offloading"):
        offloaded.dequantize()
    offloaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert state_bits(again) == state_bits(model)


def test_a_gpu_without_the_cuda_backend_is_refused(checkpoints, monkeypatch):
    from qlora_native import _core

    monkeypatch.setattr(_core, "build_info", lambda: {"cuda": False})
    for device in (0, "cuda:0", torch.device("cuda")):
        with pytest.raises(ValueError, match="this build of qlora_native has no CUDA backend"):
            AutoModelForCausalLM.from_pretrained(
                checkpoints("llama"), device_map={"": device}, quantization_config=NF4Config()
            )
