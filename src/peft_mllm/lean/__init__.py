"""Lean blocks: a decoder's layers with half the saved activations, and nothing computed that nobody reads.

lean = install(base, anatomy, Levers(trim=False))    # on a model with a method in it
remove(base, anatomy)                                # off again

Exact: losses and gradients are those of the plain layers, to rounding.
"""

from peft_mllm.lean.layers import Lean, Levers, install, lean_of, remove

__all__ = ["Lean", "Levers", "install", "lean_of", "remove"]
