"""Pictures: every line has its name, and every name can be told from the others."""

from matplotlib.figure import Figure

from cfsd.report.figures.curves import curve_figures
from cfsd.report.figures.look import LONGEST_NAME, legend_label, short, write_legend
from cfsd.report.figures.moved import moved_figures
from cfsd.report.figures.svg import svg_of
from cfsd.report.training import Panel


def test_names_that_begin_with_an_underscore_are_in_the_legend_as_they_are_written() -> None:
    figure = Figure()
    axes = figure.subplots()
    for name in ("_plain", "rehearse", "$x$"):
        axes.plot([0, 1], [0, 1], label=legend_label(name))
    write_legend(figure, 3)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_plain", "rehearse", "$x$"]


def test_an_axis_has_the_name_of_a_benchmark_as_it_is_written() -> None:
    panel = Panel("cost", "cost_$_in_$: acc, %", {"v": ([1.0, 2.0], [2.0, 3.0])})
    drawn = curve_figures([panel], ["v"], {"v": "v"})["cost"]
    assert "cost_$_in_$: acc, %" in svg_of(drawn, "cost", "")


def test_long_names_keep_the_value_at_their_end() -> None:
    names = [f"rehearse chats of the base with the learning_rate={rate}" for rate in ("1e-05", "3e-05", "0.0001")]
    found = [short(name) for name in names]
    assert len({*found}) == 3 and all(len(name) == LONGEST_NAME for name in found) and found[0].endswith("rate=1e-05")


def test_a_bin_is_drawn_at_the_tenth_that_it_ends() -> None:
    """Two tenths in one bin, as their tokens share an entropy: those after it keep their places."""
    tokens = [10, 10, 20, *[10] * 6]
    by_entropy = [
        {"low": i, "high": i + 1, "tokens": count, "kl": {"value": 0.1, "low": 0.0, "high": 0.2}}
        for i, count in enumerate(tokens)
    ]
    by_position = [{"low": 1.0, "high": 2.0, "tokens": 100, "kl": {"value": 0.1, "low": 0.0, "high": 0.2}}]
    drawn = moved_figures("probe", {"own": {"by_position": by_position, "by_entropy": by_entropy}}, ["own"])
    xs = drawn["probe by entropy"].axes[0].lines[0].get_xdata()
    assert [*xs] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
