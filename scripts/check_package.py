"""Builds the wheel and proves it whole: every file of the package is in it, and its own copy answers.

A wheel leaves files out silently (a pattern in .gitignore is enough); an editable install never shows it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build(Path(scratch))
        compare(wheel)
        try_out(wheel, Path(scratch) / "installed")
    print(f"{wheel.name} is whole.")


def build(scratch: Path) -> Path:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", scratch, ROOT], check=True)
    return next(scratch.glob("*.whl"))


def compare(wheel: Path) -> None:
    """Every file in the source is in the wheel, and nothing else is (but its metadata)."""
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if ".dist-info/" not in name and not name.endswith("/")}
    source = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    if packed != source:
        sys.exit(f"Not in the wheel: {sorted(source - packed)}. Only in the wheel: {sorted(packed - source)}.")


def try_out(wheel: Path, target: Path) -> None:
    """The wheel's own files import and answer, away from the repository."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(pip, check=True)
    program = (
        "import sys, peft_mllm; from peft_mllm.cli import main; "
        f"assert peft_mllm.__file__.startswith({str(target)!r}), peft_mllm.__file__; sys.exit(main())"
    )
    # Before the environment's site-packages, where the editable install points to the repository.
    environment = {**os.environ, "PYTHONPATH": str(target)}
    command = [sys.executable, "-c", program, "list", "methods"]
    subprocess.run(command, cwd=target, env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
