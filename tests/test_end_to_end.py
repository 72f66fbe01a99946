"""From a command to predictions, score and result, on real samples; and every mistake a user makes on the way."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import peft_mllm
from own_data import chat, image, jsonl, llava
from peft_mllm.assets import EMBEDDED
from peft_mllm.models import MODELS
from peft_mllm.rundir import RunDir
from runs import Said, checkpoints, command, lines, read, status, tiny, weights, write_spec

METHODS = {
    "lora": {"rank": 4, "alpha": 8},
    "ia3": {},
    "adapter": {"bottleneck": 8},
    "prefix": {"virtual_tokens": 4},
}
FEW = {
    "max_steps": 2,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
    "eval_strategy": "no",
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def scienceqa(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real problems in the official layout; the samples have images of the test split only, so that is divided."""
    real = cases / "data" / "scienceqa"
    root = tmp_path_factory.mktemp("science qa")
    problems, splits = read(real / "problems.json"), read(real / "pid_splits.json")
    with_image = [
        pid
        for pid in splits["test"]
        if problems[pid]["image"] and (real / "images/test" / pid / problems[pid]["image"]).is_file()
    ]
    text = [pid for pid in splits["test"] if not problems[pid]["image"]]
    chosen = {
        "train": with_image[:3] + text[:3],
        "val": with_image[3:5] + text[3:5],
        "test": with_image[5:8] + text[5:8],
    }
    for split, pids in chosen.items():
        for pid in pids:
            if problems[pid]["image"]:
                shutil.copytree(real / "images/test" / pid, root / "images" / split / pid)
    (root / "problems.json").write_text(json.dumps({p: problems[p] for pids in chosen.values() for p in pids}))
    (root / "pid_splits.json").write_text(json.dumps(chosen))
    return root


def assert_complete(run: Path, said: Said, task: str) -> dict[str, Any]:
    """Predictions, a score that is their mean, a result that verifies, and the word of warning."""
    assert said.code == 0, said.err
    assert "mean nothing" in said.out + said.err
    result = RunDir(run).result()
    assert result is not None
    assert any("mean nothing" in note for note in result["notes"])
    score = result["scores"][task]
    answers = lines(run / score["predictions"])
    assert len(answers) == score["n"] > 0
    mean = sum(line["score"] for line in answers) / len(answers)
    assert next(iter(score["values"].values())) == pytest.approx(100 * mean)
    assert len({line["id"] for line in answers}) == len(answers)
    assert score["unparsed"] == sum(line["parsed"] is None for line in answers)
    for key in ("versions", "environment"):
        if key in result:
            assert result[key]["torch"]
    assert result["peak_memory_bytes"] > 0
    assert math.isfinite(result["training"]["seconds"])
    assert result["data"]["train"]["fingerprint"]
    assert sum(part["parameters"] for part in result["trainable"].values()) > 0
    assert weights(run)
    return result


# --- real samples ---


@pytest.mark.parametrize("method", METHODS)
def test_iconqa(tmp_path, cases, method):
    task = {"name": "iconqa_txt" if method in ("lora", "ia3") else "iconqa_blank"}
    root = cases / "data" / "iconqa_examples"
    data = {"max_train_samples": 4, "max_eval_samples": 3}
    spec = tiny(
        tmp_path / "run", model="embedded", method={"name": method, **METHODS[method]},
        task={**task, "root": str(root)}, data=data, train=FEW,
    )  # fmt: skip
    said = command("train", write_spec(tmp_path / "spec.yaml", spec))
    result = assert_complete(tmp_path / "run", said, task["name"])
    assert result["training"]["steps"] == 2


