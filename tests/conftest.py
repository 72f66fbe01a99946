"""What every test stands on: one thread, no network, and the recorded cases where they are at hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Before anything imports torch or transformers, which read these once. A test that needs the network or more
# threads is not one of ours.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads, too: sums in the same order on every machine
os.environ["MPLBACKEND"] = "Agg"

LIMIT = 300
"""Seconds after which a test that hangs has failed; none takes a tenth of them on an idle machine."""
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def cases() -> Path:
    """Recordings from the original code (configs, tokenizers, numbers); they lie beside the repository."""
    path = ROOT.parent / "shared" / "cases"
    if not path.is_dir():
        pytest.skip(f"the recorded cases are not at {path}")
    return path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests measure of a base is not kept among the user's files."""
    os.environ["PEFT_MLLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@contextmanager
def bounded(item: pytest.Item) -> Iterator[None]:
    """Let a test that waits for what never comes fail, instead of all that come after it."""
    limit = LIMIT * (2 if item.get_closest_marker("slow") else 1)

    def ring(*_: object) -> None:
        pytest.fail(f"it was still at work after {limit} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    with bounded(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    with bounded(item):
        return (yield)
