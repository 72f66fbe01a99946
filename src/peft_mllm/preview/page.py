"""The preview as one HTML page that holds everything and needs no network."""

from __future__ import annotations

from peft_mllm.pages import templates
from peft_mllm.preview.content import Content
from peft_mllm.preview.tokens import Span


def render(content: Content) -> str:
    """The page as text; everything that comes from data is escaped."""
    environment = templates("preview")
    environment.tests["span"] = lambda each: isinstance(each, Span)
    return environment.get_template("preview.html.j2").render(content=content, report=content.report)
