"""Speed against other trainers: each figure a ratio of two computations that were proven equal, in one process."""
