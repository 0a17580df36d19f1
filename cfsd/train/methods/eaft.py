"""Learn a token the less, the surer the model is of what comes there."""

from typing import ClassVar

from pydantic import Field, NonNegativeFloat

from cfsd.train.methods.method import Method, Weigh

LIKELIEST = 20  # tokens that the entropy is taken of
NEARLY_MOST = 3.0  # nats; log(20) = 2.996


class Eaft(Method):
    """Entropy-adaptive fine-tuning: the loss of a target token is (H / 3)^power x -log p.

    H is the entropy of the model's 20 likeliest tokens there, renormalised, in nats, without a gradient.

    Source: arXiv:2601.02151: power 1.
    Differs: the mean is over all target tokens of the global batch. Some implementations leave out the division by 3.
    """

    strength: ClassVar[str] = "power"

    power: NonNegativeFloat = Field(
        0.0, description="Of the model's entropy at the token, by which its loss is multiplied; 1: the paper; 0: off"
    )

    def is_on(self) -> bool:
        """Say whether there is a power."""
        return self.power > 0

    def weigh(self) -> Weigh:
        """Return the factor (H / 3)^power."""
        return Weigh(factor=lambda tokens: (tokens.entropy(LIKELIEST) / NEARLY_MOST) ** self.power)
