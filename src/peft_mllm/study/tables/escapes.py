"""Text of runs and models, which may hold anything, as text in Markdown, LaTeX and CSV: it never becomes markup."""

from __future__ import annotations

import re

_MARKDOWN = (("\\", "\\\\"), ("|", "\\|"), ("&", "&amp;"), ("<", "&lt;"), ("*", "\\*"), ("[", "\\["), ("`", "\\`"))
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\N{NO-BREAK SPACE}": "~",
    "\N{EN DASH}": "--",
    "\N{MINUS SIGN}": "$-$",
    "\N{RIGHTWARDS ARROW}": r"$\rightarrow$",
    "\N{MIDDLE DOT}": r"\textperiodcentered{}",
    "\N{HORIZONTAL ELLIPSIS}": r"\dots{}",
}
# A spreadsheet runs a cell that begins with one of these as a formula; an apostrophe makes it text.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def markdown(text: str) -> str:
    """One line of text for a cell of a Markdown table: no markup, no link, no picture."""
    for sign, written in _MARKDOWN:
        text = text.replace(sign, written)
    return re.sub(r"\s*[\r\n]+\s*", " ", text)


def latex(text: str) -> str:
    """Text for a cell of a LaTeX table: no command, no maths, no comment."""
    return "".join(_LATEX.get(sign, sign) for sign in re.sub(r"[\x00-\x1f\x7f]+", " ", text))


def spreadsheet(value: object) -> object:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
