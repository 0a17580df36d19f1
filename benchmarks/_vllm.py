"""vLLM on this machine's CPU, out of a virtual environment of its own: as a server, or as an engine without one.

The environment variable CFSD_VLLM_PYTHON names that environment's python; CFSD_VLLM_URL a server that runs already.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from benchmarks._result import Worker
from cfsd.machine import usable_cores

PYTHON = "CFSD_VLLM_PYTHON"
URL = "CFSD_VLLM_URL"
RUN = Path(__file__).with_name("_vllm_run.py")
LENGTH = 1024  # tokens that a row may have, its prompt included
LIKELIEST = 64  # most log-probabilities of a token
STARTS_WITHIN = 300.0  # seconds
UNMEASURED = f"vLLM was not measured: {PYTHON} names no python that has it"


def vllm_python() -> Path | None:
    """Return the python that has vLLM, None where the environment names none; SystemExit where it is not there."""
    named = os.environ.get(PYTHON)
    if named and not Path(named).exists():
        raise SystemExit(f"{PYTHON} is {named}, which does not exist; name the python of an environment with vLLM")
    return Path(named) if named else None


def environment(cache_gb: int = 6) -> dict[str, str]:
    """Return the settings that are best here: all cores compute, and memory for the keys and values of a large batch.

    Left alone vLLM keeps one core for its scheduler, which of two cores is half the machine.
    """
    cores = usable_cores()
    own = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gb), "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}", "OMP_NUM_THREADS": str(cores),
    }  # fmt: skip
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own


@contextmanager
def vllm_server(
    model: Path, log: Path, *, port: int = 8010, cache_gb: int = 2, more: Sequence[str] = ()
) -> Iterator[str]:
    """Serve the transformers folder `model` in float32 and give the base URL, ending in /v1; `log` gets its output.

    `more` are further words of vLLM's command line.
    A server that CFSD_VLLM_URL names is taken as it is, and left running.

    Raises:
        SystemExit: Nothing names a vLLM, or it does not start.
    """
    if url := os.environ.get(URL):
        yield url
        return
    if not (python := vllm_python()):
        raise SystemExit(UNMEASURED)
    command = [
        str(python.with_name("vllm")), "serve", str(model), "--dtype", "float32", "--host", "127.0.0.1",
        "--port", str(port), "--max-model-len", str(LENGTH), "--max-logprobs", str(LIKELIEST), "--enforce-eager", *more,
    ]  # fmt: skip
    with log.open("w") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=subprocess.STDOUT, env=environment(cache_gb), process_group=0
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(process)


@contextmanager
def vllm_engine(model: Path, *, rows: int, cache_gb: int = 6) -> Iterator[Worker]:
    """Give vLLM's own `LLM` for at most `rows` rows at a time, in a process that takes jobs (see _vllm_run.py).

    Raises SystemExit when nothing names a vLLM.
    """
    if not (python := vllm_python()):
        raise SystemExit(UNMEASURED)
    command = [str(python), str(RUN), str(model), *map(str, (rows, LENGTH, LIKELIEST))]
    worker = Worker("vllm", command, env=environment(cache_gb), process_group=0)
    try:
        yield worker
    finally:
        _stop(worker.process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"vLLM did not start; the end of {log}:\n{log.read_text()[-2000:]}")


def _stop(process: subprocess.Popen[Any]) -> None:
    """End the process with those that it started, which outlive it otherwise and keep their memory."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
