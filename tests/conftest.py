"""What every test stands on: one thread, no network, and the recorded cases where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports torch or transformers, which read these once. A test that needs the network or more
# threads is not one of ours.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads, too: sums in the same order on every machine
os.environ["MPLBACKEND"] = "Agg"

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
