"""What is exported, and that it is what was written: a finished run, or a PEFT directory on its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_mllm.errors import DiskError, SpecError
from peft_mllm.exporting.seal import SEAL, broken
from peft_mllm.rundir import ADAPTER, START_AGAIN, RunDir, verify
from peft_mllm.rundir.claim import spec_digest
from peft_mllm.rundir.commits import read_manifest
from peft_mllm.saved import Target, find_target
from peft_mllm.spec import ModelSpec


@dataclass(frozen=True)
class Source:
    """A target that is finished and whole.

    Attributes:
        target: the model, and the adapter on it.
        base: the model that it was made from.
        result: the run's result.json; None of a PEFT directory.
        run: the run directory; None of a PEFT directory.
    """

    target: Target
    base: ModelSpec
    result: Mapping[str, Any] | None
    run: Path | None

    @property
    def whole(self) -> bool:
        """Whether what was trained is a whole model of its own."""
        return self.target.adapter is None and self.target.model != self.base

    @property
    def method(self) -> str:
        """The name of the run's method; of a PEFT directory the word adapter."""
        return str(self.result["method"]["name"]) if self.result else "adapter"


def open_source(target: str, base: str | None, vision_tower: str | None = None) -> Source:
    """Find what is to be exported, and verify it.

    Raises:
        SpecError: it is neither a run nor a PEFT directory, or the run is not finished.
        DiskError: it is not what was written.
    """
    path, found = Path(target), find_target(target, base, vision_tower)
    if found.spec:
        return _run(path, found)
    if found.adapter is None:
        raise SpecError(f"{target} is a model, not a run or a PEFT directory: there is nothing of ours to export.")
    if (path / SEAL).is_file():
        doubts = broken(path)
        if doubts:
            raise DiskError(f"{path} is not what was sealed: {'; '.join(doubts)}. Export it again from its run.")
    return Source(found, found.model, None, None)


def _run(path: Path, found: Target) -> Source:
    result = RunDir(path).result()
    if result is None:
        raise SpecError(f"{path} is a run that is not finished: it has no result.json yet. Train it first.")
    if result["adapter"] is not None:
        doubts = verify(path / ADAPTER) or _doubts_of_origin(path)
        if doubts:
            raise DiskError(f"{path / ADAPTER} cannot be exported: {'; '.join(doubts)}. {START_AGAIN}")
    return Source(found, ModelSpec.model_validate(found.spec["model"]), result, path)


def _doubts_of_origin(path: Path) -> list[str]:
    own = read_manifest(path / ADAPTER).get("spec_sha256") == spec_digest(path)
    return [] if own else ["it belongs to another run"]
