"""What figures make of failures, of models with other names, and of captions that could break them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.image import imread
from matplotlib.text import Text

from mclip.files import DATA
from mclip.results import ResultError, load_results, make_result
from mclip.show import figures, style
from mclip.show.grounding import grounding_scores
from mclip.show.widgets import prompt_chart
from mclip.study import figures as study_figures
from mclip.study.figures import prompt_sensitivity

CAPTIONS = ["tickets for $5 and $6 \\ each", "price 5_$ off", "from $1^ to $2", "100% $x & $y", "$5 #1 $"]
MODEL = {"name": "kd", "parameters": 1, "sha256": "0" * 64}


@pytest.fixture(scope="module")
def scenes() -> list[dict]:
    return load_results(DATA / "results" / "scenes.json")


def renamed(records: list[dict], name: str) -> list[dict]:
    """The student of seed 0 as somebody's own model."""
    chosen = [r for r in records if r["task"] == "zero_shot" and (r["model"]["name"], r["seed"]) == ("kd", 0)]
    return [{**record, "model": {**record["model"], "name": name}} for record in chosen]


def widths(ax) -> dict[str, list[float]]:
    handles, names = ax.get_legend_handles_labels()
    return {name: [bar.get_width() for bar in bars] for bars, name in zip(handles, names, strict=True)}


def test_a_model_of_ones_own_is_shown_under_its_name(scenes):
    mine = renamed(scenes, "runs/mine") + renamed(scenes, "a/very/long/path/of/another/model")
    expected = [record["metrics"]["top1"]["value"] for record in renamed(scenes, "")]
    for records in (scenes + mine, mine):
        shown = widths(figures.performance_comparison(records).axes[0])
        *students, teacher = style.LABELS.values()
        assert list(shown) == [*students, "runs/mine", "a/very/long/path/of/ano…", teacher]
        assert shown["runs/mine"] == expected
    assert list(widths(figures.per_class_recall(mine, "shape").axes[0])) == ["runs/mine", "a/very/long/path/of/ano…"]
    assert list(widths(figures.per_class_recall(scenes + mine, "shape").axes[0])) == [*list(shown)[:-1], teacher]


def test_what_cannot_be_drawn_is_said(scenes):
    with pytest.raises(ResultError, match="'relation' has no recall of single classes"):
        figures.per_class_recall(scenes, "relation")
    with pytest.raises(ResultError, match="no training step"):
        figures.training_curves([])
    failures = [make_result("retrieval", "x", "val", None, MODEL, error="out of memory")] * 3
    with pytest.raises(ResultError, match=r"^results=3 records hold no zero-shot record; evaluate a model first\.$"):
        figures.performance_comparison(failures)


def test_a_failed_grounding_is_left_out():
    records = load_results(DATA / "results" / "grounding.json")
    failed = make_result("grounding", "scenes", "test", None, {**MODEL, "name": "clip"}, error="out of memory")
    bars, layers = grounding_scores([*records, failed]).axes
    assert style.LABELS["clip"] not in widths(bars)
    assert layers.get_ylabel() == "pointing on validation (%)"
    with pytest.raises(ResultError, match="mclip study grounding"):
        grounding_scores([failed])


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_dollar_starts_no_formula(caption):
    """Matplotlib parses what stands between two dollars, drops its spaces, and fails where that is no formula."""
    pictures = np.zeros((2, 3, 8, 8), np.uint8)
    for fig in (
        figures.image_grid(pictures, [caption, "b"]),
        figures.similarity_matrices({"kd": np.eye(2)}, [caption, "b"]),
        figures.temperature_effect([1.0, 2.0], [1], [caption, "b"]),
        prompt_chart(pictures[0], [caption, "b"], [0.1, 0.2], [0.5, 0.5]),
    ):
        assert fig._repr_png_().startswith(b"\x89PNG")
        assert not any(is_math_text(text.get_text()) for text in fig.findobj(Text))


def test_labels_are_cut_by_characters():
    assert style.label("a red star", 10) == "a red star"
    assert style.label("a red star and more", 10) == "a red sta…"
    assert style.label("赤い星" * 20, 10) == "赤い星赤い星赤い星…"
    assert style.label("赤い星" * 20, 9, lines=2) == "赤い星赤い星赤い星\n赤い星赤い星赤い…"
    assert style.label("a red star on a blue background", 12, lines=2) == "a red star\non a blue b…"
    assert style.label("$5 and $6", 20) == r"\$5 and \$6"
    assert style.label("", 5) == ""


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict]]:
    return study_figures.load_all()


def test_the_texts_hold_what_the_results_files_say(records):
    for file, text in study_figures.written(records).items():
        assert text == file.read_text(encoding="utf-8"), f"{file}: run `make figures`"


def test_make_figures_names_the_records_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(study_figures, "RESULTS", tmp_path)
    shutil.copyfile(DATA / "results" / "scenes.json", tmp_path / "scenes.json")
    with pytest.raises(ResultError, match=r"no records in ablations\.json, .*photographs\.json") as error:
        study_figures.figures()
    assert "scenes.json" not in str(error.value)


def test_make_figures_draws_every_committed_figure_from_the_results_alone(tmp_path, monkeypatch):
    committed = study_figures.FIGURES
    monkeypatch.setattr(study_figures, "FIGURES", tmp_path)
    monkeypatch.setattr(study_figures, "README", tmp_path / "above.md")
    (tmp_path / "README.md").write_text((committed / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "above.md").write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in ("headline", "cost")))
    study_figures.figures()
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in committed.glob("*.png")}
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (committed / "README.md").read_text(encoding="utf-8")
    assert "108 kinds of coloured shapes" in (tmp_path / "above.md").read_text(encoding="utf-8")
    for path in committed.glob("*.png"):
        ours, drawn = imread(path), imread(tmp_path / path.name)
        assert ours.shape == drawn.shape, path.name
        # Fonts and rounding differ between machines; the picture may not.
        assert np.abs(ours - drawn).mean() < 0.02, f"{path.name}: run `make figures`"


def test_every_figure_is_shown_beside_its_table():
    text = (study_figures.FIGURES / "README.md").read_text(encoding="utf-8")
    for path in study_figures.FIGURES.glob("*.png"):
        assert f"]({path.name})" in text


def test_wordings_and_pairs_are_those_of_the_records(records):
    fig = prompt_sensitivity({record["model"]["name"]: record["metrics"] for record in records["examples"]})
    drawn = list(widths(fig.axes[0]).values())
    assert drawn == [[m["value"] for m in record["metrics"].values()] for record in records["examples"]]
    for record in records["examples"]:
        assert np.shape(record["details"]["cosines"]) == (len(record["details"]["captions"]),) * 2
