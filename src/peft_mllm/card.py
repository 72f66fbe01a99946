"""The model card of an adapter or a model: what it is, how it was made and scored, and lines that load it.

Every saved adapter has a short one; an exported directory has one filled from result.json and its seal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

import yaml

if TYPE_CHECKING:
    from peft import PeftConfig

Level = Literal["plain", "taught", "ours"]
"""Who loads it: transformers and peft alone; these after `import peft_mllm`; or our own loader."""
LEVELS: tuple[Level, ...] = ("plain", "taught", "ours")
TEACH = "import peft_mllm  # teaches peft and transformers what they do not know"
NO_LICENCE = "The base's own card states its licence; it holds for what is made from it."


@dataclass(frozen=True)
class Loader:
    """The lines of Python that load a directory.

    Attributes:
        level: who loads it.
        model: the base as `ModelSpec` fields that are not the defaults, `path` among them; of a whole model too.
        adapter: whether the directory holds an adapter, or a whole model.
        dtype: torch's name of the weights' type; None leaves it to transformers.
        in_peft_model: whether the method acts in PeftModel's forward, and not in the base's own.
        prompt: whether it learned tokens or a prefix, which peft does not load to train on.
    """

    level: Level
    model: Mapping[str, Any]
    adapter: bool = True
    dtype: str | None = None
    in_peft_model: bool = False
    prompt: bool = False

    def code(self) -> str:
        """A program that leaves `model` loaded; it runs in the directory itself."""
        lines = self._with_ours() if self.level == "ours" else self._with_theirs()
        return "\n".join(lines) + "\n"

    def code_to_go_on(self) -> str:
        """What to add so that an adapter's weights train."""
        if self.level == "ours" or self.prompt:
            return "\n".join(self._with_ours(trainable=True)) + "\n"
        return "model = PeftModel.from_pretrained(base, directory, is_trainable=True)\n"

    def _with_theirs(self) -> Iterator[str]:
        base = str(self.model["path"])
        if self.level == "taught":
            yield TEACH
        if self.adapter:
            yield "from peft import PeftModel"
        yield "from transformers import AutoModelForImageTextToText"
        if self.adapter and base == "embedded":
            yield "\nfrom peft_mllm.assets import EMBEDDED"
        yield '\ndirectory = "."  # where this file lies'
        options = "".join(
            f', {name}="{value}"'
            for name, value in (("dtype", self.dtype), ("attn_implementation", self.model.get("attn_implementation")))
            if value
        )
        if not self.adapter:
            yield f"model = AutoModelForImageTextToText.from_pretrained(directory{options})"
            return
        source = "EMBEDDED" if base == "embedded" else f'"{base}"'
        yield f"base = AutoModelForImageTextToText.from_pretrained({source}{options})"
        yield "model = PeftModel.from_pretrained(base, directory)"

    def _with_ours(self, *, trainable: bool = False) -> Iterator[str]:
        fields = dict(self.model)
        if not self.adapter:
            fields.pop("path", None)
        named = ", ".join([*([] if self.adapter else ["path=directory"]), *(f"{k}={v!r}" for k, v in fields.items())])
        yield "from peft_mllm.loading import load_family"
        yield "from peft_mllm.spec import ModelSpec"
        if self.adapter:
            yield "from peft_mllm.tuned import load_adapter"
        yield '\ndirectory = "."  # where this file lies'
        yield f'family = load_family(ModelSpec({named}), dtype="{self.dtype or "auto"}")'
        if self.adapter:
            yield f"tuned = load_adapter(family, directory{', trainable=True' if trainable else ''})"
            yield f"model = tuned.{'model' if self.in_peft_model else 'base'}"
            if trainable:
                yield "weights = tuned.trainable()  # what trains, by name"
        else:
            yield "model = family.model"


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        kind: peft's type name, such as LORA; or what kind of model it is.
        loader: the lines that load it.
        result: the run's result.json, where there is one.
        seal: the seal of the directory, where it has one.
        licence: the base's, as its own card names it.
        notes: sentences about what the directory is.
    """

    kind: str
    loader: Loader
    result: Mapping[str, Any] | None = None
    seal: Mapping[str, Any] | None = None
    licence: str | None = None
    notes: Sequence[str] = ()

    def text(self) -> str:
        """The text of a README.md."""
        base, what = self.loader.model["path"], "adapter" if self.loader.adapter else "model"
        article = "An" if self.kind[:1].upper() in "AEIO" else "A"
        parts = [
            self._header(),
            f"# {article} {self.kind} {what} for {base}\n",
            f"Made with PEFT-MLLM. {self._said()}\n",
        ]
        parts += self._loading()
        if self.result is not None:
            parts += [*_scores(self.result), *_training(self.result, self.loader.dtype)]
        else:
            parts.append("How it was trained, on what, and how it scored is in the run's `result.json`.\n")
        if self.seal is not None:
            parts += _sealing(self.seal)
            licence = f"The base's card says: {self.licence}." if self.licence else NO_LICENCE
            parts += ["## Licence\n", f"{licence}\n"]
        return "\n".join(parts)

    def _said(self) -> str:
        return " ".join(self.notes) or "To load it:"

    def _header(self) -> str:
        relation = "adapter" if self.loader.adapter else "finetune"
        header = {"base_model": self.loader.model["path"], "base_model_relation": relation}
        header |= {"library_name": "peft" if self.loader.adapter else "transformers"}
        header |= {"license": self.licence} if self.licence else {}
        tags = {"pipeline_tag": "image-text-to-text", "tags": ["peft-mllm", self.kind]}
        return f"---\n{yaml.safe_dump({**header, **tags}, sort_keys=False, width=1000)}---"

    def _loading(self) -> Iterator[str]:
        if self.notes:
            yield "## To load it\n"
        yield f"```python\n{self.loader.code()}```\n"
        if self.seal is None:
            return
        yield "To score it on a task, here in the directory (`peft-mllm list tasks` shows what there is):\n"
        base = f" --base {self.loader.model['path']}" if self.loader.adapter else ""
        if tower := self.loader.model.get("vision_tower"):
            base += f" --vision-tower {tower}"
        task = self.result["spec"]["task"]["name"] if self.result else "TASK"
        yield f"```bash\npeft-mllm evaluate .{base} --task {task}\n```\n"
        if self.loader.adapter:
            yield "To train it further, load it with its weights open:\n"
            yield f"```python\n{self.loader.code_to_go_on()}```\n"
        else:
            yield "To train from here, give this directory as the base: `peft-mllm train spec.yaml model=DIRECTORY`.\n"


def adapter_card(config: PeftConfig) -> str:
    """The text of the README.md beside a run's own adapter, which is saved before the run has a result."""
    kind, base = config.peft_type.value, str(config.base_model_name_or_path)
    level: Level = "ours" if base.startswith("tiny:") else "taught" if kind == "BOTTLENECK" else "plain"
    return Card(kind=kind, loader=Loader(level=level, model={"path": base})).text()


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _scores(result: Mapping[str, Any]) -> Iterator[str]:
    yield "## Scores\n"
    rows = (
        (task, f"{score['metric']} {figure}", f"{value:.2f}", str(score["n"]), score["rule"])
        for task, score in result["scores"].items()
        for figure, value in score["values"].items()
    )
    yield _table(("task", "metric", "score", "questions", "rule"), rows)
    for note in result.get("notes", ()):
        yield f"{note}\n"


