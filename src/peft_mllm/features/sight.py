"""A family's `pixels` and its model's `get_image_features`, so that the tower sees an image once and never again.

A batch then carries no pixels but tickets, the digests under which its images' features are kept; the model, asked for
the features of tickets, looks them up. Nothing else changes: whoever collates and whoever calls the model
does as before. Before the first use two images are put through a model both ways; where they differ, or the model
does not compute its images' features in `get_image_features`, nothing is kept, and that is said.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from peft_mllm.data.seeing import Seeing, opened
from peft_mllm.data.trees import collate_padded
from peft_mllm.errors import DataError
from peft_mllm.features.entry import Entry, UnfitError, joined, tensors_of
from peft_mllm.features.held import Held
from peft_mllm.features.seams import AfterConnector, BeforeConnector, Seam, beside_pixels, read
from peft_mllm.features.store import Store
from peft_mllm.models.base import Family
from peft_mllm.provenance import tensors_fingerprint, version_of
from peft_mllm.record import IMAGE_MARK, ImageSource, Record, Turn

FORMAT = 1
PACKAGES = ("peft-mllm", "torch", "transformers", "pillow")
"""What decides the bits of features beside the model: with another version of these they are computed anew."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative difference that is rounding, by the type of the computation."""
WORDS = ">4q"
"""A digest of 32 bytes as four numbers of a ticket; the fifth is 0 where a new one begins."""

Unit = tuple[ImageSource, ...]
"""The images of one row: some processors make of an image what depends on the others beside it."""


