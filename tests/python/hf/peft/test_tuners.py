"""PEFT's tuners on NF4 layers, beyond what `test_all_tuners` walks through for each."""

import copy
import io
import warnings

import peft
import pytest
import torch
import torch.distributed as dist
from peft import PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tuner_cases import (
    CALL,
    TARGETS,
    TOLERANCE,
    adapted,
    dense_twin,
    logits,
    make_config,
    nf4_model,
    trained_step,
)

import qlora_native.hf
from qlora_native import NF4Linear
from qlora_native.hf.peft import install, tuners
from support import same_bits, state_bits


def layout(model):
    """All by which a model that was changed and one that was not differ."""
    return (
        [(name, id(module), type(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        sorted(name for name in vars(model) if "peft" in name),
        state_bits(model),
    )


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_installing_again_changes_nothing():
    before = BaseTuner.inject_adapter, BaseTuner.__init__
    install()
    assert (BaseTuner.inject_adapter, BaseTuner.__init__) == before


# ---- what is refused, and leaves the model as it was


def test_an_unknown_tuner_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(tuners, "ON_NF4", tuners.ON_NF4 - {"LOHA", "OSF"})
    for config, error in (
        (peft.LoHaConfig(target_modules=TARGETS), r"LOHA .*NF4Linear, and q_proj is one"),
        (peft.OSFConfig(target_modules=["down_proj"]), r"OSF .*NF4Linear, and down_proj is one"),
        (peft.LoHaConfig(target_modules="all-linear"), r"LOHA .*NF4Linear"),
    ):
        model = nf4_model()
        before = layout(model)
        with pytest.raises(NotImplementedError, match=error):
            get_peft_model(model, config)
        assert layout(model) == before


def test_an_unknown_tuner_may_have_the_dense_layers(monkeypatch):
    monkeypatch.setattr(tuners, "ON_NF4", frozenset())
    model = get_peft_model(nf4_model(), peft.LoHaConfig(r=4, target_modules=["lm_head"]))
    assert isinstance(model.base_model.model.lm_head, BaseTunerLayer)


def test_a_layer_that_stands_for_another_than_linear_is_refused():
    """A Conv1D of GPT-2, whose weight is the other way round once it is dense."""

    class NF4Conv1D(NF4Linear):
        pass

    model = nf4_model()
    model.model.layers[0].self_attn.q_proj.__class__ = NF4Conv1D
    before = layout(model)
    with pytest.raises(NotImplementedError, match=r"IA3.*q_proj is an NF4Conv1D"):
        get_peft_model(model, make_config("IA3", None))
    assert layout(model) == before


def test_a_tuner_that_leaves_a_layer_out_is_found_out(monkeypatch):
    monkeypatch.setattr("peft.tuners.osf.model.dispatch_default", lambda *_, **__: None)
    model = nf4_model()
    before = layout(model)
    with pytest.raises(NotImplementedError, match="OSF has left out the NF4Linear q_proj"):
        get_peft_model(model, make_config("OSF", None))
    assert layout(model) == before


def test_a_tuner_that_writes_to_the_base_is_refused_by_name(monkeypatch):
    def update_layer(self, *args, **kwargs):
        self.get_base_layer().weight.data -= 1.0

    monkeypatch.setattr("peft.tuners.vera.layer.VeraLayer.update_layer", update_layer)
    model = nf4_model()
    before = layout(model)
    with pytest.raises(TypeError, match=r"VERA cannot start from an NF4Linear.*4 bits"):
        get_peft_model(model, make_config("VERA", None))
    assert layout(model) == before


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    original = peft.IA3Model._create_new_module
    calls = []

    def third_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return original(*args, **kwargs)

    monkeypatch.setattr(peft.IA3Model, "_create_new_module", staticmethod(third_fails))
    model = nf4_model()
    before = layout(model)
    with pytest.raises(RuntimeError, match="no more"):
        get_peft_model(model, make_config("IA3", None))
    assert layout(model) == before
    monkeypatch.undo()
    assert_close(logits(adapted(model, "IA3", None)), logits(adapted(dense_twin(), "IA3", None)))


LOADS = {
    "peft": PeftModel.from_pretrained,
    "transformers": lambda model, folder: model.load_adapter(str(folder)),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(load, tmp_path):
    adapted(nf4_model(), "IA3", None).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.repeat(2, 2) for name, tensor in load_file(file).items()}, file)
    model = nf4_model()
    before = layout(model)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        load(model, tmp_path)
    assert layout(model) == before
    assert same_bits(logits(model), logits(nf4_model()))


def test_modules_to_save_cannot_be_four_bit():
    model = nf4_model()
    before = layout(model)
    config = peft.IA3Config(
        target_modules=["q_proj"], feedforward_modules=[], modules_to_save=["o_proj"]
    )
    with pytest.raises(NotImplementedError, match="modules_to_save"):
        get_peft_model(model, config)
    assert layout(model) == before


def test_a_merge_that_fails_changes_nothing():
    model = adapted(nf4_model(), "LOHA", None)
    model.add_adapter("broken", peft.LoHaConfig(r=4, target_modules=TARGETS))
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        layer.hada_w1_a["broken"].fill_(torch.inf)
    before = layout(model)
    for names in (["broken"], ["default", "broken"]):
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(names, safe_merge=True)
        assert layout(model) == before
        with pytest.raises(ValueError, match="NaNs detected"):
            layer.merge(safe_merge=True, adapter_names=names)
        assert layout(model) == before
        assert not layer.merged


# ---- several adapters, several tuners


def test_two_adapters_of_one_tuner():
    models = []
    for model in (nf4_model(), dense_twin()):
        model = adapted(model, "LOKR", None)
        torch.manual_seed(5)
        model.add_adapter("other", peft.LoKrConfig(r=2, target_modules=TARGETS, init_weights=False))
        models.append(model)
    ours, twin = models
    base = state_bits(ours)
    for names in ("other", "default"):
        ours.set_adapter(names)
        twin.set_adapter(names)
        assert_close(logits(ours), logits(twin))
    for model in models:
        model.base_model.set_adapter(["default", "other"])
    both = logits(ours)
    assert_close(both, logits(twin))
    for model in models:
        model.merge_adapter(["default"])
        model.merge_adapter(["default", "other"])
    assert_close(logits(ours), both, 2 * TOLERANCE)
    assert_close(logits(ours), logits(twin))
    ours.unmerge_adapter()
    assert same_bits(logits(ours), both)
    assert state_bits(ours) == base
    ours.delete_adapter("default")
    assert list(ours.peft_config) == ["other"]


def test_glora_merges_a_second_adapter_into_what_it_was():
    """It unmerges and merges all of them anew; the base is then the exact one again."""
    models = []
    for model in (nf4_model(), dense_twin()):
        model = adapted(model, "GLORA", None)
        torch.manual_seed(5)
        model.add_adapter("other", peft.GloraConfig(r=2, target_modules=TARGETS))
        model.base_model.set_adapter(["default", "other"])
        models.append(model)
    ours, twin = models
    before, bits = logits(ours), state_bits(ours)
    for model in models:
        model.merge_adapter(["default"])
        model.merge_adapter(["other"])
    assert_close(logits(ours), logits(twin), 2 * TOLERANCE)
    ours.unmerge_adapter()
    assert state_bits(ours) == bits
    assert same_bits(logits(ours), before)


def mixed(model):
    torch.manual_seed(0)
    settings = {"init_weights": False, "r": 4}
    model = get_peft_model(
        model, peft.LoHaConfig(target_modules=["v_proj"], **settings), "loha", mixed=True
    )
    model.add_adapter("lokr", peft.LoKrConfig(target_modules=["v_proj", "up_proj"], **settings))
    model.add_adapter(
        "lora", peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    )
    model.set_adapter(["loha", "lokr", "lora"])
    return model.eval()


def test_a_mixed_model():
    ours, twin = mixed(nf4_model()), mixed(dense_twin())
    assert isinstance(ours, PeftMixedModel)
    before, bits = logits(ours), state_bits(ours)
    assert_close(before, logits(twin))
    with ours.disable_adapter():
        assert same_bits(logits(ours), logits(nf4_model()))
    for model in (ours, twin):
        model.train()
        model(**CALL).loss.backward()
    expected = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert expected
    for name, parameter in ours.named_parameters():
        if name in expected:
            assert_close(parameter.grad, expected[name], 4 * TOLERANCE)
    ours.merge_adapter()
    assert_close(logits(ours), before, 2 * TOLERANCE)
    ours.unmerge_adapter()
    assert state_bits(ours) == bits
    assert same_bits(logits(ours), before)
    merged = ours.merge_and_unload()
    assert not any(isinstance(m, BaseTunerLayer | NF4Linear) for m in merged.modules())
    assert_close(logits(merged), before, 2 * TOLERANCE)


@pytest.mark.parametrize("first", ["lora", "loha"])
def test_lora_and_another_tuner_on_one_layer_are_refused(first):
    configs = {
        "lora": peft.LoraConfig(r=4, target_modules=["v_proj"]),
        "loha": peft.LoHaConfig(r=4, target_modules=["v_proj"]),
    }
    model = get_peft_model(nf4_model(), configs.pop(first), first, mixed=True)
    before = layout(model.base_model.model)
    ((second, config),) = configs.items()
    with pytest.raises(NotImplementedError, match="NF4Linear"):
        model.add_adapter(second, config)
    assert layout(model.base_model.model) == before


# ---- ways to train


def test_all_linear():
    model = get_peft_model(nf4_model(), peft.VeraConfig(r=4, target_modules="all-linear"))
    adapted_names = {n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert len(adapted_names) == 14  # seven in each block, and not the head
    assert not any(name.endswith("lm_head") for name in adapted_names)


def test_adalora_allocates_ranks_as_on_the_dense_twin():
    models = adapted(nf4_model(), "ADALORA", None), adapted(dense_twin(), "ADALORA", None)
    patterns = []
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(1, 10):
            trained_step(model, "ADALORA")
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        patterns.append(model.peft_config["default"].rank_pattern)
    assert patterns[0] == patterns[1]
    ranks = [sum(kept) for kept in patterns[0].values()]
    assert sum(ranks) == 3 * len(ranks)
    assert max(ranks) > min(ranks)
    assert_close(logits(models[0]), logits(models[1]), 32 * TOLERANCE)  # after nine steps


@pytest.mark.parametrize("bias", ["all", "boft_only"])
def test_biases_are_trained_saved_and_loaded(bias, tmp_path):
    """BitFit beside an adapter; the biases are those inside of the NF4 layers."""
    config = peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "v_proj"], bias=bias)
    ours, twin = (
        get_peft_model(model, copy.deepcopy(config)) for model in (nf4_model(), dense_twin())
    )
    trained = {n for n, p in ours.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert len(trained) == {"all": 8, "boft_only": 4}[bias]
    before = state_bits(ours)
    for model in (ours, twin):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            trained_step(model, "BOFT")
            optimizer.step()
            optimizer.zero_grad()
    changed = {name for name, bits in state_bits(ours).items() if bits != before[name]}
    assert trained <= changed
    assert not any(n.endswith(("weight", "absmax", "offset")) for n in changed - trained)
    expected = logits(ours)
    assert_close(expected, logits(twin), 8 * TOLERANCE)
    ours.save_pretrained(tmp_path)
    assert same_bits(logits(PeftModel.from_pretrained(nf4_model(), tmp_path)), expected)
    assert_close(logits(PeftModel.from_pretrained(dense_twin(), tmp_path)), expected)


def test_bitfit_without_peft():
    ours, twin = nf4_model(), dense_twin()
    for model in (ours, twin):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        model(**CALL).loss.backward()
    for (name, parameter), (_, expected) in zip(
        ((n, p) for n, p in ours.named_parameters() if n.endswith("bias")),
        ((n, p) for n, p in twin.named_parameters() if n.endswith("bias")),
        strict=True,
    ):
        # A bias of the keys moves all scores of a query alike: its gradient is zero but for noise.
        assert (parameter.grad - expected.grad).norm() <= 4 * TOLERANCE, name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["IA3", "BOFT", "HIRA", "VERA"])
def test_checkpointing_gives_the_same_gradients(name, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(nf4_model(), name, None)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        trained_step(model, name)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(same_bits(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["ADALORA", "ADAPTION_PROMPT", "BOFT", "IA3", "LOKR", "OFT", "VERA"]
)
def test_a_model_in_16_bits(name, compute_dtype):
    """Adapters have the dtypes and, at the start, the bits that they have on the dense twin."""
    ours, twin = nf4_model(torch.bfloat16), dense_twin(torch.bfloat16)
    for module in ours.modules():
        if isinstance(module, NF4Linear):
            module.compute_dtype = compute_dtype
    ours, twin = adapted(ours, name, None), adapted(twin, name, None)
    for own, other in zip(
        get_peft_model_state_dict(ours).values(),
        get_peft_model_state_dict(twin).values(),
        strict=True,
    ):
        assert same_bits(own, other)
    # Rounding to bf16 comes after a sum in fp32 in both, and seldom falls on the other side.
    assert_close(logits(ours, name), logits(twin, name), 8 * 2.0**-8)
    before = logits(ours, name)
    if name == "ADAPTION_PROMPT":
        return
    ours.merge_adapter()
    twin.merge_adapter()
    layer = "model.layers.0.self_attn.q_proj"
    own, other = (
        model.get_base_model().get_submodule(layer).get_base_layer().weight
        for model in (ours, twin)
    )
    assert same_bits(own, other)
    ours.unmerge_adapter()
    assert same_bits(logits(ours, name), before)


def test_through_transformers():
    ours, twin = nf4_model(), dense_twin()
    for model in (ours, twin):
        torch.manual_seed(0)
        model.add_adapter(peft.LoHaConfig(r=4, target_modules=TARGETS, init_weights=False))
    adapted_logits = logits(ours)
    assert_close(adapted_logits, logits(twin))
    ours.disable_adapters()
    assert same_bits(logits(ours), logits(nf4_model()))
    ours.enable_adapters()
    assert same_bits(logits(ours), adapted_logits)


@pytest.fixture
def process_group(tmp_path):
    """Of one process: what FSDP2 does to parameters it does there too."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["IA3", "HIRA"])  # which reads base weights
def test_under_fsdp2(name):
    model, expected = adapted(nf4_model(), name, None), adapted(nf4_model(), name, None)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        assert same_bits(trained_step(model, name), trained_step(expected, name))
    parameters = dict(model.named_parameters())
    for key, parameter in expected.named_parameters():
        assert same_bits(parameters[key].full_tensor(), parameter), key
        if parameter.grad is not None:
            assert same_bits(parameters[key].grad.full_tensor(), parameter.grad), key


# ---- copies


@pytest.mark.parametrize("name", ["IA3", "HIRA"])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles(name, merged):
    model = adapted(nf4_model(), name, None)
    expected = logits(model)
    if merged:
        model.merge_adapter()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    now = logits(model)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert same_bits(logits(other), now)
        if merged:
            other.unmerge_adapter()
        assert same_bits(logits(other), expected)


def test_moved_while_merged():
    model = adapted(nf4_model(), "IA3", None)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    expected = adapted(nf4_model(), "IA3", None).to(torch.bfloat16)
    assert state_bits(model) == state_bits(expected)
    assert same_bits(logits(model), logits(expected))


# ---- prepare_model_for_kbit_training


@pytest.mark.parametrize("checkpointing", [True, False])
def test_peft_prepares_a_model_as_one_of_bitsandbytes(checkpointing):
    model = nf4_model(torch.bfloat16)
    codes = {n: v for n, v in state_bits(model).items() if "proj.weight" in n}
    with pytest.warns(UserWarning, match=r"qlora_native\.hf\.prepare_model"):
        prepared = peft.prepare_model_for_kbit_training(model, checkpointing)
    assert prepared is model
    assert model.is_gradient_checkpointing == checkpointing
    assert "is_loaded_in_4bit" not in vars(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}
    assert {n: v for n, v in state_bits(model).items() if "proj.weight" in n} == codes
    losses = []
    adapted_model = adapted(prepared, "LOHA", None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        losses.append(trained_step(adapted_model, "LOHA"))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_a_dense_model_is_prepared_by_peft_alone():
    model = dense_twin(torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.prepare_model_for_kbit_training(model)
    assert not any("qlora_native" in str(warning.message) for warning in caught)
    assert not model.is_gradient_checkpointing


def test_it_is_replaced_where_it_was_imported_by_name():
    from peft.utils import prepare_model_for_kbit_training
    from peft.utils.other import prepare_model_for_kbit_training as inner

    assert prepare_model_for_kbit_training is inner is peft.prepare_model_for_kbit_training
    assert hasattr(inner, "__wrapped__")
    assert qlora_native.hf is not None
