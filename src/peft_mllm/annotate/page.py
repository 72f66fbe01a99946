"""The annotation page: one HTML file with all captions and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from peft_mllm.annotate.answers import FORMAT
from peft_mllm.annotate.items import Item, digest
from peft_mllm.pages import templates


def render(items: Sequence[Item], *, annotator: str = "", served: bool = False) -> str:
    """The page as text.

    Args:
        items: the captions.
        annotator: who judges; the page asks if it is empty.
        served: the answers are kept by the program that serves the page, and not only by the browser.
    """
    about = {
        "format": FORMAT,
        "items": digest(items),
        "n": len(items),
        "annotator": annotator,
        "served": served,
    }
    page = templates("annotate").get_template("annotate.html.j2")
    return page.render(about=about, items=[asdict(item) for item in items])