@pytest.mark.parametrize("method", METHODS)
def test_scienceqa(tmp_path, scienceqa, method):
    task = {"name": "scienceqa", "root": str(scienceqa)}
    spec = tiny(tmp_path / "run", model="embedded", method={"name": method, **METHODS[method]}, task=task, train=FEW)
    said = command("train", write_spec(tmp_path / "spec.yaml", spec), "train.eval_strategy=epoch")
    result = assert_complete(tmp_path / "run", said, "scienceqa")
    assert {line["answer"] for line in lines(tmp_path / "run/predictions/scienceqa.jsonl")} <= set("ABCDE")
    assert any(name.startswith("accuracy/") for name in result["scores"]["scienceqa"]["values"])


def test_a_random_llava_at_336_pixels(tmp_path, cases):
    task = {"name": "iconqa_blank", "root": str(cases / "data" / "iconqa_examples")}
    data = {"max_train_samples": 2, "max_eval_samples": 2}
    spec = tiny(tmp_path / "run", model="tiny:llava@336", task=task, data=data, train={**FEW, "max_steps": 1})
    result = assert_complete(
        tmp_path / "run", command("train", write_spec(tmp_path / "spec.yaml", spec)), "iconqa_blank"
    )
    assert result["training"]["tokens"] > 2 * 576


# --- evaluate ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the embedded base, of a task it knows beside one it does not."""
    folder = tmp_path_factory.mktemp("trained here")
    task = {"name": "scenes_blank", "size": {"train": 8, "validation": 2, "test": 6}}
    other = {"name": "scenes_at", "size": {"train": 1, "validation": 0, "test": 6}}
    spec = tiny(folder / "run", model="embedded", task=task, evaluate=[other], train=FEW, connector="tuned")
    said = command("train", write_spec(folder / "spec.yaml", spec))
    assert_complete(folder / "run", said, "scenes_blank")
    return folder / "run"


def test_evaluating_a_run_gives_its_own_scores(tmp_path, trained):
    said = command("evaluate", trained, "--json", "--output", tmp_path / "scores here")
    assert said.code == 0, said.err
    scores = json.loads(said.out)
    result = read(trained / "result.json")["scores"]
    assert set(scores) == {"scenes_blank", "scenes_at"}
    for name, score in scores.items():
        assert score["values"] == result[name]["values"]
        answers = lines(tmp_path / "scores here" / score["predictions"])
        assert answers == lines(trained / result[name]["predictions"])
    assert read(tmp_path / "scores here" / "scores.json")["scores"] == scores


def test_evaluating_its_peft_directory_is_the_same(trained):
    task = "{name: scenes_blank, size: {train: 0, test: 6}}"
    by_name = command("evaluate", trained / "adapter", "--base", "embedded", "--task", task, "--json")
    assert by_name.code == 0, by_name.err
    by_config = command("evaluate", trained / "adapter", "--task", task, "--json")
    assert by_config.code == 0, by_config.err
    expected = read(trained / "result.json")["scores"]["scenes_blank"]["values"]
    said = command("evaluate", trained / "adapter", "--task", task)
    assert "mean nothing" in said.out  # though the adapter names its base by a path
    for said in (by_name, by_config):
        assert json.loads(said.out)["scenes_blank"]["values"] == expected


def test_evaluating_the_base(trained):
    task = "{name: scenes_at, size: {train: 0, test: 40}}"
    said = command("evaluate", "embedded", "--task", task, "--json")
    assert json.loads(said.out)["scenes_at"]["values"]["accuracy"] >= 90
    few = command("evaluate", "embedded", "--task", task, "--limit", "3")
    assert few.code == 0
    assert "scenes_at" in few.out
    assert "mean nothing" in few.out


@pytest.mark.parametrize("method", ["full", "none"])
def test_evaluating_a_run_without_an_adapter(tmp_path, method):
    spec = tiny(tmp_path / "run", model="embedded", method=method, train=FEW)
    result = peft_mllm.train(spec, quiet=True)
    said = command("evaluate", tmp_path / "run", "--json")
    assert json.loads(said.out)["scenes_at"]["values"] == result["scores"]["scenes_at"]["values"]
    assert "mean nothing" in command("evaluate", tmp_path / "run").out


