"""The benchmark: equal before quick, turns that alternate, ratios with intervals, and a table that is its JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmark is no part of the package

from benchmarks import gate, peers, turns  # noqa: E402
from benchmarks.__main__ import HALVES  # noqa: E402
from benchmarks.case import Case  # noqa: E402
from benchmarks.comparisons import Bench, chosen, data_of, gathered  # noqa: E402
from benchmarks.ours import rehearse  # noqa: E402
from benchmarks.ratios import ratio_of  # noqa: E402
from benchmarks.seen import Seen, gradient_difference  # noqa: E402
from benchmarks.shapes import SHAPES, Base, make_base  # noqa: E402
from benchmarks.table import markdown, section  # noqa: E402
from benchmarks.turns import Side, Stepped, take_turns  # noqa: E402
from benchmarks.workloads import WORKLOADS, merged, read_data  # noqa: E402

CPU = torch.device("cpu")
PEERS_PYTHON = ROOT / "benchmarks" / ".venv" / "bin" / "python"


@pytest.fixture(scope="module")
def base() -> Base:
    return make_base("tiny", CPU)


def case_of(base: Base, workload: str, method: str, folder: Path, *, steps: int = 1) -> Case:
    chosen = WORKLOADS[workload]
    return Case(base, data_of(base, chosen, folder, steps=steps), chosen.step, method, folder)


# --- the model and the data ---


def test_a_small_shape_has_the_shares_of_7b() -> None:
    small, large = SHAPES["cpu"], SHAPES["llava-1.5-7b"]
    assert large.linear_parameters == pytest.approx(6.476e9, rel=1e-3)
    shares = [shape.vocabulary * shape.hidden / shape.linear_parameters for shape in (small, large)]
    assert shares[0] == pytest.approx(shares[1], rel=0.01)


def test_a_twin_has_the_same_weights_and_its_own_adapter(base: Base, tmp_path: Path) -> None:
    tuned = case_of(base, "shared", "lora", tmp_path).attach()
    weight = base.family.model.lm_head.weight
    assert tuned.base.lm_head.weight.data_ptr() == weight.data_ptr()
    assert tuned.trainable()
    assert not any("lora" in name for name, _ in base.family.model.named_parameters())


def test_lengths_are_those_of_the_data_sets(base: Base, tmp_path: Path) -> None:
    from peft_mllm.data.opening import open_records

    lengths = {}
    for name in WORKLOADS:
        case = case_of(base, name, "lora", tmp_path / name)
        samples = [base.family.encode(record) for record in open_records(case.data)]
        lengths[name] = [len(sample.ids) - sample.image_end for sample in samples]
        assert len(samples) == case.step
    assert all(20 <= length <= 36 for length in lengths["shared"])  # VQAv2: 28
    assert all(14 <= length <= 24 for length in lengths["captions"])  # Flickr30k: 18
    assert max(lengths["mixed"]) > 300


def test_merged_conversations_keep_every_question_and_one_image(base: Base, tmp_path: Path) -> None:
    case = case_of(base, "shared", "lora", tmp_path)
    single, together = read_data(case.data), read_data(merged(case.data))
    assert len(together) == 1
    assert len(together[0]["messages"]) == sum(len(example["messages"]) for example in single)
    assert sum(turn["content"].count("<image>") for turn in together[0]["messages"]) == 1


# --- equality ---


@pytest.mark.parametrize(("workload", "method"), [("shared", "lora"), ("mixed", "adapter"), ("captions", "prefix")])
def test_ours_and_hf_compute_the_same(base: Base, tmp_path: Path, workload: str, method: str) -> None:
    case = case_of(base, workload, method, tmp_path, steps=3)
    (found,) = gate.compare(case, [peers.hf], steps=3).values()
    assert found.passed, found
    assert found.steps == 3


def test_the_gate_sees_one_sample_in_another_step(base: Base, tmp_path: Path) -> None:
    case = case_of(base, "shared", "lora", tmp_path, steps=3)
    mine, order = rehearse(case, steps=3)
    order[1][0], order[2][0] = order[2][0], order[1][0]
    seen = Seen()
    peers.hf(case, order=order, seen=seen).train(lambda: None)
    assert not gate.equality(mine, seen, 1e-5).passed


def test_gradients_of_other_parameters_are_not_equal() -> None:
    one, two = {((2,), 0): torch.ones(2)}, {((3,), 0): torch.ones(3)}
    assert gradient_difference(one, one) == 0
    assert gradient_difference(one, two) == float("inf")
    assert gradient_difference(one, {((2,), 0): torch.tensor([1.0, 2.0])}) == pytest.approx((1 / 5) ** 0.5)
    nan = {((2,), 0): torch.full((2,), float("nan"))}
    assert not gate.Equality(0.0, gradient_difference(nan, nan), 1e-5, 1).passed


# --- turns and ratios ---


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that sides take as they say."""
    told = [0.0]
    monkeypatch.setattr(turns, "now", lambda device: told[0])
    return told


