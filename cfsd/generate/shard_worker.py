"""One of several processes that sample shards.

python -m cfsd.generate.shard_worker FOLDER        FOLDER holds request.json
"""

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import JsonValue

from cfsd.generate.jobs import ShardWork
from cfsd.generate.shard_rows import sample_shard
from cfsd.process.child import serve_request
from cfsd.store.journal import Journal


def work_off(folder: Path, text: str) -> dict[str, JsonValue]:
    """Sample every shard that is not there and that no other worker has taken."""
    work, journal = ShardWork.model_validate_json(text), Journal(folder)
    claims = work.job.folder / ".claims"
    claims.mkdir(exist_ok=True)
    for shard in work.shards:
        try:  # the kernel frees the claim of a worker that dies
            with FileLock(claims / f"{shard.index}.lock", timeout=0):
                if not shard.done(work.job.folder):
                    sample_shard(work.job, shard, _say(journal))
        except Timeout:
            continue
        journal.progress(0, 0, "rows")
    return {}


def _say(journal: Journal) -> Callable[[float], None]:
    return lambda under_way: journal.progress(int(under_way), 0, "rows")


if __name__ == "__main__":
    serve_request(work_off)
