"""What the filters and the mixing of a large corpus cost: seconds, memory, and whether both grow in line with it.

make bench PART=filtering                     10k, 100k and 1M rows of 128 tokens; 6 minutes, 4 GB of disk
python -m benchmarks.filtering 10000          other sizes

Each part runs in a process of its own, whose imports do not count. Texts are made of invented words by Zipf's law.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks._result import tell
from cfsd.filter.near_duplicates import duplicates_of
from cfsd.filter.spec import FilterSpec
from cfsd.filter.stage import filter_rows
from cfsd.machine import peak_memory
from cfsd.mix.spec import MixSpec
from cfsd.mix.stage import mix
from cfsd.store.artifact import Store
from cfsd.store.tables import CORPUS, TARGET, table_of, write_shard

SIZES = (10_000, 100_000, 1_000_000)
LENGTH = 128
SHARD = 128  # rows, as sampling makes them
RULES = FilterSpec(duplicates=True, min_tokens=16, max_tokens=LENGTH, repetition=True, min_mean_logprob=-6,
                   max_mean_logprob=-0.5)  # fmt: skip
THRESHOLD = 0.8
# What is planted in the second half of every shard; the rest is plain. A near copy has another run of 4 words.
PLANTED = {"copy": 0.04, "near": 0.06, "repetitive": 0.02, "unlikely": 0.04, "short": 0.08}
START, EOS, LINE, PARAGRAPH, WORDS = 0, 1, 2, 3, 4
KEY = "0" * 16


def main(sizes: list[int]) -> None:
    """Measure every part at every size."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="cfsd-filtering-") as folder:
            planted = _in_process("write", folder, str(size))["found"]
            for part in PARTS:
                rows.append(_row(part, size, _in_process(part, folder), planted))
                print(json.dumps(rows[-1]), flush=True)
    rows.sort(key=lambda row: list(PARTS).index(row["part"]))
    for before, row in pairwise(rows):
        if before["part"] == row["part"]:
            row["over_linear"] = round(row["us_per_row"] / before["us_per_row"], 2)
    tell("filtering", rows)


