"""Training and answering in pieces beside the same in one piece, in each of two processes: what the tests compare."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

import tiny
from peft_mllm import pieces
from peft_mllm.data.plan import Plan
from peft_mllm.data.supply import Supply
from peft_mllm.decoding import Decoder
from peft_mllm.evaluation import ask, options, pad_token
from peft_mllm.exactness import layouts, lean_where_exact, proven
from peft_mllm.lean import Levers, remove
from peft_mllm.memory.relief import Relief
from peft_mllm.models.generic.family import Generic
from peft_mllm.optimizer import make_optimizer, make_schedule
from peft_mllm.pieces import held, whole
from peft_mllm.sharding import shards_of
from peft_mllm.spec import DataSpec, GenerationSpec, SpeedSpec, TrainSpec
from peft_mllm.training import Job, mean_loss, train_step
from peft_mllm.tuned import Tuned, attach
from peft_mllm.world import World

STEPS = 4
NEW = 4


@dataclass(frozen=True)
class Case:
    """A method on a tiny member."""

    name: str
    member: str = "llava"
    options: Any = None
    parts: Any = None
    tokens: int | None = None
    recompute: Any = "none"
    half: bool = False
    shard: str = "fsdp"


class Alone(World):
    """A process that has no others."""

    @property
    def rank(self) -> int:
        return 0

    @property
    def size(self) -> int:
        return 1


def made(case: Case) -> Tuned:
    if case.member in Generic.tiny_members():
        family = Generic.tiny_member(case.member, image_size=28)
        with torch.no_grad():
            for parameter in family.model.parameters():
                parameter.mul_(5 if parameter.ndim > 1 else 1)  # see tiny.family
    else:
        family = tiny.family(case.member)
    if case.half:
        family.model.to(torch.bfloat16)
    method = tiny.method(case.name, **(case.options or {}))
    torch.manual_seed(0)
    return attach(family, method, recompute=case.recompute, bf16=case.half, **(case.parts or {}))


def job_of(tuned: Tuned, world: World, case: Case, plan: Plan) -> Job:
    records = tiny.mixed_records()
    if case.member == "mllama":
        records = [each for each in records if len(each.images) < 2]
    encode, pixels = tuned.family.encode, tuned.family.pixels
    supply = Supply(records, encode, pixels, pad_token(tuned), "padded", share=True, tokens=case.tokens)
    spec: Any = SimpleNamespace(speed=SpeedSpec(), data=DataSpec())
    said: list[str] = []
    some = [encode(each) for each in records[:3]]
    supply, check = proven(tuned, supply, some, layouts(tuned, spec), note=said.append)
    lean = lean_where_exact(tuned, some, supply, Levers(), note=said.append)
    if case.member != "mllama":  # which has no trees of text and images
        assert not said, said
        assert check is None or check.passed
    assert lean is None or lean.passed
    train = TrainSpec(learning_rate=1e-2, max_grad_norm=0.5, weight_decay=0.1)
    rates: Any = dict.fromkeys(("llm", "connector", "vision"), 1e-2)
    optimizer = make_optimizer(tuned.trainable(), tuned.family.anatomy, rates, train)
    return Job(
        tuned=tuned,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, train, STEPS),
        plan=plan,
        total_steps=STEPS,
        make_batches=supply.batches,
        validation=lambda: supply.all(2, rank=world.rank, world_size=world.size),
        spec=train,
        seed=0,
        run=None,  # type: ignore[arg-type]
        world=world,
        log=lambda line: None,
        show=lambda *facts: None,
        stop=lambda: False,
        relief=Relief(relay=None, recompute=None, note=print, again=False),  # type: ignore[arg-type]
        compute=tuned.add_gradients,
        clock=lambda: 0.0,
    )


def trained(tuned: Tuned, world: World, case: Case) -> dict[str, Any]:
    """Some steps in which the processes have unequal numbers of batches, or none; then losses and answers."""
    size = 6 if case.member == "mllama" else 9
    plan = Plan(size=size, micro_batch=2, micro_batches=4, seed=0)
    job = job_of(tuned, world, case, plan)
    tuned.model.train()
    losses = []
    for step in range(STEPS):
        batches = [b for some in plan.step(step)[world.rank :: world.size] for b in job.make_batches(some)]
        losses.append(train_step(job, step, batches).loss)
    assert job.validation is not None
    losses.append(mean_loss(tuned, job.validation(), world))
    remove(tuned.base, tuned.family.anatomy)
    return {
        "losses": losses,
        "parameters": {name: whole(p.detach()).clone() for name, p in tuned.trainable().items()},
        "answers": answers(tuned, world, case),
    }


def left_over(tuned: Tuned, world: World) -> int:
    """Bytes of the layers' weights that are still together after a forward whose gradients are to come."""
    batch = tiny.padded(tuned.family, tiny.samples(tuned.family, tiny.few_records()[:1]))
    seen: list[Any] = []

    def look(module: Any, args: Any) -> None:
        seen.append(weakref.ref(module.weight.untyped_storage()))

    layers = tuned.base.get_submodule(tuned.family.anatomy.layers)
    linears = [each for each in layers.modules() if isinstance(each, torch.nn.Linear)]
    cut = [each for each in linears if pieces.in_pieces(each.weight) or hasattr(each.weight, "ds_tensor")]
    hooks = [each.register_forward_pre_hook(look) for each in cut]
    loss = tuned.answer_losses(batch).sum()
    bytes = sum(storage.nbytes() for storage in (each() for each in seen) if storage is not None)
    assert len(seen) > 2
    for hook in hooks:
        hook.remove()
    loss.backward()
    return bytes


