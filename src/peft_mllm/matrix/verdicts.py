"""How a probe went: ok, failed for a reason that users understand, or nothing to try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "failed", "none"]


class Failed(Exception):  # noqa: N818 - a verdict, not an error of the program
    """It does not work; the reason is for users."""


class NotApplicable(Exception):  # noqa: N818
    """There is nothing to try."""


@dataclass(frozen=True)
class Verdict:
    """How a probe went, and why; `none` is that there was nothing to try."""

    state: State
    reason: str = ""


def first_line(error: BaseException) -> str:
    """An error's own words, without a stack of further lines."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
