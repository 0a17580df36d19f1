"""How the corpus takes part in training: which loss, of which weight, and how often a row may be seen."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from cfsd.spec import Spec


class RehearsalSpec(Spec):
    """The rehearsal's share of the loss: `weight` x mean loss per rehearsal token of the global batch."""

    steering: ClassVar[int] = 3  # raised when `cfsd.controller` steers otherwise: part of the digest with a budget

    weight: NonNegativeFloat = Field(
        1.0, description="Lambda: multiplies the rehearsal's mean loss per token; 0 draws no rehearsal row"
    )
    final_weight: PositiveFloat | None = Field(
        None, description="Lambda moves evenly in its logarithm from `weight` to here over the training; empty: stays"
    )
    loss: Literal["nll", "kl"] = Field(
        "nll", description="nll: -log p of the sampled tokens; kl: divergence from the base's law at each token"
    )
    reference: Literal["stored", "base"] = Field(
        "stored",
        description="kl only: the base's law as kept with the corpus (generate.top_logprobs), or the base in memory",
    )
    tail: Literal["sampled", "bucket"] = Field(
        "sampled", description="kl, stored: tokens outside the top as drawn (unbiased), or as one event (a lower bound)"
    )
    budget: PositiveFloat | None = Field(
        None, description="Divergence that is accepted, in nats per token: lambda is steered there, merging keeps it"
    )
    budget_rate: PositiveFloat = Field(
        0.2, description="How fast lambda follows: what each step adds to its logarithm at e times the budget"
    )
    refresh: Literal["cycle", "once", "fresh"] = Field(
        "cycle",
        description="cycle: all rows in turn, again and again; once: the first epoch's rows in every epoch; "
        "fresh: no row twice",
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.final_weight and not self.weight:
            raise ValueError("rehearsal.final_weight needs a weight above 0 to start from: set rehearsal.weight")
        if self.budget and self.final_weight:
            raise ValueError("rehearsal.budget steers the weight, final_weight schedules it: set one of them")
        if self.budget and not self.weight:
            raise ValueError("rehearsal.budget needs a rehearsal.weight above 0 to start from, such as 1")
        if self.budget and self.refresh == "once":
            raise ValueError(
                "rehearsal.budget reads the divergence on rows that were not seen before; with refresh: once there are "
                "none after the first epoch: leave refresh at cycle"
            )
        return self

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | ({"steering": self.steering} if self.budget else {})

    def reads_corpus(self) -> bool:
        """Say whether the training needs what the sampler stored with the corpus: laws or log-probabilities."""
        return bool(self.weight) and ((self.loss == "kl" and self.reference == "stored") or self.budget is not None)

    def needs_top(self) -> bool:
        """Say whether the corpus must hold the likeliest tokens of each position."""
        return bool(self.weight) and self.loss == "kl" and self.reference == "stored"
