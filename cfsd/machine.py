"""Machine: where a recipe runs and with what. Nothing here changes what is estimated, so nothing is in a key."""

import os
import platform
import re
import resource
import sys
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import psutil
from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveInt, field_validator, model_validator

from cfsd.errors import BadInput, NotHere
from cfsd.stages import REWRITE, SAMPLING, TRAIN

HOME_VARIABLE = "CFSD_HOME"
KEY_VARIABLE = "OPENAI_API_KEY"  # a server's key, never part of its URL
COUNTED_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers")
COPY_SHARE = 8  # a second copy of weights may take this part of all memory; not of what is free, which varies
PAIR_SHARE = 3  # of two models one may take this part of all memory: another third is for hidden states and logits
MEMORY_LIMIT, CPU_LIMIT = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/cpu.max")  # of a container
CUDA = "CUDA_VISIBLE_DEVICES"
THREADS_VARIABLE = "OMP_NUM_THREADS"  # of every process that computes, as torch reads it
SERVED = re.compile(r"(?:(?P<name>.+?)@)?(?P<url>https?://.*)")
STATUS = Path("/proc/self/status")  # of a process on Linux
# what this machine lacks of what a plan needs, which may run on another one; None: no plan, it is needed here and now
lacking: ContextVar[list[str] | None] = ContextVar("lacking", default=None)


def lacks(what: str) -> None:
    """Note what is lacking, where only a plan is made. Raises NotHere elsewhere."""
    if (found := lacking.get()) is None:
        raise NotHere(what)
    found.append(what)


def home() -> Path:
    """Return the data folder: the environment variable CFSD_HOME, else `data` in the working directory."""
    return expanded_user(Path(os.environ.get(HOME_VARIABLE) or "data")).absolute()


