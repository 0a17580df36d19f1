"""Shards on a Ray cluster: workers die, users interrupt, models break, and the corpus is the same."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import cloudpickle
import psutil
import pytest

from cfsd.errors import BadInput
from cfsd.machine import Machine
from tasks._cluster import check_cluster, sampler_of
from tests.conftest import ROOT, Run

pytestmark = pytest.mark.processes

if TYPE_CHECKING:
    from cfsd.store.artifact import Artifact

INSTALLED = all(find_spec(name) for name in ("ray", "prefect_ray"))
needs_ray = pytest.mark.skipif(not INSTALLED, reason="ray and prefect-ray are not installed: pip install 'cfsd[ray]'")
SHARDS = 24
TWO_WORKERS = {"sampling_rows": 200, "threads": 1, "processes": 2, "device": "cpu", "cluster": "local"}
LAW = {"rows": SHARDS * TWO_WORKERS["sampling_rows"], "length": 100, "seed": 7}
FLOW = """
import json, sys
from prefect import flow
from cfsd.store.artifact import Artifact
from cfsd.generate.spec import GenerateSpec
from cfsd.machine import Machine
from tasks.generate import generate_corpus

@flow
def sampling(base: Artifact, law: GenerateSpec, machine: Machine) -> str:
    return generate_corpus(base, base, law, machine).content

base, law, machine = map(json.loads, sys.argv[1:])
print("content", sampling(Artifact(**base), GenerateSpec(**law), Machine(**machine)))
"""


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "prefect_ray"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match=r"ray and prefect_ray .* pip install 'cfsd\[ray\]'"), \
            sampler_of(Machine(cluster="local")):  # fmt: skip
        pass


@pytest.mark.parametrize("named", ["", "Local", "ray://", "ray://head", "http://head:10001", "head:6379"])
def test_an_address_that_is_none_is_refused(named: str) -> None:
    with pytest.raises(BadInput, match="allowed: local, auto"):
        check_cluster(Machine(cluster=named))


def test_without_a_cluster_there_is_no_sampler() -> None:
    with sampler_of(Machine()) as sampler:
        assert sampler is None


@pytest.mark.parametrize("name", ["mitigate", "compare", "measure"])
def test_a_flow_travels_to_the_workers(name: str) -> None:
    """With every shard goes the flow that it belongs to, pickled; in a worker it is the flow that stands there."""
    flow = getattr(importlib.import_module(f"flows.{name}"), name)
    there = cloudpickle.loads(cloudpickle.dumps(flow))
    assert there.name == flow.name and there.fn.__code__ == flow.fn.__code__


@pytest.mark.slow
@needs_ray
def test_ray_is_imported_only_for_a_cluster() -> None:
    code = "import sys, flows.mitigate; print({'ray', 'prefect_ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@needs_ray
def test_a_cluster_that_does_not_answer_is_named(home: Path) -> None:
    named = "ray://127.0.0.1:1"
    with pytest.raises(BadInput, match=f"{named}, which cannot be joined"), \
            sampler_of(Machine(cluster=named, device="cpu")) as sampler:  # fmt: skip
        assert sampler is not None
        sampler(None, [], lambda under_way: None)  # type: ignore[arg-type]  # it gets no further than the address


def start(tmp_path: Path, base: "Artifact") -> "subprocess.Popen[str]":
    script = tmp_path / "sampling_flow.py"
    script.write_text(FLOW)
    words = [sys.executable, str(script), base.model_dump_json(), json.dumps(LAW), json.dumps(TWO_WORKERS)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def written(home: Path) -> dict[str, int]:
    """Return when each shard of the draft or of the finished corpus was written."""
    return {path.name: path.stat().st_mtime_ns for path in home.glob("store/corpus/*/corpus-*.parquet")}


def children(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def sampling(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """Return the Ray workers that have a shard in hand; Ray writes a worker's task over its command line."""
    found = []
    for child in children(process):
        try:
            if child.cmdline()[:1] == ["ray::sample-shard"]:
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def middle(home: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until a quarter of the shards are there and two workers have one in hand."""
    end = time.monotonic() + 120
    while len(written(home)) < SHARDS // 4 or len(sampling(process)) < 2:
        assert process.poll() is None and process.stdout, "it ended before its middle"
        assert time.monotonic() < end, "it never came to its middle"
        time.sleep(0.02)


def kill_one_in_the_middle_of_a_shard(process: "subprocess.Popen[str]") -> None:
    while process.poll() is None:
        for worker in sampling(process)[:1]:
            worker.send_signal(signal.SIGSTOP)
            time.sleep(0.1)
            if worker in sampling(process):  # it stands still with its shard in hand
                worker.kill()
                return
            worker.send_signal(signal.SIGCONT)
    raise AssertionError("it ended before a worker could be killed")


@pytest.mark.slow
@needs_ray
def test_a_killed_worker_costs_its_shard_and_no_byte(
    base: "Artifact", home: Path, model_folder: Path, tmp_path: Path, server: str
) -> None:
    process = start(tmp_path, base)
    middle(home, process)
    kill_one_in_the_middle_of_a_shard(process)
    kept = written(home)
    assert SHARDS // 4 <= len(kept) < SHARDS - 4, "the kill was meant to come half-way"
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert "shards lost with their workers: 1 (WorkerCrashedError)" in out
    after = written(home)
    assert len(after) == SHARDS
    assert {name: after[name] for name in kept} == kept
    assert shard_states() <= {"COMPLETED", "CRASHED"}
    assert out.strip().splitlines()[-1] == f"content {content_alone(tmp_path, model_folder)}"


def content_alone(tmp_path: Path, model_folder: Path) -> str:
    """Return the digest of the same corpus sampled in this process."""
    from cfsd.generate.spec import GenerateSpec
    from cfsd.generate.stage import generate
    from cfsd.store.artifact import Store
    from tests.conftest import fetched

    store = Store(tmp_path / "alone")
    base, machine = fetched(store, model_folder), Machine(**TWO_WORKERS | {"processes": 1, "cluster": None})
    made, _ = store.make("corpus", "alone", lambda draft: generate(base, None, GenerateSpec(**LAW), draft, machine))
    return made.content


@pytest.mark.slow
@needs_ray
def test_ctrl_c_leaves_no_process_and_no_running_shard(
    base: "Artifact", home: Path, tmp_path: Path, server: str
) -> None:
    process = start(tmp_path, base)
    middle(home, process)
    everyone = children(process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in out
    _, alive = psutil.wait_procs(everyone, timeout=15)
    assert not alive
    assert SHARDS // 4 <= len(written(home)) < SHARDS
    assert shard_states() <= {"COMPLETED", "CRASHED"}


def shard_states() -> set[str]:
    """Return the states of all shards that Prefect knows of, once its recorder has caught up."""
    from prefect.client.orchestration import get_client

    time.sleep(3)
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(limit=200)
    states = {str(run.state_type.value) for run in runs if run.state_type and run.name.startswith("shard ")}
    assert states, "no shard was recorded"
    return states


@pytest.mark.slow
@needs_ray
def test_a_broken_model_is_told_of_at_once(model_folder: Path, tmp_path: Path, run: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "broken")
    on = [word for name, value in TWO_WORKERS.items() for word in ("--machine", f"{name}={value}")]
    done = run("measure", tmp_path / "broken", model_folder, "--set", "probe.rows=800", *on)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: the base model's logits are not finite" in done.stderr
    assert "shards lost" not in done.stdout
