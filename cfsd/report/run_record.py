"""Run record: every artifact of one variant, enough to make its summary and report again."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, JsonValue

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
    target_divergence: Artifact | None = None  # the tuned model only


class RunRecord(BaseModel):
    """Every artifact of one variant: enough to make its summary and report again."""

    model_config = ConfigDict(frozen=True)

    name: str
    recipe: dict[str, JsonValue] = {}
    digest: str = ""
    artifacts: dict[
        str, Artifact
    ]  # by role: base, target, selected_target, probe, corpus, filtered, selected_corpus, mixture, tuned, final
    before: Scores = Scores()
    after: Scores = Scores()
    steps: tuple[Step, ...] = ()


Scored = Sequence[Sequence[Artifact]]  # held-out responses by stage, 0 being the first base, and target


class Measured(BaseModel):
    """What was measured over a sequence beside the trails of its stages.

    `scored`: T+1 stages by T targets. `probes`: divergence from the first base on its own probe, stages 1 to T.
    """

    model_config = ConfigDict(frozen=True)

    scored: tuple[tuple[Artifact, ...], ...]
    probes: tuple[Artifact, ...]
