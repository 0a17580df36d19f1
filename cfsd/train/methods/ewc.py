"""Stay near the base's weights, most where the base's own text depends on them."""

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveInt

from cfsd.train.methods.method import Method

if TYPE_CHECKING:
    from cfsd.train.methods.anchors import Anchors, Penalty


class Ewc(Method):
    """weight / 2 x sum of F (theta - theta*)^2, F the diagonal of the Fisher matrix per token; see `cfsd.train.fisher`.

    Source: Kirkpatrick et al. 2016, arXiv:1612.00796, equation 3.
    Differs: F is of the model's own law, from text sampled without a context, and per token: the sum's half then
    approximates the divergence in nats per token (along the diagonal), so that `weight` is on the scale of the
    rehearsal's weight.
    """

    holds_base_weights: ClassVar[bool] = True

    weight: NonNegativeFloat = Field(
        0.0, description="Multiplies the divergence from the base as the Fisher matrix's diagonal tells it; 0: off"
    )
    rows: PositiveInt = Field(256, description="Context-free rows of the corpus that the Fisher matrix is computed on")

    def is_on(self) -> bool:
        """Say whether there is a weight."""
        return self.weight > 0

    def penalty(self, anchors: "Anchors", fisher: "Anchors | None") -> "Penalty | None":
        """Return the pull; its figure is half the sum of F (theta - theta*)^2, nats per token."""
        from cfsd.train.methods.anchors import Penalty

        if not self.is_on():
            return None
        assert fisher, "a training with ewc is given the Fisher matrix"
        return Penalty("ewc", self.weight / 2, anchors, fisher, figure=lambda total: total / 2)
