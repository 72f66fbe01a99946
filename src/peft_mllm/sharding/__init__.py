"""A model larger than one device: its weights lie in pieces, one in each process.

Adapters are small, so they stay whole, and their gradients are added by the loop as ever: checkpoints, optimizer and
saving know nothing of this. What is cut is the base.
"""

from peft_mllm.sharding.choice import asked_for, shards_of
from peft_mllm.sharding.shards import Shards, whole_for

__all__ = ["Shards", "asked_for", "shards_of", "whole_for"]
