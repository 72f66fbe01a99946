"""The probes: each tries one thing with a method on a tiny model, and returns, or raises what is wrong.

`Failed` is what a user would run into; `NotApplicable` is what has no meaning for the pair. Any other error is a
failure, too, with its first line as the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from textwrap import shorten

import torch
from peft import PeftModel

from peft_mllm.anatomy import PARTS, Part
from peft_mllm.data.supply import Supply
from peft_mllm.errors import MethodError, UserError
from peft_mllm.evaluation import pad_token
from peft_mllm.exactness import TOLERANCE, self_check
from peft_mllm.matrix.bench import SEED, Bench, difference, everywhere, logits_of, padded, samples
from peft_mllm.matrix.measures import (
    Answers,
    answers_of,
    compare,
    flat,
    gradients_of,
    losses_of,
    reloaded,
    rounding_of,
    train,
)
from peft_mllm.matrix.positions import as_base, rotations, sights
from peft_mllm.matrix.verdicts import Failed, NotApplicable, Verdict, first_line
from peft_mllm.methods import METHODS
from peft_mllm.tuned import Tuned, trained_parts, untouched

RATES = (0.05, 0.01, 0.002, 0.3)
"""Learning rates of Adam; the loss must fall with one of them, as methods differ in the size of their numbers."""
STEPS = 8
FALL = 2e-3
SAVED = 1e-6
"""Logits of a reloaded model may differ by this part of the largest: the same sums, perhaps in another order."""
MERGED = 5e-5
"""Logits of a merged model: the sums are others."""
ROUNDINGS = 4
"""Where sums are others, a result may move by this many roundings of all weights, where that is more."""
GRADIENTS = 1e-5
LOSSES = 1e-5
ANGLE = 1e-3
"""Of a rotation on the unit circle; a position that is wrong by one is off by 0.8 and more."""
ANSWERED = 1e-4
"""Logits of answers, as a part of the largest."""
HIDDEN_STEP = "update_and_allocate"
REASON = 200
"""Characters of a reason."""


def attaches(bench: Bench) -> None:
    """It attaches, and only the language model trains."""
    try:
        tuned = bench.tune()
    except ImportError as error:
        raise NotApplicable(first_line(error)) from error
    _check_parts(tuned, bench, connector=False)


def computes(bench: Bench) -> None:
    """A forward of the training loop gives finite losses that depend on what trains."""
    tuned = bench.tune(stirred=True)
    losses = tuned.answer_losses(padded(tuned, samples(tuned.family)))
    if not losses.isfinite().all():
        raise Failed("its losses are not finite")
    if METHODS[bench.candidate.method].tunes_llm and not losses.requires_grad:
        raise Failed("what it trains takes no part in the model's own forward")


def trains(bench: Bench) -> None:
    """The loss falls on one batch, and everything that trains gets a gradient."""
    _needs_training(bench)
    tuned = bench.tune(stirred=True)
    _no_hidden_steps(tuned)
    gradients = gradients_of(tuned)
    without = [name for name, gradient in gradients.items() if gradient is None]
    if without:
        raise Failed(f"{len(without)} of {len(gradients)} trained parameters get no gradient, {_short(without[0])} one")
    if not flat(gradients).any():
        raise Failed("all its gradients are zero")
    falls = []
    for rate in RATES:
        losses = train(bench.tune(), steps=STEPS, rate=rate)
        falls.append(losses[0] - min(losses[-3:]))
        if falls[-1] > FALL:
            return
    raise Failed(f"the loss does not fall: by {max(falls):.0e} at best in {STEPS} steps")


def stays_frozen(bench: Bench) -> None:
    """After steps of training, what does not train is equal by every bit."""
    _needs_training(bench)
    tuned = bench.tune()
    before = {name: tensor.clone() for name, tensor in tuned.model.state_dict().items()}
    trained = {name for name, tensor in tuned.model.state_dict(keep_vars=True).items() if tensor.requires_grad}
    train(tuned, steps=3, rate=0.01)
    after = tuned.model.state_dict()
    moved = [name for name in before if name not in trained and not torch.equal(before[name], after[name])]
    if moved:
        raise Failed(f"{len(moved)} tensors move that do not train, {_short(moved[0])} one")


def separates(bench: Bench) -> None:
    """A sample's loss is the same in a batch of several as alone."""
    tuned = bench.tune(stirred=True)
    of = samples(tuned.family)
    alone = torch.cat([losses_of(tuned, [each]) for each in of])
    if not (off := difference(alone, losses_of(tuned, of))) <= LOSSES:
        raise Failed(f"the samples of a batch change each other's loss, by {off:.0e}")


