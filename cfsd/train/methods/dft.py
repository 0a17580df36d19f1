"""Learn a token the less, the less likely the model finds it."""

from typing import ClassVar

from pydantic import Field, NonNegativeFloat

from cfsd.train.methods.method import Method, Weigh


class Dft(Method):
    """Dynamic fine-tuning: the loss of a target token is p^power x -log p, the first factor without a gradient.

    Source: Wu et al. 2025, arXiv:2508.05629: power 1.
    Differs: the mean is over all target tokens of the global batch, so that a step is shorter than without weights.
    """

    strength: ClassVar[str] = "power"

    power: NonNegativeFloat = Field(
        0.0, description="Of the token's probability, by which its loss is multiplied; 1: the paper; 0: off"
    )

    def is_on(self) -> bool:
        """Say whether there is a power."""
        return self.power > 0

    def weigh(self) -> Weigh:
        """Return the factor p^power."""
        return Weigh(factor=lambda tokens: tokens.probability**self.power)
