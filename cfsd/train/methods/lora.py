"""Train two small matrices beside each large one."""

from typing import ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt

from cfsd.train.methods.method import Adapter, Method


class Lora(Method):
    """W = W* + (alpha / rank) B A, only A and B trained, B = 0 at the start; with PEFT.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    Differs: all linear layers but the head, where the paper takes the attention's query and value.
    """

    strength: ClassVar[str] = "rank"
    unsharded: ClassVar[str | None] = "LoRA's frozen weights are not sharded here"

    rank: NonNegativeInt = Field(
        0, description="Width of the added matrices; 0: off. Wants about ten times the learning rate of full training"
    )
    alpha: PositiveInt | None = Field(None, description="The added product is multiplied by alpha / rank; empty: rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="Of the added path's input, in training")
    targets: tuple[str, ...] = Field(
        (),
        description="Names of the layers that get one, such as [q_proj, v_proj], or of experts' weights, such as "
        "gate_up_proj; empty: all linear ones but the head",
    )

    def is_on(self) -> bool:
        """Say whether there is a rank."""
        return self.rank > 0

    def adapter(self) -> Adapter:
        """Return the matrices to be trained."""
        return Adapter(self.rank, self.alpha or self.rank, self.dropout, self.targets)
