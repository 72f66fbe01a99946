"""The chat as a page: what is on it, and what happens when somebody asks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from queue import Queue
from typing import Any

import gradio as gr

from peft_mllm.chat.conversation import Conversation, Exchange, SeenImage, see
from peft_mllm.chat.voice import Answer, Voice
from peft_mllm.errors import UserError
from peft_mllm.record import Record

ON, OFF, BOTH = "adapter on", "adapter off", "side by side"
SPEAKERS = {ON: (True,), OFF: (False,), BOTH: (True, False)}
"""Who answers: with the adapter or without."""
STYLE = """
#answers .chatbot, #beside .chatbot { white-space: pre-wrap; }
#answers [aria-label=Clear], #beside [aria-label=Clear], .message-buttons { display: none !important; }
#note p { min-height: 1.5em; margin: 0; }
"""
"""Text as it was said; and without Gradio's own buttons, which share pictures with others, or clear only the view."""
PREVIEW = (640, 640)
"""Images are shown within this many pixels; the model sees all of them."""

Message = dict[str, Any]
Shown = tuple[Any, ...]
"""Values for the page's components, in the order of `Page.outputs`."""


@dataclass(frozen=True)
class Talk:
    """What one visitor has said and heard.

    Attributes:
        conversation: what the model is asked with.
        off: of each exchange, whether its answer was given without the adapter.
        beside: of each exchange, the base's answer to the same question, where it was asked, too.
    """

    conversation: Conversation = field(default_factory=Conversation)
    off: tuple[bool, ...] = ()
    beside: tuple[str | None, ...] = ()

    def answered(self, record: Record, answers: Sequence[str], *, off: bool) -> Talk:
        """With one more exchange, whose answer is the first; a second one is the base's."""
        beside = answers[1] if len(answers) > 1 else None
        return Talk(self.conversation.answered(record, answers[0]), (*self.off, off), (*self.beside, beside))

    def undone(self) -> Talk:
        """With one exchange less."""
        return Talk(self.conversation.undone(), self.off[:-1], self.beside[:-1])


class Page:
    """Handlers of the page's events, for any number of visitors; the model answers one after the other.

    Args:
        voice: the model.
        system: what it is told first, unless the visitor writes something else.
        images: offered with the first question.
        previews: a folder for the pictures that the page shows.
    """

    def __init__(self, voice: Voice, *, system: str | None, images: Sequence[SeenImage], previews: Path):
        self.voice, self.system, self.images = voice, system, images
        self._previews = previews
        self._stops: dict[str, threading.Event] = {}
        self._numbers = itertools.count(1)

    def ask(
        self, value: dict[str, Any] | None, mode: str | None, system: str, talk: Talk, request: gr.Request
    ) -> Iterator[Shown]:
        """Answer what stands in the box, piece by piece."""
        visitor = str(request.session_hash)
        stop = self._stops[visitor] = threading.Event()
        written = value or {}
        try:
            begun = replace(talk, conversation=replace(talk.conversation, system=system.strip() or None))
            images = [see(file) for file in written.get("files") or ()]
            number = next(self._numbers)
            record = begun.conversation.ask(written.get("text") or "", images, id=f"question {number}")
            yield self._show(
                begun.answered(record, [""], off=mode == OFF), box=gr.update(value=None, interactive=False)
            )
            answers: list[str] = []
            ended: set[str] = set()
            for _ in self._answers(record, mode, stop, answers, ended):
                yield self._show(begun.answered(record, answers, off=mode == OFF), box=gr.skip())
            if answers[0] or "stopped" not in ended:
                talk = begun.answered(record, answers, off=mode == OFF)
            cut = f"Cut after {self.voice.max_new_tokens} tokens at most."
            note = "Stopped." if "stopped" in ended else cut if "length" in ended else ""
            yield self._show(talk, box=gr.update(interactive=True), note=note)
        except UserError as error:
            box = gr.update(value=value, interactive=True)
            yield self._show(talk, box=box, note=" ".join(str(error).split()))
        except Exception:  # a defect of ours: the box must be open again, and the terminal shows the rest
            yield self._show(talk, box=gr.update(interactive=True), note="This is a defect of peft-mllm.")
            raise
        finally:
            self._stops.pop(visitor, None)

    def stop(self, request: gr.Request) -> None:
        """End the visitor's answer where it is."""
        if running := self._stops.get(str(request.session_hash)):
            running.set()

    def undo(self, talk: Talk) -> Shown:
        """Take the last question back."""
        try:
            return self._show(talk.undone(), box=gr.skip())
        except UserError as error:
            return self._show(talk, box=gr.skip(), note=str(error))

    def reset(self) -> Shown:
        """Start anew."""
        return self._show(Talk(), box=gr.update(value=None, interactive=True))

    def _answers(
        self, record: Record, mode: str | None, stop: threading.Event, answers: list[str], ended: set[str]
    ) -> Iterator[None]:
        """Fill in the answers and how they ended, piece by piece: one after the other, since the model is one."""
        for adapter in SPEAKERS[mode or ON]:
            answers.append("")
            for piece in self._spoken(record, adapter, stop):
                if isinstance(piece, Answer):
                    answers[-1] = piece.text
                    ended.add(piece.ended)
                else:
                    answers[-1] += piece
                yield
            if stop.is_set():
                return

    def _spoken(self, record: Record, adapter: bool, stop: threading.Event) -> Iterator[str | Answer]:
        """The pieces of an answer, and at last the answer; the model works in a thread of its own."""
        heard: Queue[str | Answer | Exception] = Queue()
        gone = threading.Event()

        def work() -> None:
            try:
                heard.put(
                    self.voice.answer(
                        record, adapter=adapter, say=heard.put, stop=lambda: stop.is_set() or gone.is_set()
                    )
                )
            except Exception as error:
                heard.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while True:
                piece = heard.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if isinstance(piece, Answer):
                    return
        finally:  # also when the visitor has left
            gone.set()
            worker.join()

    # --- what is seen ---

    def _show(self, talk: Talk, *, box: Any, note: str = "") -> Shown:
        """What a visitor sees, as the components' values."""
        left, right = [], []
        for exchange, off, beside in zip(talk.conversation.exchanges, talk.off, talk.beside, strict=True):
            question = self._question(exchange)
            left += [*question, said(f"[{OFF}] {exchange.answer}" if off else exchange.answer)]
            if beside is not None:
                right += [*question, said(beside)]
        return left, gr.update(value=right, visible=bool(right)), talk, box, in_html(note)

    def _question(self, exchange: Exchange) -> list[Message]:
        pictures = [{"role": "user", "content": {"path": str(self._preview(image))}} for image in exchange.images]
        return [*pictures, {"role": "user", "content": escape(exchange.text)}] if exchange.text else pictures

    def _preview(self, image: SeenImage) -> Path:
        """The picture as the model sees it, small enough for a page, in a format that every browser knows."""
        file = self._previews / f"{image.digest[:16]}.png"
        if not file.exists():
            small = image.picture.copy()
            small.thumbnail(PREVIEW)
            small.save(file)
        return file


