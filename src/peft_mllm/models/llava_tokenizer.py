"""The tokenizer of an original LLaVA: Llama's SentencePiece model as a fast tokenizer that gives the very same ids.

The original code tokenises the text before, between and after the images one by one, and begins each stretch with a
space mark. Here a tokenizer.json does that itself, by its normaliser, so a whole prompt with its `<image>` marks has
the original's ids in plain transformers, too. transformers' own conversion of such a file yields one mark less before
text that begins with a space, and none after an image.

The placeholder of an image needs an id that the model has a row for. The original has none: its vocabulary is full,
and it replaces the sentinel -200 before the model sees any ids. A new row would add a column to the logits, and so
change losses and greedy answers. So an id is taken that no text can have; see `_placeholder`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mllm.errors import ModelError
from peft_mllm.record import IMAGE_MARK

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPACE = "\u2581"  # SentencePiece's mark of a space
NEVER_IN_TEXT = "<0xFF>"  # the byte that occurs in no UTF-8 text

# Kinds of pieces and of models, as numbered in SentencePiece's protocol.
_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5
_BPE = 2

DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": ""}
"""Llama's own, for a directory whose files do not name them."""


def load_tokenizer(directory: Path, *, rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory with a `tokenizer.model`, with `<image>` as the placeholder.

    Args:
        directory: also tokenizer_config.json, special_tokens_map.json and added_tokens.json, where it has them.
        rows: of the model's embedding; every id is below.

    Raises:
        ModelError: there is no such file, or it is not of Llama's kind, or has an id that the model has no row for.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    config = _json(directory / "tokenizer_config.json")
    named = config | _json(directory / "special_tokens_map.json")
    names = {kind: _content(named.get(kind)) or default for kind, default in DEFAULTS.items()}
    names["pad_token"] = names["pad_token"] or names["unk_token"]  # as the original sets it
    vocabulary, merges = _read_sentencepiece(directory / "tokenizer.model")
    added = _added_tokens(directory, config, size=len(vocabulary), rows=rows)
    _placeholder(vocabulary, added, rows=rows, directory=directory)
    special = [name for name in dict.fromkeys([*names.values(), *added, IMAGE_MARK]) if name]
    made = _pipeline(vocabulary, merges, unknown=names["unk_token"], special=special, legacy=config.get("legacy", True))
    # `normalized`: they are looked for after the normaliser, which sees the whole text and so knows its beginning.
    made.add_special_tokens([AddedToken(name, normalized=True, special=True) for name in [*added, *special]])
    beyond = [name for name in special if (made.token_to_id(name) or 0) >= rows]
    if beyond:
        raise ModelError(f"{directory}: its special tokens {', '.join(beyond)} have no row in the model ({rows} rows).")
    made.post_processor = _ends(
        [names["bos_token"]] if config.get("add_bos_token", True) else [],
        [names["eos_token"]] if config.get("add_eos_token", False) else [],
        made,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=config.get("model_max_length", 2048),
        padding_side="left",  # a batch of prompts is continued at its right end
        clean_up_tokenization_spaces=False,
        **names,
    )


def _placeholder(vocabulary: dict[str, int], added: dict[str, int], *, rows: int, directory: Path) -> None:
    """Give `<image>` an id that no text can have, without a new row in the model.

    First an `<image>` that is there; then a row that no token has; then the byte 0xFF, whose name is replaced: the
    byte tokens spell what is in no other token, and UTF-8 never has that byte.
    """
    size = len(vocabulary) + len(added)
    if IMAGE_MARK in vocabulary or IMAGE_MARK in added:
        return
    if size < rows:
        added[IMAGE_MARK] = size
    elif NEVER_IN_TEXT in vocabulary:
        vocabulary[IMAGE_MARK] = vocabulary.pop(NEVER_IN_TEXT)
    else:
        raise ModelError(
            f"{directory}: no token id is left for the image placeholder: the tokenizer has no {IMAGE_MARK}, no "
            f"{NEVER_IN_TEXT}, and a token for each of the model's {rows} rows."
        )


def _pipeline(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], *, unknown: str, special: Sequence[str], legacy: bool
) -> Tokenizer:
    """The model and what is done to text before and after it.

    A space mark begins the text and what follows an image, unless that begins with a special token; with `legacy`,
    it begins what follows any special token, as the first Llama tokenizers had it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers

    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    any_special = "|".join(map(re.escape, special))
    before = any_special if legacy else re.escape(IMAGE_MARK)
    begins = rf"(?:\A|(?<={before}))(?!{any_special}|\z)"
    made.normalizer = normalizers.Sequence([normalizers.Replace(Regex(begins), SPACE), normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def _ends(first: list[str], last: list[str], made: Tokenizer) -> Any:
    from tokenizers.processors import TemplateProcessing

    tokens = [(name, made.token_to_id(name)) for name in dict.fromkeys([*first, *last])]
    return TemplateProcessing(single=[*first, "$A", *last], special_tokens=tokens)


def _read_sentencepiece(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Piece -> id, and the pairs to be merged, best first: a piece of two parts is as good as its score."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    protocol: Any = sentencepiece_model_pb2
    if not file.is_file():
        raise ModelError(f"{file} is missing: copy it from the language model that the checkpoint was trained from.")
    model = protocol.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ModelError(f"{file} is no SentencePiece model, or damaged: download it again.") from error
    normaliser = model.normalizer_spec
    if model.trainer_spec.model_type != _BPE or normaliser.precompiled_charsmap or normaliser.remove_extra_whitespaces:
        raise ModelError(f"{file} is not of Llama's kind: byte-pair merges of text that is taken as it is.")
    odd = [piece.piece for piece in model.pieces if piece.type in (_USER_DEFINED, _UNUSED)]
    if odd:
        raise ModelError(f"{file} is not of Llama's kind: {', '.join(odd[:5])} are pieces that it never merges.")
    vocabulary = {piece.piece: i for i, piece in enumerate(model.pieces)}
    merges = [
        (piece.piece[:i], piece.piece[i:])
        for piece in sorted(model.pieces, key=lambda piece: -piece.score)
        if piece.type == _NORMAL
        for i in range(1, len(piece.piece))
        if piece.piece[:i] in vocabulary and piece.piece[i:] in vocabulary
    ]
    return vocabulary, merges


def _added_tokens(directory: Path, config: Mapping[str, Any], *, size: int, rows: int) -> dict[str, int]:
    """Tokens beyond the SentencePiece model, by id; both of transformers' files for them are read."""
    decoder = {_content(token): int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
    found = decoder | _json(directory / "added_tokens.json")
    added = {name: i for name, i in sorted(found.items(), key=lambda item: item[1]) if i >= size}
    if list(added.values()) != list(range(size, size + len(added))):
        raise ModelError(f"{directory}: its added tokens {added} do not follow the {size} of tokenizer.model.")
    if size + len(added) > rows:
        raise ModelError(f"{directory}: its tokenizer has {size + len(added)} ids, its model only {rows} rows.")
    return added


def _content(token: Any) -> str:
    """A token's text, written as such or as a description."""
    return str(token["content"] if isinstance(token, Mapping) else token or "")


def _json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{file} is not JSON ({error}).") from error
    if not isinstance(read, dict):
        raise ModelError(f"{file} must be an object, {{name: value}}; it is a {type(read).__name__}.")
    return read
