"""Draw a figure from its runs and say what agrees with the paper: python benchmark/report.py FIGURE [--runs-dir DIR]

Reads the finished runs that benchmark/run.py has made into benchmark/results/FIGURE/: the metrics.csv of each, what its
training episodes achieved, the pictures of seed 1, and in runs.json command, versions and hours. From these it makes
tidy.csv (a row per run, evaluation and task), curves.png, tasks.png and summary.md: means and standard deviations over
seeds, the interquartile mean with a stratified bootstrap interval (rliable), and a verdict for each ordering that the
paper claims. The summary also goes to the script's page in docs/, between <!-- FIGURE --> and <!-- /FIGURE -->. Without
runs it does all that with what benchmark/results/ holds. With --scale paper all of these are FIGURE-paper.
"""
from __future__ import annotations

import csv
import json
import math
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rliable.library import get_interval_estimates
from rliable.metrics import aggregate_iqm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent))
import run  # noqa: E402

RESULTS = run.ROOT / "benchmark" / "results"
BINS = 20                                                 # of a run, for what training episodes achieved


@dataclass
class Args:
    figure: tyro.conf.Positional[str]
    """entry of benchmark/figures.toml"""
    scale: run.Scale = "laptop"
    """which of its runs: the same as for benchmark/run.py"""
    runs_dir: Path = Path("runs")
    """where benchmark/run.py has put the runs"""
    seeds: tuple[int, ...] = ()
    """of which runs; none given: the scale's"""

    def __post_init__(self):
        figure = run.figure_named(self.figure)
        for key, says in (("command", "its command draws it: "), ("same_runs_as", "it is drawn with ")):
            if key in figure:
                raise ValueError(f"{self.figure} has no runs of its own; {says}{figure[key]}")


# --- what the runs say -----------------------------------------------------------------------------------------------
def collect(args: Args) -> Path:
    """Copy what finished runs have measured; the paper's scale has a folder of its own."""
    figure, results = run.FIGURES[args.figure], RESULTS / (args.figure + "-paper" * (args.scale == "paper"))
    results.mkdir(parents=True, exist_ok=True)
    known = json.loads((results / "runs.json").read_text()) if (results / "runs.json").exists() else {}
    plain, found = (run.jobs_of(run.Args(args.figure, scale=args.scale, seeds=args.seeds, runs_dir=where))
                    for where in (Path("runs"), args.runs_dir))        # plain: the default folder in their commands
    for job, as_typed in zip(found, plain):
        name, command = job.folder.name, " ".join(["python", job.script, *as_typed.flags])
        if not job.finished and name in known and known[name]["command"] != command:
            sys.exit(f"{results / name}.csv is of a run with other flags; delete it and its entry in runs.json\n"
                     f"  it has     {known[name]['command']}\n  asked for  {command}")
        if job.finished:
            if job.differs():
                sys.exit(job.differs())
            folder = sorted(job.folder.glob("*/metrics.csv"))[-1].parent
            shutil.copy(folder / "metrics.csv", results / f"{name}.csv")
            if (folder / "mixture.csv").exists():
                shutil.copy(folder / "mixture.csv", results / f"{name}-mixture.csv")
            for picture in folder.glob("*.png") if name.endswith("-s1") else ():
                shutil.copy(picture, results / f"{name}-{picture.name}")
            tasks, rows = training(folder, figure.get("progress", kind_of(figure)))
            if tasks:
                np.savetxt(results / f"{name}-training.csv", rows, "%.4g", ",", comments="",
                           header=",".join(["global_step", *tasks]))
            about, table = json.loads((folder / "args.json").read_text()), read(folder / "metrics.csv")
            known[name] = {"command": command, "versions": about["versions"],
                           "hours": round(table["seconds"][-1] / 3600, 2), "steps": int(table["global_step"][-1]),
                           "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread"}
    if known:
        (results / "runs.json").write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return results


