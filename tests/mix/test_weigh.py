"""FLOW's weights against the formula in plain numbers, from the base's own losses to the rows that are trained on."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from cfsd.data.stage import prepare
from cfsd.data.target import Target
from cfsd.errors import BadInput, NotFinite
from cfsd.machine import Machine
from cfsd.mix.spec import MixSpec
from cfsd.mix.stage import mix
from cfsd.mix.weigh import weigh
from cfsd.model.loading import load_model
from cfsd.store.artifact import Artifact, Draft, Store, key_of
from cfsd.store.tables import CORPUS, LOSSES, TARGET, read_rows, shard_path, table_of, write_shard
from cfsd.train.batches.mixture import Mask, MixtureRows
from cfsd.train.methods import Methods
from tests.conftest import fetched_with_nan, write_rows

MACHINE = Machine(device="cpu", threads=1, micro_batch_tokens=60)
Flow = Literal["off", "sample", "token"]
FLOWS: list[tuple[Flow, Literal["token", "row"]]] = [
    ("sample", "token"), ("sample", "row"), ("token", "token"), ("token", "row"),
]  # fmt: skip


class World:
    """A target, the base's losses on it, and two rows to rehearse."""

    def __init__(self, store: Store, base: Artifact, folder: Path) -> None:
        self.store, self.base = store, base
        wanted = Target(path=str(write_rows(folder / "rows.jsonl")), held_out=9, seed=0)
        self.target = self.make("target", lambda draft: prepare(base, wanted, draft))
        self.losses = self.make("losses", self.weigh)
        text = {"finish_reason": "length", "shard": 0, "seed": 0, "text": "", "source": "context-free"}
        rows = [{"row_id": i, "token_ids": [0, 5, 6 + i], "logprobs": [None, -1, -1], **text} for i in range(2)]
        (folder / "corpus").mkdir()
        write_shard(folder / "corpus", "corpus", 0, table_of(CORPUS, rows))
        self.corpus = folder / "corpus"

    def weigh(self, draft: Draft) -> None:
        weigh(self.base, self.target, draft, MACHINE)

    def make(self, kind: str, work: Callable[[Draft], None], key: str = "0" * 16) -> Artifact:
        return self.store.make(kind, key, work)[0]

    def mixed(self, flow: Flow, average: Literal["token", "row"] = "token") -> Artifact:
        paths = self.store.path(self.target), self.corpus
        losses = self.store.path(self.losses) if flow != "off" else None
        spec = MixSpec(seed=0, flow=flow, flow_average=average)
        return self.make("mixture", lambda draft: mix(*paths, spec, draft, losses), spec.digest())

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.store.path(self.target), "train")

    @torch.no_grad()
    def by_hand(self) -> list[list[float]]:
        """Return the base's -log p of every response token, a row at a time in float64."""
        model = load_model(self.store.path(self.base), "cpu").double()
        found = []
        for row in self.rows():
            logprobs = model(torch.tensor([row["token_ids"]])).logits[0].log_softmax(-1)
            tokens = [t for t, counted in enumerate(row["supervised"]) if counted]
            found.append([-float(logprobs[t - 1, row["token_ids"][t]]) for t in tokens])
        return found


@pytest.fixture
def world(store: Store, base: Artifact, tmp_path: Path) -> World:
    return World(store, base, tmp_path)


def test_the_losses_are_the_bases_own_on_every_training_row(world: World) -> None:
    found = read_rows(world.store.path(world.losses), "losses")
    assert [row["row_id"] for row in found] == [row["row_id"] for row in world.rows()]
    for row, tokens in zip(found, world.by_hand(), strict=True):
        assert row["token_nll"] == pytest.approx(tokens, rel=1e-4)
        assert row["nll"] == pytest.approx(sum(tokens), rel=1e-5)
        assert row["count"] == len(tokens)
    metadata: Any = world.losses.metadata
    assert (metadata["rows"], metadata["tokens"]) == (31, sum(row["count"] for row in found))
    assert metadata["loss"] == pytest.approx(sum(row["nll"] for row in found) / metadata["tokens"])


def test_a_killed_run_keeps_its_blocks_and_ends_with_the_same_losses(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cfsd.mix.weigh.BLOCK", 8)
    whole = world.make("losses", world.weigh, "1" * 16)
    marks: list[int] = []

    def stopped(draft: Draft) -> None:
        world.weigh(draft)
        shard_path(draft.folder, "losses", 2).unlink()
        shard_path(draft.folder, "losses", 3).unlink()
        marks.append(shard_path(draft.folder, "losses", 1).stat().st_mtime_ns)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.make("losses", stopped, "2" * 16)
    again = world.make("losses", world.weigh, "2" * 16)
    assert again.content == whole.content and again.metadata == whole.metadata
    assert shard_path(world.store.path(again), "losses", 1).stat().st_mtime_ns == marks[0]
    assert again.metadata == pytest.approx(world.losses.metadata)


def test_a_base_that_gives_nan_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=r"rows \[\d.*mix\.flow"):
        World(store, fetched_with_nan(store, tmp_path / "model", 13), tmp_path)