def expanded_user(path: Path) -> Path:
    """Return `path` with a leading `~` replaced, which no shell does in `--home=~/data`; as it is where there is none.

    Raises:
        BadInput: The user has no home folder.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise BadInput(f"{path} cannot be read: {error}; write out the folder that ~ stands for") from error


class Machine(BaseModel):
    """Device, threads and batch shapes. Recorded with every artifact, never part of its key."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)  # a URL may hold a password

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where tensors live; auto takes CUDA if there is one"
    )
    threads: PositiveInt | None = Field(
        None, description="CPU threads per process; empty: OMP_NUM_THREADS, else all cores"
    )
    processes: PositiveInt | None = Field(
        None, description="Processes that sample, each with its own model; empty: one per GPU, or one on CPU"
    )
    devices: PositiveInt | None = Field(
        None,
        description="Variants and seeds that run at once, each in a process of its own that sees one device; on CPU "
        "cores are shared out equally; empty: one per visible GPU, or one on CPU",
    )
    sampling_rows: PositiveInt = Field(128, description="Rows sampled together; also the rows of one shard")
    engine: Literal["torch", "server"] = Field(
        "torch", description="torch: our own decoding loop; server: an OpenAI-compatible one that serves the base"
    )
    base_url: str | None = Field(None, description="server only: such as http://127.0.0.1:8000/v1")
    served_model: str | None = Field(None, description="server only: the model's name there; empty: its only one")
    in_flight: PositiveInt = Field(16, description="server only: requests that wait for an answer at the same time")
    cluster: str | None = Field(
        None, description="Ray cluster to spread shards over: `local`, `auto` or ray://host:10001; needs a shared disk"
    )
    micro_batch_tokens: PositiveInt = Field(
        1024, description="Most tokens, padding included, that one forward and backward pass holds"
    )
    training_processes: PositiveInt | None = Field(
        None, description="Processes that train one model together; empty: one per GPU, or one on CPU"
    )
    sharding: Literal["replicate", "shard"] = Field(
        "replicate",
        description="replicate: every training process holds the whole model (DDP); shard: a part of it (FSDP2; CUDA)",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute each layer's activations anew on the way back: less memory, about a third more time"
    )
    checkpoint_steps: PositiveInt = Field(50, description="Optimizer steps between checkpoints: what a kill can cost")

    @field_validator("base_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        return None if value is None else server_url(value)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.engine == "server") != (self.base_url is not None):
            lacking = "needs base_url" if self.engine == "server" else "takes no base_url; set engine=server"
            raise ValueError(f"engine {self.engine} {lacking}")
        return self

    def resolved_device(self) -> str:
        """Return "cpu" or "cuda"."""
        if self.device == "cpu":
            return "cpu"
        available = _torch().cuda.is_available()
        if self.device == "cuda" and not available:
            lacks("machine.device is cuda, but torch finds none here; set it to cpu or auto")
        return "cuda" if available or self.device == "cuda" else "cpu"

    def halves(self) -> bool:
        """Say whether models are measured, and trainings computed, in bfloat16 by default."""
        return usual_precision(self.resolved_device()) == "bfloat16"

    def resolved_processes(self) -> int:
        """Return how many processes sample at the same time."""
        return 1 if self.engine == "server" else self._one_per_gpu(self.processes)

    def resolved_training_processes(self) -> int:
        """Return how many processes train one model together."""
        return self._one_per_gpu(self.training_processes)

    def _one_per_gpu(self, asked: int | None) -> int:
        return asked or self.visible_devices()

    def visible_devices(self) -> int:
        """Return how many devices this process sees: its GPUs, or 1 on CPU."""
        return 1 if self.resolved_device() == "cpu" else max(1, int(_torch().cuda.device_count()))

    def visible_gpus(self) -> list[str]:
        """Return the names by which CUDA_VISIBLE_DEVICES has the GPUs that this process sees."""
        named = os.environ.get(CUDA)
        return named.split(",") if named else [str(number) for number in range(self.visible_devices())]

    def resolved_devices(self) -> int:
        """Return how many variants run at once. Raises BadInput where they cannot have a device each."""
        spread = self._spread()
        if self.devices is None:
            return 1 if spread else self.visible_devices()
        if self.devices == 1 or self.resolved_device() == "cpu":
            return self.devices
        if self.devices > (there := self.visible_devices()):
            raise BadInput(f"machine.devices is {self.devices}, but {there} GPU(s) are visible; set {there} or fewer")
        if spread:
            raise BadInput(
                f"machine.devices is {self.devices}, so that each variant sees one GPU, but {spread} wants several; "
                "leave that out, or set devices=1: one variant after the other on all GPUs"
            )
        return self.devices

    def _spread(self) -> str:
        """Return the field by which one variant takes several devices, empty where there is none."""
        names = [name for name in ("processes", "training_processes") if (getattr(self, name) or 1) > 1]
        names += ["cluster"] if self.cluster else []
        names += ["sharding"] if self.sharding == "shard" else []
        return ", ".join(f"machine.{name}={getattr(self, name)}" for name in names)

    def one_of(self, devices: int) -> Self:
        """Return this machine as a variant sees it that runs beside others on `devices`: one device, its threads."""
        return self.model_copy(update={"devices": 1, "threads": self.resolved_threads(devices)})

    def resolved_sharding(self) -> Literal["replicate", "shard"]:
        """Return how the training processes divide the model. Raises BadInput where sharding would do nothing."""
        if self.sharding == "shard":
            device, processes = self.resolved_device(), self.resolved_training_processes()
            if device == "cpu" or processes == 1:
                raise BadInput(
                    f"machine.sharding is shard, but {processes} process{'es' if processes > 1 else ''} on {device} "
                    "would train; sharding needs CUDA and machine.training_processes above 1: set it to replicate"
                )
        return self.sharding

    def resolved_threads(self, processes: int = 1) -> int:
        """Return the number of CPU threads of each of `processes`."""
        if self.threads:
            return self.threads
        if (wanted := os.environ.get(THREADS_VARIABLE, "").split(",")[0].strip()).isdecimal() and int(wanted):
            return int(wanted)
        return max(1, usable_cores() // processes)

    def settle(self, processes: int = 1) -> None:
        """Make torch use this machine's threads; called once before a computation."""
        _torch().set_num_threads(self.resolved_threads(processes))

    def environment(self, stage: str) -> dict[str, JsonValue]:
        """Return what a draft of `stage` must share with the process that continues it, for equal bits."""
        shape: dict[str, JsonValue] = {"micro_batch_tokens": self.micro_batch_tokens}
        processes = 1
        if stage == REWRITE:  # in one process, a shard of rows at a time
            shape = {"sampling_rows": self.sampling_rows}
        elif stage in SAMPLING:
            shape, processes = {"sampling_rows": self.sampling_rows, "engine": self.engine}, self.resolved_processes()
        elif stage == TRAIN:  # both decide in which order gradients are summed
            processes = self.resolved_training_processes()
            shape |= {"training_processes": processes, "sharding": self.resolved_sharding()}
        return shape | {
            "device": self.resolved_device(),
            "threads": self.resolved_threads(processes),
            "python": platform.python_version(),
            **{name: version(name) for name in COUNTED_PACKAGES},
        }


def usable_cores() -> int:
    """Return how many cores this process may keep busy: those it is bound to, or its container's share of them.

    More threads than that wait for each other while spinning: a training takes several times its processor time.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = CPU_LIMIT.read_text().partition(" ") if CPU_LIMIT.exists() else ("max", "", "")
    return cores if quota == "max" else min(cores, max(1, round(int(quota) / int(period))))


def usual_precision(device: str) -> str:
    """Return "bfloat16" on GPUs that compute in it, else "float32".

    Those before Ampere (T4, V100) emulate it; a GPU that is planned for from elsewhere is taken to be newer.
    """
    cuda = _torch().cuda
    emulates = device == "cuda" and cuda.is_available() and not cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if device == "cuda" and not emulates else "float32"


def whole_memory(device: str = "cpu") -> int:
    """Return the bytes of memory of this machine or this container; for "cuda", of the GPU that this process uses."""
    if device == "cuda":
        return int(_torch().cuda.mem_get_info()[1])
    whole = int(psutil.virtual_memory().total)
    allowed = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.exists() else "max"
    return whole if allowed == "max" else min(whole, int(allowed))


def room_for_a_copy(size: float) -> bool:
    """Say whether this machine, or this container, has the memory for a copy of weights of `size` bytes."""
    return COPY_SHARE * size <= whole_memory()


def room_for_two(size: float, device: str) -> bool:
    """Say whether base and tuned model of `size` bytes each may stay in a device's memory, beside what they make."""
    return PAIR_SHARE * size <= whole_memory(device)


def peak_memory() -> int:
    """Return the most memory that this process has held, bytes.

    On Linux a process' ru_maxrss starts at that of the process which started it, so the kernel's own mark is read.
    """
    if STATUS.exists() and (mark := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())):
        return int(mark[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def server_url(value: str) -> str:
    """Return the base URL of a completions server with /v1 at its end. Raises ValueError when it cannot be one."""
    try:
        url = urlsplit(value)
        _ = url.port  # is read only to be checked
    except ValueError as error:
        raise ValueError(f"base_url {value!r} is no URL: {error}") from error
    if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.query:
        where = f"{url.scheme}://{url.hostname or ''}{url.path}"  # without what may be a secret
        raise ValueError(
            f"base_url {where} must be like http://host:8000/v1, without user or query; a key belongs into the "
            f"environment variable {KEY_VARIABLE}"
        )
    return value.rstrip("/").removesuffix("/v1") + "/v1"


def served_at(model: str) -> tuple[str | None, str] | None:
    """Return the name and the URL of a model behind a server, NAME@URL or URL, as they are; None for another model."""
    found = SERVED.fullmatch(model)
    return (found["name"], found["url"]) if found else None


def without_password(url: str) -> str:
    """Return `url`, or a message with one, as it may be printed: without what is between :// and @, or a query."""
    return re.sub(r"\?\S+", "?***", re.sub(r"(://|^)[^/\s]*@", r"\1***@", url))


def _torch() -> Any:
    """Return torch, which is imported late: commands that only read a machine answer in a second."""
    import torch

    return torch
