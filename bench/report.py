"""Write RESULTS.md from everything in bench/results: generated text, no number by hand.

python -m bench.report [RESULTS_FOLDER] [OUT.md]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.report_cells import Json, decibel, percent, ratio, spread, table
from bench.report_options import options_text
from bench.report_speed import alone_text, benchmark_text, growth_text, peers_text

BENCH = Path(__file__).resolve().parent
TINY = BENCH.parent / "weights" / "tiny"
LEVEL_DB = 0.5  # a smaller difference between methods is called level

READING = """\
{portraits} portraits for every edit, {compared} for every edit and setting of a comparison, none of them trained or
tuned on. Pictures are what a user gets (the change laid over the original pixels), so the unedited reconstruction is
the original. *Success*: a small classifier sees every asked attribute as asked. *Kept*: the share of the other
attributes that it sees as they were, over the same share without an edit. *Outside*: PSNR against the original where
the ideal edit, drawn by the portraits' own renderer, changes nothing. *Nearer*, *gain*: PSNR against that ideal edit
after, less before. Brackets are 95 % intervals: Wilson's for rates, bootstrap over portraits for means."""
VAGUE = """\
A dash: the words leave open what the ideal edit shows (which hat, what hair under it, which other mouth), so nearness
to one drawing of it is not judged."""
COMPARING = """\
For every edit, workflow 1 at its own setting is the mark. From the other methods' points (skip x scale) the tables read
the best that they reach at the mark's fidelity, and the fidelity that they reach at its success. Between two points a
method may be anywhere on the line (a mixture of the two settings). The baselines and workflow 2 get a full true caption
as source and target prompt, workflow 1 two or three words. A dash: out of reach."""
ELSEWHERE = """\
The same edits on portraits of styles that nothing was trained on. The classifier has not seen them either, so its view
before the edit stands beside its view after. Open Peeps by Pablo Stanley (CC0 1.0), ToonHead by Johan Melin and
Personas by Draftbit (both CC BY 4.0), as remixed by DiceBear."""


# --- what was wanted, and whether it was reached ----------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One line of the first table: a claim, the least (or most) that was wanted, and what was measured."""

    claim: str
    wanted: float
    values: Mapping[str, float]
    show: Callable[[float], str]
    at_most: bool = False

    def row(self) -> list[str]:
        mean = fmean(self.values.values())
        worst, value = sorted(self.values.items(), key=lambda pair: -pair[1] if self.at_most else pair[1])[0]
        met = mean <= self.wanted if self.at_most else mean >= self.wanted
        detail = f" (worst of {len(self.values)}: {worst} {self.show(value)})" if len(self.values) > 1 else ""
        limit = ("<= " if self.at_most else ">= ") + self.show(self.wanted)
        return [self.claim, limit, self.show(mean) + detail, "met" if met else "**missed**"]


