"""Models behind servers: whether theirs can be asked what a measurement asks, and lm-eval's logs of their answers."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cfsd.errors import BadEnvironment, BadInput
from cfsd.evaluate.spec import EvaluateSpec
from tasks import record

if TYPE_CHECKING:
    from cfsd.evaluate.served import ServedModel

ROLES = ("base", "tuned")


def check_served(models: tuple[str, str], spec: EvaluateSpec, tokenizer: Path | None) -> "list[ServedModel]":
    """Return the two models that NAME@URL names. Raises BadInput before a benchmark is asked."""
    if find_spec("tenacity") is None:
        raise BadEnvironment(
            "lm-eval's models behind a server need packages that are missing: pip install 'cfsd[server]'"
        )
    from cfsd.evaluate.harness.check import check_documents  # lm-eval takes seconds to import
    from cfsd.evaluate.served import check_benchmarks_served, find_served

    if tokenizer is not None and not tokenizer.is_dir():
        raise BadInput(f"--tokenizer {tokenizer} is not a folder; give one with tokenizer.json, tokenizer_config.json")
    check_benchmarks_served(spec.benchmarks, tokenizer)
    found = [find_served(model, spec.benchmarks, tokenizer) for model in models]
    if found[0][:2] == found[1][:2]:
        raise BadInput(
            f"{found[0].name} behind {found[0].url} is given twice; give the model before, and the one after"
        )
    for benchmark in spec.benchmarks:
        if benchmark.needs_check():
            check_documents(benchmark)
    return found


def ask_served(models: "list[ServedModel]", spec: EvaluateSpec, folder: Path, in_flight: int) -> list[str]:
    """Write lm-eval's logs of both models into `folder`/base and `folder`/tuned; return what is to be said of them.

    Nothing is taken from an earlier run: what a server serves under a name may have changed.
    """
    from cfsd.evaluate.harness.served import log_scores  # lm-eval takes seconds to import

    contexts = [model.context for model in models if model.context]
    said = []
    for role, model in zip(ROLES, models, strict=True):
        for benchmark in spec.benchmarks:
            record.say(f"asking {model.name} behind {model.url}: {benchmark.name}")
            lines = log_scores(
                model, benchmark, folder / role, max_length=min(contexts, default=None), in_flight=in_flight
            )
            said += [f"{model.name}: {line}" for line in lines]
    return said
