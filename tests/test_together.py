"""Gradients of several runs that are computed at once are those of each run by itself, bit for bit on a CPU."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch

import tiny
from peft_mllm.data.trees import pack, plant
from peft_mllm.errors import DiskError
from peft_mllm.lean import Levers, install, parts_of
from peft_mllm.lean.rows import FEW
from peft_mllm.memory.relief import is_out_of_memory
from peft_mllm.models import MODELS
from peft_mllm.proof import Proof
from peft_mllm.recompute import set_recompute
from peft_mllm.together.crew import Crew
from peft_mllm.together.joined import MOST_TOKENS, NAME, Asked, SharedBase

MIXED = [
    ("lora", {"dropout": 0.3}),
    ("ia3", {}),
    ("adapter", {"preset": "parallel", "dropout": 0.2}),
    ("prefix", {}),
    ("lora", {"location": "mlp", "rslora": True}),
    ("adapter", {"preset": "houlsby"}),
    ("adapter", {"before": ("o", "down"), "after": ("gate",), "non_linearity": "gelu"}),
    ("adapter", {"preset": "parallel", "location": "both", "scaling": "learned"}),
]
FOUR = MIXED[:4]
ALONE = ("lora", {"dora": True})
"""What no function computes."""


# --- a crew: threads that take turns ---


class Task:
    """Asks so many times, and notices when another runs at the same moment."""

    alone = threading.Lock()

    def __init__(self, name, times, *, seconds=0.0, ends=None):
        self.name, self.times, self.seconds, self.ends = name, times, seconds, ends
        self.given, self.clock = [], 0.0

    def __call__(self, member):
        for number in range(self.times):
            with self.turn():
                time.sleep(self.seconds)
            self.given.append(member.meet((self.name, number)))
        with self.turn():
            self.clock = member.clock()
            if self.ends is not None:
                raise self.ends
        return self.name

    def turn(self):
        assert self.alone.acquire(blocking=False), "two ran at once"
        self.alone.release()
        return self.alone


def crew_of(said, *, weigh=lambda asked: 1.0):
    def compute(asked):
        assert threading.current_thread() is threading.main_thread()
        said.append([f"{name}{number}" for name, number in asked])
        return [f"{name}{number}!" for name, number in asked]

    return Crew(compute, weigh=weigh)


def test_all_that_are_left_meet_in_their_order():
    said = []
    tasks = [Task("a", 3, seconds=0.002), Task("b", 1), Task("c", 2, seconds=0.001), Task("d", 0)]
    assert crew_of(said).work(tasks) == ["a", "b", "c", "d"]
    assert said == [["a0", "b0", "c0"], ["a1", "c1"], ["a2"]]
    assert [task.given for task in tasks] == [["a0!", "a1!", "a2!"], ["b0!"], ["c0!", "c1!"], []]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_of_one_is_its_own(error):
    said = []
    outcomes = crew_of(said).work([Task("a", 2), Task("b", 1, ends=error), Task("c", 2)])
    assert outcomes == ["a", error, "c"]
    assert said == [["a0", "b0", "c0"], ["a1", "c1"]]


def test_what_the_computation_finds_wrong_is_raised_where_it_was_asked():
    wrong = RuntimeError("no room")

    def compute(asked):
        return [wrong if name == "b" else number for name, number in asked]

    tasks = [Task("a", 2), Task("b", 2), Task("c", 1)]
    assert Crew(compute, weigh=lambda asked: 1.0).work(tasks) == ["a", wrong, "c"]
    assert [task.given for task in tasks] == [[0, 1], [], [0]]


def test_one_that_catches_it_goes_on():
    asked_of = []

    def compute(asked):
        asked_of.append(list(asked))
        return [MemoryError("no room") if each == "much" else each for each in asked]

    def modest(member):
        try:
            return member.meet("much")
        except MemoryError:
            return member.meet("little")

    assert Crew(compute, weigh=lambda asked: 1.0).work([modest, lambda member: member.meet("x")]) == ["little", "x"]
    assert asked_of == [["much", "x"], ["little"]]


def test_a_computation_that_cannot_go_on_ends_the_work():
    def compute(asked):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Crew(compute, weigh=lambda asked: 1.0).work([Task("a", 1), Task("b", 1)])


def test_a_clock_counts_what_is_its_own_and_its_part_of_the_rest():
    def compute(asked):
        time.sleep(0.2)
        return [None] * len(asked)

    tasks = [Task("a", 1, seconds=0.1), Task("b", 1)]
    Crew(compute, weigh=lambda asked: 3.0 if asked[0] == "a" else 1.0).work(tasks)
    assert 0.25 <= tasks[0].clock < 0.25 + 0.1
    assert 0.05 <= tasks[1].clock < 0.05 + 0.1


# --- gradients at once ---


def family(name):
    return tiny.family(name) if name in MODELS else MODELS["generic"].tiny_member(name, image_size=28)


def runs_on(base, cases, *, lean=True, **parts):
    """A run of each method, each on a twin of the base, moved away from where it starts."""
    runs = []
    for seed, (method, options) in enumerate(cases):
        tuned = tiny.tune(method, on=base.twin(), seed=seed, parts=parts, **options)
        tiny.stir(tuned, spread=0.02, seed=seed)
        tuned.model.train()
        if lean:
            install(tuned.base, tuned.family.anatomy, Levers())
        runs.append(tuned)
    return runs


def laid(tuned, records):
    of = tiny.samples(tuned.family, records)
    if not tuned.packs:
        return tiny.batch_for(tuned, of)
    return pack(plant(of, share=True), pixels=tuned.family.pixels, pad_id=tuned.family.tokenizer.pad_token_id)


def asked_by(runs, records, **more):
    """Each its own batch of some records, its own seed, and a number of answers to divide by."""
    return [
        Asked(run, laid(run, own), seed=7 + number, answers=5.0 + number, **more)
        for number, (run, own) in enumerate(zip(runs, records, strict=True))
    ]


def taken(asked):
    """A run's gradients by name; it has none then."""
    found = {name: parameter.grad for name, parameter in asked.tuned.trainable().items()}
    for parameter in asked.tuned.trainable().values():
        parameter.grad = None
    return found


