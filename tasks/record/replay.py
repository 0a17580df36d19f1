"""Steps of a variant, noted when they end; a GPU step that MLflow never saw is replayed from its artifact."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cfsd.report.run_record import Step
from cfsd.stages import FILTER, GENERATE, MIX, SELECT
from cfsd.store.artifact import Artifact, Store
from cfsd.store.journal import read_metrics
from tasks.record.client import say, tracked
from tasks.record.runs import RECORDED, Variant, current_variant, open_run, step_tags

if TYPE_CHECKING:
    from tasks.record.server import Server

IN_BRIEF = ("rows", "tokens", "steps", "train_rows", "score", "loss", "accuracy", "probe_kl", "kl", "parameters")


def keep_step(stage: str, store: Store, artifact: Artifact, *, executed: bool, gpu: bool) -> None:
    """Note a step of the variant at hand, on the terminal and in MLflow."""
    seconds = float(store.manifest(artifact)["seconds"])
    how = f"{seconds:.0f} s" if executed else "cached"
    say(f"{stage} {artifact.key} {how}{_in_brief(artifact.metadata)}")
    if (variant := current_variant.get()) is None:
        return
    variant.steps.append(Step(stage=stage, artifact=artifact, executed=executed, seconds=seconds))
    if variant.run_id:
        tracked(lambda server: _link_step(server, variant, stage, store, artifact, replay=gpu and not executed))


def _in_brief(metadata: Mapping[str, Any]) -> str:
    words = [str(metadata["benchmark"])] if "benchmark" in metadata else []
    for name in IN_BRIEF:
        if isinstance(value := metadata.get(name), int | float):
            words.append(f"{value:,.4g} {name.replace('_', ' ')}" if isinstance(value, float) else f"{value:,} {name}")
    return ": " + ", ".join(words) if words else ""


def _link_step(
    server: "Server", variant: Variant, stage: str, store: Store, artifact: Artifact, *, replay: bool
) -> None:
    run_id = str(variant.run_id)
    name = artifact.metadata.get("benchmark") or artifact.metadata.get("prompts")
    server.set_tag(run_id, f"cfsd.{stage}.{name}" if name else f"cfsd.{stage}", artifact.key)
    for word in ("biased", "approximate"):  # in what the corpus is not an exact sample of the base
        if stage == GENERATE and artifact.metadata.get(word):
            server.set_tag(run_id, f"cfsd.{word}", str(artifact.metadata[word]))
    if stage in (GENERATE, FILTER, SELECT, MIX):
        numbers = {f"{stage}/{k}": v for k, v in artifact.metadata.items() if isinstance(v, int | float)}
        server.log_figures(run_id, numbers)
    recorded = f"tags.`cfsd.key` = '{artifact.key}' and tags.`{RECORDED}` = 'all'"
    if replay and not server.search_runs([server.experiment], recorded, max_results=1):
        tags = step_tags(stage, artifact.key, "replayed") | {RECORDED: "all"}
        child = open_run(server, f"{stage} {artifact.key}", run_id, tags)
        server.log_metrics(child, read_metrics(store.path(artifact, weights=False)))
        server.set_terminated(child, "FINISHED")
