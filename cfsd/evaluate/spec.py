"""Settings of the evaluate stage."""

import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PositiveInt, field_validator

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.show import Show
from cfsd.evaluate.text import Text
from cfsd.generate.prompts import Prompts
from cfsd.generate.spec import check_context
from cfsd.machine import home
from cfsd.spec import Spec
from cfsd.stages import PROBE
from cfsd.store.artifact import Artifact, Store

CHUNK = 32  # positions whose full distributions are in memory at once: of more, each pass over them takes new pages


class EvaluateSpec(Spec):
    """What is measured on base and tuned model."""

    neutral: ClassVar[dict[str, Any]] = {"texts": (), "prompts": (), "show": Show()}

    benchmarks: tuple[Benchmark, ...] = Field(
        (), description="Names of bundled or lm-eval tasks, {name, folder, limit, …} for your own YAML, or {task: {…}}"
    )
    held_out_rows: PositiveInt | None = Field(None, description="Most held-out target rows to score; empty: all")
    texts: tuple[Text, ...] = Field((), description="Your own texts, {name, path, …}: their perplexity is measured")

    prompts: tuple[Prompts, ...] = Field(
        (), description="Your own prompts, {name, path, …}: the base answers them, and the divergence along its "
        "answers is measured",
    )  # fmt: skip
    show: Show = Field(
        Show(), description="Prompts whose answers the report opens with, of base and tuned: a file, or `none`"
    )

    @field_validator("benchmarks", "texts", "prompts")
    @classmethod
    def _named_once(cls, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [part.name for part in parts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            kind = f"{type(parts[0]).__name__.lower().rstrip('s')}s"
            raise ValueError(f"{kind} named twice: {', '.join(twice)}; results are stored by name")
        return parts

    @field_validator("prompts")
    @classmethod
    def _not_the_probe(cls, prompts: tuple[Prompts, ...]) -> tuple[Prompts, ...]:
        if any(own.name == PROBE for own in prompts):
            raise ValueError(f"prompts cannot be called {PROBE}: results of the probe are stored by that name")
        return prompts

    def check(self) -> None:
        """Raise BadInput for errors detectable before running, without a model."""
        for benchmark in self.benchmarks:
            benchmark.check()
        for text in self.texts:
            text.check()
        for prompts in self.prompts:
            prompts.check()
        self.show.check()

    def check_base(self, base: Artifact) -> None:
        """Raise BadInput if the base, once it is in the store, lacks the chat template or context that one needs."""
        templated = [benchmark for benchmark in self.benchmarks if benchmark.chat_template]
        shown = [self.show.prompts()] if self.show.has_own() else []
        chats = [prompts for prompts in (*self.prompts, *shown) if prompts.are_chats()]
        if (templated or chats) and base.content and not _has_chat_template(Store(home()).path(base, weights=False)):
            raise (templated or chats)[0].lacks_template()
        for prompts in self.prompts:
            check_context(base, prompts, f"evaluate.prompts[{prompts.name}]")
        context = base.metadata.get("context")
        if isinstance(context, int) and not base.metadata.get("context_why"):  # a reason holds for sampling only
            for benchmark in self.benchmarks:
                benchmark.check_context(context)


def _has_chat_template(model: Path) -> bool:
    settings = model / "tokenizer_config.json"
    return (model / "chat_template.jinja").exists() or (
        settings.exists() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
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
