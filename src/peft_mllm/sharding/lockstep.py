"""Keeping processes in step: weights in pieces are put together by all processes at once, or not at all.

A process that computes nothing, because its share of the questions is done, must still give its pieces to the others.
So before each forward a process says that it computes; one that is done listens, and hands its pieces over in the order
in which a forward asks for them:

    process 0   forward   forward   forward   done
    process 1   forward   done ...  hands over  done

Nothing of this is needed where all processes compute equally often, as in a step of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Lockstep:
    """The forwards of a model whose weights are in pieces.

    Args:
        first: the modules of which one is called first in a forward; the pieces of `groups[0]` are theirs.
        groups: modules, in the order in which a forward puts their weights together; each of them once.
        inner: how many of them are called in `outer`; those after them may not be called at all.
        outer: a module whose end is that of a forward, also of one that failed.
        gather: puts a group's weights together.
        release: lets go of them.
        recover: after a forward that failed.
        device: where small messages are.
    """

    def __init__(
        self,
        first: Sequence[nn.Module],
        groups: Sequence[nn.Module],
        inner: int,
        outer: nn.Module,
        *,
        gather: Callable[[nn.Module], None],
        release: Callable[[nn.Module], None],
        recover: Callable[[], None],
        device: torch.device,
    ):
        self._groups, self._gather, self._release, self._recover = groups, gather, release, recover
        self._inner, self._device = inner, device
        self._listening = False
        self._reached = len(groups)  # by the present forward; all of them between two
        for module in first:
            module.register_forward_pre_hook(self._begin, prepend=True)
        for number, group in enumerate(groups):
            group.register_forward_pre_hook(self._at(number), prepend=True)
        outer.register_forward_hook(self._left, always_call=True)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Until all processes are at the end of this context, each computes as often as it likes, without gradients.

        Where it raises, the others wait in vain: the error must end this process, and with it the run.
        """
        if self._listening:
            yield
            return
        self._listening, self._reached = True, len(self._groups)
        try:
            yield
            self._complete()
            while self._anybody(computes=False):
                self._reached = 0
                self._complete()
        finally:
            self._listening = False

    def _begin(self, module: nn.Module, args: Any) -> None:
        """Before the first of a forward's modules, and before others that may be it."""
        if not self._listening or 0 < self._reached < self._inner:
            return
        self._complete()
        self._anybody(computes=True)
        self._reached = 1
        self._gather(self._groups[0])

    def _at(self, number: int) -> Callable[[nn.Module, Any], None]:
        def reach(module: nn.Module, args: Any) -> None:
            if number and self._listening:
                self._reached = number + 1

        return reach

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._listening and (output is None or self._reached < self._inner):
            self._recover()
            self._complete()

    @torch.no_grad()
    def _complete(self) -> None:
        """Hand over what of a forward is left, as after one that failed or did not ask for the head."""
        for group in self._groups[self._reached :]:
            self._gather(group)
            self._release(group)
        self._reached = len(self._groups)

    def _anybody(self, *, computes: bool) -> bool:
        """Whether any process is about to compute; they all say whether they are."""
        said = torch.tensor(int(computes), device=self._device)
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said.item())