def watch(
    family: Family,
    *,
    connector: bool = False,
    bf16: bool = False,
    store: Store | None = None,
    held: Held | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Sight:
    """Let a family and its model see each image once; before anything is attached to the model.

    Args:
        family: whose vision tower stays frozen.
        connector: the connector trains, so what it reads is kept, and not what it gives.
        bf16: computed in bfloat16 by autocast.
        store: where features are kept; None keeps them for the images that a batch shows more than once.
        held: those of other models of this base, to be used and added to.
        note: told where a store was given and nothing can be kept.
    """
    sight = Sight(family, connector=connector, bf16=bf16, store=store, held=held, note=note)
    family.pixels = sight  # type: ignore[method-assign]  # it is called as the method is
    return sight


class Sight(Seeing):
    """What a family sees; see `watch`, which makes it."""

    def __init__(
        self,
        family: Family,
        *,
        connector: bool,
        bf16: bool,
        store: Store | None,
        held: Held | None,
        note: Callable[[str], None],
    ):
        self.family, self.connector, self.bf16, self.store, self._note = family, connector, bf16, store, note
        self._keeps = store is not None or held is not None
        self._held = Held() if held is None else held
        self.why_not = ""
        """Why nothing is kept; empty where it is, or nothing was asked yet."""
        self._pixels = family.pixels
        self._owner: Any = family.model.base_model
        self._seam: Seam | None = None
        self._weights = self._fingerprint() if self._keeps else ""
        self._said: str | None = None
        self._units: dict[str, Unit] = {}
        self._shown = self._computed = 0

    # --- what a family does ---

    def __call__(self, images: Sequence[Sequence[Image.Image]], input_ids: Tensor) -> dict[str, Tensor]:
        """The family's own `pixels`."""
        return self._pixels(images, input_ids)

    def unopened(self, rows: Sequence[Sequence[ImageSource]], input_ids: Tensor) -> dict[str, Tensor]:
        """Tickets of a batch's images; the family's own arguments where their features are not kept."""
        units = [tuple(row) for row in rows if row]
        if not (self._is_wanted(units) and self._is_able()):
            return self(opened(rows), input_ids)
        digests = [self._digest(unit) for unit in units]
        if get_worker_info() is not None and not all(self._is_known(digest) for digest in digests):
            return self(opened(rows), input_ids)  # a data worker has no device to compute on
        self._units |= zip(digests, units, strict=True)
        return self._tickets(digests, [self._entry(digest) for digest in digests])

    def prove(self) -> None:
        """Find out now whether features can be kept: where weights lie in pieces, all processes must do so at once."""
        self._is_able()

    def look_at(self, records: Iterable[Record]) -> None:
        """Keep the features of all images of some records now: data workers do not compute any."""
        for unit in {self._digest(record.images): record.images for record in records if record.images}.values():
            if self.store and self._is_able():
                digest = self._digest(unit)
                self._units[digest] = unit
                self._entry(digest)

    def to_json(self) -> dict[str, Any]:
        """How often features were shown to the decoder and found or computed; and why nothing is kept, if so."""
        return {
            "hits": max(0, self._shown - self._computed),
            "misses": self._computed,
            "damaged": self.store.damaged if self.store else 0,
            "off": self.why_not or None,
        }

    # --- what the model does ---

    def _in_place_of(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """A `get_image_features` that also takes tickets; generation reads its parameters' names."""

        @functools.wraps(compute)
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs["pixel_values"]
            return compute(*args, **kwargs) if given.is_floating_point() else self._played(given)

        return get_image_features

    def _played(self, tickets: Tensor) -> Any:
        assert self._seam is not None
        digests = [struct.pack(WORDS, *words).hex() for words in tickets[tickets[:, 4] == 0, :4].tolist()]
        self._shown += len(digests)
        return self._seam.play([self._entry(digest) for digest in digests])

    def _entry(self, digest: str) -> Entry:
        """From memory, from the disk, or computed."""
        entry = self._held.get(digest)
        if entry is None:
            entry = self._found(digest) or self._made(digest)
            self._held.put(digest, entry)
        return entry

    def _found(self, digest: str) -> Entry | None:
        content = self.store.read(digest) if self.store else None
        return None if content is None else Entry.from_bytes(content)

    def _made(self, digest: str) -> Entry:
        if digest not in self._units:
            raise DataError(f"The features {digest} were removed from the vision cache while they were in use.")
        entry = self._recorded(self._units[digest])
        self._computed += 1
        if self.store:
            self.store.write(digest, entry.to_bytes())
        return entry

    def _recorded(self, unit: Unit) -> Entry:
        assert self._seam is not None
        arguments = self(opened([unit]), torch.zeros(1, 1, dtype=torch.long))
        with self._at_rest():
            entry = self._seam.record(arguments)
        # a memory plan runs models without numbers: nothing of that may be kept
        assert all(type(tensor) is Tensor for tensor in entry.tensors), "features were asked of a model without numbers"
        return entry

    def _tickets(self, digests: Sequence[str], entries: Sequence[Entry]) -> dict[str, Tensor]:
        """For each image's pixels as many rows as they had: some models cut and repeat them by that."""
        values = [entry.value() for entry in entries]
        tickets = [_ticket(digest, value["rows"]) for digest, value in zip(digests, values, strict=True)]
        beside = joined([beside_pixels(value["arguments"]) for value in values])
        return {"pixel_values": torch.cat(tickets), **beside}

    # --- whether it is right here ---

    def _is_wanted(self, units: Sequence[Unit]) -> bool:
        """Where nothing is kept, only for a batch that shows an image twice, and not in a data worker."""
        if self._keeps:
            return True
        keys = [tuple(image.key for image in unit) for unit in units] if len(units) > 1 else []
        return get_worker_info() is None and len(set(keys)) < len(keys)

    def _is_able(self) -> bool:
        """Whether the model gives with tickets what it gives with pixels; found out once."""
        if self._seam is None and not self.why_not and get_worker_info() is None:
            try:
                self._prove()
            except Exception as error:  # whatever a model raises where it is not asked as usual: it is then left alone
                self._leave(str(error) if isinstance(error, UnfitError) else f"{type(error).__name__}: {error}")
        return self._seam is not None

    def _leave(self, why: str) -> None:
        self._seam, self.why_not = None, why
        vars(self._owner).pop("get_image_features", None)
        if self.store:
            self._note(f"Vision features are not kept with this model, which changes nothing but the time: {why}.")

    def _prove(self) -> None:
        """Put two images through the model by pixels and by tickets.

        Raises:
            UnfitError: what comes out is not the same.
        """
        compute = getattr(self._owner, "get_image_features", None)
        if compute is None:
            raise UnfitError(f"{type(self._owner).__name__} has no get_image_features")
        tower = [self.family.model.get_submodule(path) for path in self.family.anatomy.vision]
        model = self.family.model
        self._seam = BeforeConnector(compute, model, tower) if self.connector else AfterConnector(compute, model)
        self._owner.get_image_features = self._in_place_of(compute)
        units: list[Unit] = [(_Noise(60, 50),), (_Noise(90, 50),)]
        ids = torch.zeros(2, 1, dtype=torch.long)
        plain = self(opened(units), ids)
        if lost := sorted({*plain} - {*inspect.signature(compute).parameters}):
            raise UnfitError(f"its get_image_features does not take {', '.join(lost)}")
        apart = [self(opened([unit]), ids[:1]) for unit in units]
        with self._at_rest(), torch.no_grad():
            outputs = [compute(**self._on_device(arguments)) for arguments in apart]
            whole = compute(**self._on_device(plain))
            self._seam.learn(outputs, whole)
            entries = [Entry.from_bytes(self._seam.record(arguments).to_bytes()) for arguments in apart]
            _same(self._seam.play(entries), whole, "features of several images at once")
            if isinstance(self._seam, BeforeConnector):
                self._seam.together = True
                self._seam.together = _is_same(self._seam.play(entries), whole)
            self._prove_forward(units, entries)

    def _prove_forward(self, units: Sequence[Unit], entries: Sequence[Entry]) -> None:
        digests = [self._digest(unit) for unit in units]
        self._units |= zip(digests, units, strict=True)
        for digest, entry in zip(digests, entries, strict=True):
            self._held.put(digest, entry)
        tickets = self._tickets(digests, entries)
        samples = [self.family.encode(_question(unit)) for unit in units]
        pad_id = self.family.tokenizer.pad_token_id or 0
        batch = collate_padded(samples, pixels=self._pixels, pad_id=pad_id)
        for name, value in beside_pixels(batch.pixels).items():
            if name not in tickets or not torch.equal(tickets[name], value):
                raise UnfitError(f"its {name} of several images is not that of each")
        text = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.extras}
        hidden = [
            self._owner(**self._on_device(text | pixels), use_cache=False).last_hidden_state
            for pixels in (tickets, batch.pixels)
        ]
        _same(hidden[0], hidden[1], "hidden states")
        for digest in digests:
            del self._units[digest]
            self._held.drop(digest)
        self._shown = self._computed = 0

    def _on_device(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = next(self.family.model.parameters()).device
        return {name: value.to(device) for name, value in arguments.items()}

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Without dropout, in the precision of the run; then as it was."""
        training = [module for module in _modules(self.family.model) if module.training]
        device = next(self.family.model.parameters()).device
        for module in training:
            module.training = False
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                yield
        finally:
            for module in training:
                module.training = True

    # --- under which name ---

    def _is_known(self, digest: str) -> bool:
        return digest in self._held or (self.store is not None and digest in self.store)

    def _digest(self, unit: Unit) -> str:
        """Of the images' contents and all that decides their features."""
        return hashlib.sha256(json.dumps([self._conditions, *(image.key for image in unit)]).encode()).hexdigest()

    @functools.cached_property
    def _conditions(self) -> str:
        """Everything beside the images that decides features, hashed."""
        device = next(self.family.model.parameters()).device
        decided = {
            "format": FORMAT,
            "versions": {package: version_of(package) for package in PACKAGES},
            "family": type(self.family).__name__,
            "images": self.family.image_settings,
            "weights": self._weights,
            "bf16": self.bf16,
            "connector": self.connector,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        }
        return hashlib.sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()

    def _fingerprint(self) -> str:
        """Of every tensor outside the decoder's layers, head and embeddings: what features may come from."""
        anatomy, model = self.family.anatomy, self.family.model
        apart = [anatomy.layers, anatomy.final_norm, anatomy.lm_head, *(anatomy.connector if self.connector else ())]
        embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
        held = {
            name: tensor
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if id(tensor) not in embeddings and not any(name.startswith(f"{path}.") for path in apart)
        }
        return tensors_fingerprint(held)


def _modules(root: nn.Module) -> Iterator[nn.Module]:
    """All modules, each once; torch's own way also makes their names, which takes as long as a small image."""
    seen, waiting = {id(root)}, [root]
    while waiting:
        module = waiting.pop()
        yield module
        children = [child for child in module._modules.values() if child is not None and id(child) not in seen]
        seen.update(map(id, children))
        waiting += children


def _ticket(digest: str, rows: int) -> Tensor:
    """(rows, 5)."""
    words = torch.tensor(struct.unpack(WORDS, bytes.fromhex(digest)))
    return torch.cat([words.expand(rows, 4), torch.arange(rows)[:, None]], dim=1)


@dataclass(frozen=True)
class _Noise(ImageSource):
    """An image that no two of a size differ in."""

    width: int
    height: int

    @property
    def key(self) -> str:
        return f"noise {self.width} x {self.height}"

    @property
    def dimensions(self) -> tuple[int, int]:
        return self.width, self.height

    def load(self) -> Image.Image:
        data = random.Random(self.key).randbytes(3 * self.width * self.height)
        return Image.frombytes("RGB", (self.width, self.height), data)


def _question(unit: Unit) -> Record:
    turns = (Turn("user", f"{IMAGE_MARK * len(unit)}\nWhat is it?"), Turn("assistant", "A thing."))
    return Record(id="noise", turns=turns, images=unit)


def _same(ours: Any, theirs: Any, what: str) -> None:
    """Raise where two outputs differ by more than rounding."""
    if not _is_same(ours, theirs):
        raise UnfitError(f"its {what} differ from those of each image alone")


def _is_same(ours: Any, theirs: Any) -> bool:
    one, other = ([each.float() for each in tensors_of(read(output))] for output in (ours, theirs))
    if [each.shape for each in one] != [each.shape for each in other]:
        return False
    low = any(each.dtype != torch.float32 for each in tensors_of(read(theirs)))
    limit = TOLERANCE[torch.bfloat16 if low else torch.float32]
    return all((a - b).norm() <= limit * b.norm() for a, b in zip(one, other, strict=True))
