"""Ask, then score: generate an answer to every question of a split, and apply the task's metric."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from peft_mllm.data.encode import Sample
from peft_mllm.data.trees import collate_padded
from peft_mllm.errors import RESUME, Interrupted
from peft_mllm.metrics import METRICS, Scores
from peft_mllm.record import IMAGE_MARK, Record
from peft_mllm.seeds import derive
from peft_mllm.spec import GenerationSpec
from peft_mllm.tuned import Tuned
from peft_mllm.world import World


@dataclass(frozen=True)
class Evaluation:
    """A scored split.

    Attributes:
        metric: name on the metrics shelf.
        rule: the scoring rule in one line.
        scores: figures and per-question scores.
        predictions: the model's answers, in the order of the records.
        records: what was asked.
        seconds: of generating.
    """

    metric: str
    rule: str
    scores: Scores
    predictions: tuple[str, ...]
    records: Sequence[Record]
    seconds: float

    def lines(self) -> Iterator[dict[str, object]]:
        """One line for each question: id, question, prediction, reference, score, and what was understood."""
        parsed = self.scores.parsed or self.predictions
        for record, prediction, score, understood in zip(
            self.records, self.predictions, self.scores.per_question, parsed, strict=True
        ):
            yield {
                "id": record.id,
                "question": record.question[-1].text.replace(IMAGE_MARK, "").strip(),
                "prediction": prediction,
                "answer": record.answer,
                "score": score,
                "parsed": understood,
            }

    def summary(self) -> dict[str, object]:
        """The figures, for result.json."""
        return {
            "metric": self.metric,
            "rule": self.rule,
            "n": len(self.records),
            "unparsed": self.scores.unparsed,
            "values": dict(self.scores.values),
            "seconds": self.seconds,
        }


def evaluate(
    tuned: Tuned,
    records: Sequence[Record],
    *,
    metric: str,
    max_new_tokens: int,
    generation: GenerationSpec,
    batch_size: int,
    seed: int,
    world: World,
    report: Callable[[int], None] = lambda asked: None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Ask a model every question and score its answers.

    Args:
        tuned: the model.
        records: questions with their reference answers.
        metric: name on the metrics shelf.
        max_new_tokens: an answer is cut here, unless `generation` says otherwise.
        generation: greedy or sampled.
        batch_size: questions generated at once.
        seed: of sampling.
        world: the processes, which share the questions.
        report: called with the number of questions just answered.
        stop: polled between batches.

    Raises:
        Interrupted: somebody asked to stop.
    """
    tuned.model.eval()
    began = time.monotonic()
    samples = {i: tuned.family.encode(records[i], answer=False) for i in range(world.rank, len(records), world.size)}
    # prompts of like length together: the least padding
    mine = sorted(samples, key=lambda i: len(samples[i].ids))
    answers: list[tuple[int, str]] = []
    options = _options(tuned, generation, max_new_tokens)
    together = batch_size if tuned.takes_padding else 1
    # every process makes the same number of rounds, because each round asks all of them whether to stop
    rounds = math.ceil(math.ceil(len(records) / world.size) / together)
    for start in range(0, rounds * together, together):
        if world.any(stop()):
            raise Interrupted(f"Stopped while evaluating: {RESUME}")
        asked = mine[start : start + together]
        if not asked:
            continue
        torch.manual_seed(derive(seed, "generate", samples[asked[0]].id))
        answers += zip(asked, ask(tuned, [samples[i] for i in asked], options), strict=True)
        report(len(asked) * world.size)
    by_index: Mapping[int, str] = dict(world.gather(answers))
    predictions = tuple(by_index[i] for i in range(len(records)))
    rule = METRICS[metric]()
    return Evaluation(
        metric=metric,
        rule=rule.rule,
        scores=rule.score(predictions, records),
        predictions=predictions,
        records=records,
        seconds=time.monotonic() - began,
    )


def ask(tuned: Tuned, samples: Sequence[Sample], options: Mapping[str, object]) -> list[str]:
    """The model's answers to encoded prompts."""
    tokenizer = tuned.family.tokenizer
    pad = options["pad_token_id"]
    assert isinstance(pad, int)
    batch = collate_padded(samples, pixels=tuned.family.pixels, pad_id=pad, left=True).to(tuned.device)
    texts = tokenizer.batch_decode(tuned.generate(batch, **options), skip_special_tokens=True)
    return [text.strip() for text in texts]


def pad_token(tuned: Tuned) -> int:
    """The padding token's id; a tokenizer without one pads with its end token."""
    tokenizer = tuned.family.tokenizer
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _options(tuned: Tuned, generation: GenerationSpec, max_new_tokens: int) -> dict[str, object]:
    sampling = {"temperature": generation.temperature, "top_p": generation.top_p} if generation.do_sample else {}
    return {
        "do_sample": generation.do_sample,
        "num_beams": generation.num_beams,
        "max_new_tokens": generation.max_new_tokens or max_new_tokens,
        "eos_token_id": list(tuned.family.stops) or None,
        "pad_token_id": pad_token(tuned),
        **sampling,
    }
