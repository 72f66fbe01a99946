"""Lean blocks: a decoder's layers with half the saved activations, and nothing computed that nobody reads.

lean = install(base, anatomy, Levers(trim=False))    # on a model with a method in it
remove(base, anatomy)                                # off again

Exact: losses and gradients are those of the plain layers, to rounding.
"""

from peft_mllm.lean.form import Parts, joined
from peft_mllm.lean.generator import generator_state
from peft_mllm.lean.layers import Lean, Levers, install, layers_of, lean_of, parts_of, put_on, read_all, remove
from peft_mllm.lean.rows import Rows

__all__ = [
    "Lean",
    "Levers",
    "Parts",
    "Rows",
    "generator_state",
    "install",
    "joined",
    "layers_of",
    "lean_of",
    "parts_of",
    "put_on",
    "read_all",
    "remove",
]
