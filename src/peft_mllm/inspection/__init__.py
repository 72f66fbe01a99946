"""What a model is made of, and what each method would train of it: facts, and the page that shows them."""

from peft_mllm.inspection.facts import Facts, inspect_model

__all__ = ["Facts", "inspect_model"]
