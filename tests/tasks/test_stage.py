"""What the decorator of every stage adds to its work."""

import pickle

import pytest
import torch

from cfsd.errors import BadInput, OutOfMemory
from cfsd.machine import Machine
from tasks._stage import enough_memory
from tasks.mix import mix_rows

MACHINE = Machine(device="cpu", micro_batch_tokens=2048, sampling_rows=64)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_names_the_stage_and_what_needs_less(error: Exception) -> None:
    """It was called a mistake in cfsd, with a traceback, in every stage but training and sampling."""
    with pytest.raises(OutOfMemory) as ended, enough_memory("evaluate-probe", MACHINE):
        raise error
    said = str(ended.value)
    assert said.startswith("out of memory in evaluate-probe (") and "\n" not in said
    assert "machine.micro_batch_tokens (now 2048): lower" in said and "machine.sampling_rows (now 64): lower" in said


@pytest.mark.parametrize("error", [BadInput("can't allocate memory"), ValueError("odd")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as ended, enough_memory("mix", MACHINE):
        raise error
    assert ended.value is error


def test_a_stage_is_pickled_by_its_name() -> None:
    """Flows are sent to the workers of a cluster, with the stages that they call."""
    from tasks import mix

    stages = [value for value in vars(mix).values() if type(value).__name__ == "Stage"]
    assert stages and all(pickle.loads(pickle.dumps(stage)) is stage for stage in stages)
    assert mix_rows.__doc__
