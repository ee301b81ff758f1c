"""`model(..., adapter_names=[...])`: an error in such a call leaves nothing behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import model as lora_model
from peft.tuners.lora.model import LoraModel

from qlora_native.hf.peft.patching import Function, checked, wrap


def install() -> None:
    """Wrap the context in which PEFT's hooks pass `adapter_names` on to the layers."""
    checked(lora_model, "_adapter_names_pre_forward_hook", ("kwargs", "adapter_names"))
    wrap(LoraModel, "_enable_peft_forward_hooks", (), _removes_hooks)


def _removes_hooks(original: Function) -> Function:
    """PEFT removes its hooks after a call that succeeds only: they would name adapters for ever."""

    @contextmanager
    def _enable_peft_forward_hooks(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        try:
            with original(self, *args, **kwargs):
                yield
        except BaseException:
            for module in self.modules():
                for key, hook in list(module._forward_pre_hooks.items()):
                    function = getattr(hook, "func", None)
                    if function is lora_model._adapter_names_pre_forward_hook:
                        del module._forward_pre_hooks[key]
                        module._forward_pre_hooks_with_kwargs.pop(key, None)
            raise

    return _enable_peft_forward_hooks
