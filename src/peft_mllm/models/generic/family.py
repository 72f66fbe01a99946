"""Any image-text model that transformers' AutoModelForImageTextToText loads, with parts that can be found.

Parts come from `introspect`, the conversation from the model's own chat template, images from its own processor.
A conversation's text, with images expanded as the processor expands them, is tokenised in one go, as the processor
does; on loading, some conversations are held against the processor's own token ids. Without a chat template a
record is one question and one answer: the processor's own prompt, the answer, and the end token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mllm.data.encode import IGNORED, Sample
from peft_mllm.errors import DataError, ModelError
from peft_mllm.models.base import Family, Labels, Loading, check_marks
from peft_mllm.models.generic.conversation import ChatTemplate
from peft_mllm.models.generic.introspect import anatomy_of
from peft_mllm.models.generic.processor import TOKEN_TYPES, Expansion, Seer, load_processor
from peft_mllm.models.generic.script import Script, Tokens, expand, learned, tokenise
from peft_mllm.models.hf_format import load_hf
from peft_mllm.record import IMAGE_MARK, ImageSource, Record, Turn

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin


class Generic(Family):
    """A model with its own processor and chat template.

    Args:
        model: any AutoModelForImageTextToText.
        processor: its processor.
        declared: fields of its anatomy that are not to be found but are so.

    Raises:
        ModelError: parts are not clear, or the processor's ways cannot be followed exactly.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, *, declared: Mapping[str, Any] | None = None):
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        if not self.tokenizer.is_fast:
            raise ModelError(
                "Its tokenizer gives no character offsets, so answers cannot be found; add tokenizer.json."
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.anatomy = anatomy_of(model, declared)
        if not self.anatomy.mlp:
            self.notes = ("The MLPs are experts in one tensor each: methods reach the attention alone.",)
        self._seer = Seer(processor)
        template = _template_of(processor)
        self.chat = ChatTemplate(self.tokenizer, template, self._seer.placeholder) if template else None
        self._look_at_the_model()
        self._compare_with_the_processor()

    def _look_at_the_model(self) -> None:
        """Learn which arguments it takes, and whether it looks ahead."""
        base = self.model.base_model
        if base is self.model:
            raise ModelError(f"{type(self.model).__name__} has no base model that gives hidden states.")
        taken = inspect.signature(base.forward).parameters
        self._rope = getattr(base, "get_rope_index", None)
        self._aligned = "cross_attention_mask" in taken
        told = self._seer.token_types()
        self._types = tuple(name for name in TOKEN_TYPES if name in told and name in taken)
        # token types of images are there to tell them from text; types that are 0 for images mark the answer
        self._types_mark_answers = bool(self._types) and not bool(told[self._types[0]].any())
        # a model that is told which tokens are images' or a prompt's lets those look ahead
        self.trees = "token_type_ids" not in self._types
        self._plain_head = self._logits_are_the_heads()
        if self._aligned:
            self.notes += (
                "Where rows of a batch show unequal numbers of images, text before them sees the difference.",
            )

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether transformers has an image-text model of this type."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

        return config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    @classmethod
    def load(cls, source: str | Path, *, loading: Loading) -> Generic:
        """Load a directory or hub id such as Qwen/Qwen2.5-VL-7B-Instruct; nothing in it is run."""
        model = load_hf(source, loading=loading)
        try:
            return cls(model, load_processor(source, model.config), declared=loading.anatomy)
        except ModelError as error:
            raise ModelError(f"{source}: {error}") from error

    @classmethod
    def tiny(cls, *, image_size: int = 56, seed: int = 0) -> Generic:
        """A random InternVL; `tiny_member` makes others."""
        return cls.tiny_member("internvl", image_size=image_size, seed=seed)

    @classmethod
    def tiny_member(cls, member: str, *, image_size: int = 56, seed: int = 0) -> Generic:
        """A random member of one of the architectures in `members.MEMBERS`.

        Raises:
            ModelError: there is no such member; lists them.
        """
        from peft_mllm.models.generic.tiny import make

        return cls(*make(member, image_size=image_size, seed=seed))

    @classmethod
    def tiny_members(cls) -> tuple[str, ...]:
        """The names in `members.MEMBERS`."""
        from peft_mllm.models.generic.members import MEMBERS

        return tuple(MEMBERS)

    # --- text ---

    def encode(self, record: Record, *, answer: bool = True, labels: Labels = "answer") -> Sample:
        """The model's own chat template; answers and what ends them are learned.

        Where the template does not end an answer, the tokenizer's end token stands after the last one.
        """
        check_marks(record)
        expansion = self._seer.expand(tuple(image.dimensions for image in record.images)) if record.images else None
        script = self._script(record, expansion, answer=answer)
        # as transformers' apply_chat_template: a template that writes the first token does not get it twice
        bos = self.tokenizer.bos_token
        special = self.chat is not None and not (bos and script.text.startswith(bos))
        tokens = tokenise(script, self.tokenizer, special=special)
        of_images = self._seer.of_images(tokens.ids)
        return Sample(
            id=record.id,
            ids=tokens.ids,
            labels=tuple(
                token if learn else IGNORED
                for token, learn in zip(tokens.ids, learned(script, tokens, self.stops), strict=True)
            ),
            images=record.images,
            image_end=max((i + 1 for i, is_image in enumerate(of_images) if is_image), default=0),
            positions=self._positions(tokens.ids, of_images, expansion) if expansion and self._rope else None,
            extras=dict.fromkeys(self._types, self._token_types(script, tokens, of_images)),
        )

    def _script(self, record: Record, expansion: Expansion | None, *, answer: bool) -> Script:
        if self.chat is None:
            return self._without_template(record, answer=answer)
        rendered = self.chat.render(record, answer=answer)
        script = expand(rendered, self._seer.placeholder, expansion.texts if expansion else ())
        return script.ended(self.tokenizer.eos_token) if answer and not self._template_ends else script

    def _without_template(self, record: Record, *, answer: bool) -> Script:
        """The processor's own prompt, then the answer and the end token."""
        place = record.source or record.id
        if [turn.role for turn in record.turns] != ["user", "assistant"]:
            raise DataError(
                f"{place}: this model has no chat template, so a record is one question and one answer, without a "
                "system text. Use its chat version, or put a chat_template.jinja beside it."
            )
        if not record.images:
            raise DataError(f"{place}: this model has no chat template, and without one it reads no text alone.")
        question = record.turns[0].text.replace(IMAGE_MARK, "").strip()
        prompt = self._seer.frame(question, tuple(image.dimensions for image in record.images))
        said = record.answer + self.tokenizer.eos_token if answer else ""
        return Script(prompt + said, ((len(prompt), len(prompt + said)),))

    def _token_types(self, script: Script, tokens: Tokens, of_images: tuple[int, ...]) -> tuple[int, ...]:
        if not self._types_mark_answers:
            return of_images
        return tuple(int(last > script.answers[0][0]) for _, last in tokens.places)

    def _positions(
        self, ids: Sequence[int], of_images: Sequence[int], expansion: Expansion
    ) -> tuple[tuple[int, ...], ...]:
        """Positions on each axis, by the model's own rule."""
        import torch

        assert self._rope is not None
        wanted = inspect.signature(self._rope).parameters
        given = {"mm_token_type_ids": torch.tensor([of_images], dtype=torch.int), **expansion.inputs}
        positions, _ = self._rope(
            torch.tensor([ids]), **{name: value for name, value in given.items() if name in wanted}
        )
        return tuple(tuple(axis) for axis in positions[:, 0].tolist())

    # --- the rest ---

    def pixels(self, images: Sequence[Sequence[Image]], input_ids: Tensor) -> dict[str, Tensor]:
        """All that the processor makes of images, numbers in the model's type."""
        if self._aligned and len(images) != len(input_ids):  # a packed row of several trees
            images = [[image for row in images for image in row]]
        made = self._seer.inputs(images, input_ids, aligned=self._aligned)
        return {
            name: value.to(self.model.dtype) if value.is_floating_point() else value for name, value in made.items()
        }

    @property
    def image_settings(self) -> Mapping[str, Any]:
        """The processor's own, and what it tells its image processor."""
        return {"processor": self.processor.to_dict(), "images": self.processor.image_processor.to_dict()}

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (A, V) of hidden states (A, D), by the model's own rule where that is more than its head."""
        if self._plain_head:
            return super().logits(hidden)
        with _answering(self.model.base_model, hidden[None]):
            tokens = hidden.new_zeros(1, len(hidden)).long()
            logits: Tensor = self.model(input_ids=tokens).logits[0]
        return logits

    def _logits_are_the_heads(self) -> bool:
        """Whether logits are the head of the hidden states and nothing more; some models bend or scale them."""
        import torch

        head = self.model.get_output_embeddings()
        if head.weight.device.type == "meta":
            return True
        width = self.model.config.get_text_config().hidden_size
        hidden = torch.linspace(-3, 3, width, dtype=self.model.dtype, device=head.weight.device)[None]
        with torch.no_grad(), _answering(self.model.base_model, hidden[None]):
            tokens = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
            return torch.equal(self.model(input_ids=tokens).logits[0], head(hidden))

    @property
    def stops(self) -> tuple[int, ...]:
        """The end tokens of the model's generation config, and the tokenizer's."""
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        listed = configured if isinstance(configured, list) else [configured]
        return tuple(dict.fromkeys(token for token in (*listed, self.tokenizer.eos_token_id) if token is not None))

    def save(self, directory: Path) -> None:
        """Model, tokenizer, processor and chat template."""
        self.model.save_pretrained(directory)
        self.processor.save_pretrained(directory)

    # --- exactness ---

    def _compare_with_the_processor(self) -> None:
        """Hold some conversations against the processor's own token ids.

        Raises:
            ModelError: they differ.
        """
        self._template_ends = True
        if self.chat is None:
            self._compare(_probe(1), answer=False)
            return
        self._template_ends = any(label in self.stops for label in self.encode(_probe(0)).labels)
        for record in (_probe(1), _probe(0), _probe(1, 1), _probe(1, 0, 1)):
            for answer in (False, True) if self._template_ends else (False,):
                try:
                    self._compare(record, answer=answer)
                except (ValueError, TypeError, IndexError) as error:
                    if len(record.images) == 1:
                        raise ModelError(f"Its processor does not read an image: {error}") from error
                    said = f"Its processor reads no conversation with {len(record.images)} images: {error}"
                    self.notes = tuple(dict.fromkeys((*self.notes, said)))

    def _compare(self, record: Record, *, answer: bool) -> None:
        sample = self.encode(record, answer=answer)
        if self.chat is None:
            text, special = self._seer.placeholder * len(record.images) + record.turns[0].text[len(IMAGE_MARK) :], True
        else:
            text = self.chat.render(record, answer=answer).text
            special = not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))
        expected = self._seer.own(text, [image.load() for image in record.images], special=special)
        for name, values in {"input_ids": sample.ids, **sample.extras}.items():
            if tuple(expected.get(name, values)) != values:
                raise ModelError(
                    f"What is read here of a conversation with {len(record.images)} images and {len(record.turns)} "
                    f"turns is not what its {type(self.processor).__name__} reads ({name}), so it cannot be trained."
                )


