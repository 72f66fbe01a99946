"""The chat in a terminal, and the same for programs: one line in, one answer out."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any

from peft_mllm.chat.conversation import Conversation, SeenImage, see
from peft_mllm.chat.saving import save
from peft_mllm.chat.voice import Answer, Voice
from peft_mllm.errors import EXIT_DONE, EXIT_USAGE, DataError, Interrupted, SpecError, UserError
from peft_mllm.record import Record
from peft_mllm.shelf import did_you_mean

COMMANDS = {
    "/image": "/image FILE...  show these images with the next question",
    "/adapter": "/adapter on|off  answer with the adapter, or as the base did before training",
    "/compare": "/compare [QUESTION]  answer with and without the adapter; alone: the last question again",
    "/system": "/system [TEXT]  what the model is told first; alone: its own sentence",
    "/undo": "/undo  take the last question and its answer back",
    "/reset": "/reset  start anew",
    "/save": "/save FILE.jsonl  add the conversation to a file that can be trained on",
    "/help": "/help  this list",
    "/quit": "/quit  end (Ctrl-D does, too; Ctrl-C stops an answer)",
}
PROMPT = "> "
ON, OFF = "[adapter on] ", "[adapter off] "
"""In front of an answer, where it is not plain who speaks."""
# a model's words must not steer the terminal: all controls but line breaks and tabs
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Terminal:
    """A chat that reads lines and writes answers.

    Args:
        voice: the model.
        system: what it is told first.
        images: to be shown with the first question.
        as_json: write one JSON object on a line for each answer and each error.
        source: lines to read; standard input if left out.
        out: where answers go.
        notes: where all else goes.
    """

    def __init__(
        self,
        voice: Voice,
        *,
        system: str | None = None,
        images: Iterable[SeenImage] = (),
        as_json: bool = False,
        source: IO[str] | None = None,
        out: IO[str] | None = None,
        notes: IO[str] | None = None,
    ):
        self.voice = voice
        self.conversation = Conversation(system)
        self.waiting = list(images)
        self.adapter = True
        self.as_json = as_json
        self._source, self._out, self._notes = source or sys.stdin, out or sys.stdout, notes or sys.stderr
        self._live = source is None and sys.stdin.isatty() and not as_json
        self._asked = 0
        self._failed = False

    def run(self) -> int:
        """Talk until the end of the input; the exit code: from a script, an error in any line is one."""
        _never_fail_on_characters()
        if self._live:
            with suppress(ImportError):
                _edit_lines()
            self._note("Write a question; /help lists what else can be said.")
        going_on = True
        while going_on:
            try:
                line = self._read()
                going_on = line is not None and self._take(line)
            except KeyboardInterrupt:  # while waiting; or the second one while answering, and the answer is dropped
                if not self._live:
                    raise Interrupted("Stopped.") from None
                self._note("\n(stopped; /quit or Ctrl-D ends)")
            except BrokenPipeError:  # nobody reads any more, as after `| head`; Python must not find out at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())
                going_on = False
        return EXIT_USAGE if self._failed and not self._live else EXIT_DONE

    def _read(self) -> str | None:
        """The next line; None at the end."""
        if not self._live:
            return self._source.readline() or None
        try:
            return input(PROMPT)
        except EOFError:
            self._note("")
            return None

    def _take(self, line: str) -> bool:
        """Work one line off; whether to go on."""
        word, _, rest = line.strip().partition(" ")
        try:
            if word in ("/quit", "/exit"):
                return False
            if line.startswith("/"):
                self._command(word, rest.strip())
            elif line.strip():
                self._ask(line)
        except UserError as error:
            self._complain(error)
        return True

    # --- what can be said ---

    def _command(self, word: str, rest: str) -> None:
        if word not in COMMANDS:
            raise SpecError(f"There is no {word}. {did_you_mean(word, list(COMMANDS))}")
        getattr(self, f"_{word.removeprefix('/')}")(rest)

    def _image(self, rest: str) -> None:
        if not rest:
            names = ", ".join(str(image.path) for image in self.waiting) or "none; /image FILE adds one"
            self._note(f"Images for the next question: {names}.")
            return
        seen = [see(name) for name in _names(rest)]  # all of them, or none
        self.waiting += seen
        self._note(f"{len(seen)} added for the next question.")

    def _adapter(self, rest: str) -> None:
        if rest not in ("on", "off"):
            raise SpecError(f"Say /adapter on or /adapter off; it is {'on' if self.adapter else 'off'}.")
        with self.voice.tuned.untuned():  # which says so where there is none
            self.adapter = rest == "on"
        self._note(f"The adapter is {rest}.")

    def _compare(self, rest: str) -> None:
        if rest:
            before, record = self.conversation, self._record(rest)
        elif self.conversation.exchanges:
            last = self.conversation.exchanges[-1]
            before = self.conversation.undone()
            record = before.ask(last.question, last.images, id=self._next_id())
        else:
            raise DataError("There is nothing to compare: write /compare and a question.")
        with self.voice.tuned.untuned():
            pass  # says now, not after one answer, where nothing can be compared
        answers = {
            adapter: self._answer(record, adapter=adapter, label=label) for adapter, label in ((True, ON), (False, OFF))
        }
        if rest:
            self._keep(before, record, answers[self.adapter])

    def _system(self, rest: str) -> None:
        self.conversation = replace(self.conversation, system=rest or None)
        self._note("The model is told so first." if rest else "The model is told its own sentence first.")

    def _undo(self, rest: str) -> None:
        self.conversation = self.conversation.undone()
        left = len(self.conversation.exchanges)
        self._note(f"Taken back; {left} question{'' if left == 1 else 's'} left.")

    def _reset(self, rest: str) -> None:
        self.conversation, self.waiting = Conversation(self.conversation.system), []
        self._note("A new conversation.")

    def _save(self, rest: str) -> None:
        names = _names(rest)
        if len(names) != 1:
            raise SpecError("Say /save and the name of one file, such as /save chat.jsonl.")
        self._note(f"Saved in {save(self.conversation, names[0])}.")

    def _help(self, rest: str) -> None:
        self._note("\n".join(COMMANDS.values()))

    # --- asking and answering ---

    def _ask(self, text: str) -> None:
        record = self._record(text)
        self._keep(
            self.conversation, record, self._answer(record, adapter=self.adapter, label="" if self.adapter else OFF)
        )

    def _record(self, text: str) -> Record:
        return self.conversation.ask(text, self.waiting, id=self._next_id())

    def _next_id(self) -> str:
        """Numbered, so that a question asked again with a temperature gets another answer."""
        self._asked += 1
        return f"question {self._asked}"

    def _keep(self, before: Conversation, record: Record, answer: Answer) -> None:
        if answer.ended == "stopped" and not answer.text:
            return
        self.conversation, self.waiting = before.answered(record, answer.text), []

    def _answer(self, record: Record, *, adapter: bool, label: str) -> Answer:
        if label and not self.as_json:
            self._say(label)
        with _until_ctrl_c() as stopped:
            say = (lambda piece: None) if self.as_json else self._say
            answer = self.voice.answer(record, adapter=adapter, say=say, stop=stopped)
        if self.as_json:
            self._object(_as_json(record, answer))
            return answer
        self._say("\n")
        if answer.ended == "length":
            self._note(f"(cut after {answer.tokens} tokens; --max-new-tokens sets the limit)")
        elif answer.ended == "stopped":
            self._note("(stopped)")
        return answer

    # --- writing ---

    def _say(self, text: str) -> None:
        self._out.write(text.translate(_CONTROLS) if self._out.isatty() else text)
        self._out.flush()

    def _object(self, value: dict[str, Any]) -> None:
        self._out.write(json.dumps(value) + "\n")
        self._out.flush()

    def _note(self, text: str) -> None:
        if not self.as_json:
            self._notes.write(f"{text}\n")
            self._notes.flush()

    def _complain(self, error: UserError) -> None:
        self._failed = True
        line = " ".join(str(error).split())
        if self.as_json:
            self._object({"error": line})
        self._note(line)


def _as_json(record: Record, answer: Answer) -> dict[str, Any]:
    shown = [str(image.path) for image in record.images if isinstance(image, SeenImage)]
    facts = asdict(answer)
    return {"question": record.question[-1].text, "images": shown, "answer": facts.pop("text"), **facts}


def _never_fail_on_characters() -> None:
    """A byte that is no text is a line's own error, and a character that the terminal has not is spelled out."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _names(text: str) -> list[str]:
    """File names as people write them: one with spaces, quoted ones, several."""
    if text and Path(text).expanduser().is_file():
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # a quote without its partner
        return [text]


@contextmanager
def _until_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed; the second one raises as ever."""
    pressed = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _files_from(text: str) -> list[str]:
    """Names of files and folders that begin so."""
    head, slash, tail = text.rpartition("/")
    with suppress(OSError):
        there = sorted(Path(head + slash or ".").expanduser().iterdir())
        return [f"{head}{slash}{each.name}{'/' * each.is_dir()}" for each in there if each.name.startswith(tail)]
    return []


def _edit_lines() -> None:
    """Let `input` edit its line, remember earlier ones, and complete commands and names of files."""
    import readline

    def complete(text: str, state: int) -> str | None:
        begun = readline.get_line_buffer()
        if begun.startswith("/") and " " not in begun:
            fitting = [f"{word} " for word in COMMANDS if word.startswith(text)]
        else:
            fitting = _files_from(text)
        return fitting[state] if state < len(fitting) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