def targets(study: Json, files: Mapping[str, Json], megabytes: float) -> list[Target]:
    model, edits = study["model"], study["edits"]

    def over(name: str, keep: Callable[[Json], bool]) -> dict[str, float]:
        return {edit: line[name] for edit, line in edits.items() if keep(line)}

    def in_group(group: str) -> Callable[[Json], bool]:
        return lambda line: line["group"] == group

    generated = {n: value for n, value in model["generation_accuracy"].items() if n != "all" and value is not None}
    worst = min(generated, key=lambda name: generated[name])
    products = {name: pair["to_product"] for name, pair in study["pairs"].items()}
    found = [
        Target("safetensors of the embedded model", 24.0, {"": megabytes}, lambda v: f"{v:.1f} MB", at_most=True),
        Target("VAE on unseen portraits", 33.0 if model["factor"] == 4 else 30.0, {"": model["vae_psnr_db"]}, decibel),
        Target("oracle, each attribute", 0.98, model["oracle_accuracy"], percent),
        Target("attributes of generated pictures", 0.95, {"": model["generation_accuracy"]["all"]}, percent),
        Target(f"the worst of them ({worst})", 0.85, {"": generated[worst]}, percent),
        Target("success of additions", 0.95, over("success", in_group("addition")), percent),
        Target("success of removals by phrase", 0.85, over("success", in_group("removal, by phrase")), percent),
        Target("success of removals, reversed", 0.85, over("success", in_group("removal, reversed")), percent),
        Target("success of colour and background changes", 0.85, over("success", in_group("change")), percent),
        Target("other attributes kept, to the unedited", 0.95, over("kept_ratio", lambda line: True), ratio),
        Target("PSNR outside, local edits", 30.0, over("outside_db", lambda line: line["reach"] == "local"), decibel),
        Target("nearer to the ideal edit", 0.9, over("closer", lambda line: not line["vague"]), percent),
        Target("by how much", 3.0, over("gain_db", lambda line: not line["vague"]), decibel),
        Target("monotone in scale, adding", 0.9, rhos(study["curves"].items(), "monotone"), ratio),
        Target("monotone in scale, removing", 0.9, rhos(study["reverse"].items()), ratio),
        Target("two edits at once, to the product", 0.9, products, ratio),
    ]
    if sample := files.get("edit", {}).get("edit_sample"):
        seconds = {"": sample["seconds"]["median"]}
        found.append(Target("README's sample edit", 15.0, seconds, lambda v: f"{v:.1f} s", at_most=True))
    if masks := files.get("masks", {}).get("masks"):
        for run, kinds in masks.items():  # each by itself: there is no mean over models
            claim, values = f"a step with the mask 'both', to SEGA's ({run})", {"": kinds["both"]["processor_ratio"]}
            found.append(Target(claim, 1.05, values, ratio, at_most=True))
    return found


def rhos(items: Iterable[tuple[str, Json]], inside: str | None = None) -> dict[str, float]:
    means = {name: (found[inside] if inside else found)["rho"]["mean"] for name, found in items}
    return {name: value for name, value in means.items() if value is not None}


# --- the study's sections ---------------------------------------------------------------------------------------------


def conditions_text(study: Json) -> list[str]:
    about, counts = study["conditions"], study["conditions"]["counts"]
    spent = study["work"].values()
    evaluations, minutes = sum(w["unet_evaluations"] for w in spent), sum(w["seconds"] for w in spent) / 60.0
    settings = "; ".join(
        f"{reach} edits: {s['num_steps']} steps, skip {s['skip']}, concept scale {s['scale']:g}, "
        f"threshold {s['threshold']:g}, warm-up {s['warmup_steps']}"
        for reach, s in about["settings"].items()
    )
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return [
        f"`{study['command']}`: {evaluations:,} UNet evaluations, {minutes:.0f} core-minutes on {about['processor']}, "
        f"{about['threads']} thread(s) a process, networks in {about['dtype']}. {versions}.",
        "",
        READING.format(portraits=counts["portraits"], compared=counts["captions"] * counts["each"]),
        "",
        f"Settings of workflow 1: {settings}.",
        "",
    ]


def edits_text(edits: Json) -> list[str]:
    def row(name: str, e: Json) -> list[str]:
        ideal = ["-", "-"]
        if not e["vague"]:
            nearer = f"{percent(e['closer'])} {spread(e['closer_interval'], 100.0, 0)}"
            ideal = [nearer, f"{e['gain_db']:.1f} {spread(e['gain_db_interval'])}"]
        return [
            name,
            e["group"],
            f"{percent(e['success'])} {spread(e['success_interval'], 100.0, 0)}",
            f"{e['kept_ratio']:.3f} {spread(e['kept_ratio_interval'], 1.0, 2)}",
            f"{e['outside_db']:.1f} {spread(e['outside_db_interval'])}",
            *ideal,
            f"{e['ideal_inside_db_before']:.1f} / {e['ideal_inside_db_after']:.1f}",
            f"{e['ideal_inside_ssim_before']:.2f} / {e['ideal_inside_ssim_after']:.2f}",
            f"{e['outside_ssim']:.3f}",
        ]

    header = ["edit", "kind", "success", "kept", "outside, dB", "nearer", "gain, dB"]
    header += ["inside to ideal, dB, before / after", "the same, SSIM", "outside, SSIM"]
    return [
        "## Are edits faithful to the request, the subtle and the substantial? Concepts alone",
        "",
        *table(header, [row(name, line) for name, line in edits.items()]),
        VAGUE,
        "",
    ]


