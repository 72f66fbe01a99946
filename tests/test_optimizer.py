"""Optimizers and schedules by name, groups by part, and a state that comes back."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import tiny
from peft_mllm.errors import SpecError
from peft_mllm.optimizer import flat_state, learning_rates, load_flat_state, make_optimizer, make_schedule
from peft_mllm.spec import TrainSpec

RATES = {"llm": 1e-3, "connector": 2e-5, "vision": 3e-6}


def parameters():
    """A connector's, a tower's and a decoder's: a matrix and a vector each."""
    torch.manual_seed(0)
    anatomy = tiny.family().anatomy
    return {
        f"{prefix}.{name}": nn.Parameter(torch.randn(shape))
        for prefix in (f"{anatomy.llm}.layers.0", anatomy.connector[0], f"base_model.model.{anatomy.vision[0]}")
        for name, shape in (("weight", (3, 2)), ("bias", (3,)))
    }


def optimizer(of=None, rates=RATES, **spec):
    return make_optimizer(of or parameters(), tiny.family().anatomy, rates, TrainSpec(**spec))


def test_parts_have_their_learning_rates_and_vectors_do_not_decay():
    made = optimizer(weight_decay=0.1)
    groups = [(g["lr"], g["weight_decay"], [p.ndim for p in g["params"]]) for g in made.param_groups]
    assert sorted(groups) == sorted(
        (rate, decay, [dims]) for rate in RATES.values() for decay, dims in ((0.1, 2), (0.0, 1))
    )
    assert isinstance(made, torch.optim.AdamW)


def test_rates_come_from_spec_or_method():
    assert learning_rates(TrainSpec(), 5e-5) == {"llm": 5e-5, "connector": 2e-5, "vision": 2e-5}
    spec = TrainSpec(learning_rate=1e-3, connector_learning_rate=1e-4, vision_learning_rate=1e-5)
    assert learning_rates(spec, 5e-5) == {"llm": 1e-3, "connector": 1e-4, "vision": 1e-5}


def test_updates_are_fused_where_torch_can_and_nobody_says_otherwise():
    assert optimizer().defaults["fused"]
    assert not optimizer(optim_args={"foreach": True}).defaults["fused"]
    assert "fused" not in optimizer(optim="NAdam").defaults


def test_a_fused_update_is_the_same_but_for_rounding():
    def after(**spec):
        of = parameters()
        made = optimizer(of, weight_decay=0.01, **spec)
        for _ in range(5):
            sum(p.square().sum() for p in of.values()).backward()
            made.step()
            made.zero_grad()
        return torch.cat([p.detach().flatten() for p in of.values()])

    fused, plain = after(), after(optim_args={"fused": False})
    assert (fused - plain).norm() <= 1e-6 * plain.norm()


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adafactor", "RMSprop", "Adagrad", "NAdam", "RAdam"])
def test_any_optimizer_of_torch(name):
    of = parameters()
    made = optimizer(of, optim=name, weight_decay=0.01)
    assert type(made).__name__ == name
    before = {n: p.detach().clone() for n, p in of.items()}
    sum(p.square().sum() for p in of.values()).backward()
    made.step()
    assert all(not torch.equal(before[n], p) for n, p in of.items())


def test_arguments_reach_it():
    made = optimizer(adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6)
    assert (made.defaults["betas"], made.defaults["eps"]) == ((0.8, 0.9), 1e-6)
    assert optimizer(optim="SGD", optim_args={"momentum": 0.9}).defaults["momentum"] == 0.9
    assert optimizer(optim_args={"amsgrad": True}).defaults["amsgrad"]
    assert optimizer(optim="Adafactor").defaults["eps"][0] is None  # its own eps is a pair; Adam's is not for it


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"optim": "adamw"}, "Did you mean 'Adam"),
        ({"optim": "Optimizer"}, "no optimizer 'Optimizer'"),
        ({"optim": "SGD", "optim_args": {"momentun": 0.9}}, "momentun"),
        ({"optim": "SGD", "optim_args": {"momentum": -1.0}}, "momentum"),
    ],
)
def test_what_torch_has_not_is_refused(spec, said):
    with pytest.raises(SpecError, match=said):
        optimizer(**spec)


