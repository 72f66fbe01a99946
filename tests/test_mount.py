"""Several adapters on one loaded base: nothing of one is left when the next comes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import peft_mllm
import tiny
from peft_mllm import mount as mounting
from peft_mllm import saved
from peft_mllm.identity import identity_of, state_of
from peft_mllm.mount import Mount, take_off
from peft_mllm.provenance import weights_fingerprint
from peft_mllm.tuned import attach, load_adapter, untouched
from runs import command, lines, read, write_spec
from runs import tiny as tiny_spec

KEPT = [case for case in tiny.method_cases() if case[0] not in ("none", "full")]
TASK = "{name: scenes_at, size: {test: 6}}"


def state(family):
    return state_of(family.model, family.model.get_submodule(family.anatomy.llm))


@pytest.mark.parametrize("case", KEPT, ids=tiny.label)
@pytest.mark.parametrize("connector", [False, True])
def test_an_adapter_comes_off_to_the_last_bit(case, connector):
    family = tiny.family()
    question = tiny.prompts(family, tiny.mixed_records()[:1])
    told = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    before, said = state(family), untouched(family).generate(question, **told)
    tuned = tiny.stir(tiny.tune(case[0], on=family, parts={"connector": connector}, **case[1]), spread=0.5)
    tuned.model.eval()
    if connector or tuned.takes_padding:  # learned prompts of peft's stand outside of the base
        assert state(family) != before
    tuned.generate(question, **told)
    assert take_off(tuned) is family.model
    assert state(family) == before
    assert torch.equal(untouched(family).generate(question, **told), said)


def test_the_state_sees_every_bit():
    family = tiny.family()
    before = state(family)
    weight = next(family.model.parameters()).data
    for change in ("sign of a zero", "swap", "hook", "one bit"):
        kept, hook = weight.clone(), None
        flat = weight.view(-1)
        if change == "sign of a zero":
            flat[3] = 0.0
            before = state(family)
            flat[3] = -0.0
        elif change == "swap":
            before = state(family)
            flat[:2] = flat[:2].flip(0).clone()
        elif change == "hook":
            before = state(family)
            hook = family.model.register_forward_pre_hook(lambda *args: None)
        else:
            before = state(family)
            flat.view(torch.int32)[-1] ^= 1
        assert state(family) != before, change
        weight.copy_(kept)
        if hook:
            hook.remove()


def saved_adapter(directory: Path, name: str, *, seed: int = 1, connector: bool = False, **options) -> Path:
    tuned = tiny.stir(tiny.tune(name, parts={"connector": connector}, **options), spread=0.5, seed=seed)
    tuned.save(directory)
    return directory


def test_adapters_in_turn_give_what_each_gives_alone(tmp_path):
    adapters = [
        saved_adapter(tmp_path / "prefix", "prefix"),
        saved_adapter(tmp_path / "lora", "lora", connector=True),
        saved_adapter(tmp_path / "lora2", "lora", seed=5),
        saved_adapter(tmp_path / "ia3", "ia3"),
        saved_adapter(tmp_path / "adapter", "adapter"),
    ]
    loads = []
    mount = Mount(lambda: (loads.append(1), tiny.family())[1], note=pytest.fail)
    records = tiny.mixed_records()
    for adapter in [*adapters, None, *adapters]:
        alone = untouched(tiny.family()) if adapter is None else load_adapter(tiny.family(), adapter)
        with mount.wearing(adapter, bf16=False) as tuned:
            batch = tiny.batch_for(tuned, tiny.samples(tuned.family, records))
            with torch.no_grad():
                assert torch.equal(tuned.answer_logits(batch), alone.answer_logits(batch)), adapter
    assert len(loads) == 1


def test_a_base_that_was_changed_is_loaded_again(tmp_path, monkeypatch):
    adapter = saved_adapter(tmp_path / "lora", "lora")
    notes, loads = [], []
    mount = Mount(lambda: (loads.append(1), tiny.family())[1], note=notes.append)
    real = mounting.load_adapter

    def harmful(family, directory, **rest):
        tuned = real(family, directory, **rest)
        family.model.get_submodule(family.anatomy.final_norm).weight.data[0] += 1
        return tuned

    monkeypatch.setattr(mounting, "load_adapter", harmful)
    with mount.wearing(adapter, bf16=False):
        pass
    assert len(loads) == 2
    assert "loaded again" in notes[0]
    assert weights_fingerprint(mount.family.model) == mount.fingerprint
    with mount.wearing(adapter, bf16=False, last=True):
        pass
    assert len(loads) == 2, "nothing comes after it"


def test_a_trained_bias_does_not_stay(tmp_path):
    """peft writes trained biases into the base itself, and its unloading leaves them there."""
    config = {"r": 2, "target_modules": r"model\.vision_tower.*q_proj", "bias": "lora_only"}
    from peft_mllm.methods import METHODS

    made = METHODS["peft"](METHODS["peft"].Options(type="LORA", config=config))
    tuned = attach(tiny.family(), made)
    with torch.no_grad():
        for name, parameter in tuned.model.named_parameters():
            if name.endswith("q_proj.base_layer.bias"):
                parameter.add_(1.0)
    tuned.save(tmp_path / "biased")
    notes = []
    mount = Mount(tiny.family, note=notes.append)
    before = state(mount.family)
    with mount.wearing(tmp_path / "biased", bf16=False):
        pass
    assert notes
    assert state(mount.family) == before


def test_identity_is_of_base_and_adapter(tmp_path):
    family = tiny.family()
    base = weights_fingerprint(family.model)
    tuned = tiny.stir(tiny.tune("lora", on=family))
    mine = identity_of(tuned, base)
    tuned.save(tmp_path / "a")
    assert identity_of(load_adapter(tiny.family(), tmp_path / "a"), base) == mine, "saved and loaded it is the same"
    assert identity_of(tuned, "another base") != mine
    config = read(tmp_path / "a/adapter_config.json")
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1}))
    assert identity_of(load_adapter(tiny.family(), tmp_path / "a"), base) != mine, "a scale is no weight"
    tiny.stir(tuned)
    assert identity_of(tuned, base) != mine
    assert identity_of(untouched(tiny.family()), base) == base


# --- the verb ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    few = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    task = {"name": "scenes_at", "size": {"train": 8, "validation": 0, "test": 6}}
    for name, method in {"lora": "lora", "prefix": {"name": "prefix", "virtual_tokens": 4}, "full": "full"}.items():
        spec = tiny_spec(folder / name, model="embedded", method=method, task=task, train=few)
        assert command("train", write_spec(folder / f"{name}.yaml", spec)).code == 0
    return folder


def test_several_targets_with_one_load_of_each_base(trained, tmp_path, monkeypatch):
    loads = []
    real = saved.load_family
    monkeypatch.setattr(saved, "load_family", lambda spec, **o: (loads.append(spec.path), real(spec, **o))[1])
    targets = [trained / "lora", trained / "full", "embedded", trained / "prefix", trained / "lora/adapter"]
    said = command("evaluate", *targets, "--task", TASK, "--json", "--output", tmp_path / "out")
    assert said.code == 0, said.err
    assert loads == ["embedded", str(trained / "full/adapter")]
    scores = json.loads(said.out)
    assert list(scores) == [str(target) for target in targets]
    for target in targets:
        alone = peft_mllm.evaluate(target, [{"name": "scenes_at", "size": {"test": 6}}], quiet=True)
        assert scores[str(target)]["scenes_at"]["values"] == alone["scenes_at"]["values"]
    files = {path.parent.parent.name: lines(path) for path in (tmp_path / "out").rglob("*.jsonl")}
    assert set(files) == {"lora", "full", "embedded", "prefix", "adapter"}
    assert read(tmp_path / "out/embedded/scores.json")["target"] == "embedded"
    table = command("evaluate", *targets[:2], "--task", TASK)
    assert table.code == 0
    assert str(trained / "full") in table.out


def test_a_run_of_several_answers_as_it_did(trained, tmp_path):
    """Whoever wore the base before: a run's predictions are those of its own result, hashes and all."""
    own = {"name": "scenes_at", "size": {"train": 8, "validation": 0, "test": 6}}
    names = ["prefix", "lora"]
    scores = peft_mllm.evaluate([trained / name for name in names], [own], output_dir=tmp_path, quiet=True)
    assert [scores[str(trained / name)]["scenes_at"]["resumed"] for name in names] == [0, 0]
    for name in names:
        assert lines(tmp_path / name / "predictions/scenes_at.jsonl") == lines(
            trained / name / "predictions/scenes_at.jsonl"
        )


def test_several_go_on_where_they_stopped(trained, tmp_path):
    words = ("evaluate", trained / "lora", trained / "prefix", "--task", TASK, "--output", tmp_path / "out", "--json")
    assert command(*words).code == 0
    half = tmp_path / "out/prefix/predictions/scenes_at.jsonl"
    half.write_text("\n".join(half.read_text().splitlines()[:4]) + "\n")  # two batches of two
    scores = json.loads(command(*words).out)
    assert [scores[str(trained / name)]["scenes_at"]["resumed"] for name in ("lora", "prefix")] == [6, 4]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("RUN/lora", "RUN/lora"), "scored twice"),
        (("RUN/lora", "RUN/none"), "RUN/none: say what to score"),
        (("RUN/lora", "--output", "RUN/prefix"), "is a run"),
        (("RUN/lora", "embedded"), "embedded: say what to score"),
        (("RUN/lora", "--choices", "best"), "best"),
    ],
)
def test_mistakes(trained, words, said):
    words = [word.replace("RUN", str(trained)) for word in words]
    done = command("evaluate", *words)
    assert done.code == 2, done.err
    assert said.replace("RUN", str(trained)) in " ".join(done.err.split())
    assert "Traceback" not in done.err
