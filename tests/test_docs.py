"""What the documents say is what the code is: worked examples, links between pages, generated tables."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_worked_method_is_the_one_on_the_shelf():
    shown = blocks(ROOT / "docs/add-a-method.md", "python")[0]
    assert shown == (ROOT / "src/peft_mllm/methods/layernorm.py").read_text(encoding="utf-8")


def test_its_line_is_the_shelfs():
    shown = blocks(ROOT / "docs/add-a-method.md", "python")[1]
    assert shown in (ROOT / "src/peft_mllm/methods/__init__.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", ["add-a-task.md", "add-a-metric.md", "add-a-family.md"])
def test_python_in_the_guides_compiles(page):
    shown = blocks(ROOT / "docs" / page, "python")
    assert shown
    for block in shown:
        if not block.startswith("    "):  # a line of a shelf's table is no module
            compile(block, page, "exec")


def test_the_generated_tables_are_up_to_date():
    check = [sys.executable, "scripts/update_readme.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
