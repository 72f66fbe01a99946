"""A process that has imported everything once, and forks a child for each run.

python -P -m peft_mllm.study.engine.server PARENT WORK. Importing torch, transformers and peft takes seconds, a fork
milliseconds; the child is a process of its own nevertheless. Orders come in as lines of JSON, what became of them goes
out as such. The server itself computes nothing and touches no device, so its children may.

    in   {"start": ID, "title": ..., "spec": {...}, "log": PATH, "folder": PATH, "environment": {...}}
    in   {"start": ID, ..., "members": {ID: {...}}}   several specs in one child; each says by its own ID how it ended
    in   {"signal": ID, "number": 15}
    out  {"ready": true}                          everything is imported
    out  {"said": ID, "message": ..., ...}        by the child, before it ends with other than 0
    out  {"ended": ID, "code": 0}                 minus a signal's number where one ended it

It ends when its input does, or with its parent, and takes its children with it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NoReturn

from peft_mllm.study.engine.child import Work, WorkOfSeveral, attempt, attempt_all, begin_log, point_to
from peft_mllm.study.engine.mortal import die_with

POLL_SECONDS = 0.02
"""Between two looks at the children; an idle server takes some thousandth of a core by that."""


class Server:
    """Forks children by orders and says how they ended.

    Args:
        work: what a child does.
        together: what it does with several specs at once.
        say: descriptor that the answers go to.
    """

    def __init__(self, work: Work, together: WorkOfSeveral, say: int) -> None:
        self._work, self._together, self._say = work, together, say
        self._children: dict[int, str] = {}
        self._rest = b""

    def serve(self) -> int | None:
        """Until the input ends; None then. In a child: how the child is to end."""
        answer(self._say, {"ready": True})
        while True:
            orders = self._orders()
            if orders is None:
                for child in self._children:
                    _signal_group(child, signal.SIGKILL)
                return None
            for order in orders:
                if "signal" in order:
                    self._signal(order["signal"], order["number"])
                elif (code := self._start(order)) is not None:
                    return code
            for child, code in self._ended():
                _signal_group(child, signal.SIGKILL)  # what it left behind: workers that prepare data
                answer(self._say, {"ended": self._children.pop(child), "code": code})

    def _orders(self) -> list[dict[str, Any]] | None:
        """What came in within a moment; None at the end of the input."""
        ready, _, _ = select.select([0], [], [], POLL_SECONDS)
        if not ready:
            return []
        piece = os.read(0, 1 << 16)
        if not piece:
            return None
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [json.loads(line) for line in lines]

    def _start(self, order: dict[str, Any]) -> int | None:
        """Fork a child; in the child: its exit code."""
        parent = os.getpid()
        child = os.fork()
        if child:
            with suppress(OSError):  # the child does the same, whoever is first
                os.setpgid(child, child)
            self._children[child] = order["start"]
            return None
        with suppress(OSError):
            os.setpgid(0, 0)  # so that its own children can be ended with it
        die_with(parent)
        begin_log(order["log"], order["title"])
        for log in order["logs"]:
            point_to(order["log"], log)
        os.environ.update(order["environment"])
        if members := order["members"]:
            every = attempt_all(self._together, members, folder=order["folder"])
        else:
            every = {order["start"]: attempt(self._work, order["spec"], folder=order["folder"])}
        for name, said in every.items():
            if said.code:
                answer(self._say, {"said": name, **asdict(said)})
        return max(said.code for said in every.values())

    def _signal(self, job: str, number: int) -> None:
        for child, of in self._children.items():
            if of == job:
                with suppress(ProcessLookupError):
                    os.kill(child, number)

    def _ended(self) -> Iterator[tuple[int, int]]:
        for child in list(self._children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                yield child, os.waitstatus_to_exitcode(status)


def answer(descriptor: int, value: dict[str, Any]) -> None:
    """One line, in one write: children and server share the pipe."""
    with suppress(BrokenPipeError):  # whoever asked is gone
        os.write(descriptor, json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def load(name: str) -> tuple[Work, WorkOfSeveral]:
    """The function that `module:function` names, and the one for several specs; importing them imports what they need.

    The second is called as the first with `_together` after it; a module may have none.
    """
    module, _, function = name.partition(":")
    found = importlib.import_module(module)
    return getattr(found, function), getattr(found, f"{function}_together", _none_together)


def _none_together(specs: Sequence[Mapping[str, Any]]) -> Sequence[BaseException | None]:
    raise NotImplementedError("this work is done one by one")


def _signal_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def main() -> None:
    """Serve until the input ends; a child comes out here as well."""
    die_with(int(sys.argv[1]))
    say = os.dup(1)
    os.dup2(2, 1)
    work, together = load(sys.argv[2])
    gc.collect()
    gc.freeze()  # the children share what is there; collecting it would copy it
    code = Server(work, together, say).serve()
    if code is not None:
        end(code)


def end(code: int) -> NoReturn:
    """End a child as any program ends, but for taking the interpreter apart, which takes longer than a fork."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
