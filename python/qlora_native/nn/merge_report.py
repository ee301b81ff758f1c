"""What a merge has cost: MergeReport, and the measurements that it is made of."""

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_ELEMENTS = 2**19  # of a weight that are compared at a time


@dataclass(frozen=True)
class LayerMerge:
    """What the merge of one layer has cost, in Frobenius norms.

    W is the weight that the update ΔW was added to, and `merged` what the layer now stores;
    W + ΔW is computed in fp32.
    """

    name: str
    shape: tuple[int, int]  # [out_features, in_features]
    weight_norm: float  # ‖W‖
    update_norm: float  # ‖ΔW‖
    lost_norm: float  # ‖merged − (W + ΔW)‖: what rounding, or quantising again, has changed
    # ‖(W + ΔW) − (W + ΔW)_trained‖, where W is not the weight that the update was trained beside.
    # For LoRA, whose ΔW is the same beside any W, this is ‖W − W_trained‖.
    base_change_norm: float | None = None

    @property
    def lost_of_update(self) -> float | None:
        """‖merged − (W + ΔW)‖ / ‖ΔW‖; None where there is no update."""
        return self.lost_norm / self.update_norm if self.update_norm else None

    @property
    def lost_of_weight(self) -> float | None:
        """‖merged − (W + ΔW)‖ / ‖W‖; None where W is zero."""
        return self.lost_norm / self.weight_norm if self.weight_norm else None

    @property
    def base_change_of_update(self) -> float | None:
        """base_change_norm / ‖ΔW‖; None where W was trained beside, or there is no update."""
        if self.base_change_norm is None or not self.update_norm:
            return None
        return self.base_change_norm / self.update_norm


@dataclass(frozen=True)
class OutputChange:
    """What the merge has changed on a batch."""

    max_difference: float  # of the logits
    rms_difference: float
    rms_logits: float  # before the merge, to compare with
    perplexity_before: float | None  # exp of the mean loss of a token; None: no labels, no tokens
    perplexity_after: float | None


@dataclass(frozen=True)
class MergeReport:
    """What a merge has cost. `str(report)` is a table; `to_json()` has all figures."""

    into: str  # what the merged weights are: "bfloat16", "NF4", …
    base: str  # what the updates were added to
    layers: tuple[LayerMerge, ...]
    outputs: OutputChange | None = None
    dequantized: tuple[str, ...] = ()  # 4-bit layers without an update that became dense as well
    notes: tuple[str, ...] = ()
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def worst_lost_of_update(self) -> float | None:
        """The largest share of an update that was lost; None where no layer has an update."""
        return self.worst(1)[0].lost_of_update if self.layers else None

    def worst(self, count: int = 5) -> tuple[LayerMerge, ...]:
        """The `count` layers that have lost most of their update, the worst first."""
        return tuple(sorted(self.layers, key=_badness, reverse=True)[:count])

    def to_json(self) -> dict[str, Any]:
        """All of the report but the model, of what JSON has."""
        return {
            "into": self.into,
            "base": self.base,
            "layers": [
                {
                    **asdict(layer),
                    "shape": list(layer.shape),
                    "lost_of_update": layer.lost_of_update,
                    "lost_of_weight": layer.lost_of_weight,
                    "base_change_of_update": layer.base_change_of_update,
                }
                for layer in self.layers
            ],
            "outputs": None if self.outputs is None else asdict(self.outputs),
            "dequantized": list(self.dequantized),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _badness(layer: LayerMerge) -> float:
    lost = layer.lost_of_update
    if lost is None:
        return -1.0
    return math.inf if math.isnan(lost) else lost


def measure_layer(
    name: str, base: Tensor, exact: Tensor, merged: Tensor, trained: Tensor | None = None
) -> LayerMerge:
    """The LayerMerge of `merged`, in its own dtype, where `exact` is W + ΔW and `base` is W.

    All are `[n, k]`, taken a run of rows at a time. `trained` is (W + ΔW)_trained.
    """
    n, k = base.shape
    rows = max(1, _ELEMENTS // k)
    squares = dict.fromkeys(("weight", "update", "lost", "change"), 0.0)
    for start in range(0, n, rows):
        run = slice(start, start + rows)
        w, sum_ = base[run].float(), exact[run].float()
        differences = {"weight": w, "update": sum_ - w, "lost": merged[run].float() - sum_}
        if trained is not None:
            differences["change"] = sum_ - trained[run].float()
        for key, difference in differences.items():
            squares[key] += torch.linalg.vector_norm(difference).item() ** 2
    norms = {key: math.sqrt(value) for key, value in squares.items()}
    change = None if trained is None else norms["change"]
    return LayerMerge(name, (n, k), norms["weight"], norms["update"], norms["lost"], change)


def check_finite(operation: str, place: str, what: str, tensor: Tensor) -> None:
    """Raise ValueError if `what` of the layer at `place` has a NaN or Inf."""
    extremes = torch.aminmax(
        tensor
    )  # of which a NaN is one; torch.isfinite takes five times as long
    if not all(map(math.isfinite, (extremes.min.item(), extremes.max.item()))):
        raise ValueError(f"{operation}: {place}: {what} has a NaN or Inf")


_SHOWN = 10


def _lines(report: MergeReport) -> list[str]:
    count = len(report.layers)
    lines = [
        f"Merged {count} layer{'s' * (count != 1)} into {report.into}, added to {report.base}."
    ]
    if report.dequantized:
        lines.append(f"{len(report.dequantized)} more 4-bit layers without an update became dense.")
    if report.layers:
        lines += _table(report)
    if report.outputs is not None:
        lines += _output_lines(report.outputs)
    return [*lines, *(f"Note: {note}" for note in report.notes)]


def _table(report: MergeReport) -> list[str]:
    has_change = any(layer.base_change_norm is not None for layer in report.layers)
    header = ["layer", "shape", "‖ΔW‖/‖W‖", "lost/‖ΔW‖", "lost/‖W‖"]
    rows = [header + ["base/‖ΔW‖"] * has_change]
    for layer in report.worst(_SHOWN):
        size = layer.update_norm / layer.weight_norm if layer.weight_norm else None
        cells = [layer.name, f"{layer.shape[0]}×{layer.shape[1]}", _figure(size)]
        cells += [_figure(layer.lost_of_update), _figure(layer.lost_of_weight)]
        rows.append(cells + [_figure(layer.base_change_of_update)] * has_change)
    losses = [x.lost_of_update for x in report.layers if x.lost_of_update is not None]
    median = _figure(statistics.median(losses)) if losses else "–"
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]
    shown = len(rows) - 1
    which = f"the worst {shown} of {len(report.layers)}" if shown < len(report.layers) else "all"
    explained = "Lost is ‖merged − (W + ΔW)‖"
    if has_change:
        explained += ", base ‖W − W_trained‖"
    return [
        f"{explained}; {which}, worst first; median of lost/‖ΔW‖: {median}.",
        *table,
    ]


def _output_lines(outputs: OutputChange) -> list[str]:
    line = (
        f"On the batch the logits differ by {outputs.max_difference:.3g} at most, "
        f"{outputs.rms_difference:.3g} rms, of {outputs.rms_logits:.3g} rms"
    )
    if outputs.perplexity_before is None:
        return [line + "."]
    return [
        f"{line}; perplexity {outputs.perplexity_before:.6g} -> {outputs.perplexity_after:.6g}."
    ]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"
