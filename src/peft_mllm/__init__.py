"""PEFT-MLLM: which parameter-efficient fine-tuning method, placed where, for my multimodal model, data and budget?

    import peft_mllm
    result = peft_mllm.train("spec.yaml", "method=ia3", "output_dir=runs/ia3")
    scores = peft_mllm.evaluate("runs/ia3", ["scenes_count"])

Importing it also teaches peft our bottleneck adapter: `PeftModel.from_pretrained` then loads what we saved. And it
teaches transformers Qwen-VL: its Auto classes then load the published directory, without running code from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from peft_mllm.spec import Spec

__all__ = ["evaluate", "export", "train"]


def train(spec: str | Path | Mapping[str, Any] | Spec, *overrides: str, quiet: bool = False) -> dict[str, Any]:
    """Train and evaluate one spec; the same call again resumes, or returns the finished result.

    Args:
        spec: a YAML file, or the same as Python data.
        overrides: values as on the command line: "train.learning_rate=1e-4".
        quiet: show no progress.

    Returns:
        the content of result.json; predictions and adapter lie in the spec's output_dir.

    Raises:
        peft_mllm.errors.UserError: the message says what is wrong, where, and how to mend it.
    """
    from peft_mllm.run import run
    from peft_mllm.specfile import load_spec, parse_spec

    if isinstance(spec, (str, Path)):
        return run(load_spec(spec, overrides), quiet=quiet)
    return run(parse_spec(spec, overrides), quiet=quiet)


def evaluate(
    target: str | Path | Sequence[str | Path],
    tasks: Sequence[str | Mapping[str, Any]] = (),
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    output_dir: str | Path | None = None,
    limit: int | None = None,
    choices: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score runs, base models, or PEFT directories; those of one base with one load of it.

    Args:
        target: a run directory; a model (`embedded`, a directory, a hub id); a PEFT directory; or a list of such.
        tasks: names, or {"name": ..., option: ...}; a run's own tasks when left out.
        base: the base of a PEFT directory; what its adapter_config.json names when left out.
        vision_tower: of a base that comes without its own.
        output_dir: where predictions and scores are written, of several targets in a folder for each; nowhere when
            left out. The same call again goes on where the last was stopped.
        limit: score only the first questions of each task.
        choices: how multiple choice is answered: `generate`, `likelihood`, `likelihood_sum` or `likelihood_chars`;
            a run's own way when left out.
        quiet: show no progress.

    Returns:
        task name -> its scores, as in result.json; of a list, target -> that.

    Raises:
        peft_mllm.errors.UserError: the message says what is wrong, where, and how to mend it.
    """
    from peft_mllm.saved import evaluate_saved

    alone = isinstance(target, (str, Path))
    targets = [str(target)] if isinstance(target, (str, Path)) else [str(each) for each in target]
    scores = evaluate_saved(
        targets,
        tasks,
        base=base,
        vision_tower=vision_tower,
        output_dir=output_dir,
        limit=limit,
        choices=choices,
        quiet=quiet,
    )
    return scores[targets[0]] if alone else scores


def export(
    target: str | Path,
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    output_dir: str | Path | None = None,
    merge: bool = False,
    as_lora: int | None = None,
    check: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a finished run, or a PEFT directory, for use elsewhere: with a model card, and proven in a fresh process.

    Args:
        target: a run directory, or a PEFT directory.
        base: the base of a PEFT directory; what its adapter_config.json names when left out.
        vision_tower: of a base that comes without its own.
        output_dir: where it goes; below the run's own `export/` when left out.
        merge: write the base with the method merged in, as a directory of transformers.
        as_lora: write the nearest LoRA of this rank instead, and measure what is lost.
        check: with as_lora, also ask this many test questions of each of the run's tasks, before and after.
        quiet: show no progress.

    Returns:
        the directory, lines of Python that load it (run in the directory itself), and the content of seal.json.

    Raises:
        peft_mllm.errors.UserError: it is unfinished or damaged, has no effect, cannot be converted, or does not
            give the same logits in a fresh process. Nothing is written then.
    """
    from peft_mllm.exporting import export_saved

    return export_saved(
        str(target),
        base=base,
        vision_tower=vision_tower,
        output_dir=output_dir,
        merged=merge,
        as_lora=as_lora,
        check=check,
        quiet=quiet,
    )


@wrapt.when_imported("peft")
def _teach_peft(peft: ModuleType) -> None:
    """Register our tuner as soon as somebody imports peft; importing it here would take seconds."""
    import peft_mllm.methods.bottleneck  # noqa: F401


@wrapt.when_imported("transformers.models.auto.processing_auto")
@wrapt.when_imported("transformers.models.auto.image_processing_auto")
@wrapt.when_imported("transformers.models.auto.tokenization_auto")
@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _teach_transformers(auto: ModuleType) -> None:
    """Register Qwen-VL in each of transformers' tables as soon as it is loaded, and not before."""
    from peft_mllm.models.qwen_vl.auto import register

    register(auto)
