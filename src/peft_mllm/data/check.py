"""Reading a whole file of records before a GPU does, and reporting all findings at once.

    file = RecordFile("train.jsonl")
    report = check(file)
    report.summary()    # read 10 = used 8 + quarantined 2 (image-missing 1, empty-answer 1)

A record with an error is quarantined: left out, counted, never replaced by another. A warning keeps it in.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from peft_mllm.data.balance import Answers
from peft_mllm.data.formats import Source
from peft_mllm.data.leakage import Against
from peft_mllm.data.looking import Images
from peft_mllm.data.parse import Parsed
from peft_mllm.data.problems import KINDS, BadDataError, Problem, Severity, problem, shown
from peft_mllm.data.specials import Specials
from peft_mllm.errors import DataError
from peft_mllm.record import Record

BATCH = 256
"""Records parsed before their images are looked at: enough to keep several workers busy."""

LISTED = 20
"""Findings in the message of an error; a report has them all."""


@dataclass(frozen=True)
class Length:
    """How long a record is for a model, in tokens.

    Attributes:
        total: the whole sample, image tokens included.
        answer: those that are learnt; 0 would be a sample without effect.
        limit: how many fit.
    """

    total: int
    answer: int
    limit: int


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with its place.

    Attributes:
        file: as the user wrote it.
        line: from 1.
        record: number from 1; None where the file as a whole is meant.
        id: the record's.
        code: a key of `problems.KINDS`.
    """

    file: str
    line: int
    record: int | None
    id: str | None
    code: str
    severity: Severity
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{shown(self.file)}:{self.line}: {self.severity} {self.code}: {self.reason}. {self.remedy}"


@dataclass(frozen=True)
class Report:
    """What checking a file found.

    Attributes:
        file: as the user wrote it.
        read: records in the file.
        bad: the numbers, from 0, of those that are not used; ascending.
        findings: in the order of the file.
        images: sha256 of each distinct image that can be used, by resolved path; see `Source.seal`.
        conversions: how many images became RGB in which way: `grey`, `alpha`, `cmyk`, `palette` ...
    """

    file: str
    read: int
    bad: tuple[int, ...]
    findings: tuple[Finding, ...]
    images: Mapping[str, str]
    conversions: Mapping[str, int]

    @property
    def quarantined(self) -> int:
        """Records with at least one error; all of them, where the file as a whole has one."""
        return len(self.bad)

    @property
    def used(self) -> int:
        """The records that are left."""
        return self.read - self.quarantined

    @property
    def ok(self) -> bool:
        """Nothing was found that keeps a record out; warnings do not count."""
        return all(finding.severity == "warning" for finding in self.findings)

    @property
    def broken(self) -> bool:
        """The file as a whole has an error, so that no part of it can be used."""
        return any(finding.record is None and finding.severity == "error" for finding in self.findings)

    @property
    def counts(self) -> Mapping[str, int]:
        """Findings by code, in the order of the table of codes."""
        found = Counter(finding.code for finding in self.findings)
        return {code: found[code] for code in KINDS if code in found}

    def good(self) -> Iterator[int]:
        """The numbers, from 0, of the records that are used."""
        bad = set(self.bad)
        return (number for number in range(self.read) if number not in bad)

    def summary(self) -> str:
        """The reconciliation, in one line."""
        line = f"read {self.read:,} = used {self.used:,} + quarantined {self.quarantined:,}"
        errors, warnings = self._counted("error"), self._counted("warning")
        return line + (f" ({errors})" if errors else "") + (f"; warnings: {warnings}" if warnings else "")

    def __str__(self) -> str:
        return self.summary()

    def to_json(self, *, findings: bool = True) -> dict[str, Any]:
        """As a JSON object; without the list of findings it stays small, whatever was found."""
        value = {
            "file": self.file,
            "read": self.read,
            "used": self.used,
            "quarantined": self.quarantined,
            "counts": dict(self.counts),
            "images": len(self.images),
            "conversions": dict(self.conversions),
            "summary": self.summary(),
        }
        return value | ({"findings": [asdict(finding) for finding in self.findings]} if findings else {})

    def error(self, *, limit: int = LISTED, advice: str = "") -> DataError:
        """All errors as one exception, to be raised; its message lists the first of them, then the advice."""
        errors = [str(finding) for finding in self.findings if finding.severity == "error"]
        lines = [f"{shown(self.file)} has bad data: {self.summary()}", *errors[:limit]]
        if len(errors) > limit:
            lines.append(f"and {len(errors) - limit:,} more; `peft-mllm data check {self.file}` lists all.")
        return DataError("\n".join([*lines, advice] if advice else lines))

    def _counted(self, severity: Severity) -> str:
        counts = ((code, n) for code, n in self.counts.items() if KINDS[code].severity == severity)
        return ", ".join(f"{code} {n:,}" for code, n in counts)


