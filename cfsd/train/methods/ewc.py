"""Stay near the base's weights, most where the base's own text depends on them."""

from typing import ClassVar

from pydantic import Field, NonNegativeFloat, PositiveInt

from cfsd.train.methods.method import Estimate, Method, Pull


class FisherSpec(Estimate):
    """How well the Fisher matrix is estimated; see `cfsd.train.methods.fisher`."""

    noun: ClassVar[str] = "Fisher matrix"


class Ewc(Method):
    """weight / 2 x sum of F (theta - theta*)^2, F the diagonal of the Fisher matrix per token.

    Its figure is half the sum of F (theta - theta*)^2, in nats per token.

    Source: Kirkpatrick et al. 2016, arXiv:1612.00796, equation 3.
    Differs: F is of the model's own distribution, from text sampled without a context, and per token: the sum's half
    then approximates the divergence in nats per token (along the diagonal), so that `weight` is on the scale of the
    rehearsal's weight.
    """

    strength: ClassVar[str] = "weight"

    weight: NonNegativeFloat = Field(
        0.0, description="Multiplies the divergence from the base as the Fisher matrix's diagonal estimates it; 0: off"
    )
    rows: PositiveInt = Field(256, description="Context-free rows of the corpus that the Fisher matrix is computed on")

    def is_on(self) -> bool:
        """Say whether there is a weight."""
        return self.weight > 0

    def pull(self) -> Pull:
        """Return the pull towards the base's weights by the Fisher matrix."""
        return Pull(self.weight / 2, figure=lambda total: total / 2, curvature=FisherSpec(rows=self.rows))