def claims_text(study: Json) -> list[str]:
    lines = ["## Is SEGA robust and monotone inside LEDITS?", ""]
    lines += ["**Monotone in scale.** Spearman of the oracle's log probability with the concept's scale.", ""]
    swept = {**{n: c["monotone"] for n, c in study["curves"].items()}, **study["reverse"]}
    lines += table(
        ["edit", "up to the setting's scale", "p to three digits", "up to twice the scale", "mean p over the sweep"],
        [
            [
                name,
                f"{m['rho']['mean']:.2f} {spread(m['rho']['interval'], 1.0, 2)}",
                optional(m["rho_rounded"]["mean"], "{:.2f}"),
                optional(m["rho_whole_sweep"]["mean"], "{:.2f}"),
                " ".join(f"{p:.2f}" for p in m["probability"]),
            ]
            for name, m in swept.items()
        ],
    )
    lines += ["## Is fidelity kept while the target changes, and do edits leave each other alone?", ""]
    lines += ["**Concepts keep the target prompt's edit.** Success of the target's edit.", ""]
    lines += table(
        ["target under concept", "without the concept", "with it"],
        [[name, rate(found["without"]), rate(found["with"])] for name, found in study["target"].items()],
    )
    lines += ["**Two edits do not disturb each other.** Success of each, on the same portraits.", ""]
    lines += table(
        ["edits", "alone", "beside the other", "both", "both, to the product"],
        [
            [
                name,
                "; ".join(f"{edit} {rate(r)}" for edit, r in found["alone"].items()),
                "; ".join(f"{edit} {rate(r)}" for edit, r in found["beside_the_other"].items()),
                percent(found["both"]["success"]),
                f"{found['to_product']:.3f} {spread(found['to_product_interval'], 1.0, 2)}",
            ]
            for name, found in study["pairs"].items()
        ],
    )
    lines += ["**Fidelity under each dial.** PSNR outside the region against the original (success).", ""]
    lines += table(
        ["dial", "values", "outside, dB (success)", "Spearman"],
        [
            [
                name,
                " ".join(f"{row['value']:g}" for row in found["rows"]),
                " ".join(f"{row['outside_db']:.1f} ({100.0 * row['success']:.0f} %)" for row in found["rows"]),
                optional(found["rho"]["mean"], "{:.2f}"),
            ]
            for name, found in study["sweeps"].items()
        ],
    )
    lines += ["**Cost of one edit of one picture**, inversion, encoding and decoding included.", ""]
    lines += table(
        ["method", "UNet evaluations", "seconds"],
        [[name, str(cost["evaluations"]), f"{cost['seconds']:.2f}"] for name, cost in study["cost"].items()],
    )
    lines += ["**Seeds.** RMS difference, in levels of 255, between seeds, where edits change the picture.", ""]
    header = ["edit", "seeds x portraits", "edits", "reconstructions", "worst reconstruction", "worst latent error"]
    return lines + table(
        header,
        [
            [
                name,
                f"{s['seeds']} x {s['portraits']}",
                f"{s['edits_differ_levels']:.1f}",
                f"{s['reconstructions_differ_levels']:.2f}",
                decibel(s["worst_reconstruction_db"]),
                f"{s['worst_latent_error']:.1e}",
            ]
            for name, s in study["seeds"].items()
        ],
    )


