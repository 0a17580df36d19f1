"""`cfsd store ls | show | verify | gc | push | pull`: what is there, why, and what it would cost to make again."""

import json
import os
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Column, Table

from cfsd.errors import BadInput
from cfsd.machine import HOME_VARIABLE, expanded_user, home
from cfsd.store.artifact import Store
from cfsd.store.digests import sha256_of_file
from cfsd.store.inventory import IN_PART, Doomed, Entry, Limits, collectable, delete, entries, named, references
from cfsd.store.manifest import MANIFEST
from cfsd.store.remote import STORE_VARIABLE, Damaged, Realisation, SharedStore
from cfsd.store.sharing import Sharing

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
NOT_PUSHED = {
    "damaged": "damaged here: run its recipe again, or push it from another data folder",
    IN_PART: "here in part only: push it from a data folder where it is whole",
    "draft": "a draft: run its recipe again, which completes it",
}
PLAIN_WIDTH = 160  # of tables in files and pipes

app = typer.Typer(no_args_is_help=True, help="What the store of a data folder holds, and the store that a team shares.")
Home = Annotated[
    str | None, typer.Option("--home", metavar="FOLDER", help="Data folder; default: $CFSD_HOME, else ./data")
]
Shared = Annotated[
    str | None,
    typer.Option("--store", metavar="URL", help="Shared store, as s3://bucket/team; default: $CFSD_STORE"),
]
Keys = Annotated[list[str] | None, typer.Argument(help="Keys, or what they begin with; default: everything")]
console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def opened(folder: str | None, url: str | None) -> Store:
    """Return the store that the options name. Raises BadInput."""
    if folder is not None:
        if not folder.strip():
            raise BadInput("--home is empty; give a folder, or leave it out for $CFSD_HOME, else ./data")
        os.environ[HOME_VARIABLE] = str(expanded_user(Path(folder)).absolute())
    if url is not None:
        os.environ[STORE_VARIABLE] = url
    if not home().is_dir():
        raise BadInput(f"there is no data folder {home()}; give the one of your runs with --home, or with CFSD_HOME")
    return Store(home())


@app.command("ls")
def list_command(
    kind: Annotated[str | None, typer.Option(help="Only artifacts of this kind, as model or corpus")] = None,
    shared: Annotated[bool, typer.Option("--shared", help="List the shared store instead of the data folder")] = False,
    home: Home = None,
    store: Shared = None,
) -> None:
    """List what is there: how large, how long it took to make, and which reports refer to it."""
    there = opened(home, store)
    if shared:
        _list_shared(_sharing(there).remote, kind)
        return
    reports, known = references(there.home), entries(there)
    found = [entry for entry in known if kind in (None, entry.kind)]
    if kind and not found and known:
        raise BadInput(f"nothing is of kind {kind!r}; there are: {', '.join(sorted({e.kind for e in known}))}")
    table = _table("kind", "key", "state", "size", "created", "seconds", "reports that refer to it")
    for entry in found:
        size, seconds = _bytes(entry.size), f"{entry.seconds:,.0f}" if entry.manifest else ""
        why = ", ".join(reports.get(entry.place, []))
        table.add_row(entry.kind, entry.key, entry.state, size, _when(entry.created), seconds, escape(why))
    console.print(table)
    console.print(_total(found))


def _list_shared(remote: SharedStore, kind: str | None) -> None:
    table = _table("kind", "key", "size")
    found = {place: size for place, size in remote.listed().items() if kind in (None, place[0])}
    for (of, key), size in found.items():
        table.add_row(escape(of), escape(key), _bytes(size))
    console.print(table)
    console.print(f"{len(found)} artifacts, {_bytes(sum(found.values()))}, in {escape(str(remote))}")


@app.command("show")
def show_command(
    key: Annotated[str, typer.Argument(help="A key, or what it begins with")],
    home: Home = None,
    store: Shared = None,
) -> None:
    """Show one artifact: what it was made from, why it is there, its files, and what it would cost to make again."""
    there = opened(home, store)
    known, reports = entries(there), references(there.home)
    place = named({entry.place for entry in known} | _elsewhere(there, known, key), key)
    if there.sharing and place not in {entry.place for entry in known}:
        there.sharing.discover(*place)
        known = entries(there)
    for entry in (entry for entry in known if entry.place == place):
        _show(entry, known, reports.get(place, []))


def _elsewhere(store: Store, known: list[Entry], asked: str) -> set[tuple[str, str]]:
    """Return what the shared store has, where nothing here can be meant."""
    if store.sharing is None or any(entry.key.startswith(asked.rpartition("/")[2]) for entry in known):
        return set()
    return set(store.sharing.remote.listed())


