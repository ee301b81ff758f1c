"""[out_features, in_features] of a layer whose codes are all that is known of it."""

from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn

from qlora_native.hf.checkpoint_folder import CONFIG_FILE, CheckpointFolder
from qlora_native.nn import NF4Linear


class LinearShapes:
    """Shapes of the layers of a folder.

    Codes are stored a row a row, `[out_features, in_features / 2]`, and so tell the shape, unless
    in_features is odd (or 2): then they are one column, and the model is built, without its
    weights, to ask it.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder

    def of_layer(self, name: str, codes: tuple[int, ...]) -> tuple[int, int]:
        """The shape of the layer of that name.

        Raises:
            ValueError: the codes have not the shape of codes, or the model has no such layer.
        """
        if len(codes) != 2:
            raise ValueError(f"{name}.weight: is {list(codes)}, want codes of two dimensions")
        if codes[1] > 1:
            return codes[0], 2 * codes[1]
        module = self._modules.get(name)
        if isinstance(module, nn.Linear | NF4Linear):
            return module.out_features, module.in_features
        raise ValueError(
            f"{name}: in_features is odd, so that its codes do not tell it, and the model of "
            f"{self._folder.path / CONFIG_FILE} has no linear layer of that name that would"
        )

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        path = self._folder.path
        try:
            config: Any = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            architecture = getattr(transformers, (config.architectures or [""])[0])
            if not issubclass(architecture, transformers.PreTrainedModel):
                raise TypeError(f"{architecture.__name__} is no model")
            with torch.device("meta"):
                model: nn.Module = architecture(config)
        except (AttributeError, OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: in_features of a layer is odd, so that its codes do not tell it, and the "
                f"model cannot be built from {CONFIG_FILE}: {error}"
            ) from error
        return dict(model.named_modules())
