"""The action of pull requests: its steps run by bash as the runner does, against a server that plays GitHub's API."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from cfsd.statistics.gate import Guarded, judge
from tests.conftest import ROOT

FOLDER = ROOT / ".github" / "actions" / "forgetting-gate"
ACTION = yaml.safe_load((FOLDER / "action.yml").read_text())
TOKEN = "ghs_planted_secret"
BOT, PERSON = {"type": "Bot", "login": "github-actions[bot]"}, {"type": "User", "login": "someone"}


class GitHub(ThreadingHTTPServer):
    """The part of GitHub's API that the action uses: the comments of one pull request, in pages."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.comments: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.refuse = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, body: str, user: dict[str, str]) -> dict[str, Any]:
        number = len(self.comments) + 1
        self.comments.append({"id": number, "body": body, "user": user, "html_url": f"https://github/c{number}"})
        return self.comments[-1]


class Answers(BaseHTTPRequestHandler):
    server: GitHub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        page, size = (int(parse_qs(url.query)[name][0]) for name in ("page", "per_page"))
        self._answer(url.path == "/repos/o/r/issues/7/comments", self.server.comments[(page - 1) * size : page * size])

    def do_POST(self) -> None:
        self._answer(self.path == "/repos/o/r/issues/7/comments", lambda: self.server.add(self._body(), BOT))

    def do_PATCH(self) -> None:
        known = [c for c in self.server.comments if self.path == f"/repos/o/r/issues/comments/{c['id']}"]
        self._answer(bool(known), lambda: known[0].update(body=self._body()) or known[0])

    def _body(self) -> str:
        return str(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["body"])

    def _answer(self, known: bool, answer: Any) -> None:
        self.server.asked.append(self.command)
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
        refused = self.server.refuse if self.command != "GET" else 0
        code = refused or (200 if known and allowed else 401 if known else 404)
        content = (answer() if callable(answer) else answer) if code == 200 else {"message": "no"}
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def github() -> Iterator[GitHub]:
    with GitHub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Run:
    """One use of the action in a job of GitHub's, in a folder of its own."""

    def __init__(self, folder: Path, github: GitHub, event: dict[str, Any] | None = None) -> None:
        self.folder, self.github = folder, github
        self.summary, self.event = folder / "summary.md", folder / "event.json"
        pull = {"pull_request": {"number": 7, "head": {"sha": "a" * 40}}}
        self.event.write_text(json.dumps(pull if event is None else event))
        self.said = ""

    def __call__(self, command: str, **inputs: str) -> int:
        """Run the steps in order as the runner does; return the code of the one that fails, else 0."""
        given = {name: spec.get("default", "") for name, spec in ACTION["inputs"].items()}
        values = {f"inputs.{k}": v for k, v in (given | {"token": TOKEN, "command": command} | inputs).items()}
        for i, step in enumerate(ACTION["runs"]["steps"]):
            if "run" not in step:
                continue
            output = self.folder / f"output-{i}"
            output.write_text("")
            own = {name: self._value(text, values) for name, text in step.get("env", {}).items()}
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]], cwd=self.folder,
                env={**self._runner(output), **own}, capture_output=True, text=True, timeout=600,
            )  # fmt: skip
            self.said += done.stdout + done.stderr
            if done.returncode:
                return done.returncode
            lines = [line.partition("=") for line in output.read_text().splitlines()]
            values |= {f"steps.{step.get('id')}.outputs.{name}": value for name, _, value in lines}
        self.outputs = {name: self._value(spec["value"], values) for name, spec in ACTION["outputs"].items()}
        return 0

    def _value(self, text: str, values: dict[str, str]) -> str:
        """Return a value with the expressions that action.yml uses replaced, of which there are two kinds."""
        (inner,) = re.fullmatch(r"\$\{\{ (.*) \}\}", text).groups()  # type: ignore[union-attr]
        name, _, otherwise = inner.partition(" || ")
        assert not otherwise or otherwise == "format('{0}/forgetting-gate', runner.temp)"
        return values[name] or (f"{self.folder}/temp/forgetting-gate" if otherwise else "")

    def _runner(self, output: Path) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {
            "PATH": path, "GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_EVENT_PATH": str(self.event), "GITHUB_API_URL": self.github.url, "GITHUB_REPOSITORY": "o/r",
            "GITHUB_SERVER_URL": "https://github.test", "GITHUB_RUN_ID": "42", "GITHUB_SHA": "b" * 40,
            "GITHUB_ACTION_PATH": str(FOLDER),
        }  # fmt: skip


