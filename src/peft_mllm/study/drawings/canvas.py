"""A figure and how it becomes SVG for a page, an SVG file or a PDF file, in one style."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

INK = "#010203"
"""Drawn in this, text and axes become `currentColor` in a page."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "peft_mllm",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
}


@dataclass(frozen=True)
class Drawing:
    """A finished figure.

    Attributes:
        key: its name among files, and in the page.
        title: its heading.
        caption: what it shows, and what its signs mean.
        figure: matplotlib's.
    """

    key: str
    title: str
    caption: str
    figure: Any


@contextmanager
def house_style() -> Iterator[None]:
    """Everything is drawn and saved in it."""
    from matplotlib import rc_context

    with rc_context(STYLE), warnings.catch_warnings():
        # A name in a script that matplotlib's font lacks is still written as text: the browser has a font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def to_svg(drawing: Drawing) -> str:
    """As a file of its own: dark ink, no background."""
    return _saved(drawing.figure)


def to_pdf(drawing: Drawing) -> bytes:
    """As a file for LaTeX."""
    content = io.BytesIO()
    with house_style():
        drawing.figure.savefig(content, format="pdf", metadata={"CreationDate": None, "Creator": None})
    return content.getvalue()


def page_svg(svg: str, key: str, label: str) -> str:
    """Take off what belongs to a file, make ids the figure's own, and let the page give colour and font.

    Args:
        svg: as matplotlib writes it.
        key: begins each id in it.
        label: says what it shows to those who do not see it.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    name = f'role="img" aria-label="{escape(label)}"'
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda found: f"<svg {found[1]} {name}>", svg, count=1)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{key}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{key}-", svg)
    svg = re.sub(r" font-family: [^;\"]+;", "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return svg.replace("xlink:href", "href").replace(INK, "currentColor")


def _saved(figure: Any) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = io.StringIO()
    with house_style():
        FigureCanvasSVG(figure)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()
