"""The chat's page in a real browser: asked, shown images, compared, stopped, and never asking another machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec

import pytest

import tiny
from browser import CHROMIUM, Browser
from peft_mllm.chat.web import FIRST_PORT, listen
from peft_mllm.errors import SpecError
from peft_mllm.loading import load_family
from peft_mllm.spec import ModelSpec
from peft_mllm.tuned import untouched
from runs import command

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed (extra `web`)")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

# as `peft-mllm`, but every address that Python connects to or looks up is told
WATCHED = """
import sys
def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in ("127.0.0.1", "::1"):
        sys.stderr.write(f"OUTSIDE {args[1]}\\n")
    if event == "socket.getaddrinfo" and args[0] not in ("127.0.0.1", "localhost", None):
        sys.stderr.write(f"OUTSIDE {args[0]}\\n")
sys.addaudithook(watch)
from peft_mllm.cli import main
main()
"""
QUESTION = "#question textarea"
ANSWERS = "document.querySelector('#answers').innerText"
BESIDE = "(document.querySelector('#beside')?.innerText ?? '')"
DONE = "document.querySelector('#question textarea')?.disabled === false"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """One that changes what the embedded base says."""
    directory = tmp_path_factory.mktemp("adapter")
    family = load_family(ModelSpec(path="embedded"), dtype="float32")
    tiny.stir(tiny.tune("lora", on=family, parts={"connector": True}), spread=0.1).save(directory)
    return directory


@pytest.fixture(scope="module")
def served(adapter, tmp_path_factory):
    """The page of an adapter on the embedded base, with an image from the command line; and its log."""
    folder = tmp_path_factory.mktemp("served")
    tiny.Picture(1).load().save(folder / "first.png")
    words = ["chat", "embedded", "--adapter", adapter, "--web", "--image", folder / "first.png"]
    log = folder / "log"
    with log.open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, *map(str, words), "--max-new-tokens", "40"],
            stdout=subprocess.PIPE, stderr=err, text=True, env=os.environ | {"TMPDIR": str(folder)},
        )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "The chat is at http://127.0.0.1:" in line, log.read_text()
    yield line.split()[4], folder
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, "Ctrl-C ends it"
    assert log.read_text().splitlines() == ["Loading embedded"], "nothing went wrong, and nobody was called"
    assert not list(folder.glob("peft-mllm-chat-*")), "what was uploaded is gone"


@pytest.fixture
def page(served, tmp_path):
    address, _ = served
    browser = Browser(tmp_path)
    try:
        browser.open(address)
        yield browser
        assert browser.errors == []
        outside = [each for each in browser.requests if not each.startswith((address, "data:", "blob:"))]
        assert outside == [], "the browser asked another machine"
    finally:
        browser.close()


def ask(page, text):
    page.write(QUESTION, text)
    page.press_enter()
    page.wait_for(f"{ANSWERS}.includes({text!r})")


def choose(page, mode):
    page.evaluate(f"[...document.querySelectorAll('#mode input')].find(e => e.value === {mode!r}).click()")


@needs_gradio
@needs_browser
def test_a_conversation(page, tmp_path):
    page.wait_for("document.querySelector('#question img') !== null")  # the image of the command line
    ask(page, "What is at the top left? <b>x</b>")
    page.wait_for(DONE)
    page.wait_for("document.querySelectorAll('#answers img').length === 1")
    assert page.evaluate("document.querySelector('#answers img').naturalWidth") == 40
    assert "<b>x</b>" in page.evaluate(ANSWERS), "text is shown as it was written"
    tiny.Picture(2).load().save(tmp_path / "second.png")
    page.upload("#question input[type=file]", tmp_path / "second.png")
    page.wait_for("document.querySelector('#question img') !== null")
    ask(page, "And now?")
    page.wait_for(DONE)
    page.wait_for("document.querySelectorAll('#answers img').length === 2")
    page.click("#undo")
    page.wait_for(f"!{ANSWERS}.includes('And now?')")
    assert page.evaluate("document.querySelectorAll('#answers img').length") == 1
    page.click("#reset")
    page.wait_for(f"!{ANSWERS}.includes('What is at')")
    page.click("#undo")
    page.wait_for("document.querySelector('#note').innerText.includes('nothing to take back')")


@needs_gradio
@needs_browser
def test_side_by_side(page, tmp_path):
    page.wait_for("document.querySelector('#question img') !== null")
    choose(page, "side by side")
    ask(page, "What is at the top left?")
    page.wait_for(f"{DONE} && {BESIDE}.includes('What is at')")
    answers = [page.evaluate(each).split("What is at the top left?")[1].strip() for each in (ANSWERS, BESIDE)]
    assert all(answers)
    assert answers[0] != answers[1]
    page.screenshot(tmp_path / "beside.png")
    page.click("#undo")
    page.wait_for(f"!{BESIDE}.includes('What is at')")
    choose(page, "adapter off")
    ask(page, "How many?")
    page.wait_for(f"{DONE} && {ANSWERS}.includes('[adapter off]')")


@needs_gradio
@needs_browser
def test_an_error_is_told_and_the_chat_goes_on(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    page.wait_for(DONE)
    page.upload("#question input[type=file]", tmp_path / "broken.png")
    page.write(QUESTION, "What is it?")
    page.wait_for("document.querySelectorAll('#question img, #question .thumbnail-item').length > 1")
    page.press_enter()
    page.wait_for("document.querySelector('#note').innerText.includes('broken.png')")
    assert "Traceback" not in page.evaluate("document.body.innerText")
    page.wait_for(f"document.querySelector({QUESTION!r}).value === 'What is it?'")  # to be mended, not written anew
    page.click("#reset")
    page.wait_for(f"document.querySelector({QUESTION!r}).value === ''")
    ask(page, "How many?")
    page.wait_for(DONE)


class Visit:
    """What a handler asks of Gradio's request."""

    session_hash = "someone"


