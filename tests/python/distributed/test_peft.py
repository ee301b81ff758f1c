"""PEFT's adapters on a 4-bit model of transformers, on two ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_models import assert_same_parameters, optimizer_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from support import same_bits

pytest.importorskip("peft")
pytest.importorskip("transformers")

ADAPTER_ONLY = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    """A folder with a tiny Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def load_model(folder: str, **options) -> nn.Module:
    from transformers import AutoModelForCausalLM

    from qlora_native.hf import NF4Config

    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(), **options)


def make_peft_model(folder: str, is_prepared: bool = False, **settings) -> nn.Module:
    """A 4-bit Llama with an adapter that does something, the same one each time."""
    from peft import LoraConfig, get_peft_model

    from qlora_native.hf import prepare_model

    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    model = load_model(folder)
    if is_prepared:
        model = prepare_model(load_model(folder, dtype=torch.bfloat16))
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).train()


def shard(model: nn.Module, **options) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    options.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def tokens(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(1, 96, (2, 9), generator=generator)


def train(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    optimizer = optimizer_of(model)
    logits = []
    for ids in batches:
        output = model(input_ids=ids, labels=ids)
        logits.append(output.logits.detach())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits


def train_on_all_batches(model: nn.Module, batches: list[list[Tensor]]) -> None:
    optimizer = optimizer_of(model)
    for of_ranks in batches:
        for ids in of_ranks:
            (model(input_ids=ids, labels=ids).loss / len(of_ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()


def checkpointed(model: nn.Module, kind: str | None) -> nn.Module:
    if kind is not None:
        options = {"use_reentrant": kind == "reentrant"}
        model.get_base_model().gradient_checkpointing_enable(options)
        model.enable_input_require_grads()
    return model


def train_both_ways(folder: str, out: str, is_sharded: bool, settings: dict, kind: str | None):
    single = make_peft_model(folder, **settings)
    model = checkpointed(make_peft_model(folder, **settings), kind)
    called = shard(model) if is_sharded else DistributedDataParallel(model)
    same = [tokens(step, 0) for step in range(2)]
    logits, expected = train(called, same), train(single, same)
    assert all(map(same_bits, logits, expected))
    assert_same_parameters(model, single)

    batches = [[tokens(step, rank) for rank in (0, 1)] for step in range(2, 4)]
    train(called, [of_ranks[dist.get_rank()] for of_ranks in batches])
    train_on_all_batches(single, batches)
    assert_same_parameters(model, single)

    state = get_model_state_dict(model, options=ADAPTER_ONLY) if is_sharded else None
    if dist.get_rank() == 0:
        for one, name in ((model, "saved"), (single, "expected")):
            one.save_pretrained(Path(out) / name, state_dict=state if one is model else None)
        assert_same_adapter(Path(out) / "saved", Path(out) / "expected")
        check_that_it_loads(folder, Path(out) / "saved", single)


def assert_same_adapter(actual: Path, expected: Path) -> None:
    from safetensors.torch import load_file

    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (actual, expected))
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)


def check_that_it_loads(folder: str, adapter: Path, expected: nn.Module) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(folder), adapter)
    with torch.no_grad():
        ids = tokens(9, 0)
        assert same_bits(model(input_ids=ids).logits, expected.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({}, None), ({"use_dora": True}, None), ({}, "reentrant"), ({}, "not-reentrant")],
    ids=["lora", "dora", "reentrant", "not-reentrant"],
)
@pytest.mark.parametrize("is_sharded", [False, True], ids=["ddp", "fsdp2"])
def test_ranks_train_and_save_as_one_process(
    request, ranks, llama, tmp_path, is_sharded, settings, kind
):
    if is_sharded:
        request.getfixturevalue("sharding_ranks")
    ranks.run(train_both_ways, llama, str(tmp_path), is_sharded, settings, kind)


def train_prepared(folder: str, is_sharded: bool) -> None:
    single, model = (make_peft_model(folder, is_prepared=True) for _ in range(2))
    called = shard(model) if is_sharded else DistributedDataParallel(model)
    same = [tokens(step, 0) for step in range(2)]
    logits, expected = train(called, same), train(single, same)
    assert all(map(same_bits, logits, expected))
    assert_same_parameters(model, single)


@pytest.mark.parametrize("is_sharded", [False, True], ids=["ddp", "fsdp2"])
def test_a_prepared_model_trains_as_in_one_process(request, ranks, llama, is_sharded):
    if is_sharded:
        request.getfixturevalue("sharding_ranks")
    ranks.run(train_prepared, llama, is_sharded)


def load_in_parts(folder: str, sizes: dict[str, int]) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from qlora_native.hf import NF4Config

    (name,) = sizes
    with pytest.raises(
        NotImplementedError, match=rf"distributed_config has .*{name}=2.*fully_shard"
    ):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=NF4Config(), distributed_config=DistributedConfig(**sizes)
        )


@pytest.mark.parametrize("name", ["fsdp_size", "tp_size"])
def test_a_model_is_not_cut_up_while_it_is_loaded(ranks, llama, name):
    pytest.importorskip("transformers.distributed")
    ranks.run(load_in_parts, llama, {name: 2})


def add_adapters_too_late(folder: str) -> None:
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard

    model = load_model(folder)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    with pytest.raises(ValueError, match=r"add_adapter: .* DTensor .*before fully_shard"):
        get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def test_adapters_of_peft_come_before_the_shards(sharding_ranks, llama):
    sharding_ranks.run(add_adapters_too_late, llama)
