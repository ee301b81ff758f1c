"""What the demo measured, step by step: the terminal, metrics.json and the report all read this.

Losses are nats a byte, on text that no training saw.
"""

import dataclasses
import platform
from dataclasses import dataclass
from typing import Any

import torch

import qlora_native
from qlora_native.cli.measurements import LayerMeasurement, bits_per_weight
from qlora_native.cli.tasks import Function
from qlora_native.cli.training import TrainingRun


@dataclass(frozen=True)
class Pretraining:
    """Step 1: the base model."""

    run: TrainingRun
    parameters: int
    text_bytes: int
    from_cache: bool


@dataclass(frozen=True)
class Quantization:
    """Step 2: the base in 4 bits; losses on English."""

    layers: list[LayerMeasurement]
    dense_model_bytes: int
    quantized_model_bytes: int
    dense_loss: float
    quantized_loss: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits on the linear layers, scales included."""
        return bits_per_weight(self.layers)

    @property
    def loss_change(self) -> float:
        """Relative: 0.01 is 1 % worse."""
        return self.quantized_loss / self.dense_loss - 1.0


@dataclass(frozen=True)
class Finetuning:
    """Step 3: LoRA; the run's held-out loss is the task's."""

    run: TrainingRun
    train_functions: int
    held_out_functions: int
    trainable_parameters: int
    total_parameters: int  # with LoRA; an NF4 weight counts as one

    @property
    def loss_before(self) -> float:
        """Of the 4-bit base."""
        return self.run.held_out[0][1]

    @property
    def loss_after(self) -> float:
        """Of the 4-bit base with LoRA."""
        return self.run.held_out[-1][1]

    @property
    def trainable_share(self) -> float:
        """Of all parameters."""
        return self.trainable_parameters / self.total_parameters


@dataclass(frozen=True)
class Sample:
    """A held-out function, and what the model wrote for it before and after step 3."""

    function: Function
    before: str
    after: str


@dataclass(frozen=True)
class Delivery:
    """Step 4: the adapter on disk, loaded into a fresh copy of the base, and merged."""

    samples: list[Sample]
    adapter_bytes: int  # both files
    largest_logit: float  # what the differences compare with
    reload_difference: float  # largest of any logit; 0 is equal
    merge_difference: float  # largest of any logit
    merged_loss: float  # on the task


@dataclass(frozen=True)
class DemoResults:
    """All of it."""

    pretraining: Pretraining
    quantization: Quantization
    finetuning: Finetuning
    delivery: Delivery
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What was measured, what follows from it, and what it was measured with."""
        return {
            **dataclasses.asdict(self),
            "bits_per_weight": self.quantization.bits_per_weight,
            "quantized_loss_change": self.quantization.loss_change,
            "trainable_share": self.finetuning.trainable_share,
            "task_loss_before": self.finetuning.loss_before,
            "task_loss_after": self.finetuning.loss_after,
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "qlora_native": qlora_native.__version__,
        "CPU instruction set": qlora_native.build_info()["cpu_set"],
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
