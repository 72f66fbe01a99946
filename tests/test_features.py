"""Vision features that are kept are those that would have been computed, bit for bit, or are not used at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
from peft_mllm.data.encode import Sample
from peft_mllm.data.trees import collate_padded
from peft_mllm.errors import ModelError
from peft_mllm.features import Sight, Store, watch
from peft_mllm.features.entry import Entry, UnfitError, joined, rows_in
from peft_mllm.memory.ghost import without_numbers
from peft_mllm.models import Family
from peft_mllm.models.generic.family import Generic
from peft_mllm.models.llava import Llava
from peft_mllm.record import ImageSource
from peft_mllm.tuned import Tuned

NO_IMAGES_APART = {"mllama": "MllamaModel has no get_image_features"}
"""Members whose features cannot be kept, and why."""
QUICK = ("qwen2_5_vl", "qwen3_vl", "internvl")
MEMBERS = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in Generic.tiny_members()
    if name not in NO_IMAGES_APART
]
GB = 1 << 30


@dataclass(frozen=True)
class Unopened(ImageSource):
    """An image that must not be opened."""

    name: str
    size: tuple[int, int] = (40, 30)

    @property
    def key(self) -> str:
        return self.name

    @property
    def dimensions(self) -> tuple[int, int]:
        return self.size

    def load(self) -> Image.Image:
        raise AssertionError(f"{self.name} was opened")


def unopened(samples: list[Sample]) -> list[Sample]:
    return [replace(each, images=tuple(Unopened(image.key) for image in each.images)) for each in samples]


def blind(family: Family) -> None:
    """Let the vision tower fail if it runs."""
    for path in family.anatomy.vision:
        vars(family.model.get_submodule(path))["forward"] = lambda *args, **kwargs: pytest.fail("the vision tower ran")


def made(kind: str) -> Family:
    if kind in ("llava", "qwen_vl"):
        return tiny.family(kind)
    try:
        return Generic.tiny_member(kind, image_size=56)
    except ModelError as error:  # some processors want torchvision in some versions of transformers
        pytest.skip(str(error))


def tuned_on(family: Family, *, connector: bool, **parts: object) -> Tuned:
    return tiny.stir(tiny.tune("lora", on=family, parts={"connector": connector, **parts}))


def loss_and_gradient(tuned: Tuned, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    losses = tuned.answer_losses(tiny.batch_for(tuned, samples))
    gradients = torch.autograd.grad(losses.mean(), list(tuned.trainable().values()), allow_unused=True)
    return losses.detach(), torch.cat([each.flatten() for each in gradients if each is not None])


def same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- exactness ---


EXACT = [
    (kind, connector, bf16) for kind in ("llava", "qwen_vl") for connector in (False, True) for bf16 in (False, True)
]
ALWAYS = {("llava", False, False), ("llava", True, False), ("qwen_vl", True, True)}


@pytest.mark.parametrize(
    ("kind", "connector", "bf16"),
    [pytest.param(*each, marks=[pytest.mark.slow] * (each not in ALWAYS)) for each in EXACT],
    ids=[
        f"{kind}-{'tuned' if connector else 'frozen'}-{'bf16' if bf16 else 'fp32'}" for kind, connector, bf16 in EXACT
    ],
)
def test_losses_and_gradients_are_bit_equal_whether_computed_or_kept(tmp_path, kind, connector, bf16):
    plain = tuned_on(made(kind), connector=connector, bf16=bf16)
    expected = loss_and_gradient(plain, tiny.samples(plain.family))
    for first in (True, False):
        family = made(kind)
        sight = watch(family, connector=connector, bf16=bf16, store=Store(tmp_path, limit=GB), note=pytest.fail)
        tuned = tuned_on(family, connector=connector, bf16=bf16)
        samples = tiny.samples(family)
        if not first:  # the proof of the start looks at images of its own
            assert sight._is_able()
            samples = unopened(samples)
            blind(family)
        assert same(loss_and_gradient(tuned, samples), expected)
        assert sight.to_json() == {
            "hits": 0 if first else 3, "misses": 3 if first else 0, "damaged": 0, "off": None,
        }  # fmt: skip


@pytest.mark.parametrize("connector", [False, True], ids=["frozen", "tuned"])
@pytest.mark.parametrize("member", MEMBERS)
def test_members_of_the_generic_family(tmp_path, member, connector):
    records = tiny.mixed_records()
    if member == "paligemma":  # one question, one answer
        records = [each for each in records if len(each.images) == 1 and len(each.turns) == 2]
    plain = tuned_on(made(member), connector=connector)
    alone = [each for each in tiny.samples(plain.family, records) if len(each.images) == 1][:2]
    expected = [loss_and_gradient(plain, [each]) for each in alone]
    together = loss_and_gradient(plain, tiny.samples(plain.family, records))
    for _ in ("computed", "kept"):
        family = made(member)
        sight = watch(family, connector=connector, store=Store(tmp_path, limit=GB), note=pytest.fail)
        tuned = tuned_on(family, connector=connector)
        samples = tiny.samples(family, records)
        # a matrix product of a handful of rows may round otherwise than that of another handful
        losses, gradient = loss_and_gradient(tuned, samples)
        assert (losses - together[0]).norm() <= 1e-5 * together[0].norm()
        assert (gradient - together[1]).norm() <= 1e-4 * together[1].norm()
        for sample, one in zip(alone, expected, strict=True):
            assert same(loss_and_gradient(tuned, [sample]), one)
    assert sight.to_json()["misses"] == 0


@pytest.mark.parametrize("connector", [False, True], ids=["frozen", "tuned"])
def test_the_tuned_connector_is_the_one_that_answers(tmp_path, connector):
    family = made("llava")
    watch(family, connector=connector, store=Store(tmp_path, limit=GB))
    tuned = tuned_on(family, connector=connector)
    before, _ = loss_and_gradient(tuned, tiny.samples(family))
    with torch.no_grad():
        for name, parameter in tuned.model.named_parameters():
            if "multi_modal_projector" in name:
                parameter.mul_(2)
    after, _ = loss_and_gradient(tuned, tiny.samples(family))
    assert torch.equal(before, after) is not connector


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", ["llava", "qwen_vl", "qwen2_5_vl", "idefics3"])
def test_answers_are_the_same(tmp_path, kind, beams):
    options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    plain = tuned_on(made(kind), connector=False)
    records = [each for each in tiny.mixed_records() if len(each.images) == 1]
    expected = plain.generate(tiny.prompts(plain.family, records), **options)
    family = made(kind)
    sight = watch(family, store=Store(tmp_path, limit=GB), note=pytest.fail)
    tuned = tuned_on(family, connector=False)
    assert torch.equal(tuned.generate(tiny.prompts(family, records), **options), expected)
    assert sight.to_json()["misses"] == 2


def test_what_is_kept_has_the_type_of_what_was_computed(tmp_path):
    for bf16, kind in ((False, torch.float32), (True, torch.bfloat16)):
        family = made("llava")
        sight = watch(family, bf16=bf16, store=Store(tmp_path / str(bf16), limit=GB))
        loss_and_gradient(tuned_on(family, connector=False, bf16=bf16), tiny.samples(family))
        assert {tensor.dtype for entry in sight._held for tensor in entry.tensors} == {kind}


def test_before_a_tuned_connector_only_what_it_reads_is_kept(tmp_path):
    family = made("llava")
    sight = watch(family, connector=True, store=Store(tmp_path, limit=GB))
    loss_and_gradient(
        tuned_on(family, connector=True), tiny.samples(family, [tiny.record("a", "<image>", "b", images=(1,))])
    )
    (entry,) = sight._held
    assert [tuple(tensor.shape) for tensor in entry.tensors] == [(1, 5, 32)]  # one hidden state, of class and 4 patches


# --- once per image ---


def counted(family: Family) -> list[int]:
    """The number of images in each call of a LLaVA's tower, from now on."""
    calls: list[int] = []
    tower = family.model.get_submodule(family.anatomy.vision[0])
    tower.register_forward_pre_hook(lambda module, args, kwargs: calls.append(len(args[0])), with_kwargs=True)
    return calls


