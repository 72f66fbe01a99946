"""Two runs side by side: what one gets right and the other wrong, with images, and whether that is more than chance.

    comparison = compare_runs(Path("runs/lora"), Path("runs/ia3"))

Reads files, imports no torch. The questions must be the same: ids, words, images, choices and references.
"""

from peft_mllm.versus.page import write_page
from peft_mllm.versus.pairs import Comparison, Contest, compare_runs
from peft_mllm.versus.table import terminal_table

__all__ = ["Comparison", "Contest", "compare_runs", "terminal_table", "write_page"]
