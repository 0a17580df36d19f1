"""Settings of the evaluate stage."""

from typing import Any, ClassVar

from pydantic import Field, PositiveInt, field_validator, model_validator

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.show import Show
from cfsd.evaluate.text import Text
from cfsd.generate.prompts import Prompts
from cfsd.model.checkpoint import lacks_chat_template
from cfsd.model.context import context_tokens
from cfsd.spec import Spec
from cfsd.store.artifact import Artifact

BLOCK = 256  # positions whose logits are made at once
CHUNK = 32  # positions whose full distributions are in memory at once: of more, each pass over them takes new pages


class EvaluateSpec(Spec):
    """What is measured on base and tuned model."""

    neutral: ClassVar[dict[str, Any]] = {"texts": (), "show": Show()}

    benchmarks: tuple[Benchmark, ...] = Field(
        (), description="Names of bundled or lm-eval tasks, {name, folder, limit, …} for your own YAML, or {task: {…}}"
    )
    held_out_rows: PositiveInt | None = Field(None, description="Most held-out target rows to score; empty: all")
    texts: tuple[Text, ...] = Field((), description="Your own texts, {name, path, …}: their perplexity is measured")

    show: Show = Field(
        Show(), description="Prompts whose answers the report opens with, of base and tuned: a file, or `none`"
    )

    @model_validator(mode="before")
    @classmethod
    def _prompts_are_modes(cls, value: Any) -> Any:
        if isinstance(value, dict) and "prompts" in value:
            if value["prompts"]:
                raise ValueError(
                    "prompts are modes of the probe now: in place of {name, path} here, add {name, prompts: FILE} to "
                    "probe.modes, as [auto, {name: support, prompts: prompts.jsonl}]"
                )
            return {name: given for name, given in value.items() if name != "prompts"}  # of an older record
        return value

    @field_validator("benchmarks", "texts")
    @classmethod
    def _named_once(cls, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [part.name for part in parts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            kind = f"{type(parts[0]).__name__.lower().rstrip('s')}s"
            raise ValueError(f"{kind} named twice: {', '.join(twice)}; results are stored by name")
        return parts

    def check(self) -> None:
        """Raise BadInput for errors detectable before running, without a model."""
        for benchmark in self.benchmarks:
            benchmark.check()
        for text in self.texts:
            text.check()
        self.show.check()

    def check_base(self, base: Artifact) -> None:
        """Raise BadInput if the base is known to lack the chat template or context that one needs."""
        templated: list[Benchmark | Prompts] = [benchmark for benchmark in self.benchmarks if benchmark.is_chat()]
        if self.show.has_own() and (shown := self.show.prompts()).are_chats():
            templated.append(shown)
        if templated and lacks_chat_template(base):
            raise templated[0].lacks_template()
        context = base.metadata.get("context")
        if isinstance(context, int) and not base.metadata.get("context_why"):  # a reason holds for sampling only
            for benchmark in self.benchmarks:
                benchmark.check_context(context)


def check_windows(base: Artifact, tuned: Artifact, spec: EvaluateSpec) -> None:
    """Raise BadInput where whole texts would be read in windows of another length by each model.

    A token is predicted better after more text, so that the same weights would seem to lose or gain.
    """
    contexts = [context_tokens(model) for model in (base, tuned)]
    least = min(contexts)
    for text in spec.texts:
        own = [min(text.window, context) for context in contexts]
        if own[0] != own[1]:
            raise BadInput(
                f"text {text.name}: base reads {own[0]} tokens at once and tuned {own[1]}, as their contexts differ, "
                f"which alone changes what is measured; set its window to at most {least}"
            )
    rolling = [benchmark.name for benchmark in spec.benchmarks if benchmark.reads_whole_texts()]
    if rolling and contexts[0] != contexts[1]:
        raise BadInput(
            f"benchmark {rolling[0]} reads whole texts in windows of the model's context, {contexts[0]} tokens of base "
            f"and {contexts[1]} of tuned, which alone changes its score; leave it out, or measure its texts by "
            f"evaluate.texts with a window of at most {least}"
        )


class AlongSpec(Spec):
    """What is measured along rows that the base sampled; `version` is raised with `cfsd.evaluate.divergence`."""

    version: ClassVar[int] = 2


def check_comparable(base: Artifact, tuned: Artifact) -> None:
    """Raise BadInput when the two models have different vocabularies, so that no divergence is defined."""
    if any(base.metadata[name] != tuned.metadata[name] for name in ("tokenizer", "vocabulary")):
        raise BadInput(
            f"base and tuned have different vocabularies ({base.metadata['vocabulary']} and "
            f"{tuned.metadata['vocabulary']} tokens, or other tokens under the same numbers); "
            "a divergence between them is not defined: give a model that was tuned from this base"
        )
