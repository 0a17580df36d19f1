"""The figures and the verdict on a terminal, the table in parts where it is too narrow for all variants."""

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cfsd.report.compared import NOTHING, Comparisons
from cfsd.report.differences import lines_against
from cfsd.report.summary import Summary
from cfsd.report.table import lines_of
from cfsd.report.verdict import best, remarks, two_sentences, variants_of, warnings


def print_summary(summaries: list[Summary], console: Console, comparisons: Comparisons = NOTHING) -> None:
    """Print the table and the verdict; on a narrow console in parts, with intervals on lines of their own.

    Of several variants, how the best one differs from each of the others follows.
    """
    _print_table(summaries, console)
    sentences, beneath = two_sentences(summaries, comparisons), remarks(summaries, comparisons)
    for said in (" ".join(sentences), *_differences(summaries, comparisons), *beneath, *warnings(summaries)):
        console.print(Text(said))


def _differences(summaries: list[Summary], comparisons: Comparisons) -> list[str]:
    variants = variants_of(summaries)
    name = best(variants, comparisons).name
    return lines_against(name, comparisons, only_found=True) if len(variants) > 2 else []


def _print_table(summaries: list[Summary], console: Console) -> None:
    unlimited = console.options.update(width=100_000)
    for between in (" [", "\n["):
        printed = _rich_table(summaries, between)
        if Measurement.get(console, unlimited, printed).maximum <= console.width or len(summaries) == 1:
            console.print(printed)
            return
    middle = len(summaries) // 2
    _print_table(summaries[:middle], console)
    _print_table(summaries[middle:], console)


def _rich_table(summaries: list[Summary], between: str) -> Table:
    printed = Table("", box=box.SIMPLE_HEAD)
    for name in ("base", *(s.name for s in summaries)):
        printed.add_column(Text(name), justify="right", overflow="fold")
    for line in lines_of(summaries):
        cells = (Text(cell.replace(" [", between)) for cell in line.cells)
        printed.add_row(Text("  " * line.is_part + line.label), line.base, *cells)
    return printed
