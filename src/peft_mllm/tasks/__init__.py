"""SHELF of tasks: one file per data set. To add one, see docs/add-a-task.md."""

from peft_mllm.shelf import Item, Shelf
from peft_mllm.tasks.base import SPLITS, Prompt, Split, Task, TaskOptions

TASKS: Shelf[Task] = Shelf("task", package=__name__, items={
    "scenes_caption": Item("scenes:Caption", "generated scenes: list all shapes (seen by the embedded base)"),
    "scenes_at": Item("scenes:At", "generated scenes: what is in a cell (seen)"),
    "scenes_colour": Item("scenes:Colour", "generated scenes: the colour in a cell (seen)"),
    "scenes_exists": Item("scenes:Exists", "generated scenes: is there a shape in a cell (seen)"),
    "scenes_count": Item("scenes:Count", "generated scenes: how many shapes, in all or in a row (seen)"),
    "scenes_shape": Item("scenes:Shape", "generated scenes: the form in a cell (new to the embedded base)"),
    "scenes_nothing": Item("scenes:Nothing", "generated scenes: is there nothing in a cell (new)"),
    "scenes_blank": Item("scenes:Blank", "generated scenes: complete a sentence (new)"),
    "scenes_empty": Item("scenes:Empty", "generated scenes: is a cell empty (new)"),
    "scenes_row": Item("scenes:Row", "generated scenes: list one row (new)"),
    "scenes_column": Item("scenes:Column", "generated scenes: how many shapes in a column (new)"),
    "scenes_next": Item("scenes:Next", "generated scenes: what is beside a cell (new)"),
    "scenes_choose": Item("scenes:Choose", "generated scenes: choose the true text (new)"),
    "scenes_compare": Item("scenes:Compare", "generated scenes: compare the counts of two rows (new)"),
    "scenes_describe": Item("scenes:Describe", "generated scenes: the caption, scored for hallucination (seen)"),
    "scienceqa": Item("scienceqa:ScienceQA", "ScienceQA: multiple-choice school science, half with images"),
    "iconqa_txt": Item("iconqa:IconQATxt", "IconQA choose_txt: diagrams, choose a text"),
    "iconqa_blank": Item("iconqa:IconQABlank", "IconQA fill_in_blank: diagrams, answer with a string"),
    "vizwiz": Item("vizwiz:VizWiz", "VizWiz-VQA: photos and questions of blind people"),
    "flickr30k": Item("flickr30k:Flickr30k", "Flickr30k: describe a photo in a sentence"),
    "okvqa": Item("okvqa:OKVQA", "OK-VQA: questions that need outside knowledge"),
    "ocrvqa": Item("ocrvqa:OCRVQA", "OCR-VQA: questions about book covers"),
    "vqav2": Item("vqav2:VQAv2", "VQAv2: open questions about photos, ten answers each"),
    "textvqa": Item("textvqa:TextVQA", "TextVQA: questions about text in photos (beyond the study)"),
    "gqa": Item("gqa:GQA", "GQA: compositional questions about photos (beyond the study)"),
    "pope": Item("pope:POPE", "POPE: is an object in the photo (hallucination; beyond the study)"),
    "custom": Item("custom:Custom", "your own data: LLaVA JSON or messages JSONL, with your images"),
})  # fmt: skip

__all__ = ["SPLITS", "TASKS", "Item", "Prompt", "Split", "Task", "TaskOptions"]