def _training(result: Mapping[str, Any], dtype: str | None) -> Iterator[str]:
    yield "## How it was made\n"
    yield _table(("", ""), ((name, value) for name, value in _facts(result, dtype)))
    spec = {key: value for key, value in result["spec"].items() if key not in ("output_dir", "name")}
    text = yaml.safe_dump({**_without_paths(spec, keep=("model",)), "output_dir": "runs/again"}, sort_keys=False)
    yield "To train it again, save this as `spec.yaml`, mend the paths of data, and run `peft-mllm train spec.yaml`:\n"
    yield f"<details><summary>spec.yaml</summary>\n\n```yaml\n{text}```\n\n</details>\n"


def _facts(result: Mapping[str, Any], dtype: str | None) -> Iterator[tuple[str, str]]:
    spec, method, training = result["spec"], result["method"], result["training"]
    train, trained = spec["train"], result["trainable"]
    options = ", ".join(f"{name} {value}" for name, value in method["options"].items())
    place = f" at {method['location']}" if method["location"] else ""
    yield "method", f"{method['name']}{place}{f': {options}' if options else ''}"
    yield "connector, vision tower", f"{spec['connector']}, {spec['vision']}"
    for part, each in trained.items():
        share = 100 * each["parameters"] / result["model"]["parameters"]
        rate = f"learning rate {each['learning_rate']:g}"
        yield f"trained of the {part}", f"{each['parameters']:,} parameters ({share:.3g} % of the model), {rate}"
    if training:
        data = result["data"]["train"]
        held_out = f", {data['validation']:,} held out" if data.get("validation") else ""
        yield "data", f"{data['task']}: {data['trained_on']:,} samples{held_out}, sha256 {data['fingerprint'][:16]}"
        yield (
            "steps",
            f"{training['steps']:,} ({training['epochs']:.3g} epochs, {training['answer_tokens']:,} answer tokens)",
        )
        sizes = (train["per_device_train_batch_size"], train["gradient_accumulation_steps"], result["processes"])
        yield "batch", "{} x {} micro-batches x {} processes".format(*sizes)
        decay, norm = train["weight_decay"], train["max_grad_norm"]
        yield (
            "optimizer",
            f"{train['optim']}, {train['lr_scheduler_type']}, weight decay {decay:g}, clipped at {norm:g}",
        )
        yield "precision", f"weights {dtype}{', bfloat16 by autocast' if train['bf16'] else ''}"
        yield "time", f"{training['seconds']:,.0f} s on {result['environment']['device']}"
    yield "seed", str(result["seed"])
    yield "base's fingerprint", result["model"]["fingerprint"][:16]
    named = ("peft-mllm", "torch", "transformers", "peft", "python")
    yield "versions", ", ".join(f"{name} {result['environment'][name]}" for name in named)


