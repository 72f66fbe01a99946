"""What a tiny member of an architecture is made of, and the widths that all of them have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PATCH = 14
"""Side of a patch in every member: an image of 28 pixels has four."""

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 8192,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
"""Three axes of positions on the four pairs of a head."""
NORMALISED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


Parts = tuple[str, str, dict[str, Any], dict[str, Any]]
"""Names of the processor's and the image processor's classes, and the arguments of each."""


@dataclass(frozen=True)
class Chat:
    """The form of a chat template: what stands around a turn of each role.

    Attributes:
        user, assistant: before and after what is said.
        prompt: what asks for an answer.
        image: what an image is in the text.
        start: at the front of all.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    image: str
    start: str = ""

    def template(self) -> str:
        """As Jinja; a system turn looks like a user's."""
        before, after = (
            f"{{{{ {json.dumps(self.assistant[i])} if turn['role'] == 'assistant' else {json.dumps(self.user[i])} }}}}"
            for i in (0, 1)
        )
        said = f"{{{{ {json.dumps(self.image)} if part['type'] == 'image' else part['text'] }}}}"
        return (
            f"{{{{ {json.dumps(self.start)} }}}}{{% for turn in messages %}}{before}{{% for part in turn['content'] %}}"
            f"{said}{{% endfor %}}{after}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {json.dumps(self.prompt)} }}}}{{% endif %}}"
        )


def chatml(image: str) -> Chat:
    """ChatML: each turn between two marks."""
    end = "<|im_end|>\n"
    return Chat(("<|im_start|>user\n", end), ("<|im_start|>assistant\n", end), "<|im_start|>assistant\n", image)


@dataclass(frozen=True)
class Member:
    """One architecture in small.

    Attributes:
        config: the configuration, from the tokenizer and the side of an image.
        processor: from the side of an image, the classes of processor and image processor, and the arguments of each.
        chat: None for a base model that has no chat template.
        end: the tokenizer's end token.
        tokens: special tokens by the names that its processor reads.
        more: further special tokens.
        first: whether the tokenizer puts `<s>` in front.
        stops: the tokens that end an answer, where it is not the end token alone.
    """

    config: Callable[[PreTrainedTokenizerBase, int], PretrainedConfig]
    processor: Callable[[int], Parts]
    chat: Chat | None
    end: str
    tokens: Mapping[str, str]
    more: tuple[str, ...] = ()
    first: bool = False
    stops: tuple[str, ...] = ()


def ids_of(tokenizer: PreTrainedTokenizerBase, **names: str) -> dict[str, int]:
    """The ids of tokens, by the names of a configuration's fields."""
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def text_config(tokenizer: PreTrainedTokenizerBase, **more: Any) -> dict[str, Any]:
    """A decoder's configuration."""
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    return {**TEXT, "vocab_size": len(tokenizer), **ends, "eos_token_id": tokenizer.eos_token_id, **more}


def tower_config(size: int, **more: Any) -> dict[str, Any]:
    """A vision tower's configuration, for images of so many pixels a side."""
    return {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": size, "patch_size": PATCH, **more,
    }  # fmt: skip
