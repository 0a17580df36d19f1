"""Lambda over the steps of a training: constant, on a schedule, or steered so that a divergence budget is used up."""

import math
from collections.abc import Mapping
from typing import Any

from cfsd.rehearsal import RehearsalSpec

LOWEST, HIGHEST = 1e-3, 1e2
HORIZON = 0.8  # what the moving mean keeps of itself at each step: it looks back about five steps
MOST = 2.0  # a surprise of more than this many budgets counts as this many


class Controller:
    """Gives lambda for each step; with a budget it learns from the divergence that each step measured.

    log lambda += rate x (estimate / budget - 1), where the estimate is a moving mean, weighted by tokens, of the
    divergence before the update on rehearsal rows that were never seen: rows seen before read low, and the probe is
    kept for the verdict. Between LOWEST and HIGHEST.
    """

    def __init__(self, spec: RehearsalSpec, steps: int) -> None:
        """Start at `spec.weight` for a training of `steps`."""
        self.spec, self.steps = spec, steps
        self.log_weight = math.log(spec.weight) if spec.weight else -math.inf
        self.nats, self.tokens = 0.0, 0.0

    def weight(self, step: int) -> float:
        """Return lambda for step `step`, counted from 0."""
        if self.spec.budget or not self.spec.final_weight:
            return math.exp(self.log_weight)
        share = step / max(1, self.steps - 1)
        return math.exp((1 - share) * self.log_weight + share * math.log(self.spec.final_weight))

    @property
    def estimate(self) -> float | None:
        """The moving mean, nats per token; None before the first row was measured."""
        return self.nats / self.tokens if self.tokens else None

    def learn(self, nats: float, tokens: int) -> None:
        """Take in a step's divergence, summed over `tokens` of rows seen for the first time."""
        if tokens:
            self.nats, self.tokens = HORIZON * self.nats + nats, HORIZON * self.tokens + tokens
        if self.spec.budget and tokens and self.estimate is not None:
            surprise = min(self.estimate / self.spec.budget - 1, MOST)
            moved = self.log_weight + self.spec.budget_rate * surprise
            self.log_weight = min(max(moved, math.log(LOWEST)), math.log(HIGHEST))

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must hold."""
        return {"log_weight": self.log_weight, "nats": self.nats, "tokens": self.tokens}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.log_weight, self.nats, self.tokens = (float(state[name]) for name in ("log_weight", "nats", "tokens"))