def _without_paths(value: Any, *, keep: Sequence[str] = ()) -> Any:
    """Values of a spec, with absolute paths cut to their last part: a card is published."""
    if isinstance(value, Mapping):
        return {key: item if key in keep else _without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    return PurePath(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _sealing(seal: Mapping[str, Any]) -> Iterator[str]:
    yield "## Seal\n"
    yield "`seal.json` has the sha256 of every file here. Before it was written:\n"
    yield _table(("", ""), sealed_facts(seal))


def sealed_facts(seal: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a seal says, as a person reads it: names and values."""
    probe, reloaded, effect = seal["probe"], seal["reloaded"], seal["effect"]
    yield (
        "probe",
        f"{probe['conversations']} conversations, {probe['positions']} positions, sha256 {probe['sha256'][:16]}",
    )
    by = {"plain": "plain transformers and peft", "taught": "these after `import peft_mllm`", "ours": "PEFT-MLLM"}
    yield "reloaded in a fresh process by", f"{by[reloaded['by']]}, {reloaded['dtype']}, {reloaded['device']}"
    yield "its logits differ by", f"{reloaded['difference']:.1e} of the largest (allowed: {reloaded['tolerance']:.0e})"
    yield "effect on the base's logits", f"{effect:.1e} of the largest"
    if seal["merged"]:
        merged = seal["merged"]
        yield (
            "merging changed logits by",
            f"{merged['difference']:.1e} of the largest (allowed: {merged['tolerance']:.0e})",
        )
    if seal["approximation"]:
        yield from _approximation(seal["approximation"])


def _approximation(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    worst = found["worst"]
    yield "LoRA instead of", f"{found['method']}: rank {found['rank']}, {found['linears']} linears"
    yield "error of the updates", f"{found['error']:.2e} (worst: {worst['error']:.2e}, {worst['linear']})"
    yield "logits moved by", f"{found['logits']:.1e} of the largest"
    yield "answer loss on the probe", "{before:.5f} before, {after:.5f} as LoRA".format(**found["probe_loss"])
    for task, check in found["checks"].items():
        yield f"{check['figure']} on {check['n']} of {task}", "{:.2f} before, {:.2f} as LoRA".format(*check["score"])
        yield f"answer loss on {check['n']} of {task}", "{:.5f} before, {:.5f} as LoRA".format(*check["loss"])
