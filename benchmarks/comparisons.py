"""What is compared with what: the rows of the table, each an equality gate and a ratio measured in turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import asking, gate, memory, together
from benchmarks.case import Case
from benchmarks.ours import ours
from benchmarks.peers import PEERS
from benchmarks.ratios import Ratio, ratio_of
from benchmarks.shapes import Base, make_base
from benchmarks.turns import Side, fits, take_turns
from benchmarks.workloads import WORKLOADS, Workload, merged, words_of, write_data

if TYPE_CHECKING:
    import torch

GPU_MICROS = (2, 4, 8, 16, 32)
METHODS = ("lora", "ia3", "adapter", "prefix")
SPEED_BARS = {
    ("shared", "hf"): 5.0, ("shared", "trl"): 4.3, ("captions", "hf"): 4.5, ("captions", "trl"): 4.0,
    ("single", "hf"): 1.15, ("single", "trl"): 1.1, ("mixed", "hf"): 1.8, ("mixed", "trl"): 1.7,
    ("asking", "generate"): 4.0,
}  # fmt: skip
TOGETHER_BAR = 2.0
MEMORY_BARS = {"hf": 0.4, "trl": 0.5}
ABLATIONS = {
    "without sharing": "data.share_prefix=false",
    "trees by a mask": "speed.attention=mask",
    "layers as transformers computes them": "speed.lean=off",
    "recomputing all layers": "speed.recompute=full",
}
"""Our own levers, one turned off at a time."""
TITLES = {"hf": "HF Trainer + peft", "trl": "TRL SFTTrainer"}
PACKAGES = {"hf": "transformers", "trl": "trl", "generate": "transformers"}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        workload, method: what.
        peer: against whom, and how it was run.
        version: of the peer.
        ratio: of times, theirs to ours; of memory, ours to theirs.
        bar: what it should be; None where nothing is asked.
        equal: the greatest relative difference of loss and gradient; None where the two do not compute the same.
        seconds: of a step, ours and theirs; bytes, of memory.
        questions: of a step.
        best: whether this is the peer's best micro-batch.
        kind: speed, memory, ablation or other semantics.
    """

    workload: str
    method: str
    peer: str
    version: str
    ratio: Ratio
    bar: float | None
    equal: float | None
    seconds: tuple[float, float]
    questions: int
    best: bool = True
    kind: str = "speed"

    def to_json(self) -> dict[str, Any]:
        """For the file."""
        return asdict(self)


