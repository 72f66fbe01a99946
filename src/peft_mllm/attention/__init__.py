"""The attention of decoders: a port in front of their backends, for packed trees and for learned keys and values."""

from peft_mllm.attention.learned import (
    LearnedOfSeveral,
    connect_prefix,
    disconnect_prefix,
    prefix_off,
    uses_prefix_port,
)
from peft_mllm.attention.masks import PADDING, PREFIX, TREE_BACKENDS, additive, tree_mask
from peft_mllm.attention.packing import Joined, Packing
from peft_mllm.attention.port import PORT, Port, backend_of, close_port, longest_path, open_port, port_of

__all__ = [
    "PADDING",
    "PORT",
    "PREFIX",
    "TREE_BACKENDS",
    "Joined",
    "LearnedOfSeveral",
    "Packing",
    "Port",
    "additive",
    "backend_of",
    "close_port",
    "connect_prefix",
    "disconnect_prefix",
    "longest_path",
    "open_port",
    "port_of",
    "prefix_off",
    "tree_mask",
    "uses_prefix_port",
]
