"""Settings of the rehearsal corpus and of the probe."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from cfsd.data.replay import Replay
from cfsd.errors import BadInput
from cfsd.generate.prompts import Prompts
from cfsd.model.checkpoint import lacks_chat_template
from cfsd.spec import Spec, seed_of
from cfsd.stages import CHAT, PROBE
from cfsd.store.artifact import Artifact

Source = Literal["context-free", "template", "contextual", "replay", "earlier-prompts", "earlier-rows"]
EARLIER: tuple[Source, ...] = ("earlier-prompts", "earlier-rows")  # of targets that the base was trained on
WORDS: dict[Source, str] = {  # for people, as in a model card: where the texts are from
    "context-free": "text that the base model wrote without a prompt",
    "template": "chats of which the base model wrote both sides",
    "contextual": "answers of the base model to prompts of the target",
    "replay": "documents that were given",
    "earlier-prompts": "answers of the base model to prompts of earlier targets",
    "earlier-rows": "given texts of earlier targets",
}
WRITTEN: tuple[Source, ...] = ("replay", "earlier-rows")  # whose texts are there already
SAMPLING = ("temperature", "top_p", "top_k", "min_length")
SHARDS_PER_SOURCE = 1_000_000
TAIL_SAMPLES = 32  # the fewest that ended within 10 % of the base in memory in every run: docs/decisions/0049
UNPROMPTED, AUTO = "unprompted", "auto"
CONTEXT_FREE: Source = "context-free"
CHATS: Source = "template"  # what auto takes where it can: docs/decisions/0050
BUILT_IN = (UNPROMPTED, CHAT, AUTO)  # modes of the probe; others are names of the user's own prompts


class Mode(Spec):
    """A way of using the model, in which its divergence is measured along what the base samples."""

    name: str = Field(
        pattern=r"^[\w .:-]+$",
        description="unprompted: text after the start token alone; chat: a user's turn and the answer to it, both "
        "sampled, by the base's chat template; auto: unprompted, and chat where the base has a template; any other "
        "name: what `prompts` are called in the results",
    )
    prompts: str | None = Field(
        None,
        description="Prompts of yours, which the base answers: JSONL, JSON, CSV, TSV, Parquet or Arrow, compressed "
        "too; a folder or a pattern: records with `prompt`, a text or a chat, or with `messages`; chats are written by "
        "the base's chat template",
    )
    column: str | None = Field(None, description="Where the prompts are; empty: `prompt`, `messages`, `conversations`")
    rows: PositiveInt | None = Field(
        None, description="Sequences, of prompts the first N or as many as there are; empty: the probe's"
    )
    length: PositiveInt | None = Field(
        None, description="Most tokens sampled per sequence, in a chat of both turns; empty: the probe's"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.prompts is None and self.name not in BUILT_IN:
            raise ValueError(
                f"mode {self.name!r} is unknown; allowed: {', '.join(BUILT_IN)}, or a name of yours with `prompts`"
            )
        if self.prompts is not None and self.name in (*BUILT_IN, PROBE):
            raise ValueError(f"prompts cannot be called {self.name}: choose another name")
        if self.column and not self.prompts:
            raise ValueError(f"column {self.column!r} belongs to `prompts`, of which mode {self.name} has none")
        if self.name in (AUTO, UNPROMPTED) and (self.rows or self.length):
            raise ValueError(f"mode {self.name} has the probe's rows and length: set probe.rows and probe.length")
        return self


class ProbeSpec(Spec):
    """The held-out sample by which forgetting is measured without a benchmark; never trained on."""

    neutral: ClassVar[dict[str, Any]] = {"modes": (Mode(name=AUTO),)}

    rows: PositiveInt = Field(256, description="Sequences; the interval narrows with their square root")
    length: PositiveInt = Field(128, description="Most tokens sampled per sequence, after the start token")
    seed: NonNegativeInt | None = Field(None, description="Empty: the recipe's")
    modes: tuple[Mode, ...] = Field(
        (Mode(name=AUTO),),
        description="Ways of using the model, each with a sample and a divergence of its own: unprompted, chat, auto, "
        "or {name, prompts, …} for prompts of yours",
    )

    @field_validator("modes")
    @classmethod
    def _named_once(cls, modes: tuple[Mode, ...]) -> tuple[Mode, ...]:
        names = [mode.name for mode in modes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"modes named twice: {', '.join(twice)}; results are stored by name")
        if AUTO in names and {UNPROMPTED, CHAT} & set(names):
            raise ValueError(f"modes {', '.join(names)}: auto stands for unprompted and chat; leave it or them out")
        if not {AUTO, UNPROMPTED} & set(names):
            raise ValueError(
                f"modes {', '.join(names) or 'are empty'}: add unprompted, by which a corpus is checked too, or auto"
            )
        return modes

    def _identity(self) -> dict[str, Any]:
        identity = super()._identity()
        if "modes" in identity:  # of prompts their content counts, not their name or place
            identity["modes"] = [["" if mode.prompts else mode.name, self.of(mode).digest()] for mode in self.modes]
        return identity

    def check(self) -> None:
        """Raise BadInput for errors detectable before running, without a model."""
        for prompts in self.own_prompts():
            prompts.check()

    def check_base(self, base: Artifact) -> None:
        """Raise BadInput if the base is known to lack the chat template or context that a mode needs."""
        check_context(base, self, "probe")
        lacks = lacks_chat_template(base)
        for mode in self.modes:
            check_context(base, self.of(mode), f"probe.modes[{mode.name}]")
            if lacks and mode.name == CHAT:
                raise BadInput("probe.modes names chat, but the base has no chat template; leave chat out")
        for prompts in self.own_prompts() if lacks else ():
            if prompts.are_chats():
                raise prompts.lacks_template()

    def own_prompts(self) -> list[Prompts]:
        """Return the sets of the user's own prompts."""
        return [prompts for mode in self.modes if isinstance(prompts := self.of(mode), Prompts)]

    def of(self, mode: Mode) -> "ProbeSpec | Prompts":
        """Return the settings of one mode's sample, with the probe's where the mode has none."""
        sizes: dict[str, Any] = {"rows": mode.rows or self.rows, "length": mode.length or self.length}
        if mode.prompts is None:
            return ProbeSpec(**sizes, seed=self.seed)
        return Prompts(name=mode.name, path=mode.prompts, column=mode.column, **sizes, seed=seed_of(self))