def gate(folder: Path, outcome: str = "pass", code: int = 0, *, text: str = "PASS: none of 2 figures got worse") -> str:
    """Return a command that leaves what flows.regress leaves, with the figures of a real judgement."""
    spread, fresh = (0.0, 0.1, 0.2, 0.1, 0.0), (3.0, 3.1) if outcome == "fail" else (0.1, 0.05)
    figures = {"unit": "fraction", "higher_is_better": False, "baseline": spread, "num_documents": 100}
    judgement = judge([Guarded(name="forgetting/facts", fresh=fresh, margin=1.0, **figures)])
    assert judgement.outcome == outcome
    kept = folder / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    (kept / "verdict.md").write_text(f"# tiny gate\n\n{text}\n\n| figure | now |\n|---|---|\n| facts | 1 |\n")
    (kept / "verdict.json").write_text(judgement.model_dump_json())
    report = '"$CFSD_HOME"/reports/tiny-gate-1'
    return f"mkdir -p {report} && cp {kept}/* {report}/ && exit {code}"


def test_the_first_run_makes_the_comment_and_the_next_renews_it(tmp_path: Path, github: GitHub) -> None:
    for number in range(130):  # more than a page, and one of a person who wrote our mark
        github.add(f"hello {number}", PERSON)
    theirs = github.add("<!-- forgetting-gate: Forgetting gate -->\nmine", PERSON)
    first = Run(tmp_path, github)
    assert first(gate(tmp_path)) == 0, first.said
    body = github.comments[-1]["body"]
    assert len(github.comments) == 132 and body.startswith("<!-- forgetting-gate: Forgetting gate -->\n\n## Forgetting")
    assert "PASS: none of 2 figures" in body and "| facts | 1 |" in body and "# tiny gate" not in body
    assert "Commit aaaaaaaaaaaa." in body and "https://github.test/o/r/actions/runs/42#artifacts" in body
    assert first.outputs == {"outcome": "pass", "comment": "https://github/c132",
                             "reports": f"{tmp_path}/temp/forgetting-gate/reports"}  # fmt: skip
    assert Run(tmp_path, github)(gate(tmp_path, "fail", 1, text="FAIL: got worse")) == 1
    assert len(github.comments) == 132 and "FAIL: got worse" in github.comments[-1]["body"]
    assert theirs["body"].endswith("mine") and github.asked[-1] == "PATCH"


def test_gates_of_two_names_have_a_comment_each(tmp_path: Path, github: GitHub) -> None:
    for name in ("tiny", "demo", "tiny"):
        assert Run(tmp_path, github)(gate(tmp_path), name=name) == 0
    assert [c["body"].splitlines()[2] for c in github.comments] == ["## tiny", "## demo"]


