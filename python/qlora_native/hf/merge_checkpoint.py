"""An adapter into the original checkpoint, tensor by tensor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_native import nf4_quantize
from qlora_native.hf.checkpoint_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    CheckpointFolder,
    copy_others,
    new_folder,
    write_json,
)
from qlora_native.hf.config import NF4Config
from qlora_native.hf.merge_targets import FLOATS, Target, find_targets
from qlora_native.hf.safetensors_files import (
    SafetensorsReader,
    SafetensorsWriter,
    TensorSpec,
    spec_of,
)
from qlora_native.hf.stored_adapter import Source, read_adapters
from qlora_native.nn import LoRAAdapter
from qlora_native.nn.dense import check_dtype
from qlora_native.nn.merge_report import LayerMerge, MergeReport, check_finite, measure_layer
from qlora_native.nn.model import Progress

_DEFAULT_BASE = NF4Config()


def merge_into_checkpoint(
    adapter: Source | Sequence[Source],
    original: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    trained_beside: NF4Config | None = _DEFAULT_BASE,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the dense checkpoint in `original`, with the updates of `adapter` added, to `output`.

    Each weight W becomes W + scaling · B · A, with DoRA scaled row by row by
    magnitude / ‖W + scaling · B · A‖ (what PEFT computes with the adapter on this checkpoint),
    added up in fp32 and rounded once. The changes that several adapters make are added up.

    An adapter that was trained beside 4-bit weights was trained beside others than these: the
    merged model has W where the trained one had the dequantised NF4 weight. The report measures
    that too, by quantising each W again. `merge_lora` on the 4-bit model keeps what was trained.

    Weights pass through memory one tensor at a time, however large the files are.

    Args:
        adapter: a folder in PEFT's format (`save_lora`, PEFT's `save_pretrained`), a model that has
            an adapter, or several of them.
        original: a folder with config.json and safetensors files, not quantised.
        output: a new or empty folder; it appears when all is done, and not before. It gets the same
            files of weights, the index, config.json, and everything else in `original` that is no
            weights: tokenizer, generation settings, code.
        dtype: of all float weights of the output; None: each keeps its own.
        trained_beside: how the base was quantised that the adapter was trained beside, for the
            report; None: it was not quantised.
        progress: called with (tensors done, tensors in all, name of the tensor) after each.

    Returns:
        What it cost, layer by layer; print it.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: `output` has something in it.
        ValueError: a file is damaged; `original` is quantised; an adapter is of a kind that cannot
            be merged, does not fit (all that differs is listed, with the shapes), or has a NaN or
            Inf; a merged weight is out of the range of its dtype. Nothing is left at `output`.
    """
    check_dtype("merge_into_checkpoint", dtype)
    original, output = Path(original), Path(output)
    if not original.is_dir():
        raise FileNotFoundError(f"merge_into_checkpoint: there is no folder {original}")
    adapters = read_adapters(adapter)
    with CheckpointFolder(original) as folder:
        _check_dense(folder)
        targets = find_targets(folder, adapters)
        merge = _Merge(folder, targets, dtype, trained_beside, progress)
        with new_folder(output) as filling:
            merge.write(filling)
            copy_others(original, filling)
    return merge.report()


