"""A run directory is read as it is, or refused with file, line and field."""

import json

import pytest

from peft_mllm.errors import DataError
from peft_mllm.files import sealed_json
from peft_mllm.study.results import find_results, read_result, read_results
from study_samples import SEEN, TASK, write_run, write_study


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path, "lora", accuracy=90, n=20)


def change(run, **changes):
    content = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(content | changes))


def test_everything_is_read(run):
    result = read_result(run)
    assert result.method.name == "lora"
    assert result.trainable_parameters == 9000
    assert result.scores[TASK].headline == 90
    assert result.scores[TASK].unit == "%"
    assert len(result.predictions[TASK]) == 20
    assert sum(line.score for line in result.predictions[TASK]) == 18
    assert [point.step for point in result.points if point.eval_loss] == [50, 100, 150]
    assert not result.is_zero_shot


def test_zero_shot_has_nothing_trained(tmp_path):
    result = read_result(write_run(tmp_path, "zero-shot", parameters=0))
    assert result.is_zero_shot
    assert result.seconds == 0
    assert result.points == []


def test_step_written_twice_counts_once(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 150, "loss": 7.0}\n')
    assert [point.loss for point in read_result(run).points if point.step == 150 and point.loss] == [7.0]


def test_sealed_result_is_verified(run):
    content = json.loads((run / "result.json").read_text())
    (run / "result.json").write_bytes(sealed_json(content))
    assert read_result(run).name == "lora"
    (run / "result.json").write_bytes(sealed_json(content).replace(b'"lora"', b'"lorb"', 1))
    with pytest.raises(DataError, match="does not match its sha256"):
        read_result(run)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "schema 2, and this version reads 1"),
        ({"method": {}}, r"method\.name"),
        ({"seed": "many"}, "seed"),
    ],
)
def test_what_does_not_fit_is_named(run, changes, reason):
    change(run, **changes)
    with pytest.raises(DataError, match=reason):
        read_result(run)


def test_broken_prediction_has_its_line(run):
    file = run / "predictions" / f"{TASK}.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = '{"id": "x"'
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=rf"{TASK}\.jsonl:3"):
        read_result(run)


def test_named_predictions_must_be_there(run):
    (run / "predictions" / f"{TASK}.jsonl").unlink()
    with pytest.raises(DataError, match=r"missing, yet result\.json names it"):
        read_result(run)


def test_predictions_stay_in_the_run(run):
    scores = json.loads((run / "result.json").read_text())["scores"]
    scores[TASK]["predictions"] = "../../secret.jsonl"
    change(run, scores=scores)
    with pytest.raises(DataError, match="not in the run's directory"):
        read_result(run)


def test_runs_are_found_below_a_folder(tmp_path):
    written = write_study(tmp_path)
    assert find_results(tmp_path) == sorted(written)
    assert read_results(written)[0].name == "zero-shot"
    assert set(read_result(written[0]).scores) == {TASK, *SEEN}


def test_folder_without_runs(tmp_path):
    with pytest.raises(DataError, match="Run `peft-mllm train` or `study` first"):
        find_results(tmp_path / "absent")
