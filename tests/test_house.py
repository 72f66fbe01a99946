"""The rules of the house, kept by reading the source: what may import what, and what no file may do."""

from __future__ import annotations

import ast
import importlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "peft_mllm"
SOURCE = Path(__file__).resolve().parent.parent / "src" / PACKAGE

# The floors, from the ground up. A module or package imports from its own floor or from those below.
FLOORS = [
    {"errors"},
    {
        "assets",
        "bins",
        "document",
        "files",
        "interrupt",
        "pieces",
        "proof",
        "record",
        "seeds",
        "shelf",
        "spec",
        "weights",
        "world",
    },
    {"anatomy", "answers", "pages", "progress", "provenance", "rundir", "scenes", "screen", "trackers"},
    {"attention", "data", "optimizer", "parts", "quantization", "recompute", "sharding"},
    {"methods", "metrics", "models", "tasks"},
    {"card", "lean", "loading", "preparing", "prompts", "specfile", "splits", "switch", "tuned"},
    {"bare", "choices", "convert", "decoding", "evaluation", "exactness", "features", "gradients", "identity"}
    | {"inspection", "listing", "matrix", "memory", "mount", "pictures", "preview", "released", "retention", "scoring"}
    | {"training"},
    {"common", "curve", "fitting", "run", "scored"},
    {"saved", "study", "together"},
    {"annotate", "chat", "demo", "exporting", "reproduce", "versus"},
    {"cli", ""},
    {"__main__"},
]

SHELVES = {"methods": "METHODS", "metrics": "METRICS", "models": "MODELS", "tasks": "TASKS"}

# Files on a shelf that are no item of it: what several items share.
HELPERS = {
    "methods": {"bottleneck"},
    "metrics": {"judge", "pairs", "pope_files", "reading", "splits", "text"},
    "models": {"hf_format", "llava_tokenizer", "llava_tower", "original_llava"},
    "tasks": {"reading", "vqa_files"},
}

# Importing these must be quick, so they leave the heavy libraries to those who need them.
QUICK = ["", "cli", "files", "rundir", "spec", "specfile", "study", "versus", *SHELVES]
HEAVY = ("torch", "transformers", "peft", "accelerate", "matplotlib", "scipy")

MAX_LINES = 400
MAX_LINES_OF_TRAIN_STEP = 30
MAX_CPU_SECONDS = 0.5
SLACK = 2.5
"""Of what those libraries cost; `list methods` was measured at up to twice of it."""
STANDS_ON = "import typer, rich.console, pydantic, wrapt"
"""What the command line cannot do without; torch alone takes several times as long."""

FORBIDDEN_CALLS = {"print", "eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system"}
# Old weights are read in one place, by torch's reader that builds nothing but tensors.
THE_ONE_READER = ("bins", "torch.load()")
FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_ARGUMENTS = {"shell": True, "trust_remote_code": True, "weights_only": False}


# --- reading the source ---


@dataclass(frozen=True)
class Import:
    """One import of one of our modules by another."""

    importer: str
    imported: str
    line: int
    for_types: bool

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported} (line {self.line})"


@cache
def modules() -> dict[str, Path]:
    """Our modules by dotted name below the package; the package itself is ''."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


@cache
def imports() -> tuple[Import, ...]:
    """All imports of our modules by our modules, wherever in a file they stand."""
    return tuple(
        Import(name, target, node.lineno, node in for_types)
        for name in modules()
        for for_types in [set(_nodes_for_types(tree(name)))]
        for node in ast.walk(tree(name))
        for target in _targets(name, node)
    )


def _nodes_for_types(module: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(module):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from (inner for statement in node.body for inner in ast.walk(statement))


def _targets(importer: str, node: ast.AST) -> Iterator[str]:
    """Which of our modules a statement imports: `from package import name` may mean either."""
    if isinstance(node, ast.Import):
        yield from (_below(alias.name) for alias in node.names if _is_ours(alias.name))
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{importer}: imports are absolute here (line {node.lineno})"
        if node.module and _is_ours(node.module):
            package = _below(node.module)
            names = {f"{package}.{alias.name}".lstrip(".") for alias in node.names}
            yield from {name if name in modules() else package for name in names}


def _is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def _below(name: str) -> str:
    return name.removeprefix(PACKAGE).lstrip(".")


def top(name: str) -> str:
    """The first part of a module's name: the room it is in."""
    return name.split(".")[0]


def floor(name: str) -> int:
    for level, rooms in enumerate(FLOORS):
        if top(name) in rooms:
            return level
    pytest.fail(f"{name} has no floor: give '{top(name)}' one in FLOORS")


