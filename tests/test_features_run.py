"""Vision features that runs share: nothing but time differs, in training and in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import runs
from peft_mllm.features import Sight
from peft_mllm.run import run
from peft_mllm.spec import Spec
from peft_mllm.specfile import parse_spec
from peft_mllm.study.state import VISION
from test_study_state import state_of


def trained(directory: Path, **changes: Any) -> dict[str, Any]:
    """A run without sharing, so that images are shown again and again."""
    changes = {"data": {"share_prefix": False}, "retention": {"text": False, "samples": 0}} | changes
    return run(parse_spec(runs.tiny(directory, **changes)), quiet=True)


@pytest.mark.parametrize("connector", ["frozen", "tuned"])
def test_a_run_is_the_same_with_and_without(tmp_path: Path, connector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {"vision_cache": str(tmp_path / "kept")}
    with monkeypatch.context() as patch:  # a batch that shows an image twice is not looked up either
        patch.setattr(Sight, "_is_wanted", lambda self, units: False)
        plain = trained(tmp_path / "plain", connector=connector)
    first = trained(tmp_path / "first", connector=connector, speed=speed)
    second = trained(tmp_path / "second", connector=connector, speed=speed)
    runs.assert_same(tmp_path / "first", tmp_path / "plain")
    runs.assert_same(tmp_path / "second", tmp_path / "plain")
    assert plain["vision_cache"] is None
    assert first["vision_cache"]["misses"] == len(list((tmp_path / "kept").rglob("*.features"))) == 5
    assert first["vision_cache"]["hits"] > first["vision_cache"]["misses"]
    assert second["vision_cache"]["misses"] == 0
    assert first["spec_id"] == plain["spec_id"]


def test_an_image_of_a_packed_row_is_kept_by_itself(tmp_path: Path) -> None:
    packed = trained(tmp_path / "packed", data={}, speed={"vision_cache": str(tmp_path / "kept")})
    assert packed["training"]["layout"] == "packed"
    rows = trained(tmp_path / "rows", data={}, speed={"vision_cache": str(tmp_path / "kept"), "attention": "mask"})
    assert rows["training"]["layout"] == "rows"
    assert packed["vision_cache"]["misses"] == 5  # as many as there are images
    assert rows["vision_cache"]["misses"] == 0


def test_data_workers_look_up_what_was_kept_before(tmp_path: Path) -> None:
    speed = {"vision_cache": str(tmp_path / "kept")}
    trained(tmp_path / "alone", speed=speed)
    helped = trained(
        tmp_path / "helped", speed={"vision_cache": str(tmp_path / "new")}, train={"dataloader_num_workers": 1}
    )
    runs.assert_same(tmp_path / "helped", tmp_path / "alone")
    assert helped["vision_cache"]["misses"] > 0
    assert helped["vision_cache"]["hits"] > 0


def test_a_tower_that_trains_has_nothing_to_keep(tmp_path: Path) -> None:
    spec = runs.tiny(tmp_path, vision="tuned", speed={"vision_cache": str(tmp_path / "kept")})
    with pytest.raises(ValueError, match=r"speed\.vision_cache .* vision is tuned"):
        Spec.model_validate(spec)


def test_no_room_keeps_nothing(tmp_path: Path) -> None:
    result = trained(tmp_path / "run", speed={"vision_cache": str(tmp_path / "kept"), "vision_cache_gb": 0})
    assert result["vision_cache"] is None
    assert not (tmp_path / "kept").exists()


def test_runs_of_a_study_share_one_directory(tmp_path: Path) -> None:
    kept = {job.spec["speed"]["vision_cache"] for job in state_of(tmp_path).pending()}
    assert kept == {str(tmp_path / VISION)}


@pytest.mark.parametrize(
    ("speed", "vision", "expected"),
    [
        ({"vision_cache": "elsewhere"}, "frozen", "elsewhere"),
        ({"vision_cache_gb": 0}, "frozen", None),
        ({}, "tuned", None),
    ],
)
def test_unless_it_says_otherwise(tmp_path: Path, speed: dict[str, Any], vision: str, expected: str | None) -> None:
    state = state_of(tmp_path)
    (one, *_) = state.known()
    data = one.spec.model_dump() | {"speed": speed, "vision": vision}
    assert state._speed(Spec.model_validate(data)).vision_cache == expected
