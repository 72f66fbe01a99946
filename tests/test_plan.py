"""The order of training is a function of seed, epoch and data, and of nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_mllm.data.plan import Plan

sizes = {
    "size": st.integers(1, 60),
    "micro_batch": st.integers(1, 7),
    "micro_batches": st.integers(1, 5),
    "seed": st.integers(0, 2**63),
}


def steps_of(plan, epoch):
    return [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]


def flat(steps):
    return [index for step in steps for batch in step for index in batch]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.builds(Plan, **sizes), st.integers(0, 3))
def test_every_sample_comes_once_in_an_epoch(plan, epoch):
    steps = steps_of(plan, epoch)
    assert sorted(flat(steps)) == list(range(plan.size))
    assert flat(steps) == plan.order(epoch)
    assert all(batch for step in steps for batch in step)
    assert all(len(batch) <= plan.micro_batch for step in steps for batch in step)
    assert all(1 <= len(step) <= plan.micro_batches for step in steps)
    full = plan.micro_batch * plan.micro_batches
    assert all(len(flat([step])) == full for step in steps[:-1])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.builds(Plan, **sizes), st.integers(0, 40))
def test_a_step_can_be_asked_for_at_any_time(plan, number):
    again = Plan(size=plan.size, micro_batch=plan.micro_batch, micro_batches=plan.micro_batches, seed=plan.seed)
    for other in (0, 5, 90):
        again.step(other)
    assert again.step(number) == plan.step(number)


def test_epochs_and_seeds_have_their_own_orders():
    plan, other = (Plan(size=50, micro_batch=5, micro_batches=2, seed=seed) for seed in (1, 2))
    orders = [tuple(plan.order(epoch)) for epoch in range(4)] + [tuple(other.order(0))]
    assert len(set(orders)) == 5
    assert tuple(plan.order(0)) == orders[0]


def test_the_order_is_the_same_in_every_process_and_year():
    code = (
        "from peft_mllm.data.plan import Plan\n"
        "print(Plan(size=12, micro_batch=3, micro_batches=2, seed=7).order(1),"
        " Plan(size=6, micro_batch=2, micro_batches=1, seed=7, groups=('a', 'b', 'a', 'c', 'b', 'a')).order(0))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("0", "1")
    ]
    assert runs[0] == runs[1]
    here = Plan(size=12, micro_batch=3, micro_batches=2, seed=7).order(1)
    assert runs[0].startswith(str(here))


def test_an_order_that_is_on_record():
    """A change of this order would make every run in the world unable to resume where it stopped."""
    assert Plan(size=8, micro_batch=2, micro_batches=2, seed=42).order(0) == [6, 2, 1, 4, 7, 5, 0, 3]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=40), st.integers(0, 9))
def test_groups_stay_together(labels, seed):
    plan = Plan(size=len(labels), micro_batch=4, micro_batches=2, seed=seed, groups=tuple(labels))
    order = plan.order(0)
    assert sorted(order) == list(range(len(labels)))
    ordered = [labels[i] for i in order]
    runs = [label for i, label in enumerate(ordered) if i == 0 or ordered[i - 1] != label]
    assert Counter(runs) == Counter(set(labels))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_same_micro_batches(processes):
    """The same global batch, split otherwise, has the same micro-batches in the same places."""
    one = Plan(size=50, micro_batch=3, micro_batches=4, seed=0)
    split = Plan(size=50, micro_batch=3, micro_batches=(4 // processes) * processes, seed=0)
    for number in range(2 * one.steps_per_epoch):
        taken = [split.step(number)[rank::processes] for rank in range(processes)]
        together = [taken[i % processes][i // processes] for i in range(len(split.step(number)))]
        assert together == one.step(number)
