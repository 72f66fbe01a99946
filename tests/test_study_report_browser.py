"""The study's report in a browser: it stays on its own, fits a phone, sorts, filters, and finds the same fronts."""

from __future__ import annotations

import json

import pytest

from browser import CHROMIUM, Browser
from peft_mllm.study.analyse import analyse
from peft_mllm.study.measures import MEASURES
from peft_mllm.study.pages.write import write_study_report
from peft_mllm.study.reading import read_study
from synthetic_study import write_study

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


CHOOSE = """([x, y, block]) => { const form = document.querySelector("#scatter form");
    [form.x.value, form.y.value, form.block.value] = [x, y, block];
    form.dispatchEvent(new Event("input"));
    return document.querySelector("#scatter [role=status]").textContent; }"""


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    made = write_study(
        tmp_path_factory.mktemp("study") / "one",
        methods=("lora", "ia3", "adapter"),
        tasks=("scenes_next", "scenes_at"),
        seeds=(1, 2),
        questions=24,
        seen=("scenes_colour",),
        transfers=True,
        curve=1,
        trials=2,
    )
    return analyse(read_study(made))


@pytest.fixture(scope="module")
def browser(analysis, tmp_path_factory):
    place = write_study_report(analysis, tmp_path_factory.mktemp("report") / "report")
    opened = Browser(tmp_path_factory.mktemp("browser"))
    opened.open(place.as_uri())
    opened.wait_for("document.readyState === 'complete' && !document.querySelector('#filters').hidden")
    yield opened
    opened.close()


def column(browser: Browser, key: str) -> list[str]:
    """The cells of the overview's rows that are seen."""
    return browser.evaluate(
        f"""(() => {{ const table = document.querySelector("#overview");
        const at = [...table.tHead.rows[0].cells].findIndex(head => head.dataset.key === {json.dumps(key)});
        return [...table.tBodies[0].rows].filter(row => !row.hidden)
            .map(row => row.cells[at].dataset.order ?? row.cells[at].textContent.trim()); }})()"""
    )


def test_it_asks_for_nothing_and_complains_of_nothing(browser):
    assert [each for each in browser.requests if not each.startswith(("file:", "data:"))] == []
    assert len([each for each in browser.requests if each.startswith("file:")]) == 1
    assert browser.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser, scheme):
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    try:
        browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        ink, page = browser.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        bright = [sum(map(int, each[4:-1].split(","))) for each in (ink, page)]
        assert (bright[0] > bright[1]) == (scheme == "dark")
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")
        browser.call("Emulation.setEmulatedMedia", features=[])


def test_it_sorts_by_any_column(browser):
    for key in ("score", "method"):
        browser.click(f"#overview th[data-key={key}] button")
        first = column(browser, key)
        browser.click(f"#overview th[data-key={key}] button")
        second = column(browser, key)
        assert first != second
        if key == "score":
            assert [float(each) for each in first] == sorted((float(each) for each in first), reverse=True)
            assert [float(each) for each in second] == sorted(float(each) for each in second)
        else:
            assert first == sorted(first)
    assert browser.evaluate("document.querySelectorAll('#overview [aria-sort]').length") == 1


def test_it_filters_by_axis_and_by_text(browser, analysis):
    browser.evaluate(
        """(() => { const select = document.querySelector("#filters select[data-axis=method]");
        select.value = "lora"; select.dispatchEvent(new Event("input", { bubbles: true })); })()"""
    )
    assert set(column(browser, "method")) == {"lora"}
    browser.write("#filters input", "scenes_at tuned")
    assert set(column(browser, "task")) == {"scenes_at"}
    assert set(column(browser, "connector")) == {"tuned"}
    said = browser.evaluate("document.querySelector('#filters output').textContent")
    assert said == f"1 of {len(analysis.lines)} lines"


def test_a_run_opens_with_its_spec(browser, analysis):
    browser.evaluate("document.querySelector('#list details').open = true")
    browser.wait_for("document.querySelector('#list pre') !== null")
    assert "method:" in browser.evaluate("document.querySelector('#list pre').textContent")
    assert "Scores" in browser.evaluate("document.querySelector('#list .inside').textContent")


def test_the_scatter_finds_the_fronts_of_the_analysis(browser, analysis):
    blocks = [dict(block.factors) for block in analysis.blocks]
    names = browser.evaluate("pareto.measures.map(([name]) => name)")
    for front in analysis.fronts[:12]:
        if front.x not in names or front.y not in names:
            continue
        place = (names.index(front.x), names.index(front.y), blocks.index(dict(front.factors)))
        said = browser.evaluate(f"({CHOOSE})({json.dumps(place)})")
        levels = {analysis.lines[line].factors["method"] for line in front.lines}
        assert set(said.removeprefix("On the front: ").removesuffix(".").split("; ")) == levels
        assert MEASURES[front.x].words in browser.evaluate(
            "document.querySelector('#scatter svg').getAttribute('aria-label')"
        )