def test_without_a_directory_a_batch_shows_the_tower_each_image_once():
    records = [tiny.record(f"q{i}", f"<image>\nQuestion {i}?", "yes", images=(i % 2,)) for i in range(6)]
    family = made("llava")
    plain = tuned_on(family, connector=False)
    expected = plain.answer_losses(tiny.padded(family, tiny.samples(family, records)))
    sight = watch(family)
    assert sight._is_able()
    calls = counted(family)
    batch = tiny.padded(family, tiny.samples(family, records))
    assert calls == [1, 1]
    assert torch.equal(plain.answer_losses(batch), expected)
    assert calls == [1, 1]
    different = tiny.padded(family, tiny.samples(family, records[:2]))
    assert different.pixels["pixel_values"].shape == (2, 3, 28, 28)  # nothing is gained there


def test_an_image_is_opened_once_in_a_batch(monkeypatch):
    opened: list[str] = []
    load = tiny.Picture.load
    monkeypatch.setattr(tiny.Picture, "load", lambda self: opened.append(self.key) or load(self))
    family = made("llava")
    tiny.padded(family, tiny.samples(family))
    assert len(opened) == len(set(opened)) == 2


def test_images_of_one_row_are_kept_together(tmp_path):
    """Some processors cut an image into tiles only where it is alone."""
    family = Generic.tiny_member("llava_onevision", image_size=56)
    sight = watch(family, store=Store(tmp_path, limit=GB), note=pytest.fail)
    records = [
        tiny.record("one", "<image> it", "x", images=(1,)),
        tiny.record("two", "<image> <image>", "x", images=(1, 2)),
    ]
    plain = made("llava_onevision")
    expected = loss_and_gradient(tuned_on(plain, connector=False), tiny.samples(plain, records))
    losses, _ = loss_and_gradient(tuned_on(family, connector=False), tiny.samples(family, records))
    assert torch.allclose(losses, expected[0], rtol=1e-6)
    assert sight.to_json()["misses"] == 2