class _Merge:
    """One merge on its way."""

    def __init__(
        self,
        folder: CheckpointFolder,
        targets: Mapping[str, Target],
        dtype: torch.dtype | None,
        trained_beside: NF4Config | None,
        progress: Progress | None,
    ) -> None:
        self._folder = folder
        self._targets = targets  # by the name of the tensor
        self._dtype = dtype
        self._trained_beside = trained_beside
        self._progress = progress
        self._measured: dict[str, LayerMerge] = {}

    def write(self, filling: Path) -> None:
        """Fill a folder with weights, index and config.json."""
        total_size, done = 0, 0
        for file, reader in self._folder.files.items():
            specs = {name: self._new_spec(stored.spec) for name, stored in reader.tensors.items()}
            with SafetensorsWriter(filling / file, specs, reader.metadata) as writer:
                for name in reader.tensors:
                    self._write_tensor(name, reader, writer, specs[name])
                    done += 1
                    if self._progress is not None:
                        self._progress(done, len(self._folder.file_of), name)
            total_size += sum(spec.nbytes for spec in specs.values())
        if self._folder.index is not None:
            metadata = {**self._folder.index.get("metadata", {}), "total_size": total_size}
            write_json(filling / INDEX_FILE, {**self._folder.index, "metadata": metadata})
        config = self._folder.config
        if self._dtype is not None:
            config = _with_dtype(config, str(self._dtype).removeprefix("torch."))
        write_json(filling / CONFIG_FILE, config)

    def report(self) -> MergeReport:
        """Of what was written."""
        layers = tuple(self._measured[name] for name in self._targets)
        notes = []
        changes = [x.base_change_of_update for x in layers if x.base_change_of_update is not None]
        if changes and self._trained_beside is not None:
            scales = "nested" if self._trained_beside.double_quant else "plain"
            notes.append(
                "the updates were trained beside NF4 weights (block "
                f"{self._trained_beside.block_size}, {scales} scales), from which the original "
                f"ones differ by up to {max(changes):.2g} times the norm of an update: the merged "
                "model is near the trained one, but not it; merge_lora on the 4-bit model gives it"
            )
        dtypes = {self._new_spec(target.spec).dtype for target in self._targets.values()}
        return MergeReport(
            into=", ".join(sorted(str(FLOATS[name]).removeprefix("torch.") for name in dtypes)),
            base=f"the checkpoint {self._folder.path}",
            layers=layers,
            notes=tuple(notes),
        )

    def _new_spec(self, spec: TensorSpec) -> TensorSpec:
        if self._dtype is None or spec.dtype not in FLOATS:
            return spec
        return spec_of(torch.empty(spec.shape, dtype=self._dtype, device="meta"))

    def _write_tensor(
        self, name: str, reader: SafetensorsReader, writer: SafetensorsWriter, spec: TensorSpec
    ) -> None:
        target = self._targets.get(name)
        if target is not None:
            writer.write(name, self._merged(target, load_tensor(reader, name), spec))
        elif spec == reader.tensors[name].spec:
            writer.copy(name, reader)
        else:
            tensor = load_tensor(reader, name).to(FLOATS[spec.dtype])
            writer.write(name, tensor)

    @torch.no_grad()
    def _merged(self, target: Target, stored: Tensor, spec: TensorSpec) -> Tensor:
        weight = stored.T if target.is_transposed else stored  # [n, k]
        exact = _sum_of(weight, target.adapters)
        merged = exact.to(FLOATS[spec.dtype])
        dtype = str(merged.dtype).removeprefix("torch.")
        check_finite("merge_into_checkpoint", target.layer, f"the merged weight in {dtype}", merged)
        trained = None
        if self._trained_beside is not None:
            settings = self._trained_beside.block_size, self._trained_beside.double_quant
            quantised = nf4_quantize(weight.contiguous(), *settings)
            trained = _sum_of(quantised.dequantize(), target.adapters)
        self._measured[target.tensor] = measure_layer(target.layer, weight, exact, merged, trained)
        return merged.T.contiguous() if target.is_transposed else merged


def _sum_of(weight: Tensor, adapters: Sequence[LoRAAdapter]) -> Tensor:
    """W and what each adapter changes of it alone, added up, in fp32."""
    w = weight.float()
    if len(adapters) == 1:
        return adapters[0].merged_with(w)
    total = w.clone()
    for adapter in adapters:
        total += adapter.merged_with(w) - w
    return total


def load_tensor(reader: SafetensorsReader, name: str) -> Tensor:
    """A float tensor in memory of its own: a mapped one would keep the file's pages as well."""
    spec = reader.tensors[name].spec
    buffer = torch.empty(spec.nbytes, dtype=torch.uint8)
    view, begin = memoryview(buffer.numpy()), 0
    for chunk in reader.read_bytes(name):
        view[begin : begin + len(chunk)] = chunk
        begin += len(chunk)
    return buffer.view(FLOATS[spec.dtype]).view(spec.shape)


# ---- around the weights


def _check_dense(folder: CheckpointFolder) -> None:
    for config in (folder.config, *folder.config.values()):
        if isinstance(config, Mapping) and config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method")
            raise ValueError(
                f"merge_into_checkpoint: {folder.path} is quantised (quant_method={method!r}), "
                "want the original, dense checkpoint; load a quantised one and use merge_lora"
            )


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The same config and sub-configs, with that dtype where one is named, and at the top."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            value = dtype
        elif isinstance(value, dict):
            has_dtype = "dtype" in value or "torch_dtype" in value
            value = _with_dtype(value, dtype) if has_dtype else value
        changed[key] = value
    if "torch_dtype" not in changed:
        changed["dtype"] = dtype
    return changed
