"""What is known of a step before it runs: its name for people, its settings, its inputs."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cfsd.spec import CONTROL_SEEDS, WATCHED_SEEDS, Spec
from cfsd.stages import (
    CHAT,
    EVALUATE_CHAT,
    EVALUATE_PROBE,
    EVALUATE_PROMPTS,
    EVALUATE_TARGET_DIVERGENCE,
    PROBE,
    PROMPTS,
)
from cfsd.store.artifact import Artifact, Store
from tasks.record.parameters import flattened

# measure the tuned model only
AGAINST_BASE = (EVALUATE_PROBE, EVALUATE_CHAT, EVALUATE_PROMPTS, EVALUATE_TARGET_DIVERGENCE)
# what of an artifact's metadata is said in a line and is a figure of its run
IN_BRIEF = ("rows", "tokens", "steps", "train_rows", "score", "loss", "accuracy", "probe_kl", "chat_kl", "kl",
            "parameters")  # fmt: skip
SPEC = "spec"  # the argument of a stage's own settings, which are parameters without a prefix


class DataSet(NamedTuple):
    """An input as MLflow shows it: digest and address are the artifact's."""

    name: str
    context: str
    digest: str
    address: str
    numbers: dict[str, Any]


class StepRun(NamedTuple):
    """A step of a variant: `inputs` are the arguments of its stage by name, without the machine."""

    stage: str
    key: str
    inputs: Mapping[str, Any]

    def name(self) -> str:
        """Return a name for people, such as `evaluate tiny_rev · tuned`."""
        words = [self._noun(), *dict.fromkeys(self._subjects())]
        role = "tuned" if self.stage in AGAINST_BASE else self.inputs.get("role")
        return " ".join(words) + (f" · {role}" if role else "")

    def _noun(self) -> str:
        seed = getattr(self.inputs.get(SPEC), "seed", None) or 0
        if self.stage in (CHAT, PROMPTS) and seed >= CONTROL_SEEDS:
            return f"control {self.stage}"
        if self.stage == PROBE and seed >= WATCHED_SEEDS:
            return "control sample" if seed >= CONTROL_SEEDS else "watched sample"
        return self.stage.replace("-", " ")

    def _subjects(self) -> Iterator[str]:
        for argument, value in self.inputs.items():
            if isinstance(value, Spec) and hasattr(value, "name") and value.name:
                yield str(value.name)
            elif argument == "name":
                yield str(value)

    def settings(self) -> dict[str, str]:
        """Return its settings as dotted names and texts; what is not set is left out."""
        found: dict[str, Any] = {}
        for name, value in self.inputs.items():
            if isinstance(value, Spec):
                content = value.model_dump(mode="json", exclude_none=True)
                found |= content if name == SPEC else {name: content}
            elif isinstance(value, tuple):
                found[name] = [getattr(part, "name", str(part)) for part in value]
            elif value is not None and not isinstance(value, Artifact):
                found[name] = value
        return flattened(found)

    def data_sets(self, store: Store) -> list[DataSet]:
        """Return the artifacts that it reads; the context is what each is to it, as base, target or corpus."""
        role = str(self.inputs.get("role") or "model")
        read = {n: v for n, v in self.inputs.items() if isinstance(v, Artifact)}
        return [data_set(store, role if name == "model" else name, artifact) for name, artifact in read.items()]

    def tags(self, attempt: str) -> dict[str, str]:
        """Return the tags that identify its run; `attempt` is first, resumed or replayed."""
        return {"cfsd.kind": "step", "cfsd.stage": self.stage, "cfsd.key": self.key, "attempt": attempt}


def data_set(store: Store, context: str, artifact: Artifact) -> DataSet:
    """Return an artifact of the store as a data set."""
    numbers = {name: value for name, value in artifact.metadata.items() if isinstance(value, int | float)}
    return DataSet(artifact.kind, context, artifact.content, store.place(artifact).as_uri(), numbers)
