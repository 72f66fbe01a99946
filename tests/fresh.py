"""What somebody else does with a saved adapter, in a process of its own: transformers, peft, nothing of ours.

python fresh.py DIRECTORY [ours-first]

DIRECTORY has `base/`, `saved/NAME/` and `asked.pt` (inputs, and each name's logits in training). Prints each
name's largest difference as JSON. Our package is imported only when peft does not know an adapter's type.
"""

import json
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
ROOT = Path(sys.argv[1])
if "ours-first" in sys.argv:
    import peft_mllm

import peft  # noqa: E402 - after ours, where ours comes first
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402


def known(directory: Path) -> bool:
    """Whether plain peft knows the adapter's type; a whole model has none."""
    config = directory / "adapter_config.json"
    return not config.exists() or json.loads(config.read_text())["peft_type"] in peft.PeftType.__members__


def logits(directory: Path, inputs: dict) -> torch.Tensor:
    """Of a PEFT directory on the base, or of a whole model."""
    if not (directory / "adapter_config.json").exists():
        return AutoModelForImageTextToText.from_pretrained(directory)(**inputs).logits
    base = AutoModelForImageTextToText.from_pretrained(ROOT / "base")
    return PeftModel.from_pretrained(base, directory)(**inputs).logits


asked = torch.load(ROOT / "asked.pt", weights_only=True)
directories = list((ROOT / "saved").iterdir())
plain = [directory for directory in directories if known(directory)]
ours = [directory for directory in directories if not known(directory)]
differences = {}
with torch.no_grad():
    for directory in plain + ours:
        if directory in ours:
            import peft_mllm  # noqa: F401
        elif "ours-first" not in sys.argv:
            assert "peft_mllm" not in sys.modules
        expected = asked["logits"][directory.name]
        answer = logits(directory, asked["inputs"])[:, -expected.shape[1] :]  # virtual tokens stand in front
        differences[directory.name] = (answer - expected).abs().max().item()
sys.stdout.write(json.dumps(differences) + "\n")