def test_json_is_one_object_on_stdout_and_nothing_else(tmp_path):
    spec = write_spec(tmp_path / "spec.yaml", tiny(tmp_path / "run", train=FEW))
    fresh, again = (command("train", spec, "--json") for _ in range(2))
    for said in (fresh, again):
        assert said.code == 0, said.err
        assert json.loads(said.out)["scores"].keys() == {"scenes_at"}
    assert json.loads(fresh.out) == json.loads(again.out)


def test_relative_paths_and_spaces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        image(tmp_path / "my data" / "the images" / f"{i} .png", (50 * i, 0, 0))
    records = [llava(image=f"{i} .png", id=str(i)) for i in range(4)]
    Path("my data/all of it.json").write_text(json.dumps(records))
    data = "my data/all of it.json"
    task = {"name": "custom", "train": data, "test": data, "image_root": "my data/the images"}
    write_spec(tmp_path / "a spec.yaml", tiny(Path("runs/a run"), task=task, train=FEW))
    said = command("train", "a spec.yaml")
    assert said.code == 0, said.err
    assert (tmp_path / "runs/a run/result.json").is_file()
    monkeypatch.chdir("/")
    again = command("train", tmp_path / "a spec.yaml", f"output_dir={tmp_path / 'runs/a run'}")
    assert again.code == 0
    assert "is finished" in again.err


# --- mistakes: one clear message with place and remedy, the right exit code, no traceback ---


def assert_clear(said: Said, code: int, *words: str) -> None:
    assert said.code == code, said.err
    assert "Traceback" not in said.err
    assert "defect of peft-mllm" not in said.err
    flat = " ".join(said.err.split())
    for word in words:
        assert word in flat, f"{word!r} is not in: {said.err}"


@pytest.fixture
def own(tmp_path: Path) -> Callable[[], Said]:
    """Eight good records with JPEGs; a test breaks something, and calls what it is given to train on them."""
    (tmp_path / "images").mkdir()
    for i in range(8):
        image(tmp_path / "images" / f"{i}.jpg", (30 * i, 90, 10), size=(64, 48))
    records = [chat(answer=f"It is {i}.", id=f"r{i}", images=[f"images/{i}.jpg"]) for i in range(8)]
    data = jsonl(tmp_path / "data.jsonl", records)
    good = jsonl(tmp_path / "good.jsonl", records[:1])
    task = {"name": "custom", "train": str(data), "test": str(good)}
    spec = write_spec(tmp_path / "spec.yaml", tiny(tmp_path / "run", task=task, train=FEW))
    return lambda *words: command("train", spec, *words)


def missing_image(folder: Path) -> tuple[str, ...]:
    (folder / "images" / "6.jpg").unlink()
    return "data.jsonl:7", "images/6.jpg", "image-missing"


def truncated_jpeg(folder: Path) -> tuple[str, ...]:
    path = folder / "images" / "6.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    return "data.jsonl:7", "images/6.jpg", "truncated"


def broken_json(folder: Path) -> tuple[str, ...]:
    rows = (folder / "data.jsonl").read_text().splitlines()
    rows[6] = rows[6][:-5]
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    return "data.jsonl:7", "JSON breaks at column"


def missing_data(folder: Path) -> tuple[str, ...]:
    (folder / "data.jsonl").rename(folder / "data.json")
    return "data.jsonl", "Check the path"


def empty_data(folder: Path) -> tuple[str, ...]:
    (folder / "data.jsonl").write_text("")
    return "data.jsonl", "no records"


def too_long(folder: Path) -> tuple[str, ...]:
    records = [json.loads(row) for row in (folder / "data.jsonl").read_text().splitlines()]
    records[6]["messages"][1]["content"] = "very " * 3000
    jsonl(folder / "data.jsonl", records)
    return "data.jsonl:7", "tokens", "max_length"