def training(folder: Path, progress: str) -> tuple[list[str], np.ndarray]:
    """What training episodes achieved, behaviour included: tasks, and rows of step and the tasks' means in a bin.

    No tasks if fewer than ten values of one of them were logged.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    key = {"return": "episodic_return"}.get(progress, progress)
    logged = {name.split("/")[1] for name in events.Tags()["scalars"] if re.fullmatch(rf"tasks/[^/]+/{key}", name)}
    columns = read(folder / "metrics.csv").dtype.names
    tasks = [task for task in dict.fromkeys(name.split("/")[0] for name in columns if "/" in name) if task in logged]
    found = {task: np.array([(e.step, e.value) for e in events.Scalars(f"tasks/{task}/{key}")]) for task in tasks}
    bins = min([BINS, *(len(values) for values in found.values())])
    if not tasks or bins < 10:                                         # logged too seldom for a curve
        return [], np.zeros((0, 1))
    last = max(values[:, 0].max() for values in found.values())
    rows = np.full((bins, 1 + len(tasks)), np.nan)
    rows[:, 0] = np.ceil(last / bins * np.arange(1, bins + 1))
    for column, values in enumerate(found.values(), 1):
        for row in rows:
            inside = (values[:, 0] > row[0] - last / bins) & (values[:, 0] <= row[0])
            row[column] = values[inside, 1].mean() if inside.any() else np.nan
    return tasks, rows


def read(path: Path) -> np.ndarray:
    return np.genfromtxt(path, delimiter=",", names=True, deletechars="", ndmin=1)


def tables(results: Path, method: str, suffix: str = "") -> dict[int, np.ndarray]:
    """By seed: metrics.csv, or with a suffix what was written beside it."""
    found = {re.fullmatch(rf"{re.escape(method)}-s(\d+){suffix}", path.stem): path for path in results.glob("*.csv")}
    return {int(match[1]): read(path) if suffix != "-mixture" else np.loadtxt(path, delimiter=",")
            for match, path in sorted(found.items(), key=lambda item: str(item[1])) if match}


def runs_of(results: Path, figure: dict) -> dict[str, dict]:
    """metrics.csv by method and seed: the figure's own, then those of the figure that it is to be compared with."""
    own = {method: tables(results, method) for method in figure["methods"]}
    if "compared_with" in figure:
        other = figure["compared_with"]
        own |= {method: tables(place_of(results, method, figure), method)
                for method in figure.get("compared_methods", run.FIGURES[other]["methods"])}
    return {method: found for method, found in own.items() if found}


def place_of(results: Path, method: str, figure: dict) -> Path:
    """The results that hold a method's files."""
    if method in figure["methods"]:
        return results
    return results.parent / (figure["compared_with"] + "-paper" * results.name.endswith("-paper"))


def kind_of(figure: dict) -> str:
    """The column that each task has: its success where that is what the figure shows, else its return."""
    return "success" if figure["measure"] == "mean_success" else "return"


def tasks_of(table: np.ndarray) -> list[str]:
    """Names in their order; "mixture" is no task but QMP's behaviour policy, over all tasks."""
    names = [name.removesuffix("/return") for name in table.dtype.names if name.endswith("/return")]
    return [name for name in names if f"{name}/success" in table.dtype.names and name != "mixture"]


def late(table: np.ndarray, key: str) -> float:
    """Mean of a column over the last quarter of a run."""
    return table[key][table["global_step"] > 0.75 * table["global_step"][-1]].mean()


