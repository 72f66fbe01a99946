"""The page holds everything, runs nothing that a run's name or answer brings along, and does not vary."""

import re
import subprocess
import sys

import pytest

from html_page import Page
from peft_mllm.errors import DiskError
from peft_mllm.study.figures import CROWD
from peft_mllm.study.labels import HEIGHT, Box, place_beside, spread
from peft_mllm.study.report import render_report, telling_questions, write_report
from peft_mllm.study.results import read_results
from study_samples import SEEN, TASK, write_run, write_study

HOSTILE = "<script>alert('x')</script>\"&$\\frac{"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return read_results(write_study(tmp_path_factory.mktemp("study")))


@pytest.fixture(scope="module")
def page(results):
    return render_report(results, title="A study", task=TASK, seen=SEEN)


def test_page_is_well_formed_and_complete(page):
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.tags.count("svg") == 4
    assert parsed.tags.count("details") == 6
    assert parsed.tags.count("h1") == 1
    assert len(parsed.ids) == len(set(parsed.ids))


def test_page_needs_no_network(page):
    assert all(address.startswith("#") for address in Page(page).addresses)
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert re.findall(r"(?<!xmlns=\")https?://", page) == []
    assert "default-src 'none'" in page


def test_page_says_the_conclusion_and_the_caveats(page):
    assert "cannot be told apart by 200 questions" in page
    assert "not with another seed" in page


def test_figures_take_the_colour_of_the_page(page):
    figures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "currentColor" in figures
    assert "#000000" not in figures
    assert "mathdefault" not in figures


def test_page_is_the_same_each_time(page, results):
    assert render_report(results, title="A study", task=TASK, seen=SEEN) == page


def test_hostile_strings_are_only_text(tmp_path):
    run = write_run(
        tmp_path,
        HOSTILE,
        answer=HOSTILE,
        notes=[HOSTILE],
        environment={HOSTILE: HOSTILE},
        spec={HOSTILE: [HOSTILE]},
    )
    text = render_report(read_results([run]), title=HOSTILE, task=TASK, seen=SEEN)
    assert "<script>alert" not in text
    assert Page(text).tags.count("script") == 1
    assert "&lt;script&gt;alert" in text


def test_colour_is_not_the_only_sign_of_right_and_wrong(page):
    assert '.right::before { content: "\\2713' in page
    assert 'class="wrong"' in page


@pytest.mark.parametrize("pick", [slice(0, 1), slice(1, 2), slice(1, 3), slice(0, 0)])
def test_few_runs_still_make_a_page(results, pick):
    assert Page(render_report(results[pick], title="Few", task=TASK, seen=SEEN)).open == []


def test_runs_without_predictions_or_curves(tmp_path):
    score = {"split": "test", "metric": "exact", "n": 9, "values": {"accuracy": 50.0}}
    run = write_run(tmp_path, "lora", scores={TASK: score})
    (run / "metrics.jsonl").unlink()
    text = render_report(read_results([run]), title="Bare", task=TASK, seen=())
    assert "Learning curves" not in text
    assert "Where the runs disagree" not in text


def test_diverged_losses_do_not_break_the_curves(tmp_path):
    run = write_run(tmp_path, "lora")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 151, "loss": "NaN"}\n')
    assert "Learning curves" in render_report(read_results([run]), title="NaN", task=TASK)


def test_crowd_is_told_apart_by_the_legend(tmp_path):
    runs = [write_run(tmp_path, f"lora {i}", method="lora", n=5) for i in range(CROWD + 1)]
    text = render_report(read_results(runs), title="Crowd", task=TASK)
    curves = re.search(r"Learning curves</h3>.*?</svg>", text, flags=re.DOTALL)[0]
    assert "lora 3" not in curves
    assert "●</span> lora" in text


def test_telling_questions_divide_the_runs(results):
    questions = telling_questions(results, TASK, most=5)
    assert len(questions) == 5
    assert all(0 < sum(said.score for said in question.said) < 6 for question in questions)


def test_written_as_a_whole_or_not_at_all(results, tmp_path):
    target = tmp_path / "report.html"
    write_report(results, target, title="A study", task=TASK, seen=SEEN)
    assert target.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(DiskError):
        write_report(results, tmp_path / "absent" / "report.html", title="A", task=TASK)


def test_names_do_not_cover_points_or_one_another():
    points = [(50.0, 50.0), (55.0, 52.0), (58.0, 47.0)]
    markers = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    corners = place_beside(["lora", "ia3", "full"], points, markers, Box(0, 0, 300, 200))
    names = [Box(x, y, x + 6 * n, y + HEIGHT) for (x, y), n in zip(corners, (4, 3, 4), strict=True)]
    taken = markers + names
    assert all(name.overlap(other) == 0 for name in names for other in taken if other is not name)


def test_spread_keeps_order_and_distance():
    moved = spread([10.0, 8.0, 40.0])
    assert moved == [8.0 + HEIGHT, 8.0, 40.0]


def test_a_report_needs_no_torch():
    code = "import sys, peft_mllm.study.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
