"""Random members of today's architectures with some ten thousand parameters, made offline: for tests and dry runs.

The vocabulary is that of the embedded base. Weights are random: only computations can be looked at, not answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_mllm.assets import EMBEDDED
from peft_mllm.errors import ModelError
from peft_mllm.models.generic.member import PATCH, Member
from peft_mllm.models.generic.members import MEMBERS
from peft_mllm.models.generic.processor import UnreadVideo, without_video
from peft_mllm.shelf import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


def make(member: str, *, image_size: int, seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random model and its processor.

    Raises:
        ModelError: there is no such member; or its processor wants a library that is not there.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    if member not in MEMBERS:
        raise ModelError(f"There is no tiny member '{member}' of generic. {did_you_mean(member, sorted(MEMBERS))}")
    if image_size % (2 * PATCH):
        raise ModelError(f"tiny:generic/{member}: the image size must be a multiple of {2 * PATCH}.")
    one = MEMBERS[member]
    try:
        processor = _processor(one, image_size)
    except ImportError as error:
        raise ModelError(f"tiny:generic/{member} cannot be made here: {' '.join(str(error).split())}") from error
    tokenizer = processor.tokenizer
    config = one.config(tokenizer, image_size)
    config.image_token_id = getattr(processor, "image_token_id", None) if member != "gemma3" else config.image_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for parameter in model.parameters():
            # gates and projections that start closed, so that training opens them, would hide every image
            if not parameter.any() and (parameter.ndim > 1 or parameter.numel() == 1):
                parameter.normal_(std=0.2)
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(end) for end in one.stops or (one.end,)]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model.eval(), processor


def _tokenizer(one: Member) -> PreTrainedTokenizerBase:
    """The embedded base's vocabulary with a member's special tokens."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    if not one.first:
        inner.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=one.end, pad_token="<pad>", unk_token="<unk>",
        padding_side="left", extra_special_tokens=dict(one.tokens),
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": [*one.tokens.values(), *one.more]})
    return tokenizer


def _processor(one: Member, image_size: int) -> ProcessorMixin:
    import transformers

    name, images, settings, image_settings = one.processor(image_size)
    kind = getattr(transformers, name)
    parts: dict[str, Any] = {
        "tokenizer": _tokenizer(one),
        "image_processor": getattr(transformers, images)(**image_settings),
    }
    if "video_processor" in kind.get_attributes():
        kind, parts["video_processor"] = without_video(kind), UnreadVideo({})
    return kind(**parts, **settings, chat_template=one.chat.template() if one.chat else None)
