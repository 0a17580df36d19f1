"""Settings of the mix stage."""

from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from cfsd.spec import Spec


class MixSpec(Spec):
    """What one global batch holds, and what its rows weigh. Devices and micro-batches only arrange its rows."""

    neutral: ClassVar[dict[str, Any]] = {"flow": "off", "flow_average": "token"}

    target_rows: PositiveInt = Field(8, description="Target rows per global batch")
    rehearsal_tokens: NonNegativeInt = Field(
        1024, description="Most rehearsal tokens per global batch, in whole rows, at least one"
    )
    seed: NonNegativeInt | None = Field(None, description="Order of the rows of each source; empty: the recipe's")
    flow: Literal["off", "sample", "token"] = Field(
        "off", description="FLOW: weigh target rows (sample) or each of their tokens by how well the base predicts them"
    )
    flow_average: Literal["token", "row"] = Field(
        "token", description="flow only: what counts the same before weights: every token, or every row as in the paper"
    )

    def unread(self) -> dict[str, str]:
        """Return what has no effect on rows that are not weighed."""
        return {"flow_average": "flow"} if self.flow == "off" else {}

    @field_validator("flow", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # what YAML makes of a bare `off`
