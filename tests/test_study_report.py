"""The study's report: complete, the same each time, written as a whole, and nothing in it runs what a run brings."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from html_page import Page
from peft_mllm.errors import DataError, DiskError
from peft_mllm.study.analyse import analyse
from peft_mllm.study.analysis import Analysis, PaperCell
from peft_mllm.study.drawings.scales import scale_of
from peft_mllm.study.outcomes import Answers, CurvePoint
from peft_mllm.study.pages import head, questions, sections, write
from peft_mllm.study.pages.embed import embedded
from peft_mllm.study.pages.questions import telling
from peft_mllm.study.pages.write import everything, write_study_report
from peft_mllm.study.pages.yaml_lines import yaml_lines
from peft_mllm.study.reading import read_study
from peft_mllm.study.statistics import Estimate
from peft_mllm.study.tables.escapes import latex, markdown, spreadsheet
from peft_mllm.study.tables.overview import families, scores
from peft_mllm.study.tables.terminal import terminal_summary
from peft_mllm.study.tables.writers import csv_table, latex_table, markdown_table
from peft_mllm.study.view import View
from synthetic_study import write_study

HOSTILE = "</script><script>alert('x')</script>\"&$\\frac{|`[a](javascript:x)"
FIGURES = {"groups", "ranks", "effects", "curves", "stability", "data-size", "transfer", "after-best", "pareto"} | {
    "matched",
    "search",
    "paper",
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study that has something for every section."""
    return write_study(
        tmp_path_factory.mktemp("study") / "one",
        methods=("lora", "ia3"),
        tasks=("scenes_next", "scenes_at"),
        seeds=(1, 2),
        questions=40,
        axes={"data_size": ["1k", "5k"]},
        sizes={"lora": ["r4", "r16"]},
        seen=("scenes_colour",),
        effects={"lora": 1.5, "tuned": 0.3, "5k": 0.4},
        transfers=True,
        curve=1,
        trials=2,
        failed=1,
        missing=1,
        full=False,
    )


@pytest.fixture(scope="module")
def analysis(study):
    found = analyse(read_study(study))
    cell = PaperCell("Table 1", "lora", "ScienceQA", 80.0, Estimate(81.5, 80.0, 83.0), 1.5)
    return replace(found, paper=(cell,))


@pytest.fixture(scope="module")
def report(analysis, tmp_path_factory):
    return write_study_report(analysis, tmp_path_factory.mktemp("report") / "report").parent


@pytest.fixture(scope="module")
def page(report):
    return (report / "index.html").read_text()


class StudyPage(Page):
    """A study's page, which has more elements that are never closed."""

    VOID = Page.VOID | {"img", "input", "circle"}