def wanted(losses: list[list[float]], flow: str, average: str) -> tuple[float, list[list[float]]]:
    """Return tau and the weight of every response token, from the formula and nothing else."""
    per_row = [sum(tokens) / len(tokens) for tokens in losses]
    every = [loss for tokens in losses for loss in tokens]
    tau = statistics.median(every if flow == "token" else per_row)
    weights = [
        [math.exp(-(loss if flow == "token" else mean) / tau) / (len(tokens) if average == "row" else 1)
         for loss in tokens]
        for tokens, mean in zip(losses, per_row, strict=True)
    ]  # fmt: skip
    scale = len(every) / sum(map(sum, weights))
    return tau, [[scale * weight for weight in row] for row in weights]


@pytest.mark.parametrize(("flow", "average"), FLOWS)
def test_every_response_token_has_the_weight_of_the_formula(
    world: World, flow: Flow, average: Literal["token", "row"]
) -> None:
    made = world.mixed(flow, average)
    rows = MixtureRows(world.store.path(made))
    tau, weights = wanted(world.by_hand(), flow, average)
    found = []
    for row in (rows[i] for i in range(rows.sources().count("target"))):
        inner = row.weights or [1.0] * len(row.token_ids)
        found.append([row.weight * w for w, on in zip(inner, row.supervised, strict=True) if on])
    for got, want in zip(found, weights, strict=True):
        assert got == pytest.approx(want, rel=1e-3)
    counts = [len(row) for row in found]
    assert len(set(counts)) > 1
    assert sum(map(sum, found)) == pytest.approx(sum(counts), rel=1e-5)
    metadata: Any = made.metadata
    shown = [weight for row in found for weight in (row if flow == "token" else row[:1])]
    assert metadata["flow"] == flow
    assert metadata["tau"] == pytest.approx(tau, rel=1e-4)
    assert metadata["smallest_weight"] == pytest.approx(min(shown))
    assert metadata["median_weight"] == pytest.approx(statistics.median(shown))
    assert metadata["largest_weight"] == pytest.approx(max(shown))


@pytest.mark.parametrize("flow", ["off", "sample", "token"])
def test_of_tokens_that_stm_leaves_the_mean_weight_is_one(world: World, flow: Flow) -> None:
    every = [loss for tokens in world.by_hand() for loss in tokens]
    mask = Mask(world.store.path(world.losses), lambda nll: nll < statistics.median(every))
    rows = MixtureRows(world.store.path(world.mixed(flow)), mask=mask)
    found: list[float] = []
    for row in (rows[i] for i in range(rows.sources().count("target"))):
        inner = row.weights or [1.0] * len(row.token_ids)
        found += [row.weight * w for w, on in zip(inner, row.supervised, strict=True) if on]
    assert len(found) == len(every) // 2 and statistics.fmean(found) == pytest.approx(1, rel=1e-5)
    assert (len(set(found)) > 1) == (flow != "off")
    assert rows[len(rows) - 1].weight == 1.0  # of the rehearsal


@pytest.mark.parametrize("flow", ["sample", "token"])
def test_rehearsal_rows_of_the_same_mixture_weigh_one(world: World, flow: Flow) -> None:
    rows = MixtureRows(world.store.path(world.mixed(flow)))
    rehearsal = [rows[i] for i in range(rows.sources().count("target"), len(rows))]
    assert [row.token_ids for row in rehearsal] == [[0, 5, 6], [0, 5, 7]]
    assert [(row.weight, row.weights) for row in rehearsal] == [(1.0, None)] * 2
    target = [rows[i] for i in range(rows.sources().count("target"))]
    assert all((row.weights is not None) == (flow == "token") for row in target)


def test_off_is_the_mixture_of_before(world: World, tmp_path: Path) -> None:
    """Its columns and values are all that the digest is over, so it is the same whatever is said about averages."""
    plain, other = world.mixed("off"), world.mixed("off", "row")
    assert plain.content == other.content != world.mixed("sample").content
    rows = read_rows(world.store.path(plain), "mixture")
    assert set(rows[0]) == {"row_id", "source", "token_ids", "corpus_row", "supervised", "weight"}
    assert {row["weight"] for row in rows} == {1.0}
    assert not {"flow", "tau", "median_weight"} & set(plain.metadata)
    assert set(read_rows(world.store.path(world.mixed("sample")), "mixture")[0]) == set(rows[0])


