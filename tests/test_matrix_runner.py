"""The workers of `peft-mllm matrix`: pairs that hang or crash, going on after a stop, and the command itself."""

from __future__ import annotations

import json
import sys
import time

import pytest

import runs
from peft_mllm.errors import Interrupted, MethodError, ModelError
from peft_mllm.matrix import make, runner
from peft_mllm.matrix.candidates import candidates
from peft_mllm.matrix.make import chosen_candidates, chosen_members
from peft_mllm.matrix.members import members
from peft_mllm.matrix.page import mark, page
from peft_mllm.matrix.probes import PROBES
from peft_mllm.matrix.result import Matrix, Pair
from peft_mllm.matrix.runner import Worker, WorkerError, probe
from peft_mllm.screen import Screen

SCRIPT = """
import json, os, sys, time
say = lambda value: (sys.stdout.write(json.dumps(value) + "\\n"), sys.stdout.flush())
if sys.argv[1] == "dead": sys.exit(1)
say({"ready": True})
for line in sys.stdin:
    name = json.loads(line)["candidate"]
    say({"probe": "attaches", "state": "ok", "reason": ""})
    if name == "hangs": time.sleep(60)
    if name == "crashes": os.abort()
    say({"probe": "computes", "state": "failed", "reason": "no"})
    say({"done": {"family": "f", "model_type": str(os.getpid())}})
"""


def command(kind: str = "alive") -> tuple[str, ...]:
    return (sys.executable, "-c", SCRIPT, kind)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(runner, "Worker", lambda: Worker(command()))


def tried(names, journal, **more):
    return probe([(name, "m") for name in names], journal, jobs=2, screen=Screen(quiet=True), **more)


def test_a_hang_or_a_crash_is_a_verdict_and_loses_no_other_pair(fake, tmp_path):
    names = ["one", "crashes", "two", "hangs", "three"]
    found = {pair.candidate: pair for pair, _ in tried(names, tmp_path / "j", seconds=3)}
    assert list(found) == names
    for name in ("one", "two", "three"):
        assert (found[name].ok, found[name].failed) == (("attaches",), {"computes": "no"})
    assert found["hangs"].failed == {"computes": "it took longer than 3 seconds"}
    assert found["crashes"].failed == {"computes": "the process ended with code -6"}
    # what came after was not tried, and says so
    assert set(found["crashes"].none) == set(PROBES) - {"attaches", "computes"}
    assert "not tried" in found["crashes"].none["merges"]


def test_what_is_done_is_not_done_again(fake, tmp_path, monkeypatch):
    first = tried(["one", "two"], tmp_path / "j")
    with (tmp_path / "j").open("a") as file:
        file.write('{"candidate": "thr')  # a line that a kill has cut
    again = tried(["one", "two", "three"], tmp_path / "j")
    assert again[:2] == first  # process ids and all
    assert again[2][1]["model_type"] not in {facts["model_type"] for _, facts in first}
    monkeypatch.setattr(runner, "made_with", lambda: {"versions": {}, "code": "other"})
    anew = tried(["one"], tmp_path / "j")
    assert anew != first[:1]
    assert len((tmp_path / "j").read_text().splitlines()) == 2


def test_what_it_was_made_with_is_its_versions_and_all_code(tmp_path):
    made = runner.made_with()
    assert set(made["versions"]) == {"peft", "transformers", "torch"}
    assert made == runner.made_with()


def test_a_worker_that_does_not_start_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Worker", lambda: Worker(command("dead")))
    with pytest.raises(WorkerError, match="does not start"):
        tried(["one", "two"], tmp_path / "j")


def test_a_stop_ends_at_once_and_keeps_what_is_done(fake, tmp_path, monkeypatch):
    asked = iter([False] * 3)

    class Stop:
        def __enter__(self):
            return lambda: next(asked, True)

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(runner, "stop_requests", Stop)
    began = time.monotonic()
    with pytest.raises(Interrupted):
        tried(["one", "hangs", "hangs too", "two", "hangs"], tmp_path / "j", seconds=50)
    assert time.monotonic() - began < 20


# What is asked for, and the page


def test_words_choose_candidates():
    assert list(chosen_candidates(["lora"])) == ["lora", "lora rslora", "lora dora", "lora pissa"]
    assert list(chosen_candidates(["VERA", "prefix projection"])) == ["prefix projection", "peft VERA"]
    assert list(chosen_candidates([])) == list(candidates())
    with pytest.raises(MethodError, match="Did you mean 'lora'"):
        chosen_candidates(["loora"])


def test_words_choose_models():
    assert chosen_members([]) == members()
    assert chosen_members(["llava"]) == ["llava"]
    with pytest.raises(ModelError, match="Did you mean 'llava'"):
        chosen_members(["lava"])