def _show(entry: Entry, known: list[Entry], reports: list[str]) -> None:
    say = console.print
    say(f"{entry.kind} {entry.key}: {entry.state}, {_bytes(entry.size)} on this disk", markup=False)
    say(f"folder   {entry.folder}", markup=False, soft_wrap=True)
    if entry.manifest is None:
        return
    say(f"content  {entry.manifest['content']}")
    say(f"made     {_when(entry.created)}; to make it again took {_seconds(entry.seconds)} and its inputs")
    here = {other.place: other for other in known if not other.is_draft}
    for of, key in entry.inputs:
        say(f"from     {of} {key}{'' if (of, key) in here else ' (not here)'}", markup=False)
    for other in known:
        if entry.place in other.inputs:
            say(f"used by  {other.kind} {other.key}")
    for report in reports:
        say(f"report   {report}", markup=False)
    if not reports:
        say("report   none refers to it")
    for title in ("metadata", "environment"):
        say(f"{title:8} {json.dumps(entry.manifest[title], ensure_ascii=False)}", markup=False, soft_wrap=True)
    for name, digest in entry.manifest["files"].items():
        say(f"file     {digest[:12]} {_where(entry, name):>10} {name}", markup=False, soft_wrap=True)


def _where(entry: Entry, name: str) -> str:
    file = entry.folder / name
    if file.exists():
        return f"{_bytes(file.stat().st_size)}{' (link)' if file.is_symlink() else ''}"
    return "shared" if entry.state == IN_PART else "missing"


@app.command("verify")
def verify_command(
    keys: Keys = None,
    shared: Annotated[bool, typer.Option("--shared", help="Read the shared store instead of the data folder")] = False,
    home: Home = None,
    store: Shared = None,
) -> None:
    """Read every byte and compare it with the manifest. Exit code 1 where something is damaged, with its name."""
    there = opened(home, store)
    bad = _verified_shared(_sharing(there).remote, keys) if shared else _verified(there, keys)
    for name, files in bad.items():
        console.print(f"damaged: {name} ({', '.join(files)})", markup=False, soft_wrap=True)
    if bad:
        console.print("push it again from a data folder where it is whole: cfsd store push KEY --again" if shared else
                      "the next run that needs it makes it again, or takes it from the shared store")  # fmt: skip
        raise typer.Exit(1)
    console.print("everything is as it was made")


def _verified(store: Store, keys: list[str] | None) -> dict[str, list[str]]:
    chosen = [entry for entry in _chosen(entries(store), keys) if not entry.is_draft]
    bad: dict[str, list[str]] = {}
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("reading", total=sum(entry.size for entry in chosen))
        for entry in chosen:
            manifest = entry.manifest
            if manifest and entry.state == IN_PART:  # what is in the shared store alone is not read
                manifest = manifest | {
                    "files": {n: s for n, s in manifest["files"].items() if (entry.folder / n).exists()}
                }
            found = [MANIFEST] if manifest is None else store.damage(entry.folder, manifest, full=True)
            bad |= {f"{entry.kind} {entry.key}": found} if found else {}
            progress.advance(bar, entry.size)
    return bad


def _verified_shared(remote: SharedStore, keys: list[str] | None) -> dict[str, list[str]]:
    listed = remote.listed()
    chosen = [named(listed, key) for key in keys] if keys else list(listed)
    bad: dict[str, list[str]] = {}
    with Progress(console=console, transient=True) as progress:
        for place in progress.track(chosen, description="reading"):
            known = remote.realisation(*place)
            found = [MANIFEST] if known is None else _damaged(remote, known)
            bad |= {" ".join(place): found} if found else {}
    return bad


def _damaged(remote: SharedStore, known: Realisation) -> list[str]:
    bad = remote.damage(known)
    with TemporaryDirectory() as folder:
        part = Path(folder) / "part"
        for name in set(known.manifest["files"]) - set(bad):
            remote.bring(known, name, part)
            bad += [name] if sha256_of_file(part) != known.manifest["files"][name] else []
    return sorted(bad)


@app.command("gc")
def collect_command(
    older_than: Annotated[float, typer.Option(min=0, metavar="DAYS", help="Only what is at least as old")] = 1,
    larger_than: Annotated[float, typer.Option(min=0, metavar="MIB", help="Only what is at least as large")] = 0,
    even_referenced: Annotated[
        bool, typer.Option("--even-referenced", help="Also what reports, or what was made from it, refer to")
    ] = False,
    do: Annotated[bool, typer.Option("--delete", help="Delete it; without this nothing is deleted")] = False,
    home: Home = None,
    store: Shared = None,
) -> None:
    """Say what no report and no registered model needs; --delete deletes it. The shared store stays as it is."""
    there = opened(home, store)
    limits = Limits(older_than, larger_than * (1 << 20), even_referenced)
    gone = delete(there, limits) if do else collectable(there, limits)
    table = _table("kind", "key", "state", "size", "created", "seconds", "breaks" if even_referenced else "")
    for entry, breaks in gone:
        row = entry.kind, entry.key, entry.state, _bytes(entry.size), _when(entry.created), f"{entry.seconds:,.0f}"
        table.add_row(*row, escape(", ".join(breaks)))
    console.print(table)
    console.print(_freed(gone, done=do))


