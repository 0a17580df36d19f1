"""What is measured during training, so that forgetting is seen as it happens."""

from typing import Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cfsd.spec import Spec


class WatchSpec(Spec):
    """Measured before the first step, every `every` steps and after the last, on rows of its own, not the probe."""

    every: NonNegativeInt = Field(0, description="Optimizer steps between measurements; 0: off")
    rows: PositiveInt = Field(32, description="Sequences of the base that the divergence is measured on")
    held_out_rows: PositiveInt = Field(32, description="Most held-out target rows whose loss is measured")
    benchmarks: tuple[str, ...] = Field((), description="Names of evaluate.benchmarks to score as well")
    stop_above: PositiveFloat | None = Field(
        None, description="The training ends when the watched divergence is above this, in nats per token"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if not self.every and (self.stop_above or self.benchmarks):
            raise ValueError("watch.stop_above and watch.benchmarks need watch.every: set it to a number of steps")
        return self
