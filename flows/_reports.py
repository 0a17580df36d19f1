"""Where reports are, as folders and as pages."""

from pathlib import Path
from urllib.parse import quote

from cfsd.machine import home
from flows._environment import is_alive, recorded_servers

PAGES = ("report.html", "corpus.html")


def reports() -> Path:
    """Return the folder of all reports."""
    return home() / "reports"


def report_url(folder: Path) -> str | None:
    """Return the address of the page in a report's folder; None where no server shows it."""
    entry = recorded_servers().get("reports")
    if not entry or not is_alive(entry) or folder.parent != reports():
        return None
    page = next((name for name in PAGES if (folder / name).is_file()), None)
    return f"{entry['url']}/reports/{quote(folder.name)}/{page}" if page else None
