"""Train only what is orthogonal to the largest directions of each layer's weights."""

from typing import ClassVar

from pydantic import Field

from cfsd.train.methods.method import Method, TrainedAdapter


class Osft(Method):
    """W = U S V, of which the `preserved` share of directions with the largest singular values stays as it is.

    The others' factors are trained, orthogonal to the ones that stay; with PEFT's OSF.

    Source: Nayak et al. 2025, arXiv:2504.07097.
    Differs: the same share in every layer; not only gradients are projected but, after each step, the factors too, or
    AdamW's steps would leave the space.
    """

    strength: ClassVar[str] = "preserved"
    unsharded: ClassVar[str | None] = "OSFT's frozen weights are not sharded here"

    preserved: float = Field(
        0.0, ge=0, lt=1, description="Share of each layer's directions, the largest, that stays as it is; 0: off"
    )
    targets: tuple[str, ...] = Field(
        (), description="Names of the layers that are trained, as [q_proj, v_proj]; empty: all linear ones but the head"
    )

    def is_on(self) -> bool:
        """Say whether a share stays."""
        return self.preserved > 0

    def adapter(self) -> TrainedAdapter:
        """Return the factors to be trained."""
        return TrainedAdapter("osf", {"effective_rank": self.preserved}, self.targets, preserved=self.preserved)
