"""The server's `gpu` slots: how many stages may compute on GPUs at once, over all runs and machines."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import AcquireConcurrencySlotTimeoutError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from cfsd.machine import Machine
from tasks import record

GPU_SLOT = "gpu"
SOON = 5  # seconds after which a run says that it waits


@contextmanager
def gpu_slot(machine: Machine, *, needed: bool) -> Iterator[None]:
    """Hold as many of the server's `gpu` slots as this process sees GPUs, while a stage computes on them."""
    if not needed or machine.resolved_device() != "cuda":
        yield
        return
    slots = min(machine.visible_devices(), gpu_slots(machine))
    held = partial(concurrency, GPU_SLOT, occupy=slots, strict=True, raise_on_lease_renewal_failure=False)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(timeout_seconds=SOON))
        except AcquireConcurrencySlotTimeoutError:
            record.say(f"waiting for other runs to free {slots} of the `{GPU_SLOT}` slots; those of a killed run are "
                       f"free after five minutes (prefect gcl inspect {GPU_SLOT})")  # fmt: skip
            stack.enter_context(held())
        yield


def gpu_slots(machine: Machine) -> int:
    """Return how many `gpu` slots the server has: as many as the machine that made the limit, the first to ask, sees.

    Raise it where more machines come: `prefect gcl update gpu --limit 8`.
    """
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(GPU_SLOT).limit
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # another process made it just now
                wanted = GlobalConcurrencyLimitCreate(name=GPU_SLOT, limit=machine.visible_devices())
                client.create_global_concurrency_limit(wanted)
            return client.read_global_concurrency_limit_by_name(GPU_SLOT).limit
