"""The numbers around a budget of divergence: how it is given, what counts as kept, what training and merging aim at.

All are multiples of the budget; docs/decisions/0015 says why.
"""

from typing import Annotated

from pydantic import AfterValidator

KEPT_UP_TO = 1.1  # the final divergence is at most this
USED_UP_FROM = 0.8  # and at least this, or the budget was not needed in full
STEERED_TO = 1.1  # lambda aims here: merging takes back what is over, but nothing brings back what was not used
MERGED_TO = 0.95  # merging aims at the middle between USED_UP_FROM and KEPT_UP_TO


def _positive(budget: float | dict[str, float]) -> float | dict[str, float]:
    for nats in budget.values() if isinstance(budget, dict) else (budget,):
        if nats <= 0:
            raise ValueError(f"a budget must be greater than 0, in nats per token (given {nats:g})")
    if budget == {}:
        raise ValueError("no mode has a budget: give a number, {unprompted: 0.02, chat: 0.02}, or null")
    return budget


# Nats per token: a number for text without a prompt and for chats, or a number for each mode of the probe.
Budget = Annotated[float | dict[str, float], AfterValidator(_positive)]