def test_quick_tries_most_methods_on_one_model_only(tmp_path, monkeypatch):
    asked = []

    def nothing(names, journal, **more):
        asked.extend(names)
        return [(Pair(*name), {"family": "f", "model_type": "t"}) for name in names]

    monkeypatch.setattr(make, "probe", nothing)
    made = make.make_matrix(tmp_path, jobs=1, quick=True, quiet=True)
    first = members()[0]
    assert [name for name, member in asked if member == first] == list(candidates())
    assert {name for name, member in asked if member != first} == set(make.QUICK)
    assert [pair.candidate for pair in made.pairs] == sorted((name for name, _ in asked), key=list(candidates()).index)


def small(*pairs: Pair) -> Matrix:
    return Matrix(
        made="2026-01-01",
        versions={"peft": "1", "transformers": "2", "torch": "3"},
        probes={"attaches": "It attaches.", "trains": "It trains.", "merges": "It merges."},
        candidates={"a": {"method": "a", "marks": {}}, "b": {"method": "b", "marks": {}}},
        members={"m": {"family": "f", "model_type": "t"}, "n": {"family": "f", "model_type": "u"}},
        pairs=pairs,
    )


def test_a_cell_says_what_a_user_can_do():
    assert mark(Pair("a", "m", ok=("attaches",))) == "ok"
    assert mark(Pair("a", "m", ok=("attaches",), failed={"merges": "no"})) == "-merges"
    assert mark(Pair("a", "m", ok=("attaches",), failed={"trains": "no", "merges": "no"})) == "no"
    assert mark(Pair("a", "m", failed={"attaches": "no"})) == "no"
    assert mark(Pair("a", "m", none={"attaches": "no library"})) == "."
    assert mark(None) == ""


def test_the_page_has_every_pair_and_every_reason():
    made = page(
        small(
            Pair("a", "m", ok=("attaches", "trains"), failed={"merges": "wrong weights"}),
            Pair("a", "n", ok=("attaches", "trains", "merges")),
            Pair("b", "m", ok=("attaches",), failed={"trains": "no gradient"}, none={"merges": "nothing"}),
            Pair("b", "n", ok=("attaches",), failed={"trains": "no gradient"}, none={"merges": "nothing"}),
        )
    )
    lines = made.splitlines()
    assert "| a      | -merges | ok |" in lines
    assert "| b      | no      | no |" in lines
    assert "| a      | yes      | yes    | some   |" in lines
    assert "| b      | yes      | no     | .      |" in lines
    assert "- merges (m): wrong weights" in lines
    assert "- trains (all): no gradient" in lines
    assert lines[lines.index("- merges: nothing") + 1] == "  - b (all)"
    tables = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in tables[:4]}) == 1  # columns of one width, for those who read the source


def test_a_matrix_is_read_as_it_was_written(tmp_path):
    matrix = small(Pair("a", "m", ok=("attaches",), failed={"trains": 'a "reason"'}), Pair("a", "n"))
    matrix.write(tmp_path / "matrix.json")
    assert Matrix.read(tmp_path / "matrix.json") == matrix
    assert json.loads((tmp_path / "matrix.json").read_text())["pairs"][0]["candidate"] == "a"
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no matrix"):
        Matrix.read(tmp_path / "other.json")


@pytest.mark.slow
def test_the_command_tries_writes_and_says(tmp_path):
    """With real workers, on the smallest pair there is."""
    told = ["--methods", "none,POLY", "--families", "llava", "--output", tmp_path, "--jobs", "1"]
    done = runs.command("matrix", *told, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    none, poly = said["pairs"]
    assert (none["candidate"], none["failed"]) == ("none", {})
    assert {"computes", "generates", "reloads", "connector"} <= set(none["ok"])
    assert "task_ids" in poly["failed"]["computes"]
    assert poly["ok"] == ["attaches"]
    assert said["members"] == {"llava": {"family": "llava", "model_type": "llava"}}
    assert Matrix.read(tmp_path / "matrix.json").to_json()["pairs"] == tuple(
        pair | {"ok": tuple(pair["ok"])} for pair in said["pairs"]
    )
    assert "| peft POLY | no    |" in (tmp_path / "matrix.md").read_text().splitlines()
    done = runs.command("matrix", *told)
    assert "2 pairs, 1 of them with something that fails" in done.out
    assert "peft POLY on llava: computes" in done.out


def test_an_unknown_name_is_one_message(tmp_path):
    done = runs.command("matrix", "--methods", "loora", "--output", tmp_path / "out")
    assert done.code == 2
    assert "Did you mean 'lora'" in done.err
    assert not (tmp_path / "out").exists()
