"""A spec says what a run is, or says where it is wrong."""

from __future__ import annotations

import json

import pytest

from peft_mllm.errors import SpecError
from peft_mllm.methods import METHODS
from peft_mllm.spec import NamedSpec, Spec
from peft_mllm.specfile import build, load_spec, load_spec_of, parse_spec

GOOD = """\
model: embedded
method: lora
task: scenes_row
output_dir: runs/x
train:
  learning_rate: 1e-4
  max_steps: 10
"""


@pytest.fixture
def read(tmp_path):
    def read(text, *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        try:
            return load_spec(path, overrides)
        except SpecError as error:
            raise SpecError(str(error).replace(f"{tmp_path}/", "")) from None

    return read


def said(read, text, *overrides):
    with pytest.raises(SpecError) as caught:
        read(text, *overrides)
    return str(caught.value)


def test_a_good_spec(read):
    spec = read(GOOD)
    assert spec.train.learning_rate == 1e-4
    assert spec.model.path == "embedded"
    assert spec.method.name == "lora"
    assert spec.method.options["rank"] == 128  # a read spec says every option
    assert spec.title == "lora"
    assert spec.connector == "frozen"


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.e-4", "0.0001", ".1e-3", "+1e-4", "10e-5"])
def test_numbers_are_numbers(read, number):
    assert read(GOOD.replace("1e-4", number)).train.learning_rate == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "word", ["'1e-4'", '"1e-4"', "abc", "1e-4x", "[1e-4]", "true", ".nan", ".inf", "1_000", "1e999"]
)
def test_what_is_no_number_is_an_error_with_its_place(read, word):
    message = said(read, GOOD.replace("1e-4", word))
    assert message.startswith("run.yaml:6: train.learning_rate: ")


def test_a_number_is_no_word_and_no_other_number(read):
    assert said(read, GOOD.replace("runs/x", "7")).startswith("run.yaml:4: output_dir: ")
    assert said(read, GOOD.replace("10", "10.5")).startswith("run.yaml:7: train.max_steps: ")
    assert said(read, GOOD.replace("10", "'10'")).startswith("run.yaml:7: train.max_steps: ")
    assert said(read, GOOD.replace("1e-4", "-1")).startswith("run.yaml:6: train.learning_rate: ")


@pytest.mark.parametrize("word", ["no", "No", "on", "off", "yes", "y"])
def test_words_stay_words(read, word):
    assert read(GOOD + f"  save_strategy: 'no'\nname: {word}\n").name == word


def test_no_without_quotes_is_the_strategy(read):
    assert read(GOOD + "  save_strategy: no\n").train.save_strategy == "no"


def test_dates_and_octal_stay_what_they_say(read):
    assert read(GOOD + "name: 2024-01-01\n").name == "2024-01-01"
    assert read(GOOD + "name: 0x1F\n").name == "0x1F"
    assert read(GOOD + "name: 1:30\n").name == "1:30"


