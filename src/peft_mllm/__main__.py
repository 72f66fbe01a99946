"""`python -m peft_mllm`, and `accelerate launch --multi_gpu -m peft_mllm train spec.yaml`."""

from peft_mllm.cli import main

main()
