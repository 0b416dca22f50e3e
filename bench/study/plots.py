"""The study's curves as pictures: results/study.json -> results/study_*.png.

python bench/study/plots.py [RESULTS_FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

RESULTS = Path(__file__).parents[1] / "results"
# Okabe and Ito's colours, told apart by every kind of eye; the markers say the same once more.
STYLES = {
    "LEDITS, workflow 1": ("#0072B2", "o"),
    "LEDITS, workflow 2": ("#56B4E9", "s"),
    "DDPM inversion": ("#D55E00", "^"),
    "DDPM inversion + P2P": ("#009E73", "D"),
}
COLUMNS = 3


def axes_of(count: int, columns: int = COLUMNS) -> tuple[Any, list[Axes]]:
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.1 * rows), squeeze=False)
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.remove()
    return figure, flat[:count]


def mean_points(curves: dict[str, Any]) -> list[dict[str, Any]]:
    """Point by point the mean over the edits, which were all measured at the same settings in the same order."""
    together = zip(*(found["points"] for found in curves.values()), strict=True)
    return [
        {**points[0], **{name: fmean(point[name] for point in points) for name in ("outside_db", "success", "gain_db")}}
        for points in together
    ]


def plot_tradeoff(curves: dict[str, Any], compliance: str, label: str, out: Path) -> None:
    """Figure 5: fidelity outside the region against compliance; a line joins one method's scales at one skip."""
    panels = {"mean over the edits": mean_points(curves)} | {edit: found["points"] for edit, found in curves.items()}
    figure, axes = axes_of(len(panels))
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for method, (color, marker) in STYLES.items():
            for skip in dict.fromkeys(p["skip"] for p in points if p["method"] == method):
                own = [p for p in points if p["method"] == method and p["skip"] == skip]
                x, y = [p["outside_db"] for p in own], [p[compliance] for p in own]
                axis.plot(x, y, marker=marker, color=color, linewidth=1.2, markersize=4, alpha=0.85)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("PSNR outside the region, dB", fontsize=8)
        axis.set_ylabel(label, fontsize=8)
        axis.grid(alpha=0.3)
        if compliance == "success":
            axis.set_ylim(-0.05, 1.05)
    handles = [Line2D([], [], color=color, marker=marker, label=name) for name, (color, marker) in STYLES.items()]
    figure.legend(handles=handles, loc="upper center", ncol=len(STYLES), frameon=False)
    save(figure, out)


def plot_monotony(swept: dict[str, Any], out: Path) -> None:
    """The oracle's mean probability over the scale, adding and removing."""
    figure, axes = axes_of(2, 2)
    shades = plt.get_cmap("cividis")
    for axis, title, names in zip(
        axes,
        ("adding", "removing (reverse=True)"),
        ([n for n in swept if not n.startswith("- ")], [n for n in swept if n.startswith("- ")]),
        strict=True,
    ):
        for index, name in enumerate(names):
            color = shades(index / max(1, len(names) - 1) * 0.9)
            found = swept[name]
            axis.plot(found["strengths"], found["probability"], marker="osD^v<>P"[index % 8], color=color, label=name)
        axis.set_title(title)
        axis.set_xlabel("scale, as a share of the setting's")
        axis.set_ylabel("oracle's probability of what was asked")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save(figure, out, top=0.99)


def plot_dials(sweeps: dict[str, Any], out: Path) -> None:
    """Fidelity and success under each dial."""
    dials = list(dict.fromkeys(name.split(" by ")[1] for name in sweeps))
    figure, axes = axes_of(len(dials))
    for axis, dial in zip(axes, dials, strict=True):
        names = [name for name in sweeps if name.endswith(f" by {dial}")]
        for name, color, marker in zip(names, ("#0072B2", "#D55E00"), "o^", strict=True):
            rows = sweeps[name]["rows"]
            values, fidelity = [row["value"] for row in rows], [row["outside_db"] for row in rows]
            axis.plot(values, fidelity, marker=marker, color=color, label=name.split(" by ")[0])
        axis.set_xlabel(f"{dial}{'' if dial == 'threshold' else ' (share)'}")
        axis.set_ylabel("PSNR outside the region, dB")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save(figure, out, top=0.99)


def save(figure: Any, out: Path, top: float = 0.96) -> None:
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(out, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    study = json.loads((folder / "study.json").read_text())
    curves = study["curves"]
    plot_tradeoff(curves, "success", "success", folder / "study_figure5_success.png")
    plot_tradeoff(curves, "gain_db", "gain towards the ideal, dB", folder / "study_figure5_gain.png")
    swept = {**{name: found["monotone"] for name, found in curves.items()}, **study["reverse"]}
    plot_monotony(swept, folder / "study_monotone.png")
    plot_dials(study["sweeps"], folder / "study_dials.png")


if __name__ == "__main__":
    main()
