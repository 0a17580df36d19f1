"""Stay near the base's weights."""

from typing import ClassVar

from pydantic import Field, NonNegativeFloat

from cfsd.train.methods.method import Method, Pull


class L2(Method):
    """weight x sum of (theta - theta*)^2 over the trainable parameters; its figure is the norm of theta - theta*.

    Source: Li, Grandvalet and Davoine 2018, L2-SP, arXiv:1802.01483, section 3.
    Differs: a sum, never divided by the number of parameters; no new head, so all weights have an anchor; without
    the paper's factor of one half.
    """

    strength: ClassVar[str] = "weight"

    weight: NonNegativeFloat = Field(
        0.0, description="Multiplies the sum of squared distances from the base's weights; 0: off. Try 0.001 to 1"
    )

    def is_on(self) -> bool:
        """Say whether there is a weight."""
        return self.weight > 0

    def pull(self) -> Pull:
        """Return the pull towards the base's weights."""
        return Pull(self.weight, figure=lambda total: total**0.5)