@dataclass
class Bench:
    """A benchmark under way.

    Attributes:
        shape: name of the model that is timed.
        gate_shape: name of the model that equality is proven on.
        device: where it is computed.
        bf16: whether in bfloat16.
        rounds: pairs of each comparison, at most.
        until: value of time.monotonic after which a comparison takes no more than three pairs.
        peers: names of the trainers to compare with.
        tell: called with each finished row and with notes.
        factor: how many times larger a step is than the workload's.
    """

    shape: str
    gate_shape: str
    device: torch.device
    bf16: bool
    rounds: int
    until: float
    peers: Sequence[str]
    tell: Callable[[str], None]
    factor: int = 1
    rows: list[Row] = field(default_factory=list)
    micro: dict[str, int] = field(default_factory=dict)
    _bases: dict[str, Base] = field(default_factory=dict)

    def base(self, name: str) -> Base:
        """A random model, made once."""
        if name not in self._bases:
            self._bases[name] = make_base(name, self.device, bf16=self.bf16)
        return self._bases[name]

    # --- training ---

    def training(self, workload: Workload, method: str, *, search: bool) -> None:
        """Gate, then time ours with each peer; with `search` its best micro-batch is found, else it is known."""
        equal = self.equality(workload, method)
        with self.case(workload, method) as case:
            sides = {"": ours(case)}
            for name in self.peers:
                micros = self._micros(case, name) if search else [self.micro.get(name, case.step)]
                sides |= {f"{name} {micro}": PEERS[name](case, micro=micro) for micro in micros}
            self._play(sides.values())
            mine = sides.pop("")
            for name in self.peers:
                timed = {int(key.split()[1]): side for key, side in sides.items() if key.startswith(f"{name} ")}
                best = max(timed, key=lambda micro: len(timed[micro].seconds))  # the others were slower in a round
                if workload.name == "shared":
                    self.micro[name] = best
                for micro, side in timed.items():
                    bar = SPEED_BARS[workload.name, name] if micro == best else None
                    how = f"{side.name}, {micro} at once"
                    self._add(
                        workload.title,
                        method,
                        how,
                        name,
                        mine,
                        side,
                        case.step,
                        bar,
                        equal.get(side.name),
                        best=micro == best,
                    )

    def _micros(self, case: Case, name: str) -> list[int]:
        """The micro-batches that a peer is timed with: one sample, and all; on a GPU those of some that fit."""
        if self.device.type == "cpu":
            return sorted({1, case.step})
        fitting = [
            micro for micro in GPU_MICROS if micro <= case.step and fits(PEERS[name](case, micro=micro), self.device)
        ]
        if not fitting:
            raise SystemExit(
                f"{TITLES[name]} does not fit into the memory of this GPU, even with {GPU_MICROS[0]} at once"
            )
        return fitting

    def equality(self, workload: Workload, method: str) -> dict[str, float]:
        """Peer -> greatest relative difference over twenty steps.

        Raises:
            SystemExit: one of them computes something else; no speed is measured then.
        """
        base = self.base(self.gate_shape)
        with tempfile.TemporaryDirectory() as folder:
            data = data_of(base, workload, Path(folder), steps=gate.STEPS)
            case = Case(base, data, workload.step, method, Path(folder))
            found = gate.compare(case, [PEERS[name] for name in self.peers])
        for name, equality in found.items():
            if not equality.passed:
                raise SystemExit(f"{workload.title}, {method}: {name} computes something else: {equality}")
        return {name: max(equality.loss, equality.gradient) for name, equality in found.items()}

    # --- our own levers, and the other recipe ---

    def levers(self, workload: Workload) -> None:
        """Ours against ours with one lever off, and against the multi-turn merge."""
        with self.case(workload, "lora") as case, self.case(workload, "lora") as other:
            merge = Case(other.base, merged(other.data), self._sized(workload).images, "lora", other.folder)
            sides = {name: ours(case, override, name=name) for name, override in ABLATIONS.items()}
            sides["merge"] = ours(merge, name="merge")
            mine = ours(case)
            self._play([mine, *sides.values()])
            last = sides.pop("merge")
            for name, side in sides.items():
                self._add(workload.title, "lora", name, "", mine, side, case.step, kind="ablation")
            how = "ours, an image's questions merged into one conversation"
            self._add(workload.title, "lora", how, "", mine, last, case.step, kind="other semantics")

    # --- evaluation and memory ---

    def asking(self, workload: Workload) -> None:
        """Evaluation against HF generate; every answer must be the same."""
        with self.case(workload, "lora") as case:
            said: dict[str, asking.Said] = {"": []}
            sides = {"": asking.ours(case, said[""])}
            for micro in sorted({1, case.step}):
                said[f"{micro}"] = []
                sides[f"{micro}"] = asking.generate(case, said[f"{micro}"], micro=micro)
            self._play(sides.values())
            mine = sides.pop("")
            best = max(sides, key=lambda name: len(sides[name].seconds))
            for name, side in sides.items():
                differ = sum(a != b for a, b in zip(said[""][0], said[name][0], strict=True))
                if differ and not case.bf16:
                    raise SystemExit(f"evaluation: {differ} of {case.step} answers differ from {side.name}")
                bar = SPEED_BARS["asking", "generate"] if name == best else None
                title = "evaluation, five short questions per image"
                self._add(
                    title,
                    "lora",
                    side.name,
                    "generate",
                    mine,
                    side,
                    case.step,
                    bar,
                    differ / case.step,
                    best=name == best,
                )

    def memory(self, workload: Workload) -> None:
        """Peak memory with all questions of a step at once, each in a process of its own."""
        found = {
            name: memory.peak_of(
                name, self.shape, workload.name, factor=self.factor, device=self.device.type, bf16=self.bf16
            )
            for name in ("ours", *self.peers)
        }
        step = workload.times(self.factor).step
        for name in self.peers:
            ratio = found["ours"] / found[name]
            row = Row(
                "peak memory, five questions per image", "lora", f"{TITLES[name]}, {step} at once",
                version(PACKAGES[name]), Ratio(ratio, ratio, ratio, 1), MEMORY_BARS[name], None,
                (float(found["ours"]), float(found[name])), step, kind="memory",
            )  # fmt: skip
            self.rows.append(row)
            self.tell(in_words(row))

    def together(self) -> None:
        """Eight small runs on one base against one after the other; the adapters must be the same bytes."""
        ways = {"a command each": together.as_commands, "in one process": together.in_one_process}
        for how, measure in ways.items():
            both = measure()
            if not both.equal:
                raise SystemExit(f"runs together, {how}: their adapters are not those of each run alone")
            row = Row(
                "eight small runs on one base", "two each of four", f"ours, one after the other, {how}",
                version("peft-mllm"), ratio_of(both.apart, both.together), TOGETHER_BAR, 0.0,
                (_median(both.together), _median(both.apart)), 8 * together.QUESTIONS, kind="together",
            )  # fmt: skip
            self.rows.append(row)
            self.tell(in_words(row))

    # --- what they share ---

    def case(self, workload: Workload, method: str) -> _Folder:
        """The timed model's case, with data that is gone when the context ends."""
        return _Folder(self.base(self.shape), self._sized(workload), method)

    def _sized(self, workload: Workload) -> Workload:
        return workload.times(self.factor)

    def _play(self, sides: Any) -> None:
        take_turns(list(sides), rounds=self.rounds, until=self.until, device=self.device)

    def _add(
        self, title: str, method: str, peer: str, package: str, mine: Side, side: Side, questions: int,
        bar: float | None = None, equal: float | None = None, *, best: bool = True, kind: str = "speed",
    ) -> None:  # fmt: skip
        seconds = (_median(mine.seconds), _median(side.seconds))
        known = version(PACKAGES[package]) if package else version("peft-mllm")
        ratio = ratio_of(side.seconds, mine.seconds)
        row = Row(title, method, peer, known, ratio, bar, equal, seconds, questions, best, kind)
        self.rows.append(row)
        self.tell(in_words(row))


