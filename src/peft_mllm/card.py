"""The card of an adapter: what it is, and the lines that load it."""

from __future__ import annotations

from peft import PeftConfig

from peft_mllm.methods.bottleneck import NAME as BOTTLENECK

CARD = """---
base_model: {base}
library_name: peft
tags:
- {kind}
---
# A {kind} adapter for {base}

Made with PEFT-MLLM. To load it:

```python
{imports}from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained({source})
model = PeftModel.from_pretrained(base, "this directory")
```

How it was trained, on what, and how it scored is in the run's `result.json`.
"""


def adapter_card(config: PeftConfig) -> str:
    """The text of an adapter directory's README.md."""
    base = str(config.base_model_name_or_path)
    kind = config.peft_type.value
    imports = ["import peft_mllm  # teaches peft this kind of adapter\n"] if kind == BOTTLENECK else []
    if base == "embedded":
        imports.append("from peft_mllm.assets import EMBEDDED\n")
    source = "EMBEDDED" if base == "embedded" else f'"{base}"'
    return CARD.format(base=base, kind=kind, imports="".join(imports), source=source)
