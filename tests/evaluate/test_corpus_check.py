"""The check that every run makes of its corpus: honest ones pass, each planted fault meets the check made for it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from cfsd.data.corpus_table import corpus_table
from cfsd.evaluate.corpus_check import (
    FIRST,
    LIKELIHOOD,
    SIGMAS,
    START,
    TAIL,
    Checked,
    WrongCorpus,
    check,
    check_corpus,
    first_distribution,
)
from cfsd.generate.chat_template import template_start
from cfsd.generate.sampling import Rows, sample
from cfsd.generate.spec import GenerateSpec, ProbeSpec
from cfsd.generate.stage import generate, probe
from cfsd.machine import Machine
from cfsd.mix.spec import MixSpec
from cfsd.mix.stage import mix
from cfsd.model.loading import load_model, load_tokenizer, read_eos_ids
from cfsd.model.sample import Sample
from cfsd.statistics.sample_tests import difference_z, first_token_p
from cfsd.store.artifact import Artifact, Draft, Store, key_of
from cfsd.store.tables import CORPUS, read_rows, shard_path, write_shard
from tests.conftest import fetched, save_model

ROWS, LENGTH = 500, 12
CPU = Machine(device="cpu", threads=1)
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


class World(NamedTuple):
    """A model with a chat template, and where its tables go."""

    model: Any
    tokenizer: Any
    ends: tuple[int, ...]
    probs_V: Any
    folder: Path

    def drawn(self, law: GenerateSpec, prompt: list[int], stream: str = "context-free") -> list[Sample]:
        rows = range(law.rows)
        return sample(self.model, Rows(rows, [prompt] * law.rows, self.ends, stream), law)

    def written(self, name: str, samples: list[Sample], source: str = "context-free") -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        table = corpus_table(dict(enumerate(samples)), self.tokenizer, CORPUS, source=source, shard=0, seed=0)
        write_shard(folder, "corpus", 0, table)
        return folder

    def checked(self, prompt: list[int] | None = None, seed: int = 0, **settings: Any) -> Checked:
        """Return the check of a corpus sampled after `prompt` by `settings`, whatever it claims."""
        spec = GenerateSpec(rows=ROWS, length=LENGTH, seed=seed, **settings)
        corpus = self.written(f"corpus{seed}", self.drawn(spec, prompt or [0]))
        return check_corpus(corpus, self.probe(seed), self.mixture(corpus), self.probs_V, 0)

    def probe(self, seed: int = 0) -> Path:
        """A probe with shorter rows than the corpus."""
        spec = GenerateSpec(rows=200, length=LENGTH - 4, seed=seed)
        return self.written(f"probe{seed}", self.drawn(spec, [0], "probe"), "probe")

    def mixture(self, corpus: Path) -> Path:
        folder = corpus.with_name(f"{corpus.name}-mixture")
        folder.mkdir(exist_ok=True)
        mix(self.folder / "no target", corpus, MixSpec(), Draft(Store(self.folder), folder, continued=False))
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = save_model(tmp_path_factory.mktemp("model"))
    model, tokenizer = load_model(folder, "cpu").eval(), load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    return World(
        model, tokenizer, read_eos_ids(folder), first_distribution(model, 0), tmp_path_factory.mktemp("tables")
    )


def test_honest_corpora_pass_and_what_is_measured_of_them_is_as_likely_as_it_says(world: World) -> None:
    found = [world.checked(seed=seed) for seed in range(20)]
    assert [one.failed for one in found] == [{}] * len(found)
    z = [one.mean_logprob_z for one in found if one.mean_logprob_z is not None]
    assert len(z) == len(found) and stats.kstest(z, "norm").pvalue > 1e-3
    rare = [one.rare_token_z for one in found if one.rare_token_z is not None]
    assert len(rare) == len(found) and stats.kstest(rare, "norm").pvalue > 1e-3
    assert stats.kstest([one.first_token_p for one in found], "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("settings", "named"), [({"top_k": 4}, FIRST), ({"top_k": 4}, TAIL), ({"temperature": 0.7}, LIKELIHOOD)]
)
def test_another_distribution_is_caught(world: World, settings: dict[str, Any], named: str) -> None:
    assert settings.get("top_k", 4) == len(world.probs_V) // 8
    assert named in world.checked(**settings).failed


def test_a_chat_template_before_the_text_is_caught(world: World) -> None:
    prefix = template_start(world.tokenizer).prefix_ids
    assert prefix[0] == 0 and len(prefix) > 1  # it begins with the start token itself
    assert "other prompt tokens than it" in world.checked(prompt=prefix).failed[START]


def test_a_doubled_start_token_is_caught_given_or_not(world: World) -> None:
    assert "other prompt tokens than it" in world.checked(prompt=[0, 0]).failed[START]
    samples = [s._replace(logprobs=[None, -3.0, *s.logprobs[2:]]) for s in world.drawn(distribution_of(ROWS), [0, 0])]
    corpus = world.written("doubled", samples)
    found = check_corpus(corpus, world.probe(), world.mixture(corpus), world.probs_V, 0)
    assert "have it twice" in found.failed[START]


def distribution_of(rows: int) -> GenerateSpec:
    return GenerateSpec(rows=rows, length=LENGTH, seed=0)


def test_another_start_token_is_caught(world: World) -> None:
    assert "do not begin with it" in world.checked(prompt=[5]).failed[START]


Change = Callable[[list[dict[str, Any]]], None]


def _template(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["token_ids"] = [0, 7, 8, *row["token_ids"][1:]]
        row["supervised"] = [False, True, True, *row["supervised"][1:]]


def _doubled(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["token_ids"], row["supervised"] = [0, *row["token_ids"]], [False, *row["supervised"]]


def _masked(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["supervised"] = [False] * len(row["supervised"])


def _one_token(rows: list[dict[str, Any]]) -> None:
    rows[3]["token_ids"][-1] ^= 1


@pytest.mark.parametrize(
    ("change", "said"),
    [(_template, "500 rows of the mixture are not"), (_doubled, "other prompt tokens than it in the mixture"),
     (_masked, "other prompt tokens than it in the mixture"), (_one_token, "1 rows of the mixture are not")],
)  # fmt: skip
def test_what_happens_to_rows_in_mixing_is_caught(world: World, change: Change, said: str) -> None:
    corpus = world.written("mixed", world.drawn(distribution_of(ROWS), [0]))
    folder = world.mixture(corpus)
    assert check_corpus(corpus, world.probe(), folder, world.probs_V, 0).failed == {}
    rows, schema = read_rows(folder, "mixture"), pq.read_schema(shard_path(folder, "mixture", 0))
    change(rows)
    write_shard(folder, "mixture", 0, pa.Table.from_pylist(rows, schema=schema))
    assert said in check_corpus(corpus, world.probe(), folder, world.probs_V, 0).failed[START]


def test_other_sources_are_not_judged_by_the_distribution_of_the_base(world: World) -> None:
    mixed = world.written("other", world.drawn(distribution_of(50), [5]), "contextual")
    checked = check_corpus(mixed, world.probe(), world.mixture(mixed), world.probs_V, 0)
    assert checked == Checked(0, None, None, None, {})


def test_a_token_that_cannot_come_is_seen_among_many(world: World) -> None:
    probs_V = np.array([0.5, 0.5, 1e-9])
    assert first_token_p(np.array([0, 1] * 500), probs_V) > 0.5
    assert first_token_p(np.array([0, 1] * 500 + [2]), probs_V) < 1e-5
    assert first_token_p(np.array([0, 1] * 500 + [3]), probs_V) < 1e-5  # not in the vocabulary


def test_few_rows_make_the_deviate_smaller_than_the_quotient() -> None:
    rng = np.random.default_rng(0)
    few, many = ((rng.normal(-2, 1, n), np.ones(n, int)) for n in (6, 6000))
    quotient = (few[0].mean() - many[0].mean()) / np.sqrt(few[0].var(ddof=1) / 6 + many[0].var(ddof=1) / 6000)
    z = difference_z(few, many)
    assert z is not None and 0 < abs(z) < abs(quotient)
    assert difference_z((few[0][:1], few[1][:1]), many) is None


@pytest.fixture
def artifacts(store: Store, model_folder: Path) -> Iterator[Callable[..., list[Artifact]]]:
    """Base, probe, corpus and mixture as the stages make them."""
    base = fetched(store, model_folder)

    def made(kind: str, work: Callable[[Draft], None], *key: Any) -> Artifact:
        return store.make(kind, key_of(kind, *key), work)[0]

    def all_of(spec: GenerateSpec) -> list[Artifact]:
        of_probe = ProbeSpec(rows=100, length=LENGTH, seed=0)
        probed = made("corpus", lambda draft: probe(base, of_probe, draft, CPU), of_probe)
        corpus = made("corpus", lambda draft: generate(base, None, spec, draft, CPU), spec)
        nowhere = store.root / "no target"
        mixture = made("mixture", lambda draft: mix(nowhere, store.path(corpus), MixSpec(), draft), corpus)
        return [base, probed, corpus, mixture]

    yield all_of


def test_a_corpus_that_claims_to_be_exact_must_be(store: Store, artifacts: Any, monkeypatch: Any) -> None:
    def checked(spec: GenerateSpec, **claims: Any) -> Artifact:
        base, probed, corpus, mixture = artifacts(spec)
        corpus = corpus.model_copy(update={"metadata": corpus.metadata | claims})
        key = key_of("check", corpus, str(claims))
        return store.make("check", key, lambda draft: check(base, probed, corpus, mixture, draft, CPU))[0]

    honest, warm = distribution_of(200), distribution_of(200).model_copy(update={"temperature": 0.5})
    metadata: Any = checked(honest).metadata
    assert metadata["failed"] == {} and abs(metadata["mean_logprob_z"]) < SIGMAS and metadata["rows"] == 200
    assert LIKELIHOOD in str(checked(warm).metadata["failed"])  # says itself that it is biased: described, not refused
    assert LIKELIHOOD in str(checked(warm, biased="", ids="exact").metadata["failed"])  # from a server: likewise
    with pytest.raises(WrongCorpus, match=f"{LIKELIHOOD}.*generate.seed"):
        checked(warm, biased="")
