"""How the HTML pages that we write are made: from a package's templates, with all that comes from data escaped."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def templates(package: str) -> Environment:
    """The templates of a package such as `preview`; a name that a template does not get is an error."""
    return Environment(
        loader=PackageLoader(f"peft_mllm.{package}"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
