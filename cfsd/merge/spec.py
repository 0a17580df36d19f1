"""Settings of the merge stage."""

from collections.abc import Collection
from typing import Any, ClassVar

from pydantic import Field

from cfsd.budget import Budget
from cfsd.errors import BadInput
from cfsd.generate.spec import UNPROMPTED
from cfsd.spec import Spec
from cfsd.stages import CHAT


class MergeSpec(Spec):
    """WiSE-FT: interpolate the weights after training."""

    neutral: ClassVar[dict[str, Any]] = {"budget": None}

    alpha: float = Field(1.0, ge=0, le=1, description="Weight of the tuned model; 1: as trained, 0: the base")
    budget: Budget | None = Field(
        None,
        description="Divergence that is accepted, in nats per token: alpha is lowered until it is kept in every mode; "
        "a number for unprompted and chat, or {mode: nats, …}; empty: train.rehearsal.budget, if there is one",
    )

    def keeping(self, budgets: dict[str, float]) -> "MergeSpec":
        """Return the settings with the budgets of the modes that are measured, as a number where it is that of one."""
        alone = budgets.get(UNPROMPTED) if len(budgets) == 1 else None
        return self.model_copy(update={"budget": alone or budgets or None})


def budgets_of(budget: Budget | None, modes: Collection[str]) -> dict[str, float]:
    """Return the budget of each of the `modes`, as they are measured, that has one, in their order.

    A number is that of text without a prompt and, where they are measured, of chats.
    """
    if isinstance(budget, dict):
        return {mode: budget[mode] for mode in modes if mode in budget}
    return {mode: budget for mode in modes if mode in (UNPROMPTED, CHAT)} if budget else {}


def check_budgeted(budget: Budget | None, modes: Collection[str]) -> None:
    """Raise BadInput where a mode has a budget that is not among the measured `modes`."""
    if unknown := [mode for mode in budget if mode not in modes] if isinstance(budget, dict) else []:
        raise BadInput(
            f"a budget is given for {', '.join(unknown)}, but with this base the probe has the modes "
            f"{', '.join(modes)}; correct the budget, or add the mode to probe.modes"
        )
