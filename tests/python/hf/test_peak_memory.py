"""from_pretrained holds the 4-bit model and one dense tensor, measured in a process of its own.

What is measured is memory of the process's own (resident, less pages of mapped files: the kernel
drops those when it needs to), sampled by a thread while the model loads. Large blocks of memory are
mappings of their own there, so that freed memory is returned and not counted.
"""

import json
import math

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from support import run_python

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 512}
LLAMA = LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=4, **SIZES)
MIXTRAL = MixtralConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=2, **SIZES)
MIB = 2**20
SLACK = 3 * MIB  # objects of Python's, and the header of the file

MEASURE = """
import gc, json, mmap, threading, time, torch
from transformers import AutoModelForCausalLM
from qlora_native.hf import NF4Config

torch.set_num_threads(1)

def held():
    with open("/proc/self/statm") as file:
        _, resident, of_files, *_ = map(int, file.read().split())
    return (resident - of_files) * mmap.PAGESIZE

def load(path, config):
    options = {{}} if config is None else {{"quantization_config": config}}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options)

load({warm_up!r}, NF4Config())  # imports, threads
gc.collect()
start = peak = held()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, held())
        time.sleep(1e-4)

watcher = threading.Thread(target=watch)
watcher.start()
model = load({path!r}, {config})
done = True
watcher.join()
print(json.dumps({{"peak": peak - start, "model": model.get_memory_footprint()}}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoints in fp32, in several files, and a small one."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, model_class, config in (
        ("llama", LlamaForCausalLM, LLAMA),
        ("mixtral", MixtralForCausalLM, MIXTRAL),
    ):
        model_class(config).save_pretrained(root / name, max_shard_size="40MB")
        assert len(list((root / name).glob("*.safetensors"))) > 1
    small = {**SIZES, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    MixtralForCausalLM(MixtralConfig(**small)).save_pretrained(root / "small")
    return root


def measure(folders, name: str, config: str) -> dict[str, int]:
    paths = {"path": str(folders / name), "warm_up": str(folders / "small")}
    code = MEASURE.format(**paths, config=config)
    done = run_python(code, MALLOC_MMAP_THRESHOLD_=str(128 * 1024))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def largest_tensor(folder, dtype: torch.dtype) -> int:
    """In bytes, in the dtype that it is loaded in."""
    shapes = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            shapes += [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
    return max(math.prod(shape) for shape in shapes) * dtype.itemsize


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_peak_is_the_4_bit_model_and_one_tensor(name, folders):
    """Of a checkpoint in fp32 that is loaded in bf16, so that each dense tensor is a copy."""
    largest = largest_tensor(folders / name, torch.bfloat16)
    # An expert's gate and up are joined before they are quantised: they and what they become.
    tensors = 4 if name == "mixtral" else 1
    result = measure(folders, name, "NF4Config()")
    assert result["peak"] <= result["model"] + tensors * largest + SLACK, result


def test_a_dense_model_would_be_seen(folders):
    """That this measures what it says: cast to bf16, all weights are the process's own."""
    result = measure(folders, "llama", "None")
    assert result["peak"] > 0.9 * result["model"] > 40 * MIB, result
