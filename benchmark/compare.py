"""Compare runs at equal steps per trained task: python benchmark/compare.py LABEL=RUN[,RUN...] LABEL=RUN...

A RUN is a run folder, a metrics.csv or a pattern that matches several; those of a label differ by their seed. Steps are
divided by the number of tasks that a run trains, and all runs are cut where the shortest ends. For the last quarter and
the whole: mean and standard deviation over seeds and, in brackets, the 95 % interval of the difference to the first
label (Welch's t). Writes summary.md and a picture per measure. With --figure, labels and claims are those of an entry
of benchmark/figures.toml: a claim "agrees" if the interval of its difference is above 0, "contradicts" if below 0.

    python benchmark/compare.py "plain=runs/mt4__pcgrad_sac__sac*" "surgery=runs/mt4__pcgrad_sac__pcgrad*"
    python benchmark/compare.py --figure dgrad-mt4
"""
from __future__ import annotations

import glob
import json
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from run import FIGURES, RESULTS
from scipy.stats import t as student


@dataclass
class Args:
    # LABEL=RUN[,RUN...]; the first label is the one that others are compared with
    labels: tyro.conf.Positional[tuple[str, ...]] = ()
    figure: str | None = None  # in place of labels: an entry of figures.toml, or NAME-paper for its runs at that scale
    measures: tuple[str, ...] = ("success", "return")  # columns that each task has in metrics.csv
    out: Path = Path("comparison")            # folder for summary.md and pictures


# --- runs ------------------------------------------------------------------------------------------------------------
def tasks_of(table: np.ndarray, measure: str) -> list[str]:
    """Tasks that have such a column; QMP's behaviour policy, "mixture", and repeated trials in tables are none."""
    found = [re.fullmatch(rf"(?!mixture/|trial\d+/)(.+)/{measure}", name) for name in table.dtype.names]
    return [match[1] for match in found if match]


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps per trained task, (rows,), and the table of a run, which is given by its folder or its metrics.csv."""
    file = path / "metrics.csv" if path.is_dir() else path
    table = np.genfromtxt(file, delimiter=",", names=True, deletechars="", ndmin=1, encoding="utf-8")
    trained = tasks_of(table, "return")                                # those evaluated, unless a file beside says more
    for beside, key in (("args.json", "args"), ("runs.json", file.stem)):
        if (file.parent / beside).exists():
            about = json.loads((file.parent / beside).read_text(encoding="utf-8")).get(key, {})
            trained = about.get("tasks") or about.get("games") or trained
    return table["global_step"] / len(trained), table


def runs_of(figure: str) -> dict[str, list]:
    """The runs in benchmark/results/ of an entry's methods, and of those of other entries that stand `beside` them."""
    name = figure.removesuffix("-paper")
    if "methods" not in FIGURES.get(name, {}):
        sys.exit(f"--figure {figure} is no entry of figures.toml that has methods")
    own, found = [f"{name}/{method}" for method in FIGURES[name]["methods"]], {}
    for folder, method in (place.split("/") for place in [*own, *FIGURES[name].get("beside", [])]):
        files = sorted((RESULTS / (folder + figure[len(name):])).glob(f"{method}-s*.csv"))
        found[method] = [read(file) for file in files if re.fullmatch(rf"{method}-s\d+", file.stem)]
    return {method: runs for method, runs in found.items() if runs}


def common_steps(runs: dict[str, list]) -> np.ndarray:
    """Steps per task at which runs are compared: the evaluations of the run with the fewest, while all have some."""
    every = [steps for own in runs.values() for steps, _ in own]
    first, last = max(steps[0] for steps in every), min(steps[-1] for steps in every)
    if first > last:
        sys.exit(f"nothing to compare: one run ends at {last:,.0f} steps per task, another begins at {first:,.0f}")
    return np.append(min((np.unique(s[(s >= first) & (s < last)]) for s in every), key=len), last)


def curves(runs: list, steps: np.ndarray, measure: str, tasks: list[str]) -> np.ndarray:
    """(seeds, 1 + tasks, steps): the mean over tasks, then each task; straight between evaluations, NaN if unknown."""
    def column(table: np.ndarray, name: str) -> np.ndarray:
        if name == f"mean_{measure}" and name not in table.dtype.names:
            return np.mean([column(table, f"{task}/{measure}") for task in tasks], axis=0)
        return table[name] if name in table.dtype.names else np.full(len(table), np.nan)
    names = [f"mean_{measure}", *(f"{task}/{measure}" for task in tasks)]
    return np.array([[np.interp(steps, known, column(table, name)) for name in names] for known, table in runs])


