"""What methods do to the loss of target tokens: the formulas on all logits in float64, however the batch is cut.

N tokens of the target and of the rehearsal, V vocabulary, D hidden width.
"""

import copy
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cfsd.errors import BadInput
from cfsd.generate.token_choice import tail_points
from cfsd.model.head import Head
from cfsd.model.likelihood import token_logprobs
from cfsd.model.loading import load_model
from cfsd.store.artifact import Store
from cfsd.store.tables import batches, read_rows
from cfsd.train.batches.micro_batches import MicroBatch, Row, micro_batches_of
from cfsd.train.batches.mixture import Mask, MixtureRows
from cfsd.train.batches.stored_distributions import StoredDistributions, lay_out
from cfsd.train.dropout import turn_off_dropout
from cfsd.train.loss import token_loss
from cfsd.train.loss.objective import Losses, Objective, losses
from cfsd.train.loss.token_loss import Reference, Stored, TargetLoss, token_losses
from cfsd.train.methods import Methods
from cfsd.train.methods.method import AlongSpec
from cfsd.train.spec import RehearsalSpec
from tests.conftest import save_model, write_rows
from tests.train.test_objective import toy
from tests.train.test_token_loss import Case, base_law, case, differentiated, log_distribution, relative, stored_of
from tests.train.test_train import World, along_in, figures, losses_in, signals_given_back, spec_with, trained, world_in

__all__ = ["signals_given_back"]

FIRST, LAST = 15, 12  # tokens of the target, and of the rehearsal that are compared with the base
WEIGHT = 0.3
POWERS = [(0, 0), (1, 0), (2, 0), (0, 1), (0, 0.5), (1, 1)]  # of DFT and of EAFT


def methods_of(dft: float, eaft: float, reference: str | None = None) -> Methods:
    held = {"weight": WEIGHT, "reference": reference} if reference else {}
    return Methods.model_validate({"dft": {"power": dft}, "eaft": {"power": eaft}, "target_divergence": held})


def factor(law_NV: Tensor, next_N: Tensor, dft: float, eaft: float) -> Tensor:
    """Return p^dft (H / 3)^eaft from all log-probabilities, without a gradient."""
    law_NV = law_NV.detach()
    top_NK = law_NV.sort(-1, descending=True).values[:, :20].exp()
    top_NK = top_NK / top_NK.sum(-1, keepdim=True)
    entropy_N = -(top_NK * top_NK.log()).sum(-1)
    return law_NV.exp().gather(1, next_N[:, None])[:, 0] ** dft * (entropy_N / 3) ** eaft


def with_tail(stored: Stored, law_NV: Tensor) -> Stored:
    """Return `stored` with three samples of the tail at each token, which may be equal."""
    outside_NV = law_NV.scatter(1, stored.ids_MK, -torch.inf)
    ids_NS = torch.multinomial(outside_NV.exp(), 3, replacement=True, generator=torch.Generator().manual_seed(4))
    return stored._replace(tail_ids_MS=ids_NS, tail_logprobs_MS=law_NV.gather(1, ids_NS))


