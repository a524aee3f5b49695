"""Draw a figure from its runs and say what agrees with the paper: python benchmark/report.py FIGURE [--runs-dir DIR]

Reads the runs that benchmark/run.py has made (finished ones), copies their metrics.csv to benchmark/results/FIGURE/,
draws curves.png there, and writes a table and the verdicts to the script's page in docs/, between the markers
<!-- FIGURE --> and <!-- /FIGURE -->. Without runs it draws what benchmark/results/ holds.
"""
from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
import run  # noqa: E402


@dataclass
class Args:
    figure: tyro.conf.Positional[str]
    """entry of benchmark/figures.toml"""
    runs_dir: Path = Path("runs")
    """where benchmark/run.py has put the runs"""

    def __post_init__(self):
        if self.figure not in run.FIGURES:
            raise ValueError(f"no figure {self.figure}; there are {', '.join(run.FIGURES)}")


def collect(args: Args) -> Path:
    """Copy what finished runs have measured, with the picture of the method of each method's first seed."""
    results = run.ROOT / "benchmark" / "results" / args.figure
    results.mkdir(parents=True, exist_ok=True)
    for job in run.jobs_of(run.Args(args.figure, runs_dir=args.runs_dir)):
        if job.finished:
            folder = sorted(job.folder.glob("*/metrics.csv"))[-1].parent
            shutil.copy(folder / "metrics.csv", results / f"{job.folder.name}.csv")
            for picture in folder.glob("*.png") if job.folder.name.endswith("-s1") else ():
                shutil.copy(picture, results / f"{job.folder.name}-{picture.name}")
    return results


def tables(results: Path, method: str) -> list[np.ndarray]:
    """metrics.csv of every seed."""
    paths = sorted(path for path in results.glob(f"{method}-s*.csv") if re.fullmatch(rf"{method}-s\d+", path.stem))
    return [np.genfromtxt(path, delimiter=",", names=True, deletechars="", ndmin=1) for path in paths]


def late(table: np.ndarray, key: str) -> float:
    """Mean of a column over the last quarter of a run."""
    return table[key][table["global_step"] > 0.75 * table["global_step"][-1]].mean()


def spread(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values):.{digits}f}" if len(values) > 1 else "")


def draw(results: Path, runs: dict[str, list[np.ndarray]], figure: dict) -> None:
    """The measure over training, mean and standard deviation over seeds."""
    picture = Figure(figsize=(7, 4.5), layout="constrained")
    axis = picture.subplots()
    for method, seeds in runs.items():
        rows = min(map(len, seeds))
        values, steps = np.array([table[figure["measure"]][:rows] for table in seeds]), seeds[0]["global_step"][:rows]
        axis.plot(steps, values.mean(0), label=f"{method} ({len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'})")
        axis.fill_between(steps, values.mean(0) - values.std(0), values.mean(0) + values.std(0), alpha=0.2)
    axis.set(xlabel="environment steps", ylabel=figure["measure"].replace("_", " "), title=figure["title"])
    axis.legend(frameon=False)
    picture.savefig(results / "curves.png", dpi=120)


def verdict(claim: str, runs: dict[str, list[np.ndarray]], measure: str) -> str:
    """Whether the last quarter of the runs agrees with an ordering such as "em > sp"."""
    better, worse = claim.split(" > ")
    if min(len(runs.get(name, ())) for name in (better, worse)) < 3:
        return f"* {claim}: not enough runs (three seeds of both are needed)"
    high, low = ([late(table, measure) for table in runs[name]] for name in (better, worse))
    gap, noise = np.mean(high) - np.mean(low), np.hypot(np.std(high), np.std(low))
    word = "within the spread of seeds" if abs(gap) < noise else "agrees" if gap > 0 else "does not agree"
    return f"* {claim}: {word} (difference {gap:.3g}, spread {noise:.3g})"


def summary(runs: dict[str, list[np.ndarray]], figure: dict) -> str:
    """Markdown: the measure at the quarters of the runs, its mean over the last quarter, each task's, the verdicts."""
    measure = figure["measure"]
    kind, digits = "success" if measure == "mean_success" else "return", 0 if measure == "mean_return" else 2
    columns = next(iter(runs.values()))[0].dtype.names
    tasks = [key.removesuffix(f"/{kind}") for key in columns if key.endswith(f"/{kind}")]
    lines = [f"| {measure.replace('_', ' ')} | seeds | at 1/4 | at 1/2 | at 3/4 | end | last quarter |",
             "|---" * 7 + "|"]
    for method, seeds in runs.items():
        cells = []
        for share in (0.25, 0.5, 0.75, 1.0):
            rows = [np.abs(table["global_step"] - share * table["global_step"][-1]).argmin() for table in seeds]
            cells.append(spread([table[measure][row] for table, row in zip(seeds, rows)], digits))
        cells.append(spread([late(table, measure) for table in seeds], digits))
        lines.append(f"| {method} | {len(seeds)} | {' | '.join(cells)} |")
    lines += ["", f"| {kind} per task, last quarter | {' | '.join(tasks)} |", "|---" * (1 + len(tasks)) + "|"]
    for method, seeds in runs.items():
        places = 2 if kind == "success" else 0
        values = [spread([late(table, f"{task}/{kind}") for table in seeds], places) for task in tasks]
        lines.append(f"| {method} | {' | '.join(values)} |")
    return "\n".join([*lines, "", *(verdict(claim, runs, measure) for claim in figure["expected"])]) + "\n"


def main(args: Args) -> None:
    figure, results = run.FIGURES[args.figure], collect(args)
    runs = {method: found for method in figure["methods"] if (found := tables(results, method))}
    if not runs:
        sys.exit(f"no finished runs of {args.figure} in {args.runs_dir}: python benchmark/run.py {args.figure}")
    draw(results, runs, figure)
    text = summary(runs, figure)
    (results / "summary.md").write_text(text)
    page = run.ROOT / "docs" / figure["script"].replace(".py", ".md")
    begin, end = f"<!-- {args.figure} -->", f"<!-- /{args.figure} -->"
    words = page.read_text()
    if begin in words:
        head, rest = words.split(begin)
        page.write_text(f"{head}{begin}\n{text}\n![curves](../benchmark/results/{args.figure}/curves.png)\n{end}"
                        + rest.split(end)[1])
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