def answers(tuned: Tuned, world: World, case: Case) -> list[str]:
    """Two prompts for the first process and three for the second, one by one and together, and one by generate."""
    told = options(tuned, GenerationSpec(), NEW)
    one = "<image>\n"
    records = [tiny.record(f"q{i}", f"{one}What is at {i}?", "x", images=(1,)) for i in range(5)]
    prompts = [tuned.family.encode(each, answer=False) for each in records]
    parts = [prompts[:2], prompts[2:]]
    mine = parts[world.rank : world.rank + 1] if world.size > 1 else parts
    tuned.model.eval()
    with tuned.in_step():
        said = [ask(tuned, some, told, decoder=Decoder(tuned, told)) for some in mine if tuned.takes_padding]
        said += [ask(tuned, [each], told) for some in mine for each in some[1:]]
    texts = [[answer.text for answer in some] for some in said]
    return sorted(itertools.chain.from_iterable(world.gather(texts)))


def compared(case: Case, world: World) -> dict[str, Any]:
    """The differences between a model in pieces and the same in one piece."""
    plain = made(case)
    expected = trained(plain, Alone(), case)
    tuned = made(case)
    own = tuned.model is tuned.base
    tuned = in_pieces(tuned, world, case)
    found = trained(tuned, world, case)
    part_of = tuned.family.anatomy.part_of
    language = [
        p for name, p in tuned.base.named_parameters() if part_of(name) == "llm" and (own or not p.requires_grad)
    ]
    return {
        "difference": _distance(found["parameters"], expected["parameters"]),
        "moved": _distance(expected["parameters"], {n: p.detach() for n, p in made(case).trainable().items()}),
        "losses": max(abs(a - b) / abs(b) for a, b in zip(found["losses"], expected["losses"], strict=True)),
        "answers": found["answers"] == expected["answers"],
        "spoken": len(set(expected["answers"])),
        "kept": left_over(tuned, world),
        "held": sum(map(_held, language)) / sum(map(_all, language)),
    }


def broken(case: Case, world: World) -> dict[str, Any]:
    """The second process's first forwards fail, in a layer and before the first, and it asks again."""
    tuned = made(case)
    expected = answers(tuned, Alone(), case)
    tuned = in_pieces(tuned, world, case)
    layers = list(tuned.base.get_submodule(tuned.family.anatomy.layers).children())
    batch = tiny.padded(tuned.family, tiny.samples(tuned.family, tiny.few_records()[:1]))
    failed = 0
    with tuned.in_step(), torch.no_grad():
        for module in (layers[1], tuned.decoder) if world.rank else ():
            hook = module.register_forward_pre_hook(_fail)
            try:
                tuned.answer_logits(batch)
            except ValueError:
                failed += 1
            hook.remove()
        tuned.answer_logits(batch)
    return {"failed": world.gather([failed]), "answers": answers(tuned, world, case) == expected}


def _fail(module: Any, args: Any) -> None:
    raise ValueError("as a cache of another kind would")


def in_pieces(tuned: Tuned, world: World, case: Case) -> Tuned:
    shard: Any = case.shard
    own = tuned.model is tuned.base
    return replace(tuned, shards=shards_of(tuned.base, tuned.family.anatomy, world, shard, own=own))


def _held(parameter: Any) -> int:
    """Bytes that this process holds, by FSDP2 or DeepSpeed or whole."""
    return parameter.ds_tensor.nbytes if hasattr(parameter, "ds_tensor") else held(parameter).nbytes


def _all(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def _distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    off = sum((found[name] - expected[name]).double().pow(2).sum() for name in expected)
    return float((off / sum(each.double().pow(2).sum() for each in expected.values())) ** 0.5)
