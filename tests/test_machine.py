"""What a machine gives to a process: threads, and the most memory that it took."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cfsd import machine as module
from cfsd.machine import Machine
from cfsd.train.spec import TrainSpec
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("variable", "quota", "processes", "threads"),
    [
        (None, None, 1, 16),
        (None, None, 4, 4),
        (None, "max 100000", 1, 16),
        (None, "250000 100000", 1, 2),  # a container's two and a half cores of 16
        (None, "20000 100000", 1, 1),
        (None, "6400000 100000", 1, 16),
        ("3", None, 1, 3),
        ("3", None, 4, 3),  # of every process, as torch and OpenMP take it
        ("8,4", None, 1, 8),
        ("0", None, 1, 16),
        ("many", None, 1, 16),
    ],
)
def test_threads_are_those_that_the_environment_allows(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str | None,
    quota: str | None,
    processes: int,
    threads: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(module, "CPU_LIMIT", tmp_path / "cpu.max")
    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert Machine().resolved_threads(processes) == threads
    assert Machine(threads=5).resolved_threads(processes) == 5


def test_peak_memory_is_of_the_process_alone() -> None:
    """A process that one of a gigabyte starts has not held a gigabyte."""
    held = np.ones(2**30, np.uint8)
    program = "from cfsd.machine import peak_memory; mine = bytearray(b'1') * 2**28; print(peak_memory())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 2**28 < int(run.stdout) < 2**29 < held.nbytes


@pytest.mark.parametrize(("computes", "halves"), [(True, True), (False, False)])
def test_bfloat16_is_the_default_of_gpus_that_compute_in_it(
    monkeypatch: pytest.MonkeyPatch, computes: bool, halves: bool
) -> None:
    """Torch says of a T4 or V100 that it supports bfloat16, which it emulates."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation or computes
    )
    assert Machine(device="cuda").halves() == halves
    assert not Machine(device="cpu").halves()
    spec = TrainSpec(seed=0)
    assert spec.in_bfloat16(Machine(device="cuda")) == halves
    assert spec.model_copy(update={"precision": "bfloat16"}).in_bfloat16(Machine(device="cuda"))
