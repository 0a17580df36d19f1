"""Lambda over the steps of a training: constant, on a schedule, or steered so that a divergence budget is used up."""

import math
from collections.abc import Mapping
from typing import Any

from cfsd.budget import STEERED_TO
from cfsd.train.spec import RehearsalSpec

LOWEST, HIGHEST = 1e-5, 1e2
HORIZON = 0.8  # what the moving mean keeps of itself at each step: it looks back about five steps
GAIN = 4.0  # how much more the present log error weighs than what all steps have added up to
BELOW, ABOVE = -1.0, 0.4  # a log error counts no further than this: early training overshoots, and that passes

STATE = ("log_weight", "log_error", "nats", "tokens")


class Controller:
    """Gives lambda for each step; with a budget it learns from the divergence that each step measured.

    With e = log(estimate / (STEERED_TO x budget)), between BELOW and ABOVE: log lambda = sum of rate x e over
    the steps + GAIN x e. The estimate is a moving mean, weighted by tokens, of the divergence before the update
    on rehearsal rows that were never seen: rows seen before read low, and the probe is kept for the verdict. The budget
    is that of text without a prompt: of other modes nothing is seen while training, so merging alone keeps theirs.

    Source: CFSD's own rule. Differs from a plain integral of (estimate / budget - 1), as dual ascent would have it: the
    error is a logarithm within bounds, has a part in proportion, and lambda may fall to LOWEST.

    The sum alone follows too late: it winds down while the divergence is still small, lets it overshoot, and has
    brought it far below the budget when the learning rate ends. Measured on `tiny`: docs/decisions/0010.
    """

    def __init__(self, spec: RehearsalSpec, steps: int) -> None:
        """Start at `spec.weight` for a training of `steps`."""
        self.spec, self.steps, self.budget = spec, steps, spec.steered_to()
        self.log_weight = math.log(spec.weight) if spec.weight else -math.inf
        self.log_error = 0.0
        self.nats, self.tokens = 0.0, 0.0

    def weight(self, step: int) -> float:
        """Return lambda for step `step`, counted from 0."""
        if self.budget:
            return math.exp(_within(self.log_weight + GAIN * self.log_error))
        if not self.spec.final_weight:
            return self.spec.weight
        share = step / max(1, self.steps - 1)
        return math.exp((1 - share) * self.log_weight + share * math.log(self.spec.final_weight))

    @property
    def estimate(self) -> float | None:
        """The moving mean, nats per token; None before the first row was measured."""
        return self.nats / self.tokens if self.tokens else None

    def learn(self, nats: float, tokens: int) -> None:
        """Take in a step's divergence, summed over `tokens` of rows seen for the first time."""
        if not tokens:
            return
        self.nats, self.tokens = HORIZON * self.nats + nats, HORIZON * self.tokens + tokens
        if self.budget:
            estimate, aim = self.nats / self.tokens, STEERED_TO * self.budget
            self.log_error = min(max(math.log(estimate / aim) if estimate > 0 else BELOW, BELOW), ABOVE)
            self.log_weight = _within(self.log_weight + self.spec.budget_rate * self.log_error)

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must hold."""
        return {name: getattr(self, name) for name in STATE}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        for name in STATE:
            setattr(self, name, float(state[name]))


def _within(log_weight: float) -> float:
    return min(max(log_weight, math.log(LOWEST)), math.log(HIGHEST))
