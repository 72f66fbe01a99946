"""Qwen's tokenizer: byte-level BPE over the published ranks (qwen.tiktoken), with ChatML's and the images' tokens.

An image in a text is `<img>path</img>`; in ids it is `<img>`, 256 slots, `</img>`. The slots hold the path's UTF-8
bytes, each as the id of its value, then `<imgpad>`. We give pixels to the model and leave the path empty; old data,
whose ids carry paths, can be read.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import BatchEncoding, PreTrainedTokenizerFast

from peft_mllm.models.qwen_vl.chatml import CHAT_TEMPLATE
from peft_mllm.models.qwen_vl.configuration import IMAGE_TOKENS

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"
BOXES = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGES = ("<img>", "</img>", "<imgpad>")
SPECIALS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)), *BOXES, *IMAGES)
"""In the order of their ids, which follow the last rank's."""
_BOX = re.compile(f"({'|'.join(BOXES)})")
_IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)


class QWenTokenizer(PreTrainedTokenizerFast):
    """The tokenizer under the name that published directories call it by.

    Text given to it may name special tokens, as in the original; what comes from users goes through `encode_text`,
    where `<|im_end|>` is eight characters like any others.
    """

    vocab_files_names = {"vocab_file": "qwen.tiktoken", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, **kwargs: Any):
        defaults = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "chat_template": CHAT_TEMPLATE}
        kwargs.pop("auto_map", None)  # names a code file that we neither run nor write
        if (made := kwargs.pop("tokenizer_object", None)) is not None:
            self._tokenizer = made  # transformers would copy it, which takes as long as making it
        super().__init__(**{**defaults, **{name: value for name, value in kwargs.items() if value is not None}})

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """What transformers read of a directory, as arguments of `__init__`; tokenizer.json goes before the ranks."""
        saved, ranks = kwargs.get("tokenizer_file"), kwargs.get("vocab_file")
        if saved is None and ranks is not None:
            kwargs["tokenizer_object"] = backend(read_ranks(Path(ranks)))
        return kwargs

    @classmethod
    def of_ranks(cls, ranks: Mapping[bytes, int]) -> QWenTokenizer:
        """A tokenizer of other ranks than the published ones."""
        return cls(tokenizer_object=backend(ranks))

    @property
    def im_start_id(self) -> int:
        """Id of `<|im_start|>`, which begins a turn."""
        return self.convert_tokens_to_ids("<|im_start|>")

    @property
    def im_end_id(self) -> int:
        """Id of `<|im_end|>`, which ends a turn."""
        return self.convert_tokens_to_ids("<|im_end|>")

    @property
    def image_start_id(self) -> int:
        """Id of `<img>`."""
        return self.convert_tokens_to_ids("<img>")

    @property
    def image_end_id(self) -> int:
        """Id of `</img>`."""
        return self.convert_tokens_to_ids("</img>")

    @property
    def image_pad_id(self) -> int:
        """Id of `<imgpad>`."""
        return self.convert_tokens_to_ids("<imgpad>")

    # text that is not trusted

    def encode_text(self, text: str, *, boxes: bool = False) -> list[int]:
        """Ids of a text in which nothing is special, or only `<ref>`, `<box>`, `<quad>` and their ends."""
        if not boxes:
            return super()._encode_plus(text=text, split_special_tokens=True, verbose=False)["input_ids"]
        ids: list[int] = []
        for stretch in _BOX.split(text):
            ids += [self.convert_tokens_to_ids(stretch)] if stretch in BOXES else self.encode_text(stretch)
        return ids

    def encode_content(self, text: str) -> list[int]:
        """Ids of a chat message as the original's: images and boxes are special, ChatML's tokens are not.

        Raises:
            ValueError: an image is not closed, or its path is too long.
        """
        ids: list[int] = []
        for i, stretch in enumerate(_IMAGE.split(text)):
            if i % 2 == 0 and "<img>" in stretch:
                raise ValueError("An <img> has no </img>.")
            ids += self.image_span(stretch) if i % 2 else self.encode_text(stretch, boxes=True)
        return ids

    # images

    def image_span(self, path: str) -> list[int]:
        """Ids of an image: `<img>`, the path's bytes and padding in 256 slots, `</img>`.

        Raises:
            ValueError: the path has more than 256 bytes.
        """
        written = unicodedata.normalize("NFC", path).encode()
        if len(written) > IMAGE_TOKENS:
            raise ValueError(f"An image's path has {len(written)} bytes, and {IMAGE_TOKENS} fit: {path}")
        padding = [self.image_pad_id] * (IMAGE_TOKENS - len(written))
        return [self.image_start_id, *written, *padding, self.image_end_id]

    def image_paths(self, ids: Sequence[int]) -> list[str]:
        """The paths of the images in a sequence of ids, in order; empty where pixels are given instead.

        Raises:
            ValueError: an image is not closed, or its slots hold no path.
        """
        paths = []
        for start, end in self._spans(ids):
            slots = list(ids[start + 1 : end])
            if len(slots) != IMAGE_TOKENS or self.image_pad_id not in slots:
                raise ValueError(f"The image at token {start} has not {IMAGE_TOKENS} slots, the last of them padding.")
            try:
                paths.append(bytes(slots[: slots.index(self.image_pad_id)]).decode())
            except ValueError as error:
                raise ValueError(f"The slots of the image at token {start} are not the bytes of a path.") from error
        return paths

    def _spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Where `<img>` and its `</img>` are."""
        spans, start = [], None
        for i, token in enumerate(ids):
            if token == self.image_start_id and start is None:
                start = i
            elif token == self.image_end_id and start is not None:
                spans.append((start, i))
                start = None
        if start is not None:
            raise ValueError(f"The <img> at token {start} has no </img>.")
        return spans

    # transformers' way of calling it

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        texts = [text] if isinstance(text, str) else text
        split = kwargs.get("split_special_tokens")
        split = self.split_special_tokens if split is None else split
        plain = split or text_pair is not None or not all(isinstance(each, str) for each in texts)
        if plain or not any("<img>" in each for each in texts):
            return super()._encode_plus(text=text, text_pair=text_pair, **kwargs)
        return self._encode_images(texts, single=isinstance(text, str), **kwargs)

    def _encode_images(
        self,
        texts: Sequence[str],
        *,
        single: bool,
        padding_strategy: Any = False,
        truncation_strategy: Any = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_attention_mask: bool | None = None,
        return_offsets_mapping: bool = False,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Texts with images: tokenised as ever, then each path's tokens give way to the 256 slots."""
        rows = [self._slotted(each) for each in texts]
        limit = None if truncation_strategy in (None, False) or truncation_strategy == "do_not_truncate" else max_length
        if limit is not None and any(len(ids) > limit for ids, _ in rows):
            raise ValueError(f"A text with images has more than {limit} tokens; it is not cut, for fear of its images.")
        padded = self.pad(
            {"input_ids": [ids for ids, _ in rows]},
            padding=padding_strategy,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
        )
        if return_offsets_mapping:
            padded["offset_mapping"] = [offsets for _, offsets in rows]
        if single and return_tensors is None:
            return BatchEncoding({name: value[0] for name, value in padded.items()})
        return BatchEncoding(dict(padded), tensor_type=return_tensors)

    def _slotted(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets of a text; all slots of an image have its path's."""
        plain = super()._encode_plus(text=text, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(plain["input_ids"]), list(plain["offset_mapping"])
        for start, end in reversed(self._spans(ids)):
            path = (offsets[start][1], offsets[end][0])
            ids[start : end + 1] = self.image_span(text[slice(*path)])
            offsets[start + 1 : end] = [path] * IMAGE_TOKENS
        return ids, offsets

    def tokenize(self, text: str, pair: str | None = None, **kwargs: Any) -> list[str]:
        """The tokens of a text as strings."""
        if pair is None and "<img>" in text:
            return self.convert_ids_to_tokens(self._slotted(text)[0])
        return super().tokenize(text, pair, **kwargs)

    def _decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> str:
        return super()._decode(self._with_paths(token_ids), *args, **kwargs)

    def _with_paths(self, token_ids: Any) -> Any:
        """Ids with each image's path as text; what a model invented and is no image stays as it is."""
        if isinstance(token_ids, int) or self.image_start_id not in token_ids:
            return token_ids
        ids = list(token_ids)
        try:
            paths = self.image_paths(ids)
        except ValueError:
            return ids
        for (start, end), path in reversed(list(zip(self._spans(ids), paths, strict=True))):
            ids[start + 1 : end] = self.encode_text(path)
        return ids


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token -> rank of a file in tiktoken's format: base64 and a number on each line.

    Raises:
        ValueError: it is not in that format, or its ranks are not 0, 1, 2 ...
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{file}:{number}: this is no line of token ranks: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{file}: its ranks are not the numbers from 0 on; the file is damaged.")
    return ranks


def backend(ranks: Mapping[bytes, int]) -> Tokenizer:
    """Ranks as a tokenizer of the `tokenizers` library, which gives character offsets."""
    letters = _byte_letters()
    vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=list(_merges(vocabulary)), byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIALS])
    return tokenizer


def _merges(vocabulary: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    """All pairs of tokens that make a token, in the order of what they make: tiktoken joins by that rank."""
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        yield from sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


def _byte_letters() -> dict[int, str]:
    """The letter by which byte-level BPE writes each byte: itself where it is visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
