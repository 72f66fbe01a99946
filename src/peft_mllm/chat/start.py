"""Opening what is to be talked with: a model, a run, an adapter on a base; and choosing where to talk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft_mllm.chat.conversation import see
from peft_mllm.chat.terminal import Terminal
from peft_mllm.chat.voice import Voice
from peft_mllm.errors import SpecError
from peft_mllm.rundir import ADAPTER
from peft_mllm.saved import PEFT_CONFIG, Target, find_target, open_target
from peft_mllm.screen import Screen
from peft_mllm.world import World


def chat(
    target: str,
    *,
    adapter: Path | None = None,
    base: str | None = None,
    vision_tower: str | None = None,
    images: Sequence[Path] = (),
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    web: bool = False,
    host: str = "127.0.0.1",
    port: int | None = None,
    as_json: bool = False,
) -> int:
    """Talk with a model until the user ends it.

    Args:
        target: a model, a run directory, or a PEFT directory.
        adapter: a PEFT directory, or a run, to put on the model.
        base: the base of a PEFT directory.
        vision_tower: of a model that comes without its own.
        images: shown with the first question.
        system: what the model is told first; its own sentence if left out.
        max_new_tokens: an answer is cut here.
        temperature: 0 says what is likeliest.
        web: as a page in the browser, not in the terminal.
        host: with `web`: the address to listen at.
        port: with `web`; a free one if left out.
        as_json: one JSON object for each answer.

    Returns:
        the exit code.

    Raises:
        UserError: the message says what is wrong, where, and how to mend it.
    """
    if web:
        from peft_mllm.chat.web import require_gradio

        require_gradio()  # before the minutes that a model takes
    seen = [see(image) for image in images]
    found = _find(target, adapter, base, vision_tower)
    Screen(quiet=as_json).note(f"Loading {target}")
    voice = Voice(open_target(found, World()), max_new_tokens=max_new_tokens, temperature=temperature)
    if web:
        from peft_mllm.chat.web import serve

        return serve(voice, title=target, system=system, images=seen, host=host, port=port)
    return Terminal(voice, system=system, images=seen, as_json=as_json).run()


def _find(target: str, adapter: Path | None, base: str | None, vision_tower: str | None) -> Target:
    """What to open, with an adapter given beside the model or inside the target."""
    if adapter is None:
        return find_target(target, base, vision_tower)
    if base is not None:
        raise SpecError(f"{target} is the base of --adapter; leave --base out.")
    if any((Path(target) / name).is_file() for name in ("spec.json", PEFT_CONFIG)):
        raise SpecError(f"{target} brings its own adapter; leave --adapter out, or name the base instead.")
    directory = adapter / ADAPTER if (adapter / "spec.json").is_file() else adapter
    if not (directory / PEFT_CONFIG).is_file():
        raise SpecError(f"{adapter} is no PEFT directory: it has no {PEFT_CONFIG}.")
    return find_target(str(directory), target, vision_tower)
