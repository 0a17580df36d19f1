"""Recipe: everything that decides a result, loaded from YAML."""

import unicodedata
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from cfsd.budget import Budget
from cfsd.data.target import Target
from cfsd.errors import BadInput
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.filter.spec import FilterSpec
from cfsd.generate.spec import CHATS, CONTEXT_FREE, EARLIER, TAIL_SAMPLES, GenerateSpec, ProbeSpec, check_context
from cfsd.merge.spec import MergeSpec, budgets_of, check_budgeted
from cfsd.mix.spec import MixSpec
from cfsd.model.checkpoint import Checkpoint
from cfsd.overrides import read_recipe, validated
from cfsd.select.spec import SelectSpec
from cfsd.spec import Spec
from cfsd.store.artifact import Artifact
from cfsd.train.methods.method import Estimate
from cfsd.train.spec import RehearsalSpec, TrainSpec


class Recipe(Spec):
    """Base model, target, and how to get from one to the other without forgetting."""

    neutral: ClassVar[dict[str, Any]] = {"earlier": ()}

    name: str = Field(description="What you call it in Prefect and MLflow; not part of any key")
    seed: NonNegativeInt = Field(0, description="Fills every seed of the parts that is left empty")
    base: Checkpoint = Field(description="The model to fine-tune: `tiny`, `smollm2`, `./folder`, `org/name@revision`")
    target: Target = Field(description="What to fine-tune on")
    earlier: tuple[Target, ...] = Field(
        (),
        description="Targets that the base was trained on before, with the seeds they had then: what "
        "`generate.source: earlier-prompts` and `earlier-rows` rehearse, their held-out rows never",
    )
    probe: ProbeSpec = Field(ProbeSpec(), description="Held-out sample of the base, for measuring only")
    generate: GenerateSpec = Field(GenerateSpec(), description="The rehearsal corpus")
    filter: FilterSpec = Field(FilterSpec(), description="Which rows of the corpus to reject; default none")
    select: SelectSpec = Field(SelectSpec(), description="Which rows of target and corpus to take; default all")
    mix: MixSpec = Field(MixSpec(), description="What one global batch holds")
    train: TrainSpec = Field(TrainSpec(), description="How the base is fine-tuned")
    merge: MergeSpec = Field(MergeSpec(), description="Interpolation of base and tuned after training")
    evaluate: EvaluateSpec = Field(EvaluateSpec(), description="What is measured before and after")

    @model_validator(mode="before")
    @classmethod
    def _fill_seeds(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        seed, filled = value.get("seed", 0), dict(value)
        for name, field in cls.model_fields.items():
            if "seed" not in getattr(field.annotation, "model_fields", {}):
                continue
            part = filled.get(name, {})
            if isinstance(part, Spec) and getattr(part, "seed", 0) is None:
                filled[name] = part.model_copy(update={"seed": seed})
            elif isinstance(part, dict) and part.get("seed") is None and (part or name != "target"):
                filled[name] = {**part, "seed": seed}
        if isinstance(earlier := filled.get("earlier"), list | tuple):
            filled["earlier"] = [_seeded(known, seed) for known in earlier]
        return filled

    @field_validator("name")
    @classmethod
    def _is_one_line(cls, name: str) -> str:
        if odd := [letter for letter in name if unicodedata.category(letter) in ("Cc", "Cs")]:
            raise ValueError(
                f"{name!r} has {odd[0]!r} in it, which a terminal or a page would obey instead of showing: take it out"
            )
        return name

    @model_validator(mode="after")
    def _training_has_what_it_reads(self) -> Self:
        check_earlier(self.generate, self.earlier)
        check_rehearsal(self.generate, self.train)
        check_drawn_tokens(self.generate, self.filter, self.select, self.train.rehearsal)
        check_selected(self.select, self.generate)
        check_rehearsed(self.generate, self.mix, self.train.rehearsal)
        known = {benchmark.name for benchmark in self.evaluate.benchmarks}
        if unknown := sorted(set(self.train.watch.benchmarks) - known):
            raise ValueError(f"train.watch.benchmarks {unknown} are not in evaluate.benchmarks {sorted(known)}")
        return self

    def _identity(self) -> dict[str, Any]:
        left_out = {"name", "seed"} | (set() if self.select.target_rows or self.select.corpus_rows else {"select"})
        return {k: v for k, v in super()._identity().items() if k not in left_out}

    def bends(self, *, with_chats: bool) -> list[str]:
        """Return the settings by which rows of the corpus are no exact sample of the base's unprompted text."""
        return bends(self.corpus(with_chats=with_chats), self.filter, self.select)

    def corpus(self, *, with_chats: bool) -> GenerateSpec:
        """Return the settings of the corpus, with what `generate.source: auto` stands for.

        That is chats, if the base can write them (`with_chats`), rehearsal is by divergence of a given weight, and
        nothing in the recipe needs text without a prompt.
        """
        return self.generate.of_auto(CHATS if with_chats and not self.why_no_chats() else CONTEXT_FREE)

    def why_no_chats(self) -> str:
        """Return what in the recipe keeps `generate.source: auto` from standing for chats; empty: nothing."""
        rehearsal, chats = self.train.rehearsal, self.generate.of_auto(CHATS)
        if rehearsal.loss != "kl":
            return f"train.rehearsal.loss is {rehearsal.loss}, by which chats were not studied"
        if rehearsal.budget is not None:
            return "train.rehearsal.budget is steered by text without a prompt (merge.budget keeps chats as well)"
        if self.generate.fill:
            return "generate.fill is for text without a prompt"
        try:
            check_rehearsal(chats, self.train)
            check_drawn_tokens(chats, self.filter, self.select, rehearsal)
        except ValueError as error:
            return str(error)
        return ""

    def chooses_source(self) -> bool:
        """Say whether the base decides what is rehearsed: chats, if it can write them."""
        return self.corpus(with_chats=True) != self.corpus(with_chats=False)

    def budget(self) -> Budget | None:
        """Return the divergence from the base that is accepted, in nats per token: of merging, else of training."""
        return self.merge.budget or self.train.rehearsal.budget

    def budgets(self, modes: Collection[str]) -> dict[str, float]:
        """Return the budget of each of the measured `modes` that has one."""
        return budgets_of(self.budget(), modes)

    def check_modes(self, modes: Collection[str]) -> None:
        """Raise BadInput where a budget is that of a mode which is not measured, once the `modes` are known."""
        check_budgeted(self.budget(), modes)

    def is_plain(self) -> bool:
        """Say whether the base is fine-tuned on the target with nothing against forgetting."""
        rehearses = self.generate.rows and self.train.rehearsal.weight
        merges = self.merge.alpha != 1 or self.budget()
        return not (
            rehearses or merges or self.train.methods.by_name() or self.mix.flow != "off" or self.target.rewriting()
        )

    def check(self) -> None:
        """Raise BadInput for errors detectable before running, without loading weights."""
        for check in self.checks():
            check()

    def checks(self) -> list[Callable[[], object]]:
        """Return what looks for such errors, part by part, the base first."""
        replay = [self.generate.replay.check] if self.generate.replay else []
        earlier = [known.check for known in self.earlier]
        given = [self.base.check, self.target.check, *earlier, *replay]
        return [*given, self.probe.check, self.evaluate.check, self.train.check]

    def check_base(self, base: Artifact) -> None:
        """Raise BadInput for errors detectable once the base is known, before anything is sampled."""
        self.probe.check_base(base)
        check_context(base, self.generate, "generate")
        self.evaluate.check_base(base)

    def check_target(self, target: Artifact) -> None:
        """Raise BadInput for errors detectable once the target's rows are known, before anything is sampled."""
        if isinstance(rows := target.metadata.get("train_rows"), int):
            check_supply(self.generate, self.mix, self.train, rows)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Self:
        """Return the recipe of a YAML file, with `a.b=c` overrides. Raises BadInput naming file and field."""
        return validated(cls, read_recipe(Path(path), overrides or []), str(path))


def _seeded(target: Any, seed: Any) -> Any:
    """Return an earlier target, given as such or as its fields, with `seed` where it has none."""
    if isinstance(target, Target):
        return target if target.seed is not None else target.model_copy(update={"seed": seed})
    return {**target, "seed": seed} if isinstance(target, dict) and target.get("seed") is None else target


def check_rehearsed(generate: GenerateSpec, mix: MixSpec, rehearsal: RehearsalSpec) -> None:
    """Raise ValueError where a corpus is sampled and weighed, and no row of it is mixed in."""
    if generate.rows and rehearsal.weight and not mix.rehearsal_tokens:
        raise ValueError(
            f"mix.rehearsal_tokens is 0, so that none of the corpus' {generate.rows} rows is rehearsed: raise it, or "
            "set generate.rows to 0 for plain fine-tuning"
        )


def check_selected(select: SelectSpec, generate: GenerateSpec) -> None:
    """Raise ValueError where more rows are to be kept than are sampled, as far as that is known before."""
    wanted = select.corpus_rows
    if wanted and generate.rows and generate.source != "mixed" and wanted > generate.rows:  # mixed counts tokens
        raise ValueError(
            f"select.corpus_rows is {wanted}, but generate.rows is {generate.rows}; lower the first or raise the second"
        )


def check_earlier(generate: GenerateSpec, earlier: tuple[Target, ...]) -> None:
    """Raise ValueError where a source needs earlier targets and there are none, or they are given and not rehearsed."""
    sources = [source for source in generate.sources() if source in EARLIER]
    if sources and not earlier:
        raise ValueError(f"generate.source {sources[0]} needs `earlier`, the targets that the base was trained on")
    if earlier and not (sources and generate.rows):
        raise ValueError(
            f"`earlier` has {len(earlier)} targets, but nothing rehearses them: give one of {', '.join(EARLIER)} a "
            "share in generate.fractions (with generate.source mixed and generate.rows above 0), or leave them out"
        )


def check_rehearsal(generate: GenerateSpec, train: TrainSpec) -> None:
    """Raise ValueError when the corpus of `generate` does not hold what `train` reads."""
    rehearsal = train.rehearsal
    if rehearsal.budget and not generate.rows:
        raise ValueError(
            "train.rehearsal.budget is read off rehearsal rows, and generate.rows is 0; set rows, or budget to null"
        )
    if generate.rows and rehearsal.needs_top() and not generate.top_logprobs:
        raise ValueError(
            "train.rehearsal.loss is kl with reference stored, but the corpus stores no distributions: set "
            "generate.top_logprobs (64 is a good start), or train.rehearsal.reference to base"
        )
    others = [source for source in generate.sources() if source != CONTEXT_FREE]
    if generate.rows and rehearsal.budget and others:
        raise ValueError(
            "train.rehearsal.budget steers lambda by the divergence on unprompted text, which is read off the "
            f"rehearsal: on source {others[0]} it is another one; set generate.source to context-free, or give the "
            "budget as merge.budget, which keeps it whatever is rehearsed"
        )
    for name, pull in train.methods.pulls().items():
        if pull.curvature:
            _check_exact(generate, name, pull.curvature, f"{name}.{train.methods.by_name()[name].strength}")


def _check_exact(generate: GenerateSpec, method: str, needed: Estimate, strength: str) -> None:
    if generate.rows and generate.biases():
        raise ValueError(
            f"train.methods.{method} takes its {needed.noun} from text by the base's own distribution, but generate "
            f"has {', '.join(generate.biases())}: leave that out, or set {strength} to 0"
        )
    sources = generate.sources()
    if generate.rows < needed.rows or sources != ["context-free"]:
        raise ValueError(
            f"train.methods.{method} takes its {needed.noun} from {method}.rows={needed.rows} context-free rows; "
            f"generate has {generate.rows} of source {', '.join(sources)}: raise generate.rows or lower {method}.rows, "
            "and set generate.source to context-free (train.rehearsal.weight=0 keeps the rows out of the loss)"
        )


def check_drawn_tokens(
    generate: GenerateSpec, filtering: FilterSpec, selecting: SelectSpec, rehearsal: RehearsalSpec
) -> None:
    """Raise ValueError where the divergence would be read off drawn tokens that follow another distribution."""
    found = ", ".join(bends(generate, filtering, selecting)) if generate.rows and rehearsal.weight else ""
    if not found:
        return
    if rehearsal.needs_top() and rehearsal.tail == "sampled" and not generate.stored_tail():
        raise ValueError(
            "train.rehearsal.tail sampled, without generate.tail_samples, takes the drawn tokens as sampled from the "
            f"base's own distribution, but the corpus has {found}: set generate.tail_samples ({TAIL_SAMPLES} is the "
            "default), train.rehearsal.tail to bucket, or train.rehearsal.reference to base"
        )
    if rehearsal.budget and rehearsal.loss == "nll":
        raise ValueError(
            "train.rehearsal.budget with loss nll reads the divergence off the drawn tokens, as sampled from the "
            f"base's own distribution, but the corpus has {found}: set train.rehearsal.loss to kl, or leave these out"
        )


def bends(generate: GenerateSpec, filtering: FilterSpec, selecting: SelectSpec) -> list[str]:
    """Return the settings by which rows of the corpus are no exact sample of the base's unprompted text."""
    source = [] if generate.sources() == ["context-free"] else [f"source={generate.source}"]
    found = [f"generate.{setting}" for setting in (*source, *generate.biases())]
    found += [f"filter.{name}={value}" for name, value in filtering if value != getattr(FilterSpec(), name)]
    chosen = selecting.corpus_rows is not None and selecting.method != "random"
    return [*found, f"select.corpus_rows={selecting.corpus_rows} by {selecting.method}"] if chosen else found


def check_supply(generate: GenerateSpec, mix: MixSpec, train: TrainSpec, train_rows: int) -> None:
    """Raise BadInput when the corpus has too few rows for a training that takes only unseen ones.

    This is checked before sampling, as if no row ended early; the training itself counts the real rows.
    """
    steps = train.epochs * -(-train_rows // mix.target_rows)
    per_step = mix.rehearsal_tokens - generate.length  # at least: a step takes whole rows while they fit
    needed, available = (steps - 1) * per_step, generate.rows * generate.length
    rehearsal = train.rehearsal
    wants = "rehearsal.budget reads the divergence on" if rehearsal.budget else "rehearsal.refresh fresh takes"
    if rehearsal.weight and (rehearsal.budget or rehearsal.refresh == "fresh") and available < needed:
        raise BadInput(
            f"train.{wants} rows that were not seen before: {steps} steps of "
            f"{mix.rehearsal_tokens} tokens, but generate.rows={generate.rows} of at most {generate.length} tokens "
            f"hold {available:,}; raise generate.rows to {-(-needed // generate.length):,} or more, or lower "
            "mix.rehearsal_tokens or train.epochs"
        )