# --- differences -----------------------------------------------------------------------------------------------------
def interval(values: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the difference of means over the first axis, seeds (Welch); NaN where one has a single seed."""
    if min(len(values), len(others)) < 2:
        return np.full((2, *values.shape[1:]), np.nan)
    a, b = (x.var(0, ddof=1) / len(x) + 1e-30 for x in (values, others))         # not 0 where all seeds are equal
    freedom = (a + b) ** 2 / (a**2 / (len(values) - 1) + b**2 / (len(others) - 1))
    difference, half = values.mean(0) - others.mean(0), student.ppf(0.975, freedom) * np.sqrt(a + b)
    return difference - half, difference + half


def verdict(better: np.ndarray, worse: np.ndarray) -> str:
    """What runs, a number each, say of the claim that the first are better."""
    number = partial(np.format_float_positional, precision=3, fractional=False, trim="-")          # three digits
    low, high = interval(better, worse)
    if min(len(better), len(worse)) < 2:
        return f"one seed (difference {number(better.mean() - worse.mean())})"
    word = "agrees" if low > 0 else "contradicts" if high < 0 else "open"
    return f"{word} (interval {number(low)} to {number(high)})"


def table_of(means: dict[str, dict], measure: str, tasks: list[str]) -> list[str]:
    """Markdown from {"last quarter": {label: (seeds, 1 + tasks)}, "whole run": the same}, a row per label and each."""
    lines = [f"| {measure} | seeds | over | {' | '.join(['mean', *tasks])} |", "|---" * (4 + len(tasks)) + "|"]
    for over, labels in means.items():
        first = next(iter(labels.values()))
        digits = 0 if np.nanmax([np.abs(own.mean(0)) for own in labels.values()]) >= 100 else 2
        for label, own in labels.items():
            cells = [f"{mean:.{digits}f}" for mean in own.mean(0)]
            if len(own) > 1:
                cells = [f"{cell} ± {spread:.{digits}f}" for cell, spread in zip(cells, own.std(0, ddof=1))]
            if own is not first and len(first) > 1 < len(own):
                cells = [f"{cell} [{low:.{digits}f}, {high:.{digits}f}]"
                         for cell, low, high in zip(cells, *interval(own, first))]
            lines.append(f"| {label} | {len(own)} | {over} | {' | '.join(cells)} |")
    return lines


def judge(claim: str, means: dict[str, dict], measure: str) -> str:
    """Markdown: the verdicts of one claim, such as "qmp > separated"."""
    better, worse = claim.split(" > ")
    if not {better, worse} <= set(means["whole run"]):
        return f"* {claim}, {measure}: not run"
    said = [f"{over} {verdict(labels[better][:, 0], labels[worse][:, 0])}" for over, labels in means.items()]
    above = [labels[better].mean(0) > labels[worse].mean(0) for labels in means.values()][0][1:]
    return f"* {claim}, {measure}: {', '.join(said)}; above on {sum(above)} of {len(above)} tasks in the last quarter"


def draw(path: Path, values: dict[str, np.ndarray], steps: np.ndarray, measure: str, tasks: list[str]) -> None:
    """A panel for the mean and one per task: means over seeds, in bands of one standard deviation."""
    rows = -(-(1 + len(tasks)) // 4)
    figure = Figure(figsize=(3 + 3 * min(4, 1 + len(tasks)), 1 + 2.5 * rows), layout="constrained")
    for i, title in enumerate(["mean over tasks", *tasks]):
        axis = figure.add_subplot(rows, min(4, 1 + len(tasks)), i + 1, title=title)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        for k, (label, own) in enumerate(values.items()):
            mean, spread = own[:, i].mean(0), own[:, i].std(0, ddof=min(1, len(own) - 1))
            axis.plot(steps, mean, "-" if k < 10 else "--", label=f"{label} ({len(own)})")
            axis.fill_between(steps, mean - spread, mean + spread, alpha=0.15, lw=0)
    figure.supxlabel("environment steps per trained task")
    figure.supylabel(measure)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", title="label (seeds)")
    figure.savefig(path, dpi=80)


def main(args: Args) -> None:
    """Compare, print, and write summary.md and the pictures."""
    if args.figure:
        runs, out, entry = runs_of(args.figure), RESULTS / args.figure, FIGURES[args.figure.removesuffix("-paper")]
    else:
        labels, out = dict(text.split("=", 1) for text in args.labels), args.out
        entry = {"title": " and ".join(labels), "yardstick": "", "measures": args.measures, "claims": []}
        runs = {label: [read(Path(path)) for pattern in patterns.split(",") for path in sorted(glob.glob(pattern))]
                for label, patterns in labels.items()}
    if not runs or not all(runs.values()):
        sys.exit(f"no runs of {args.figure or args.labels}; give LABEL=RUN[,RUN...], or --figure NAME, which was run")
    out.mkdir(parents=True, exist_ok=True)
    steps, longest = common_steps(runs), max(steps[-1] for own in runs.values() for steps, _ in own)
    late = steps > 0.75 * steps[-1]
    lines = [f"**{entry['title']}.** {entry['yardstick']}", "", f"Up to {steps[-1]:,.0f} steps per trained task; the "
             f"longest run has {longest:,.0f}. In brackets: 95 % interval of the difference to {next(iter(runs))}."]
    known = {name for own in runs.values() for _, table in own for name in table.dtype.names}
    for measure in [measure for measure in entry["measures"] if f"mean_{measure}" in known or not args.labels]:
        tasks = list(dict.fromkeys(task for own in runs.values() for _, t in own for task in tasks_of(t, measure)))
        values = {label: curves(own, steps, measure, tasks) for label, own in runs.items()}
        draw(out / f"{measure}.png", values, steps, measure, tasks)
        means = {over: {label: own[..., rows].mean(-1) for label, own in values.items()}
                 for over, rows in (("last quarter", late), ("whole run", late | True))}
        verdicts = [judge(claim, means, measure) for claim in entry["claims"]]
        lines += ["", *table_of(means, measure, tasks), "", *verdicts]
    text = "\n".join(lines) + "\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
