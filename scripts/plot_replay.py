"""Draw the timelines of one or several replays: arrival rate, attainment, accuracy and batch size against time.

Reads the files that scripts/replay.py --json wrote, and never runs anything. Several reports (of one workload, under
different policies) are drawn over each other, named by their --label.

    python scripts/plot_replay.py slackfit.json largest.json smallest.json --out policies.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

PANELS = ("arrivals/s", "SLO attainment", "accuracy of answers", "batch size")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind readers too
GREY = "#555555"
STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.axisbelow": True, "axes.edgecolor": GREY, "legend.frameon": False,
}  # fmt: skip


def draw(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one picture of four panels that share their time axis."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 7.5), layout="constrained")
        panels = figure.subplots(len(PANELS), 1, sharex=True)
        for panel, name in zip(panels, PANELS, strict=True):
            panel.set_ylabel(name)
        _draw_arrivals(panels[0], reports[0])
        for report, colour in zip(reports, COLOURS * len(reports), strict=False):
            _draw_report(panels[1:], report, colour)
        panels[1].set_ylim(-0.03, 1.05)
        panels[3].set_ylim(bottom=0)
        panels[3].set_xlabel("seconds from the start")
        panels[0].set_xlim(0, max(_column(report, "arrivals")[0][-1] for report in reports))
        for panel in panels[1:3]:
            panel.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        figure.align_ylabels(panels)
        if len(reports) > 1:
            figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(_title(reports), fontsize=10)
        figure.savefig(path, dpi=130)


def _draw_arrivals(panel: Axes, report: dict[str, Any]) -> None:
    time_s, rate = _column(report, "arrivals")
    rate = rate / report["timeline_fine"]["bin_s"]
    panel.fill_between(time_s, rate, step="post", color=GREY, alpha=0.35, linewidth=0)
    panel.step(time_s, rate, where="post", color=GREY, linewidth=0.8)
    panel.set_ylim(bottom=0)


def _draw_report(panels: Sequence[Axes], report: dict[str, Any], colour: str) -> None:
    for panel, name in zip(panels, ("attainment", "accuracy", "batch_size"), strict=True):
        time_s, values = _column(report, name)
        panel.step(time_s, values, where="post", color=colour, linewidth=1.1, alpha=0.9, label=_name(report))


def _column(report: dict[str, Any], name: str) -> tuple[Any, Any]:
    """Times and values as arrays; null becomes NaN, a gap in the line. The last bin is drawn to its end."""
    fine = report["timeline_fine"]
    values = np.array([np.nan if value is None else value for value in fine[name]], float)
    time_s = np.array([*fine["time_s"], fine["time_s"][-1] + fine["bin_s"]])
    return time_s, np.append(values, values[-1:])


def _name(report: dict[str, Any]) -> str:
    name = report["arguments"]["label"] or "run"
    return f"{name}: attainment {_percent(report['attainment'])}, accuracy {_percent(report['mean_serving_accuracy'])}"


def _percent(part: float | None) -> str:
    return "none" if part is None else f"{part:.2%}"


def _title(reports: Sequence[dict[str, Any]]) -> str:
    report = reports[0]
    workload, sent = report["workload"], report["workload"]["sent"]
    source = Path(workload["source"]).name if report["arguments"]["trace"] else workload["source"]
    scaling = [f"thinned to {workload['thinned_to']:g}"] if workload["thinned_to"] != 1 else []
    scaling += [f"time squeezed {workload['squeezed_by']:.3g}x"] if workload["squeezed_by"] != 1 else []
    rate = f"{sent['mean_rate'] or 0:.0f}/s, busiest second {sent['busiest_second']}"
    slo = f"SLO {report['arguments']['slo_ms']:g} ms"
    first = " · ".join([source, *scaling, f"{sent['count']} queries at {rate}", slo])
    return first if len(reports) > 1 else f"{first}\n{_name(report)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the reports and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, metavar="FILE.json", help="written by replay.py --json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    options = parser.parse_args(arguments)
    reports = []
    for path in options.reports:
        try:
            report = json.loads(path.read_text())
            _title([report]), report["timeline_fine"]["time_s"][0]
        except (OSError, ValueError, LookupError, TypeError) as error:
            print(f"plot_replay.py: {path}: no report of replay.py --json: {error!r}", file=sys.stderr)
            sys.exit(2)
        reports.append(report)
    draw(reports, options.out)


if __name__ == "__main__":
    main()
