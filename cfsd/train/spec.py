"""Settings of training: optimizer, rehearsal, methods, what is watched."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from cfsd.budget import STEERED_TO, Budget
from cfsd.errors import BadInput, NotHere
from cfsd.evaluate.benchmark import Benchmark
from cfsd.generate.spec import UNPROMPTED
from cfsd.machine import Machine
from cfsd.spec import Spec
from cfsd.store.artifact import Artifact
from cfsd.train.methods import Methods

WATCH = "watch/"  # before the name of a metric: a watched value
WATCH_ERROR = "watch_error/"  # the standard error of its change since the first look


# By transformers' own names, but for `adamw`, which is torch's.
Optimizer = Literal[
    "adamw", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit",
    "paged_lion_8bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "adafactor", "sgd",
]  # fmt: skip
OF_SHARDS = ("adamw", "sgd")  # adafactor adds whole tensors to shards and fails; bitsandbytes' were not tried
OF_TORCH_AND_TRANSFORMERS = ("adamw", "adafactor", "sgd")  # the others are bitsandbytes'


class WatchSpec(Spec):
    """Measured before the first step, every `every` steps and after the last, on rows of its own, not the probe."""

    version: ClassVar[int] = 2  # 2: the watched divergence has samples of the tail, not the drawn token alone

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

    def unread(self) -> dict[str, str]:
        """Return what has no effect where nothing is measured."""
        return {} if self.every else {"rows": "every", "held_out_rows": "every"}


class RehearsalSpec(Spec):
    """The rehearsal's share of the loss: `weight` x mean loss per rehearsal token of the global batch."""

    steering: ClassVar[int] = 3  # raised when `cfsd.train.controller` steers otherwise; in the digest with a budget

    weight: NonNegativeFloat = Field(
        1.0, description="Lambda: multiplies the rehearsal's mean loss per token; 0: no rehearsal row is read"
    )
    final_weight: PositiveFloat | None = Field(
        None, description="Lambda moves evenly in its logarithm from `weight` to here over the training; empty: stays"
    )
    loss: Literal["nll", "kl"] = Field(
        "nll",
        description="nll: -log p of the sampled tokens; kl: divergence from the base at each token",
    )
    reference: Literal["stored", "base"] = Field(
        "stored",
        description="kl only: the base as stored with the corpus (generate.top_logprobs), or the base in memory",
    )
    tail: Literal["sampled", "bucket"] = Field(
        "sampled",
        description="kl, stored: tokens outside the top by samples of them (generate.tail_samples; unbiased) or as one "
        "event (a lower bound)",
    )
    budget: Budget | None = Field(
        None,
        description="Divergence that is accepted, in nats per token: lambda is steered there, merging keeps it; a "
        "number for unprompted and chat, or {unprompted: nats, chat: nats, …}, whose first steers lambda",
    )
    budget_rate: PositiveFloat = Field(
        0.2, description="How fast lambda follows: what each step adds to its logarithm at e times the budget"
    )
    refresh: Literal["cycle", "once", "fresh"] = Field(
        "cycle",
        description="cycle: all rows in turn, again and again; once: the first epoch's rows in every epoch; "
        "fresh: no row twice",
    )

    @field_validator("budget")
    @classmethod
    def _can_be_steered(cls, budget: Budget | None) -> Budget | None:
        if isinstance(budget, dict) and UNPROMPTED not in budget:
            raise ValueError(
                f"a budget for {', '.join(budget)} alone cannot steer lambda, which is read off the rehearsal: add "
                "unprompted, or give it as merge.budget"
            )
        return budget

    def steered_to(self) -> float | None:
        """Return the budget that lambda is steered by: that of text without a prompt. None: lambda is not steered."""
        return self.budget[UNPROMPTED] if isinstance(self.budget, dict) else self.budget

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.final_weight and not self.weight:
            raise ValueError("rehearsal.final_weight needs a weight above 0 to start from: set rehearsal.weight")
        if self.budget and self.final_weight:
            raise ValueError("rehearsal.budget steers the weight, final_weight schedules it: set one of them")
        if self.budget and not self.weight:
            raise ValueError("rehearsal.budget needs a rehearsal.weight above 0 to start from, such as 1")
        if self.budget and self.refresh == "once":
            raise ValueError(
                "rehearsal.budget reads the divergence on rows that were not seen before; with refresh: once there are "
                "none after the first epoch: leave refresh at cycle"
            )
        return self

    def unread(self) -> dict[str, str]:
        """Return the settings that have no effect on this rehearsal."""
        stored = self.loss == "kl" and self.reference == "stored"
        return (
            ({} if self.loss == "kl" else {"reference": "loss: kl"})
            | ({} if stored else {"tail": "loss: kl" if self.loss == "nll" else "reference: stored"})
            | ({} if self.budget else {"budget_rate": "budget"})
        )

    def _identity(self) -> dict[str, Any]:
        steered = {"steering": self.steering, "budget": self.steered_to()} if self.budget else {}
        return super()._identity() | steered  # what is merged for other modes' sake is not training's

    def reads_corpus(self) -> bool:
        """Say whether the training reads what is stored with the corpus: distributions or log-probabilities."""
        return self.needs_top() or (bool(self.weight) and self.budget is not None)

    def needs_top(self) -> bool:
        """Say whether the corpus must hold the likeliest tokens of each position."""
        return bool(self.weight) and self.loss == "kl" and self.reference == "stored"

    def needs_base(self) -> bool:
        """Say whether the base is in memory during the training, for its distribution."""
        return bool(self.weight) and self.loss == "kl" and self.reference == "base"


