"""Settings of the filter stage."""

from typing import Any, ClassVar, Self

from pydantic import Field, PositiveInt, model_validator

from cfsd.errors import BadInput
from cfsd.spec import Spec
from cfsd.store.artifact import Artifact


class FilterSpec(Spec):
    """Which rows of a corpus to reject. Every rule is off unless set."""

    neutral: ClassVar[dict[str, Any]] = {
        "near_duplicates": None, "repetition": False, "min_mean_logprob": None, "max_mean_logprob": None,
        "overlap_words": None,
    }  # fmt: skip

    duplicates: bool = Field(False, description="Reject rows whose tokens were seen before")
    near_duplicates: float | None = Field(
        None, ge=0.6, le=1,
        description="Reject rows that share this part (Jaccard index) of their 5-grams of tokens with an earlier row; "
        "usual: 0.8",
    )  # fmt: skip
    min_tokens: PositiveInt | None = Field(None, description="Reject rows with fewer sampled tokens")
    max_tokens: PositiveInt | None = Field(None, description="Reject rows with more sampled tokens")
    min_mean_logprob: float | None = Field(
        None, le=0, allow_inf_nan=False,
        description="Reject rows that the base finds less likely: mean log-probability per sampled token, in nats",
    )  # fmt: skip
    max_mean_logprob: float | None = Field(
        None, le=0, allow_inf_nan=False,
        description="Reject rows that the base finds more likely: mean log-probability per sampled token, in nats",
    )  # fmt: skip
    repetition: bool = Field(
        False, description="Reject texts that repeat themselves more than Gopher's limits allow (arXiv:2112.11446)"
    )
    overlap_words: int | None = Field(
        None, ge=2,
        description="Reject texts that share this many words in a row with a document of a benchmark or with a "
        "held-out row of the target; 13 as for GPT-3 (arXiv:2005.14165)",
    )  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        words = {} if self.overlap_words is None else {"words": 2}  # 2: they end at punctuation, as of special tokens
        return super()._identity() | words

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for low, high in (("min_tokens", "max_tokens"), ("min_mean_logprob", "max_mean_logprob")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} {least} is above {high} {most}: every row would be rejected; swap them")
        return self


def check_kept(corpus: Artifact, filtered: Artifact) -> None:
    """Raise BadInput where rows were sampled and a filter left none: the training would be plain fine-tuning."""
    if corpus.metadata.get("rows") and filtered.metadata.get("rows") == 0:
        rejected = filtered.metadata.get("rejected")
        reasons = rejected.items() if isinstance(rejected, dict) else ()
        why = ", ".join(f"{count} {reason}" for reason, count in reasons)
        raise BadInput(
            f"the filter left none of {corpus.metadata['rows']} rows to rehearse ({why}); loosen `filter`, or set "
            "generate.rows to 0 for plain fine-tuning"
        )
