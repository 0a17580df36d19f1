"""Two models behind OpenAI-compatible servers, named NAME@URL: lm-eval asks them, and its logs are compared."""

import os
from datetime import datetime
from pathlib import Path

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.machine import Machine, home
from flows._conclude import Result
from flows._logs import measure_logs
from flows._temporary_server import prefect_server
from tasks import record
from tasks.served import ROLES, ask_served, check_served


def measure_served(models: tuple[str, str], evaluate: EvaluateSpec, machine: Machine, tokenizer: Path | None) -> Result:
    """Ask both models and compare their logs. Raises BadInput before the first benchmark is asked."""
    if unused := sorted(machine.model_fields_set - {"in_flight"}):
        raise BadInput(
            f"--machine {', '.join(unused)}: a model that is named by its server's URL is measured there, so it has no "
            "effect; leave it out (--machine in_flight=64 works)"
        )
    found = check_served(models, evaluate, tokenizer)
    began = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    folder = home() / "served" / f"{began}-{os.getpid()}"  # others may begin in the same second
    said = ask_served(found, evaluate, folder, machine.in_flight)
    before, after = (str(folder / role) for role in ROLES)
    record.say(f"logs of lm-eval, to compare again without asking: flows.measure --samples {before} {after}")
    chosen = [Benchmark(name=b.name, metric=b.metric, filter=b.filter, chance=b.chance) for b in evaluate.benchmarks]
    with prefect_server():
        return measure_logs(before, after, EvaluateSpec(benchmarks=tuple(chosen)), tuple(said))
