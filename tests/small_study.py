"""A study as its file would say it, of real tasks and methods, for tests that plan and run it."""

from __future__ import annotations

from typing import Any

from peft_mllm.study.outcomes import FULL

SIZE = {"train": 64, "validation": 16, "test": 16}
FAIR: dict[str, Any] = {
    "title": "t",
    "fixed": {"model": "embedded", "train": {"num_train_epochs": 1, "per_device_eval_batch_size": 8}},
    "axes": {
        "method": {"lora": {"rank": 4}, "ia3": None},
        "connector": ["frozen", "tuned"],
        "task": {"next": {"name": "scenes_next", "size": SIZE}, "row": {"name": "scenes_row", "size": SIZE}},
        "seed": [1, 2, 3],
    },
    "search": {
        "seed": 7,
        "on": {"task": "next"},
        "trials": {
            "lora": {"learning_rate": [1e-3, 1e-2]},
            "ia3": {"learning_rate": [1e-2, 1e-1]},
            FULL: {"learning_rate": [1e-4, 1e-3]},
        },
    },
    "output_dir": "runs/t",
}
