"""Several processes of this machine that divide the shards of a job among them, each with its own model.

python -m cfsd.generate.workers FOLDER        one of them; FOLDER holds request.json
"""

import json
import time
from pathlib import Path

from pydantic import BaseModel, JsonValue

from cfsd.errors import Crashed
from cfsd.generate.shard_job import Look, Shard, ShardJob
from cfsd.generate.shard_sampling import sample_shard
from cfsd.machine import CUDA, Machine
from cfsd.process.child import Child, serve_request
from cfsd.store.journal import PROGRESS, Journal

POLL_SECONDS = 0.5
DEATHS = 3  # of workers, before giving up
FOLDERS = ".workers"


class ShardWork(BaseModel):
    """The request to one of the workers."""

    job: ShardJob
    shards: list[Shard]


def sample_in_workers(job: ShardJob, shards: list[Shard], look: Look) -> None:
    """Divide the shards among workers; one that dies is replaced."""
    count, deaths = min(job.machine.resolved_processes(), len(shards)), 0
    workers = {i: _worker(job, i, shards[i::count]) for i in range(count)}
    try:
        while workers:
            time.sleep(POLL_SECONDS)
            look(sum(_under_way(worker.folder) for worker in workers.values()))
            for i in [i for i, worker in workers.items() if worker.process.poll() is not None]:
                try:
                    workers.pop(i).answer()
                except Crashed:
                    deaths += 1
                    if deaths > DEATHS:
                        raise
                    workers[i] = _worker(job, i, shards[i::count])
    finally:
        for worker in workers.values():
            worker.stop()


def _worker(job: ShardJob, number: int, shards: list[Shard]) -> Child:
    folder = job.folder / FOLDERS / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    Journal(folder).progress(0, 0, "rows")
    request = ShardWork(job=job, shards=shards).model_dump_json()
    return Child("cfsd.generate.workers", folder, request, _device_of(number, job.machine))


def _device_of(number: int, machine: Machine) -> dict[str, str]:
    """Return the environment of a worker: the one GPU that it sees, of those that this process may use."""
    if machine.resolved_device() != "cuda":
        return {}
    names = machine.visible_gpus()
    return {CUDA: names[number % len(names)]}


def _under_way(folder: Path) -> float:
    return float(json.loads((folder / PROGRESS).read_text())["done"])


def _sample_shards(folder: Path, text: str) -> dict[str, JsonValue]:
    work, journal = ShardWork.model_validate_json(text), Journal(folder)
    for shard in work.shards:
        if not shard.is_done(work.job.folder):  # by the worker that this one replaces
            sample_shard(work.job, shard, lambda under_way: journal.progress(int(under_way), 0, "rows"))
            journal.progress(0, 0, "rows")
    return {}


if __name__ == "__main__":
    serve_request(_sample_shards)
