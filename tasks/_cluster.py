"""Shards on a cluster: each is a Prefect task of its own, sent to Ray by `tasks._ray`."""

import logging
import os
import platform
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from cfsd.errors import BadInput
from cfsd.generate.shard_job import Sampler, Shard, ShardJob
from cfsd.machine import Machine

ROOT = Path(__file__).parents[1]
LOCAL, AUTO, CLIENT = "local", "auto", re.compile(r"ray://.+:\d+")


def check_cluster(machine: Machine) -> None:
    """Raise BadInput when `machine.cluster` names no cluster or Ray is not installed; nothing is started."""
    named = machine.cluster
    if named is None:
        return
    if named not in (LOCAL, AUTO) and not CLIENT.fullmatch(named):
        raise BadInput(f"machine.cluster is {named!r}; allowed: {LOCAL}, {AUTO}, or an address as ray://HOST:10001")
    if missing := [name for name in ("ray", "prefect_ray") if find_spec(name) is None]:
        raise BadInput(
            f"machine.cluster is {named}, but {' and '.join(missing)} cannot be imported here; "
            "install the extra: pip install 'cfsd[ray]', or leave machine.cluster empty"
        )


@contextmanager
def sampler_of(machine: Machine) -> Iterator[Sampler | None]:
    """Give what maps shards over `machine.cluster`, or None for this machine alone.

    The cluster is joined when the first shard is asked for and left with the block; one of our own ends there.
    Raises BadInput as `check_cluster` does, and when the cluster does not answer.
    """
    check_cluster(machine)
    named = machine.cluster
    if named is None:
        yield None
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from tasks import _ray

    needs, address = _needs(machine), named if CLIENT.fullmatch(named) else None
    with ExitStack() as stack:
        runner = cache(lambda: stack.enter_context(_ray.joined(named, address, _terms(named, machine), needs)))
        yield lambda job, shards, look: _ray.map_shards(runner(), sample_one, needs, _settled(job), shards, look)


@task(name="sample-shard", task_run_name="shard {shard.index}", cache_policy=NO_CACHE, persist_result=False,
      retries=0, log_prints=True)  # fmt: skip
def sample_one(job: ShardJob, shard: Shard) -> None:
    """Write one shard, on the node that Ray chose."""
    from cfsd.generate.shard_sampling import sample_shard

    if not job.folder.is_dir():
        raise BadInput(
            f"node {platform.node()} has no {job.folder}; "
            "a cluster needs the data folder on a disk that all its nodes share, at the same path"
        )
    if not shard.is_done(job.folder):  # a shared disk may show a finished shard late to the caller
        sample_shard(job, shard)


def _terms(named: str, machine: Machine) -> dict[str, Any]:
    """Return the arguments of `ray.init`. Workers print to Prefect's log of the shard, not to this terminal."""
    quiet: dict[str, Any] = {"log_to_driver": False}
    if named == LOCAL:
        room = {name: each * machine.resolved_processes() for name, each in _needs(machine).items()}
        return quiet | room | {"address": LOCAL, "include_dashboard": False, "logging_level": logging.ERROR}
    code = {"runtime_env": {"env_vars": {"PYTHONPATH": f"{ROOT}:${{PYTHONPATH}}"}}}
    return quiet | code | ({"address": AUTO} if named == AUTO else {})


def _needs(machine: Machine) -> dict[str, int]:
    """Return what one shard takes of a node."""
    if machine.resolved_device() == "cuda":
        return {"num_cpus": 1, "num_gpus": 1}
    return {"num_cpus": machine.resolved_threads(machine.resolved_processes())}


def _settled(job: ShardJob) -> ShardJob:
    """Return the job with what this machine resolved: every node must compute alike."""
    machine = job.machine
    fixed = {"device": machine.resolved_device(), "threads": machine.resolved_threads(machine.resolved_processes())}
    return job.model_copy(update={"machine": machine.model_copy(update=fixed)})
