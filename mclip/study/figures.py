"""The command ``figures``: draws the figures, and writes the tables beside them, from ``data/results`` alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from mclip.config import get_profile
from mclip.files import DATA, atomic_path
from mclip.recipes import describe
from mclip.results import ResultError, load_results
from mclip.show import ablations, grounding, tables
from mclip.show import figures as charts
from mclip.show.figures import read_log
from mclip.show.style import NotebookFigure, bar_chart, save_figure
from mclip.show.tables import Scores, markdown
from mclip.study.table import STUDIES

Records = list[dict[str, Any]]
RESULTS, FIGURES, README = DATA / "results", DATA.parent / "figures", DATA.parent / "README.md"
COST_SETS = {"COCO 2017": (118_287, 5, 30), "CC12M": (12_400_000, 1, 30)}
"""Pictures, captions of each, and passes."""


def scores_markdown(table: Scores, models: Sequence[str]) -> str:
    """Percentages with their intervals: a row for each key of ``table``, a column for each model."""
    cell, rows = "{value:.1f} ({low:.1f}-{high:.1f})", []
    for name, values in table.items():
        rows.append([name, *(cell.format(**values[model]) if values.get(model) else "" for model in models)])
    return markdown(["%", *models], rows)


def paired_markdown(records: Records) -> str:
    """The records of task "paired": a row for each set, a column for each seed."""
    rows: dict[str, dict[int, str]] = {}
    for record in records:
        if record["task"] == "paired":
            rows.setdefault(record["dataset"], {})[record["seed"]] = describe(record)
    seeds = sorted({seed for row in rows.values() for seed in row})
    header = ["kd - base", *(f"seed {seed}" for seed in seeds)]
    return markdown(header, [[name, *(row.get(seed, "") for seed in seeds)] for name, row in rows.items()])


def bench_markdown(records: Records) -> str:
    """The rows of ``bench.json``, and whether their aims are reached."""
    rows = [row for record in records for row in record["details"]["rows"]]
    cells = [(r["what"], f"{r['value']:.4g} {r['unit']}", r["bar"], tables.reached(r["value"], r["bar"])) for r in rows]
    return markdown(("what", "measured", "aim", "reached"), cells)


def cost_markdown(records: Records) -> str:
    """Hours on the machine of ``bench.json``: pictures x passes / pace; the teacher sees each view of a picture."""
    pace = {row["key"]: row["value"] for record in records for row in record["details"]["rows"] if "key" in row}
    rows, views = [], get_profile("gpu").views
    for name, (pictures, captions, passes) in COST_SETS.items():
        targets = pictures * views / pace["teacher pictures"] + pictures * captions / pace["teacher captions"]
        size = pictures * (views + captions) * pace["bytes of a target"] / 1e9
        training = pictures * passes / pace["mobile-512"]
        what = f"{name}: {pictures:,} pictures, {views} views, {passes} passes of `mobile-512`"
        rows.append((what, f"{targets / 3600:,.1f}", f"{size:,.2f}", f"{training / 3600:,.0f}"))
    return markdown(("", "targets, hours", "targets, GB", "training, hours"), rows)


def headline(records: Records, photographs: Records, costs: Mapping[str, Any]) -> str:
    """The sentences that open the README: what distillation gained, and what the small model costs."""
    classes = round(100 / tables.by_model(records)["colour-shape"]["kd"][0]["metrics"]["chance"])
    top1 = {name: f"{row['value']:.0f} %" for name, row in tables.zero_shot_table(records)["colour-shape"].items()}
    scores = list(charts.photograph_scores(photographs).values())
    photos = {name: f"{fmean(row[name]['value'] for row in scores):.0f} %" for name in scores[0]}
    models = costs["models"]
    small, large = (sum(tables.milliseconds(models[name]).values()) for name in ("mobile-256", "ViT-B-32"))
    size = {name: f"{models[name]['megabytes']:.0f} MB" for name in ("mobile-256", "mobile-256, int8", "ViT-B-32")}
    words = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    costs = {"small": small, "large": large, "size": size}
    return words["headline"].format(classes=classes, top1=top1, photos=photos, **costs).strip()


def replace_block(text: str, name: str, block: str) -> str:
    """``text`` with what lies between ``<!-- name -->`` and the next ``<!-- end -->`` replaced by ``block``."""
    start, mark = text.find(f"<!-- {name} -->"), "<!-- end -->"
    end = text.find(mark, start)
    if start < 0 or end < 0:
        raise ResultError(f"no block <!-- {name} --> ... {mark} in the text; restore the two lines.")
    return f"{text[:start]}<!-- {name} -->\n{block}\n{text[end:]}"


def prompt_sensitivity(models: Mapping[str, Mapping[str, Mapping[str, float]]]) -> NotebookFigure:
    """Top-1 (%) with interval by wording, ``{model: {wording: {"value", "low", "high"}}}``."""
    wordings = next(iter(models.values()))
    table = {each.replace("{}", "…"): {name: rows[each] for name, rows in models.items()} for each in wordings}
    title, label = "Prompts that mean the same, and what they score", "top-1 on colour-shape (%), with 95 % interval"
    return bar_chart(table, list(models), title, label, width=7.5)


def load_all() -> dict[str, Records]:
    """The records of every study by its name; none of one that was not run."""
    records = {name: [] for name in (*STUDIES, "photo", "efficiency", "bench")}
    return records | {file.stem: load_results(file) for file in RESULTS.glob("*.json") if file.stem in records}


def with_photo(records: Mapping[str, Records]) -> Records:
    """The comparison on photographs, and the records of the student that ships."""
    return records["photographs"] + [each for each in records["photo"] if each["model"]["name"] == "photo"]


def figures_of(records: Mapping[str, Records]) -> dict[str, NotebookFigure]:
    """The committed figures by the name of their file."""
    examples = {record["model"]["name"]: record for record in records["examples"]}
    cosines = {name: record["details"]["cosines"] for name, record in examples.items()}
    return {
        "performance_comparison": charts.performance_comparison(records["scenes"], with_photo(records)),
        "per_class_recall": charts.per_class_recall(records["scenes"], "shape"),
        "training_curves": charts.training_curves(read_log(RESULTS / "logs" / "kd.jsonl")),
        "grounding": grounding.grounding_scores(records["grounding"]),
        "efficiency_pareto": charts.cost_of_models(records["efficiency"][0]["metrics"]),
        "ablations": ablations.ablation_figure(records["ablations"]),
        "recipes": ablations.recipe_figure(records["recipes"]),
        "defects": ablations.defect_curves(records["defects"], records["ablations"]),
        "similarity_matrices": charts.similarity_matrices(cosines, records["examples"][0]["details"]["captions"]),
        "prompt_sensitivity": prompt_sensitivity({name: record["metrics"] for name, record in examples.items()}),
    }


def tables_of(records: Mapping[str, Records]) -> dict[str, str]:
    """The blocks of ``figures/README.md``, and of the README those called headline and cost, by their names."""
    costs, models = records["efficiency"][0]["metrics"], ("base", "clip", "kd", "teacher")
    chosen = [record for record in records["photographs"] if record["task"] == "choice"]
    return {
        "headline": headline(records["scenes"], with_photo(records), costs),
        "cost": cost_markdown(records["bench"]),
        "scenes": scores_markdown(tables.zero_shot_table(records["scenes"]), models),
        "paired": paired_markdown(records["scenes"]),
        "claims": ablations.claims_table(records),
        "ablations": ablations.ablation_table(records["ablations"], "held-out", "mean top-1"),
        "recipes": ablations.ablation_table(records["recipes"], *ablations.MEASURES),
        "baselines": ablations.ablation_table(records["baselines"], *ablations.MEASURES),
        "defects": ablations.defect_table(records["defects"], ablations.means_of(records["ablations"])),
        "efficiency": f"{tables.efficiency_table(costs)}\n\n{tables.efficiency_goals(costs)}",
        "photo": scores_markdown(charts.photograph_scores(records["photo"]), ("kd", "teacher")),
        "photographs": scores_markdown(charts.photograph_scores(records["photographs"]), models),
        "search": ablations.ablation_table(chosen, *ablations.PHOTOGRAPH_MEASURES),
        "bench": bench_markdown(records["bench"]),
    }


def figures() -> None:
    """Draw the committed figures, and write the tables of README.md and figures/README.md."""
    records = load_all()
    if missing := ", ".join(f"{name}.json" for name, own in records.items() if not own):
        raise ResultError(
            f"{RESULTS}: no records in {missing}; restore what ships, or measure again (CONTRIBUTING.md)."
        )
    for name, fig in figures_of(records).items():
        save_figure(fig, FIGURES / f"{name}.png")
    for file, text in written(records).items():
        with atomic_path(file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def written(records: Mapping[str, Records]) -> dict[Path, str]:
    """The text of both README files, with their tables as the records have them."""
    files = {file: file.read_text(encoding="utf-8") for file in (README, FIGURES / "README.md")}
    for name, table in tables_of(records).items():
        file = README if name in ("headline", "cost") else FIGURES / "README.md"
        files[file] = replace_block(files[file], name, table)
    return files