def _in_process(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.filtering", *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _row(part: str, size: int, answer: dict[str, Any], planted: dict[str, int]) -> dict[str, Any]:
    to_find = {
        "filter": sum(planted.values()) - planted["plain"] - planted["near"],
        "near duplicates": planted["copy"] + planted["near"],
    }
    return {
        "part": part,
        "rows": size,
        "seconds": round(answer["seconds"], 2),
        "us_per_row": round(1e6 * answer["seconds"] / size, 1),
        "over_linear": "",  # time per row over that at the size before
        "peak_mb": answer["peak_mb"],
        "found": answer["found"],
        "planted": to_find.get(part, ""),
    }


def in_this_process(part: str, folder: Path, size: int) -> None:
    """Do one part, and print what it took and found."""
    import_module("cfsd.train.batches.mixture" if part == "read the mixture" else "cfsd.filter.rules")
    started = time.perf_counter()
    found = write_corpus(folder / "corpus", size) if part == "write" else PARTS[part](folder)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_mb": peak_memory() // 2**20, "found": found}))


def _filter(folder: Path) -> int:
    def work(draft: Any) -> None:
        filter_rows(folder / "corpus", RULES, draft)

    metadata: Any = Store(folder / "data").make("corpus", KEY, work)[0].metadata
    return int(sum(metadata["rejected"].values()))


def _mix(folder: Path) -> int:
    store = Store(folder / "data")

    def work(draft: Any) -> None:
        mix(folder / "corpus", store.root / "corpus" / KEY, MixSpec(seed=0), draft)

    metadata: Any = store.make("mixture", KEY, work)[0].metadata
    return int(metadata["rehearsal_rows"])


def _read(folder: Path) -> int:
    from cfsd.train.batches.mixture import MixtureRows

    return len(MixtureRows(folder / "data" / "store" / "mixture" / KEY))


def _near_duplicates(folder: Path) -> int:
    return len(duplicates_of(folder / "corpus", THRESHOLD, folder / "scratch", lambda *_: None))


PARTS: dict[str, Callable[[Path], int]] = {
    "filter": _filter, "mix": _mix, "read the mixture": _read, "near duplicates": _near_duplicates,
}  # fmt: skip


def write_corpus(folder: Path, size: int) -> Counter[str]:
    """Write a corpus shard by shard, and some target rows; return how many rows are of which kind."""
    folder.mkdir()
    target = [{"row_id": i, "source": "target", "token_ids": [5, 6, i + 7], "supervised": [False, True, True]}
              for i in range(1000)]  # fmt: skip
    write_shard(folder, "train", 0, table_of(TARGET, target))
    pieces, kinds = _pieces(), Counter[str]()
    for shard, first in enumerate(range(0, size, SHARD)):
        table, planted = _shard(pieces, shard, first, min(SHARD, size - first))
        write_shard(folder, "corpus", shard, table)
        kinds += planted
    return kinds


def _pieces() -> list[str]:
    """Return the text of every token: marks, then words of two and three syllables in a fixed order."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "in", "er", "ost")][::4]
    words = ["".join(parts) for count in (2, 3) for parts in product(syllables, repeat=count)]
    order = np.random.default_rng(0).permutation(len(words))
    return ["", "", ".\n", ".\n\n", *(f" {words[i]}" for i in order)]


def _shard(pieces: list[str], shard: int, first: int, count: int) -> tuple[pa.Table, Counter[str]]:
    rng = np.random.default_rng(shard)
    odds = [1 - sum(PLANTED.values()), *PLANTED.values()]
    kinds = np.array(["plain", *PLANTED])[rng.choice(len(odds), count, p=odds)]
    kinds[: count // 2] = "plain"
    ids, lengths = _tokens(rng, kinds, len(pieces)), np.full(count, LENGTH + 1)
    lengths[kinds == "short"] = rng.integers(2, 16, (kinds == "short").sum())
    logprobs = rng.normal(-3, 2, ids.shape).clip(max=0)
    logprobs[kinds == "unlikely"] -= 5
    there = np.arange(LENGTH + 1) < lengths[:, None]
    given = np.zeros(there.shape, bool)
    given[:, 0] = True
    offsets = np.concatenate([[0], lengths.cumsum()])
    columns = {
        "row_id": np.arange(first, first + count), "source": ["context-free"] * count,
        "token_ids": pa.ListArray.from_arrays(offsets, ids[there]),
        "logprobs": pa.ListArray.from_arrays(offsets, pa.array(logprobs[there], pa.float32(), mask=given[there])),
        "finish_reason": np.where(lengths <= LENGTH, "eos", "length"), "shard": np.full(count, shard),
        "seed": np.zeros(count, int),
        "text": ["".join(pieces[i] for i in row[:length]) for row, length in zip(ids.tolist(), lengths, strict=True)],
    }  # fmt: skip
    return pa.table(columns).cast(CORPUS), Counter(kinds.tolist())


def _tokens(rng: np.random.Generator, kinds: NDArray[np.str_], vocabulary: int) -> NDArray[np.int32]:
    count = len(kinds)
    ids = _words(rng, (count, LENGTH + 1), vocabulary)
    ids[rng.random(ids.shape) < 1 / 14] = LINE
    ids[rng.random(ids.shape) < 1 / 80] = PARAGRAPH
    for row in np.flatnonzero(kinds == "repetitive"):
        ids[row] = np.resize([*ids[row, :8], LINE], LENGTH + 1)
    for row in np.flatnonzero(np.isin(kinds, ["copy", "near"])):
        ids[row] = ids[rng.integers(count // 2)]
        if kinds[row] == "near":
            place = rng.integers(1, LENGTH - 3)
            ids[row, place : place + 4] = _words(rng, (4,), vocabulary)
    ids[:, 0] = START
    return ids


def _words(rng: np.random.Generator, shape: tuple[int, ...], vocabulary: int) -> NDArray[np.int32]:
    """Return words whose frequency falls with their rank, as Zipf's law has it."""
    distribution = np.cumsum(1 / (np.arange(vocabulary - WORDS) + 2.7))
    return (WORDS + np.searchsorted(distribution / distribution[-1], rng.random(shape))).astype(np.int32)


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].isdigit():
        in_this_process(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else 0)
    else:
        main([int(word) for word in sys.argv[1:]] or list(SIZES))
