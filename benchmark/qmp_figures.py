"""The runs that docs/qmp_sac.md reports: python benchmark/qmp_figures.py {maze,reacher,metaworld} RUNS_DIR

Runs the methods and seeds of one task family two at a time with one thread each (hours); skips runs that are finished
in RUNS_DIR and resumes those that were interrupted. Writes to benchmark/results/ENV/ the metrics.csv and mixture.csv of
each run, the figures, and summary.md. With --draw-only it draws what RUNS_DIR, or the results, hold.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
PLANS = {  # methods, seeds, environment steps, steps between evaluations, what is counted beside success, own flags
    "maze": (("qmp", "separated", "qmp-uniform"), (1, 2, 3), 1_000_000, 60_000, "success", {"qmp": ["--eval-mixture"]}),
    "reacher": (("qmp", "separated", "qmp-uniform", "qmp-domain", "dnc-reg"), (1, 2, 3), 500_000, 25_000, "stages", {}),
    "metaworld": (("qmp", "separated"), (1,), 1_000_000, 60_000, "success", {}),
}
PICTURES = ("curves", "mixture", "paths", "stages")


class Family:
    """The runs of one task family: made, collected, drawn."""

    def __init__(self, env: str):
        self.env, self.results = env, ROOT / "benchmark" / "results" / env
        self.methods, self.seeds, self.steps, self.every, self.progress, self.flags = PLANS[env]
        self.results.mkdir(parents=True, exist_ok=True)

    def folders(self, runs: Path, method: str, seed: int) -> list[Path]:
        return sorted(runs.glob(f"{self.env}__qmp_sac__{method}__s{seed}__*"))

    def run(self, runs: Path, method: str, seed: int) -> str:
        """Start, resume or skip one run; returns what was done."""
        made = self.folders(runs, method, seed)
        if made and (made[-1] / "mixture.csv").exists():
            return f"{method}, seed {seed}: finished before"
        arguments = (["--resume", made[-1]] if made and (made[-1] / "checkpoint.pt").exists() else
                     ["--env", self.env, "--method", method, "--seed", str(seed), "--total-timesteps", str(self.steps),
                      "--eval-every", str(self.every), "--runs-dir", runs, *self.flags.get(method, [])])
        done = subprocess.run([sys.executable, ROOT / "qmp_sac.py", *arguments], stdout=subprocess.DEVNULL,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        return f"{method}, seed {seed}: {'done' if done.returncode == 0 else f'failed with status {done.returncode}'}"

    def training(self, folder: Path) -> tuple[np.ndarray, list[str]]:
        """What training episodes achieved, in bins of `every` steps: rows of step, then one column per task."""
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        tasks = [key.split("/")[1] for key in events.Tags()["scalars"] if key.startswith("tasks/") and "return" in key]
        tasks = [key.split("/")[0] for key in read(folder / "metrics.csv").dtype.names if key.split("/")[0] in tasks
                 and key.endswith("/return")]
        rows = np.full((-(-self.steps // self.every), 1 + len(tasks)), np.nan)
        rows[:, 0] = self.every * np.arange(1, len(rows) + 1)
        for column, task in enumerate(tasks, 1):
            found = np.array([(event.step, event.value) for event in events.Scalars(f"tasks/{task}/{self.progress}")])
            for row in rows:
                inside = (found[:, 0] > row[0] - self.every) & (found[:, 0] <= row[0])
                row[column] = found[inside, 1].mean() if inside.any() else np.nan
        return rows, tasks

    def collect(self, runs: Path) -> None:
        """Copy numbers of every finished run, and the pictures of seed 1."""
        for method in self.methods:
            for seed in self.seeds:
                for folder in self.folders(runs, method, seed)[-1:]:
                    if (folder / "mixture.csv").exists():
                        name = self.results / f"{method}-s{seed}"
                        shutil.copy(folder / "metrics.csv", f"{name}.csv")
                        shutil.copy(folder / "mixture.csv", f"{name}-mixture.csv")
                        rows, tasks = self.training(folder)
                        np.savetxt(f"{name}-training.csv", rows, "%.4g", ",", comments="",
                                   header=",".join(["global_step", *tasks]))
                        for picture in PICTURES * (seed == 1):
                            if (folder / f"{picture}.png").exists():
                                shutil.copy(folder / f"{picture}.png", f"{name}-{picture}.png")

    def tables(self, method: str, suffix: str = "") -> list[np.ndarray]:
        paths = [self.results / f"{method}-s{seed}{suffix}.csv" for seed in self.seeds]
        return [read(path) for path in paths if path.exists()]

    def mixtures(self, method: str) -> np.ndarray:
        """Mean over seeds of the share of task i's steps that policy j took, (T, T)."""
        paths = [self.results / f"{method}-s{seed}-mixture.csv" for seed in self.seeds]
        return np.mean([np.loadtxt(path, delimiter=",") for path in paths if path.exists()], axis=0)

    def draw(self) -> None:
        """Evaluation, training and own share over steps: mean and standard deviation over seeds."""
        methods = [method for method in self.methods if self.tables(method)]
        tasks = [key for key in self.tables(methods[0], "-training")[0].dtype.names if key != "global_step"]
        panels = [("success in evaluation (own policies, greedy)", "", lambda table: table["mean_success"])]
        if self.progress == "stages":
            panels.append(("stages of 3 in evaluation", "", lambda t: np.mean([t[f"{x}/stages"] for x in tasks], 0)))
        panels.append((f"{self.progress} in training (behaviour policies)", "-training",
                       lambda table: np.nanmean([table[task] for task in tasks], 0)))
        figure = Figure(figsize=(4.6 * (len(panels) + 1), 4), layout="constrained")
        *axes, right = figure.subplots(1, len(panels) + 1)
        for axis, (label, suffix, get) in zip(axes, panels):
            for method in methods:
                runs = self.tables(method, suffix)
                values = [get(table) for table in runs]
                mean, spread = np.mean(values, 0), np.std(values, 0)
                axis.plot(runs[0]["global_step"], mean, label=f"{method} ({len(values)} seeds)")
                axis.fill_between(runs[0]["global_step"], mean - spread, mean + spread, alpha=0.2)
            axis.set(xlabel="environment steps, summed over tasks", ylabel=label)
            axis.set_ylim(bottom=-0.02)
        axes[0].legend(frameon=False)
        for task in tasks:
            share = np.mean([table[f"{task}/own_share"] for table in self.tables("qmp")], 0)
            right.plot(self.tables("qmp")[0]["global_step"], share, label=task, linewidth=1)
        right.axhline(1 / len(tasks), color="black", linestyle=":", linewidth=1)
        right.set(xlabel="environment steps, summed over tasks", ylabel="QMP: share of steps by the own policy")
        right.legend(frameon=False, fontsize=7, ncols=2)
        figure.savefig(self.results / "curves.png", dpi=120)
        sys.path.insert(0, str(ROOT))
        from qmp_sac import plot_mixture
        plot_mixture(self.results / "mixture.png", torch.from_numpy(self.mixtures("qmp")), tasks)     # mean over seeds

    def summary(self) -> str:
        """Markdown: success at a few points and over the last quarter, per task; what training reached; borrowing."""
        methods = [method for method in self.methods if self.tables(method)]
        tasks = [key for key in self.tables(methods[0], "-training")[0].dtype.names if key != "global_step"]
        points = [round(quarter * self.steps / 4 / self.every) * self.every for quarter in (1, 2, 3)]
        points.append(self.steps // self.every * self.every)
        lines = ["| method | " + " | ".join(f"{point // 1000}k" for point in points)
                 + " | last quarter, per seed | last quarter, mean ± std | return, last quarter |", "|---" * 8 + "|"]
        for method in methods:
            runs = self.tables(method)
            at = [[table["mean_success"][table["global_step"] == point][0] for table in runs] for point in points]
            success, returns = ([late(table, f"mean_{kind}", self.steps) for table in runs]
                                for kind in ("success", "return"))
            lines.append(f"| {method} | " + " | ".join(f"{np.mean(v):.2f} ± {np.std(v):.2f}" for v in at) + " | "
                         + ", ".join(f"{v:.2f}" for v in success) + f" | {np.mean(success):.2f} ± {np.std(success):.2f}"
                         f" | {np.mean(returns):.0f} ± {np.std(returns):.0f} |")
        for kind in dict.fromkeys(("success", self.progress)):
            lines += ["", f"| {kind} per task, last quarter, mean over seeds | " + " | ".join(tasks) + " |",
                      "|---" * (1 + len(tasks)) + "|"]
            for method in methods:
                values = [np.mean([late(table, f"{task}/{kind}", self.steps) for table in self.tables(method)])
                          for task in tasks]
                lines.append(f"| {method} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
        lines += ["", f"| {self.progress} in training, per seed | tasks with any | mean, second half |",
                  "|---" * 3 + "|"]
        for method in methods:
            training = [np.array([list(row)[1:] for row in table]) for table in self.tables(method, "-training")]
            reached = [int((np.nan_to_num(table) > 0).any(0).sum()) for table in training]
            means = [np.nanmean(table[len(table) // 2:]) for table in training]
            lines.append(f"| {method} | {', '.join(map(str, reached))} of {len(tasks)} | "
                         f"{', '.join(f'{mean:.2f}' for mean in means)} |")
        shares = self.mixtures("qmp")
        lines += ["", "QMP, mean over seeds of the whole run: share of the row's task in which the column's policy "
                  "acted.", "", "| task | " + " | ".join(tasks) + " |", "|---" * (1 + len(tasks)) + "|"]
        for task, row in zip(tasks, shares):
            lines.append(f"| {task} | " + " | ".join(f"{share:.3f}" for share in row) + " |")
        return "\n".join(lines) + "\n"


def read(path: Path) -> np.ndarray:
    return np.genfromtxt(path, delimiter=",", names=True, deletechars="", ndmin=1)


def late(table: np.ndarray, key: str, steps: int) -> float:
    """Mean of a column over the last quarter of a run."""
    return table[key][table["global_step"] > 0.75 * steps].mean()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in PLANS:
        sys.exit(__doc__)
    family = Family(sys.argv[1])
    runs_dir = next((Path(argument) for argument in sys.argv[2:] if argument[0] != "-"), Path("runs"))
    if "--draw-only" not in sys.argv:
        with ThreadPoolExecutor(2) as pool:
            jobs = [(method, seed) for seed in family.seeds for method in family.methods]
            for report in pool.map(lambda job: family.run(runs_dir, *job), jobs):
                print(report, flush=True)
    family.collect(runs_dir)
    family.draw()
    (family.results / "summary.md").write_text(family.summary())
    print(family.summary())
