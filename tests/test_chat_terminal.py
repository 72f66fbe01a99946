"""The chat in a terminal and for programs: commands, errors that do not end it, Ctrl-C, piped lines."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pty
import select
import signal
import sys
import time

import pytest

import tiny
from peft_mllm.chat.conversation import see
from peft_mllm.chat.terminal import COMMANDS, Terminal
from peft_mllm.chat.voice import Voice
from peft_mllm.cli import main
from peft_mllm.loading import load_family
from peft_mllm.spec import ModelSpec
from peft_mllm.tuned import load_adapter
from runs import command, fork, wait


@pytest.fixture(scope="module")
def tuned():
    """A tiny model whose adapter changes what it says."""
    return tiny.stir(tiny.tune("lora", parts={"connector": True}), spread=0.3)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        tiny.Picture(number).load().save(tmp_path / f"{number}.png")
    tiny.Picture(3).load().save(tmp_path / "with space.png")
    return tmp_path


class Heard:
    """What a terminal wrote, and the terminal."""

    def __init__(self, tuned, *lines, **options):
        out, notes = io.StringIO(), io.StringIO()
        voice = Voice(tuned, max_new_tokens=options.pop("max_new_tokens", 6))
        source = io.StringIO("\n".join(lines) + "\n")
        self.terminal = Terminal(voice, source=source, out=out, notes=notes, **options)
        self.code = self.terminal.run()
        self.out, self.notes = out.getvalue(), notes.getvalue()

    @property
    def objects(self):
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def exchanges(self):
        return self.terminal.conversation.exchanges


def test_every_command_is_there_and_explained():
    assert all(hasattr(Terminal, f"_{word[1:]}") for word in COMMANDS if word != "/quit")
    assert all(text.startswith(word) for word, text in COMMANDS.items())


def test_a_line_is_a_turn(tuned, files):
    heard = Heard(tuned, "Hello", "", "/image 1.png", "/image 2.png", "Which?", "And?")
    assert [len(each.images) for each in heard.exchanges] == [0, 2, 0]
    assert heard.exchanges[1].question == "<image>\n<image>\nWhich?"
    assert heard.out == "".join(f"{each.answer}\n" for each in heard.exchanges)
    assert heard.code == 0


def test_images_from_the_command_line_go_to_the_first_question(tuned, files):
    heard = Heard(tuned, "a", "b", images=[see("1.png")])
    assert [len(each.images) for each in heard.exchanges] == [1, 0]


@pytest.mark.parametrize(
    ("line", "number"),
    [("1.png 2.png", 2), ("with space.png", 1), ("'with space.png' 1.png", 2), (r"with\ space.png", 1)],
)
def test_names_of_images_are_written_as_people_do(tuned, files, line, number):
    assert len(Heard(tuned, f"/image {line}", "a").exchanges[0].images) == number


def test_the_adapter_is_switched(tuned):
    heard = Heard(tuned, "What?", "/reset", "/adapter off", "What?", "/reset", "/adapter on", "What?")
    on, off, again = heard.out.splitlines()
    assert off.startswith("[adapter off] ")
    assert on == again != off.removeprefix("[adapter off] ")


def test_both_are_compared(tuned):
    alone = Heard(tuned, "What?", "/reset", "/adapter off", "What?").out.splitlines()
    heard = Heard(tuned, "/compare What?", "/compare", "More")
    expected = [f"[adapter on] {alone[0]}", alone[1]]
    assert heard.out.splitlines()[:4] == expected + expected
    assert heard.exchanges[0].answer == alone[0]
    assert len(heard.exchanges) == 2, "to compare the last question again adds none"
    off = Heard(tuned, "/adapter off", "/compare What?")
    assert [f"[adapter off] {each.answer}" for each in off.exchanges] == [alone[1]]


def test_undo_and_reset(tuned, files):
    heard = Heard(tuned, "a", "/image 1.png", "b", "/undo", "c", "/undo", "/undo", "/undo")
    assert heard.exchanges == ()
    assert "There is nothing to take back." in heard.notes
    first, second = Heard(tuned, "a", "b", "/undo", "b"), Heard(tuned, "a", "b")
    assert first.exchanges == second.exchanges
    assert Heard(tuned, "/image 1.png", "/reset", "a").exchanges[0].images == ()


def test_what_the_model_is_told_first(tuned):
    heard = Heard(tuned, "/system Be brief.", "What?", "/system", "What?", system="Be long.")
    assert heard.terminal.conversation.system is None
    kept = Heard(tuned, "/reset", "What?", system="Be long.")
    assert kept.terminal.conversation.system == "Be long."


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/imagine 1.png", "There is no /imagine. Did you mean '/image'?"),
        ("/image nothere.png", "nothere.png is not there"),
        ("/image 1.png nothere.png", "nothere.png is not there"),
        ("/image broken.png", "broken.png"),
        ("/image 'open", "'open"),
        ("/adapter sideways", "Say /adapter on or /adapter off; it is on."),
        ("/compare", "nothing to compare"),
        ("/undo", "nothing to take back"),
        ("/save", "the name of one file"),
        ("/save a.jsonl", "nothing was asked"),
        ("Is <image> it?", "1 <image> marks for 0"),
        ("word " * 20_000, "The conversation is too long"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_an_error_is_one_line_and_the_chat_goes_on(tuned, files, line, says):
    (files / "broken.png").write_bytes((files / "1.png").read_bytes()[:300])
    heard = Heard(tuned, line, "What?")
    (said,) = [each for each in heard.notes.splitlines() if says in each]
    assert len(said) < 300
    assert len(heard.exchanges) == 1
    assert heard.exchanges[0].images == ()
    assert heard.code == 2
    as_json = Heard(tuned, line, "What?", as_json=True)
    assert says in as_json.objects[0]["error"]
    assert as_json.objects[1]["answer"] == heard.exchanges[0].answer


def test_without_an_adapter_nothing_is_compared():
    base = tiny.tune("none")
    for line in ("/adapter off", "/compare What?"):
        heard = Heard(base, line, "What?")
        assert "There is no adapter to switch off" in heard.notes
        assert len(heard.exchanges) == 1


def test_json_for_programs(tuned, files):
    heard = Heard(tuned, "/image 1.png", "What?", "/adapter off", "What?", "/compare", as_json=True)
    first, second, on, off = heard.objects
    assert (first["question"], first["images"], first["adapter"]) == ("<image>\nWhat?", ["1.png"], True)
    assert (second["adapter"], on["adapter"], off["adapter"]) == (False, True, False)
    assert second["answer"] == off["answer"]
    assert first["ended"] in ("itself", "length")
    assert first["prompt_tokens"] > 0
    assert heard.notes == ""


def test_a_cut_answer_says_so(tuned):
    assert "cut after 2 tokens" in Heard(tuned, "What?", max_new_tokens=2).notes


def test_saving(tuned, files):
    heard = Heard(tuned, "/image 1.png", "What?", "/save talks/mine.jsonl", "/quit", "never asked", max_new_tokens=24)
    assert len(heard.exchanges) == 1
    assert "Saved in talks/mine.jsonl." in heard.notes
    assert command("data", "check", "talks/mine.jsonl").code == 0


def pressing_ctrl_c(terminal, *, times, after):
    """Make the terminal's answer press Ctrl-C once it has said so many pieces."""
    plain, said = terminal._say, []

    def say(text):
        plain(text)
        said.append(text)
        if len(said) == after:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    terminal._say = say


