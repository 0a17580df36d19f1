"""The arguments of transformers.Trainer that follow from a spec and a machine."""

from pathlib import Path

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils.import_utils import is_liger_kernel_available

from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.spec import seed_of
from cfsd.train.spec import TrainSpec

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def training_arguments(spec: TrainSpec, checkpoints: Path, machine: Machine) -> TrainingArguments:
    """Return the arguments of one process, but for the number of steps, which is not known yet."""
    device = machine.resolved_device()
    sharded = machine.resolved_sharding() == "shard"
    # beside a live base, which has none, the two would not be one function where training begins
    kernels = device == "cuda" and is_liger_kernel_available() and not spec.needs_base()
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        learning_rate=spec.learning_rate,
        optim=TrainingArguments.optim if spec.optimizer == "adamw" else spec.optimizer,
        lr_scheduler_type=SCHEDULES[spec.schedule],
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.clip_norm,
        bf16=spec.in_bfloat16(machine),
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and machine.resolved_training_processes() > 1 else None,
        ddp_find_unused_parameters=False,
        gradient_checkpointing=machine.gradient_checkpointing and not sharded,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        fsdp=True if sharded else None,  # type: ignore[arg-type]  # its strings are going; see settle_sharding
        fsdp_config={"version": 2, "activation_checkpointing": machine.gradient_checkpointing} if sharded else None,
        use_liger_kernel=kernels,  # norms, rotations and activations; the loss is ours
        liger_kernel_config={"fused_linear_cross_entropy": False, "cross_entropy": False} if kernels else None,
        save_strategy="steps",
        save_steps=machine.checkpoint_steps,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        gradient_accumulation_steps=1,
        seed=seed_of(spec),
        report_to=[],
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process that sees several GPUs would get nn.DataParallel
    return arguments


def settle_sharding(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Where `args` shard, let accelerate shard the layers that `model` has, and add its gradients up in float32.

    Text models of families that also see or hear name layers that they lack, which accelerate refuses. Its own policy
    in bfloat16 also sums gradients, and rounds what the model returns, our losses, in bfloat16.

    Raises BadInput where the model's class names no layer that it has.
    """
    if args.fsdp_plugin_args is None:
        return
    there = {type(module).__name__ for module in model.modules()}
    names = sorted(there & {*(model._no_split_modules or ())})
    if not names:
        raise BadInput(
            f"machine.sharding is shard, but {type(model).__name__} names no layers by which it could be sharded; set "
            "it to replicate"
        )
    args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(names)
    if args.bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        args.fsdp_plugin_args["mixed_precision_policy"] = policy