@contextmanager
def _answering(base: Any, hidden: Tensor) -> Iterator[None]:
    """While open, a base model returns these hidden states whatever it is given."""
    base.forward = lambda *args, **kwargs: _Given(hidden)
    try:
        yield
    finally:
        del base.forward


class _Given:
    """A model's output that has hidden states and nothing else."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class _Blank(ImageSource):
    """A black image, for the comparison with the processor."""

    size: tuple[int, int]

    @property
    def key(self) -> str:
        return f"blank {self.size}"

    @property
    def dimensions(self) -> tuple[int, int]:
        return self.size

    def load(self) -> Image:
        from PIL import Image

        return Image.new("RGB", self.size)


def _probe(*images: int) -> Record:
    """A conversation to compare, with so many images in each of its questions."""
    turns: list[Turn] = []
    for i, shown in enumerate(images):
        turns += [Turn("user", f"{IMAGE_MARK * shown}What is number {i}?"), Turn("assistant", "It is a thing.")]
    blanks = tuple(_Blank((60 + 30 * i, 50)) for i in range(sum(images)))
    return Record(id="probe", turns=tuple(turns), images=blanks)


def _template_of(processor: ProcessorMixin) -> str | None:
    """The chat template, the processor's before the tokenizer's; of several the default one."""
    for template in (processor.chat_template, processor.tokenizer.chat_template):
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            return str(template)
    return None