def path_of(name: str) -> Path:
    if name not in modules():
        pytest.fail(f"src/{PACKAGE}/{name.replace('.', '/')}.py does not exist")
    return modules()[name]


# --- what may import what ---


def test_imports_only_go_down() -> None:
    upward = [
        str(each)
        for each in imports()
        if each.importer and each.imported and floor(each.imported) > floor(each.importer)
    ]
    assert upward == []


def test_no_imports_form_a_ring() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for each in imports():
        if not each.for_types and each.imported != each.importer:
            graph[each.importer].add(each.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a ring of imports: " + " <- ".join(error.args[1]))


def test_the_shelves_never_import_one_another() -> None:
    across = [
        str(each)
        for each in imports()
        if {top(each.importer), top(each.imported)} <= SHELVES.keys() and top(each.importer) != top(each.imported)
    ]
    assert across == []


def test_the_loop_knows_no_shelf() -> None:
    path_of("training")
    known = [str(each) for each in imports() if each.importer == "training" and top(each.imported) in SHELVES]
    assert known == []


@pytest.mark.parametrize("name", QUICK)
def test_importing_it_is_quick(name: str) -> None:
    path_of(name)
    module = f"{PACKAGE}.{name}".rstrip(".")
    program = f"import sys, {module}; print(*({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"importing {module} imports {done.stdout.strip()}"


@pytest.mark.parametrize("arguments", [["--help"], ["list", "methods"]], ids=" ".join)
def test_the_command_line_answers_at_once(arguments: list[str]) -> None:
    path_of("cli")
    ours = f"import sys; from {PACKAGE}.cli import main; sys.exit(main())"
    pairs = [(cpu_seconds(ours, arguments), cpu_seconds(STANDS_ON, [])) for _ in range(3)]
    best, yardstick = (min(times) for times in zip(*pairs, strict=True))
    assert best < max(MAX_CPU_SECONDS, SLACK * yardstick)  # a busy machine is slower for both


def cpu_seconds(program: str, arguments: list[str]) -> float:
    """The processor time of one call of a program, children and start of Python included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# --- the shelves ---


@pytest.mark.parametrize(("shelf", "table"), SHELVES.items())
def test_a_file_on_a_shelf_is_in_its_table(shelf: str, table: str) -> None:
    items = getattr(importlib.import_module(f"{PACKAGE}.{shelf}"), table)._items
    listed = {item.target.split(":")[0].split(".")[0] for item in items.values()}
    there = {name.split(".")[1] for name in modules() if name.startswith(f"{shelf}.")}
    assert there - {"base"} - HELPERS[shelf] == listed


@pytest.mark.parametrize(("shelf", "table"), SHELVES.items())
def test_what_is_in_a_table_can_be_taken(shelf: str, table: str) -> None:
    shelf_table = getattr(importlib.import_module(f"{PACKAGE}.{shelf}"), table)
    assert len(shelf_table) > 0, f"{table} is empty"
    for name in shelf_table:
        assert isinstance(shelf_table[name], type), name


# --- what no file does ---


def test_no_file_is_long() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_a_step_of_training_fits_on_one_screen() -> None:
    path_of("training")
    lengths = [
        (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(tree("training"))
        if isinstance(node, ast.FunctionDef) and node.name == "train_step"
    ]
    assert len(lengths) == 1, "training.py has one function train_step"
    assert lengths[0] < MAX_LINES_OF_TRAIN_STEP


def test_nothing_runs_what_it_reads_and_nothing_prints() -> None:
    found = [
        f"{name}:{line}: {what}"
        for name in modules()
        for node in ast.walk(tree(name))
        for line, what in _forbidden(node)
        if (name, what) != THE_ONE_READER
    ]
    assert found == []


def _forbidden(node: ast.AST) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called in FORBIDDEN_CALLS:
            yield node.lineno, f"{called}()"
        for keyword in node.keywords:
            if keyword.arg in FORBIDDEN_ARGUMENTS and _is(keyword.value, FORBIDDEN_ARGUMENTS[keyword.arg]):
                yield node.lineno, f"{keyword.arg}={FORBIDDEN_ARGUMENTS[keyword.arg]}"
    elif isinstance(node, ast.Import | ast.ImportFrom):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
        yield from ((node.lineno, f"import {name}") for name in names if top(name) in FORBIDDEN_MODULES)


def _is(value: ast.expr, constant: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


@pytest.mark.parametrize(
    "line",
    [
        "print(1)",
        "import pickle",
        "from pickle import loads",
        "torch.load(path, weights_only=True)",
        "eval(text)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "yaml.load(text, Loader)",
    ],
)
def test_the_rule_sees_what_it_forbids(line: str) -> None:
    assert [what for node in ast.walk(ast.parse(line)) for what in _forbidden(node)]