def test_a_key_said_twice(read):
    assert said(read, GOOD + "method: ia3\n") == "run.yaml:8: 'method' is said twice (first at run.yaml:2)."
    assert "run.yaml:8: 'max_steps' is said twice" in said(read, GOOD + "  max_steps: 3\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "seeed: 3\n", "run.yaml:8: unknown key 'seeed'. Did you mean 'seed'?"),
        (GOOD + "  lerning_rate: 3\n", "run.yaml:8: unknown key 'train.lerning_rate'. Did you mean 'learning_rate'?"),
        (
            GOOD.replace("method: lora", "method: {name: lora, rnk: 3}"),
            "run.yaml:2: unknown key 'method.rnk'. Did you mean 'rank'?",
        ),
        (
            GOOD.replace("method: lora", "method:\n  name: lora\n  rnk: 3"),
            "run.yaml:4: unknown key 'method.rnk'. Did you mean 'rank'?",
        ),
        (GOOD.replace("lora", "loraa"), "run.yaml:2: there is no method 'loraa'. Did you mean 'lora'?"),
        (GOOD.replace("scenes_row", "scienceqaa"), "run.yaml:3: there is no task 'scienceqaa'. Did you mean"),
        (
            GOOD.replace("model: embedded", "model: {path: x, family: lava}"),
            "run.yaml:1: there is no model family 'lava'. Did you mean 'llava'?",
        ),
        (GOOD + "evaluate:\n  - scenes_count\n  - scenes_cout\n", "run.yaml:10: there is no task 'scenes_cout'."),
        (
            GOOD + "evaluate:\n  - name: scenes_count\n    sed: 3\n",
            "run.yaml:10: unknown key 'evaluate.0.sed'. Did you mean 'seed'?",
        ),
        (GOOD.replace("task: scenes_row\n", ""), "'task' is missing."),
        (GOOD.replace("method: lora", "method:"), "run.yaml:2: method"),
        (GOOD.replace("method: lora", "method: 3"), "run.yaml:2: method"),
        (GOOD.replace("method: lora", "method: [lora]"), "run.yaml:2: method"),
        (GOOD.replace("method: lora", "method: {rank: 3}"), "run.yaml:2: "),
        (GOOD.replace("method: lora", "method: {name: lora, rank: '8'}"), "run.yaml:2: method.rank: "),
        (GOOD.replace("method: lora", "method: {name: lora, rank: 0}"), "run.yaml:2: method.rank: "),
        (GOOD.replace("method: lora", "method: {name: lora, location: mpl}"), "run.yaml:2: method.location: "),
        (GOOD + "connector: tunned\n", "run.yaml:8: connector: "),
        (GOOD + "train2: {}\n", "run.yaml:8: unknown key 'train2'. Did you mean 'train'?"),
        (GOOD + "evaluate: scenes_count\n", "run.yaml:8: evaluate: "),
        (GOOD + "evaluate: [scenes_row]\n", "scenes_row would be scored twice"),
        (GOOD + "evaluate: [scenes_count, scenes_count]\n", "scenes_count would be scored twice"),
        ("", "is missing"),
        ("# nothing\n", "is missing"),
        ("- a\n- b\n", "run.yaml: a spec is a mapping of keys to values."),
        ("just words", "run.yaml: a spec is a mapping of keys to values."),
        ("a: [1, 2\nb: 3\n", "run.yaml:2: this is not YAML"),
        ("model: x\n\tmethod: y\n", "run.yaml:2: this is not YAML"),
        ("model: &a\nmethod: *b\n", "run.yaml:2: this is not YAML"),
        ("model: !!python/object:os.system x\n", "run.yaml:1: "),
        ("model: x\n---\nmodel: y\n", "run.yaml:"),
        ("model: &a [*a]\n", "run.yaml"),
        ("model: x\0y\n", "run.yaml"),
        ("? [a, b]\n: 3\n", "run.yaml:1"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(read, text, expected):
    message = said(read, text)
    assert expected in message
    assert "Traceback" not in message
    assert "pydantic" not in message


def test_everything_wrong_is_said_at_once(read):
    message = said(read, GOOD.replace("1e-4", "'x'") + "seeed: 1\n")
    assert len(message.splitlines()) == 2
    message = said(read, GOOD.replace("lora", "loraa").replace("row", "roww"))
    assert len(message.splitlines()) == 2


def test_anchors_are_values(read):
    text = GOOD + "data: &d\n  max_length: 99\n"
    assert read(text).data.max_length == 99


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(SpecError, match="There is no spec file"):
        load_spec(tmp_path / "absent.yaml")
    with pytest.raises(SpecError, match="is a directory"):
        load_spec(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path / "bytes.yaml")


# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=2e-5", lambda s: s.train.learning_rate == 2e-5),
        ("train={max_steps: 3}", lambda s: s.train.max_steps == 3 and s.train.learning_rate is None),
        ("method.rank=4", lambda s: s.method.name == "lora" and s.method.options["rank"] == 4),
        ("method=ia3", lambda s: s.method.name == "ia3"),
        ("model.dtype=float32", lambda s: s.model.path == "embedded" and s.model.dtype == "float32"),
        ("model=tiny:llava", lambda s: s.model.path == "tiny:llava"),
        ("evaluate=[scenes_count, scenes_at]", lambda s: [t.name for t in s.evaluate] == ["scenes_count", "scenes_at"]),
        ("train.report_to=tensorboard", lambda s: s.train.report_to == ("tensorboard",)),
        ("train.learning_rate=", lambda s: s.train.learning_rate is None),
        ("name=a=b", lambda s: s.name == "a=b"),
        ("data.share_prefix=false", lambda s: s.data.share_prefix is False),
        ("task.seed=3", lambda s: s.task.name == "scenes_row" and s.task.options["seed"] == 3),
        ("task.size={train: 8}", lambda s: s.task.options["size"] == {"train": 8}),
    ],
)
def test_an_override_sets_one_value(read, override, value):
    assert value(read(GOOD, override))


