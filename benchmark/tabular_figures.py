"""Figures 2, 3, 7 left, 8 left and 12 of the EM paper: python benchmark/tabular_figures.py [--draw-only]

Calls tabular_em.train for every curve, two processes at a time, and writes the metrics.csv of each, the figures and
summary.md to benchmark/results/em-tabular/. Takes minutes.
"""
from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

RESULTS = Path(__file__).parent / "results" / "em-tabular"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
NUMBERS, STEPS = (2, 3, 4, 5, 6), "training steps, summed over policies"         # NUMBERS: of policies
METHODS = {"em": "EM", "ppt": "policy per task", "sp": "single policy", "random-clusters": "random clusters"}
RUNS = {f"{env}-{method}": dict(env=env, method=method) for env in ("grid", "chain") for method in METHODS}
RUNS["grid-ppt"]["total_timesteps"] = 1_000_000                        # some trials need it
RUNS["chain-ppt"]["total_timesteps"] = 400_000
RUNS |= {"grid-em-masked": dict(mask_terminals=True), "chain-em-paper-reward": dict(env="chain-paper")}
RUNS |= {f"grid-{method}-n{n}": dict(method=method, num_policies=n, trials=20)
         for method in ("em", "random-clusters") for n in NUMBERS}


def make(name: str) -> None:
    """One curve: keep its metrics, and EM's pictures."""
    import tabular_em
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = tabular_em.train(tabular_em.Args(**RUNS[name], runs_dir=folder))
        shutil.copy(run / "metrics.csv", RESULTS / f"{name}.csv")
        for picture in ("assignment", "policies", "returns") if name in ("grid-em", "chain-em") else ():
            shutil.copy(run / f"{picture}.png", RESULTS / f"{name}-{picture}.png")


def draw(tables: dict[str, np.ndarray], ends: dict[str, dict]) -> None:
    """Figures 2 and 3, with the random clusters of Figure 8 left; Figure 7 left beside Figure 12."""
    for env, optimum, file in (("chain", 18.116, "fig2-chain.png"), ("grid", 12.600, "fig3-grid.png")):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axis = figure.subplots()
        for method, label in METHODS.items():
            steps, mean, half = (tables[f"{env}-{method}"][key] for key in ("global_step", "mean_return", "ci95"))
            axis.plot(steps, mean, label=label)
            axis.fill_between(steps, mean - half, mean + half, alpha=0.2)
        axis.axhline(optimum, color="black", linestyle="--", linewidth=1, label="shortest paths")
        axis.set(xlabel=STEPS, ylabel="return of the assigned policy", xlim=(0, 200_000),
                 title=f"{env}: mean over tasks, 95 % confidence over 10 trials")
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(RESULTS / file, dpi=120)
    figure = Figure(figsize=(16, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for n in NUMBERS:
        em, drawn = tables[f"grid-em-n{n}"], tables[f"grid-random-clusters-n{n}"]
        left.plot(em["global_step"], em["max_return"], label=f"n = {n}")
        middle.plot(em["global_step"], em["max_return"] - drawn["max_return"], label=f"n = {n}")
    for k, (method, column) in enumerate((m, c) for m in ("em", "random-clusters") for c in ("mean", "max")):
        right.bar(np.array(NUMBERS) + 0.2 * k - 0.3, [ends[f"grid-{method}-n{n}"][column] for n in NUMBERS], 0.2,
                  label=f"{METHODS[method]}, {'assigned' if column == 'mean' else 'best'} policy")
    left.set(xlabel=STEPS, ylabel="EM, best policy of each task")
    middle.set(xlabel=STEPS, ylabel="the same above random clusters")
    right.set(xlabel="number of policies", ylabel="return, last 10 % of 200,000 steps", ylim=(0, 17))
    for axis in (left, middle, right):
        axis.legend(frameon=False, fontsize=8, ncols=2)
        if axis is not right:
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.margins(y=0.3)
    figure.savefig(RESULTS / "fig7-12-number-of-policies.png", dpi=120)


if __name__ == "__main__":
    if "--draw-only" not in sys.argv:
        with ProcessPoolExecutor(2) as pool:
            list(pool.map(make, RUNS))
    tables = {name: np.genfromtxt(RESULTS / f"{name}.csv", delimiter=",", names=True, deletechars="") for name in RUNS}
    ends = {name: {key: table[f"{key}_return"][table["global_step"] > 0.9 * table["global_step"][-1]].mean()
                   for key in ("mean", "max")} for name, table in tables.items()}
    draw(tables, ends)
    lines = ["| assigned policy | 10k | 20k | 50k | 100k | 198k | last 10 % | best policies | trials with separate "
             "corners or sides |", 9 * "|---" + "|"]
    for name, table in tables.items():
        rows = [table[table["global_step"] <= step][-1] for step in (10_000, 20_000, 50_000, 100_000, 198_000)]
        cells = [f"{row['mean_return']:.2f} ± {row['ci95']:.2f}" for row in rows]
        cells += [f"{ends[name]['mean']:.2f} | {ends[name]['max']:.2f} | {table['separated'][-1]:.0%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (RESULTS / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