def generates(bench: Bench) -> None:
    """Greedy answers and their logits are the same with and without cache, and left-padded together as one by one."""
    tuned = bench.tune(stirred=True)
    prompts = samples(tuned.family, answer=False)
    alone = [answers_of(tuned, [each]) for each in prompts]
    for cached, each in zip(alone[:2], prompts, strict=False):
        if not _same(cached, answers_of(tuned, [each], use_cache=False)):
            raise Failed("with cache it answers otherwise than without")
    if tuned.takes_padding and not _same(Answers.together(alone), answers_of(tuned, prompts)):
        raise Failed("left-padded questions are answered otherwise than one by one")


def reloads(bench: Bench) -> None:
    """Saved and loaded by this package, it gives equal logits."""
    tuned = bench.tune(stirred=True)
    compare(logits_of(tuned), reloaded(bench, tuned, "alone"), SAVED)


def reloads_in_peft(bench: Bench) -> None:
    """Saved and loaded by `PeftModel.from_pretrained` alone, its forward gives equal logits."""
    tuned = bench.tune(stirred=True)
    if not isinstance(tuned.model, PeftModel):
        raise NotApplicable("it is saved as a whole model")
    expected = logits_of(tuned)
    folder = bench.folder / "for peft"
    tuned.save(folder)
    batch = padded(tuned, samples(tuned.family)[:1])
    with torch.no_grad():
        model = PeftModel.from_pretrained(bench.family().model, folder).eval()
        torch.manual_seed(SEED)
        # the model's own forward by its own rule of positions; virtual tokens stand in front
        answered = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.pixels, **batch.extras
        ).logits[0, -len(expected) :]
    compare(expected, answered, SAVED)


def merges(bench: Bench) -> None:
    """Merged into the base by peft, it gives equal logits."""
    tuned = bench.tune(stirred=True)
    if not isinstance(tuned.model, PeftModel):
        raise NotApplicable("it is a whole model already")
    if tuned.model.active_peft_config.is_prompt_learning:
        raise NotApplicable("virtual tokens and learned keys are no part of a weight")
    expected = logits_of(tuned)
    batch = everywhere(padded(tuned, samples(tuned.family)[:1]))
    try:
        merged = tuned.model.merge_and_unload()
    except (NotImplementedError, AttributeError, ValueError) as error:
        why = f"peft cannot merge it: {first_line(error)}" if str(error) else "it is no change of a weight"
        raise NotApplicable(why[:REASON]) from error
    with torch.no_grad():
        answered = merged(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.pixels, **batch.extras
        ).logits[0]
    off = difference(expected, answered)
    if not (off <= MERGED or off <= ROUNDINGS * rounding_of(bench.tune(stirred=True), logits_of)):
        raise Failed(f"logits are off by {off:.0e} of the largest")


def checkpoints(bench: Bench) -> None:
    """Gradient checkpointing gives equal gradients."""
    _needs_training(bench)
    plain = gradients_of(bench.tune(stirred=True))
    recomputed = gradients_of(bench.tune(stirred=True, checkpointing=True))
    lost = [name for name in plain if (plain[name] is None) != (recomputed[name] is None)]
    if lost:
        raise Failed(f"{len(lost)} of {len(plain)} parameters lose their gradient, {_short(lost[0])} one")
    if not (off := difference(flat(plain), flat(recomputed))) <= GRADIENTS:
        raise Failed(f"gradients are off by {off:.0e}")


def trees(bench: Bench) -> None:
    """Samples that share an image's prefix give the gradients of the same samples as padded rows."""
    _needs_training(bench)
    tuned = bench.tune(stirred=True)
    if not tuned.trees:
        why = "this model's mask is not causal" if not tuned.family.trees else "it acts outside of the model's forward"
        raise NotApplicable(f"every sample is a row of its own: {why}")
    supply = Supply((), tuned.family.encode, tuned.family.pixels, pad_token(tuned), "packed", share=True)
    check = self_check(tuned, samples(tuned.family), supply)
    if check is None:
        raise Failed("its gradients are not finite")
    if check.shared_tokens == 0:
        raise NotApplicable("these samples share nothing")
    tolerance = TOLERANCE[torch.float32]
    if check.gradient > tolerance:
        tolerance = max(tolerance, ROUNDINGS * rounding_of(tuned, lambda tuned: flat(gradients_of(tuned))))
    if not check.gradient <= tolerance:
        raise Failed(f"gradients are off by {check.gradient:.0e}; a run finds that out, and shares nothing")