def by_itself(asked):
    return asked.alone(), taken(asked)


def assert_equal(found, expected):
    (losses, gradients), (own_losses, own_gradients) = found, expected
    assert torch.equal(losses, own_losses)
    assert gradients.keys() == own_gradients.keys()
    for name, own in own_gradients.items():
        assert (gradients[name] is None) == (own is None), name
        assert own is None or torch.equal(gradients[name], own), name


@pytest.fixture
def at_once(monkeypatch):
    """The sizes of what was computed at once."""
    sizes, joined = [], SharedBase._joined

    def noted(self, entering):
        sizes.append(len(entering))
        return joined(self, entering)

    monkeypatch.setattr(SharedBase, "_joined", noted)
    return sizes


def assert_as_alone(base, asked):
    """At the first time, when it is proven, and at the second, when it is not."""
    expected = [by_itself(each) for each in asked]
    shared = SharedBase(base.twin(), note=lambda text: pytest.fail(text))
    for _ in range(2):
        losses = shared.add_gradients(asked)
        for each, own, alone in zip(asked, losses, expected, strict=True):
            assert_equal((own, taken(each)), alone)
    return shared


RECORDS = tiny.mixed_records()
MANY = [RECORDS] * len(MIXED)
OWN = [RECORDS[k % 6 : k % 6 + 3] for k in range(len(MIXED))]
SINGLE = [[RECORDS[k]] for k in range(len(MIXED))]
"""Of one sample each; the second is text alone, and some have fewer tokens than a product's kernel takes for many."""
TEXT = [[RECORDS[1]]] * len(MIXED)
OTHERS = ["internvl", "llava_next", "smolvlm"]


