"""QMP, separate learners and the uniform mixture on the maze, three seeds: python benchmark/maze_figures.py RUNS_DIR

Runs qmp_sac.py two at a time with one thread each (hours); skips runs that are finished in RUNS_DIR and resumes those
that were interrupted. Writes to benchmark/results/maze/ the metrics.csv and mixture.csv of each run, the figures, and
summary.md, which docs/qmp_sac.md shows. With --draw-only it draws what RUNS_DIR, or the results, hold.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "maze"
METHODS, SEEDS, STEPS, BIN = ("qmp", "separated", "qmp-uniform"), (1, 2, 3), 1_000_000, 60_000
PICTURES = ("curves", "mixture", "paths")


def folders(runs: Path, method: str, seed: int) -> list[Path]:
    return sorted(runs.glob(f"maze__qmp_sac__{method}__s{seed}__*"))


def read(path: Path) -> np.ndarray:
    return np.genfromtxt(path, delimiter=",", names=True, deletechars="", ndmin=1)


def run(runs: Path, method: str, seed: int) -> str:
    """Start, resume or skip one run; returns what was done."""
    made = folders(runs, method, seed)
    if made and (made[-1] / "metrics.csv").exists() and read(made[-1] / "metrics.csv")["global_step"][-1] >= STEPS:
        return f"{method}, seed {seed}: finished before"
    arguments = (["--resume", made[-1]] if made and (made[-1] / "checkpoint.pt").exists() else
                 ["--method", method, "--seed", str(seed), "--total-timesteps", str(STEPS), "--runs-dir", runs]
                 + ["--eval-mixture"] * (method == "qmp"))
    done = subprocess.run([sys.executable, ROOT / "qmp_sac.py", *arguments], stdout=subprocess.DEVNULL,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return f"{method}, seed {seed}: {'done' if done.returncode == 0 else f'failed with status {done.returncode}'}"


def training_success(folder: Path) -> np.ndarray:
    """Share of training episodes that reached the goal, in bins of 60,000 steps: rows of step, task 0, ..., task 9."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    rows = np.full((-(-STEPS // BIN), 11), np.nan)
    rows[:, 0] = BIN * np.arange(1, len(rows) + 1)
    for task in range(10):
        found = np.array([(event.step, event.value) for event in events.Scalars(f"tasks/task{task}/success")])
        for row in rows:
            inside = (found[:, 0] > row[0] - BIN) & (found[:, 0] <= row[0])
            row[1 + task] = found[inside, 1].mean() if inside.any() else np.nan
    return rows


def collect(runs: Path) -> None:
    """Copy numbers of every finished run, and the pictures of seed 1."""
    for method in METHODS:
        for seed in SEEDS:
            for folder in folders(runs, method, seed)[-1:]:
                if (folder / "mixture.csv").exists():
                    shutil.copy(folder / "metrics.csv", RESULTS / f"{method}-s{seed}.csv")
                    shutil.copy(folder / "mixture.csv", RESULTS / f"{method}-s{seed}-mixture.csv")
                    np.savetxt(RESULTS / f"{method}-s{seed}-training.csv", training_success(folder), "%.4g", ",",
                               header="global_step," + ",".join(f"task{task}" for task in range(10)), comments="")
                    for picture in PICTURES * (seed == 1):
                        shutil.copy(folder / f"{picture}.png", RESULTS / f"{method}-s{seed}-{picture}.png")


def tables(method: str, suffix: str = "") -> list[np.ndarray]:
    paths = [RESULTS / f"{method}-s{seed}{suffix}.csv" for seed in SEEDS]
    return [read(path) for path in paths if path.exists()]


