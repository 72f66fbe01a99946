"""Vision once per image: what a frozen tower makes of an image is kept, in memory and on disk, and shared by runs.

sight = watch(family, bf16=False, store=Store(directory, limit=64 << 30))
... train and evaluate as ever: family.pixels and the model look the features up ...
sight.to_json()                        # {"hits": ..., "misses": ..., ...}
"""

from __future__ import annotations

from peft_mllm.features.held import Held
from peft_mllm.features.sight import Sight, watch
from peft_mllm.features.store import Store

__all__ = ["Held", "Sight", "Store", "watch"]