def rate(found: Json) -> str:
    return f"{percent(found['success'])} {spread(found['interval'], 100.0, 0)}"


def optional(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


# --- LEDITS beside its baselines --------------------------------------------------------------------------------------


def winners(found: Mapping[str, Mapping[str, float | None]], name: str, margin: float) -> list[str]:
    """The methods that nobody leads by more than the margin."""
    known = {method: line[name] for method, line in found.items()}
    best = max(value for value in known.values() if value is not None)
    return [method for method, value in known.items() if value is not None and best - value <= margin]


def methods_text(curves: Json) -> list[str]:
    compared = {edit: found["compared"] for edit, found in curves.items()}
    methods = list(next(iter(compared.values())))
    lines = ["## Flexible and under control, beside pure inversion and Prompt-to-Prompt?", "", COMPARING, ""]
    for name, title, form, margin in (
        ("success", "Success at equal fidelity", percent, 0.02),
        ("gain_db", "Gain towards the ideal edit at equal fidelity", decibel, LEVEL_DB),
        ("outside_db", "Fidelity outside the region at equal success", decibel, LEVEL_DB),
    ):
        best = {edit: winners(found, name, margin) for edit, found in compared.items()}
        rows = []
        for edit, found in compared.items():
            values = [found[method][name] for method in methods]
            rows.append([edit, *("-" if value is None else form(value) for value in values), " = ".join(best[edit])])
        wins = [str(sum(method in ahead for ahead in best.values())) for method in methods]
        rows.append([f"**ahead or level, of {len(best)}**", *wins, ""])
        lost = [f"{edit} (to {' and '.join(ahead)})" for edit, ahead in best.items() if methods[0] not in ahead]
        lines += [f"**{title}**", "", *table(["edit", *methods, "best"], rows)]
        lines += [f"Workflow 1 loses on {', '.join(lost)}." if lost else "Workflow 1 loses nowhere.", ""]
    return lines + own_settings_text(curves)


def own_settings_text(curves: Json) -> list[str]:
    """Every method where its authors put it: LEDITS 2307.00522, Table 1, for the baselines."""
    found: dict[str, list[Json]] = {}
    for one in curves.values():
        for point in one["points"]:
            workflow = point["method"].startswith("LEDITS")
            if (workflow and point["scale"] == one["setting_scale"]) or paper_setting(point):
                found.setdefault(point["method"], []).append(point)
    rows = [
        [
            method,
            percent(fmean(point["success"] for point in points)),
            ratio(fmean(point["kept_ratio"] for point in points)),
            decibel(fmean(point["outside_db"] for point in points)),
            decibel(fmean(point["gain_db"] for point in points)),
        ]
        for method, points in found.items()
    ]
    title = "**Each method at its own setting** (the baselines at the paper's), means over the edits"
    return [title, "", *table(["method", "success", "kept", "outside", "gain"], rows)]


def paper_setting(point: Json) -> bool:
    wanted = {"DDPM inversion": (0.36, 15.0), "DDPM inversion + P2P": (0.12, 9.0)}
    return wanted.get(point["method"]) == (point["skip"], point["scale"])


def elsewhere_text(study: Json) -> list[str]:
    lines = ["## SEGA on generated pictures", ""]
    lines += table(
        ["edit", "pictures without it before", "success", "others seen as before", "PSNR to the unedited"],
        [
            [name, str(s["count"]), rate(s), percent(s["kept"]), decibel(s["psnr_db"]["mean"])]
            for name, s in study["sega"].items()
        ],
    )
    lines += ["## Out of domain", "", ELSEWHERE, ""]
    rows = []
    for style, found in study["elsewhere"].items():
        for name, line in found.items():
            if isinstance(line, dict):
                numbers = [percent(line["seen_before"]), rate(line), decibel(line["psnr_db"])]
                rows.append([f"{style} (VAE {decibel(found['vae_psnr_db'])})", name, *numbers])
    return lines + table(["style", "edit", "seen before", "seen after", "PSNR to the original"], rows)


# --- everything else that was measured --------------------------------------------------------------------------------


def training_text(log: Json) -> list[str]:
    data = log["data"]
    about = (
        f"{data['train']} portraits to train on, {data['test']} held out (SHA-256 {data['sha256']}), "
        f"seed {log['seed']}, on {log['hardware']}. Held out: {log['held_out']}."
    )
    lines = ["## The embedded model's training", "", about.replace("'", ""), ""]
    rows = [[n, str(s["steps"]), f"{s['seconds'] / 60.0:.0f}", str(s["threads"])] for n, s in log["stages"].items()]
    return lines + table(["stage", "steps", "minutes", "threads"], rows)


def tuning_text(stem: str, found: Json) -> list[str]:
    rows = [[f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in line.values()] for line in found["rows"]]
    note = f"{found['note']} " if found.get("note") else ""
    return [f"## {stem}.json", "", f"{note}`{found['command']}`", "", *table(list(found["rows"][0]), rows)]


def kind_of(found: Any) -> str:
    """What a result file holds, told by its shape."""
    if not isinstance(found, dict):
        return "other"
    if "rows" in found and "command" in found:
        return "tuning"
    lines = found.values()
    if found and all(isinstance(line, dict) and "median" in line.get("seconds", {}) for line in lines):
        return "benchmark"
    if found and all(isinstance(line, dict) and {"ours", "peer", "ratio"} <= line.keys() for line in lines):
        return "peers"
    if found and all(isinstance(line, dict) and any(key.startswith("batch ") for key in line) for line in lines):
        return "alone"
    return "other"


def pictures_text(folder: Path) -> list[str]:
    lines = ["## Pictures", ""]
    for picture in sorted(folder.glob("study*.png")):
        words = picture.stem.removeprefix("study_").replace("_", " ")
        lines += [f"![{words}]({folder.name}/{picture.name})", ""]
    return lines if len(lines) > 2 else []


def report(folder: Path, tiny: Path) -> str:
    """RESULTS.md as text."""
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    lines = ["# Results", "", "Written by `python -m bench.report` from `bench/results/*.json`, never by hand.", ""]
    if study := files.pop("study", None):
        megabytes = sum(path.stat().st_size for path in tiny.rglob("*.safetensors")) / 1e6
        rows = [target.row() for target in targets(study, files, megabytes)]
        lines += ["## What was wanted, and what was reached", ""]
        lines += table(["figure", "wanted", "measured, mean", ""], rows) + conditions_text(study)
        lines += edits_text(study["edits"]) + methods_text(study["curves"]) + pictures_text(folder)
        lines += claims_text(study) + elsewhere_text(study)
    lines += options_text(files.pop("study_options_methods", None), files.pop("study_options_removals", None))
    for stem, found in files.items():
        if kind_of(found) == "tuning":
            lines += tuning_text(stem, found)
    if (tiny / "train_log.json").is_file():
        lines += training_text(json.loads((tiny / "train_log.json").read_text(encoding="utf-8")))
    for stem, found in files.items():
        if kind_of(found) == "benchmark":
            lines += benchmark_text(stem, found)
    for stem, found in files.items():
        if kind_of(found) in ("peers", "alone"):
            lines += (peers_text if kind_of(found) == "peers" else alone_text)(stem, found)
    if growth := files.pop("growth", None):
        lines += growth_text(growth, f"{folder.name}/growth.png")
    others = [stem for stem, found in files.items() if kind_of(found) == "other"]
    lines += [f"Not shown above: {', '.join(f'{stem}.json' for stem in others)}.", ""] if others else []
    return "\n".join(lines)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else BENCH / "results"
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else BENCH / "RESULTS.md"
    out.write_text(report(folder, TINY), encoding="utf-8")


if __name__ == "__main__":
    main()
