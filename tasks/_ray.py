"""Shards as Prefect tasks on a Ray cluster. Imported only where a cluster is asked for, since Ray is optional.

A shard whose worker died is lost, and nothing else is: the caller finds it missing and asks for it again.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import ray
from prefect import Task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterId, TaskRunFilterState
from prefect.client.schemas.filters import TaskRunFilterStateType as Types
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL
from prefect.states import Crashed as CrashedState
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options
from prefect_ray.task_runners import PrefectRayFuture

from cfsd.errors import BadInput, Crashed
from cfsd.generate.shard_job import Look, Shard, ShardJob
from tasks.record import say

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 1.0
AHEAD = 500  # shards submitted to Ray at a time: enough for its autoscaler, while a million would fill its memory
Future: TypeAlias = "PrefectRayFuture[Any]"


@contextmanager
def joined(
    named: str, address: str | None, terms: dict[str, Any], needs: dict[str, int]
) -> Iterator["RayTaskRunner[Any]"]:
    """Give a task runner for the cluster at `address`, with `terms` for `ray.init`. Raises BadInput."""
    runner: RayTaskRunner[Any] = RayTaskRunner(address, terms)
    with ExitStack() as stack:
        try:
            stack.enter_context(runner)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise BadInput(
                f"machine.cluster is {named}, which cannot be joined ({' '.join(str(error).split())}); give a cluster "
                "that runs, with RAY_AUTH_MODE=token in the environment where it wants a token, or local"
            ) from error
        _say_if_nothing_fits(needs, ray.nodes())
        yield runner


def _say_if_nothing_fits(needs: dict[str, int], nodes: list[dict[str, Any]]) -> None:
    wanted = {name.removeprefix("num_")[:-1].upper(): each for name, each in needs.items()}
    if not any(all(node["Resources"].get(name, 0) >= n for name, n in wanted.items()) for node in nodes):
        words = " and ".join(f"{n} {name}" for name, n in wanted.items())
        say(f"no node of the cluster has {words}: shards wait for one that does, or lower machine.threads")


def map_shards(
    runner: "RayTaskRunner[Any]", sample: Task[[ShardJob, Shard], None], needs: dict[str, int], job: ShardJob,
    shards: list[Shard], look: Look,
) -> None:  # fmt: skip
    """Sample `shards`, each at most once, on nodes that have what one `needs`.

    Raises what the first that failed raised; the others are cancelled.
    """
    waiting, running, lost = deque(shards), dict[Any, Any](), list[Any]()
    try:
        # max_retries: the caller asks again; max_calls: a worker with a GPU would load the model for every shard
        with remote_options(**needs, max_retries=0, max_calls=0):
            while waiting or running:
                until = time.monotonic() + POLL_SECONDS
                while waiting and len(running) < AHEAD and time.monotonic() < until:
                    future = runner.submit(sample, {"job": job, "shard": waiting.popleft()})
                    running[future.wrapped_future] = future
                ended, _ = ray.wait(list(running), num_returns=len(running), timeout=POLL_SECONDS)
                lost += _lost([running.pop(reference) for reference in ended])
                look(0.0)
    finally:
        with suppress(ConnectionError, ray.exceptions.RayError):
            for reference in running:
                ray.cancel(reference)
        _close([*lost, *running.values()])


def _lost(ended: list[Future]) -> list[Future]:
    """Return those whose worker died, and say so. Raises what a shard itself raised."""
    reasons = {i: why for i, future in enumerate(ended) if (why := _why_lost(future))}
    if reasons:
        why = ", ".join(sorted(set(reasons.values())))
        say(f"shards lost with their workers: {len(reasons)} ({why}); they are sampled again")
    return [ended[i] for i in reasons]


def _why_lost(future: Future) -> str:
    """Return an empty text for a shard that was made."""
    try:
        state = ray.get(future.wrapped_future)
    except (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError) as error:
        raise BadInput(
            f"a node of the cluster could not begin a shard ({str(error).strip().splitlines()[-1]}); every node needs "
            f"the packages of this one, the code at {ROOT} and a way to the Prefect server {PREFECT_API_URL.value()}"
        ) from error
    except ray.exceptions.LocalRayletDiedError as error:
        raise Crashed(f"the cluster is gone ({type(error).__name__}); finished shards are kept") from error
    except ray.exceptions.RayError as error:
        return type(error).__name__
    if state.is_failed():
        state.result()
    return str(state.name) if state.is_crashed() else ""


def _close(futures: list[Future]) -> None:
    """Set the task runs that no worker is left to end to Crashed."""
    if not futures:
        return
    ids = TaskRunFilterId(any_=[future.task_run_id for future in futures])
    begun = TaskRunFilterState(type=Types(any_=[StateType.PENDING, StateType.RUNNING]))
    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        for run in client.read_task_runs(task_run_filter=TaskRunFilter(id=ids, state=begun)):
            client.set_task_run_state(run.id, CrashedState(message="its worker was lost or stopped"), force=True)
