"""Runs the commands that the documents promise: each fenced bash block with `<!-- ci -->` on the line before.

    python scripts/readme_commands.py README.md docs

The blocks run in the order in which they stand, in the root of the repository, with the virtual environment
active; the first that fails ends it, and is named by file and line.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

BLOCK = re.compile(r"^<!-- ci -->\n```bash\n(?P<commands>.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"^<!-- ci -->", re.MULTILINE)


class Block(NamedTuple):
    """Commands, and the file and line where they stand."""

    place: str
    commands: str


def main() -> None:
    blocks = [block for path in documents(sys.argv[1:]) for block in read_blocks(path)]
    if not blocks:
        sys.exit("No bash block is marked with <!-- ci -->: no command of the documents is checked.")
    for block in blocks:
        run(block)


def documents(arguments: list[str]) -> Iterator[Path]:
    for path in map(Path, arguments):
        yield from sorted(path.rglob("*.md")) if path.is_dir() else [path]


def read_blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    blocks = [Block(f"{path}:{line_of(text, match.start())}", match["commands"]) for match in BLOCK.finditer(text)]
    if len(blocks) != len(MARK.findall(text)):
        sys.exit(f"{path}: a <!-- ci --> does not stand right before a ```bash block.")
    return blocks


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def run(block: Block) -> None:
    print(f"--- {block.place}\n{block.commands}", end="", flush=True)
    path = f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.commands],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{block.place}: these commands failed with exit code {done.returncode}.")
    print(f"--- {block.place}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