def check(
    file: Source,
    *,
    measure: Callable[[Record], Length] | None = None,
    specials: Specials | None = None,
    against: Against | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> Report:
    """Read every record and decode every distinct image of a file once.

    Args:
        file: the records.
        measure: a record's length for the model in hand; without it, lengths are not checked.
        specials: that model's special tokens; without them, what often is one is reported.
        against: another file, with which this one is to have nothing in common.
        progress: called with the number of records done and of all.
        workers: processes that decode images. Threads would not help: Pillow holds Python's lock. More than
            one starts fresh interpreters, so the caller's script needs its `if __name__ == "__main__"`.

    Raises:
        BadDataError: the file changes while it is read.
    """
    with ExitStack() as stack:
        checker = _Checker(file, measure, specials, against, Images(_pool(workers, stack)))
        for start in range(0, len(file), BATCH):
            checker.batch(range(start, min(start + BATCH, len(file))))
            if progress is not None:
                progress(min(start + BATCH, len(file)), len(file))
    return checker.report()


def _pool(workers: int, stack: ExitStack) -> ProcessPoolExecutor | None:
    if workers <= 1:
        return None
    # A fork would copy the locks of torch's threads as they happen to be.
    context = multiprocessing.get_context("spawn")
    return stack.enter_context(ProcessPoolExecutor(workers, mp_context=context))


class _Checker:
    """One pass over a file, and what has to be remembered on the way."""

    def __init__(
        self,
        file: Source,
        measure: Callable[[Record], Length] | None,
        specials: Specials | None,
        against: Against | None,
        images: Images,
    ):
        self.file = file
        self.measure = measure
        self.specials = specials
        self.against = against
        self.images = images
        self.answers = Answers()
        self.findings: list[Finding] = []
        self.bad: list[int] = []
        self.ids: dict[str, int] = {}
        self.contents: dict[bytes, int] = {}
        self.extra: dict[str, tuple[int, int]] = {}
        """For each key without a meaning: the first record that has it, and how many do."""

    def batch(self, numbers: range) -> None:
        parsed = [self.file.parse(number) for number in numbers]
        self.images.look_at([image for each in parsed for image in each.images])
        for number, each in zip(numbers, parsed, strict=True):
            found = [*self._in_text(each), *self._problems(number, each)]
            if each.record is not None and not _has_error(found):
                found += self._measured(each.record)
            self.findings += [self._finding(number, each.id, one) for one in found]
            if _has_error(found):
                self.bad.append(number)
            elif each.record is not None:
                self.answers.add(each.record.answer, number)

    def report(self) -> Report:
        for key, (number, count) in self.extra.items():
            unknown = problem("unknown-key", key=key, count=f"{count:,}")
            self.findings.append(self._finding(number, None, unknown))
        for number, unbalanced in self.answers.problems():
            self.findings.append(self._finding(number, None, unbalanced))
        self.findings.sort(key=lambda finding: finding.record or 0)
        if self.file.broken is not None:
            line, broken = self.file.broken
            self.findings.append(self._placed(broken, line, None, None))
            self.bad = list(range(len(self.file)))
        return Report(
            file=str(self.file.path),
            read=len(self.file),
            bad=tuple(self.bad),
            findings=tuple(self.findings),
            images=self.images.digests,
            conversions=dict(sorted(self.images.conversions.items())),
        )

    def _in_text(self, parsed: Parsed) -> Iterator[Problem]:
        """What the text shows; of special tokens, the model's own where it is known."""
        for each in parsed.problems:
            if self.specials is None or each.code != "special-token":
                yield each
        if self.specials is not None and parsed.record is not None:
            yield from self.specials.problems(parsed.record)

    def _problems(self, number: int, parsed: Parsed) -> Iterator[Problem]:
        """What shows only beside other records, or by opening the images."""
        self._count_unknown_keys(number, parsed)
        if (before := self.ids.setdefault(parsed.id, number)) != number:
            yield problem("duplicate-id", id=parsed.id, where=self._where(before))
        for image in {image.identity: image for image in parsed.images}.values():
            yield from self.images.problems(image)
        if parsed.record is None:
            return
        contents = [self.images.content(image) for image in parsed.record.images]
        if (before := self.contents.setdefault(_digest(parsed.record, contents), number)) != number:
            yield problem("duplicate-record", where=self._where(before))
        if self.against is not None:
            yield from self.against.problems(parsed.record, contents)

    def _count_unknown_keys(self, number: int, parsed: Parsed) -> None:
        """A key that stands in every record is told once; a misspelt one has its own finding."""
        if any(each.code == "misspelt-key" for each in parsed.problems):
            return
        for key in parsed.extra:
            first, count = self.extra.get(key, (number, 0))
            self.extra[key] = (first, count + 1)

    def _measured(self, record: Record) -> list[Problem]:
        if self.measure is None:
            return []
        try:
            length = self.measure(record)
        except BadDataError as error:
            return list(error.problems)
        except DataError as error:
            return [problem("not-encodable", why=error)]
        if length.total > length.limit:
            return [problem("too-long", total=f"{length.total:,}", limit=f"{length.limit:,}")]
        return [problem("no-answer-tokens")] if length.answer < 1 else []

    def _finding(self, number: int, name: str | None, one: Problem) -> Finding:
        # Many records of a list may share a line, so their number is told.
        told = replace(one, reason=f"Record {number + 1}: {one.reason}") if self.file.is_list else one
        return self._placed(told, self.file.line(number) + one.line, number + 1, name)

    def _placed(self, one: Problem, line: int, record: int | None, name: str | None) -> Finding:
        file = str(self.file.path)
        return Finding(file, line, record, name, one.code, one.severity, one.reason, one.remedy)

    def _where(self, number: int) -> str:
        record = f"record {number + 1}, " if self.file.is_list else ""
        return f"{record}line {self.file.line(number)}"


def _has_error(found: Sequence[Problem]) -> bool:
    return any(each.severity == "error" for each in found)


def _digest(record: Record, contents: Sequence[str]) -> bytes:
    """Equal for records with the same pixels and the same words."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (*contents, *(f"{turn.role} {turn.text}" for turn in record.turns)):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0\0")
    return digest.digest()
