"""A process that tries pairs: a line of JSON in names one, lines out say how each probe of it went.

python -m peft_mllm.matrix.worker. A probe that hangs or takes the process with it loses its own pair only.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

READY = {"ready": True}


def main() -> None:
    """Serve until standard input ends."""
    # peft and its kin write to standard output; what we say goes to a copy that only we know
    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    import torch
    from transformers.utils import logging

    from peft_mllm.matrix.bench import sharpen
    from peft_mllm.matrix.candidates import candidates
    from peft_mllm.matrix.members import open_member

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    known, opened = candidates(), ""
    say.write(json.dumps(READY) + "\n")
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["member"] != opened:
            family, opened = sharpen(open_member(asked["member"])), asked["member"]
        for said in _tried(known[asked["candidate"]], family):
            say.write(json.dumps(said) + "\n")
        facts = {"family": type(family).__name__.lower(), "model_type": family.model.config.model_type}
        say.write(json.dumps({"done": facts}) + "\n")


def _tried(candidate: Any, family: Any) -> Iterator[dict[str, str]]:
    """One verdict for each probe; none after a first step that does not work."""
    from peft_mllm.matrix.bench import Bench
    from peft_mllm.matrix.probes import FIRST, PROBES, try_one

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(candidate, family, Path(folder))
        for name in PROBES:
            verdict = try_one(name, bench)
            yield {"probe": name, "state": verdict.state, "reason": verdict.reason}
            if name in FIRST and verdict.state != "ok":
                return


if __name__ == "__main__":
    main()
