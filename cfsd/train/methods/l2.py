"""Stay near the base's weights."""

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, NonNegativeFloat

from cfsd.train.methods.method import Method

if TYPE_CHECKING:
    from cfsd.train.methods.anchors import Anchors, Penalty


class L2(Method):
    """weight x sum of (theta - theta*)^2 over the trainable parameters.

    Source: Li, Grandvalet and Davoine 2018, L2-SP, arXiv:1802.01483, section 3.
    Differs: a sum, never divided by the number of parameters; no new head, so all weights have an anchor; without
    the paper's factor of one half.
    """

    holds_base_weights: ClassVar[bool] = True

    weight: NonNegativeFloat = Field(
        0.0, description="Multiplies the sum of squared distances from the base's weights; 0: off. Try 0.001 to 1"
    )

    def is_on(self) -> bool:
        """Say whether there is a weight."""
        return self.weight > 0

    def penalty(self, anchors: "Anchors", fisher: "Anchors | None") -> "Penalty | None":
        """Return the pull; its figure is the norm of theta - theta*."""
        from cfsd.train.methods.anchors import Penalty

        return Penalty("l2", self.weight, anchors, figure=lambda total: total**0.5) if self.is_on() else None
