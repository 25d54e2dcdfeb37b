"""Parts of self-contained pages: tables, plots as SVG in the page's colors, the environment of their templates."""

import io
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.console import visible

# Of lines and points, in their order: each is seen on white and on black.
COLORS = ("#3b7dd8", "#d1495b", "#2a9d5c", "#b8860b", "#8a5fd0", "#0f8f9c", "#c2569b", "#7a8490")
INK = "#010203"  # stands for the page's color of text in a plot, which depends on the reader's light or dark mode
WIDTH = 4.6  # inches: about a phone's width at the size at which it was drawn, so that its text is read there
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it is searched, copied, and small
    "svg.hashsalt": "winnow",  # ids that are the same in each report
    "font.size": 9.0,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def render(template: str, content: Mapping[str, Any]) -> str:
    """Return the page of a template in this folder; what would control a terminal is written out."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=without_control)
    return environment.get_template(template).render(content)


def page_table(rows: list[dict[str, Any]], titles: Mapping[str, str] = MappingProxyType({})) -> dict[str, list[Any]]:
    """Return the titles of the columns, which of them are numbers, and rows of text, for a table of the page."""
    columns = list(rows[0]) if rows else []
    numbers = [
        n
        for n, name in enumerate(columns)
        if all(_is_number(row[name]) for row in rows) and any(row[name] is not None for row in rows)
    ]
    return {
        "columns": [titles.get(name, name) for name in columns],
        "numbers": numbers,
        "rows": [[_cell(value) for value in row.values()] for row in rows],
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value.replace(".", "", 1).isdigit()
    return value is None or isinstance(value, int | float)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def without_control(value: Any) -> Any:
    """Return a text as terminals get it; plots, which are marked as safe, stay."""
    return visible(value) if type(value) is str else value


def label(text: str) -> str:
    """Return a name for a plot: matplotlib takes what is between two dollars for a formula."""
    return text.replace("$", r"\$")


def new_figure(height: float) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.patch.set_visible(False)
    return figure, axes


def error_bars(
    rows: list[dict[str, Any]], name: str, factor: float = 1.0, ends: tuple[str, str] = ("_low", "_high")
) -> list[list[float]] | None:
    """Return the lengths of a figure's intervals below and above its values [2, rows]; None if a row has none."""
    if any(row.get(f"{name}{end}") is None for row in rows for end in ends):
        return None
    return [[factor * abs(row[name] - row[f"{name}{end}"]) for row in rows] for end in ends]


def to_svg(figure: Figure, label: str) -> str:
    """Return inline SVG without a date, in the page's color of text, so that the same store gives the same page."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