@needs_gradio
def test_stop_ends_the_answer(tmp_path):
    """A random model talks on; the button is pressed after three pieces."""
    from peft_mllm.chat.page import BOTH, Page, Talk
    from peft_mllm.chat.voice import Voice

    tuned = tiny.stir(tiny.tune("lora"))
    page = Page(Voice(tuned, max_new_tokens=100), system=None, images=[], previews=tmp_path)
    shown = []
    for each in page.ask({"text": "What?"}, BOTH, "", Talk(), Visit()):
        shown.append(each)
        if len(shown) == 4:
            page.stop(Visit())
    _, right, talk, _, note = shown[-1]
    assert 4 <= len(shown) < 60
    assert len(talk.conversation.exchanges) == 1
    assert talk.conversation.exchanges[0].answer, "what was said until then stays"
    assert right["value"] == [], "the base was not asked any more"
    assert "Stopped" in note
    assert page._stops == {}


@needs_gradio
def test_a_visitor_who_leaves_frees_the_model(tmp_path):
    from peft_mllm.chat.page import ON, Page, Talk
    from peft_mllm.chat.voice import Voice

    voice = Voice(untouched(tiny.family()), max_new_tokens=5000)
    page = Page(voice, system=None, images=[], previews=tmp_path)
    going = page.ask({"text": "What?"}, ON, "", Talk(), Visit())
    for _ in range(3):
        next(going)
    going.close()
    assert not voice._turn.locked()


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("peft_mllm.chat.web.find_spec", lambda name: None)
    said = command("chat", "embedded", "--web")
    assert said.code == 2
    assert "pip install 'peft-mllm[web]'" in said.err


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SpecError, match=rf"127\.0\.0\.1:{port}.*--port"):
            listen("127.0.0.1", port)
    with pytest.raises(SpecError, match=r"203\.0\.113\.1"):
        listen("203.0.113.1", 7000)


def test_another_port_where_the_usual_one_is_taken():
    with listen("127.0.0.1", None) as first, listen("127.0.0.1", None) as second:
        ports = {each.getsockname()[1] for each in (first, second)}
        assert len(ports) == 2
        assert FIRST_PORT not in ports or first.getsockname()[1] == FIRST_PORT