LAID = {"many": MANY, "own": OWN, "single": SINGLE, "text": TEXT}
QUICK = {("llava", how) for how in LAID} | {("qwen2_5_vl", "single")}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=() if (name, how) in QUICK else pytest.mark.slow)
        for name in ("llava", "qwen2_5_vl", *OTHERS)
        for how in LAID
    ],
)
def test_each_run_has_the_gradients_that_it_has_alone(name, how, at_once):
    base, records = family(name), LAID[how]
    asked = asked_by(runs_on(base, MIXED), records)
    assert_as_alone(base, asked)
    assert at_once == [len(MIXED)] * 2
    assert {each.tuned.proofs[NAME].difference for each in asked} == {0.0}
    assert (min(each.batch.answer_tokens for each in asked) < FEW) == (how != "many")
    if (name, how) == ("qwen2_5_vl", "single"):
        assert min(each.batch.tokens for each in asked) < FEW
        assert {each.batch.position_ids.ndim for each in asked} == {2, 3}  # an image has positions on several axes


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_a_tuned_connector_is_each_runs_own(name, at_once):
    base = family(name)
    asked = asked_by(runs_on(base, FOUR, connector=True), OWN[:4])
    assert_as_alone(base, asked)
    assert at_once == [4, 4]
    trained = set.union(*(set(each.tuned.trainable()) for each in asked))
    assert any("modules_to_save" in name for name in trained)