def _freed(gone: list[Doomed], *, done: bool) -> str:
    size, seconds = sum(d.entry.size for d in gone), sum(d.entry.seconds for d in gone)
    broken = len({name for doomed in gone for name in doomed.breaks})
    words = (
        f"{len(gone)} {'deleted' if done else 'could be deleted'}: {_bytes(size)}, {_seconds(seconds)} to make again"
    )
    words += f"; {broken} reports or artifacts that stay refer to some of it" if broken else ""
    return words if done or not gone else f"{words}. Nothing was deleted; add --delete to do it"


@app.command("push")
def push_command(
    keys: Keys = None,
    again: Annotated[
        bool, typer.Option("--again", help="Overwrite what is there: its files were found to be damaged")
    ] = False,
    home: Home = None,
    store: Shared = None,
) -> None:
    """Copy what is complete here, and not there yet, to the shared store. The first realisation there stays."""
    there = opened(home, store)
    sharing = _sharing(there)
    remote = sharing.remote
    remote.check()
    wanted, held = _chosen(entries(there), keys), set(remote.listed())
    sharing.forget({entry.place for entry in wanted} - held)
    rest_there = set() if again else held  # what is here in part has its rest in this shared store, or in another one
    chosen = [e for e in wanted if e.state == "whole" or (e.state == IN_PART and e.place in rest_there)]
    left = [entry for entry in wanted if entry not in chosen and (keys or entry.state == "damaged")]
    for entry in left:
        _say(f"{entry.kind} {entry.key} is not pushed, as it is {NOT_PUSHED[entry.state]}")
    missing = [entry for entry in chosen if not there.share(entry.artifact(), _say, again=again)]
    console.print(f"{len(chosen) - len(missing)} of {len(chosen)} are in {remote}", markup=False)
    if missing or left:
        raise typer.Exit(1)


@app.command("pull")
def pull_command(keys: Keys = None, home: Home = None, store: Shared = None) -> None:
    """Bring what the shared store holds into the data folder, weights included."""
    there = opened(home, store)
    listed = set(_sharing(there).remote.listed())
    known = listed | {entry.place for entry in entries(there) if not entry.is_draft}
    chosen = [named(known, key) for key in keys] if keys else sorted(listed)
    with there.in_use():
        here = [place for place in chosen if _pulled(there, *place)]
    console.print(f"{len(here)} of {len(chosen)} are in {there.home}", markup=False)
    if len(here) < len(chosen):
        raise typer.Exit(1)


def _pulled(store: Store, kind: str, key: str) -> bool:
    sharing = _sharing(store)
    sharing.believe(kind, key)
    if (found := store.find(kind, key)) is None and (known := sharing.remote.realisation(kind, key)):
        with store.lock(kind, key, _say):
            found = None if sharing.remote.damage(known) else store.restored(kind, key, _say)
    if found is None:
        _say(f"{kind} {key} is damaged: its recipe, run again, makes it anew")
        return False
    try:
        store.path(found)
    except Damaged as error:
        _say(str(error))
        return False
    return True


def _sharing(store: Store) -> Sharing:
    if store.sharing is None:
        raise BadInput("no shared store is named: give --store, or CFSD_STORE, as s3://bucket/team")
    return store.sharing


def _chosen(known: list[Entry], keys: Iterable[str] | None) -> list[Entry]:
    if not keys:
        return known
    places = {named((entry.place for entry in known), key) for key in keys}
    return [entry for entry in known if entry.place in places]


def _say(line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    return Table(*(Column(c, no_wrap=c in ("key", "size", "created"), justify="right" if c in ("size", "seconds") else
                          "left", overflow="fold") for c in columns), box=SIMPLE_HEAD)  # fmt: skip


def _total(found: list[Entry]) -> str:
    size, seconds = sum(entry.size for entry in found), sum(entry.seconds for entry in found)
    return f"{len(found)} artifacts, {_bytes(size)}, {_seconds(seconds)} to make again"


def _bytes(size: float) -> str:
    for unit in UNITS:
        if size < 1024 or unit == UNITS[-1]:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 3600:,.1f} h"


def _when(moment: float) -> str:
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M")
