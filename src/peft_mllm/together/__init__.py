"""Several runs on one frozen base in one process: loaded once, its images seen once, its products computed for all.

for outcome in run_together(specs):        # a result each, or why there is none
    ...

Methods, seeds and learning rates may differ. Each run has its own directory, checkpoints and result, which are those
of the same run alone: on one CPU thread bit for bit, elsewhere to rounding.
"""

from peft_mllm.together.runs import outcomes_of, run_together, why_not_together

__all__ = ["outcomes_of", "run_together", "why_not_together"]
