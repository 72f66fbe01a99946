"""SHELF of tasks: one file per data set. To add one, see docs/add-a-task.md."""

from peft_mllm.shelf import Item, Shelf
from peft_mllm.tasks.base import SPLITS, Split, Task, TaskOptions

TASKS: Shelf[Task] = Shelf("task", package=__name__, items={
    "scenes_caption": Item("scenes:Caption", "generated scenes: list the shapes in reading order (seen by the embedded base)"),
    "scenes_at": Item("scenes:At", "generated scenes: what is in a cell (seen)"),
    "scenes_where": Item("scenes:Where", "generated scenes: the cell of a shape (seen)"),
    "scenes_count": Item("scenes:Count", "generated scenes: how many (seen)"),
    "scenes_exists": Item("scenes:Exists", "generated scenes: is it there (seen)"),
    "scenes_colour": Item("scenes:Colour", "generated scenes: the colour of a form (seen)"),
    "scenes_blank": Item("scenes:Blank", "generated scenes: complete a sentence (new to the embedded base)"),
    "scenes_missing": Item("scenes:Missing", "generated scenes: is it absent (new)"),
    "scenes_row": Item("scenes:Row", "generated scenes: list one row (new)"),
    "scenes_choose": Item("scenes:Choose", "generated scenes: choose the true text (new)"),
    "scenes_next": Item("scenes:Next", "generated scenes: what is beside a shape (new)"),
    "scenes_relative": Item("scenes:Relative", "generated scenes: compare two places (new)"),
    "scenes_compare": Item("scenes:Compare", "generated scenes: compare two counts (new)"),
    "scienceqa": Item("scienceqa:ScienceQA", "ScienceQA: multiple-choice school science, half with images"),
    "iconqa_txt": Item("iconqa:IconQATxt", "IconQA choose_txt: diagrams, choose a text"),
    "iconqa_blank": Item("iconqa:IconQABlank", "IconQA fill_in_blank: diagrams, answer with a string"),
    "custom": Item("custom:Custom", "your own data: LLaVA JSON or messages JSONL, with your images"),
})  # fmt: skip

__all__ = ["SPLITS", "TASKS", "Item", "Split", "Task", "TaskOptions"]
