"""Draw what scripts/compare_policies.py --json wrote: the SuperServe paper's pictures, and the collapse of SlackFit.

Reads the file and never runs anything.

    python scripts/plot_policies.py policies.json --out plots/
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.plot_replay import GREY, STYLE

COLOURS = {
    "clearfit": "#7f3c8d", "pacefit": "#d55e00", "halfslo": "#e69f00", "slackfit": "#0072b2", "slackfit:8": "#56b4e9",
    "maxbatch": "#009e73", "maxaccuracy": "#cc79a7", "cheapest": "#000000",
}  # fmt: skip
TIMELINES = ("clearfit", "slackfit")
CURVES = {
    "load": "load, of what the cheapest subnet bears", "burstiness": "CV² of the bursts",
    "acceleration": "acceleration, queries/s²", "workers": "workers",
}  # fmt: skip

Rows = Sequence[dict[str, Any]]


def draw_all(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write every picture that the document has data for."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for table in dict.fromkeys(row["table"] for row in document["rows"]):
        for name, figure in _figures(document, table):
            figure.suptitle(f"{table}, SLO {document['slos_ms'][table]:g} ms: {name}", fontsize=10)
            pictures.append(folder / f"{table}-{name}.png")
            figure.savefig(pictures[-1], dpi=130)
    return pictures


def _figures(document: dict[str, Any], table: str) -> Iterator[tuple[str, Figure]]:
    rows_of = {"grid": document["rows"], **document["studies"]}
    rows_of = {study: [row for row in rows if row["table"] == table] for study, rows in rows_of.items()}
    with matplotlib.rc_context(STYLE):
        yield "tradeoff", _tradeoff(rows_of.get("burstiness") or rows_of["grid"])
        for study, label in CURVES.items():
            if rows_of.get(study):
                yield study, _curves(rows_of[study], label)
        for study in ("burstiness", "failures"):
            timed = [row for row in rows_of.get(study, ()) if "timeline" in row and row["policy"] in TIMELINES]
            if timed:
                yield (
                    f"timeline-{study}",
                    _timelines([row for row in timed if row["workload"] == timed[-1]["workload"]]),
                )


def _colour(policy: str) -> str:
    return COLOURS.get(policy, GREY)


def _tradeoff(rows: Rows) -> Figure:
    """Attainment against mean serving accuracy, a panel for each workload: up and to the right is better."""
    names = list(dict.fromkeys(row["workload"] for row in rows))
    columns = min(4, len(names))
    height = -(-len(names) // columns)
    figure = Figure(figsize=(3 * columns, 2.8 * height + 0.7), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False, sharey=True).flat
    for panel, name in zip(panels, names, strict=False):
        for row in (row for row in rows if row["workload"] == name and row["accuracy"] is not None):
            fixed = row["policy"].startswith("fixed:")
            marker = "x" if fixed else "o"
            label = "one subnet" if fixed else row["policy"]
            panel.scatter(
                100 * row["accuracy"], row["attainment"], marker=marker, c=_colour(row["policy"]), label=label
            )
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("mean serving accuracy, %")
        panel.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _legend(figure)
    return figure


def _curves(rows: Rows, label: str) -> Figure:
    """Attainment and accuracy against what the study varies; means where it has several workloads at a place."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = sorted({row["x"] for row in rows})
    for policy in dict.fromkeys(row["policy"] for row in rows if not row["policy"].startswith("fixed:")):
        for panel, column in ((left, "attainment"), (right, "accuracy")):
            means = [_mean(row[column] for row in rows if row["policy"] == policy and row["x"] == x) for x in places]
            panel.plot(places, means, marker=".", color=_colour(policy), label=policy)
    for panel, title in ((left, "SLO attainment"), (right, "mean serving accuracy")):
        panel.set_xlabel(label)
        panel.set_title(title, fontsize=9)
        panel.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        if places[-1] >= 4 * places[0] >= 4:
            panel.set_xscale("log", base=2)
            panel.set_xticks(places, [f"{x:g}" for x in places])
    _legend(figure)
    return figure


def _timelines(rows: Rows) -> Figure:
    """Arrivals, attainment, accuracy and batch size over time."""
    columns = ("arrivals", "attainment", "accuracy", "batch_size")
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(len(columns), 1, sharex=True)
    for panel, column in zip(panels, columns, strict=True):
        panel.set_ylabel(column.replace("_", " "))
        for row in rows[:1] if column == "arrivals" else rows:
            _step(panel, row, column)
    panels[0].set_ylabel("arrivals/s")
    panels[-1].set_xlabel("seconds from the start")
    _legend(figure)
    return figure


def _step(panel: Axes, row: dict[str, Any], column: str) -> None:
    timeline = row["timeline"]
    values = np.array([np.nan if value is None else value for value in timeline[column]], float)
    if column == "arrivals":
        panel.step(timeline["time_s"], values / timeline["bin_s"], where="post", color=GREY)
    else:
        panel.step(timeline["time_s"], values, where="post", color=_colour(row["policy"]), label=row["policy"])


def _mean(values: Iterator[float | None]) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else float("nan")


def _legend(figure: Figure) -> None:
    found: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the document and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, metavar="FILE.json", help="written by compare_policies.py --json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    options = parser.parse_args(arguments)
    try:
        pictures = draw_all(json.loads(options.document.read_text(encoding="utf-8")), options.out)
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f"plot_policies.py: {options.document}: not a document of compare_policies.py: {error!r}")
    print("\n".join(map(str, pictures)))


if __name__ == "__main__":
    main()