def test_overrides_apply_in_order(read):
    both = read(GOOD, "method.rank=4", "method.alpha=8").method.options
    assert (both["rank"], both["alpha"]) == (4, 8)
    assert read(GOOD, "method.rank=4", "method=ia3").method == read(GOOD, "method=ia3").method


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method.rnk=4", "command line (method.rnk=4): unknown key 'method.rnk'. Did you mean 'rank'?"),
        ("train.learning_rate='1'", "command line (train.learning_rate='1'): train.learning_rate: "),
        ("method=loraa", "command line (method=loraa): there is no method 'loraa'."),
        ("method.name=loraa", "command line (method.name=loraa): there is no method 'loraa'."),
        ("--fast", "command line (--fast): this is no override; write key=value"),
        ("=3", "=3"),
        ("train..x=3", "train..x=3"),
        ("output_dir.x=3", "command line (output_dir.x=3)"),
        ("train.max_steps.x=3", "command line (train.max_steps.x=3)"),
        ("train=[1", "command line (train=[1)"),
        ("evaluate.0=scenes_count", "command line (evaluate.0=scenes_count)"),
    ],
)
def test_a_bad_override_is_named(read, override, expected):
    message = said(read, GOOD, override)
    assert expected in message
    assert "{'" not in message  # nobody asked for our dictionaries


def test_an_override_into_a_list(read):
    """Either it works or it says that it cannot."""
    text = GOOD + "evaluate:\n  - scenes_count\n"
    message = said(read, text, "evaluate.0.seed=3")
    assert "command line (evaluate.0.seed=3)" in message


def test_nested_values_keep_their_lines(read):
    text = GOOD + "  optim_args:\n    momentum: 0.9\n  report_to:\n    - tensorboard\n    - wadb\n"
    assert said(read, text).startswith("run.yaml:12: train.report_to.1: ")
    assert "tensorboard" in said(read, text)


def test_python_data_is_checked_as_a_file_is():
    good = {"method": "lora", "task": "scenes_row", "output_dir": "x"}
    assert parse_spec(good).method.name == "lora"
    assert parse_spec(good, ["method.rank=2"]).method.options["rank"] == 2
    with pytest.raises(SpecError, match=r"train\.learning_rate"):
        parse_spec(good | {"train": {"learning_rate": "1e-4"}})
    with pytest.raises(SpecError, match="unknown key 'trian'"):
        parse_spec(good | {"trian": {}})
    small = parse_spec(good | {"train": {"adam_epsilon": 1e-08}})
    assert small.train.adam_epsilon == 1e-8


@pytest.mark.parametrize("trackers", [[], ["tensorboard"], ["tensorboard", "wandb"], "wandb"])
def test_trackers_are_one_or_many(trackers):
    good = {"method": "lora", "task": "scenes_row", "output_dir": "x", "train": {"report_to": trackers}}
    assert parse_spec(good).train.report_to == (("wandb",) if trackers == "wandb" else tuple(trackers))


def test_a_spec_is_read_again():
    spec = Spec(method="lora", task="scenes_row", output_dir="x", evaluate=["scenes_count"])
    again = parse_spec(spec)
    assert parse_spec(again) == again  # with every option said
    assert parse_spec(spec, ["seed=1"]).seed == 1
    assert parse_spec(again).id == again.id