def digests(report: Path) -> dict[str, str]:
    files = sorted(path for path in report.rglob("*") if path.is_file())
    return {path.relative_to(report).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- the page ---


def test_page_is_well_formed_and_has_every_section(page):
    parsed = StudyPage(page)
    assert parsed.open == []
    assert parsed.tags.count("h1") == 1
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.tags.count("svg") == len(FIGURES)
    sections = {"lines", "groups", "ranks", "effects", "curves", "stability", "data-size", "transfer", "after-best"}
    sections |= {"pareto", "matched", "search", "paper", "questions", "runs", "failed", "protocol"}
    assert sections <= set(parsed.ids)
    linked = {address[1:] for address in parsed.addresses if address.startswith("#")}
    assert {each for each in linked if "-" not in each} <= set(parsed.ids)


def test_page_needs_no_network_and_links_only_what_lies_beside_it(page, report):
    for address in StudyPage(page).addresses:
        assert address.startswith(("#", "data:image/")) or (report / address).is_file(), address
    assert re.findall(r"(?<!xmlns=\")https?://(?!www\.w3\.org/2000/svg)", page) == []
    assert re.findall(r"url\((?!#)", page) == []


def test_policy_names_the_one_script(page):
    assert "default-src 'none'" in page
    (allowed,) = re.findall(r"script-src 'sha256-([^']+)'", unescape(page))
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == allowed


def test_what_can_be_told_is_said_and_what_cannot(page, analysis):
    view = View(analysis)
    assert any("connector" in each or "data size" in each or "told apart" in each for each in head.told(view))
    assert "1 planned runs have no result yet." in head.untold(view) or analysis.missing != 1
    assert "What can be told" in page
    assert "What cannot" in page


def test_a_question_stands_in_one_half_of_the_head(tmp_path):
    """Prefix is clearly lower than the other four, of which none is clearly best."""
    said = {"tasks": ("scenes_next",), "connectors": ("frozen",), "seed_sd": 0.05, "seeds": (1, 2, 3, 4, 5)}
    found = analyse(read_study(write_study(tmp_path / "a", effects={"prefix": -0.45, "zero-shot": -3.0}, **said)))
    told, untold = head.told(View(found)), head.untold(View(found))
    assert "prefix is lower than each of the other 4." in told
    assert any(each.startswith("Every line gains over zero-shot, by ") for each in told)
    assert [each for each in untold if "prefix" in each] == []
    assert any(each.startswith("Which of ") and each.endswith(" is best cannot be told.") for each in untold)


def test_ranks_are_no_finding(tmp_path):
    """A method can be first in nearly every draw and be told apart from none."""
    found = analyse(read_study(write_study(tmp_path / "a", connectors=("frozen",))))
    view = View(replace(found, overall=tuple(replace(o, rank=replace(o.rank, first=1.0)) for o in found.overall)))
    assert found.overall
    assert not any("rank" in each for each in head.told(view))


def test_every_line_is_a_row_with_its_interval(page, analysis):
    table = re.search(r'id="overview".*?</table>', page, flags=re.DOTALL)[0]
    assert table.count("<tr") == len(analysis.lines) + 1
    assert table.count('class="track"') == sum(line.score is not None for line in analysis.lines)


def test_every_run_can_be_opened(page, analysis):
    (data,) = re.findall(r'id="details">(.*?)</script>', page, flags=re.DOTALL)
    details = json.loads(data)
    assert len(details["runs"]) == len(analysis.outcomes)
    _, _, spec = details["runs"][0]
    lines = "\n".join(details["texts"][number] for number in spec)
    assert yaml.safe_load(lines) == json.loads(json.dumps(dict(analysis.outcomes[0].result.spec)))


def test_figures_take_the_pages_colour_and_are_files_too(page, report):
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "currentColor" in drawn
    assert "#000000" not in drawn
    assert {path.stem for path in (report / "figures").glob("*.svg")} == FIGURES
    assert all(path.read_bytes().startswith(b"%PDF") for path in (report / "figures").glob("*.pdf"))
    assert {path.stem for path in (report / "figures").glob("*.pdf")} == FIGURES


def test_questions_divide_the_methods_and_show_their_images(analysis):
    asked = telling(View(analysis))
    assert [each.task for each in asked] == ["scenes_next", "scenes_at"]
    for each in asked:
        assert 0 < len(each.questions) <= questions.SHOWN
        for question in each.questions:
            assert len({said.score for voice in question.voices for said in voice.answers}) == 2
    images = [image for each in asked for question in each.questions for image in question.images]
    assert images
    assert all(image.startswith("data:image/png;base64,") for image in images)


def test_images_keep_to_their_budget(analysis, monkeypatch):
    monkeypatch.setattr(questions, "BUDGET", 0)
    asked = telling(View(analysis))
    assert not any(question.images for each in asked for question in each.questions)
    assert all("not shown" in each.note for each in asked)


def test_hallucination_is_drawn_along_the_curve(analysis):
    """A study whose tasks measure none has no such section; one whose tasks do has it, with its course."""
    assert not any(section.key == "hallucination" for section in sections.sections(View(analysis)))

    def listing(point: CurvePoint, after: int) -> CurvePoint:
        answers = Answers("describe", "listed", 60.0, "%", values={"f1": 60.0, "hallucination_rate": 10.0 + after})
        return replace(point, scores={**point.scores, "describe": answers})

    outcomes = tuple(
        replace(outcome, curve=tuple(listing(point, after) for after, point in enumerate(outcome.curve)))
        for outcome in analysis.outcomes
    )
    lines = tuple(replace(line, hallucination=10.0 + at % 3) for at, line in enumerate(analysis.lines))
    measured = View(replace(analysis, outcomes=outcomes, lines=lines))
    (section,) = [each for each in sections.sections(measured) if each.key == "hallucination"]
    assert [drawing.key for drawing in section.figures] == ["hallucination", "hallucination-curve"]
    assert "the least is made up" in section.reading
    assert {sections.hallucination(outcome.curve[1]) for outcome in outcomes if outcome.curve} == {11.0}


# --- the same each time ---


@pytest.mark.slow
def test_equal_studies_give_equal_bytes_in_any_process(study, tmp_path):
    program = (
        "import sys; from pathlib import Path; from peft_mllm.study.reading import read_study;"
        "from peft_mllm.study.analyse import analyse; from peft_mllm.study.pages.write import write_study_report;"
        "write_study_report(analyse(read_study(Path(sys.argv[1]))), Path(sys.argv[2])); print('torch' in sys.modules)"
    )
    here = write_study_report(analyse(read_study(study)), tmp_path / "here").parent
    done = subprocess.run(
        [sys.executable, "-c", program, str(study), str(tmp_path / "there")],
        env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False", "a report needs no torch"
    assert digests(tmp_path / "there") == digests(here)


def test_scores_do_not_depend_on_the_clock(analysis):
    slower = replace(
        analysis,
        lines=tuple(
            replace(line, figures={**line.figures, "seconds": 9e9, "seconds_scoring": 9e9, "memory": 9e9})
            for line in analysis.lines
        ),
    )
    for written in (csv_table, markdown_table):
        assert written(scores(View(analysis))) == written(scores(View(slower)))
    tables = [write._tables(View(each)) for each in (analysis, slower)]
    assert {name for name in tables[0] if tables[0][name] != tables[1][name]} == {
        "tables/costs.csv", "tables/costs.md", "tables/costs.tex",
    }  # fmt: skip


# --- files ---


def bare(**changes) -> Analysis:
    empty = dict.fromkeys(
        ("lines", "blocks", "overall", "effects", "transfers", "trials", "matched", "fronts", "paper", "claims"), ()
    )
    known = {"title": "T", "question": "", "axes": {}, "contrast": "method", "seen": (), "protocol": (), "notes": ()}
    return Analysis(**{**empty, **known, "failed": (), "missing": 0, "outcomes": (), **changes})


def test_csv_has_all_digits(report, analysis):
    rows = list(csv.DictReader(io.StringIO((report / "tables" / "scores.csv").read_text())))
    assert len(rows) == len(analysis.lines)
    for row, line in zip(rows, analysis.lines, strict=True):
        assert row["method"] == line.factors["method"]
        assert float(row["score"]) == line.score.value
        assert float(row["score_low"]) == line.score.low
        assert row["runs"].split() == list(line.runs)


def test_latex_has_a_table_for_each_family_with_spread_and_best_group(analysis):
    view = View(analysis)
    tables = families(view)
    assert [table.title for table in tables] == [
        f"connector {connector} · data size {size}" for connector in ("frozen", "tuned") for size in ("1k", "5k")
    ] or len(tables) == 4
    text = latex_table(tables, label="tab:scores")
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == len(tables)
    assert r"{\scriptsize $\pm$ " in text
    assert r"\textbf{" in text
    assert text.count("{") == text.count("}")
    widths = {line.count(" & ") for line in text.splitlines() if line.endswith(r" \\")}
    assert widths == {2}  # a name and two tasks; the spread stands in the task's cell


def test_everything_is_json_without_single_questions(report, analysis):
    content = json.loads((report / "everything.json").read_text())
    assert content == json.loads(json.dumps(everything(analysis)))
    assert len(content["lines"]) == len(analysis.lines)
    assert len(content["outcomes"]) == len(analysis.outcomes)
    assert content["lines"][1]["score"]["value"] == analysis.lines[1].score.value
    assert "test-1-0" not in json.dumps(content)


def test_a_new_report_replaces_the_old_as_a_whole(tmp_path):
    place = tmp_path / "report"
    write_study_report(bare(failed=(("lora", "no memory"),)), place)
    assert (place / "tables" / "failed.csv").is_file()
    write_study_report(bare(), place)
    assert not (place / "tables" / "failed.csv").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_what_is_no_report_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        write_study_report(bare(), tmp_path)
    with pytest.raises(DataError, match="is a file"):
        write_study_report(bare(), tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch):
    place = tmp_path / "report"
    write_study_report(bare(), place)
    before = digests(place)
    plain = Path.write_bytes

    def full(self, data):
        if self.name == "scores.csv":
            raise OSError(28, "No space left on device")
        return plain(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskError, match="No space left"):
        write_study_report(bare(title="Another"), place)
    assert digests(place) == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


# --- whatever a study is like ---


def test_an_empty_study_has_a_page(tmp_path):
    text = write_study_report(bare(), tmp_path / "report").read_text()
    assert StudyPage(text).open == []


@pytest.mark.parametrize(
    "shape",
    [
        {"methods": ("lora",), "connectors": ("frozen",), "seeds": (1,), "full": False, "zero_shot": False},
        {"methods": ("lora", "ia3"), "connectors": ("frozen",), "seeds": (1,), "seen": ()},
    ],
    ids=["one run", "one seed"],
)
def test_small_studies(shape, tmp_path):
    made = write_study(tmp_path / "study", tasks=("scenes_next",), questions=20, **shape)
    text = write_study_report(analyse(read_study(made)), tmp_path / "report").read_text()
    assert StudyPage(text).open == []
    assert "nothing here says how far a score moves with another seed" in text


def test_hostile_strings_are_only_text(analysis, tmp_path):
    line = analysis.lines[1]
    hostile = replace(line, factors={**line.factors, "method": HOSTILE, "size": "=cmd|x"})
    outcome = analysis.outcomes[1]
    spoiled = replace(
        analysis,
        title=HOSTILE,
        question=HOSTILE,
        notes=(HOSTILE,),
        protocol=((HOSTILE, HOSTILE),),
        failed=((HOSTILE, HOSTILE),),
        lines=(analysis.lines[0], hostile, *analysis.lines[2:]),
        outcomes=(
            analysis.outcomes[0],
            replace(
                outcome,
                run=HOSTILE,
                factors={**outcome.factors, "method": HOSTILE},
                result=replace(outcome.result, notes=(HOSTILE,), spec={HOSTILE: [HOSTILE]}),
            ),
            *analysis.outcomes[2:],
        ),
    )
    place = write_study_report(spoiled, tmp_path / "report").parent
    text = (place / "index.html").read_text()
    assert "<script>alert" not in text
    assert StudyPage(text).tags.count("script") == 3
    assert StudyPage(text).open == []
    assert not re.search(r"^=cmd|,=cmd", (place / "tables" / "scores.csv").read_text(), flags=re.MULTILINE)
    assert "<script>" not in (place / "tables" / "scores.md").read_text()
    assert "\\frac" not in (place / "tables" / "scores.tex").read_text()
    assert "<script>alert" not in (place / "figures" / "groups.svg").read_text()


@pytest.mark.parametrize("text", ["\\input{x}", "a_b & c % d # $e$ {f} ~ ^", "x\ny", "\N{EN DASH}", "<b>"])
def test_latex_is_only_text(text):
    written = latex(text)
    bare_text = re.sub(r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater)\{\}", "", written)
    assert re.findall(r"(?<!\\)[&%#$_{}~^]", bare_text) == []
    assert "\\input" not in written
    assert "\n" not in written


def test_markdown_is_only_text():
    written = markdown("a|b\n![x](http://evil) `c` <img src=x> *d*")
    assert "\n" not in written
    assert re.findall(r"(?<!\\)[|\[`*]|<", written) == []


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx"])
def test_spreadsheets_run_nothing(text):
    assert spreadsheet(text) == f"'{text}"
    assert spreadsheet(-1.5) == -1.5


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
specs = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=12
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), specs, max_size=4))
def test_a_spec_is_the_same_as_yaml(spec):
    assert yaml.safe_load("\n".join(yaml_lines(spec)) or "{}") == spec