def talk_with_ctrl_c(tuned, *lines, times):
    out, notes = io.StringIO(), io.StringIO()
    terminal = Terminal(Voice(tuned, max_new_tokens=200), source=io.StringIO("\n".join(lines)), out=out, notes=notes)
    terminal._live = times > 1  # in a script the second Ctrl-C ends it
    waiting = [*lines, None]
    terminal._read = lambda: waiting.pop(0)
    pressing_ctrl_c(terminal, times=times, after=3)
    terminal.run()
    return terminal, out.getvalue(), notes.getvalue()


def test_ctrl_c_stops_the_answer_not_the_program(tuned):
    before = signal.getsignal(signal.SIGINT)
    terminal, out, notes = talk_with_ctrl_c(tuned, "What?", "/undo", "And?", times=1)
    assert "(stopped)" in notes
    assert len(out.splitlines()[0]) < 100, "it went on"
    assert len(terminal.conversation.exchanges) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_drops_the_answer(tuned):
    terminal, _, notes = talk_with_ctrl_c(tuned, "What?", times=2)
    assert "(stopped; /quit or Ctrl-D ends)" in notes
    assert terminal.conversation.exchanges == ()


# --- as a command ---


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    family = load_family(ModelSpec(path="embedded"), dtype="float32")
    tiny.stir(tiny.tune("lora", on=family, parts={"connector": True}), spread=0.1).save(directory)
    return directory