BAD_DATA = [missing_image, truncated_jpeg, broken_json, missing_data, empty_data, too_long]


ALIKE = (truncated_jpeg, too_long)  # findings of one record, as a missing image is


@pytest.mark.parametrize("mistake", [pytest.param(f, marks=[pytest.mark.slow] * (f in ALIKE)) for f in BAD_DATA])
def test_bad_data(tmp_path, own, mistake):
    words = mistake(tmp_path)
    said = own()
    assert_clear(said, 65, *words)
    assert status(tmp_path / "run")["exit_code"] == 65
    assert checkpoints(tmp_path / "run") == []
    other = own("task.on_bad_data=quarantine", f"output_dir={tmp_path / 'other'}")
    if mistake in (missing_data, empty_data):  # there is nothing to leave out
        assert_clear(other, 65, *words)
        return
    assert other.code == 0, other.err
    assert "read 8 = used 7 + quarantined 1" in other.err
    account = read(tmp_path / "other" / "result.json")["data"]["train"]
    assert (account["read"], account["used"], account["quarantined"]) == (8, 7, 1)


def test_a_spec_that_failed_before_training_can_be_mended(tmp_path, own):
    """Nothing was trained: the same command with the mistake mended must not ask to delete the directory."""
    assert own("method.rank=4", "train.optim=nonsense").code == 2
    said = own("method.rank=4")
    assert said.code == 0, said.err


def test_questions_left_out_of_a_test_are_in_the_result(tmp_path, own):
    """A score over fewer questions than the file has must say so, not only while it runs."""
    records = [chat(id=f"t{i}", images=[f"images/{i}.jpg"]) for i in range(4)]
    records[2]["images"] = ["images/none.jpg"]
    test = jsonl(tmp_path / "test.jsonl", records)
    said = own("task.on_bad_data=quarantine", f"task.test={test}")
    assert said.code == 0, said.err
    result = read(tmp_path / "run" / "result.json")
    assert result["scores"]["custom"]["n"] == 3
    assert "quarantined" in json.dumps([result["scores"], {k: v for k, v in result["data"].items() if k != "train"}])


def test_bad_validation_and_test_data_are_found_before_training(tmp_path, own):
    bad = jsonl(tmp_path / "bad.jsonl", [chat(id="a", images=["images/none.jpg"])])
    for split in ("validation", "test"):
        place = tmp_path / split
        assert_clear(own(f"task.{split}={bad}", f"output_dir={place}"), 65, "bad.jsonl:1", "images/none.jpg")
        assert checkpoints(place) == []


MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "misspelt key": (("train.learnin_rate=1",), ("train.learnin_rate", "Did you mean 'learning_rate'?")),
    "misspelt option": (("method.rnk=2",), ("method.rnk", "Did you mean 'rank'?")),
    "unknown task": (("task=iconqa_tx",), ("'iconqa_tx'", "Did you mean 'iconqa_txt'?")),
    "unknown method": (("method=lorra",), ("'lorra'", "Did you mean 'lora'?")),
    "text for a number": (("train.learning_rate='1e-4'",), ("train.learning_rate", "number")),
    "no value": (("train.learning_rate",), ("key=value",)),
    "broken YAML": (("method={name: lora",), ("method={name: lora",)),
    "key below a value": (("seed.more=1",), ("seed",)),
    "a number as method": (("method=3",), ("method",)),
    "unknown family": (("model.family=lava",), ("'lava'", "Did you mean 'llava'?")),
    "unknown tiny family": (("model=tiny:lava",), ("lava", "Did you mean 'llava'?")),
    "location without effect": (("method=prefix", "method.location=mlp"), ("location",)),
    "unknown peft type": (("method={name: peft, type: LORRA, config: {}}",), ("LORRA",)),
    "missing model": (("model=./nowhere",), ("./nowhere", "config.json")),
    "missing hub id": (("model=nobody/nothing",), ("nobody/nothing", "config.json")),
    "tracker": (("train.report_to=[wandb]",), ("wandb", "pip install")),
    "optimizer": (("train.optim=adamw",), ("train.optim", "Did you mean 'Adam")),
    "schedule": (("train.lr_scheduler_type=cosin",), ("train.lr_scheduler_type",)),
    "attention": (("model={path: embedded, attn_implementation: flash}",), ("flash",)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_the_command_line(tmp_path, mistake):
    overrides, words = MISTAKES[mistake]
    spec = write_spec(tmp_path / "spec.yaml", tiny(tmp_path / "run", train=FEW))
    said = command("train", spec, *overrides)
    assert_clear(said, 2, *words)
    assert not (tmp_path / "run" / "adapter").exists()
    assert len(said.err.strip().splitlines()) <= 12


def test_mistakes_in_the_file_name_its_lines(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("method: lora\ntask: scenes_at\ntrian:\n  max_steps: 1\nseed: one\noutput_dir: x\n")
    said = command("train", spec)
    assert_clear(said, 2, f"{spec}:3: unknown key 'trian'. Did you mean 'train'?", f"{spec}:5: seed")
    spec.write_text("method: lora\ntask: scenes_at\n  seed: [\n")
    assert_clear(command("train", spec), 2, f"{spec}:")
    spec.write_text("method: lora\nmethod: ia3\n")
    assert_clear(command("train", spec), 2, f"{spec}:2", "said twice")
    assert_clear(command("train", tmp_path / "none.yaml"), 2, "none.yaml")
    assert_clear(command("train", tmp_path), 2, str(tmp_path))


NO_SPECS = [b"\xff\xfe\x00", b"method: \x07", b"just words", b"- a\n- b\n", b"? [a, b]\n: c\n", b"a: &x [*x]\n"]


@pytest.mark.parametrize("content", NO_SPECS)
def test_a_file_that_is_no_spec(tmp_path, content):
    (tmp_path / "spec.yaml").write_bytes(content)
    assert_clear(command("train", tmp_path / "spec.yaml"), 2, str(tmp_path / "spec.yaml"))


def test_a_missing_data_set(tmp_path):
    spec = write_spec(tmp_path / "spec.yaml", tiny(tmp_path / "run"))
    for name in ("iconqa_txt", "scienceqa"):
        task = f"task={{name: {name}, root: {tmp_path / 'no'}}}"
        said = command("train", spec, task, f"output_dir={tmp_path / name}")
        assert_clear(said, 65, str(tmp_path / "no"), "Download")
    assert_clear(command("train", spec, "task=scienceqa"), 2, "root", "missing")


def test_a_model_directory_without_config(tmp_path):
    (tmp_path / "model").mkdir()
    spec = write_spec(tmp_path / "spec.yaml", tiny(tmp_path / "run"))
    assert_clear(command("train", spec, f"model={tmp_path / 'model'}"), 2, str(tmp_path / "model"), "config.json")
    said = command("evaluate", tmp_path / "model", "--task", "scenes_at")
    assert_clear(said, 2, str(tmp_path / "model"), "config.json")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    assert_clear(command("train", spec, f"model={tmp_path / 'model'}"), 2, "bert", "llava")
    shutil.copy(EMBEDDED / "config.json", tmp_path / "model")
    assert_clear(command("train", spec, f"model={tmp_path / 'model'}"), 2, str(tmp_path / "model"))


def test_an_adapter_of_another_base(tmp_path, trained):
    MODELS["llava"].tiny().save(tmp_path / "other base")
    words = ("--base", tmp_path / "other base", "--task", "scenes_at", "--limit", "1")
    said = command("evaluate", trained / "adapter", *words)
    assert_clear(said, 2, "adapter", "base")
    assert len(said.err) < 2000, "a wall of tensor names"


EVALUATE: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "nothing there": (("./nothing", "--task", "scenes_at"), 2, ("./nothing",)),
    "no task": (("embedded",), 2, ("peft-mllm list tasks",)),
    "unknown task": (("RUN", "--task", "scenes_att"), 2, ("Did you mean 'scenes_at'?",)),
    "a base for a run": (("RUN", "--base", "embedded"), 2, ("base",)),
    "a base for a model": (("embedded", "--base", "embedded"), 2, ("adapter_config.json",)),
    "broken YAML": (("RUN", "--task", "{name: ["), 2, ("{name: [",)),
    "no file": (("RUN", "--limit", "1", "--output", "SPEC/scores"), 74, ("scores",)),
    "no test split": (("RUN", "--task", "{name: custom, train: x.json}"), 65, ("test",)),
    "task twice": (("RUN", "--task", "scenes_at", "--task", "scenes_at"), 2, ("scenes_at",)),
}


@pytest.mark.parametrize("mistake", EVALUATE)
def test_a_mistake_of_evaluate(trained, mistake):
    words, code, said = EVALUATE[mistake]
    places = {"RUN": str(trained), "SPEC": str(trained.parent / "spec.yaml")}
    for name, place in places.items():
        words = tuple(word.replace(name, place) for word in words)
    assert_clear(command("evaluate", *words), code, *said)


def test_a_run_that_is_not_finished(tmp_path, own):
    missing_image(tmp_path)
    own()
    assert_clear(command("evaluate", tmp_path / "run"), 2, "not finished", "Train it first")


# --- data check ---


@pytest.mark.parametrize("mistake", [missing_image, truncated_jpeg, broken_json])
def test_data_check(tmp_path, own, mistake):
    words = mistake(tmp_path)
    assert_clear_out(command("data", "check", tmp_path / "data.jsonl"), *words)
    said = command("data", "check", tmp_path / "data.jsonl", "--json", "--quarantine")
    assert said.code == 65, said.err
    report = json.loads(said.out)
    assert (report["read"], report["used"], report["quarantined"]) == (8, 7, 1)
    assert [finding["line"] for finding in report["findings"]] == [7]
    assert len(lines(tmp_path / "data.clean.jsonl")) == 7
    (aside,) = lines(tmp_path / "data.quarantine.jsonl")
    assert aside["line"] == 7
    assert command("data", "check", tmp_path / "data.clean.jsonl").code == 0


def assert_clear_out(said: Said, *words: str) -> None:
    """Findings are what `data check` is asked for: they are on standard output."""
    assert said.code == 65
    for word in (*words, "read 8 = used 7 + quarantined 1"):
        assert word in said.out
    assert "Traceback" not in said.err


def test_data_check_of_all_bad_things_at_once(tmp_path, own):
    missing_image(tmp_path)
    path = tmp_path / "images" / "3.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    rows = (tmp_path / "data.jsonl").read_text().splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join([rows[0][:-3], *rows[1:]]) + "\n")
    said = command("data", "check", tmp_path / "data.jsonl", "--json")
    assert said.code == 65
    assert [finding["line"] for finding in json.loads(said.out)["findings"]] == [1, 4, 7]


def test_data_check_of_what_is_no_data(tmp_path):
    assert_clear(command("data", "check", tmp_path / "none.jsonl"), 65, "none.jsonl")
    (tmp_path / "text.txt").write_text("hello")
    assert command("data", "check", tmp_path / "text.txt").code == 65
    said = command("data", "check", tmp_path / "text.txt", "--quarantine")
    assert said.code == 65
    assert "Traceback" not in said.err


def test_data_check_with_a_model_finds_long_samples(tmp_path, own):
    too_long(tmp_path)
    assert command("data", "check", tmp_path / "data.jsonl").code == 0
    said = command("data", "check", tmp_path / "data.jsonl", "--model", "tiny:llava")
    assert_clear_out(said, "data.jsonl:7")