def test_adams_options_do_nothing_elsewhere():
    """A switch without effect is an error; SGD has no betas."""
    with pytest.raises(SpecError, match="adam_beta1"):
        optimizer(optim="SGD", adam_beta1=0.5)


def factors(total=20, **spec):
    schedule = make_schedule(optimizer(), TrainSpec(**spec), total)
    return [schedule(step) for step in range(total)]


def test_schedules():
    cosine = factors(warmup_ratio=0.1)
    assert cosine[:3] == [0.0, 0.5, 1.0]
    assert all(a > b for a, b in pairwise(cosine[2:]))
    assert cosine[-1] > 0
    assert factors(lr_scheduler_type="constant") == [1.0] * 20
    linear = factors(lr_scheduler_type="linear", warmup_steps=5, warmup_ratio=0.5)
    assert linear[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert linear[-1] == pytest.approx(1 / 15)
    kept = factors(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_ratio=0)
    assert min(kept) >= 0.1


@pytest.mark.parametrize(
    "spec",
    [{"lr_scheduler_type": "cosin"}, {"lr_scheduler_type": "reduce_lr_on_plateau"},
     {"lr_scheduler_kwargs": {"no_such": 1}}, {"lr_scheduler_type": "cosine_with_min_lr"}],
)  # fmt: skip
def test_what_is_no_schedule_is_refused(spec):
    with pytest.raises(SpecError, match="lr_scheduler_type"):
        factors(**spec)


def test_the_first_step_is_not_wasted_without_warmup():
    assert factors(warmup_ratio=0.0)[0] == 1.0


@pytest.mark.parametrize("total", [10, 33, 60])
def test_the_ratio_is_rounded_as_transformers_does(total):
    """HF: warmup_steps = ceil(ratio * steps)."""
    ramp = factors(total, lr_scheduler_type="constant_with_warmup", warmup_ratio=0.05)
    assert sum(factor < 1 for factor in ramp) == math.ceil(0.05 * total)


def test_making_a_schedule_leaves_the_peak_rates():
    made = optimizer()
    make_schedule(made, TrainSpec(warmup_ratio=0.5), 10)
    assert sorted({g["initial_lr"] for g in made.param_groups}) == sorted(RATES.values())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("AdamW", {}), ("AdamW", {"amsgrad": True}), ("SGD", {"momentum": 0.9}), ("Adafactor", {}), ("RMSprop", {}),
     ("Adagrad", {}), ("NAdam", {}), ("RAdam", {}), ("Adadelta", {}), ("Adamax", {}), ("ASGD", {}), ("Rprop", {}),
     ("SGD", {})],
)  # fmt: skip
def test_the_state_comes_back_bit_for_bit(name, arguments):
    def step(of, made, number):
        torch.manual_seed(number)
        for p in of.values():
            p.grad = torch.randn_like(p)
        made.step()

    whole = parameters()
    made = optimizer(whole, optim=name, optim_args=arguments)
    for number in range(3):
        step(whole, made, number)
    written = load(save({key: value.clone() for key, value in flat_state(made, whole).items()}))
    again = {n: nn.Parameter(p.detach().clone()) for n, p in whole.items()}
    fresh = optimizer(again, optim=name, optim_args=arguments)
    load_flat_state(fresh, again, written)
    for number in range(3, 6):
        step(whole, made, number)
        step(again, fresh, number)
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    assert flat_state(made, whole).keys() == flat_state(fresh, again).keys()


def test_a_state_of_other_parameters_is_not_taken():
    of = parameters()
    made = optimizer(of)
    with pytest.raises(KeyError):
        load_flat_state(made, of, {"no.such|exp_avg": torch.zeros(1)})