@given(st.text())
def test_embedded_data_cannot_end_its_element(text):
    written = embedded({"a": text})
    assert "<" not in written
    if not any("\ud800" <= sign <= "\udfff" for sign in text):
        assert json.loads(written) == {"a": text}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.booleans())
def test_all_values_lie_on_their_axis(values, logarithmic):
    scale = scale_of(values, logarithmic=logarithmic)
    assert all(-1e-9 <= scale.place(value) <= 1 + 1e-9 for value in values)
    assert len(scale.ticks(4)) < 12


def shown(analysis: Analysis) -> list[str]:
    from rich.console import Console

    console = Console(record=True, width=140, file=io.StringIO())
    console.print(terminal_summary(analysis))
    return console.export_text().splitlines()


def test_the_terminal_shows_sentences_and_the_methods_over_all_tasks(analysis):
    lines = shown(analysis)
    assert lines[0].strip() == analysis.title
    assert "not finished" in lines[1]
    assert sum(line.startswith("\N{BULLET} ") for line in lines) == 6 < len(analysis.blocks)
    table = [line.split() for line in lines if "tuned" in line and "1k" in line and line.startswith(("lora", "ia3"))]
    assert {tuple(cells[:5]) for cells in table} == {
        ("lora", "1k", "tuned", "r4", "2"),
        ("lora", "1k", "tuned", "r16", "2"),
        ("ia3", "1k", "tuned", "\N{EN DASH}", "2"),
    }
    assert all(50 < float(cells[5]) < 100 for cells in table)
    left = f"{len(analysis.notes)} cautions, {len(analysis.blocks) - 6} more findings, all {len(analysis.lines)} lines"
    assert left in lines[-1]
    assert len(lines) < 45


def test_the_terminal_shows_the_lines_of_a_small_study(tmp_path):
    small = analyse(read_study(write_study(tmp_path, tasks=("scenes_next",), connectors=("frozen",))))
    lines = shown(small)
    assert [line.split()[0] for line in lines if " to " in line and "(" in line and line[0] != "\N{BULLET}"] == [
        *("zero-shot", "adapter", "lora", "ia3", "prefix", "full"),
    ]
    assert "lines" not in lines[-1]
    assert len(lines) < 20


# --- speed ---


@pytest.mark.slow
def test_a_thousand_runs_are_reported_in_seconds(tmp_path):
    tasks = tuple(f"task_{number:02}" for number in range(25))
    study = write_study(tmp_path / "study", tasks=tasks, seeds=(1, 2, 3, 4), seen=(), questions=320)
    assert len(list(study.rglob("result.json"))) == 1025
    command = [sys.executable, "-m", "peft_mllm", "study", "report", str(study)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    print(f"1,025 runs read, analysed and reported in {spent:.1f} s of CPU time, in a process of its own")  # noqa: T201
    assert spent < 10
    found = json.loads((study / "report" / "everything.json").read_text())
    assert len(found["outcomes"]) == 1025
    assert len(found["blocks"]) == 50
