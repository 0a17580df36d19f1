"""Settings of the merge stage."""

from typing import Any, ClassVar

from pydantic import Field, PositiveFloat

from cfsd.spec import Spec


class MergeSpec(Spec):
    """WiSE-FT: interpolate the weights after training."""

    neutral: ClassVar[dict[str, Any]] = {"budget": None}

    alpha: float = Field(1.0, ge=0, le=1, description="Weight of the tuned model; 1: as trained, 0: the base")
    budget: PositiveFloat | None = Field(
        None,
        description="Divergence that is accepted, in nats per token: alpha is lowered until it is kept; "
        "empty: train.rehearsal.budget, if there is one",
    )
