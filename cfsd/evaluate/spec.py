"""Settings of the evaluate stage."""

from typing import Any, ClassVar

from pydantic import Field, PositiveInt, field_validator

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.text import Text
from cfsd.machine import home
from cfsd.spec import Spec
from cfsd.store.artifact import Artifact, Store


class EvaluateSpec(Spec):
    """What is measured on base and tuned."""

    neutral: ClassVar[dict[str, Any]] = {"texts": ()}

    benchmarks: tuple[Benchmark, ...] = Field(
        (), description="Names of bundled or lm-eval tasks, {name, folder, limit, …} for your own YAML, or {task: {…}}"
    )
    held_out_rows: PositiveInt | None = Field(None, description="Most held-out target rows to score; empty: all")
    texts: tuple[Text, ...] = Field((), description="Your own texts, {name, path, …}: their perplexity is measured")

    @field_validator("benchmarks", "texts")
    @classmethod
    def _named_once(cls, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [part.name for part in parts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            kind = f"{type(parts[0]).__name__.lower()}s"
            raise ValueError(f"{kind} named twice: {', '.join(twice)}; results are kept by name")
        return parts

    def check(self) -> None:
        """Raise BadInput for whatever can be told to be wrong without a model."""
        for benchmark in self.benchmarks:
            benchmark.check()
        for text in self.texts:
            text.check()

    def check_base(self, base: Artifact) -> None:
        """Raise BadInput if the base, once it is there, lacks the chat template that a benchmark asks for."""
        asking = [benchmark.name for benchmark in self.benchmarks if benchmark.chat_template]
        if not asking or not base.content:
            return
        from cfsd.model.loading import load_tokenizer

        if not load_tokenizer(Store(home()).path(base)).chat_template:
            raise BadInput(
                f"benchmark {asking[0]}: chat_template is on, but the model's tokenizer has no chat template; turn it "
                "off, or measure a model that has one"
            )


def check_comparable(base: Artifact, tuned: Artifact) -> None:
    """Raise BadInput when the two models do not share a vocabulary: their distributions cannot be compared."""
    if any(base.metadata[fact] != tuned.metadata[fact] for fact in ("tokenizer", "vocabulary")):
        raise BadInput(
            f"base and tuned have different vocabularies ({base.metadata['vocabulary']} and "
            f"{tuned.metadata['vocabulary']} tokens, or other tokens under the same numbers); "
            "a divergence between them is not defined: give a model that was tuned from this base"
        )
