"""Models of which only lm-eval's logs are here: their scores, and whether two of them were measured alike."""

from cfsd.evaluate.logs.folder import Log, LoggedModel
from cfsd.machine import Machine
from cfsd.report.run_record import Scores
from cfsd.stages import EVALUATE_LOG, LOGS
from cfsd.store.artifact import Draft
from cfsd.store.digests import write_json
from tasks._stage import stage
from tasks.evaluate import Role


def check_logs(base: LoggedModel, tuned: LoggedModel) -> list[dict[str, object]]:
    """Return the metadata of the base's scores, a benchmark each; see `cfsd.evaluate.logs.alike`. Raises BadInput."""
    from cfsd.evaluate.logs.alike import check_alike  # reads tables

    return [{"benchmark": name, **logged.metadata} for name, logged in check_alike(base, tuned).items()]


@stage(LOGS, "logs")
def keep_logs(draft: Draft, model: LoggedModel, role: Role, machine: Machine) -> None:
    """Keep what the logs of a model say of how it was measured; it takes the model's place in a report."""
    write_json(draft.folder / "logs.json", model.model_dump(mode="json", exclude={"said"}))
    draft.metadata |= model.described()


def scores_of_logs(model: LoggedModel, role: Role, machine: Machine) -> Scores:
    """Return the scores of a model, those that lm-eval logged."""
    return Scores(benchmarks={log.name: evaluate_log(log, role, machine) for log in model.logs})


@stage(EVALUATE_LOG, "scores")
def evaluate_log(draft: Draft, log: Log, role: Role, machine: Machine) -> None:
    """Take the scores of one benchmark from a log; see `cfsd.evaluate.logs.rows`."""
    from cfsd.evaluate.logs.rows import write_scores

    write_scores(log, draft)
