"""Write a gate's verdict into the job's summary and into the one comment of the pull request that this script keeps.

    python3 comment.py          everything comes from the environment: GitHub's own variables, and those of action.yml

Standard library only: the Python of any runner will do. It never fails the job: what GitHub refuses is a notice.
"""

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

LONGEST = 60_000  # characters; GitHub takes 65,536
PAGE = 100
SHOWN = 3.0  # margins, beyond which a bar of the figure ends
OUTCOMES = {"0": "measured", "1": "fail", "3": "cannot tell"}
UNITS = {"fraction": (100, " points")}


def main() -> None:
    """Write the summary, the comment and the outputs of the step."""
    found = newest(Path(os.environ["REPORTS"]))
    body = body_of(found, os.environ["NAME"], os.environ["CODE"])
    append("GITHUB_STEP_SUMMARY", body)
    append("GITHUB_OUTPUT", f"outcome={outcome_of(found, os.environ['CODE'])}")
    append("GITHUB_OUTPUT", f"comment={commented(body)}")


def newest(reports: Path) -> Path | None:
    """Return the folder of the latest verdict, or of the latest figures without one, that this gate wrote."""
    began = reports.parent / ".gate-began"
    least = began.stat().st_mtime_ns if began.exists() else 0
    for name in ("verdict.md", "summary.json"):
        files = [file for file in reports.glob(f"*/{name}") if file.stat().st_mtime_ns >= least]
        if files:
            return max(files, key=lambda file: file.stat().st_mtime_ns).parent
    return None


def outcome_of(folder: Path | None, code: str) -> str:
    """Return what verdict.json says, else what the exit code does."""
    if folder is None:
        return "none"
    return str(read(folder / "verdict.json").get("outcome") or OUTCOMES.get(code, "none"))


def body_of(folder: Path | None, name: str, code: str) -> str:
    """Return the comment in Markdown: its mark, verdict, table, figure and where it comes from."""
    if folder is None:
        text = no_verdict(code)
    elif (verdict := folder / "verdict.md").is_file():
        text = re.sub(r"\A# .*\n+", "", verdict.read_text(encoding="utf-8"))
    else:
        text = table_of(read(folder / "summary.json"))
        if code not in OUTCOMES:  # a seed before the one that failed left its figures
            text = f"{no_verdict(code)} Before that, these were measured:\n\n{text}"
    figure = figure_of(read(folder / "verdict.json").get("findings", [])) if folder else ""
    room = LONGEST - len(figure)
    if len(text) > room:
        text = f"{text[:room]}\n\n… cut here; the whole is in the job's artifact."
    return "\n\n".join(
        part for part in (mark(name), f"## {plain(name)}", plain(text).strip(), figure, origin()) if part
    )


def no_verdict(code: str) -> str:
    """Return the sentence of a gate that ended otherwise than with an outcome."""
    return f"The gate came to no verdict: it ended with code {code}. The job's log says why."


def mark(name: str) -> str:
    """Return the line, hidden where the comment is shown, by which a later run finds it."""
    return f"<!-- forgetting-gate: {re.sub('[^A-Za-z0-9 ]', '', name)} -->"


def plain(text: str) -> str:
    """Return text in which nobody is notified and nothing is hidden: names in it are what a recipe says."""
    return re.sub(r"@(?=\w)", "@\u200b", text).replace("<!--", "&lt;!--")


def table_of(summary: dict[str, Any]) -> str:
    """Return the figures of summary.json that have an interval, of every variant, as a table."""
    rows = ["| variant | figure | value | 95 % interval |", "|---|---|---|---|"]
    for variant, figures in summary.get("variants", {}).items():
        measured = {
            **figures,
            **{f"forgetting of {k}": v.get("forgetting") for k, v in figures.get("benchmarks", {}).items()},
        }
        for name, figure in measured.items():
            if isinstance(figure, dict) and {"value", "low", "high", "unit"} <= set(figure):
                times, unit = UNITS.get(figure["unit"], (1, f" {figure['unit']}"))
                value, low, high = (
                    "" if figure[part] is None else f"{figure[part] * times:.3g}" for part in ("value", "low", "high")
                )
                interval = f"{low} to {high}" if low else "not known"
                rows.append(f"| {variant} | {name} | {value}{unit} | {interval} |")
    return "\n".join(rows)


