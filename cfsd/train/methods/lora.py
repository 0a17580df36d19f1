"""Train two small matrices beside each large one."""

from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from cfsd.train.methods.method import Method, TrainedAdapter


class Lora(Method):
    """W = W* + (alpha / rank) B A, only A and B trained, B = 0 at the start; with PEFT.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    Differs: all linear layers but the head, where the paper takes the attention's query and value.
    Options: DoRA, Liu et al. 2024, arXiv:2402.09353; rsLoRA, Kalajdzievski 2023, arXiv:2312.03732; QLoRA, Dettmers et
    al. 2023, arXiv:2305.14314, which differs: the matrices are merged into the base as it was before it was quantised.
    """

    neutral: ClassVar[dict[str, Any]] = {
        "use_dora": False, "use_rslora": False, "target_parameters": (), "quantise": None,
    }  # fmt: skip
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
    target_parameters: tuple[str, ...] = Field(
        (), description="Names of experts' weights that get one on top of the layers, such as gate_up_proj"
    )
    use_dora: bool = Field(False, description="DoRA: train the length of each weight's rows apart; layers only")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank): the same rate serves every rank")

    quantise: Literal["nf4", "fp4"] | None = Field(
        None,
        description="QLoRA: hold the base's layers in 4 bits while it is trained, by bitsandbytes; empty: as they are",
    )

    def is_on(self) -> bool:
        """Say whether there is a rank."""
        return self.rank > 0

    def adapter(self) -> TrainedAdapter:
        """Return the matrices to be trained."""
        settings = {"r": self.rank, "lora_alpha": self.alpha or self.rank, "lora_dropout": self.dropout}
        settings |= {"use_dora": self.use_dora, "use_rslora": self.use_rslora}
        return TrainedAdapter("lora", settings, self.targets, self.target_parameters, self.rank, quantise=self.quantise)