def test_piped_lines(files):
    (files / "lines").write_bytes(b"What is at the top left?\n/nonsense\nh\xff\nHow many?\n")
    log = files / "log"

    def work():
        os.dup2(os.open(files / "lines", os.O_RDONLY), 0)
        os.dup2(os.open(files / "out", os.O_WRONLY | os.O_CREAT), 1)
        as_command("embedded", "--image", "1.png")

    assert wait(fork(work, log)) == 2
    assert len((files / "out").read_text().splitlines()) == 2
    said = log.read_text()
    assert "There is no /nonsense" in said
    assert "not UTF-8" in said
    assert "Traceback" not in said


def test_an_adapter_on_a_base(adapter, files, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/compare What is at the top left?\n"))
    words = ["--adapter", adapter, "--image", "1.png", "--json", "--max-new-tokens", "9"]
    said = command("chat", "embedded", *words)
    on, off = map(json.loads, said.out.splitlines())
    assert (said.code, on["adapter"], off["adapter"]) == (0, True, False)
    assert on["answer"] != off["answer"]
    tuned = load_adapter(load_family(ModelSpec(path="embedded"), dtype="float32"), adapter)
    heard = Heard(tuned, "What is at the top left?", max_new_tokens=9, images=[see("1.png")])
    assert heard.exchanges[0].answer == on["answer"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere/model"], "nowhere/model"),
        (["embedded", "--image", "none.png"], "none.png is not there"),
        (["embedded", "--adapter", "nothing"], "nothing is no PEFT directory"),
        (["embedded", "--base", "embedded"], "is no PEFT directory"),
        (["embedded", "--adapter", "x", "--base", "y"], "leave --base out"),
        (["embedded", "--temperature", "-1"], "temperature"),
    ],
)
def test_wrong_words(words, says, files):
    said = command("chat", *words)
    assert said.code in (2, 65)
    assert says in " ".join((said.err + said.out).split())
    assert "Traceback" not in said.err


def test_a_target_with_an_adapter_takes_no_other(adapter):
    said = command("chat", adapter, "--adapter", adapter)
    assert (said.code, "brings its own adapter" in said.err) == (2, True)


def as_command(*words):
    """Be `peft-mllm chat WORDS` in a child that was just forked; importing everything anew takes seconds."""
    code = 70
    try:
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        sys.argv = ["peft-mllm", "chat", *words]
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        os._exit(code)


def test_at_a_terminal(files):
    """With a prompt, and line editing: an earlier line is asked again by the arrow key; Ctrl-D ends it."""
    child, master = pty.fork()
    if not child:
        os.environ["TERM"] = "xterm"
        logging.getLogger().handlers.clear()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        as_command("embedded")
    seen = ""

    def wait_for(text, times=1):
        nonlocal seen
        end = time.monotonic() + 60
        while seen.count(text) < times:
            assert time.monotonic() < end, seen
            if select.select([master], [], [], 0.2)[0]:
                seen += os.read(master, 4096).decode()

    def write(text):
        os.write(master, text.encode())

    try:
        wait_for("> ")
        write("/sys\tBe brief.\n")  # completed by the tab
        wait_for("The model is told so first.")
        write("/undo\n")
        wait_for("nothing to take back")
        write("\x1b[A\n")
        wait_for("nothing to take back", times=2)
        os.kill(child, signal.SIGINT)
        wait_for("Ctrl-D ends")
        seen = seen[seen.rindex("Ctrl-D ends") :]
        wait_for("> ")  # before it asks again, the terminal is not yet readline's, and would swallow the end
        write("\x04")
        assert wait(child) == 0
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            wait(child)
        os.close(master)


def test_nobody_reads(files):
    """As with `| head`: it ends without a word about it."""
    nobody, out = os.pipe()
    os.close(nobody)
    (files / "questions").write_text("What?\nWhat?\n")
    log = files / "log"

    def work():
        os.dup2(os.open(files / "questions", os.O_RDONLY), 0)
        os.dup2(out, 1)
        as_command("embedded", "--max-new-tokens", "5")

    assert wait(fork(work, log)) == 0
    assert log.read_text() == "Loading embedded\n"