@pytest.mark.parametrize("name", ["qwen_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_a_model_whose_decoder_is_given_more_is_computed_run_by_run(name, at_once):
    base = family(name)
    asked = asked_by(runs_on(base, FOUR), OWN[:4])
    assert_as_alone(base, asked)
    assert at_once == []


def test_methods_in_no_product_stand_beside_those_that_are(at_once):
    base = family("llava")
    before = [parameter.clone() for parameter in base.model.parameters()]
    cases = [FOUR[0], ALONE, FOUR[1], ("full", {}), ("layernorm", {}), ("peft", {"type": "VERA", "config": {"r": 8}})]
    asked = asked_by(runs_on(base, cases), OWN[:6])
    assert_as_alone(base, asked)
    assert at_once == [2, 2]
    for each in asked:
        for parameter in each.tuned.trainable().values():
            parameter.data.add_(1.0)
    assert all(map(torch.equal, base.model.parameters(), before))


def test_a_layer_that_is_computed_again_in_the_backward_pass_is_in_no_product(at_once):
    base = family("llava")
    asked = asked_by(runs_on(base, FOUR), OWN[:4])
    policies = ("full", "none", "offload", "none")
    for each, policy in zip(asked, policies, strict=True):
        set_recompute(each.tuned.base, each.tuned.family.anatomy, policy)
    assert_as_alone(base, asked)
    assert at_once == [2, 2]
    for each, policy in zip(asked, policies, strict=True):
        wrapped = {"full": "layers", "offload": "decoder"}.get(policy, "")
        layer = each.tuned.base.get_submodule(each.tuned.family.anatomy.layers)[0]
        assert ("forward" in vars(layer), "forward" in vars(each.tuned.decoder)) == (
            wrapped == "layers",
            wrapped == "decoder",
        )


def test_plain_layers_are_in_no_product(at_once):
    base = family("llava")
    assert_as_alone(base, asked_by(runs_on(base, FOUR[:2], lean=False), OWN[:2]))
    assert at_once == []


def test_gradients_are_added_to_those_that_are_there():
    base = family("llava")
    runs = runs_on(base, FOUR)
    steps = [asked_by(runs, [records] * 4) for records in (RECORDS[:3], RECORDS[3:5], RECORDS[5:])]
    expected = []
    for number in range(4):
        losses = [step[number].alone() for step in steps]
        expected.append((torch.cat(losses), taken(steps[0][number])))
    shared = SharedBase(base.twin())
    for _ in range(2):
        losses = [shared.add_gradients(step) for step in steps]
        for number in range(4):
            found = torch.cat([each[number] for each in losses]), taken(steps[0][number])
            assert_equal(found, expected[number])


@pytest.mark.slow
def test_with_several_threads_they_are_equal_to_rounding():
    """Threads share out the rows of all runs otherwise than those of one, and round otherwise where a share ends."""
    base = family("llava")
    asked = asked_by(runs_on(base, FOUR), MANY[:4])
    torch.set_num_threads(2)
    try:
        expected = [by_itself(each) for each in asked]
        SharedBase(base.twin(), note=pytest.fail).add_gradients(asked)
        for each, (_, own) in zip(asked, expected, strict=True):
            for name, gradient in taken(each).items():
                assert (gradient - own[name]).norm() <= 1e-5 * own[name].norm()
    finally:
        torch.set_num_threads(1)


def test_runs_that_end_leave_the_others_as_they_are(at_once):
    base = family("llava")
    asked = asked_by(runs_on(base, FOUR), OWN[:4])
    expected = [by_itself(each) for each in asked]
    shared = SharedBase(base.twin())
    for places in ([0, 1, 2, 3], [0, 2, 3], [2, 3], [3], [0, 1]):
        for place, losses in zip(places, shared.add_gradients([asked[place] for place in places]), strict=True):
            assert_equal((losses, taken(asked[place])), expected[place])
    assert at_once == [4, 3, 2, 2]


def test_so_many_tokens_are_computed_at_once_as_the_most_careful_run_allows(at_once):
    base = family("llava")
    runs = runs_on(base, FOUR)
    tokens = laid(runs[0], RECORDS[:2]).tokens
    for limit, sizes in ((2 * tokens, [2, 2]), (3 * tokens, [3]), (tokens, []), (None, [4])):
        asked = asked_by(runs, [RECORDS[:2]] * 4)
        asked = [asked[0], dataclasses.replace(asked[1], limit=limit), *asked[2:]]
        assert 4 * tokens <= MOST_TOKENS
        at_once.clear()
        assert_as_alone(base, asked)
        # who is asked by itself, and the last of three, have no limit
        assert at_once[: len(sizes)] == sizes


def test_bfloat16_is_equal_to_rounding_and_never_in_one_product_with_float32(at_once):
    base = family("llava")
    cases = [("lora", {"alpha": 8}), ("ia3", {}), ("adapter", {}), ("prefix", {})]
    runs = runs_on(base, cases)
    half = [dataclasses.replace(run, bf16=True, proofs={}) for run in runs]
    asked = asked_by(half, OWN[:4])
    expected = [by_itself(each) for each in asked]
    shared = SharedBase(base.twin(), note=lambda text: pytest.fail(text))
    for _ in range(2):
        for each, losses, (own, gradients) in zip(asked, shared.add_gradients(asked), expected, strict=True):
            assert (losses - own).norm() <= 2e-2 * own.norm()
            found = taken(each)
            theirs = torch.cat([g.flatten() for g in gradients.values()])
            assert (torch.cat([g.flatten() for g in found.values()]) - theirs).norm() <= 2e-2 * theirs.norm()
    assert at_once == [4, 4]
    at_once.clear()
    mixed = [*asked_by(runs[:2], OWN[:2]), *asked[2:]]
    assert_as_alone(base, mixed[:2])
    shared.add_gradients(mixed)
    assert at_once[-2:] == [2, 2]


def test_who_is_found_wrong_is_computed_by_itself_and_it_is_said(monkeypatch):
    base = family("llava")
    asked = asked_by(runs_on(base, FOUR), OWN[:4])
    expected = [by_itself(each) for each in asked]
    losses = SharedBase._losses
    monkeypatch.setattr(SharedBase, "_losses", lambda *a: [each * (1 + 0.01 * (len(each) == len(expected[1][0])))
                                                           for each in losses(*a)])  # fmt: skip
    notes = []
    shared = SharedBase(base.twin(), note=notes.append)
    for _ in range(2):
        found = shared.add_gradients(asked)
        for each, own, alone in zip(asked, found, expected, strict=True):
            if each.tuned.proofs[NAME].passed:
                taken(each)
            else:
                assert_equal((own, taken(each)), alone)
    wrong = [each for each in asked if not each.tuned.proofs[NAME].passed]
    assert 0 < len(wrong) == len(notes)
    assert all("computed together with others" in note for note in notes)


def test_a_sample_that_is_no_number_is_its_own_runs(at_once):
    base = family("llava")
    runs = runs_on(base, FOUR)
    with torch.no_grad():
        next(iter(runs[1].trainable().values())).fill_(float("nan"))
    asked = asked_by(runs, OWN[:4])
    expected = [by_itself(each) for each in asked]
    shared = SharedBase(base.twin())
    for _ in range(2):
        losses = shared.add_gradients(asked)
        assert losses[1].isnan().all()
        for place in (0, 2, 3):
            assert_equal((losses[place], taken(asked[place])), expected[place])
        taken(asked[1])


def test_an_error_of_one_by_itself_is_not_the_others(monkeypatch, at_once):
    base = family("llava")
    asked = asked_by(runs_on(base, [*FOUR, ALONE]), OWN[:5])
    expected = [by_itself(each) for each in asked]
    shared, broken, full = SharedBase(base.twin()), asked[4].tuned, DiskError("the disk is full")

    def fail(*args, **kwargs):
        raise full

    for owner in (broken, asked[1].tuned):  # one that is computed by itself, and one on its way to the others
        monkeypatch.setattr(owner.base.base_model, "forward", fail)
        losses = shared.add_gradients(asked)
        for each, own, alone in zip(asked, losses, expected, strict=True):
            if "forward" in vars(each.tuned.base.base_model):
                assert own is full
                taken(each)
            else:
                assert_equal((own, taken(each)), alone)
    assert at_once == [4, 3]


@pytest.mark.parametrize("why", ["out of memory", "shapes do not fit"])
def test_what_cannot_be_computed_at_once_is_computed_run_by_run(monkeypatch, why):
    base = family("llava")
    asked = asked_by(runs_on(base, FOUR), OWN[:4])
    steps = [[dataclasses.replace(each, seed=seed) for each in asked] for seed in (1, 2)]
    expected = [(torch.cat([step[number].alone() for step in steps]), taken(asked[number])) for number in range(4)]
    notes, losses, tried = [], SharedBase._losses, []
    shared = SharedBase(base.twin(), note=notes.append)
    shared.add_gradients(asked)
    for each in asked:
        taken(each)

    def too_much(self, runs):
        tried.append(len(runs))
        found = losses(self, runs)
        if len(runs) == 4:
            found[0].sum().backward(retain_graph=True)  # some gradients are there when it ends
            raise RuntimeError(why)
        return found

    monkeypatch.setattr(SharedBase, "_losses", too_much)
    found = [shared.add_gradients(step) for step in steps]
    for number, each in enumerate(asked):
        assert_equal((torch.cat([step[number] for step in found]), taken(each)), expected[number])
    assert is_out_of_memory(RuntimeError(why)) == (why == "out of memory")
    assert tried == ([4] if why == "shapes do not fit" else [4, 2])  # half as many tokens at once
    assert len(notes) == 1
    assert why in notes[0]


def test_it_leaves_the_runs_models_as_they_are():
    base = family("llava")
    asked = asked_by(runs_on(base, FOUR), OWN[:4])
    before = [parts_of(each.tuned.base, each.tuned.family.anatomy) for each in asked]
    SharedBase(base.twin()).add_gradients(asked)
    for each, parts in zip(asked, before, strict=True):
        assert all(a is b for a, b in zip(parts_of(each.tuned.base, each.tuned.family.anatomy), parts, strict=True))
        assert "forward" not in vars(each.tuned.decoder)
        assert isinstance(each.tuned.proofs[NAME], Proof)
