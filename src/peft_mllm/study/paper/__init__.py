"""Against the paper: its tables cell by cell beside ours, and its claims tested on our runs.

Zhou et al. 2024 (arXiv 2406.05130). What it says, and where its own figures disagree with it, is in docs/paper.md.
"""

from peft_mllm.study.paper.claims import claims_of
from peft_mllm.study.paper.tables import paper_cells, paper_notes

__all__ = ["claims_of", "paper_cells", "paper_notes"]