def in_html(text: str, tag: str = "p") -> str:
    """Text, as itself."""
    return f"<{tag}>{escape(text)}</{tag}>"


def said(text: str) -> Message:
    """An answer as a message; one without words is shown, too."""
    return {"role": "assistant", "content": escape(text) or "..."}


def build(page: Page, *, title: str) -> gr.Blocks:
    """The page's components, tied to its handlers."""
    with gr.Blocks(title=f"{title} - PEFT-MLLM", analytics_enabled=False) as blocks:
        gr.HTML(in_html(title, "h3"))
        talk = gr.State(Talk())
        with gr.Row():
            left = _chatbot("Answers", "answers", visible=True)
            right = _chatbot("The same without the adapter", "beside", visible=False)
        note = gr.HTML(in_html(""), elem_id="note")
        box = gr.MultimodalTextbox(
            value={"text": "", "files": [str(image.path) for image in page.images]},
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            placeholder="A question; images can be added to every one",
            show_label=False,
            autofocus=True,
            elem_id="question",
        )
        with gr.Row():
            mode = gr.Radio(
                [ON, OFF, BOTH],
                value=ON,
                show_label=False,
                container=False,
                elem_id="mode",
                visible=page.voice.has_adapter,
                min_width=420,
            )
            stop = gr.Button("Stop", elem_id="stop", size="sm")
            undo = gr.Button("Undo", elem_id="undo", size="sm")
            reset = gr.Button("New", elem_id="reset", size="sm")
        with gr.Accordion("What the model is told first", open=bool(page.system)):
            system = gr.Textbox(
                value=page.system or "", placeholder="its own sentence", show_label=False, elem_id="system"
            )
        outputs = [left, right, talk, box, note]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        box.submit(page.ask, [box, mode, system, talk], outputs, trigger_mode="once", **private)
        stop.click(page.stop, queue=False, **private)
        undo.click(page.undo, [talk], outputs, **private)
        reset.click(page.reset, None, outputs, **private)
    return blocks


def _chatbot(label: str, name: str, *, visible: bool) -> gr.Chatbot:
    """For plain text, as the model said it: rendering would hide what was said, and could fetch pictures."""
    return gr.Chatbot(
        label=label,
        elem_id=name,
        visible=visible,
        render_markdown=False,
        feedback_options=None,
        buttons=[],
        scale=1,
        height="55vh",
    )
