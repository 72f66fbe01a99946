"""A run directory is read as it is, or refused with file, line and field."""

import json
import pickle
import shutil
import time

import pytest

from peft_mllm.errors import DataError
from peft_mllm.files import sealed_json
from peft_mllm.study.results import find_results, read_result
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
        read_result(run).predictions[TASK]


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
    assert read_result(written[0]).name == "zero-shot"
    assert set(read_result(written[0]).scores) == {TASK, *SEEN}


def test_folder_without_runs(tmp_path):
    with pytest.raises(DataError, match="Run `peft-mllm train` or `study` first"):
        find_results(tmp_path / "absent")


# --- what studies need ---


def test_predictions_are_read_when_they_are_asked_for(run):
    result = read_result(run)
    file = run / "predictions" / f"{TASK}.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:7]) + "\n")  # changed after the result was read, and before its predictions
    assert set(result.predictions) == {TASK, *SEEN}
    assert TASK in result.predictions
    assert len(result.predictions[TASK]) == 7
    assert result.predictions[TASK] is result.predictions[TASK]
    assert result.predictions.get("absent") is None
    assert pickle.loads(pickle.dumps(result)).predictions[TASK] == result.predictions[TASK]  # noqa: S301 - our own


def test_grades_are_the_scores_of_the_predictions(run):
    result = read_result(run)
    ids, scores = result.predictions.grades(TASK)
    assert ids == tuple(line.id for line in result.predictions[TASK])
    assert scores.tolist() == [line.score for line in result.predictions[TASK]]
    again = result.predictions.grades(TASK)
    assert (again[0], again[1].tolist()) == (ids, scores.tolist())


def test_a_task_without_a_file_has_no_predictions(run):
    scores = json.loads((run / "result.json").read_text())["scores"]
    scores[TASK]["predictions"] = None
    change(run, scores=scores)
    predictions = read_result(run).predictions
    assert predictions[TASK] == []
    assert predictions.grades(TASK)[0] == ()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "x"', "is not JSON"),
        ('{"id": "x", "score": 1.0}, {"id": "y", "score": 1.0}', "is not JSON"),
        ('{"id": "x", "prediction": "a", "answer": "a"}', "score"),
        ('{"id": 3, "prediction": "a", "answer": "a", "score": 1}', "id: Input should be a valid string"),
        ("", "is not JSON"),
    ],
)
@pytest.mark.parametrize("way", ["predictions", "grades"])
def test_a_line_that_does_not_fit_is_named_whichever_way_it_is_read(run, line, reason, way):
    file = run / "predictions" / f"{TASK}.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = line
    file.write_text("\n".join(lines) + "\n")
    predictions = read_result(run).predictions
    with pytest.raises(DataError, match=rf"{TASK}\.jsonl:5: .*{reason}"):
        predictions[TASK] if way == "predictions" else predictions.grades(TASK)


def test_a_torn_last_line_is_none(run):
    with (run / "predictions" / f"{TASK}.jsonl").open("a") as file:
        file.write('{"id": "torn')
    assert len(read_result(run).predictions[TASK]) == 20


def test_half_a_surrogate_pair_is_read_as_the_writer_wrote_it(run):
    """JSON may hold it as an escape, which no strict reader takes; the file is ours all the same."""
    file = run / "predictions" / f"{TASK}.jsonl"
    with file.open("a") as lines:
        lines.write('{"id": "half", "prediction": "\\ud800", "answer": "a", "score": 0.0}\n')
    ids, _ = read_result(run).predictions.grades(TASK)
    assert ids[-1] == "half"


def point(step, best, scores):
    return {"step": step, "epoch": step / 50, "eval_loss": 0.5, "best": best, "scores": scores}


def test_the_curve_is_read_with_its_predictions(run):
    scores = json.loads((run / "result.json").read_text())["scores"]
    later = run / "predictions" / "step-00000150"
    later.mkdir()
    shutil.copy(run / "predictions" / f"{TASK}.jsonl", later)
    moved = {TASK: {**scores[TASK], "predictions": f"predictions/step-00000150/{TASK}.jsonl"}}
    change(run, curve=[point(100, True, scores), point(150, False, moved)])
    best, last = read_result(run).curve
    assert (best.step, best.epoch, best.eval_loss, best.best) == (100, 2.0, 0.5, True)
    assert set(best.predictions) == {TASK, *SEEN}
    assert last.scores[TASK].headline == 90
    assert len(last.predictions[TASK]) == 20
    shutil.rmtree(later)
    with pytest.raises(DataError, match=r"step-00000150.*missing, yet result\.json names it"):
        read_result(run)


@pytest.mark.parametrize(
    ("curve", "reason"),
    [([{"epoch": 1}], r"curve\.0\.step"), ([{"step": "many"}], r"curve\.0\.step"), ({}, "curve")],
)
def test_a_curve_that_does_not_fit_is_named(run, curve, reason):
    change(run, curve=curve)
    with pytest.raises(DataError, match=reason):
        read_result(run)


def test_what_an_older_file_does_not_say_is_nothing(run):
    result = read_result(run)
    assert (dict(result.parts), result.model.embeddings, result.model.layers, result.model.width) == ({}, 0, 0, 0)
    assert (result.training.sequence_tokens, result.training.images) == (0, 0)
    assert (result.scores[TASK].prompt_tokens, result.scores[TASK].new_tokens) == (0, 0)
    assert result.curve == []


def test_reading_is_fast(tmp_path):
    """A thousand runs of 320 questions in less than three seconds of a processor, their scores included."""
    runs, most = 40, 3.0
    for seed in range(runs):
        write_run(tmp_path, "lora", n=320, seed=seed)
    directories = find_results(tmp_path)
    read_result(directories[0])

    def spent(work) -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    def ours() -> None:
        for result in map(read_result, directories):
            assert len(result.predictions.grades(TASK)[1]) == 320

    def yardstick() -> None:  # a busy machine is slower for both
        for directory in directories:
            for file in (*directory.glob("predictions/*"), directory / "metrics.jsonl"):
                for line in file.read_text().splitlines():
                    json.loads(line)

    pairs = [(spent(ours), spent(yardstick)) for _ in range(3)]
    best, known = (min(times) for times in zip(*pairs, strict=True))
    assert best < max(most * runs / 1000, known), (best, known)