def test_python_data_that_is_no_json():
    good = {"method": "lora", "task": "scenes_row", "output_dir": "x"}
    with pytest.raises(SpecError):
        parse_spec(good | {"seed": object()})
    with pytest.raises(SpecError):
        parse_spec(good | {"train": {"learning_rate": float("nan")}})


def test_python_data_may_hold_paths(tmp_path):
    spec = parse_spec({"method": "lora", "task": "scenes_row", "output_dir": tmp_path})
    assert spec.output_dir == str(tmp_path)


def test_build_gives_typed_options():
    method = build(METHODS, NamedSpec(name="lora", options={"rank": 3}))
    assert method.options.rank == 3
    with pytest.raises(SpecError, match="rnk"):
        build(METHODS, NamedSpec(name="lora", options={"rnk": 3}))


# Which specs are equal runs


def id_of(*overrides):
    return parse_spec({"method": "lora", "task": "scenes_row", "output_dir": "x"}, overrides).id


@pytest.mark.parametrize(
    "override",
    ["output_dir=y", "name=other", "train.report_to=wandb", "train.logging_steps=1", "method={name: lora}",
     "seed=42", "train.learning_rate=", "train={}", "model=embedded", "model={path: embedded}"],
)  # fmt: skip
def test_equal_outcomes_have_equal_ids(override):
    assert id_of(override) == id_of()


def test_the_order_of_keys_does_not_matter():
    one = id_of("method={name: lora, rank: 3, alpha: 6.0}")
    assert one == id_of("method={alpha: 6.0, name: lora, rank: 3}")
    assert one == id_of("method={name: lora, options: {alpha: 6.0, rank: 3}}")


@pytest.mark.parametrize(
    "override",
    ["seed=1", "method=ia3", "method.rank=3", "connector=tuned", "vision=tuned", "task=scenes_count", "task.seed=2",
     "train.learning_rate=1e-3", "train.bf16=true", "data.share_prefix=false", "generation.num_beams=2",
     "evaluate=[scenes_count]", "model=tiny:llava", "model.attn_implementation=eager"],
)  # fmt: skip
def test_other_outcomes_have_other_ids(override):
    assert id_of(override) != id_of()


def test_options_given_as_their_defaults_are_the_same_run():
    assert id_of("method.rank=128") == id_of()


def test_a_spec_cannot_be_changed():
    spec = parse_spec({"method": "lora", "task": "scenes_row", "output_dir": "x"})
    with pytest.raises(ValueError):
        spec.seed = 3


def test_a_misspelt_metric_is_found_before_anything_starts(read):
    """Not after the training, when nothing in the spec may change any more."""
    text = GOOD.replace("task: scenes_row", "task: {name: custom, train: a.jsonl, metric: exct}")
    assert "there is no metric 'exct'. Did you mean 'exact'?" in said(read, text)


def test_zero_steps_are_refused(read):
    assert "0 steps train nothing" in said(read, GOOD, "train.max_steps=0")


def test_the_spec_of_a_run_is_read_from_its_directory_or_one_of_its_files(tmp_path):
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    spec = parse_spec({"model": "embedded", "method": "lora", "task": "scenes_next", "output_dir": str(run)})
    said = spec.model_dump(mode="json", exclude={"output_dir"})
    (run / "result.json").write_text(json.dumps({"spec": said, "scores": {}}))
    assert load_spec_of(run) == load_spec_of(run / "result.json") == spec
    (run / "spec.json").write_text(json.dumps(said, indent=1))
    assert load_spec_of(run) == load_spec_of(run / "spec.json") == spec
    assert load_spec_of(run, ["method.rank=2"]).method.options["rank"] == 2
    with pytest.raises(SpecError, match=r"adapter is a directory without spec\.json or result\.json. Give a spec file"):
        load_spec_of(run / "adapter")
    with pytest.raises(SpecError, match=r"run is a directory\. Give a spec file"):
        load_spec(run)


def test_a_generated_task_has_no_fewer_than_no_questions(tmp_path):
    task = {"name": "scenes_next", "size": {"train": -64}}
    with pytest.raises(SpecError, match=r"task\.size\.train: must be 0 or more, not -64\.$"):
        parse_spec({"model": "embedded", "method": "lora", "task": task, "output_dir": "o"})