class GenerateSpec(Spec):
    """The rehearsal corpus. The defaults sample exactly from the model's own distribution."""

    neutral: ClassVar[dict[str, Any]] = {
        "source": "context-free", "fractions": {}, "replay": None, "min_length": 0, "fill": False, "top_logprobs": 0,
        "tail_samples": 0,
    }  # fmt: skip

    rows: NonNegativeInt = Field(1024, description="Sequences to sample; 0: no rehearsal, plain fine-tuning")
    length: PositiveInt = Field(128, description="Most tokens per sequence after the start token or prompt")
    source: Literal[Source, "mixed", "auto"] = Field(
        "auto",
        description="auto: template where the base has a chat template and rehearsal is by divergence (loss kl), not "
        "to a budget and without fill, else context-free; context-free: from the start token alone, the method; "
        "template: after the chat template's text before a user turn; contextual: after target prompts; replay: "
        "documents of yours; earlier-prompts: after the prompts of `earlier` targets; earlier-rows: the rows of "
        "these themselves; mixed: see fractions",
    )
    fractions: dict[Source, float] = Field(
        {}, description="mixed only: each source's share of rows x length tokens, as {context-free: 0.5, replay: 0.5}"
    )
    replay: Replay | None = Field(None, description="replay only: where the documents are")
    min_length: NonNegativeInt = Field(0, description="No text ends before this many tokens: biased above 0")
    fill: bool = Field(
        False,
        description="Go on after a text's end, separated as in training, until the row is full: biased",
    )
    temperature: PositiveFloat = Field(1.0, description="Anything but 1 samples from another distribution: biased")
    top_p: float = Field(1.0, gt=0, le=1, description="Below 1 the tail is never sampled: biased")
    top_k: NonNegativeInt = Field(0, description="0: off. Otherwise only the k likeliest tokens: biased")
    top_logprobs: NonNegativeInt = Field(
        0, le=4096, description="Store the log-probabilities of the k likeliest tokens per position; 0: none"
    )
    tail_samples: NonNegativeInt = Field(
        TAIL_SAMPLES, le=1024,
        description="With top_logprobs: store this many samples of the tokens outside of it per position, which make "
        "the stored divergence nearly as exact as the base itself; 0: the drawn token alone",
    )  # fmt: skip
    seed: NonNegativeInt | None = Field(None, description="Empty: the recipe's")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if bool(self.fractions) != (self.source == "mixed"):
            raise ValueError(f"fractions {self.fractions} with source {self.source}; they belong to source mixed")
        if self.fractions and (min(self.fractions.values()) <= 0 or abs(sum(self.fractions.values()) - 1) > 1e-6):
            raise ValueError(f"fractions {self.fractions} must be positive and add up to 1")
        if (self.replay is not None) != ("replay" in self.sources()):
            raise ValueError("`replay` says where documents are, and source replay needs it: give both or neither")
        if self.fill and CONTEXT_FREE not in self.sources():
            raise ValueError(f"fill goes on after a text without a prompt, of which source {self.source} has none")
        if self.min_length > self.length:
            raise ValueError(f"min_length {self.min_length} is above length {self.length}")
        return self

    def unread(self) -> dict[str, str]:
        """Return what has no effect where nothing is sampled, or no distribution stored."""
        sampled = any(source not in WRITTEN for source in self.sources())
        return ({} if self.top_logprobs else {"tail_samples": "top_logprobs"}) | (
            {} if sampled else dict.fromkeys(SAMPLING, "source: one that is sampled")
        )

    def _identity(self) -> dict[str, Any]:
        return {k: v for k, v in super()._identity().items() if k != "tail_samples" or self.top_logprobs}

    def stored_tail(self) -> int:
        """Return how many samples of the tail each position has: none where no top is stored."""
        return self.tail_samples if self.top_logprobs else 0

    def sources(self) -> list[Source]:
        """Return the sources that rows come from, in a fixed order; of auto those with a base that writes no chats."""
        if self.source == "auto":
            return [CONTEXT_FREE]
        return sorted(self.fractions) if self.source == "mixed" else [self.source]

    def of_auto(self, source: Source) -> "GenerateSpec":
        """Return the settings with `source` in the place of auto."""
        return self.model_copy(update={"source": source}) if self.source == AUTO else self

    def parts(self, earlier: int) -> list[tuple[str, float | None]]:
        """Return the parts of the corpus: each source with its share of the tokens, None where rows are counted.

        A source of earlier targets is one part for each of the `earlier` targets, such as `earlier-prompts 2`, so that
        all have an equal share. Raises BadInput where there is none.
        """
        found: list[tuple[str, float | None]] = []
        for source in self.sources():
            if source not in EARLIER:
                found.append((source, self.fractions.get(source)))
            elif not earlier:
                raise BadInput(f"generate.source {source} needs `earlier`, the targets that the base was trained on")
            else:
                share = self.fractions.get(source, 1.0) / earlier
                found += [(f"{source} {number}", share) for number in range(1, earlier + 1)]
        return found

    def biases(self) -> list[str]:
        """Return which settings make the rows follow another distribution than the model's own."""
        neutral: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_length": 0, "fill": False}
        read = {name: value for name, value in neutral.items() if name not in self.unread()}
        return [f"{name}={getattr(self, name)}" for name, value in read.items() if getattr(self, name) != value]


def check_context(base: Artifact, spec: ProbeSpec | Prompts | GenerateSpec, name: str) -> None:
    """Raise BadInput when `recipe.<name>` asks for longer rows, or more stored tokens, than the base has."""
    context, why = base.metadata.get("context"), base.metadata.get("context_why", "")
    if spec.rows and isinstance(context, int) and spec.length + 1 > context:
        raise BadInput(
            f"length {spec.length} and the start token do not fit a model that attends to {context} tokens"
            f"{why and f' ({why})'}; set {name}.length to at most {context - 1}"
        )
    vocabulary, wanted = base.metadata.get("vocabulary"), getattr(spec, "top_logprobs", 0)
    if isinstance(vocabulary, int) and wanted > vocabulary:
        raise BadInput(
            f"{name}.top_logprobs is {wanted}, but the vocabulary of the base has {vocabulary} tokens; lower it"
        )
