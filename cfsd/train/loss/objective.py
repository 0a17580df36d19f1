"""The loss: token-mean over the target + weight x token-mean over the rehearsal, each over the global batch.

B rows, T tokens, N tokens that count, D hidden width.

Source: Bansal and Sanghavi 2025, arXiv:2505.13811. Differs: the paper sums over whole strings; a token mean with a
weight of its own does not change with lengths or batch layout, lambda_string = lambda x mean response tokens
/ mean rehearsal tokens. The divergence in place of the likelihood is the same expectation with less variance
(chain rule); Marek et al. 2026, arXiv:2605.26097, found it to keep more.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cfsd.model.architecture import auxiliary_loss
from cfsd.model.decoder import decoder_of
from cfsd.model.head import Head, head_of
from cfsd.model.undisturbed import mode_kept
from cfsd.train.adapters import without_adapters
from cfsd.train.batches.micro_batches import MicroBatch
from cfsd.train.dropout import has_dropout
from cfsd.train.loss.packed import packed_forward, prepare_packed
from cfsd.train.loss.token_loss import Reference, TargetLoss, token_losses
from cfsd.train.methods import Methods
from cfsd.train.spec import RehearsalSpec


class Losses(NamedTuple):
    """The loss of a micro-batch, to be differentiated, and plain sums over its tokens in nats, to be reported."""

    loss: Tensor
    target_nll: Tensor
    rehearsal: Tensor  # in the form that is trained on
    divergence: Tensor  # from the base, over tokens of rehearsal rows seen for the first time; 0 where not known
    target_weight: Tensor  # what the methods multiply the loss of target tokens by; 1 each where nothing does
    target_divergence: Tensor  # from the base, over target tokens; 0 where it is not part of the loss


class Objective:
    """Turns a model's forward pass into that of a micro-batch: the whole loss lies within one call of the model.

    DDP and FSDP gather weights and exchange gradients around that call; an output layer that is used outside of it
    would have no weights there.
    """

    def __init__(
        self, model: PreTrainedModel, spec: RehearsalSpec, base: PreTrainedModel | None = None, *,
        sharded: bool = False, methods: Methods | None = None, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        """Take over the forward pass of `model`; `base` is needed where its distribution is the live reference.

        Where adapters are trained beside frozen weights, `base` may be `model` itself: it is the base without them.
        `device`: where the model will be trained, if it is not there yet. Of `methods` count those that weigh the
        target's tokens, or hold them near the base.

        Beside a live base rehearsal rows pass by themselves, in products of the same shapes as the base's: then both
        are equal to the last bit. Adam's first steps are of one size however small the slope is, and would follow the
        sign of a rounding error. Not where `sharded`: a process without such rows would leave the others waiting.
        """
        self.model, self.spec, self.base = model, spec, base
        methods = methods or Methods()
        self.factor, self.held = methods.factor(), methods.divergence()
        self.head_of = head_of(model)
        on_cpu = (device or model.device).type == "cpu"  # elsewhere kernels for padded rows are faster
        self.unpadded = on_cpu and prepare_packed(model) and (base is None or prepare_packed(base))
        self.drops = has_dropout(model)
        self.apart = self.drops or (base is not None and not sharded)
        self.notes = self._notes()
        self._plain: Any = model.forward
        model.forward = partial(self.forward)  # a bound method would be bound again, to the model, by accelerate

    def _notes(self) -> list[str]:
        """Return the lines that say what is slower, or not trained, with this kind of model."""
        notes = [line for line in (auxiliary_loss(self.model.config.to_dict()),) if line]
        if self.head_of(self.model) is None:
            notes.append("the output is more than one linear layer: all logits of a micro-batch are held at once")
        if self.drops:
            without = "its dropout, and without gradient checkpointing where that is on"
            notes.append(f"rehearsal rows pass the model apart from the target's, without {without}")
        return notes

    def remove(self) -> None:
        """Give the model its own forward pass back."""
        del self.model.forward

    def forward(
        self, *args: Any, micro_batch: Callable[[], MicroBatch] | None = None, rehearsal_weight: float = 1.0,
        spec: RehearsalSpec | None = None, by_row: bool = False, **named: Any,
    ) -> Any:  # fmt: skip
        """Return the Losses of what `micro_batch` returns, or the divergence `by_row`; without one, the model's own."""
        if micro_batch is None:
            return self._plain(*args, **named)
        if by_row:
            return self.divergence_B(micro_batch(), spec or self.spec)
        return self.losses(micro_batch(), rehearsal_weight, spec or self.spec)

    def losses(self, micro_batch: MicroBatch, rehearsal_weight: float, spec: RehearsalSpec) -> Losses:
        """Return the losses of `micro_batch`, its rehearsal's in the form of `spec`."""
        return self._measured(micro_batch, rehearsal_weight, spec)[0]

    def divergence_B(self, micro_batch: MicroBatch, spec: RehearsalSpec) -> Tensor:
        """Return each row's divergence from the base, summed over its rehearsal tokens that count, in nats."""
        _, divergence_M = self._measured(micro_batch, 1.0, spec)
        rehearsed_BT = (micro_batch.coefficient_BT != 0)[:, 1:] & ~micro_batch.target_BT[:, 1:]
        sums_B = torch.zeros(len(rehearsed_BT), dtype=torch.float64)
        return sums_B.index_add(0, rehearsed_BT.nonzero()[:, 0].cpu(), divergence_M.double().cpu())

    def _measured(self, micro_batch: MicroBatch, rehearsal_weight: float, spec: RehearsalSpec) -> tuple[Losses, Tensor]:
        """Return the losses, and the divergence at each rehearsal token that counts."""
        counted_BT, target_BT = micro_batch.coefficient_BT[:, 1:] != 0, micro_batch.target_BT[:, 1:]
        masks = counted_BT & target_BT, counted_BT & ~target_BT  # the divergence is of the last tokens
        states_ND, head = self._trained_states(micro_batch, masks)
        next_N = _picked(micro_batch.token_ids_BT[:, 1:], masks)
        num_target = int(masks[0].sum())
        coefficient_N = _picked(micro_batch.coefficient_BT[:, 1:], masks)
        coefficient_N[num_target:] *= rehearsal_weight
        reference, target = self._reference(micro_batch, masks[1], spec), self._target(micro_batch, masks[0])
        of_tokens = token_losses(states_ND, head, next_N, coefficient_N, reference, target)
        fresh_M = micro_batch.fresh_BT[:, 1:][masks[1]]
        loss_M, nll_M = of_tokens.loss_N[num_target:], of_tokens.nll_N[num_target:]
        divergence_M = torch.zeros_like(nll_M)
        if spec.loss == "kl":
            divergence_M = loss_M
        elif micro_batch.stored is not None:  # from the sampled tokens alone
            divergence_M = nll_M + micro_batch.stored.sampled_M.to(nll_M)
        of_target = (part_N[:num_target].sum() for part_N in (of_tokens.factor_N, of_tokens.divergence_N))
        target_nll, rehearsal = of_tokens.nll_N[:num_target].sum(), loss_M.sum()
        return Losses(of_tokens.total, target_nll, rehearsal, divergence_M[fresh_M].sum(), *of_target), divergence_M

    def _trained_states(self, micro_batch: MicroBatch, masks: tuple[Tensor, Tensor]) -> tuple[Tensor, Head]:
        """Return the states of the trained model, those of rehearsal rows without dropout.

        The divergence is one between two functions: with dropout it would not be 0 at the base's own weights.
        """
        token_ids_BT, real_BT = micro_batch.token_ids_BT, micro_batch.real_BT
        there = [bool(mask_BT.any()) for mask_BT in masks]
        alone = there[1] or (self.held is not None and there[0])  # what is compared with the base
        if not (self.apart and self.model.training and alone):
            return self._states(self.model, token_ids_BT, real_BT, masks)
        parts = []
        for mask_BT, dropout in zip(masks, (True, not self.drops), strict=True):
            rows_B = mask_BT.any(1)
            if bool(rows_B.any()):
                with mode_kept(self.model):
                    self.model.train(dropout)
                    parts.append(self._states(self.model, token_ids_BT[rows_B], real_BT[rows_B], (mask_BT[rows_B],)))
        return torch.cat([states_ND for states_ND, _ in parts]), parts[-1][1]

    def _states(
        self, model: PreTrainedModel, token_ids_BT: Tensor, real_BT: Tensor, masks: tuple[Tensor, ...]
    ) -> tuple[Tensor, Head]:
        """Return the hidden states of the tokens that count and the head, or their logits and no head.

        The head is looked up after the decoder has run: sharded, it is gathered with the last norm, and a shard before.
        """
        if self.head_of(model) is None:
            forward = self._plain if model is self.model else model
            logits: Tensor = forward(input_ids=token_ids_BT, use_cache=False).logits
            return _picked(logits[:, :-1], masks), Head(None)
        if self.unpadded:
            hidden_ND = packed_forward(decoder_of(model), token_ids_BT, real_BT)
            states_ND = torch.cat([hidden_ND[nn.functional.pad(mask, (0, 1))[real_BT]] for mask in masks])
            return states_ND, self.head_of(model)
        hidden: Tensor = decoder_of(model)(input_ids=token_ids_BT, use_cache=False).last_hidden_state
        return _picked(hidden[:, :-1], masks), self.head_of(model)

    def _reference(self, micro_batch: MicroBatch, rehearsal_BT: Tensor, spec: RehearsalSpec) -> Reference | None:
        if spec.loss == "nll" or not bool(rehearsal_BT.any()):
            return None
        if spec.reference == "stored":
            return Reference(micro_batch.stored, spec.tail)
        return self._live(micro_batch, rehearsal_BT)

    def _target(self, micro_batch: MicroBatch, target_BT: Tensor) -> TargetLoss | None:
        count = int(target_BT.sum())
        if not count or (self.factor is None and self.held is None):
            return None
        if self.held is None:
            return TargetLoss(count, self.factor)
        live = self.held.stored is None
        reference = self._live(micro_batch, target_BT) if live else Reference(micro_batch.stored_target)
        return TargetLoss(count, self.factor, reference, self.held.weight)

    @torch.no_grad()
    def _live(self, micro_batch: MicroBatch, counted_BT: Tensor) -> Reference:
        """Return the base's distribution at tokens that count, from the base in memory."""
        assert self.base is not None
        rows_B = counted_BT.any(1)
        with without_adapters(self.base) if self.base is self.model else nullcontext():
            hidden_MD, head = self._states(
                self.base, micro_batch.token_ids_BT[rows_B], micro_batch.real_BT[rows_B], (counted_BT[rows_B],)
            )
        return Reference(hidden_MD=_autocast(hidden_MD), head=head)  # logits in the format of the model's own


def _autocast(hidden_MD: Tensor) -> Tensor:
    device = hidden_MD.device.type
    return hidden_MD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden_MD


def _picked(values: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([values[mask] for mask in masks])


def losses(
    model: nn.Module, micro_batch: MicroBatch, rehearsal_weight: float = 1.0, spec: RehearsalSpec | None = None
) -> Losses:
    """Return the losses of `micro_batch` by a model that an Objective has taken over, however it is wrapped."""
    # in a function: FSDP would turn every tensor that it finds in an argument into bfloat16, coefficients included
    parts: Losses = model(micro_batch=lambda: micro_batch, rehearsal_weight=rehearsal_weight, spec=spec)
    return parts


def divergence_by_row(model: nn.Module, micro_batch: MicroBatch, spec: RehearsalSpec) -> Tensor:
    """Return the divergence of each row (B) from the base, in nats, as `losses` would sum it."""
    nats_B: Tensor = model(micro_batch=lambda: micro_batch, spec=spec, by_row=True)
    return nats_B
