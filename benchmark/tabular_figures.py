"""The paper's tabular figures (2, 3, 7 left, 8 left, 12) in one command: python benchmark/tabular_figures.py

Runs tabular_em.py for every curve, two processes at a time with one thread each; writes to
benchmark/results/em-tabular/ the metrics.csv of each run, the figures, and summary.md, the tables that
docs/tabular_em.md shows. Takes minutes.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results" / "em-tabular"
sys.path.insert(0, str(ROOT))
from tabular_em import chain_tasks, grid_tasks, optimal_returns  # noqa: E402

RUNS = {f"{env}-{method}": f"--env {env} --method {method}"
        for env in ("grid", "chain") for method in ("em", "ppt", "sp", "random-clusters")}
RUNS["grid-ppt"] += " --total-timesteps 1000000"          # it needs longer ...
RUNS["chain-ppt"] += " --total-timesteps 400000"          # ... in some trials
RUNS["grid-em-masked"] = "--env grid --mask-terminals"
RUNS["chain-em-paper-reward"] = "--env chain --chain-reward paper"
RUNS |= {f"grid-{method}-n{n}": f"--env grid --method {method} --num-policies {n} --trials 20"
         for method in ("em", "random-clusters") for n in (2, 3, 4, 5, 6)}
NAMES = {"em": "EM", "ppt": "policy per task", "sp": "single policy", "random-clusters": "random clusters"}


def run(name: str) -> str:
    """Run one curve in a folder of its own and keep its metrics, and EM's pictures."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "tabular_em.py", *RUNS[name].split(), "--runs-dir", folder], check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        made, = Path(folder).iterdir()
        shutil.copy(made / "metrics.csv", RESULTS / f"{name}.csv")
        if name in ("grid-em", "chain-em"):
            for picture in ("assignment", "policies", "returns"):
                shutil.copy(made / f"{picture}.png", RESULTS / f"{name}-{picture}.png")
    return f"{name}: {time.perf_counter() - start:.0f} s"


def load(name: str) -> np.ndarray:
    return np.genfromtxt(RESULTS / f"{name}.csv", delimiter=",", names=True, deletechars="")


def last_tenth(table: np.ndarray, column: str) -> float:
    """Mean of a column over the last 10 % of the run."""
    return table[column][table["global_step"] > 0.9 * table["global_step"][-1]].mean()


def draw_methods(env: str, optimum: float, file: str) -> None:
    """Figures 2 (chain) and 3 (grid), with the random clusters of Figure 8 left: return over summed training steps."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    for method, label in NAMES.items():
        table = load(f"{env}-{method}")
        axis.plot(table["global_step"], table["mean_return"], label=label)
        axis.fill_between(table["global_step"], table["mean_return"] - table["ci95"],
                          table["mean_return"] + table["ci95"], alpha=0.2)
    axis.axhline(optimum, color="black", linestyle="--", linewidth=1, label="optimal shortest paths")
    axis.set(xlabel="training steps, summed over policies", ylabel="return of the assigned policy", xlim=(0, 200_000),
             title=f"{env}: mean over tasks, 95 % confidence over 10 trials")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(RESULTS / file, dpi=120)


def draw_sweep() -> None:
    """Figures 7 left and 12: EM and random clusters over the number of policies."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for n in (2, 3, 4, 5, 6):
        table = load(f"grid-em-n{n}")
        left.plot(table["global_step"], table["max_return"], label=f"n = {n}")
    left.set(xlabel="training steps, summed over policies", ylabel="EM, maximum over policies")
    left.legend(frameon=False)
    for offset, (method, column) in enumerate((m, c) for m in ("em", "random-clusters")
                                              for c in ("mean_return", "max_return")):
        right.bar(np.arange(2, 7) + 0.2 * offset - 0.3, [last_tenth(load(f"grid-{method}-n{n}"), column)
                                                          for n in (2, 3, 4, 5, 6)], 0.2,
                  label=f"{NAMES[method]}, {'assigned' if column == 'mean_return' else 'maximum'}")
    right.set(xlabel="number of policies", ylabel="return, last 10 % of 200,000 steps")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "fig7-12-number-of-policies.png", dpi=120)


def summary() -> str:
    """Markdown tables of everything, from the CSV files alone."""
    lines = []
    for env in ("grid", "chain"):
        steps = [10_000, 20_000, 50_000, 100_000, 198_000]
        lines += [f"| {env}, assigned policy | " + " | ".join(f"{step // 1000}k" for step in steps)
                  + " | last 10 % | max over policies | separated |", "|---" * (len(steps) + 4) + "|"]
        for name in [n for n in RUNS if n.startswith(env) and not n[-2:-1] == "n"]:
            table, cells = load(name), []
            for step in steps:
                row = table[max(0, np.searchsorted(table["global_step"], step, "right") - 1)]
                cells.append(f"{row['mean_return']:.2f} ± {row['ci95']:.2f}")
            trials = sum(column.startswith("trial") for column in table.dtype.names)
            lines.append(f"| `{RUNS[name]}` | " + " | ".join(cells) + f" | {last_tenth(table, 'mean_return'):.2f} | "
                         f"{last_tenth(table, 'max_return'):.2f} | {table['separated'][-1] * trials:.0f} of {trials} |")
        lines.append("")
    lines += ["| n | EM, max | random, assigned | random, max | gap max − max | gap assigned |", "|---" * 6 + "|"]
    for n in (2, 3, 4, 5, 6):
        em, random = load(f"grid-em-n{n}"), load(f"grid-random-clusters-n{n}")
        values = [last_tenth(table, column) for table in (em, random) for column in ("mean_return", "max_return")]
        lines.append(f"| {n} | {values[1]:.2f} | {values[2]:.2f} | {values[3]:.2f} | {values[1] - values[3]:.2f} | "
                     f"{values[0] - values[2]:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    RESULTS.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    if "--draw-only" not in sys.argv:
        with ThreadPoolExecutor(2) as pool:
            for report in pool.map(run, RUNS):
                print(report, flush=True)
    draw_methods("chain", optimal_returns(chain_tasks()).mean(), "fig2-chain.png")
    draw_methods("grid", optimal_returns(grid_tasks()).mean(), "fig3-grid.png")
    draw_sweep()
    (RESULTS / "summary.md").write_text(summary())
    print(summary() + f"all in {time.perf_counter() - begin:.0f} s; wrote {RESULTS}")
