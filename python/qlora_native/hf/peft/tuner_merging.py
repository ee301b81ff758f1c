"""Merging PEFT's tuners into an NF4 base: a dense layer takes the sum, the 4-bit one comes back."""

from functools import cache
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from qlora_native.hf.peft.nf4_as_linear import NF4AsLinear


class MergesIntoDense:
    """What a tuner layer on an NF4 layer does otherwise than on a dense one: merge and unmerge.

    Merging puts an nn.Linear with the dequantised weight in the place of the NF4 layer, and PEFT's
    own formula changes that. Unmerging brings the NF4 layer back, bit for bit.
    """

    merged_adapters: list[str]
    _is_merging = False

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's merge, into a dense layer; where the first one raises, nothing has changed."""
        owner = _owner_of_base(self)
        base = owner.base_layer
        is_first = isinstance(base, NF4AsLinear)
        if is_first:
            owner.base_layer = base.to_dense(base.dense_dtype)
            # In a tuple, so that they are no children: the parameters are the dense layer's.
            owner.__dict__["_nf4_base"] = (base, [])
        self._is_merging = True
        try:
            super().merge(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            if is_first:
                self.merged_adapters = []
            raise
        finally:
            self._is_merging = False
            self._keep_or_restore_base()

    def unmerge(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's unmerge, and then the NF4 layer as it was."""
        super().unmerge(*args, **kwargs)  # type: ignore[misc]
        self._keep_or_restore_base()

    def _keep_or_restore_base(self) -> None:
        """Bring back the NF4 layer if no layer is merged into the dense one any more."""
        owner = _owner_of_base(self)
        if "_nf4_base" not in owner.__dict__:
            return
        base, merged = owner.__dict__["_nf4_base"]
        if self.merged_adapters and self not in merged:
            merged.append(self)
        elif not self.merged_adapters and self in merged:
            merged.remove(self)
        if merged:
            return
        dense = owner.base_layer.weight  # which went where the model went meanwhile
        base.to(dense.device)
        if dense.dtype != base.dense_dtype:
            base.to(dense.dtype)
        if self._is_merging:  # GLoRA unmerges first when it merges a second adapter
            owner.base_layer = base.to_dense(base.dense_dtype)
        else:
            owner.base_layer = base
            del owner.__dict__["_nf4_base"]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by PEFT's class: this one is made at run time."""
        return _empty_layer, (type(self).__mro__[2],), self.__dict__


@cache
def on_nf4(layer_class: Any) -> Any:
    """`layer_class` with `MergesIntoDense`."""
    return type(f"NF4{layer_class.__name__}", (MergesIntoDense, layer_class), {})


def _empty_layer(layer_class: Any) -> Any:
    made = on_nf4(layer_class)
    return made.__new__(made)


def _owner_of_base(layer: Any) -> Any:
    """The innermost tuner layer: one may lie on another."""
    while isinstance(layer.base_layer, BaseTunerLayer):
        layer = layer.base_layer
    return layer
