"""The command ``examples``: what the shipped models make of twelve pairs, and how much hangs on a prompt's wording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mclip.config import get_profile, require
from mclip.evaluate import embed_images, embed_texts, evaluate_zero_shot
from mclip.files import DATA, write_json
from mclip.recipes import load_model
from mclip.results import describe_model, versions
from mclip.scenes.test_sets import scene_sets
from mclip.scenes.world import SceneConfig
from mclip.show.style import COLOURS, HATCHES, LABELS, NotebookFigure, figure, styled
from mclip.sources.loading import load_pairs
from mclip.study.jobs import results_folder

FILE = DATA / "results" / "examples.json"
MODELS = ("base", "kd", "teacher")
WORDINGS = (
    "{}",
    "a {}",
    "a picture of a {}",
    "a photo of a {}",
    "there is a {}",
    "I think that this may be a {}, perhaps",
)


def examples(pairs: int = 12, seed: int = 0, out_dir: str = "runs/examples") -> None:
    """Cosines of validation pairs, and top-1 of the set colour-shape by wording; writes data/results/examples.json.

    With other pairs or another seed the file goes to ``out_dir/results``.

    Args:
        pairs: number of pairs, all with different captions.
        seed: of the bootstrap.
        out_dir: where the file goes if it is not the one that ships.
    """
    require(seed >= 0, "seed", seed, "give a whole number from 0")
    file = results_folder(FILE.parent, out_dir, (pairs, seed) == (12, 0)) / FILE.name
    validation = load_pairs("scenes", 64, scenes=SceneConfig(500, 64, "val"), progress=False)
    first = {own[0]: row for row, own in reversed(list(enumerate(validation.captions[: 5 * pairs])))}
    rows = sorted(first.values())[:pairs]
    captions = [validation.captions[row][0] for row in rows]
    test = scene_sets(64, get_profile("cpu").test_pictures)["colour-shape"]
    record: dict[str, Any] = {"schema": 1, "versions": versions(), "captions": captions, "models": {}}
    for name in MODELS:
        model, tokenizer = load_model(name)
        cosines = (
            embed_images(model, np.asarray(validation.images[rows]))[0] @ embed_texts(model, tokenizer, captions).T
        )
        embedded, _ = embed_images(model, test.images)
        wordings = {
            wording: evaluate_zero_shot(model, tokenizer, test, name, prompt=wording, seed=seed, embeddings=embedded)
            for wording in WORDINGS
        }
        record["models"][name] = {
            "model": describe_model(name, model),
            "cosines": np.round(cosines.numpy().astype(float), 4).tolist(),
            "wordings": {wording: one["metrics"]["top1"] for wording, one in wordings.items()},
        }
    write_json(file, record)
    print(f"{file}: {len(captions)} pairs, {len(WORDINGS)} wordings, {len(MODELS)} models")


@styled
def prompt_sensitivity(models: Mapping[str, Mapping[str, Mapping[str, float]]]) -> NotebookFigure:
    """Top-1 (%) with interval by wording, ``{model: {wording: {"value", "low", "high"}}}``: a row of marks each."""
    wordings = list(next(iter(models.values())))
    fig = figure(7.5, 1.2 + 0.36 * len(wordings))
    ax = fig.subplots()
    for number, (name, found) in enumerate(models.items()):
        offset = 0.18 * (number - (len(models) - 1) / 2)
        for row, wording in enumerate(wordings):
            m = found[wording]
            ax.errorbar(
                m["value"],
                row + offset,
                xerr=[[m["value"] - m["low"]], [m["high"] - m["value"]]],
                fmt="osD^"[number],
                color=COLOURS[name],
                markersize=5,
                capsize=2,
                markerfacecolor="white" if HATCHES[name] else COLOURS[name],
                label=None if row else LABELS[name],
            )
    ax.set_yticks(range(len(wordings)), [wording.replace("{}", "…") for wording in wordings])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set(
        title="Prompts that mean the same, and what they score", xlabel="top-1 on colour-shape (%), with 95 % interval"
    )
    ax.set_xlim(0, 100)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(models))
    return fig