class TrainSpec(Spec):
    """How the base model is fine-tuned."""

    version: ClassVar[int] = 4  # 4: live base as the model computes; float32 weights kept; no row twice in a step
    neutral: ClassVar[dict[str, Any]] = {
        "methods": Methods(),
        "watch": WatchSpec(),
        "dropout": None,
        "optimizer": "adamw",
    }

    learning_rate: NonNegativeFloat = Field(1e-5, description="Peak learning rate")
    epochs: PositiveInt = Field(1, description="Passes over the target's training rows")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Of the learning rate, after warm-up; linear and cosine end at 0"
    )
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="Share of the steps that warm up")
    optimizer: Optimizer = Field(
        "adamw",
        description="adamw: torch's AdamW in float32; others by the names of transformers, 8 bits and paged (to the "
        "CPU's memory, on CUDA) by bitsandbytes",
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="Of the weights, decoupled, towards 0")
    clip_norm: PositiveFloat = Field(1.0, description="Largest norm of a global batch's gradient")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 on GPUs that compute in it (not T4, V100), else float32; weights and "
        "optimizer stay in float32",
    )
    dropout: float | None = Field(
        None,
        description="On target rows; empty: the model's own; 0: none anywhere, and target and rehearsal rows pass "
        "together. Rehearsal rows never have any",
    )
    seed: NonNegativeInt | None = Field(None, description="Of dropout, if the model has any; empty: the recipe's")
    rehearsal: RehearsalSpec = Field(RehearsalSpec(), description="How the corpus takes part")
    methods: Methods = Field(Methods(), description="What else holds the weights back; default nothing")
    watch: WatchSpec = Field(WatchSpec(), description="What is measured on the way; default nothing")

    @field_validator("dropout")
    @classmethod
    def _own_or_none(cls, dropout: float | None) -> float | None:
        if dropout:
            raise ValueError(
                f"{dropout} would be one number for places that the model has several of, each with its own; allowed: "
                "empty, the model's own, and 0, none; other numbers are set in the base's config.json"
            )
        return dropout

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.dropout == 0 and self.methods.lora.dropout:
            raise ValueError(
                f"dropout 0 turns all dropout off, but methods.lora.dropout is {self.methods.lora.dropout}; "
                "set that to 0 as well, or leave train.dropout empty"
            )
        if self.methods.divergence() and self.methods.lora.dropout:
            raise ValueError(
                "methods.target_divergence compares the model with the base on target rows, which pass with "
                f"methods.lora.dropout {self.methods.lora.dropout}: the divergence would not be 0 at the base; set "
                "lora.dropout to 0"
            )
        self._check_quantised()
        steered_to = STEERED_TO * (self.rehearsal.steered_to() or 0)
        if self.watch.stop_above and self.watch.stop_above < steered_to:
            raise ValueError(
                f"watch.stop_above {self.watch.stop_above} is below what lambda is steered to, {steered_to:.3g} for "
                f"the rehearsal.budget of {self.rehearsal.steered_to()}: training would end early; raise it or leave "
                "it out"
            )
        return self

    def _check_quantised(self) -> None:
        """Raise ValueError where a quantised model would be compared with the base as it is.

        The two are not one function at the start (on `tiny` 0.005 nats per token apart): the adapter would learn to
        undo the quantisation, and the merged model would move away from the base by as much.
        """
        adapter, held = self.methods.adapter(), self.methods.divergence()
        if adapter is None or not adapter.quantise:
            return
        live = "the base in memory is quantised alike"
        if self.rehearsal.needs_top():
            raise ValueError(f"rehearsal.reference stored is of the base before {adapter.quantise}: set base; {live}")
        if held and held.stored is not None:
            raise ValueError(
                f"methods.target_divergence.reference stored is of the base before {adapter.quantise}: set base; {live}"
            )
        if self.rehearsal.budget and self.rehearsal.loss == "nll":
            raise ValueError(
                "rehearsal.budget with loss nll counts from the base as it was sampled, "
                f"before {adapter.quantise}: set loss to kl and reference to base; {live}"
            )
        if self.watch.stop_above:
            raise ValueError(
                f"watch.stop_above counts from the base before {adapter.quantise}, from which the model starts away: "
                "leave it out"
            )

    def check(self) -> None:
        """Raise BadInput where the training needs a library that is not here."""
        adapter = self.methods.adapter()
        needs = [f"train.optimizer {self.optimizer}"] if self.optimizer not in OF_TORCH_AND_TRANSFORMERS else []
        needs += [f"train.methods.lora.quantise {adapter.quantise}"] if adapter and adapter.quantise else []
        if needs and find_spec("bitsandbytes") is None:
            raise NotHere(
                f"{' and '.join(needs)}: bitsandbytes is not installed here; pip install 'cfsd[qlora]', or leave it "
                f"out (optimizers without it: {', '.join(OF_TORCH_AND_TRANSFORMERS)})"
            )

    def needs_base(self) -> bool:
        """Say whether the base is in memory during the training, for its distribution."""
        held = self.methods.divergence()
        return self.rehearsal.needs_base() or (held is not None and held.stored is None)

    def in_bfloat16(self, machine: Machine) -> bool:
        """Say whether the forward and backward passes are computed in bfloat16: by default where GPUs compute in it."""
        return self.precision == "bfloat16" or (self.precision == "auto" and machine.halves())


class Watched(BaseModel):
    """What the training is watched on."""

    sample: Artifact
    target: Artifact
    benchmarks: tuple[Benchmark, ...] = ()


class TrainRequest(BaseModel):
    """What the training process receives. What the spec makes no use of is None."""

    home: Path
    base: Artifact
    mixture: Artifact
    corpus: Artifact | None = None
    fisher: Artifact | None = None
    losses: Artifact | None = None  # of the base on the target
    along: Artifact | None = None  # the base's distributions along the target
    watched: Watched | None = None
    spec: TrainSpec
    machine: Machine


def check_sharding(spec: TrainSpec, machine: Machine) -> None:
    """Raise BadInput where `machine` would shard what cannot be sharded."""
    reasons = [method.unsharded for method in spec.methods.by_name().values() if method.unsharded]
    if spec.optimizer not in OF_SHARDS:
        reasons.append(f"train.optimizer {spec.optimizer} does not update shards ({' and '.join(OF_SHARDS)} do)")
    if machine.resolved_sharding() == "shard" and reasons:
        raise BadInput(f"machine.sharding is shard, but {reasons[0]}: set it to replicate")
