"""Makes docs/metrics.md from the metrics themselves: source, rule, formula and variants of each.

python scripts/metrics_page.py            # writes the page
python scripts/metrics_page.py --check    # changes nothing; exits 1 if the page is out of date
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from peft_mllm.metrics import METRICS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

HEAD = """# Metrics

This page is made from the metrics by `scripts/metrics_page.py`; a test compares the two.

A metric is a rule with variants. The first is the default: the official scorer's where there is one. The others are
what other suites compute under the same name, so that a figure can be compared with theirs. Every result and every
printed figure names its rule, as `metric/variant: ...`.

- **In a run** a task names its metric: `vqa`, or with a variant `vqa:vizwiz`. Own data takes the task option
  `metric: exact`.
- **From files** `peft-mllm score METRIC --predictions F --references F` scores the predictions of any system, in the
  formats that the data sets' owners publish. The ids of both sides must be the same, once each; what is missing,
  extra or duplicate is listed and refused. `--partial` scores the ids that both sides have, and the result says so.
  `--json` prints `metric`, `variant`, `rule`, `unit`, `n`, `unparsed`, `scores` and `partial`, numbers unrounded;
  `--per-item F` writes one JSON line for each item.

Subsets are `name/subset`. `unparsed` counts the predictions in which nothing was understood; they are wrong, or a
guess where a variant says so.

| metric | what it is | unit | variants |
|---|---|---|---|
"""

CHECKED = """
## What the figures were checked against

- The two normalisers of `vqa`: equal to the official code on all 11,544 real answers recorded from it.
- `caption`: tokens equal to CoreNLP 3.4.1's on every one of 4,000 recorded lines and of the references and captions of
  coco-caption's example; BLEU, ROUGE-L and CIDEr-D of that example equal to the official scorer's, of the corpus and
  of each image, to 1e-9. No line differs.
- `chair`: the objects named in 2,000 captions, one by one, and the figures, equal to the official rule's.

The tests `tests/test_metric_*.py` repeat these comparisons where the recorded cases are at hand.
"""


def page() -> str:
    """The whole page."""
    rows = [
        f"| [{name}](#{name}) | {METRICS.summary(name)} | {METRICS[name].unit} | {', '.join(METRICS[name].variants)} |"
        for name in METRICS
    ]
    parts = [part for name in METRICS for part in section(name)]
    return HEAD + "\n".join(rows) + "\n" + "".join(f"\n{part}\n" for part in parts) + CHECKED


def section(name: str) -> Iterator[str]:
    """One metric: its module's words, files, and variants."""
    metric = METRICS[name]
    module = inspect.getmodule(metric)
    assert module is not None
    yield f"## {name}"
    yield f"Source: {metric.source}."
    yield f"```text\n{inspect.cleandoc(module.__doc__ or '')}\n```"
    if metric.files:
        yield f"Files: {metric.files}."
    lines = ["| variant | formula | what it changes |", "|---|---|---|"]
    for variant, rule in metric.variants.items():
        formula = rule.formula.replace("|", "\\|")
        lines.append(f"| `{variant}` | {formula} | {rule.changes or 'the default'} |")
    yield "\n".join(lines)


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is out of date")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE} is out of date. Run: python scripts/metrics_page.py")


if __name__ == "__main__":
    main()
