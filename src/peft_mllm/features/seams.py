"""Where the computation of an image's features is cut: behind a frozen connector, or before one that trains.

    image -> pixels -> [ vision tower -> connector ] -> features -> decoder        all frozen: the features are kept
    image -> pixels -> [ vision tower ] -> connector -> features -> decoder        what the connector reads is kept

For the second cut nothing is known of the model but which modules are its tower. What they return is recorded once;
the model's own `get_image_features` then runs with those modules answering from the record. Which of the returned
tensors the connector reads is asked of autograd: those through which a gradient comes. Of the others the shape is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_mllm.features.entry import Entry, UnfitError, joined, moved, rows_in, tensors_of

UNREAD = frozenset({"last_hidden_state", "hidden_states", "attentions"})
"""Fields of transformers' vision outputs that no model reads once `pooler_output` holds the features."""


class Seam(ABC):
    """A cut through `get_image_features`.

    Args:
        compute: the model's own method.
        model: whose device it is.
    """

    name: str

    def __init__(self, compute: Callable[..., Any], model: nn.Module):
        self.compute, self.model = compute, model
        self._kind: type[Any] | None = None
        self._in_a_row: frozenset[str] = frozenset()

    @abstractmethod
    def record(self, arguments: Mapping[str, Any]) -> Entry:
        """What is kept of some images, from the arguments of `get_image_features`."""

    @abstractmethod
    def play(self, entries: Sequence[Entry]) -> Any:
        """What `get_image_features` returns for the images of all entries."""

    def learn(self, apart: Sequence[Any], together: Any) -> None:
        """See from the outputs of some images apart and together how several become one."""
        self._kind = type(together) if isinstance(together, Mapping) else None
        self._in_a_row = frozenset(rows_in([read(output) for output in apart], read(together)))

    def _all_of(self, outputs: Sequence[Any]) -> Any:
        """The outputs of several images as one, in the model's own class."""
        whole = joined(outputs, in_a_row=self._in_a_row)
        return self._kind(**whole) if self._kind is not None else whole

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def read(output: Any) -> Any:
    """What of an output of `get_image_features` a model reads: a tensor, or some fields."""
    if isinstance(output, Tensor):
        return output
    if not isinstance(output, Mapping):
        raise UnfitError(f"its get_image_features returns a {type(output).__name__}")
    return {name: value for name, value in output.items() if value is not None and name not in UNREAD}


def beside_pixels(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are no pixels: grids and sizes, which a forward may want, too."""
    return {name: value for name, value in arguments.items() if "pixel" not in name}


def _rows(arguments: Mapping[str, Any]) -> int:
    """The first size of the pixels, by which models tell one image's from another's."""
    if "pixel_values" not in arguments:
        raise UnfitError("its images are no pixel_values")
    return len(arguments["pixel_values"])


class AfterConnector(Seam):
    """Everything is frozen: the features themselves are kept."""

    name = "after the connector"

    def record(self, arguments: Mapping[str, Any]) -> Entry:
        """The features, and the arguments beside the pixels."""
        with torch.no_grad():
            output = read(self.compute(**moved(arguments, self.device)))
        return Entry.of({"rows": _rows(arguments), "arguments": beside_pixels(arguments), "output": output})

    def play(self, entries: Sequence[Entry]) -> Any:
        """The features."""
        return self._all_of([moved(entry.value()["output"], self.device) for entry in entries])


class BeforeConnector(Seam):
    """The connector trains: what it reads of the tower is kept.

    Args:
        compute: the model's own method.
        model: whose device it is.
        tower: the frozen modules.

    Attributes:
        together: whether the connector gives for several images at once what it gives for each.
    """

    name = "before the connector"

    def __init__(self, compute: Callable[..., Any], model: nn.Module, tower: Sequence[nn.Module]):
        super().__init__(compute, model)
        self.tower = tower
        self.together = False
        self._kinds: dict[int, type[Any]] = {}

    def record(self, arguments: Mapping[str, Any]) -> Entry:
        """What the tower's modules return, and the arguments; of pixels the shape."""
        given = moved(arguments, self.device)
        calls: list[tuple[int, Any]] = []
        with torch.no_grad(), self._heard(calls):
            self.compute(**given)
        if not calls:
            raise UnfitError("its get_image_features does not call the vision tower")
        leaves: list[Tensor] = []
        answers = [(number, _leafed(output, leaves)) for number, output in calls]
        with torch.enable_grad():
            features = [each for each in tensors_of(read(self._continued(answers, given))) if each.requires_grad]
            gradients = torch.autograd.grad([each.float().sum() for each in features], leaves, allow_unused=True)
        blank = {id(leaf) for leaf, gradient in zip(leaves, gradients, strict=True) if gradient is None}
        if len(blank) == len(leaves):
            raise UnfitError("its features do not come from the vision tower")
        blank |= {id(value) for name, value in arguments.items() if "pixel" in name}
        kept = {"rows": _rows(arguments), "arguments": dict(arguments), "calls": [list(answer) for answer in answers]}
        return Entry.of(kept, keep=lambda tensor: id(tensor) not in blank)

    def play(self, entries: Sequence[Entry]) -> Any:
        """What the connector, as it is now, makes of them."""
        values = [moved(entry.value(), self.device) for entry in entries]
        if self.together:
            with suppress(ValueError, RuntimeError):  # images of unequal form do not lie in one tensor
                values = [joined(values)]
        return self._all_of([read(self._continued(value["calls"], value["arguments"])) for value in values])

    def _continued(self, answers: Sequence[Sequence[Any]], arguments: Mapping[str, Any]) -> Any:
        """The model's own method with a tower that answers from the record."""
        coming: dict[int, list[Any]] = {number: [] for number in range(len(self.tower))}
        for number, output in answers:
            # in its own class, and anew: some models write into it
            coming[number].append(self._kinds[number](**output) if isinstance(output, Mapping) else output)
        with _answering(self.tower, coming):
            return self.compute(**arguments)

    @contextmanager
    def _heard(self, calls: list[tuple[int, Any]]) -> Iterator[None]:
        """Note what the tower's modules return."""

        def note(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, Mapping):
                    self._kinds[number] = type(output)
                calls.append((number, dict(output) if isinstance(output, Mapping) else output))

            return hook

        hooks = [module.register_forward_hook(note(number)) for number, module in enumerate(self.tower)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _answering(modules: Sequence[nn.Module], coming: Mapping[int, list[Any]]) -> Iterator[None]:
    """Let modules return what is coming for each, instead of computing."""
    own = [vars(module).get("forward") for module in modules]
    for number, module in enumerate(modules):
        vars(module)["forward"] = partial(_next, coming[number])
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


def _next(coming: list[Any], *args: Any, **kwargs: Any) -> Any:
    return coming.pop(0)


def _leafed(value: Any, leaves: list[Tensor]) -> Any:
    """A value whose tensors of real numbers ask for gradients, each of them in `leaves`."""
    if isinstance(value, Tensor) and value.is_floating_point():
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1]
    if isinstance(value, Mapping):
        return {name: _leafed(item, leaves) for name, item in value.items()}
    return type(value)(_leafed(item, leaves) for item in value) if isinstance(value, list | tuple) else value
