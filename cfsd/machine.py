"""Machine: where a recipe runs and with what. Nothing here changes what is estimated, so nothing is in a key."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveInt

from cfsd.errors import BadInput

HOME_VARIABLE = "CFSD_HOME"
COUNTED_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers")


def home() -> Path:
    """Return the data folder: the environment variable CFSD_HOME, else `data` in the working directory."""
    return Path(os.environ.get(HOME_VARIABLE) or "data").absolute()


class Machine(BaseModel):
    """Device, threads and batch shapes. Recorded with every artifact, never part of its key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where tensors live; auto takes CUDA if there is one"
    )
    threads: PositiveInt | None = Field(None, description="CPU threads per process; empty: all cores")
    sampling_rows: PositiveInt = Field(64, description="Rows sampled together; also the rows of one shard")
    micro_batch_tokens: PositiveInt = Field(
        1024, description="Most tokens, padding included, that one forward and backward pass holds"
    )

    checkpoint_steps: PositiveInt = Field(50, description="Optimizer steps between checkpoints: what a kill can cost")

    def resolved_device(self) -> str:
        """Return "cpu" or "cuda"."""
        if self.device == "cpu":
            return "cpu"
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("machine.device is cuda, but torch finds none here; set it to cpu or auto")
        return "cuda" if torch.cuda.is_available() else "cpu"

    def resolved_threads(self) -> int:
        """Return the number of CPU threads that a process uses."""
        if self.threads:
            return self.threads
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def settle(self) -> None:
        """Make torch use this machine's threads. Called once by whatever is about to compute."""
        import torch

        torch.set_num_threads(self.resolved_threads())

    def environment(self) -> dict[str, JsonValue]:
        """Return what a draft must share with the process that continues it, for equal bits."""
        return {
            "sampling_rows": self.sampling_rows,
            "micro_batch_tokens": self.micro_batch_tokens,
            "device": self.resolved_device(),
            "threads": self.resolved_threads(),
            "python": platform.python_version(),
            **{name: version(name) for name in COUNTED_PACKAGES},
        }
