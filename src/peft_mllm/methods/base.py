"""The contract of a method: how a frozen model becomes trainable, said in the roles of an anatomy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from peft_mllm.anatomy import Anatomy, Location
from peft_mllm.errors import MethodError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig


class MethodOptions(BaseModel):
    """What a user may set for a method; each method derives its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LocatedOptions(MethodOptions):
    """Options of a method that works on the linears of a location."""

    location: Location = "both"
    """attention, mlp, or both."""


Opts = TypeVar("Opts", bound=MethodOptions)


class Method(ABC, Generic[Opts]):
    """One way to make a frozen model trainable.

    A method is final: it derives from this class and nothing derives from it. Its module imports peft only
    inside `peft_config`, so that listing methods and their options needs no torch.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    learning_rate: ClassVar[float]
    """The default, from the paper where it has one."""
    tunes_llm: ClassVar[bool] = True
    """Whether it trains anything of the language model; a run stops when a method that should does not."""
    size: ClassVar[str | None] = None
    """The option that says how much it trains, such as a rank; None for a method that has one size."""

    def __init__(self, options: Opts):
        self.options = options

    def sized(self, size: int) -> dict[str, object]:
        """Options that give this method another size and leave its strength as it is."""
        return {self.size: size} if self.size else {}

    @abstractmethod
    def peft_config(self, anatomy: Anatomy, config: PretrainedConfig) -> PeftConfig | None:
        """The PEFT configuration for a model, or None for a method that trains the model's own parameters.

        Args:
            anatomy: names of the model's parts.
            config: the language model's transformers configuration.

        Raises:
            MethodError: a location or switch has no effect on this model.
        """

    def initialise(self, model: PeftModel, anatomy: Anatomy) -> None:
        """Set starting values that the configuration cannot say; most methods have none."""
        return

    def trains(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Module paths whose own parameters train; only for a method without a PEFT configuration."""
        return ()


def targets(anatomy: Anatomy, roles: tuple[str, ...], *, wanted: str) -> str:
    """The pattern of the linears with these roles; raises when the family has none of them.

    Args:
        anatomy: names of the model's parts.
        roles: the roles, e.g. ("k", "v").
        wanted: what asked for them, for the message: "ia3 at attention".
    """
    pattern = anatomy.pattern(roles)
    if pattern is None:
        has = ", ".join(anatomy.roles("both"))
        raise MethodError(f"{wanted} has no effect: it works on {', '.join(roles)}, this model's linears are {has}.")
    return pattern
