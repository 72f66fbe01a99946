"""Randomness as a function of what it is for: no generator has a state that a checkpoint would have to save."""

from __future__ import annotations

import hashlib


def derive(*purpose: str | int) -> int:
    """A 63-bit seed from words and numbers: `derive(42, "dropout", step)`; equal on every machine."""
    text = "\x1f".join(map(str, purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
