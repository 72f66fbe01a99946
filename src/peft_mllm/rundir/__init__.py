"""The run directory: the only truth about a run. It has one writer, and survives a kill at any moment.

    spec.json       the resolved spec, written once: a directory belongs to one spec
    status.json     state, exit code, message and step, and who wrote it
    metrics.jsonl   one line per logged step
    checkpoints/    step-00000100/ ..., each with a MANIFEST.json
    adapter/        the final PEFT directory, with a MANIFEST.json
    predictions/    JSON lines, one file per task
    result.json     sealed with its own sha256: a run is done when it verifies
    lock            held and renewed by the writer, and says who that is

    with RunDir.open(path, spec) as run:                       # creates, or resumes the same spec
        checkpoint = run.latest_checkpoint()                   # the newest that verifies
        run.rewind_log(checkpoint.step if checkpoint else 0)
        run.commit(checkpoint_name(100), save)                 # save(directory) writes the files
        run.rotate(keep=2)
        run.write_result(figures)

Whoever only reads needs no lock: `RunDir(path).result()`.
"""

from peft_mllm.rundir.claim import START_AGAIN
from peft_mllm.rundir.commits import verify
from peft_mllm.rundir.directory import ADAPTER, PREDICTIONS, Checkpoint, RunDir, State, checkpoint_name
from peft_mllm.rundir.lock import InUse

__all__ = [
    "ADAPTER",
    "PREDICTIONS",
    "START_AGAIN",
    "Checkpoint",
    "InUse",
    "RunDir",
    "State",
    "checkpoint_name",
    "verify",
]