# --- pictures and tables ---------------------------------------------------------------------------------------------
def write_tidy(results: Path, runs: dict[str, dict]) -> None:
    """tidy.csv: one row per run, evaluation and task, for whatever plots a reader prefers."""
    with open(results / "tidy.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "seed", "global_step", "task", "return", "success"])
        for method, seeds in runs.items():
            for seed, table in seeds.items():
                for task in tasks_of(table):
                    for step, value, success in zip(table["global_step"], table[f"{task}/return"],
                                                    table[f"{task}/success"]):
                        writer.writerow([method, seed, int(step), task, f"{value:.6g}", f"{success:.6g}"])


def panels(results: Path, runs: dict[str, dict], figure: dict) -> list[tuple[str, dict]]:
    """What curves.png shows: label, and for each method the curves of its seeds as pairs of steps and values."""
    measure, progress = figure["measure"], figure.get("progress")
    shown = [(f"{measure.replace('_', ' ')}, evaluated", {
        method: [(t["global_step"], t[measure]) for t in seeds.values()] for method, seeds in runs.items()})]
    if progress:
        shown.append((f"{progress}, evaluated, mean over tasks", {
            method: [(t["global_step"], np.mean([t[f"{task}/{progress}"] for task in tasks_of(t)], axis=0))
                     for t in seeds.values()] for method, seeds in runs.items()}))
    trained = {method: tables(place_of(results, method, figure), method, "-training") for method in runs}
    if all(trained.values()):
        shown.append((f"{progress or kind_of(figure)} in training episodes", {
            method: [(t["global_step"], mean_known([t[task] for task in t.dtype.names[1:]]))
                     for t in seeds.values()] for method, seeds in trained.items()}))
    return shown


def mean_known(columns: list[np.ndarray]) -> np.ndarray:
    """Mean over tasks, each as in the last bin in which it had an episode; those that have had none are left out."""
    columns = np.array(columns)
    last = np.maximum.accumulate(np.where(np.isnan(columns), 0, np.arange(columns.shape[1])), axis=1)
    return np.ma.masked_invalid(np.take_along_axis(columns, last, axis=1)).mean(0).filled(np.nan)


def together(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all seeds have seen; mean and standard deviation over seeds there, straight between their points."""
    steps = curves[0][0][curves[0][0] <= min(own[-1] for own, _ in curves)]
    values = np.array([np.interp(steps, own, value) for own, value in curves])
    return steps, values.mean(0), deviation(values)


def deviation(values) -> np.ndarray:
    """Standard deviation over the first axis, of a sample: divided by n - 1, and 0 if there is one value."""
    return np.std(values, axis=0, ddof=min(1, len(values) - 1))


def at(table: np.ndarray, key: str, share: float) -> float:
    """A column at a share of the run, straight between two evaluations."""
    return float(np.interp(share * table["global_step"][-1], table["global_step"], table[key]))


def longest(runs: dict[str, dict], figure: dict) -> float:
    """Where pictures end: at the last step of the figure's own runs, those that it is compared with may be longer."""
    return max(t["global_step"][-1] for method in runs if method in figure["methods"] for t in runs[method].values())


def draw(results: Path, runs: dict[str, dict], figure: dict) -> None:
    """curves.png: mean and standard deviation over seeds; for QMP also how much each task trusts its own policy."""
    shown = panels(results, runs, figure)
    method, seeds = next(iter(runs.items()))
    own = [name for name in next(iter(seeds.values())).dtype.names if name.endswith("/own_share")]
    picture = Figure(figsize=(5.2 * (len(shown) + bool(own)), 4.2), layout="constrained")
    axes = picture.subplots(1, len(shown) + bool(own), squeeze=False)[0]
    for axis, (shows, methods) in zip(axes, shown):
        for k, (label, curves) in enumerate(methods.items()):
            steps, mean, std = together(curves)
            axis.plot(steps, mean, "-" if k < 10 else "--",
                      label=f"{label} ({len(curves)} {'seed' if len(curves) == 1 else 'seeds'})")
            axis.fill_between(steps, mean - std, mean + std, alpha=0.2)
        axis.set(xlabel="environment steps", ylabel=shows, xlim=(0, longest(runs, figure)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(axes), frameon=False)
    picture.suptitle(figure["title"])
    if own:
        for name in own:
            axes[-1].plot(next(iter(seeds.values()))["global_step"], np.mean([t[name] for t in seeds.values()], 0),
                          label=name.split("/")[0], linewidth=1)
        axes[-1].axhline(1 / len(own), color="black", linestyle=":", linewidth=1)
        axes[-1].set(xlabel="environment steps", ylabel=f"{method}: share of steps by the own policy")
        axes[-1].legend(frameon=False, fontsize=7, ncols=2)
        axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    picture.savefig(results / "curves.png", dpi=120)
    mixtures = tables(results, method, "-mixture")
    if mixtures:
        sys.path.insert(0, str(run.ROOT))
        import torch

        from qmp_sac import plot_mixture
        plot_mixture(results / "mixture.png", torch.from_numpy(np.mean(list(mixtures.values()), 0)),
                     [name.split("/")[0] for name in own])


def draw_tasks(results: Path, runs: dict[str, dict], figure: dict) -> None:
    """tasks.png: a panel per task with each method's curve, mean and standard deviation over seeds.

    Curves are of evaluations, or of training episodes where the figure's `curves` says so, as its paper has them.
    """
    training = figure.get("curves") == "training"
    tasks = list(dict.fromkeys(task for seeds in runs.values() for t in seeds.values() for task in tasks_of(t)))
    kinds = list(dict.fromkeys((kind_of(figure), figure.get("progress", kind_of(figure)))))
    columns = len(tasks) if len(tasks) <= 5 else min(5, -(-len(tasks) // 2))
    rows = -(-len(tasks) // columns)
    height = max(2.6 * rows * len(kinds), 0.7 + 0.24 * len(runs))      # at least that of the legend
    picture = Figure(figsize=(3.2 * columns, height), layout="constrained")
    grid = picture.subplots(rows * len(kinds), columns, sharex=True, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for k, kind in enumerate(kinds):
        for i, task in enumerate(tasks):
            axis = grid[k * rows + i // columns, i % columns]
            axis.axis("on")
            for colour, (method, seeds) in enumerate(runs.items()):
                if training:
                    seeds = tables(place_of(results, method, figure), method, "-training")
                key = task if training else f"{task}/{kind}"
                known = [t for t in seeds.values() if key in t.dtype.names]
                if known:
                    steps, mean, std = together([(t["global_step"], t[key]) for t in known])
                    axis.plot(steps, mean, "-" if colour < 10 else "--", color=f"C{colour}",
                              label=f"{method} ({len(known)})")
                    axis.fill_between(steps, mean - std, mean + std, color=f"C{colour}", alpha=0.15)
            axis.set(title=task, ylabel=f"{'training ' * training}{kind}" if i % columns == 0 else "",
                     xlim=(0, longest(runs, figure)))
            if kind == "success":
                axis.set_ylim(-0.03, 1.03)
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.tick_params(labelbottom=True)
    picture.supxlabel("environment steps, summed over tasks", fontsize=10)
    picture.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False,
                   title="method (seeds)")
    picture.savefig(results / "tasks.png", dpi=100)


def spread(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f}" + (f" ± {deviation(values):.{digits}f}" if len(values) > 1 else "")


def interval(scores: np.ndarray, digits: int) -> str:
    """Interquartile mean of (seeds, tasks), with its 95 % interval where there are seeds to draw from."""
    np.random.seed(0)                                                  # rliable draws from the global generator
    if len(scores) < 2:
        return f"{aggregate_iqm(scores):.{digits}f}"
    point, bounds = get_interval_estimates({"runs": scores}, lambda x: np.array([aggregate_iqm(x)]), reps=2_000)
    low, high = bounds["runs"][:, 0]
    return f"{point['runs'][0]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def compared(high: list[float], low: list[float]) -> str:
    """In words, whether one sample of runs is above another by more than the root of the sum of both variances."""
    gap, noise = np.mean(high) - np.mean(low), np.hypot(deviation(high), deviation(low))
    if not np.isfinite(gap):
        return "cannot be compared, as a value is missing"
    word = "within the spread of seeds" if abs(gap) <= noise else "agrees" if gap > 0 else "does not agree"
    return f"{word} (difference {gap:.3g}, spread {noise:.3g})"


def verdict(claim: str, runs: dict[str, dict], measure: str, progress: str | None = None) -> str:
    """Whether runs agree with an ordering such as "em > sp": at their end, and in the mean over their whole length.

    With `progress` it is judged by the mean over tasks of that column in place of the measure.
    """
    better, worse = claim.split(" > ")
    if min(len(runs.get(name, ())) for name in (better, worse)) < 3:
        return f"* {claim}: not enough runs (three seeds of both are needed)"
    tasks, kind = tasks_of(next(iter(runs[better].values()))), progress or measure.removeprefix("mean_")
    columns = [f"{task}/{progress}" for task in tasks] if progress else [measure]
    ends = [[np.mean([late(table, key) for key in columns]) for table in runs[name].values()]
            for name in (better, worse)]
    wholes = [[np.mean([table[key].mean() for key in columns]) for table in runs[name].values()]
              for name in (better, worse)]
    ahead = ""
    if len(tasks) > 1 and kind in ("return", "success", progress):
        means = [[np.mean([late(table, f"{task}/{kind}") for table in runs[name].values()]) for task in tasks]
                 for name in (better, worse)]
        ahead = f", ahead on {sum(map(np.greater, *means))} of {len(tasks)} tasks"
    return (f"* {claim}{f', in {progress}' if progress else ''}: last quarter {compared(*ends)}{ahead}; "
            f"whole run {compared(*wholes)}")


def summary(results: Path, runs: dict[str, dict], figure: dict) -> str:
    """Markdown: the measure at the quarters of the runs and over the last one, each task's, and the verdicts."""
    measure, kind = figure["measure"], kind_of(figure)
    digits, places = 0 if measure == "mean_return" else 2, 2 if kind == "success" else 0
    first = next(iter(next(iter(runs.values())).values()))
    tasks = tasks_of(first)
    lines = [f"| {measure.replace('_', ' ')} | seeds | at 1/4 | at 1/2 | at 3/4 | end | last quarter | {kind} of tasks "
             "in it, interquartile mean | whole run |", "|---" * 9 + "|"]
    for method, seeds in runs.items():
        cells = []
        for share in (0.25, 0.5, 0.75, 1.0):
            cells.append(spread([at(t, measure, share) for t in seeds.values()], digits))
        cells.append(spread([late(t, measure) for t in seeds.values()], digits))
        scores = np.array([[late(t, f"{task}/{kind}") for task in tasks] for t in seeds.values()])
        lines.append(f"| {method} | {len(seeds)} | {' | '.join(cells)} | {interval(scores, places)} | "
                     f"{spread([t[measure].mean() for t in seeds.values()], digits)} |")
    for name in dict.fromkeys((kind, figure.get("progress", kind))):
        lines += ["", f"| {name} per task, last quarter | {' | '.join(tasks)} |", "|---" * (1 + len(tasks)) + "|"]
        for method, seeds in runs.items():
            values = [spread([late(t, f"{task}/{name}") for t in seeds.values()],
                             places if name == kind else 2) for task in tasks]
            lines.append(f"| {method} | {' | '.join(values)} |")
    for share in figure.get("at", ()):
        lines += ["", f"| {kind} per task, {'at the end' if share == 1 else f'at {share:.0%} of the run'} | "
                  f"{' | '.join(tasks)} |", "|---" * (1 + len(tasks)) + "|"]
        for method, seeds in runs.items():
            lines.append(f"| {method} | {' | '.join(at_share(seeds, task, kind, share, places) for task in tasks)} |")
    if "statistics" in figure:
        lines += ["", f"| mean over the run | {' | '.join(name.replace('_', ' ') for name in figure['statistics'])} |",
                  "|---" * (1 + len(figure["statistics"])) + "|"]
        for method, seeds in runs.items():
            cells = [spread([np.nanmean(t[name]) for t in seeds.values() if name in t.dtype.names], 2)
                     if any(name in t.dtype.names for t in seeds.values()) else "–" for name in figure["statistics"]]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += shares(results, runs)
    judged_by = dict.fromkeys((None, figure.get("progress")))
    lines += ["", *(verdict(claim, runs, measure, by) for by in judged_by for claim in figure["expected"])]
    if (results / "runs.json").exists():
        known = json.loads((results / "runs.json").read_text())
        hours, steps = ([about[key] for about in known.values()] for key in ("hours", "steps"))
        lengths = " to ".join(f"{number:,}" for number in sorted({min(steps), max(steps)}))
        lasting = (f"{hours[0]:.1f} hours" if len(hours) == 1 else
                   f"at most {math.ceil(60 * max(hours))} min each" if max(hours) < 0.2 else
                   f"{min(hours):.1f} to {max(hours):.1f} hours each")
        count = "One run" if len(hours) == 1 else f"{len(hours)} runs"
        version = next(iter(known.values()))["versions"]["torch"]
        lines += ["", f"{count} of {lengths} steps, {lasting}, one thread, torch {version}; commands: "
                      f"`benchmark/results/{results.name}/runs.json`."]
    return "\n".join(lines) + "\n"


def at_share(seeds: dict, task: str, kind: str, share: float, places: int) -> str:
    """A task's score at a share of the run: mean and standard deviation over seeds; its spread over episodes after it.

    What is after the comma is the mean over seeds of the standard deviation over episodes, where a script has that.
    """
    if not all(f"{task}/{kind}" in t.dtype.names for t in seeds.values()):
        return "–"
    cell = spread([at(t, f"{task}/{kind}", share) for t in seeds.values()], places)
    episodes = [at(t, f"{task}/std", share) for t in seeds.values() if f"{task}/std" in t.dtype.names]
    return cell + (f", {np.mean(episodes):.{places}f}" if episodes else "")


def shares(results: Path, runs: dict[str, dict]) -> list[str]:
    """Markdown of what only some scripts write: which policy acted in whose task."""
    method = next(iter(runs))
    mixtures = tables(results, method, "-mixture")
    if not mixtures:
        return []
    tasks = tasks_of(next(iter(runs[method].values())))
    lines = ["", f"{method}, mean over seeds and over the whole run: share of the row's task in which the column's "
             "policy acted.", "", f"| task | {' | '.join(tasks)} |", "|---" * (1 + len(tasks)) + "|"]
    for task, row in zip(tasks, np.mean(list(mixtures.values()), 0)):
        lines.append(f"| {task} | {' | '.join(f'{share:.3f}' for share in row)} |")
    return lines


def main(args: Args) -> None:
    figure, results = run.FIGURES[args.figure], collect(args)
    runs = runs_of(results, figure)
    if not set(runs) & set(figure["methods"]):
        sys.exit(f"no finished runs of {args.figure} in {args.runs_dir}: python benchmark/run.py {args.figure}")
    write_tidy(results, {method: runs[method] for method in runs if method in figure["methods"]})
    draw(results, runs, figure)
    draw_tasks(results, runs, figure)
    text = summary(results, runs, figure)
    (results / "summary.md").write_text(text)
    page = run.ROOT / "docs" / figure["script"].replace(".py", ".md")
    begin, end = f"<!-- {results.name} -->", f"<!-- /{results.name} -->"
    words = page.read_text()
    if begin in words:
        head, rest = words.split(begin)
        page.write_text(f"{head}{begin}\n{text}\n![curves](../benchmark/results/{results.name}/curves.png)\n"
                        f"![tasks](../benchmark/results/{results.name}/tasks.png)\n{end}"
                        + rest.split(end)[1])
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