def figure_of(findings: list[dict[str, Any]]) -> str:
    """Return a bar per figure, which GitHub draws: its worsening as a share of its margin, none where it got better."""
    shares = {f["name"]: f["worsening"] / f["margin"] for f in findings if f.get("margin")}
    if not shares:
        return ""
    names = ", ".join(json.dumps(re.sub(r'["\n]', " ", name)) for name in shares)
    bars = ", ".join(f"{min(SHOWN, max(0, share)):.2f}" for share in shares.values())
    margin = ", ".join("1" for _ in shares)
    return "\n".join(
        [
            "```mermaid",
            "xychart-beta horizontal",
            '  title "worse by, in margins: the line is the margin, better is 0"',
            f"  x-axis [{names}]",
            f"  y-axis 0 --> {SHOWN:g}",
            f"  bar [{bars}]",
            f"  line [{margin}]",
            "```",
        ]
    )


def origin() -> str:
    """Return the commit that was judged and the run that did, with the report among its artifacts."""
    commit = event().get("pull_request", {}).get("head", {}).get("sha") or os.environ["GITHUB_SHA"]
    run = "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}/actions/runs/{GITHUB_RUN_ID}".format(**os.environ)
    return f"Commit {commit[:12]}. The whole report is an artifact of [this run]({run}#artifacts)."


def commented(body: str) -> str:
    """Make or renew the comment and return its address, empty where there is no pull request or no right to it."""
    number, token = event().get("pull_request", {}).get("number"), os.environ.get("TOKEN")
    if not number or not token:
        return ""
    comments = f"/repos/{os.environ['GITHUB_REPOSITORY']}/issues"
    try:
        known = own_comment(f"{comments}/{number}/comments", body.splitlines()[0])
        if known is None:
            return str(ask("POST", f"{comments}/{number}/comments", {"body": body})["html_url"])
        return str(ask("PATCH", f"{comments}/comments/{known}", {"body": body})["html_url"])
    except HTTPError as error:
        why = (
            "the token may not comment, as in a fork's pull request"
            if error.code in (401, 403, 404)
            else "GitHub failed"
        )
        print(f"::notice::no comment was written ({why}: {error.code}); the verdict is in the job's summary")
    except (URLError, OSError, ValueError, KeyError) as error:
        print(f"::notice::no comment was written ({type(error).__name__}); the verdict is in the job's summary")
    return ""


def own_comment(path: str, first: str) -> int | None:
    """Return the number of the comment that begins with the mark and that a program wrote, not a person."""
    for page in range(1, 100):
        comments = ask("GET", f"{path}?per_page={PAGE}&page={page}")
        for comment in comments:
            if comment["body"].startswith(first) and comment["user"]["type"] == "Bot":
                return int(comment["id"])
        if len(comments) < PAGE:
            break
    return None


def ask(method: str, path: str, content: dict[str, str] | None = None) -> Any:
    """Return the answer of GitHub's API."""
    headers = {
        "Accept": "application/vnd.github+json", "Authorization": f"Bearer {os.environ['TOKEN']}",
        "X-GitHub-Api-Version": "2022-11-28", "Content-Type": "application/json",
    }  # fmt: skip
    data = None if content is None else json.dumps(content).encode()
    url = os.environ.get("GITHUB_API_URL", "https://api.github.com") + path
    with urlopen(Request(url, data, headers, method=method), timeout=60) as answer:
        return json.load(answer)


def event() -> dict[str, Any]:
    """Return what started the workflow."""
    return read(Path(os.environ.get("GITHUB_EVENT_PATH") or os.devnull))


def read(file: Path) -> dict[str, Any]:
    """Return a JSON object, empty where the file is missing or none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def append(variable: str, text: str) -> None:
    """Add a line to the file that a variable of GitHub's names."""
    with Path(os.environ[variable]).open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


if __name__ == "__main__":
    main()
