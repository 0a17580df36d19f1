"""Stay near the base's distribution where the target is learned."""

from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from cfsd.train.methods.method import AlongSpec, Method, TargetDivergence


class HoldTarget(Method):
    """weight x KL(base || model) at each token of the target's responses, on top of its loss.

    The rehearsal's divergence is on the base's own text; this one is along the target's. With `dft.power` 1 it is ASFT.

    Source: arXiv:2509.23753 (ASFT, weight 0.1). Differs: the divergence is the whole one in either form (`stored`: by
    samples outside the top, unbiased whichever text it is on), and has no factor of DFT.
    """

    strength: ClassVar[str] = "weight"

    weight: NonNegativeFloat = Field(
        0.0, description="Multiplies the divergence at each target token, as rows and tokens are weighed; 0: off"
    )
    reference: Literal["stored", "base"] = Field(
        "stored", description="The base as stored along the target before the training, or the base in memory"
    )
    top_logprobs: PositiveInt = Field(64, description="stored: likeliest tokens of the base kept at each target token")
    tail_samples: PositiveInt = Field(16, description="stored: samples of the other tokens, which stand for them")

    def is_on(self) -> bool:
        """Say whether there is a weight."""
        return self.weight > 0

    def _identity(self) -> dict[str, Any]:
        stored = ("top_logprobs", "tail_samples") if self.reference == "base" else ()
        return {name: value for name, value in super()._identity().items() if name not in stored}

    def divergence(self) -> TargetDivergence:
        """Return the divergence on the target."""
        along = AlongSpec(top_logprobs=self.top_logprobs, tail_samples=self.tail_samples)
        return TargetDivergence(self.weight, None if self.reference == "base" else along)
