"""What `set_lora` does not reach in a model with NF4 layers: it agrees, or `set_lora` raises.

PEFT's own layers (LoRA on a layer that was left dense, a convolution or an embedding, other
tuners' layers) and its copies of whole modules (`modules_to_save`, `trainable_token_indices`) do
what `set_adapter` has said, for all rows.
"""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from qlora_native.hf.peft.patching import checked
from qlora_native.nn.routing import BASE, Names, RoutedLayer, set_lora_checks

_BY_PEFT = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def install() -> None:
    """Let `set_lora` ask `check_agreement` first; again, nothing happens."""
    for owner in _BY_PEFT:
        checked(owner, "_get_available_adapters", ())
    if check_agreement not in set_lora_checks:
        set_lora_checks.append(check_agreement)


def check_agreement(model: nn.Module, names: Names) -> None:
    """Raise ValueError if a layer that is PEFT's alone would do other than `names` say.

    It agrees where, for every row, those of its adapters that are named are its active ones.
    Whether PEFT has disabled its adapters does not matter: it then has so for all layers.
    """
    rows = {names} if names is None or isinstance(names, str) else set(names)
    kinds = {
        kind
        for kind in {type(module) for module in model.modules()}
        if issubclass(kind, _BY_PEFT) and not issubclass(kind, RoutedLayer)
    }
    if not kinds:
        return
    for path, module in model.named_modules():
        if type(module) not in kinds:
            continue
        layer: Any = module
        existing = layer._get_available_adapters()
        acting = existing.intersection(layer.active_adapters)
        for name in rows:
            wanted = existing.intersection({name} - {None, BASE})
            if wanted != acting:
                raise ValueError(
                    f"set_lora: {path} is a {type(module).__name__} of PEFT, which set_lora does "
                    f"not reach: it would go on with {sorted(acting) or 'no adapter'} where "
                    f"{names!r} wants {sorted(wanted) or 'none'}. Use set_adapter or, at "
                    "inference, adapter_names; or let adapters that are to share a batch target "
                    "NF4 layers alone"
                )