class _Folder:
    """A case in a temporary folder."""

    def __init__(self, base: Base, workload: Workload, method: str):
        self._base, self._workload, self._method = base, workload, method
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Case:
        folder = Path(self._folder.name)
        return Case(self._base, data_of(self._base, self._workload, folder), self._workload.step, self._method, folder)

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def data_of(base: Base, workload: Workload, folder: Path, *, steps: int = 1) -> Path:
    """The workload's data in the words and the image size of a model."""
    words = words_of(base.family.tokenizer)
    return write_data(workload, folder, words, image_size=base.shape.image_size, steps=steps)


def chosen(bench: Bench) -> dict[str, Callable[[], None]]:
    """All comparisons by name, the most telling first; memory, where a GPU must hold it beside nothing else."""
    found = dict(everything(bench))
    return {"memory": found.pop("memory"), **found} if bench.device.type == "cuda" else found


def everything(bench: Bench) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each comparison with its name."""
    work = WORKLOADS
    yield "shared", lambda: bench.training(work["shared"], "lora", search=True)
    yield "single", lambda: bench.training(work["single"], "lora", search=True)
    yield "mixed", lambda: bench.training(work["mixed"], "lora", search=True)
    for method in METHODS:
        yield f"captions-{method}", lambda method=method: bench.training(work["captions"], method, search=False)  # type: ignore[misc]
    yield "asking", lambda: bench.asking(work["shared"])
    yield "memory", lambda: bench.memory(work["shared"])
    if bench.device.type == "cpu":
        yield "together", bench.together
    yield "levers", lambda: bench.levers(work["shared"])


def in_words(row: Row) -> str:
    """A row in one line, for the terminal."""
    bar = "" if row.bar is None else f", bar {row.bar:g}"
    interval = f" ({row.ratio.low:.2f} to {row.ratio.high:.2f})" if row.ratio.pairs > 1 else ""
    return f"{row.workload}, {row.method}: {row.ratio.median:.2f}x{interval} {row.peer}{bar}"


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def gathered(bench: Bench, environment: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The content of the JSON."""
    return {
        "schema": 1,
        "shape": bench.shape,
        "gate": {"shape": bench.gate_shape, "steps": gate.STEPS},
        "environment": dict(environment),
        "measured": "CPU seconds" if bench.device.type == "cpu" else "wall seconds",
        "finished": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds),
        "rows": [row.to_json() for row in bench.rows],
    }