# --- where it is not right ---


@pytest.mark.parametrize("member", NO_IMAGES_APART)
def test_a_model_that_cannot_says_so_once_and_computes(tmp_path, member):
    records = [tiny.record(f"q{i}", "<image>\nIs it?", "yes", images=(i,)) for i in range(2)]
    plain = made(member)
    expected = loss_and_gradient(tuned_on(plain, connector=False), tiny.samples(plain, records))
    family, said = made(member), []
    sight = watch(family, store=Store(tmp_path, limit=GB), note=said.append)
    tuned = tuned_on(family, connector=False)
    for _ in range(2):
        assert same(loss_and_gradient(tuned, tiny.samples(family, records)), expected)
    assert len(said) == 1
    assert NO_IMAGES_APART[member] in said[0]
    assert sight.to_json() == {"hits": 0, "misses": 0, "damaged": 0, "off": NO_IMAGES_APART[member]}
    assert not any(tmp_path.iterdir())


def test_features_that_depend_on_other_images_are_not_kept(tmp_path, monkeypatch):
    family, said = made("llava"), []
    connector = family.model.model.multi_modal_projector
    mixed = lambda module, args, output: output + output.mean(dim=0, keepdim=True)  # noqa: E731
    connector.register_forward_hook(mixed)
    expected = loss_and_gradient(tuned_on(family, connector=False), tiny.samples(family))
    family = made("llava")
    family.model.model.multi_modal_projector.register_forward_hook(mixed)
    sight = watch(family, store=Store(tmp_path, limit=GB), note=said.append)
    assert same(loss_and_gradient(tuned_on(family, connector=False), tiny.samples(family)), expected)
    assert "differ from those of each image alone" in sight.why_not
    assert len(said) == 1


def test_a_forward_that_goes_another_way_is_found(tmp_path):
    family, said = made("llava"), []
    inner = family.model.model
    own = inner.forward
    scaled = lambda *args, pixel_values=None, **kwargs: own(  # noqa: E731
        *args, pixel_values=None if pixel_values is None else pixel_values * 2, **kwargs
    )
    inner.forward = scaled
    watch(family, store=Store(tmp_path, limit=GB), note=said.append)
    samples = tiny.samples(family)
    assert "pixel_values" in tiny.shared(family, samples).pixels
    assert tiny.shared(family, samples).pixels["pixel_values"].is_floating_point()
    assert len(said) == 1


# --- under which name ---


def digest(family: Family, tmp_path: Path, **how: object) -> str:
    sight = Sight(
        family,
        **({"connector": False, "bf16": False, "held": None, "note": print} | how),
        store=Store(tmp_path, limit=GB),
    )
    return sight._digest((tiny.Picture(1),))


