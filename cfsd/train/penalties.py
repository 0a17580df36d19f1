"""Quadratic penalties: what the methods' pulls add to the gradient, towards the base's weights theta*."""

import math
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from cfsd.model.folder import CONFIG, weight_files
from cfsd.model.loading import load_model
from cfsd.train.methods import Methods
from cfsd.train.methods.method import Pull

WRAPPED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """Return a parameter's name in the plain model, without the prefixes of wrappers."""
    for part in WRAPPED:
        name = name.replace(part, "")
    return name.removeprefix("module.")


class Anchors:
    """Tensors by parameter name from the safetensors of a folder, read one at a time.

    Never taken from a model in training: after a resume its weights are not the base's any more.
    """

    def __init__(self, folder: Path) -> None:
        """Look up which file holds which name."""
        self.folder = folder
        self._files: dict[str, Path] = {}
        for file in weight_files(folder) if (folder / CONFIG).exists() else sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)
        self._whole: dict[str, Tensor] = {}

    def like(self, name: str, parameter: Tensor) -> Tensor:
        """Return the tensor for `parameter`: this process' own shard, on its device, float32 at least."""
        whole = self._read(name, parameter.shape)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if isinstance(parameter, DTensor):  # every rank reads the file: nothing is sent
            whole = whole.to(parameter.device)
            mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            return mine.to_local().to(dtype).clone()
        return whole.to(parameter.device, dtype)

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        """Return the whole tensor; on CPU float32 ones are views of the file, not copies.

        Some checkpoints have other names or layouts on the disk; then all weights are loaded by transformers.
        """
        if name in self._files and not self._whole:
            with safe_open(self._files[name], framework="pt") as tensors:
                stored: Tensor = tensors.get_tensor(name)
            if stored.shape == shape:
                return stored
        if not self._whole:
            self._whole = dict(load_model(self.folder, "cpu", "float32").requires_grad_(False).named_parameters())
        return self._whole[name]


class Penalty:
    """scale x sum of c (theta - theta*)^2 over the trainable parameters, c = 1 or the curvature's entry.

    A tied weight counts once. The trainer calls `add` once per global batch, when gradients are complete and averaged
    over processes; each process then adds the same, or its shards' part, and nothing is multiplied by their number.
    """

    def __init__(self, name: str, pull: Pull, anchors: Anchors, curvature: Anchors | None = None) -> None:
        """Take theta* from `anchors` and c from `curvature`."""
        self.name, self.pull, self.anchors, self.curvature = name, pull, anchors, curvature
        self.figure = 0.0  # as of the last `add`
        self._held: dict[str, tuple[Tensor, Tensor | None]] = {}

    @torch.no_grad()
    def add(self, model: nn.Module) -> float:
        """Add the gradient to each trainable parameter's `.grad` in place; return the penalty's value."""
        sums = [(p, self._pull(plain_name(n), p)) for n, p in model.named_parameters() if p.requires_grad]
        total = _total(sums)
        self.figure = self.pull.figure(total)
        return self.pull.scale * total

    def _pull(self, name: str, parameter: nn.Parameter) -> Tensor:
        if name not in self._held:
            curvature = self.curvature.like(name, parameter) if self.curvature else None
            self._held[name] = self.anchors.like(name, parameter), curvature
        anchor, curvature = self._held[name]
        away = _local(parameter) - anchor
        slope = away if curvature is None else away * curvature
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        _local(parameter.grad).add_(slope, alpha=2 * self.pull.scale)
        return away.mul_(slope).sum()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _total(sums: list[tuple[nn.Parameter, Tensor]]) -> float:
    """Return the sum over the whole parameters, of which this process may hold shards."""
    plain: float | Tensor = 0.0
    sharded: dict[DeviceMesh, Tensor] = {}
    for parameter, part in sums:
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            copies = math.prod(mesh.size(i) for i, p in enumerate(parameter.placements) if p.is_replicate())
            sharded[mesh] = sharded.get(mesh, torch.zeros_like(part, dtype=torch.float64)) + part.double() / copies
        else:
            plain = plain + part.double()
    for mesh, part in sharded.items():
        for dimension in range(mesh.ndim):
            dist.all_reduce(part, group=mesh.get_group(dimension))
    return float(plain) + sum(float(part) for part in sharded.values())


def penalties_of(methods: Methods, base: Path, estimate: Path | None) -> list[Penalty]:
    """Return the penalties of `methods`; `base` and `estimate` are the folders of theta* and of c."""
    anchors, curvature = Anchors(base), Anchors(estimate) if estimate else None
    pulls = methods.pulls()
    assert curvature or not methods.estimate(), "a method needs an estimate"
    return [Penalty(name, pull, anchors, curvature if pull.curvature else None) for name, pull in pulls.items()]
