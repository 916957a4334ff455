"""What figures make of failures, of models with other names, and of captions that could break them."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.text import Text

from mclip.files import DATA
from mclip.results import ResultError, load_results, make_result
from mclip.show import figures, style
from mclip.show.grounding import grounding_scores
from mclip.show.tables import scene_results
from mclip.show.widgets import prompt_chart

CAPTIONS = ["tickets for $5 and $6 \\ each", "price 5_$ off", "from $1^ to $2", "100% $x & $y", "$5 #1 $"]
MODEL = {"name": "kd", "parameters": 1, "sha256": "0" * 64}


@pytest.fixture(scope="module")
def scenes() -> list[dict]:
    return scene_results()


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
        assert list(shown) == [*style.LABELS.values(), "runs/mine", "a/very/long/path/of/ano…"]
        assert shown["runs/mine"] == expected
    assert list(widths(figures.per_class_recall(mine, "shape").axes[0])) == ["runs/mine", "a/very/long/path/of/ano…"]
    assert list(widths(figures.per_class_recall(scenes + mine, "shape").axes[0]))[:4] == list(style.LABELS.values())


def test_what_cannot_be_drawn_is_said(scenes):
    with pytest.raises(ResultError, match="'relation' has no recall of single classes"):
        figures.per_class_recall(scenes, "relation")
    with pytest.raises(ResultError, match="no training step"):
        figures.training_curves([])
    failures = [make_result("retrieval", "x", "val", None, MODEL, error="out of memory")] * 3
    with pytest.raises(ResultError, match=r"^results=3 records hold no zero-shot record; evaluate a model first\.$"):
        figures.performance_comparison(failures)


def test_a_failed_grounding_is_left_out():
    records = load_results(DATA / "results" / "grounding")
    failed = make_result("grounding", "scenes", "test", None, {**MODEL, "name": "clip"}, error="out of memory")
    pointing, _, layers = grounding_scores([*records, failed]).axes
    assert [tick.get_text() for tick in pointing.get_yticklabels()] == ["base", "kd", "teacher"]
    assert layers.get_ylabel() == "pointing on validation (%)"
    with pytest.raises(ResultError, match="mclip grounding"):
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
