"""What somebody does with a converted model who has never heard of us: transformers alone.

python plain.py DIRECTORIES

Each directory has `asked.json` (texts or messages, and images) beside its `model`, and gets `answered.safetensors`.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor


def answer(directory: Path) -> None:
    """Inputs, logits and a short answer for each question."""
    processor = AutoProcessor.from_pretrained(directory / "model", backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(directory / "model", dtype=torch.float32)
    answers = {}
    for name, asked in json.loads((directory / "asked.json").read_text()).items():
        images = [Image.open(path).convert("RGB") for path in asked["images"]]
        text = asked.get("text") or processor.apply_chat_template(asked["messages"], add_generation_prompt=True)
        inputs = processor(images=images or None, text=text, return_tensors="pt")
        with torch.no_grad():
            answers |= {f"{name}.{key}": value for key, value in inputs.items()}
            answers[f"{name}.logits"] = model(**inputs).logits
            answers[f"{name}.generated"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    save_file({key: value.contiguous() for key, value in answers.items()}, directory / "answered.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[1:]:
        answer(Path(each))
    assert "peft_mllm" not in sys.modules