def divergence_of(c: Case, kind: str) -> tuple[Tensor, Reference]:
    """Return the divergence of every token by autograd over all logits, and the reference that it is from."""
    law_NV, base_NV = log_distribution(*c.given, c.softcap, c.scale), base_law(c)
    if kind == "live":
        return (base_NV.exp() * (base_NV - law_NV)).sum(-1), Reference(hidden_MD=c.base_ND, head=c.base_head)
    kept = with_tail(stored_of(c), base_NV)
    on_top_N = (kept.logprobs_MK.exp() * (kept.logprobs_MK - law_NV.gather(1, kept.ids_MK))).sum(-1)
    tail_N = (kept.tail_logprobs_MS - law_NV.gather(1, kept.tail_ids_MS)).mean(-1)
    return on_top_N + kept.rest_M.exp() * tail_N, Reference(kept)


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["none", "live", "stored"])
@pytest.mark.parametrize(("dft", "eaft"), POWERS)
def test_losses_and_gradients_are_those_of_the_formulas(
    dft: float, eaft: float, kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Target tokens first, then some that only count, then rehearsal tokens with the live base."""
    monkeypatch.setattr(token_loss, "CHUNK", size)
    c = case(softcap=5.0, scale=0.7)
    law_NV, hidden, count = log_distribution(*c.given, c.softcap, c.scale), c.given[0], len(c.next_N)
    nll_N, factor_N = -law_NV.gather(1, c.next_N[:, None])[:, 0], factor(law_NV, c.next_N, dft, eaft)
    whole_N, live = divergence_of(c, "live")
    held_N, reference = divergence_of(c, kind) if kind != "none" else (torch.zeros(count), None)
    target = TargetLoss(
        FIRST, methods_of(dft, eaft).factor(), reference.part(slice(0, FIRST)) if reference else None, WEIGHT
    )
    rehearsed = live.part(slice(count - LAST, count))
    found = token_losses(hidden, Head(*c.given[1:], 5.0, 0.7), c.next_N, c.coefficient_N, rehearsed, target)
    wanted_N = torch.cat(
        [(factor_N * nll_N + WEIGHT * held_N)[:FIRST], nll_N[FIRST : count - LAST], whole_N[count - LAST :]]
    )
    assert torch.allclose(found.loss_N, wanted_N, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found.nll_N, nll_N, rtol=1e-10)
    assert torch.allclose(found.factor_N[:FIRST], factor_N[:FIRST], rtol=1e-10) and bool(
        (found.factor_N[FIRST:] == 1).all()
    )
    assert torch.allclose(found.divergence_N[:FIRST], held_N[:FIRST].double(), rtol=1e-10)
    total = (c.coefficient_N * wanted_N).sum()
    assert relative(differentiated(c, found.total), differentiated(c, total)) < 1e-10


def test_samples_of_the_tail_give_the_whole_divergence_along_any_text() -> None:
    """In expectation over the samples, whichever token the target has there."""
    c = case()
    base_NV, whole_N = base_law(c), divergence_of(c, "live")[0].detach()
    kept, head = stored_of(c, 2), Head(*c.given[1:])
    drawn = torch.multinomial(
        base_NV.scatter(1, kept.ids_MK, -torch.inf).exp(), 20_000, replacement=True,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    kept = kept._replace(tail_ids_MS=drawn, tail_logprobs_MS=base_NV.gather(1, drawn))
    target = TargetLoss(len(c.next_N), None, Reference(kept), 1.0)
    found = token_losses(c.given[0], head, c.next_N, c.coefficient_N, None, target).divergence_N
    assert torch.allclose(found, whole_N, rtol=0.05)
    assert float((found - whole_N).mean().abs() / whole_N.mean()) < 0.005


def test_entropy_is_of_the_twenty_likeliest_tokens_and_of_fewer_in_a_small_vocabulary() -> None:
    for logits, wanted in ((torch.zeros(2, 100), 20.0), (torch.zeros(2, 8), 8.0)):
        factor_N = token_losses(
            logits.double(), Head(None), torch.zeros(2).long(), torch.ones(2), None,
            TargetLoss(2, methods_of(0, 1).factor()),
        ).factor_N  # fmt: skip
        assert factor_N.tolist() == pytest.approx([torch.log(torch.tensor(wanted)).item() / 3] * 2, rel=1e-6)


# in batches


def rows_of_two_sources() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, (source, length) in enumerate(product(("target", "context-free"), (3, 9, 4, 14, 8, 5, 11, 6))):
        start = 1 if source == "context-free" else 1 + number % (length - 1)
        ids = torch.randint(0, 11, (length,), generator=generator).tolist()
        supervised = [False] * start + [True] * (length - start)
        rows.append(Row(source, ids, supervised, 1.0 + number % 3, corpus_row=number))
    return rows


class ReportSource:
    """The base's distributions, as the stage stores them, by row."""

    def __init__(self, base: Any, rows: list[Row]) -> None:
        texts = [row.token_ids for row in rows]
        points = [tail_points(0, "test", i, len(text), 4) for i, text in enumerate(texts)]
        self.samples = token_logprobs(base, texts, (), top_logprobs=3, tail_points=points)

    def at(self, rows: list[tuple[int, list[int], list[bool]]]) -> Stored:
        parts = [[torch.zeros(0, 3).int(), torch.zeros(0, 3), torch.zeros(0), torch.zeros(0), torch.zeros(0, 4).int(),
                  torch.zeros(0, 4)]]  # fmt: skip
        for place, token_ids, supervised in rows:
            sample, counted = self.samples[place], torch.tensor(supervised)
            assert sample.token_ids == token_ids and sample.top is not None
            ids, logprobs, rest, *tail = (torch.from_numpy(part)[counted] for part in sample.top)
            drawn = torch.tensor([p or 0.0 for p in sample.logprobs])[counted]
            parts.append([ids, logprobs, rest, drawn, *tail])
        return Stored(*(torch.cat(column) for column in zip(*parts, strict=True)))


def training(model: Any) -> Any:
    """Return `model` in training, without dropout."""
    turn_off_dropout(model)
    return model.train()


def summed(
    model: Any, micro_batches: list[MicroBatch], methods: Methods, base: Any, spec: RehearsalSpec
) -> tuple[list[float], Tensor]:
    """Return the sums of all micro-batches, and the gradient."""
    objective = Objective(model, spec, base, methods=methods)
    model.zero_grad()
    sums = torch.zeros(len(Losses._fields), dtype=torch.float64)
    for micro_batch in micro_batches:
        parts = losses(model, micro_batch, 0.7)
        parts.loss.backward()  # type: ignore[no-untyped-call]
        sums += torch.stack([part.detach().double() for part in parts])
    objective.remove()
    return sums.tolist(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


CUT = {"dft": methods_of(1, 0), "eaft": methods_of(0, 1), "both": methods_of(1, 1), "live": methods_of(0, 0, "base"),
       "ASFT": methods_of(1, 0, "base"), "stored": methods_of(1, 0, "stored")}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("loss", ["nll", "kl"])
def test_a_batch_is_the_same_however_it_is_cut_packed_and_unpacked(name: str, loss: Any) -> None:
    methods, rows = CUT[name], rows_of_two_sources()
    model, base = training(toy(2, 11)), toy(3, 11)
    spec = RehearsalSpec(loss=loss, reference="base" if loss == "kl" else "stored")
    live = base if loss == "kl" or (methods.divergence() and not methods.divergence().stored) else None  # type: ignore[union-attr]
    along: Any = ReportSource(base, rows) if methods.target_divergence.reference == "stored" else None
    found = []
    for most, packed in ((1000, True), (1000, False), (1, True), (24, True), (24, False)):
        for one in (model, base):
            one.set_attn_implementation("sdpa" if packed else "eager")
        micro_batches = micro_batches_of(rows, most, of_target=along)
        found.append(summed(model, micro_batches, methods, live, spec))
        assert len(micro_batches) == {1000: 1, 1: 16}.get(most, len(micro_batches))
    for (sums, slope), (other, slopes) in pairwise(found):
        assert other == pytest.approx(sums, rel=1e-9)
        assert relative(slopes, slope) < 1e-9


@pytest.mark.parametrize("dft", [0.0, 1.0])
def test_at_the_base_itself_the_divergence_along_the_target_is_exactly_nothing(dft: float) -> None:
    """Value and gradient, to the last bit, beside rehearsal rows: what is left is the likelihood's."""
    base = toy(3, 11)
    found = []
    for weight in (0.0, 5.0):
        model = training(copy.deepcopy(base))
        methods = Methods.model_validate(
            {"dft": {"power": dft}, "target_divergence": {"weight": weight, "reference": "base"}}
        )
        sums, gradient = summed(
            model,
            micro_batches_of(rows_of_two_sources(), 24),
            methods,
            base,
            RehearsalSpec(loss="kl", reference="base"),
        )
        found.append((sums[0], gradient))
        assert sums[Losses._fields.index("target_divergence")] == 0
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert relative(found[1][1], found[0][1]) < 1e-12


# what is stored, and which tokens are learned


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> World:
    folder = tmp_path_factory.mktemp("world")
    return world_in(Store(folder / "data"), model_folder, write_rows(folder / "rows.jsonl", count=48))


def test_what_is_stored_along_the_target_is_the_bases_distribution_there(world: World, tmp_path: Path) -> None:
    along = along_in(world, AlongSpec(top_logprobs=6, tail_samples=3))
    lay_out(world.store.path(along), tmp_path, top=True)
    stored, model = StoredDistributions(tmp_path), load_model(world.store.path(world.base), "cpu").double()
    rows = read_rows(world.store.path(world.target), "train")
    assert along.metadata == {"rows": len(rows), "tokens": sum(sum(row["supervised"]) for row in rows)}
    for number in (0, 7, len(rows) - 1):
        row = rows[number]
        with torch.no_grad():
            law_TV = model(torch.tensor([row["token_ids"]])).logits[0].log_softmax(-1)
        law_NV = law_TV[[t - 1 for t, counted in enumerate(row["supervised"]) if counted]]
        found = stored.at([(number, row["token_ids"], row["supervised"])])
        top_NK, ids_NK = law_NV.topk(6)
        assert torch.equal(found.ids_MK.long(), ids_NK)
        assert torch.allclose(found.logprobs_MK.double(), top_NK, atol=2e-3)  # kept in float16
        outside_NV = law_NV.scatter(1, ids_NK, -torch.inf)
        assert torch.allclose(found.rest_M.double(), outside_NV.logsumexp(-1), atol=1e-4)
        assert found.tail_ids_MS.shape == (len(law_NV), 3)
        assert torch.allclose(
            found.tail_logprobs_MS.double(), outside_NV.gather(1, found.tail_ids_MS.long()), atol=5e-3
        )


def test_only_tokens_below_the_threshold_are_learned(world: World) -> None:
    """And nothing else of the mixture changes: rehearsal rows count as before."""
    nll = [loss for part in batches(world.store.path(losses_in(world)), "losses") for row in part.to_pylist()
           for loss in row["token_nll"]]  # fmt: skip
    threshold = float(torch.tensor(nll).double().median().exp())
    learned = Methods.model_validate({"stm": {"threshold": threshold}}).learned()
    assert learned
    folder, mask = world.store.path(world.mixture), Mask(world.store.path(losses_in(world)), learned)
    plain, masked = MixtureRows(folder), MixtureRows(folder, mask=mask)
    found, place = [], 0
    for number in range(len(plain)):
        before, after = plain[number], masked[number]
        assert after._replace(supervised=[]) == before._replace(supervised=[])
        if not before.is_target():
            assert after == before
            continue
        for counted, still in zip(before.supervised, after.supervised, strict=True):
            if counted:
                found.append((nll[place] <= torch.log(torch.tensor(threshold)).item() + 1e-9) == still)
                place += 1
            else:
                assert not still
    assert all(found) and len(found) == len(nll)
    count = masked.supervised_tokens()[: masked.sources().count("target")]
    assert 0 < sum(count) / len(nll) < 0.6
    with pytest.raises(BadInput, match=r"none of the target's \d+ tokens.*raise stm\.threshold"):
        MixtureRows(folder, mask=mask._replace(learned=lambda nll: nll < 0))


TRAINED: dict[str, dict[str, Any]] = {
    "dft": {"dft": {"power": 1}}, "eaft": {"eaft": {"power": 1}}, "stm": {"stm": {"threshold": 50.0}},
    "live": {"target_divergence": {"weight": 1.0, "reference": "base"}},
    "stored": {"target_divergence": {"weight": 1.0, "top_logprobs": 8, "tail_samples": 4}},
}  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize("name", TRAINED)
def test_a_training_shows_what_it_does(name: str, world: World) -> None:
    spec = spec_with(methods=TRAINED[name], rehearsal={"weight": 0})
    model = trained(world, f"{name:_>16}", world.plain, spec)
    plain = trained(world, "plain", world.plain, spec_with())
    assert model.content != plain.content
    shown = {
        key: figures(world, model, f"train/{key}") for key in ("target_weight", "target_divergence", "target_loss")
    }
    assert bool(shown["target_weight"]) == (name in ("dft", "eaft"))
    assert bool(shown["target_divergence"]) == (name in ("live", "stored"))
    if name in ("live", "stored"):
        first, *_, last = shown["target_divergence"].values()
        assert abs(first) < (1e-9 if name == "live" else 0.05) < last
    if name in ("dft", "eaft"):
        assert all(0 < value < 1.1 for value in shown["target_weight"].values())
    if name == "stm":
        assert "of the target's tokens are learned" in str(model.metadata["said"])
    else:
        assert shown["target_loss"][1] == pytest.approx(figures(world, plain, "train/target_loss")[1], rel=1e-6)


@pytest.mark.processes
def test_a_divergence_along_the_target_keeps_the_model_nearer_to_the_base_there(world: World) -> None:
    found = {}
    for weight in (0.01, 10.0):
        spec = spec_with(
            methods={"target_divergence": {"weight": weight, "reference": "base"}}, rehearsal={"weight": 0}
        )
        model = trained(world, f"{weight:016}", world.plain, spec)
        found[weight] = list(figures(world, model, "train/target_divergence").values())[-1]
    assert found[10.0] < found[0.01] / 5


@pytest.mark.processes
def test_a_divergence_along_the_target_beside_dropout_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", family="gpt2")
    world = world_in(Store(tmp_path / "data"), model, write_rows(tmp_path / "rows.jsonl"))
    spec = spec_with(methods=TRAINED["live"], epochs=1)
    with pytest.raises(BadInput, match=r"target_divergence compares.*with dropout.*set train\.dropout to 0"):
        trained(world, "0" * 16, world.plain, spec)
    without = trained(world, "1" * 16, world.plain, spec.model_copy(update={"dropout": 0.0}))
    assert figures(world, without, "train/target_divergence")[1] == 0