def keeps_positions(bench: Bench) -> None:
    """Text and image tokens have the rotary positions to each other that they have in the base."""
    base = rotations(as_base(bench.family()))
    if not base:
        raise NotApplicable("its layers are given no rotary angles")
    here = rotations(bench.tune())
    for when, expected in base.items():
        found = here.get(when)
        if found is None or found.shape != expected.shape or not (found - expected).abs().max() <= ANGLE:
            raise Failed(f"tokens lose their positions {when}")


def keeps_mask(bench: Bench) -> None:
    """Text and image tokens see each other as in the base; where images look ahead, they still do."""
    base = sights(as_base(bench.family()))
    if base is None:
        raise NotApplicable("its layers are given no mask that can be read")
    here = sights(bench.tune())
    if here is None or here.shape != base.shape or not torch.equal(here, base):
        raise Failed("tokens see others than in the base")


def tunes_connector(bench: Bench) -> None:
    """With the connector tuned beside it, both train, and it reloads with equal logits."""
    tuned = bench.tune(connector=True)
    _check_parts(tuned, bench, connector=True)
    part_of = tuned.family.anatomy.part_of
    before = {name: parameter.detach().clone() for name, parameter in tuned.trainable().items()}
    train(tuned, steps=2, rate=0.01)
    moved = {part_of(name) for name, parameter in tuned.trainable().items() if not torch.equal(before[name], parameter)}
    if "connector" not in moved:
        raise Failed("the connector does not move")
    tuned = bench.tune(connector=True, stirred=True)
    compare(logits_of(tuned), reloaded(bench, tuned, "with connector"), SAVED)


def switches_off(bench: Bench) -> None:
    """With the adapter off, connector and all, the logits are the base's by every bit."""
    tuned = bench.tune(connector=True, stirred=True)
    if not isinstance(tuned.model, PeftModel):
        raise NotApplicable("it is the base itself that is trained")
    expected = logits_of(untouched(bench.family()))
    try:
        with tuned.untuned() as base:
            answered = logits_of(base)
    except MethodError as error:
        raise NotApplicable(first_line(error)) from error
    if not torch.equal(expected, answered):
        raise Failed(f"what is left is not the base: logits are off by {difference(expected, answered):.0e}")


PROBES: dict[str, Callable[[Bench], None]] = {
    "attaches": attaches,
    "computes": computes,
    "trains": trains,
    "frozen": stays_frozen,
    "batches": separates,
    "generates": generates,
    "reloads": reloads,
    "plain peft": reloads_in_peft,
    "merges": merges,
    "checkpointing": checkpoints,
    "trees": trees,
    "positions": keeps_positions,
    "mask": keeps_mask,
    "connector": tunes_connector,
    "switches off": switches_off,
}
"""In the order they are tried; what does not attach or compute is tried no further."""
FIRST = ("attaches", "computes")


def try_one(name: str, bench: Bench) -> Verdict:
    """Run a probe; whatever it raises is a verdict."""
    try:
        PROBES[name](bench)
    except NotApplicable as verdict:
        return Verdict("none", str(verdict))
    except Failed as verdict:
        return Verdict("failed", str(verdict))
    except UserError as error:  # already in words for users
        return Verdict("failed", _in_short(first_line(error), bench))
    except Exception as error:  # what a user would see as a traceback: the point of probing
        return Verdict("failed", _in_short(f"{type(error).__name__}: {first_line(error)}", bench))
    return Verdict("ok")


def _in_short(reason: str, bench: Bench) -> str:
    """Without the names of temporary files, and not longer than a page can show."""
    return shorten(reason.replace(f"{bench.folder}/", ""), REASON, placeholder=" ...")


def _needs_training(bench: Bench) -> None:
    if not METHODS[bench.candidate.method].tunes_llm:
        raise NotApplicable("it trains nothing of the language model")


def _check_parts(tuned: Tuned, bench: Bench, *, connector: bool) -> None:
    """Raise unless the wanted parts train, and no other."""
    wanted: set[Part] = {"connector"} if connector else set()
    if METHODS[bench.candidate.method].tunes_llm:
        wanted.add("llm")
    trained_parts(tuned, dict.fromkeys(PARTS, 0.0), wanted)


def _no_hidden_steps(tuned: Tuned) -> None:
    """Some of peft's methods are only whole with a call of the training loop after each step; ours makes none."""
    if isinstance(tuned.model, PeftModel) and hasattr(tuned.model.base_model, HIDDEN_STEP):
        raise Failed(f"it needs a call of {HIDDEN_STEP} after each step, which this package's loop does not make")


def _same(one: Answers, other: Answers) -> bool:
    return torch.equal(one.tokens, other.tokens) and difference(one.logits, other.logits) <= ANSWERED


def _short(name: str) -> str:
    """A parameter's name without what wrappers put in front."""
    return name.removeprefix("base_model.").removeprefix("model.")