def test_a_name_is_that_of_contents_and_of_all_that_decides_features(tmp_path):
    names = {"plain": digest(made("llava"), tmp_path)}
    assert digest(made("llava"), tmp_path / "elsewhere") == names["plain"]
    names["bf16"] = digest(made("llava"), tmp_path, bf16=True)
    names["connector"] = digest(made("llava"), tmp_path, connector=True)
    names["seed"] = digest(tiny.family("llava", seed=1), tmp_path)
    for part in ("vision_tower", "multi_modal_projector"):
        family = made("llava")
        with torch.no_grad():
            next(family.model.get_submodule(f"model.{part}").parameters()).view(-1)[0] += 1
        names[part] = digest(family, tmp_path)
    settings = made("llava")
    assert isinstance(settings, Llava)
    settings.image_processor.image_mean = [0.5, 0.5, 0.5]
    names["mean"] = digest(settings, tmp_path)
    family = made("llava").model.to(torch.bfloat16)
    names["dtype"] = digest(_with(made("llava"), family), tmp_path)
    assert len(set(names.values())) == len(names)


def _with(family: Family, model: object) -> Family:
    family.model = model
    return family


def test_a_name_knows_no_decoder_and_no_connector_that_trains(tmp_path):
    def moved(part: str) -> Family:
        family = made("llava")
        with torch.no_grad():
            for parameter in family.model.get_submodule(part).parameters():
                parameter.add_(1)
        return family

    plain = digest(made("llava"), tmp_path)
    assert digest(moved("model.language_model.layers"), tmp_path) == plain
    assert digest(moved("lm_head"), tmp_path) == plain
    assert digest(moved("model.multi_modal_projector"), tmp_path) != plain
    before = digest(made("llava"), tmp_path, connector=True)
    assert digest(moved("model.multi_modal_projector"), tmp_path, connector=True) == before


# --- entries ---


def test_an_entry_comes_back_as_it_was():
    value = {"a": [torch.arange(6).view(2, 3), (torch.ones(1, dtype=torch.bfloat16), None)], "b": {"c": 1.5, "d": "é"}}
    back = Entry.from_bytes(Entry.of(value, keep=lambda tensor: tensor.ndim != 1).to_bytes()).value()
    assert torch.equal(back["a"][0], value["a"][0])
    assert back["a"][1][0].shape == (1,)
    assert back["a"][1][0].dtype == torch.bfloat16
    assert back["a"][1][1] is None
    assert back["b"] == value["b"]
    with pytest.raises(UnfitError, match="object"):
        Entry.of({"a": object()})


def test_values_of_several_images_are_joined_as_the_model_joins_them():
    apart = [{"pooled": [torch.ones(n, 2)], "deep": [(torch.ones(n, 2),), (torch.zeros(n, 2),)]} for n in (1, 3)]
    together = {
        "pooled": [torch.ones(1, 2), torch.ones(3, 2)],
        "deep": [(torch.ones(1, 2), torch.ones(3, 2)), (torch.zeros(1, 2), torch.zeros(3, 2))],
    }
    rows = set(rows_in(apart, together))
    assert rows == {".pooled", ".deep[]"}
    assert repr(joined(apart, in_a_row=rows)) == repr(together)


# --- the store ---


def held(store: Store) -> dict[str, int]:
    return {path.stem: path.stat().st_size for path in store.directory.rglob("*.features")}


def name(i: int) -> str:
    return f"{i:02x}" * 32


def test_what_was_written_is_read_by_others(tmp_path):
    Store(tmp_path, limit=GB).write(name(1), b"content")
    assert Store(tmp_path, limit=GB).read(name(1)) == b"content"
    assert name(1) in Store(tmp_path, limit=GB)
    assert name(2) not in Store(tmp_path, limit=GB)
    assert Store(tmp_path, limit=GB).read(name(2)) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap"])
def test_a_damaged_file_is_removed_and_made_again(tmp_path, damage):
    store = Store(tmp_path, limit=GB)
    store.write(name(1), bytes(range(200)))
    path = next(tmp_path.rglob("*.features"))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[100] ^= 1
    elif damage == "cut":
        data = data[:-40]
    elif damage == "empty":
        data = bytearray()
    else:  # a good file under another's name
        store.write(name(2), bytes(200))
        data = bytearray(store._path(name(2)).read_bytes())
    path.write_bytes(data)
    assert store.read(name(1)) is None
    assert store.damaged == 1
    assert not path.exists()
    store.write(name(1), b"again")
    assert store.read(name(1)) == b"again"


def test_a_damaged_entry_is_computed_again(tmp_path):
    samples = None
    for damaged in (False, True):
        family = made("llava")
        sight = watch(family, store=Store(tmp_path, limit=GB))
        result = loss_and_gradient(tuned_on(family, connector=False), tiny.samples(family))
        if not damaged:
            samples = result
            path = next(tmp_path.rglob("*.features"))
            path.write_bytes(path.read_bytes()[:-1])
    assert same(result, samples)
    assert (sight.to_json()["misses"], sight.to_json()["damaged"]) == (1, 1)