def draw() -> None:
    """Success in evaluation and in training, mean and standard deviation over seeds; own share of QMP's steps."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for method in METHODS:
        training = [[np.nanmean([row[f"task{i}"] for i in range(10)]) for row in table]
                    for table in tables(method, "-training")]
        for axis, values, steps, label in (
                (left, [table["mean_success"] for table in tables(method)], tables(method)[0]["global_step"],
                 "success in evaluation (own policies, greedy)"),
                (middle, training, tables(method, "-training")[0]["global_step"],
                 "success in training (behaviour policies)")):
            mean, spread = np.mean(values, 0), np.std(values, 0)
            axis.plot(steps, mean, label=f"{method} ({len(values)} seeds)")
            axis.fill_between(steps, mean - spread, mean + spread, alpha=0.2)
            axis.set(xlabel="environment steps, summed over tasks", ylabel=label, ylim=(-0.02, 0.5))
    left.legend(frameon=False)
    shares = np.array([[table[f"task{i}/own_share"] for i in range(10)] for table in tables("qmp")]).mean(0)
    for i, share in enumerate(shares):
        right.plot(tables("qmp")[0]["global_step"], share, label=f"task {i}", linewidth=1)
    right.axhline(0.1, color="black", linestyle=":", linewidth=1)
    right.set(xlabel="environment steps, summed over tasks", ylabel="QMP: share of steps by the own policy")
    right.legend(frameon=False, fontsize=7, ncols=2)
    figure.savefig(RESULTS / "curves.png", dpi=120)


def summary() -> str:
    """Markdown: success at a few points, the best and the mean over the last quarter; solved tasks; borrowing."""
    points = [240_000, 480_000, 720_000, 960_000]
    lines = ["| method | " + " | ".join(f"{point // 1000}k" for point in points)
             + " | last quarter, per seed | last quarter, mean ± std | return, last quarter |", "|---" * 8 + "|"]
    for method in METHODS:
        runs = tables(method)
        at = [[table["mean_success"][table["global_step"] == point][0] for table in runs] for point in points]
        late = [table["global_step"] > 0.75 * STEPS for table in runs]
        success = [table["mean_success"][rows].mean() for table, rows in zip(runs, late)]
        returns = [table["mean_return"][rows].mean() for table, rows in zip(runs, late)]
        lines.append(f"| {method} | " + " | ".join(f"{np.mean(v):.2f} ± {np.std(v):.2f}" for v in at) + " | "
                     + ", ".join(f"{v:.2f}" for v in success) + f" | {np.mean(success):.2f} ± {np.std(success):.2f} | "
                     f"{np.mean(returns):.0f} ± {np.std(returns):.0f} |")
    lines += ["", "| success per task, last quarter, mean over seeds | " + " | ".join(map(str, range(10))) + " |",
              "|---" * 11 + "|"]
    for method in METHODS:
        values = np.mean([[table[f"task{i}/success"][table["global_step"] > 0.75 * STEPS].mean() for i in range(10)]
                          for table in tables(method)], axis=0)
        lines.append(f"| {method} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    lines += ["", "| goals reached in training, per seed | tasks reached at least once | mean success, second half |",
              "|---" * 3 + "|"]
    for method in METHODS:
        training = [np.array([list(row)[1:] for row in table]) for table in tables(method, "-training")]
        reached = [int((np.nan_to_num(table) > 0).any(0).sum()) for table in training]
        late = [np.nanmean(table[len(table) // 2:]) for table in training]
        lines.append(f"| {method} | {', '.join(map(str, reached))} of 10 | {', '.join(f'{x:.2f}' for x in late)} |")
    shares = np.mean([np.loadtxt(RESULTS / f"qmp-s{seed}-mixture.csv", delimiter=",") for seed in SEEDS
                      if (RESULTS / f"qmp-s{seed}-mixture.csv").exists()], axis=0)
    off = shares - np.diag(np.full(10, np.nan))
    order = [divmod(int(flat), 10) for flat in np.argsort(np.where(np.isnan(off), -1, off), axis=None)[::-1][:8]]
    lines += ["", "QMP, mean over seeds of the whole run. Own share: " + ", ".join(
        f"task {i} {shares[i, i]:.2f}" for i in range(10)) + ".", "Largest loans (task ← policy): " + ", ".join(
        f"{i} ← {j} {shares[i, j]:.3f}" for i, j in order) + "."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    runs_dir = next((Path(argument) for argument in sys.argv[1:] if argument[0] != "-"), Path("runs"))
    RESULTS.mkdir(parents=True, exist_ok=True)
    if "--draw-only" not in sys.argv:
        with ThreadPoolExecutor(2) as pool:
            for report in pool.map(lambda job: run(runs_dir, *job), [(m, s) for s in SEEDS for m in METHODS]):
                print(report, flush=True)
    collect(runs_dir)
    draw()
    (RESULTS / "summary.md").write_text(summary())
    print(summary())
