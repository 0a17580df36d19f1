"""Run record: the recipe of one variant, and the artifacts that it led to."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from cfsd.generate.spec import UNPROMPTED
from cfsd.recipe import Recipe
from cfsd.stages import CHAT, PROBE
from cfsd.store.artifact import Artifact


class Step(BaseModel):
    """One stage of a flow run: which artifact it gave, and whether the stage was executed for it."""

    model_config = ConfigDict(frozen=True)

    stage: str
    artifact: Artifact
    executed: bool
    seconds: float  # that executing it took, now or when it was made


class Scores(BaseModel):
    """What was measured on one model."""

    model_config = ConfigDict(frozen=True)

    benchmarks: dict[str, Artifact] = {}
    target: Artifact | None = None
    probe: Artifact | None = None  # divergence from the base; the tuned model only
    texts: dict[str, Artifact] = {}
    prompts: dict[str, Artifact] = {}  # divergence from the base along its answers; the tuned model only
    chat: Artifact | None = None  # divergence along chats that the base sampled; the tuned model only
    target_divergence: Artifact | None = None  # the tuned model only
    shown: Artifact | None = None  # answers for people to read
    further: dict[str, Artifact] = {}  # by name: measurements that have no field of their own

    def artifacts(self) -> list[Artifact]:
        """Return every table of scores."""
        others = (self.target, self.probe, self.chat, self.target_divergence, self.shown)
        named = (self.benchmarks, self.texts, self.prompts, self.further)
        return [*(scores for part in named for scores in part.values()), *(scores for scores in others if scores)]


def role_of(mode: str) -> str:
    """Return the role of what a mode's divergence is measured along: probe, chat, or answers to prompts so called."""
    return {UNPROMPTED: PROBE, CHAT: CHAT}.get(mode, f"answers {mode}")


def roles_of(sampled: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """Return what divergences are measured along by role."""
    return {role_of(mode): artifact for mode, artifact in sampled.items()}


def controls_of(sampled: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """Return the control samples of the modes by role: `control`, `control chat`, …."""
    return {"control" if mode == UNPROMPTED else f"control {mode}": artifact for mode, artifact in sampled.items()}


class RunRecord(BaseModel):
    """Every artifact of one variant: enough to make its summary and report again.

    `artifacts` by role: base, target, selected_target, corpus, filtered, selected_corpus, mixture, tuned, final, and
    what the base sampled in each mode, see `role_of`.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    recipe: Recipe | None = None  # None: two models that were measured, not trained
    digest: str = ""
    artifacts: dict[str, Artifact]
    before: Scores = Scores()
    after: Scores = Scores()
    steps: tuple[Step, ...] = ()

    @field_validator("recipe", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return value or None  # older versions wrote {} where there was no recipe

    def made(self) -> list[Artifact]:
        """Return the artifacts by role and those of the steps; some are in both."""
        return [*self.artifacts.values(), *(step.artifact for step in self.steps)]

    def budgets(self) -> dict[str, float]:
        """Return the divergence, in nats per token, that the trained model was to keep to in each mode that has one."""
        modes = [UNPROMPTED, *([CHAT] if self.after.chat else []), *self.after.prompts]
        return self.recipe.budgets(modes) if self.recipe and "tuned" in self.artifacts else {}


class Measured(BaseModel):
    """What was measured over a sequence beside the run records of its stages.

    `scored`: T+1 stages by T targets. `probes`: divergence from the first base on its own probe, stages 1 to T.
    """

    model_config = ConfigDict(frozen=True)

    scored: tuple[tuple[Artifact, ...], ...]
    probes: tuple[Artifact, ...]
