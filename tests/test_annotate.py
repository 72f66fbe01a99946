"""The annotation page: what it shows, what survives a kill, and what two annotators agree on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, Browser
from own_data import image, jsonl, llava
from peft_mllm.annotate.answers import Answers, agreement, count, kappa, load_answers
from peft_mllm.annotate.items import Item, digest, items_of
from peft_mllm.annotate.page import render
from peft_mllm.annotate.server import AnnotationServer
from peft_mllm.errors import DataError, SpecError
from runs import command, tiny, write_spec

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
CAPTIONS = ["A red square.", "</script><script>document.title = 'bad'</script> & a dog", "Nothing", ""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four captions, and their images."""
    lines = []
    for n, caption in enumerate(CAPTIONS):
        image(tmp_path / "images" / f"{n}.png", (60 * n, 20, 90))
        references = ["A square.", "It is <red>."]
        lines.append({"id": f"q{n}", "prediction": caption, "references": references, "image": f"images/{n}.png"})
    jsonl(tmp_path / "predictions.jsonl", lines)
    return tmp_path


@pytest.fixture
def items(folder: Path) -> list[Item]:
    return items_of(folder / "predictions.jsonl")


# What is judged.


def test_a_file_of_predictions(items: list[Item]) -> None:
    assert [item.id for item in items] == ["q0", "q1", "q2", "q3"]
    assert [item.caption for item in items] == CAPTIONS
    assert items[0].references == ("A square.", "It is <red>.")
    assert all(item.images[0].startswith("data:image/jpeg;base64,") for item in items)


def test_cocos_results_are_read(folder: Path) -> None:
    lines = [
        {"image_id": 7, "caption": "A.", "image": "images/0.png"},
        {"image_id": 8, "caption": "B.", "image": "images/1.png"},
    ]
    (folder / "results.json").write_text(json.dumps(lines))
    assert [(item.id, item.caption) for item in items_of(folder / "results.json")] == [("7", "A."), ("8", "B.")]


def test_a_run_knows_its_task(tmp_path: Path) -> None:
    """Images and references come from the task with the run's own options."""
    for n in range(3):
        image(tmp_path / f"{n}.png", (n, n, n))
    records = [llava(f"<image>\nDescribe {n}.", f"answer {n}", image=f"{n}.png", id=f"r{n}") for n in range(3)]
    records[1]["references"] = ["one", "two"]
    task = {"name": "custom", "train": str(jsonl(tmp_path / "a.jsonl", records)), "test": str(tmp_path / "a.jsonl")}
    spec = tiny(tmp_path / "run", task=task, train={"max_steps": 1})
    assert command("train", write_spec(tmp_path / "spec.yaml", spec)).code == 0
    made = items_of(tmp_path / "run")
    assert [item.id for item in made] == ["r0", "r1", "r2"]
    assert [item.references for item in made] == [("answer 0",), ("one", "two"), ("answer 2",)]
    assert made[0].question == "Describe 0."
    for name in ("scenes_at", {"name": "scenes_at"}):
        with pytest.raises(SpecError, match="no predictions of 'scenes_at'; it has custom"):
            items_of(tmp_path / "run", task=name)
    said = command("annotate", str(tmp_path / "run"), "--output", str(tmp_path / "page.html"))
    assert said.code == 0, said.err
    assert "3 captions to judge" in said.out
    assert "lora" not in (tmp_path / "page.html").read_text().split('<script type="application/json"')[0]


def test_the_draw_is_the_same_for_every_run(folder: Path) -> None:
    other = [json.loads(line) | {"prediction": "x"} for line in (folder / "predictions.jsonl").read_text().splitlines()]
    jsonl(folder / "other.jsonl", reversed(other))
    first = {item.id for item in items_of(folder / "predictions.jsonl", sample=2)}
    assert len(first) == 2
    assert {item.id for item in items_of(folder / "other.jsonl", sample=2)} == first
    assert any({item.id for item in items_of(folder / "other.jsonl", sample=2, seed=s)} != first for s in range(5))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no predictions"),
        ("{", "has no predictions"),  # a line without an end is none
        ("{\n", "is not JSON"),
        ('{"id": "a", "prediction": "x"}\n{"id": "a", "prediction": "y"}\n', r"p\.jsonl:2: the id 'a' stands twice"),
        ('{"id": "a", "prediction": "x"}\n{"id": "b"}\n', r"p\.jsonl:2: it needs `id` and `prediction`"),
        ('{"id": "a", "prediction": "x"}\n', "'a' names no `image`"),
        ('{"id": "a", "prediction": "x", "image": "images/9.png"}\n', "is not there"),
    ],
)
def test_files_that_cannot_be_judged(folder: Path, text: str, why: str) -> None:
    (folder / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=why):
        items_of(folder / "p.jsonl")


# The answers.


def answers_of(text: str, annotator: str = "a") -> Answers:
    """One letter for each of the captions: y, n, or - where there is no answer."""
    said = {f"q{i}": {"y": "yes", "n": "no"}[letter] for i, letter in enumerate(text) if letter != "-"}
    return Answers("digest", len(text), annotator, said)


