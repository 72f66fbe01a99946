"""Every error a user can cause, each with the exit code that a script or a study can act on.

A `UserError` is printed as one message, without a traceback; anything else is a defect of ours (exit 70).
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_DIVERGED = 3
EXIT_BAD_DATA = 65
EXIT_INTERNAL = 70
EXIT_DISK = 74
EXIT_INTERRUPTED = 75

RESUME = "the same command goes on from there."


class UserError(Exception):
    """Something the user can mend: the message says what, where, and how."""

    exit_code = EXIT_USAGE


class SpecError(UserError):
    """A spec does not say something that can be run."""


class ModelError(UserError):
    """A model directory or hub id cannot be used as asked."""


class MethodError(UserError):
    """A method, location or switch has no effect on this model, or no meaning."""


class DataError(UserError):
    """Data cannot be read, or does not mean what it must."""

    exit_code = EXIT_BAD_DATA


class DiskError(UserError):
    """A file could not be written, or what was written cannot be trusted."""

    exit_code = EXIT_DISK


class DivergedError(UserError):
    """A loss or a gradient was not finite; training stopped before the update."""

    exit_code = EXIT_DIVERGED


class OutOfMemory(UserError):  # noqa: N818 - the name by which it is known
    """A step of training does not fit into memory; the last checkpoint is good."""


class Interrupted(UserError):  # noqa: N818 - it is an outcome, not an error: the run is saved and resumes
    """SIGTERM or Ctrl-C: the state is saved, and the same command goes on."""

    exit_code = EXIT_INTERRUPTED


class DegradedModel(UserWarning):
    """A model runs, but is not what its checkpoint was trained to be: it will answer worse than it could."""