@pytest.mark.parametrize(
    ("outcome", "code", "policy", "ends", "said"),
    [
        ("pass", 0, "pass", 0, ""),
        ("fail", 1, "pass", 1, ""),
        ("pass", 3, "pass", 0, "::warning::the gate cannot tell"),
        ("pass", 3, "fail", 3, ""),
        ("none", 2, "pass", 2, "::error::the gate did not come to a verdict"),
        ("none", 1, "pass", 1, "::error::the gate did not come to a verdict"),
    ],
)
def test_the_job_ends_as_the_gate_did(
    tmp_path: Path, github: GitHub, outcome: str, code: int, policy: str, ends: int, said: str
) -> None:
    run = Run(tmp_path, github)
    command = f"exit {code}" if outcome == "none" else gate(tmp_path, outcome, code)
    assert run(command, **{"cannot-tell": policy}) == ends
    assert said in run.said and ("::" in run.said) == bool(said)
    expected = f"ended with code {code}" if outcome == "none" else "| facts | 1 |"
    assert expected in run.summary.read_text() and expected in github.comments[0]["body"]


@pytest.mark.parametrize("code", [401, 403, 404, 500])
def test_without_the_right_to_comment_the_verdict_is_in_the_summary(tmp_path: Path, github: GitHub, code: int) -> None:
    github.refuse = code
    run = Run(tmp_path, github)
    assert run(gate(tmp_path, "fail", 1)) == 1
    assert not github.comments and "| facts | 1 |" in run.summary.read_text()
    assert "::notice::no comment was written" in run.said and str(code) in run.said


def test_outside_a_pull_request_nothing_is_asked_of_github(tmp_path: Path, github: GitHub) -> None:
    run = Run(tmp_path, github, event={"schedule": "17 3 * * *"})
    assert run(gate(tmp_path)) == 0 and github.asked == []
    assert "Commit bbbbbbbbbbbb." in run.summary.read_text() and run.outputs["comment"] == ""


def test_github_away_does_not_change_the_verdict(tmp_path: Path, github: GitHub) -> None:
    github.shutdown()
    github.server_close()
    run = Run(tmp_path, github)
    assert run(gate(tmp_path)) == 0 and "::notice::no comment was written (URLError)" in run.said


def test_the_token_is_in_no_log_and_the_command_is_no_script_of_the_actions(tmp_path: Path, github: GitHub) -> None:
    run = Run(tmp_path, github)
    assert run(gate(tmp_path)) == 0
    written = run.said + run.summary.read_text() + github.comments[0]["body"]
    assert TOKEN not in written
    steps = [step["run"] for step in ACTION["runs"]["steps"] if "run" in step]
    assert not any("${{" in step for step in steps)  # an input in a script would be run as a part of it
    assert "TOKEN" not in ACTION["runs"]["steps"][0]["env"]  # what judges is the pull request's own code


def test_a_recipe_notifies_nobody_and_hides_nothing(tmp_path: Path, github: GitHub) -> None:
    text = "PASS @everyone <!-- forgetting-gate: other --> " + "x" * 70_000
    assert Run(tmp_path, github)(gate(tmp_path, text=text)) == 0
    body = github.comments[0]["body"]
    assert "@everyone" not in body and body.count("<!--") == 1 and len(body) < 65_536
    assert "cut here" in body and "xychart" in body and "this run" in body


def test_the_figure_has_the_worsening_in_margins(tmp_path: Path, github: GitHub) -> None:
    assert Run(tmp_path, github)(gate(tmp_path, "fail", 1)) == 1
    body = github.comments[0]["body"]
    assert '  x-axis ["forgetting/facts"]\n' in body
    assert "  bar [2.97]\n" in body and "  line [1]\n" in body  # 3.05 - 0.08, margin 1


def test_two_models_without_a_baseline_are_shown_as_measured(tmp_path: Path, github: GitHub) -> None:
    figure = {"value": 0.05, "low": 0.04, "high": 0.061, "unit": "fraction"}
    variant = {
        "probe_kl": {**figure, "unit": "nats/token"},
        "target_gain": None,
        "benchmarks": {"facts": {"forgetting": figure}},
    }
    (tmp_path / "summary.json").write_text(json.dumps({"schema": 2, "variants": {"tuned": variant}}))
    run, report = Run(tmp_path, github), '"$CFSD_HOME"/reports/measure-1'
    assert run(f"mkdir -p {report} && cp {tmp_path}/summary.json {report}/") == 0
    assert run.outputs["outcome"] == "measured"
    assert "| tuned | probe_kl | 0.05 nats/token | 0.04 to 0.061 |" in github.comments[0]["body"]
    assert "| tuned | forgetting of facts | 5 points | 4 to 6.1 |" in github.comments[0]["body"]


