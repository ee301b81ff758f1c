"""The scripts of docs/distributed.md, started as the page says, on two processes without a GPU."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PAGE = Path(__file__).resolve().parents[3] / "docs" / "distributed.md"
BLOCK = re.compile(r"^```(py|yaml|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECONDS = 240  # of a busy machine; some fifteen alone
PROGRAMS = {
    "torchrun": ["torch.distributed.run"],
    "accelerate": ["accelerate.commands.accelerate_cli"],
}

pytestmark = pytest.mark.slow

# accelerate shards on GPUs alone. This makes it take the two CPU processes for such.
ON_CPU = """
import runpy, sys
from accelerate import state
from accelerate.utils import DistributedType

initialise = state.PartialState.__init__

def on_cpu(self, cpu=False, **options):
    initialise(self, cpu=True, **options)
    self.distributed_type = DistributedType.MULTI_GPU

state.PartialState.__init__ = on_cpu
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall(PAGE.read_text())


def commands() -> list[str]:
    return [line for kind, text in blocks() if kind == "bash" for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where all runs take place: the page's files, and a tiny Llama."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("scripts")
    for kind, text in blocks():
        if kind != "bash":
            (folder / text.splitlines()[0].removeprefix("# ")).write_text(text)
    (folder / "on_cpu.py").write_text(ON_CPU)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "path" / "to" / "model")
    return folder


def run(command: str, folder: Path, *, on_cpu: bool = False) -> str:
    program, *arguments = shlex.split(command)
    if on_cpu:
        arguments.insert(arguments.index("train_accelerate.py"), "on_cpu.py")
    result = subprocess.run(
        [sys.executable, "-m", *PROGRAMS[program], *arguments],
        cwd=folder,
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def command_with(*words: str) -> str:
    (command,) = [line for line in commands() if all(word in line for word in words)]
    return command


def skip_unless_bytes_shard(request) -> None:
    request.getfixturevalue("sharding_ranks")


def assert_trained(adapter: Path) -> dict[str, torch.Tensor]:
    """An adapter of both factors for every linear layer, B no longer zero."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    for name, tensor in tensors.items():
        assert tensor.isfinite().all()
        assert tensor.count_nonzero() > 0, name
    return tensors


def test_every_command_of_the_page_is_run_here():
    assert [shlex.split(line)[0] for line in commands()] == ["torchrun"] * 3 + ["accelerate"] * 2


def test_ddp(folder):
    run(command_with("train_ddp.py"), folder)
    assert_trained(folder / "adapter-ddp")


def test_fsdp2(folder, request):
    skip_unless_bytes_shard(request)
    run(command_with("train_fsdp2.py"), folder)
    assert_trained(folder / "adapter-fsdp2")


def test_shards_on_meta(folder, request):
    skip_unless_bytes_shard(request)
    run(command_with("shard_on_meta.py"), folder)
    tensors = load_file(folder / "adapter-native" / "adapter_model.safetensors")
    assert len(tensors) == 4 * 2 * 2


def test_accelerate(folder, request):
    """DDP and FSDP2 clip by norms that they add up in another order, and else do the same."""
    skip_unless_bytes_shard(request)
    for output in (
        run(command_with("accelerate", "ddp.yaml"), folder),
        run(command_with("accelerate", "fsdp2.yaml"), folder, on_cpu=True),
    ):
        expected, resumed = re.search(r"loss (\S+), resumed (\S+)", output).groups()
        assert resumed == expected
    assert {path.name for path in (folder / "out-ddp" / "checkpoint").iterdir()} >= {
        "model.safetensors",
        "optimizer.bin",
    }
    assert any(
        "pytorch_model_fsdp" in path.name for path in (folder / "out-fsdp2/checkpoint").iterdir()
    )
    ddp, fsdp2 = (assert_trained(folder / out / "adapter") for out in ("out-ddp", "out-fsdp2"))
    assert ddp.keys() == fsdp2.keys()
    for name, tensor in ddp.items():
        torch.testing.assert_close(fsdp2[name], tensor, rtol=1e-4, atol=1e-6)
