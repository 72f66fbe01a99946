"""The command line: verbs only. Nothing here imports torch until a verb needs it."""

from __future__ import annotations

import os
import sys
import warnings
from typing import NoReturn

import typer
from rich.console import Console

from peft_mllm.cli import advise, annotate, compare, data, models, plan, prepare, reproduce, runs, scores, study
from peft_mllm.cli.say import fail, show_warning
from peft_mllm.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_USAGE, RESUME, DegradedModel, UserError

app = typer.Typer(
    help="Fine-tune multimodal LLMs with parameter-efficient methods, evaluate and compare them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(runs.verbs)
app.add_typer(models.verbs)
app.add_typer(plan.verbs)
app.add_typer(scores.verbs)
app.add_typer(compare.verbs)
app.add_typer(reproduce.verbs)
app.add_typer(advise.verbs)
app.add_typer(annotate.verbs)
data.verbs.add_typer(prepare.verbs)
app.add_typer(data.verbs, name="data")
app.add_typer(study.verbs, name="study")

TYPER_CTRL_C = 130
"""What typer makes of a KeyboardInterrupt."""


def main() -> NoReturn:
    """Run a verb; a user's mistake is one message, never a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # the libraries' notices to developers
        warnings.simplefilter("always", DegradedModel)
        warnings.showwarning = show_warning
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        fail(str(error), error.exit_code)
    except typer.Abort:
        fail("Stopped.", EXIT_INTERRUPTED)
    except Exception as error:
        usage = getattr(error, "exit_code", None)
        if usage is None:
            Console(stderr=True).print_exception()
            fail(
                "This is a defect of peft-mllm, not yours: please report it with the lines above.",
                EXIT_INTERNAL,
            )
        error.show() if hasattr(error, "show") else None
        sys.exit(usage or EXIT_USAGE)
    if code == TYPER_CTRL_C:
        fail(f"Stopped at once; {RESUME}", EXIT_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)
