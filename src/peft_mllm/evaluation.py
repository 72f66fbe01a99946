"""Ask, then score: get an answer to every question of a split, and apply the task's metric.

Answers are generated, greedy ones for all questions of an image together (decoding.py); multiple choice can be answered
by likelihood instead (choices.py). Each is on the disk as soon as its batch is done (answers.py), so the same command
goes on where it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peft_mllm.answers import Answer, AnswerFile, question_key
from peft_mllm.choices import RULES, choices_of, choose
from peft_mllm.data.encode import Sample
from peft_mllm.data.trees import collate_padded
from peft_mllm.decoding import Decoder
from peft_mllm.errors import RESUME, Interrupted
from peft_mllm.exactness import doubt
from peft_mllm.metrics import Scores, metric_named
from peft_mllm.prompts import Prompt, prompt_of, together
from peft_mllm.proof import Proof
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
        answering: how the answers were got, in one line.
        conditions: what decided them beside the questions: model, decoding.
        scores: figures and per-question scores.
        answers: the model's, in the order of the records.
        keys: the hash of each question under the conditions.
        prompts: what the model read.
        records: what was asked.
        proofs: what quicker ways to answer were held against the plain one, by name, on this model so far.
        resumed: how many answers were on the disk before.
        seconds: of asking the others.
    """

    metric: str
    rule: str
    answering: str
    conditions: Mapping[str, Any]
    scores: Scores
    answers: tuple[Answer, ...]
    keys: tuple[str, ...]
    prompts: Sequence[Prompt]
    records: Sequence[Record]
    proofs: Mapping[str, Proof]
    resumed: int
    seconds: float

    @property
    def predictions(self) -> tuple[str, ...]:
        """The texts of the answers."""
        return tuple(answer.text for answer in self.answers)

    def lines(self) -> Iterator[dict[str, object]]:
        """One line for each question: what was asked and answered, its score, and the hashes that prove it."""
        parsed = self.scores.parsed or self.predictions
        for i, (record, answer, prompt) in enumerate(zip(self.records, self.answers, self.prompts, strict=True)):
            line = {
                "id": record.id,
                "question": record.question[-1].text.replace(IMAGE_MARK, "").strip(),
                "prediction": answer.text,
                "answer": record.answer,
                "score": self.scores.per_question[i],
                "parsed": parsed[i],
                **answer.fields(),
                "prompt": prompt.text,
                "prompt_sha256": prompt.sha256,
                "question_sha256": prompt.question_sha256,
                "images": list(prompt.images),
                "asked": self.keys[i],
            }
            yield line | ({"details": dict(self.scores.details[i])} if self.scores.details else {})

    def summary(self) -> dict[str, object]:
        """The figures, for result.json."""
        return {
            "metric": self.metric,
            "rule": self.rule,
            "answering": self.answering,
            "n": len(self.records),
            "unparsed": self.scores.unparsed,
            "values": dict(self.scores.values),
            "prompt_tokens": sum(prompt.length for prompt in self.prompts),
            "new_tokens": sum(answer.tokens for answer in self.answers),
            "conditions": dict(self.conditions),
            "proofs": {name: asdict(proof) | {"passed": proof.passed} for name, proof in self.proofs.items()},
            "resumed": self.resumed,
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
    identity: str = "",
    path: Path | None = None,
    report: Callable[[int], None] = lambda asked: None,
    note: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Ask a model every question and score its answers.

    Args:
        tuned: the model.
        records: questions with their reference answers.
        metric: name on the metrics shelf, perhaps with a variant: `vqa:vizwiz`.
        max_new_tokens: an answer is cut here, unless `generation` says otherwise.
        generation: greedy or sampled; multiple choice maybe by likelihood.
        batch_size: questions asked at once.
        seed: of sampling.
        world: the processes, which share the questions.
        identity: a fingerprint of the model with its adapter.
        path: where answers are kept as they come, and those of an earlier call are found.
        report: called with the number of questions just answered.
        note: told, once for a model, why a quicker way to answer is not used.
        stop: polled between batches.

    Raises:
        Interrupted: somebody asked to stop.
    """
    tuned.model.eval()
    began = time.monotonic()
    asker = Asker(tuned, records, options(tuned, generation, max_new_tokens), generation.choices, seed)
    prompts = asker.prompts(world)
    conditions = asker.conditions(identity, generation)
    keys = [question_key(conditions, r.id, p.sha256) for r, p in zip(records, prompts, strict=True)]
    batches = together(prompts, batch_size if tuned.takes_padding or asker.by_choice else 1)
    file = AnswerFile(path if world.is_main else None)
    known = world.share(file.recall())
    # a batch is asked as a whole: with sampling, its answers belong together
    missing = [batch for batch in batches if any(keys[i] not in known for i in batch)]
    again = {i for batch in missing for i in batch}
    answers = {i: known[key] for i, key in enumerate(keys) if i not in again}
    resumed = len(answers)
    report(resumed)
    if missing:
        file.begin({keys[i]: answer for i, answer in answers.items()})
    proven = dict(tuned.proofs)
    # every process makes the same number of rounds, because after each all of them share their answers
    for start in range(0, len(missing), world.size):
        if world.any(stop()):
            raise Interrupted(f"Stopped while evaluating: {RESUME}")
        mine = missing[start + world.rank] if start + world.rank < len(missing) else []
        with tuned.in_step():
            asked = list(zip(mine, asker.ask(mine, batch_size), strict=True))
        told = world.gather([(asked, dict(tuned.proofs))])
        new = [each for some, _ in told for each in some]
        _agree(tuned, [proofs for _, proofs in told], before=proven, note=note)
        file.append([(keys[i], answer) for i, answer in new])
        answers |= dict(new)
        report(len(new))
    said = tuple(answers[i] for i in range(len(records)))
    rule = metric_named(metric)
    return Evaluation(
        metric=metric,
        rule=rule.rule,
        answering=asker.in_words(said),
        conditions=conditions,
        scores=rule.score([answer.text for answer in said], records),
        answers=said,
        keys=tuple(keys),
        prompts=prompts,
        records=records,
        proofs=dict(tuned.proofs),
        resumed=resumed,
        seconds=time.monotonic() - began,
    )


def _agree(
    tuned: Tuned, told: Sequence[Mapping[str, Proof]], *, before: dict[str, Proof], note: Callable[[str], None]
) -> None:
    """Let all processes hold the proofs of all, those that failed before others; what is new of these is noted."""
    for name, proof in ((name, proof) for proofs in told for name, proof in proofs.items()):
        if name in before and (proof.passed or not before[name].passed):
            continue
        tuned.proofs[name] = before[name] = proof
        if not proof.passed:
            note(doubt(name, proof))


class Asker:
    """One model's way to answer some questions."""

    def __init__(
        self, tuned: Tuned, records: Sequence[Record], told: Mapping[str, object], choices: str, seed: int
    ) -> None:
        self.tuned, self.records, self.told, self.choices, self.seed = tuned, records, told, choices, seed
        self.by_choice = choices in RULES and all(choices_of(record) for record in records)
        self._decoder = Decoder(tuned, told)
        self._samples: dict[int, Sample] = {}

    def prompts(self, world: World) -> list[Prompt]:
        """All prompts; each process encodes its share."""
        found = []
        for i in range(world.rank, len(self.records), world.size):
            self._samples[i] = sample = self.tuned.family.encode(self.records[i], answer=False)
            found.append((i, prompt_of(self.records[i], sample, self.tuned.family.tokenizer)))
        return [prompt for _, prompt in sorted(world.gather(found), key=lambda each: each[0])]

    def conditions(self, identity: str, generation: GenerationSpec) -> dict[str, Any]:
        """Everything beside a question that decides its answer."""
        decided: dict[str, Any] = {"model": identity, "bf16": self.tuned.bf16, "choices": self.choices, **self.told}
        if generation.do_sample:  # what is drawn depends on which questions are asked together
            decided |= {"seed": self.seed, "questions": len(self.records)}
        return decided

    def ask(self, indices: Sequence[int], rows: int) -> list[Answer]:
        """The answers to some questions, in their order."""
        offered = [i for i in indices if self.choices in RULES and choices_of(self.records[i])]
        answers: dict[int, Answer] = {}
        if offered:
            chosen = [self.records[i] for i in offered]
            pad_id = pad_token(self.tuned)
            answers |= zip(offered, choose(self.tuned, chosen, self.choices, rows=rows, pad_id=pad_id), strict=True)
        spoken = [i for i in indices if i not in answers]
        step = len(spoken) if self.tuned.takes_padding else 1
        for start in range(0, len(spoken), step or 1):
            answers |= self._generated(spoken[start : start + step])
        return [answers[i] for i in indices]

    def _generated(self, indices: Sequence[int]) -> dict[int, Answer]:
        torch.manual_seed(derive(self.seed, "generate", self.records[indices[0]].id))
        samples = [self._sample(i) for i in indices]
        return dict(zip(indices, ask(self.tuned, samples, self.told, decoder=self._decoder), strict=True))

    def _sample(self, i: int) -> Sample:
        """The prompt; encoded anew where another process made it, and let go once asked."""
        return self._samples.pop(i, None) or self.tuned.family.encode(self.records[i], answer=False)

    def in_words(self, answers: Sequence[Answer]) -> str:
        """How the answers were got."""
        beams = f", {self.told['num_beams']} beams" if self.told["num_beams"] != 1 else ""
        spoken = f"generated, {'sampled' if self.told['do_sample'] else 'greedy'}{beams}"
        chosen = sum(answer.stop == "choice" for answer in answers)
        if not chosen:
            return spoken
        rule = f"by likelihood: {RULES[self.choices]}"
        return rule if chosen == len(answers) else f"{chosen} {rule}; the other {len(answers) - chosen} {spoken}"


def ask(
    tuned: Tuned, samples: Sequence[Sample], told: Mapping[str, object], *, decoder: Decoder | None = None
) -> list[Answer]:
    """The model's answers to encoded prompts.

    Args:
        tuned: the model.
        samples: the prompts.
        told: options of transformers' generate, which is asked where the decoder cannot.
        decoder: of the same model, made with the same options.
    """
    said = decoder.answer(samples) if decoder and decoder.takes(samples) else _generate(tuned, samples, told)
    texts = tuned.family.tokenizer.batch_decode(said, skip_special_tokens=True)
    ends = told.get("eos_token_id") or ()
    stops = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return [_answer(text, ids, stops) for text, ids in zip(texts, said, strict=True)]


def _generate(tuned: Tuned, samples: Sequence[Sample], told: Mapping[str, object]) -> list[list[int]]:
    """What transformers' generate says to prompts, padded to the longest."""
    pad = told["pad_token_id"]
    assert isinstance(pad, int)
    batch = collate_padded(samples, pixels=tuned.family.pixels, pad_id=pad, left=True).to(tuned.device)
    said: list[list[int]] = tuned.generate(batch, **told).tolist()
    return said


def _answer(text: str, ids: Sequence[int], stops: set[object]) -> Answer:
    """New tokens as an answer; what comes after the first end mark is padding."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    return Answer(text.strip(), len(ids) if end is None else end, "length" if end is None else "end")


def pad_token(tuned: Tuned) -> int:
    """The padding token's id; a tokenizer without one pads with its end token."""
    tokenizer = tuned.family.tokenizer
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def options(tuned: Tuned, generation: GenerationSpec, max_new_tokens: int) -> dict[str, object]:
    """What transformers' generate is told."""
    sampling = {"temperature": generation.temperature, "top_p": generation.top_p} if generation.do_sample else {}
    return {
        "do_sample": generation.do_sample,
        "num_beams": generation.num_beams,
        "max_new_tokens": generation.max_new_tokens or max_new_tokens,
        "eos_token_id": list(tuned.family.stops) or None,
        "pad_token_id": pad_token(tuned),
        **sampling,
    }
