"""The record of what happened, in MLflow, Prefect's log and the terminal. The only importer of mlflow.

Nothing here can lose work: artifacts hold their own metrics, from which an MLflow that was away is filled later.
"""

from tasks.record.client import console, mlflow_lock, say, tracked
from tasks.record.conclusion import conclusion
from tasks.record.live import step
from tasks.record.pages import experiment_url, run_url
from tasks.record.parameters import flattened
from tasks.record.reach import unreachable
from tasks.record.runs import end_dead_runs
from tasks.record.step_run import StepRun
from tasks.record.variants import Variant, below, comparison, keep_step, variant

__all__ = ["StepRun", "Variant", "below", "comparison", "conclusion", "console", "end_dead_runs", "experiment_url",
           "flattened", "keep_step", "mlflow_lock", "run_url", "say", "step", "tracked", "unreachable",
           "variant"]  # fmt: skip