def steady(clock: list[float], name: str, *seconds: float, of: str = "") -> Side:
    """A side whose steps take so long, the last of them for ever."""

    def train(stepped: Stepped) -> None:
        for step in range(99):
            clock[0] += seconds[min(step, len(seconds) - 1)]
            stepped()

    return Side(name, train, of=of)


def test_rounds_that_agree_are_enough(clock: list[float]) -> None:
    sides = [steady(clock, "a", 1.0), steady(clock, "b", 9.0, 2.0, 2.05)]
    take_turns(sides, rounds=9, until=float("inf"), device=CPU)
    assert [len(each.seconds) for each in sides] == [3, 3]
    sides = [steady(clock, "a", 1.0), steady(clock, "b", 9.0, 2.0, 3.0, 2.0, 3.0)]
    take_turns(sides, rounds=5, until=float("inf"), device=CPU)
    assert [len(each.seconds) for each in sides] == [5, 5]


def test_a_peer_goes_on_with_its_quickest_way(clock: list[float]) -> None:
    sides = [steady(clock, "a", 1.0), steady(clock, "b", 3.0, of="b"), steady(clock, "b", 2.0, of="b")]
    take_turns(sides, rounds=5, until=float("inf"), device=CPU)
    assert [len(each.seconds) for each in sides] == [3, 1, 3]
    assert ratio_of(sides[1].seconds, sides[0].seconds).pairs == 1


def test_sides_take_turns_and_end_in_the_middle_of_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    alive = threading.active_count()
    monkeypatch.setattr(turns, "AGREEING", 0.0)

    def side(name: str) -> Side:
        def train(stepped: Stepped) -> None:
            while True:
                steps.append(name)
                stepped()

        return Side(name, train)

    sides = [side("a"), side("b")]
    take_turns(sides, rounds=4, until=float("inf"), device=CPU)
    assert steps[:10] == ["a", "b"] * 5  # a warm-up and four rounds
    assert [len(each.seconds) for each in sides] == [4, 4]
    assert threading.active_count() == alive


def test_past_its_time_a_comparison_takes_the_least_rounds() -> None:
    side = Side("a", lambda stepped: [stepped() for _ in range(99)] and None)
    take_turns([side], rounds=50, until=0.0, least=3, device=CPU)
    assert len(side.seconds) == 3


def test_a_side_that_fails_or_stops_early_is_named() -> None:
    def breaks(stepped: Stepped) -> None:
        raise ValueError("out of luck")

    with pytest.raises(RuntimeError, match="quick failed: out of luck"):
        take_turns([Side("quick", breaks)], rounds=1, until=0.0, device=CPU)
    with pytest.raises(RuntimeError, match="short failed: it ended before its last turn"):
        take_turns([Side("short", lambda stepped: stepped())], rounds=2, until=0.0, device=CPU)