def test_a_gate_that_crashed_after_a_seed_says_that_there_is_no_verdict(tmp_path: Path, github: GitHub) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"schema": 2, "variants": {}}))
    run, report = Run(tmp_path, github), '"$CFSD_HOME"/reports/seed-5'
    assert run(f"mkdir -p {report} && cp {tmp_path}/summary.json {report}/; exit 4") == 4
    assert "The gate came to no verdict: it ended with code 4." in github.comments[0]["body"]


def test_two_logs_of_any_trainer_are_compared_in_a_comment(tmp_path: Path, github: GitHub, server: str) -> None:
    logs = ROOT / "tests" / "evaluate" / "lm_eval_logs"
    measure = f"{sys.executable} -m flows.measure --samples {logs}/0.4.5 {logs}/0.4.9.1"
    run = Run(tmp_path, github)
    assert run(f"cd {ROOT} && PREFECT_API_URL={server}/api {measure}") == 0, run.said
    assert run.outputs["outcome"] == "measured"
    assert "| 0.4.9.1 | forgetting of sums | 0 points | -55.4 to 55.4 |" in github.comments[0]["body"]
    assert "| 0.4.9.1 | forgetting of prose | 0 nats/word | not known |" in github.comments[0]["body"]
    judged = Run(tmp_path, github)
    assert judged(f"cd {ROOT} && PREFECT_API_URL={server}/api {measure} --margin 2") == 0, judged.said
    assert judged.outputs["outcome"] == "cannot tell" and "::warning::the gate cannot tell" in judged.said
    body = github.comments[0]["body"]
    assert len(github.comments) == 1 and "CANNOT TELL whether more than 2 points were lost" in body
    assert "| sums | 0 | -55.4 to 55.4 | 2 | 1 | CANNOT TELL: needs more than 300 documents |" in body
    refused = run(f"cd {ROOT} && {measure} --benchmark hellaswag")
    assert refused == 2 and "no benchmark hellaswag in the logs" in run.said


def test_a_report_from_an_earlier_run_is_not_taken_for_this_one(tmp_path: Path, github: GitHub) -> None:
    data = tmp_path / "data"
    assert Run(tmp_path, github)(gate(tmp_path), data=str(data)) == 0
    old = data / "reports" / "tiny-gate-1"
    os.utime(old / "verdict.md", (1, 1))
    run = Run(tmp_path, github)
    assert run("exit 2", data=str(data)) == 2 and "no verdict" in github.comments[0]["body"]


def test_the_action_and_the_workflows_keep_githubs_schemas() -> None:
    program = shutil.which("check-jsonschema", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not program:
        pytest.skip("needs check-jsonschema")
    workflows = [str(file) for file in (ROOT / ".github" / "workflows").glob("*.yml")]
    for schema, files in (("github-actions", [str(FOLDER / "action.yml")]), ("github-workflows", workflows)):
        command = [program, "--builtin-schema", f"vendor.{schema}", *files]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_has_no_more_rights_than_the_comment_needs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "regress.yml").read_text())
    job = workflow["jobs"]["gate"]
    assert workflow["permissions"] == {"contents": "read"}
    assert job["permissions"] == {"contents": "read", "pull-requests": "write"}
    assert "pull_request" in workflow[True] and "pull_request_target" not in workflow[True]  # YAML reads `on` as True
    (use,) = (step for step in job["steps"] if step.get("uses", "").startswith("./"))
    assert (ROOT / use["uses"] / "action.yml").is_file()
    assert set(use["with"]) <= set(ACTION["inputs"])