def test_counts() -> None:
    made = count(answers_of("yynn" * 5))
    assert (made["judged"], made["hallucinated"], made["rate"]) == (20, 10, 50.0)
    # Wilson's interval of 10 of 20, by its formula
    z, n, p = 1.959963984540054, 20, 0.5
    middle, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z / (1 + z * z / n) * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5,
    )
    assert made["interval"] == pytest.approx([100 * (middle - half), 100 * (middle + half)])
    assert count(answers_of("--"))["rate"] is None
    assert count(answers_of("nnn"))["interval"][0] == 0


def test_agreement_by_cohens_own_example() -> None:
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: agreement 0.7, kappa 0.4."""
    first, second = answers_of("y" * 25 + "n" * 25), answers_of("y" * 20 + "n" * 5 + "y" * 10 + "n" * 15)
    made = agreement(first, second)
    assert made["agreement"] == pytest.approx(70)
    assert made["kappa"] == pytest.approx(0.4)
    assert (made["judged_by_both"], made["both_yes"], len(made["disagree"])) == (50, 20, 15)


def test_agreement_at_its_ends() -> None:
    assert kappa([("yes", "yes"), ("no", "no")]) == 1
    assert kappa([("yes", "no"), ("no", "yes")]) == -1
    assert kappa([("no", "no")] * 3) is None
    made = agreement(answers_of("yn-y"), answers_of("ny--"))
    assert (made["judged_by_both"], made["disagree"]) == (2, ["q0", "q1"])
    with pytest.raises(DataError, match="no caption in common"):
        agreement(answers_of("y-"), answers_of("-y"))
    with pytest.raises(DataError, match="different captions"):
        agreement(answers_of("y"), Answers("other", 1, "b", {"q0": "yes"}))


def test_the_command_counts(tmp_path: Path) -> None:
    answers_of("y" * 25 + "n" * 25, "alice").save(tmp_path / "a.json")
    answers_of("y" * 20 + "n" * 5 + "y" * 10 + "n" * 15, "bob").save(tmp_path / "b.json")
    said = command("annotate", "--agreement", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert said.code == 0, said.err
    assert "alice" in said.out
    assert "36.6 to 63.4 %" in said.out
    assert "they agree on 70.0 % (Cohen's kappa 0.400)" in said.out
    told = json.loads(command("annotate", "--agreement", str(tmp_path / "a.json"), "--json").out)
    assert told["annotators"][0]["hallucinated"] == 25
    assert told["agreement"] is None
    for content, why in [
        ("[]", "no file of answers"),
        ("{", "is not JSON"),
        ('{"format": "peft-mllm annotation 1"}', "not all"),
    ]:
        (tmp_path / "bad.json").write_text(content)
        said = command("annotate", "--agreement", str(tmp_path / "bad.json"))
        assert (said.code, why in said.err) == (65, True), said.err
    assert command("annotate", str(tmp_path), str(tmp_path)).code == 2


# The page in a browser.


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    made = Browser(tmp_path)
    try:
        yield made
        assert made.errors == []
    finally:
        made.close()


READY = "document.body && document.body.dataset.ready === 'yes'"
SHOWN = "document.getElementById('caption').textContent"
COLUMN = "[...document.querySelectorAll('#rows tr')].map(row => row.cells[2].textContent).join()"


def press(browser: Browser, key: str) -> None:
    browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    browser.call("Input.dispatchKeyEvent", type="keyUp", key=key)


def shows(browser: Browser, expression: str, value: Any) -> bool:
    """Whether it becomes so; keys and pictures take their time."""
    return bool(browser.wait_for(f"{expression} === {json.dumps(value)}"))


@needs_browser
def test_a_person_fills_it_in_and_goes_on(folder: Path, items: list[Item], browser: Browser) -> None:
    (folder / "page.html").write_text(render(items))
    (folder / "downloads").mkdir()
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder / "downloads"))
    browser.open((folder / "page.html").as_uri())
    browser.wait_for(READY)
    press(browser, "n")  # before anybody said who it is
    press(browser, "ArrowLeft")
    press(browser, "u")
    browser.click("#rows tr:nth-child(3)")
    press(browser, "n")
    browser.write("#annotator", "alice")
    browser.evaluate("document.getElementById('annotator').blur()")
    assert shows(browser, COLUMN, ",,no,")
    assert shows(browser, SHOWN, CAPTIONS[0])
    browser.click("#rows tr:nth-child(3)")
    press(browser, "u")
    browser.click("#rows tr:nth-child(1)")
    assert shows(browser, "document.querySelector('#images img').naturalWidth", 24)
    press(browser, "y")
    assert browser.wait_for(f"{SHOWN} === {json.dumps(CAPTIONS[1])}"), "it is text, and the next one"
    assert shows(browser, "document.getElementById('references').innerText", "A square.\nIt is <red>.")
    press(browser, "n")
    browser.click("#rows tr:nth-child(4)")
    assert shows(browser, SHOWN, "(nothing)")
    browser.click("#yes")
    assert shows(browser, COLUMN, "yes,no,,yes")
    assert shows(browser, SHOWN, "Nothing"), "the one that is still open"
    press(browser, "ArrowLeft")
    press(browser, "u")
    assert shows(browser, COLUMN, "yes,,,yes")
    press(browser, "n")
    browser.screenshot(folder / "page.png")
    browser.open("about:blank")  # and again, as after a kill: the browser has kept it
    browser.open((folder / "page.html").as_uri())
    browser.wait_for(READY)
    assert shows(browser, COLUMN, "yes,no,,yes")
    assert shows(browser, "document.getElementById('annotator').value", "alice")
    press(browser, "s")
    saved = folder / "downloads" / "answers-alice.json"
    while not saved.exists():
        browser.evaluate("1")
    found = load_answers(saved)
    assert found == Answers(digest(items), 4, "alice", {"q0": "yes", "q1": "no", "q3": "yes"})
    # another browser, or a colleague's: the file brings the answers with it
    browser.evaluate("localStorage.clear()")
    browser.open("about:blank")
    browser.open((folder / "page.html").as_uri())
    browser.wait_for(READY)
    assert shows(browser, COLUMN, ",,,")
    browser.upload("#file", saved)
    assert browser.wait_for(f"{COLUMN} === 'yes,no,,yes'")
    (folder / "other.json").write_text(json.dumps({"format": "other"}))
    browser.upload("#file", folder / "other.json")
    assert browser.wait_for("document.getElementById('kept').textContent.includes('no answers about these')")
    assert shows(browser, "document.title", "Does the caption say what is not there?")
    outside = [each for each in browser.requests if not each.startswith(("file:", "data:", "about:", "blob:"))]
    assert outside == []


@needs_browser
def test_answers_are_on_the_disk_when_the_page_goes_on(folder: Path, items: list[Item], browser: Browser) -> None:
    """The program is killed between two answers; the same command goes on."""
    kept = folder / "answers.json"
    for caption, key, expected in [
        ("A red square.", "y", {"q0": "yes"}),
        (CAPTIONS[1], "n", {"q0": "yes", "q1": "no"}),
    ]:
        with served(folder) as (address, process):
            browser.open(address)
            browser.wait_for(READY)
            assert shows(browser, SHOWN, caption)
            assert shows(browser, "document.getElementById('annotator').value", "alice")
            press(browser, key)
            while load_answers(kept).answers != expected:
                browser.evaluate("1")
            process.send_signal(signal.SIGKILL)
    assert load_answers(kept).annotator == "alice"
    press(browser, "y")  # nobody is there any more, and the page says so
    assert browser.wait_for("document.getElementById('kept').textContent.includes('server is gone')")
    browser.errors.clear()  # the refused connection


class served:  # noqa: N801 - used as a function
    """`annotate --serve` in a process of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> tuple[str, subprocess.Popen[str]]:
        words = ["annotate", "predictions.jsonl", "--serve", "--answers", "answers.json", "--annotator", "alice"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peft_mllm", *words], stdout=subprocess.PIPE, text=True, cwd=self.folder,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return line.split()[-1], self.process

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait(60)


@pytest.fixture
def server(folder: Path, items: list[Item]) -> Iterator[AnnotationServer]:
    made = AnnotationServer(items, folder / "a.json", annotator="bob")
    thread = threading.Thread(target=made.run)
    thread.start()
    yield made
    made.stop()
    thread.join()
    made.close()


def put(address: str, value: Any) -> int:
    request = urllib.request.Request(f"{address}answers", json.dumps(value).encode(), method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=10) as given:
            return given.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_keeps_only_what_belongs_to_it(server: AnnotationServer, folder: Path, items: list[Item]) -> None:
    assert put(server.address, {"id": "q1", "answer": "yes"}) == 200
    assert put(server.address, {"id": "q2", "answer": "no"}) == 200
    assert put(server.address, {"id": "q1", "answer": None}) == 200
    for wrong in ({"id": "q9", "answer": "yes"}, {"id": "q1", "answer": "maybe"}, [], {"id": "q1" * 9000}):
        assert put(server.address, wrong) in (400, 404)
    root = server.address.rsplit("/", 2)[0]
    assert put(f"{root}/", {"id": "q1", "answer": "yes"}) == 404
    assert load_answers(folder / "a.json").answers == {"q2": "no"}
    with urllib.request.urlopen(f"{server.address}answers", timeout=10) as given:
        assert json.load(given) == {"q2": "no"}
    assert server.address.startswith("http://127.0.0.1:")
    with pytest.raises(DataError, match="answers of 'bob', not of 'carol'"):
        AnnotationServer(items, folder / "a.json", annotator="carol")
    with pytest.raises(DataError, match="about other captions"):
        AnnotationServer(items[:2], folder / "a.json", annotator="bob")
    port = int(server.address.split(":")[2].split("/")[0])
    with pytest.raises(SpecError, match="cannot be used"):
        AnnotationServer(items, folder / "b.json", annotator="bob", port=port)
