"""How much memory a step takes: predictions against what torch's allocator does, plans that fit, and the way out."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import peft_mllm
import tiny
from peft_mllm import fitting, training
from peft_mllm.anatomy import PARTS
from peft_mllm.data.plan import Plan
from peft_mllm.data.supply import Supply
from peft_mllm.data.trees import Batch
from peft_mllm.errors import OutOfMemory, SpecError
from peft_mllm.evaluation import pad_token
from peft_mllm.exactness import layouts
from peft_mllm.lean import install
from peft_mllm.memory import free
from peft_mllm.memory.kept import NO_LONGER, plan_again, to_keep
from peft_mllm.memory.plan import MARGIN, MemoryPlan, Row
from peft_mllm.memory.prepare import plan_run
from peft_mllm.memory.relief import Relief, is_out_of_memory
from peft_mllm.memory.standing import standing
from peft_mllm.memory.trace import trace
from peft_mllm.models import Family
from peft_mllm.optimizer import make_optimizer
from peft_mllm.recompute import Recompute, set_recompute
from peft_mllm.rundir import RunDir
from peft_mllm.spec import Spec, SpeedSpec, TrainSpec
from peft_mllm.tuned import Tuned
from runs import assert_same, command, write_spec
from runs import tiny as tiny_run

CPU = torch.device("cpu")
POLICIES: tuple[Recompute, ...] = ("none", "selective", "full", 2, 3)
WITHIN = 0.10


def larger() -> Family:
    """LLaVA with a decoder in which activations count: four layers of width 256."""
    family = tiny.family()
    config = copy.deepcopy(family.model.config)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 256, 688, 4
    text.num_attention_heads = text.num_key_value_heads = 4
    text.head_dim = 64
    torch.manual_seed(0)
    family.model = type(family.model)(config)
    return family


def supply_of(tuned: Tuned, records: list[Any] | None = None, layout: Any = None) -> Supply:
    """Records as a run would lay them out."""
    spec = spec_of()
    return Supply(
        records=records or tiny.few_records(),
        encode=tuned.family.encode,
        pixels=tuned.family.pixels,
        pad_id=pad_token(tuned),
        layout=layout or layouts(tuned, spec)[0],
        share=True,
    )


def spec_of(**speed: Any) -> Spec:
    return Spec(method="lora", task="scenes_at", output_dir="unused", speed=speed)


def plan(tuned: Tuned, available: int | None, whole: bool = False, **speed: Any) -> MemoryPlan:
    supply = supply_of(tuned, layout="rows")
    order = Plan(size=len(supply.records), micro_batch=len(supply.records), micro_batches=1, seed=0)
    spec = spec_of(**speed)
    return plan_run(tuned, supply, order, spec, device=CPU, dtype=None, available=available, whole=whole)


def predicted(tuned: Tuned, batch: Batch, policy: Recompute) -> int:
    return trace(tuned, batch, policy=policy, device=CPU, dtype=None, accumulating=False).peak


def measured(tuned: Tuned, batch: Batch, policy: Recompute) -> int:
    """What torch's CPU allocator handed out at most in a real forward and backward, over what was there before.

    The profiler hears of each allocation from the allocator itself, also of those inside of kernels.
    """
    given = sum(
        t.untyped_storage().nbytes() for t in [*vars(batch).values(), *batch.pixels.values()] if torch.is_tensor(t)
    )
    set_recompute(tuned.base, tuned.family.anatomy, policy)
    tuned.model.train()
    for parameter in tuned.trainable().values():
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        tuned.answer_losses(batch).sum().backward()
    set_recompute(tuned.base, tuned.family.anatomy, "none")
    live = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak + given


DECODER = r"model\.language_model\..*_proj"
CASES = [
    ("lora", {}), ("lora", {"location": "attention"}), ("lora", {"location": "mlp"}), ("lora", {"dropout": 0.1}),
    ("ia3", {}), ("ia3", {"location": "mlp"}), ("adapter", {}), ("adapter", {"location": "attention"}),
    ("prefix", {}), ("full", {}),
    ("peft", {"type": "LORA", "config": {"r": 4, "use_dora": True, "target_modules": DECODER}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*case, marks=() if case == ("prefix", {}) else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_the_peak_is_predicted(name, options):
    tuned = tiny.tune(name, on=larger(), **options)
    supply = supply_of(tuned)
    (batch,) = supply.batches(range(3))
    for policy in ("none", "selective", "full") if name == "lora" else ("none", "full"):
        truth = measured(tuned, batch, policy)
        assert predicted(tuned, batch, policy) == pytest.approx(truth, rel=WITHIN), policy


LEAN = [("lora", {"dropout": 0.1}), ("lora", {}), ("ia3", {}), ("adapter", {}), ("prefix", {})]


@pytest.mark.parametrize(
    ("name", "options"), [LEAN[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in LEAN[1:])], ids=str
)
def test_the_peak_of_lean_layers_is_predicted(name, options):
    tuned = tiny.tune(name, on=larger(), **options)
    (batch,) = supply_of(tuned).batches(range(3))
    plain = predicted(tuned, batch, "none")
    lean = install(tuned.base, tuned.family.anatomy)
    assert lean.used
    for policy in ("none", "full"):
        truth = measured(tuned, batch, policy)
        assert predicted(tuned, batch, policy) == pytest.approx(truth, rel=WITHIN), policy
    assert predicted(tuned, batch, "none") < 0.9 * plain


LAYOUTS = [(name, layout) for name in ("lora", "prefix", "full") for layout in ("packed", "rows", "padded")]
EACH_ONCE = {("lora", "packed"), ("prefix", "rows"), ("full", "padded")}


@pytest.mark.parametrize(
    ("name", "layout"), [pytest.param(*each, marks=[pytest.mark.slow] * (each not in EACH_ONCE)) for each in LAYOUTS]
)
def test_the_peak_is_predicted_for_qwen_vl_in_every_layout(name, layout):
    tuned = tiny.tune(name, on=tiny.family("qwen_vl"))
    (batch,) = supply_of(tuned, tiny.few_records(), layout).batches(range(3))
    for policy in ("none", 2):
        assert predicted(tuned, batch, policy) == pytest.approx(measured(tuned, batch, policy), rel=WITHIN), policy


@pytest.mark.parametrize("parts", [{"connector": True}, {"connector": True, "vision": True}], ids=str)
def test_the_peak_is_predicted_with_parts_that_train(parts):
    tuned = tiny.tune("lora", on=larger(), parts=parts)
    (batch,) = supply_of(tuned).batches(range(3))
    assert predicted(tuned, batch, "none") == pytest.approx(measured(tuned, batch, "none"), rel=WITHIN)


def test_a_trace_leaves_no_trace():
    untouched, traced = (tiny.tune("prefix", on=tiny.family("qwen_vl")) for _ in range(2))
    (batch,) = supply_of(traced).batches(range(3))
    state = torch.get_rng_state()
    predicted(traced, batch, "full")
    assert torch.equal(torch.get_rng_state(), state)
    assert not traced.model.training or untouched.model.training
    for one, other in zip(untouched.model.parameters(), traced.model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert other.grad is None
    assert torch.equal(untouched.answer_losses(batch), traced.answer_losses(batch))


def test_without_weights_it_is_the_same():
    loaded = tiny.tune("lora", on=tiny.family())
    (batch,) = supply_of(loaded).batches(range(3))
    bare = tiny.family()
    bare.model = bare.model.to("meta")
    with torch.device("meta"):
        tuned = tiny.tune("lora", on=bare)
    assert predicted(tuned, batch, "none") == predicted(loaded, batch, "none")


@pytest.mark.parametrize("name", ["lora", "prefix"])
@pytest.mark.parametrize("policy", [*POLICIES[1:], "offload"])
def test_gradients_are_equal_under_every_policy(name, policy):
    options = {"dropout": 0.2} if name == "lora" else {}
    tuned = tiny.stir(tiny.tune(name, on=larger(), **options))
    (batch,) = supply_of(tuned).batches(range(3))
    plain = gradients(tuned, batch, "none")
    again = gradients(tuned, batch, policy)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        assert torch.equal(gradient, again[key]), key


def gradients(tuned: Tuned, batch: Batch, policy: Recompute) -> dict[str, torch.Tensor]:
    set_recompute(tuned.base, tuned.family.anatomy, policy)
    tuned.model.train()
    torch.manual_seed(3)
    losses = tuned.answer_losses(batch)
    found = torch.autograd.grad(losses.sum(), list(tuned.trainable().values()))
    set_recompute(tuned.base, tuned.family.anatomy, "none")
    return dict(zip(tuned.trainable(), found, strict=True))


def test_the_backward_pass_stops_below_the_first_trainable_layer():
    tuned = tiny.tune("lora", on=larger())
    layers = list(tuned.base.get_submodule(tuned.family.anatomy.layers).children())
    layers[:2] = [layer.requires_grad_(False) for layer in layers[:2]]
    needed = []
    for layer in layers:
        layer.register_forward_hook(
            lambda module, args, out: needed.append((out[0] if isinstance(out, tuple) else out).requires_grad)
        )
    (batch,) = supply_of(tuned).batches(range(3))
    for policy in ("none", "full"):
        needed.clear()
        set_recompute(tuned.base, tuned.family.anatomy, policy)
        tuned.answer_losses(batch)
        assert needed == [False, False, True, True]


@pytest.mark.parametrize(
    "spec",
    [{}, {"optim": "SGD"}, {"optim": "SGD", "optim_args": {"momentum": 0.9}}, {"optim": "Adafactor"}],
    ids=str,
)
def test_the_optimizers_state_is_predicted(spec):
    tuned = tiny.tune("lora")
    made = TrainSpec(**spec)
    rates = dict.fromkeys(PARTS, 1e-3)
    optimizer = make_optimizer(tuned.trainable(), tuned.family.anatomy, rates, made)
    for parameter in tuned.trainable().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert standing(tuned, made, dtype=None).optimizer == sum(value.nbytes for value in states)


@pytest.mark.slow
def test_a_plan_takes_what_fits_and_the_quickest_of_it():
    tuned = tiny.tune("lora", on=larger())
    whole = plan(tuned, None, whole=True)
    by_policy = {row.policy: row for row in whole.table}
    assert by_policy.keys() >= {"none", 2, "selective", "full"}
    assert by_policy["full"].peak < by_policy["selective"].peak < by_policy["none"].peak
    assert by_policy["none"].time == 1 < by_policy["selective"].time < by_policy["full"].time
    assert (whole.policy, whole.micro_batch_tokens) == ("none", None)

    ample = plan(tuned, 10**12)
    assert [row.bound for row in ample.table] == [True]
    assert ample.predicted_bytes > by_policy["none"].peak
    enough = plan(tuned, round(1.01 * by_policy["none"].peak / (1 - MARGIN)))
    assert (enough.policy, enough.predicted_bytes) == ("none", by_policy["none"].peak)
    assert enough.micro_batch_tokens >= by_policy["none"].tokens

    tight = plan(tuned, round(1.01 * by_policy["full"].peak / (1 - MARGIN)))
    assert tight.predicted_bytes <= tight.available_bytes * (1 - MARGIN) + len(tight.table[0].parts)  # rounded
    assert tight.policy != "none" or tight.micro_batch_tokens < by_policy["none"].tokens
    stays = standing(tuned, TrainSpec(), dtype=None)
    for batch in replace(supply_of(tuned, layout="rows"), tokens=tight.micro_batch_tokens).batches(range(3)):
        assert measured(tuned, batch, tight.policy) + stays.weights + stays.optimizer <= tight.available_bytes

    nothing = plan(tuned, 1000)
    assert nothing.policy == "full"
    assert "no way" in " ".join(nothing.in_words())


def test_what_a_user_decides_is_kept():
    tuned = tiny.tune("lora", on=larger())
    made = plan(tuned, None, recompute=3, micro_batch_tokens=100)
    assert (made.policy, made.micro_batch_tokens) == (3, 100)
    assert json.loads(json.dumps(made.to_json()))["table"][0]["peak"] == made.predicted_bytes
    with pytest.raises(SpecError, match="no GPU"):
        plan(tuned, None, recompute="offload")


def test_what_is_free_does_not_say_where_a_micro_batch_is_cut():
    """Under `speed.deterministic`; with 1,000 bytes `auto` would compute one sample at once."""
    tuned = tiny.tune("lora", on=larger())
    assert plan(tuned, 1000, recompute="none").micro_batch_tokens is not None
    assert plan(tuned, 1000, recompute="none", deterministic="world-size").micro_batch_tokens is None
    given = plan(tuned, 1000, recompute="none", deterministic="world-size", micro_batch_tokens=50)
    assert given.micro_batch_tokens == 50


def test_a_model_that_cannot_be_followed_is_tried(monkeypatch):
    tuned = tiny.tune("lora")
    monkeypatch.setattr("peft_mllm.memory.plan.trace", lambda *args, **kwargs: 1 / 0)
    made = plan(tuned, 10**6)
    assert (made.policy, made.micro_batch_tokens, made.predicted_bytes) == ("none", None, None)
    assert "cannot be said" in " ".join(made.in_words())


def test_what_is_free_of_a_container(tmp_path: Path) -> None:
    root, process = tmp_path / "cgroup", tmp_path / "self"
    inner = root / "a" / "b"
    inner.mkdir(parents=True)
    process.write_text("0::/a/b\n")
    (root / "a" / "memory.max").write_text("1000\n")
    (root / "a" / "memory.current").write_text("700\n")
    (root / "a" / "memory.stat").write_text("anon 5\ninactive_file 100\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("600\n")
    assert free._of_cgroups(root, process) == [400]
    assert free._of_machine(tmp_path / "none") is None
    assert (free.free_bytes(CPU) or 1) > 0


NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError(NO_MEMORY), True),
        (MemoryError(), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_what_is_out_of_memory(error, is_it):
    assert is_out_of_memory(error) == is_it


class Device:
    """Memory for so many tokens."""

    def __init__(self, tuned: Tuned, tokens: int):
        self.tuned, self.tokens, self.said, self.switched = tuned, tokens, [], []
        supply = supply_of(tuned, tiny.mixed_records())
        self.relief = Relief(
            relay=lambda indices, tokens: replace(supply, tokens=tokens).batches(indices),
            recompute=self.switched.append,
            note=self.said.append,
        )
        self.batches = supply.batches(range(9))

    def step(self) -> dict[str, torch.Tensor]:
        """The gradients of a step."""
        parameters = self.tuned.trainable()
        drop = lambda: [setattr(p, "grad", None) for p in parameters.values()]  # noqa: E731
        drop()
        _, losses = self.relief.compute(self.gradients, self.batches, lambda: [list(range(9))], drop)
        assert sum(map(len, losses)) == sum(batch.answer_tokens for batch in self.batches)
        return {name: p.grad.clone() for name, p in parameters.items()}

    def gradients(self, batches):
        losses = []
        for batch in batches:
            losses.append(self.tuned.answer_losses(batch))
            losses[-1].sum().backward()
            if batch.input_ids.numel() > self.tokens:  # what it has added up so far must not count
                raise RuntimeError(NO_MEMORY)
        return losses


def test_out_of_memory_is_met_once_with_smaller_parts():
    tuned = tiny.stir(tiny.tune("lora"))
    plain = Device(tuned, 10**9).step()
    device = Device(tuned, 200)
    for _ in range(2):  # the second step begins with the smaller parts
        for name, gradient in device.step().items():
            assert (gradient - plain[name]).norm() <= 1e-5 * plain[name].norm(), name
    assert len(device.said) == 1
    assert "out of memory" in device.said[0]
    assert device.relief.limit < 200

    with pytest.raises(OutOfMemory, match="recompute: full"):
        Device(tuned, 10).step()


def test_out_of_memory_with_one_sample_computes_layers_again():
    tuned = tiny.tune("lora")
    device = Device(tuned, 10)
    device.batches = device.relief.relay([1], 1)
    with pytest.raises(OutOfMemory):
        device.step()
    assert device.switched == ["full"]


def test_where_bits_count_nothing_is_halved():
    """Layers are computed again, which changes no bit (`speed.deterministic`)."""
    device = Device(tiny.tune("lora"), 10)
    device.relief.whole = True
    with pytest.raises(OutOfMemory):
        device.step()
    assert (device.switched, device.relief.limit) == (["full"], None)


def test_other_errors_go_through():
    tuned = tiny.tune("lora")
    device = Device(tuned, 10)
    with pytest.raises(ZeroDivisionError):
        device.relief.compute(lambda batches: 1 / 0, device.batches, lambda: [], lambda: None)


@pytest.mark.slow
def test_the_verb_shows_every_way(tmp_path):
    spec = write_spec(tmp_path / "run.yaml", tiny_run(tmp_path / "run"))
    said = command("plan", str(spec), "--memory", "1GB")
    assert said.code == 0, said.err
    assert "taken" in said.out
    assert "954 MiB" in said.out
    made = json.loads(command("plan", str(spec), "speed.recompute=full", "--json").out)
    assert made["policy"] == "full"
    assert made["predicted_bytes"] == made["table"][0]["peak"] == sum(made["table"][0]["parts"].values())
    assert not (tmp_path / "run").exists()
    wrong = command("plan", str(spec), "--memory", "plenty")
    assert (wrong.code, "80GB" in wrong.err) == (2, True)
    nothing = command("plan", str(spec), "method=none")
    assert (nothing.code, "trains nothing" in nothing.err) == (2, True)


def test_a_run_records_its_plan(tmp_path):
    result = peft_mllm.train(tiny_run(tmp_path / "run", speed={"recompute": 2, "micro_batch_tokens": 60}), quiet=True)
    assert (result["plan"]["policy"], result["plan"]["micro_batch_tokens"]) == (2, 60)
    assert result["plan"]["predicted_bytes"] > 0


def test_a_run_that_goes_on_computes_its_steps_as_before(tmp_path, monkeypatch):
    """With dropout: another split of a micro-batch draws other masks."""
    real, step = fitting.plan_run, training.train_step

    def scarce(*args, **how):
        return replace(real(*args, **how), micro_batch_tokens=40)

    def dies(job, number, batches):
        if number == 3:
            raise ZeroDivisionError
        return step(job, number, batches)

    with monkeypatch.context() as then:
        then.setattr(fitting, "plan_run", scarce)
        peft_mllm.train(tiny_run(tmp_path / "whole"), quiet=True)
        then.setattr(training, "train_step", dies)
        with pytest.raises(ZeroDivisionError):
            peft_mllm.train(tiny_run(tmp_path / "cut"), quiet=True)
    resumed = peft_mllm.train(tiny_run(tmp_path / "cut"), quiet=True)
    assert resumed["training"]["resumed"] == 1
    assert resumed["plan"]["micro_batch_tokens"] == 40
    assert_same(tmp_path / "cut", tmp_path / "whole")


def made_with(fits, seen=None):
    """A planner whose micro-batches fit up to so many tokens."""

    def make(speed):
        tokens = speed.micro_batch_tokens
        row = Row("none", 9, {}, fits=tokens == "auto" or tokens <= fits, time=1.0)
        if seen is not None:
            seen.append(speed)
        return MemoryPlan("none", 7 if tokens == "auto" else tokens, 1, 1, (row,))

    return make


def test_a_kept_plan_holds_while_it_fits_and_while_the_settings_are_the_same():
    speed, said, seen = SpeedSpec(), [], []
    first = plan_again(None, speed, made_with(0), note=said.append)
    assert (first.policy, first.micro_batch_tokens) == ("none", 7)
    kept = json.loads(json.dumps(to_keep(replace(first, policy=2, micro_batch_tokens=40), speed)))
    again = plan_again(kept, speed, made_with(40, seen), note=said.append)
    assert (again.policy, again.micro_batch_tokens, said) == (2, 40, [])
    assert (seen[0].recompute, seen[0].micro_batch_tokens) == (2, 40)
    asked = plan_again(kept, SpeedSpec(recompute="full"), made_with(40), note=said.append)
    assert (asked.micro_batch_tokens, said) == (7, []), "who asks for something else now gets that"
    less = plan_again(kept, speed, made_with(39), note=said.append)
    assert (less.policy, less.micro_batch_tokens) == ("none", 7)
    assert said == [NO_LONGER.format(tokens="40", policy="one layer of 2 is computed again")]
    no_limit = to_keep(replace(first, micro_batch_tokens=None), speed)
    assert plan_again(no_limit, speed, made_with(10**30), note=said.append).micro_batch_tokens is None
    assert plan_again(no_limit, speed, made_with(10**9), note=said.append).micro_batch_tokens == 7
    assert len(said) == 2


def test_a_kept_plan_is_the_runs_own(tmp_path):
    with RunDir.open(tmp_path / "run", {"seed": 1}) as run:
        assert run.kept_plan() is None
        run.keep_plan({"planned": 1})
        assert run.kept_plan() == {"planned": 1}
    with RunDir.open(tmp_path / "run", {"seed": 2}) as run:  # nothing was made that it would spoil
        assert run.kept_plan() is None
        run.keep_plan({"planned": 2})
        file = run.path / "plan.json"
        file.write_bytes(file.read_bytes().replace(b"2", b"3"))
        assert run.kept_plan() is None


def test_a_run_that_runs_out_of_memory_ends_as_it_would(tmp_path, monkeypatch):
    still = {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.0}
    plain = peft_mllm.train(tiny_run(tmp_path / "plain", method=still), quiet=True)
    losses, sizes = Tuned.answer_losses, []

    def narrow(self, batch):
        sizes.append(batch.input_ids.numel())
        if torch.is_grad_enabled() and self.model.training and sizes[-1] > 65:
            raise RuntimeError(NO_MEMORY)
        return losses(self, batch)

    monkeypatch.setattr(Tuned, "answer_losses", narrow)
    relieved = peft_mllm.train(tiny_run(tmp_path / "narrow", method=still), quiet=True)
    assert max(sizes) > 65
    ends = [result["training"]["best"]["eval_loss"] for result in (plain, relieved)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
