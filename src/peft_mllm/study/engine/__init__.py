"""Runs of a study, done by whatever machines there are: a pool of processes here, or Ray on several.

    def jobs():                                              # what has no verified result, asked again and again
        return [Job(id, title, directory, spec), ...]

    conduct(jobs, Pool(), attempts_dir=study / "attempts", expected=96, view=view_for(console))

Files hold the truth. Whatever is killed, the same call goes on from there. Imports no torch: the driver needs none.
"""

from peft_mllm.study.attempts import Attempt, Attempts
from peft_mllm.study.engine.bundles import Bundles
from peft_mllm.study.engine.conductor import Conducted, conduct
from peft_mllm.study.engine.jobs import Ending, Engine, EngineError, Job
from peft_mllm.study.engine.live import LineView, LiveView, QuietView, View, view_for
from peft_mllm.study.engine.on_ray import RayCluster
from peft_mllm.study.engine.pool import Pool
from peft_mllm.study.engine.standing import Standing, status_of

__all__ = [
    "Attempt",
    "Attempts",
    "Bundles",
    "Conducted",
    "Ending",
    "Engine",
    "EngineError",
    "Job",
    "LineView",
    "LiveView",
    "Pool",
    "QuietView",
    "RayCluster",
    "Standing",
    "View",
    "conduct",
    "status_of",
    "view_for",
]