def test_the_least_recently_used_makes_room(tmp_path):
    store = Store(tmp_path, limit=1000)
    for i in range(9):
        store.write(name(i), bytes(68))  # 100 with its seal
        os.utime(store._path(name(i)), (i, i))
    assert store.read(name(0)) is not None  # used again
    for i in range(9, 12):
        store.write(name(i), bytes(68))
        assert sum(held(store).values()) <= 1000
    there = {int(each[:2], 16) for each in held(store)}
    assert 0 in there
    assert {9, 10, 11} <= there
    assert not {1, 2} & there
    store.write(name(50), bytes(2000))  # larger than all the room there is
    assert name(50) not in store


def test_what_killed_writers_left_goes(tmp_path):
    store = Store(tmp_path, limit=GB)
    store.write(name(1), b"x")
    old, new = (store._path(name(1)).with_name(f".tmp-{age}") for age in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    Store(tmp_path, limit=GB).write(name(2), b"y")
    assert not old.exists()
    assert new.exists()


def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said: list[str] = []
    expected = loss_and_gradient(tuned_on(made("llava"), connector=False), tiny.samples(made("llava")))
    family = made("llava")
    sight = watch(family, store=Store(tmp_path, limit=GB, note=said.append))
    tuned = tuned_on(family, connector=False)
    monkeypatch.setattr(Path, "replace", full)
    assert same(loss_and_gradient(tuned, tiny.samples(family)), expected)
    assert same(loss_and_gradient(tuned, tiny.samples(family)), expected)
    assert len(said) == 1
    assert "No space left" in said[0]
    assert str(tmp_path) in said[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sight.to_json()["misses"] == 3


def test_a_place_that_is_no_directory_is_said_once(tmp_path):
    (tmp_path / "file").write_text("")
    said: list[str] = []
    store = Store(tmp_path / "file" / "below", limit=GB, note=said.append)
    for i in range(3):
        store.write(name(i), b"x")
        assert store.read(name(i)) is None
    assert len(said) == 1


@pytest.mark.slow
def test_several_writers_do_not_disturb_one_another(tmp_path):
    program = (
        "import sys; from peft_mllm.features.store import Store\n"
        "store = Store(sys.argv[1], limit=60_000, note=sys.exit)\n"
        "for i in range(400):\n"
        "    digest = f'{i * int(sys.argv[2]) % 97:02x}' * 32\n"
        "    found = store.read(digest)\n"
        "    assert found is None or found == digest.encode() * 20, i\n"
        "    if found is None: store.write(digest, digest.encode() * 20)\n"
        "assert store.damaged == 0\n"
    )
    runs = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(step)]) for step in (5, 7, 11)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    store = Store(tmp_path, limit=60_000)
    assert sum(held(store).values()) <= 60_000 * 1.15
    assert not list(tmp_path.rglob(".tmp-*"))


def test_memory_is_bounded_and_the_disk_helps_out(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_mllm.features.held.MEMORY", 1)
    family = made("llava")
    sight = watch(family, store=Store(tmp_path, limit=GB))
    expected = loss_and_gradient(tuned_on(made("llava"), connector=False), tiny.samples(made("llava")))
    assert same(loss_and_gradient(tuned_on(family, connector=False), tiny.samples(family)), expected)
    assert len(sight._held) == 1
    assert sight.to_json()["misses"] == 3


def test_padded_batches_see_the_same(tmp_path):
    family = made("llava")
    plain = tuned_on(family, connector=False)
    samples = tiny.samples(family)
    expected = plain.answer_losses(collate_padded(samples, pixels=family.pixels, pad_id=0))
    watch(family, store=Store(tmp_path, limit=GB))
    assert torch.equal(plain.answer_losses(collate_padded(samples, pixels=family.pixels, pad_id=0)), expected)


def test_nothing_is_kept_of_a_model_without_numbers(tmp_path):
    family = made("llava")
    sight = watch(family, store=Store(tmp_path, limit=GB))
    assert sight._is_able()
    with without_numbers(family.model, torch.device("cpu"), None), pytest.raises(AssertionError, match="numbers"):
        tiny.padded(family, tiny.samples(family))
    assert not sight._held
    assert not list(tmp_path.iterdir())
