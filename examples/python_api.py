"""Train, evaluate, and load the adapter with plain transformers and peft, all from Python.

python examples/python_api.py runs/python-api
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoProcessor, LlavaForConditionalGeneration

import peft_mllm
from peft_mllm.assets import EMBEDDED
from peft_mllm.scenes import Scene, Shape


def main(folder: Path) -> None:
    # 1. Train and evaluate one spec; the same call again gives the finished result at once.
    spec = {
        "model": "embedded",
        "method": {"name": "lora", "rank": 16, "alpha": 32, "dropout": 0},
        "task": {"name": "scenes_next", "size": {"train": 2048, "validation": 16, "test": 64}},
        "train": {"learning_rate": 3e-3, "max_steps": 64, "per_device_train_batch_size": 32},
        "output_dir": str(folder),
    }
    result = peft_mllm.train(spec, quiet=True)
    after = result["scores"]["scenes_next"]["values"]["accuracy"]

    # 2. Evaluate the base in the same way.
    asked = {"name": "scenes_next", "size": {"test": 64}}
    scores = peft_mllm.evaluate("embedded", [asked], quiet=True)
    before = scores["scenes_next"]["values"]["accuracy"]
    print(f"scenes_next: {before:.1f} % as it was, {after:.1f} % after {result['training']['steps']} steps")

    # 3. From here on nothing is ours: the adapter is a PEFT directory, the base a transformers directory.
    base = LlavaForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    processor = AutoProcessor.from_pretrained(EMBEDDED)

    picture = Scene((Shape(0, 0, "red", "circle"), Shape(0, 1, "blue", "cross"))).draw()
    question = "What is right of the top left?"
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(f"plain transformers and peft: {question} {answer}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"Say where the run goes: python {sys.argv[0]} FOLDER")
    main(Path(sys.argv[1]))
