"""Out again: a run as a PEFT directory, a merged model or a LoRA approximation, proven before it appears.

source.py    what is exported, and that it is whole
probe.py     fixed questions with painted images, and what a model answers to them
convert.py   merging, and the nearest LoRA
seal.py      the proof: the directory, loaded in a fresh process (reload.py), answers as this one did
export.py    the stages in their order
"""

from peft_mllm.exporting.export import export_saved

__all__ = ["export_saved"]
