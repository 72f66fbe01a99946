"""Adapters on one loaded base, one after the other: each is put on, asked, and taken off again to the last bit.

peft's own unloading leaves what was opened as a whole (a tuned connector) in its tuned form, knows nothing to do with
learned prompts, and cannot undo what an adapter did to the base's own weights (PiSSA's start, trained biases). So the
base is compared with what it was after each adapter, and loaded again where it is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from transformers import PreTrainedModel

from peft_mllm.attention import close_port, disconnect_prefix
from peft_mllm.identity import state_of
from peft_mllm.lean import remove
from peft_mllm.models.base import Family
from peft_mllm.provenance import weights_fingerprint
from peft_mllm.tuned import Tuned, load_adapter, untouched


class Mount:
    """A base that adapters are put on.

    Args:
        load: gives the base, on its device.
        note: told where the base had to be loaded again.
    """

    def __init__(self, load: Callable[[], Family], *, note: Callable[[str], None] = lambda text: None):
        self._load, self._note = load, note
        self.family = load()
        self.fingerprint = weights_fingerprint(self.family.model)
        self._state = ""

    @contextmanager
    def wearing(self, adapter: Path | None, *, bf16: bool, last: bool = False) -> Iterator[Tuned]:
        """The base with an adapter, until the context ends.

        Args:
            adapter: a PEFT directory; None is the base as it is.
            bf16: compute in bfloat16 by autocast.
            last: nothing comes after it, so it need not be taken off.

        Raises:
            ModelError: the adapter does not fit the base.
        """
        if adapter is None:
            yield untouched(self.family, bf16=bf16)
            return
        if not last and not self._state:
            self._state = self._present_state()
        tuned = load_adapter(self.family, adapter, bf16=bf16)
        yield tuned
        if last:
            return
        take_off(tuned)
        if self._present_state() != self._state:
            self._note(f"{adapter} changed the base's own weights: the base is loaded again.")
            del tuned
            self.family.model = None  # two bases may not fit
            self.family = self._load()

    def _present_state(self) -> str:
        model = self.family.model
        return state_of(model, model.get_submodule(self.family.anatomy.llm))


def take_off(tuned: Tuned) -> PreTrainedModel:
    """Take an adapter off its base, and give the base.

    What the adapter did to the base's own weights, if anything, stays.
    """
    model, base = tuned.model, tuned.base
    if not isinstance(model, PeftModel):
        return base
    remove(base, tuned.family.anatomy)
    disconnect_prefix(tuned.decoder)
    close_port(base, tuned.family.anatomy)
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.original_module)
    if not model.active_peft_config.is_prompt_learning:
        model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base
