"""Learn only the tokens that do not surprise the base."""

import math
from typing import ClassVar

from pydantic import Field, NonNegativeFloat, field_validator

from cfsd.train.methods.method import Method, Weigh


class Stm(Method):
    """Selective token masking: only target tokens whose perplexity under the base is at most `threshold` are learned.

    The mean is over those of the global batch: the others are not part of the target's loss.

    Source: Wu et al. 2025, arXiv:2501.14315; their code's threshold is 2.5.
    """

    strength: ClassVar[str] = "threshold"

    threshold: NonNegativeFloat = Field(
        0.0,
        description="Perplexity under the base, 1 / p, above which a target token is not learned; 2.5 in the authors' "
        "code; 0: off",
    )

    @field_validator("threshold")
    @classmethod
    def _keeps_something(cls, threshold: float) -> float:
        if 0 < threshold < 1:
            raise ValueError(f"{threshold}: no perplexity is below 1, so no token would be learned; 1 or more, 0: off")
        return threshold

    def is_on(self) -> bool:
        """Say whether there is a threshold."""
        return self.threshold > 0

    def weigh(self) -> Weigh:
        """Return which tokens are learned."""
        return Weigh(learned=lambda nll: nll <= math.log(self.threshold))
