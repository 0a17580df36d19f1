"""Stage train: fine-tune the base model on a mixture, in a process of its own."""

from cfsd.model.loading import release_models
from cfsd.process.child import run_in_process
from cfsd.store.artifact import Draft
from cfsd.train.spec import TrainRequest, check_sharding


def train(request: TrainRequest, draft: Draft) -> None:
    """Write the tuned model as a whole transformers folder. Continues from the draft's last whole checkpoint.

    Raises BadInput, NotFinite, OutOfMemory, Stopped or Crashed.
    """
    check_sharding(request.spec, request.machine)
    request.spec.check()
    release_models()
    processes = request.machine.resolved_training_processes()
    draft.metadata |= run_in_process("cfsd.train.trainer", draft.folder, request.model_dump_json(), processes)