def weighed(store: Store, folder: Path, losses: list[list[float]], flow: Flow) -> Artifact:
    """Return a mixture of rows with these losses per response token."""
    rows = [
        {"row_id": 7 + i, "source": "target", "token_ids": [0] * (1 + len(tokens)), "prompt": "", "response": "",
         "supervised": [False, *[True] * len(tokens)]}
        for i, tokens in enumerate(losses)
    ]  # fmt: skip
    scored = [
        {"row_id": 7 + i, "nll": sum(tokens), "count": len(tokens), "token_nll": tokens}
        for i, tokens in enumerate(losses)
    ]
    write_shard(folder, "train", 0, table_of(TARGET, rows))
    write_shard(folder, "losses", 0, table_of(LOSSES, scored))
    spec = MixSpec(seed=0, flow=flow)
    return store.make("mixture", spec.digest(), lambda draft: mix(folder, folder, spec, draft, folder))[0]


def test_the_median_row_has_the_weight_one_over_e_before_scaling(store: Store, tmp_path: Path) -> None:
    """Means 1, 2 and 6: weights e^-1/2, e^-1 and e^-3 for 3, 2 and 1 tokens."""
    made = weighed(store, tmp_path, [[1, 1, 1], [3, 1], [6]], "sample")
    plain = [math.exp(-0.5), math.exp(-1), math.exp(-3)]
    scale = 6 / (3 * plain[0] + 2 * plain[1] + plain[2])
    rows = read_rows(store.path(made), "mixture")
    assert [row["weight"] for row in rows] == pytest.approx([scale * weight for weight in plain])
    assert made.metadata["tau"] == 2
    assert made.metadata["median_weight"] == pytest.approx(scale * math.exp(-1))


@pytest.mark.parametrize(
    ("flow", "losses", "message"),
    [
        ("sample", [[0.0, 0.0], [0.0], [2.0]], "median loss per row .* is 0.*set mix.flow to off, or take"),
        ("token", [[0.0, 0.0, 0.0, 4.0], [1.0, 0.0]], "median loss per token .* is 0.*set mix.flow to sample or off"),
        ("sample", [[math.inf], [math.inf], [2.0]], "is inf"),
    ],
)
def test_a_median_of_nothing_is_refused(
    store: Store, tmp_path: Path, flow: Flow, losses: list[list[float]], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        weighed(store, tmp_path, losses, flow)


def test_a_row_that_the_base_finds_impossible_weighs_nothing_and_breaks_nothing(store: Store, tmp_path: Path) -> None:
    made = weighed(store, tmp_path, [[1e-3], [1e-3], [900.0]], "sample")
    assert [row["weight"] for row in read_rows(store.path(made), "mixture")] == pytest.approx([1.5, 1.5, 0])


def test_losses_of_another_target_are_never_used(store: Store, tmp_path: Path) -> None:
    weighed(store, tmp_path, [[1.0], [2.0], [3.0]], "sample")
    rows = [row | {"row_id": row["row_id"] + 1} for row in read_rows(tmp_path, "train")]
    write_shard(tmp_path, "train", 0, table_of(TARGET, rows))
    with pytest.raises(AssertionError, match="another target"):
        store.make("mixture", "f" * 16, lambda d: mix(tmp_path, tmp_path, MixSpec(flow="sample"), d, tmp_path))


def test_losses_are_in_the_key_of_a_mixture_only_with_flow(world: World) -> None:
    from cfsd.store.tables import BATCHES
    from tasks._planned import Planned, planning
    from tasks.mix import mix_rows
    from tasks.weigh import weigh_target

    def key(spec: MixSpec, losses: Artifact | None) -> str:
        return mix_rows(world.target, world.target, losses, spec, MACHINE).key

    steps: list[Planned] = []
    token = planning.set(steps)
    try:
        off, flow = MixSpec(seed=0), MixSpec(seed=0, flow="sample")
        scored = [weigh_target(world.base, world.target, spec, Methods(), MACHINE) for spec in (off, flow)]
        keys = [key(off, None), key(off, world.losses), key(flow, world.losses), key(flow, world.target)]
    finally:
        planning.reset(token)
    assert scored[0] is None
    assert scored[1] and scored[1].key == key_of("weigh", world.base, world.target)
    assert keys[:2] == [key_of("mix", world.target, world.target, off, BATCHES)] * 2
    assert len(set(keys[1:])) == 3