def test_a_ratio_is_the_median_of_pairs() -> None:
    ratio = ratio_of([4.0, 6.0, 9.0], [1.0, 2.0, 2.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.pairs) == (4.0, 3.0, 4.5, 3)


# --- the whole, and its table ---


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    said: list[str] = []
    bench = Bench(
        shape="tiny", gate_shape="tiny", device=CPU, bf16=True, rounds=3, until=0.0, peers=["hf"], tell=said.append
    )
    bench.training(WORKLOADS["single"], "lora", search=True)
    bench.asking(WORKLOADS["shared"])
    machine = dict.fromkeys(("torch", "transformers", "peft", "accelerate", "device"), "1") | {"threads": 1}
    return json.loads(json.dumps(gathered(bench, machine, 1.0)))


@pytest.mark.slow
def test_each_row_has_peer_version_ratio_interval_and_equality(found: dict[str, Any]) -> None:
    assert len(found["rows"]) == 4  # two micro-batches each
    for row in found["rows"]:
        assert row["peer"].startswith("HF")
        assert row["version"][0].isdigit()
        assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["ratio"]["pairs"] == (3 if row["best"] else 1)
        assert row["equal"] is not None
        assert row["equal"] <= 2e-2 or row["workload"].startswith("evaluation")
    assert [row["best"] for row in found["rows"]].count(True) == 2


@pytest.mark.slow
def test_the_table_shows_the_best_of_each_peer_and_whether_the_bar_is_met(found: dict[str, Any]) -> None:
    training = dict(found["rows"][0]) | {"best": True, "bar": 2.0, "equal": 1e-7}
    ratio = {"median": 2.5, "low": 2.4, "high": 2.6, "pairs": 5}
    met = training | {"ratio": ratio}
    missed = training | {"ratio": ratio | {"median": 1.5}}
    memory = met | {"kind": "memory", "bar": 0.4, "ratio": ratio | {"median": 0.3, "pairs": 1}}
    hidden = met | {"best": False, "peer": "not shown"}
    table = markdown(found | {"rows": [met, missed, memory, hidden]})
    assert "2.50x (2.40 to 2.60)" in table
    assert table.count(", met") == 2
    assert table.count(", missed") == 1
    assert "not shown" not in table
    assert "not shown" in markdown(found | {"rows": [hidden]}, all_rows=True)
    readme = section(found | {"rows": [met, missed, memory, hidden, met | {"bar": None, "peer": "not asked"}]})
    assert "1 of these 3 are missed" in readme
    assert "not shown" not in readme
    assert "not asked" not in readme
    assert "All 1 are met" in section(found | {"rows": [met]})


@pytest.mark.peers
def test_trl_computes_the_same_through_the_command_line(tmp_path: Path) -> None:
    if not PEERS_PYTHON.is_file():
        pytest.skip("the benchmark's environment is not made: make bench")
    out = tmp_path / "tiny.json"
    options = "--shape tiny --gate-shape tiny --rounds 3 --minutes 0 --peers trl --only shared memory --out"
    subprocess.run(
        [PEERS_PYTHON, "-m", "benchmarks", *options.split(), str(out)],
        cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["kind"] for row in rows} == {"speed", "memory"}
    assert all(row["equal"] <= 1e-5 for row in rows if row["kind"] == "speed")


def test_the_halves_are_all_there_is() -> None:
    bench = Bench("tiny", "tiny", CPU, bf16=False, rounds=1, until=0.0, peers=[], tell=print)
    names = [name for half in HALVES for name in half]
    assert sorted(names) == sorted(chosen(bench))


def test_a_step_grows_with_its_factor() -> None:
    workload = WORKLOADS["mixed"]
    assert workload.times(3).step == 3 * workload.step
    assert replace(workload, text_only=0).step == workload.images * workload.questions
