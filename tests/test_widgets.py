"""The prompt widget without a browser: its functions, and its callbacks as a click would call them."""

from __future__ import annotations

import math

import ipywidgets
import numpy as np
import pytest
import torch
from torch import nn

from mclip.config import PRESETS, ConfigError
from mclip.metrics import EvaluationError
from mclip.model import MobileCLIP
from mclip.show.style import NotebookFigure
from mclip.show.widgets import MAX_PROMPTS, compare_prompts, follow, prompt_chart, prompt_explorer, read_prompts

PNG = b"\x89PNG"
PROMPTS = ["a circle", "a star"]


class Compass(nn.Module):
    """A text encoder that maps "a", "b" to the axes of the plane, and other texts to their middle."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return tokens


def compass_tokens(texts: list[str]) -> torch.Tensor:
    places = {"a": (1.0, 0.0), "b": (0.0, 1.0), "nan": (math.nan, 0.0)}
    return torch.tensor([places.get(text, (math.sqrt(0.5), math.sqrt(0.5))) for text in texts])


@pytest.fixture(scope="module")
def student() -> MobileCLIP:
    torch.manual_seed(0)
    return MobileCLIP(PRESETS["course"]).eval()


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=generator)


def parts(explorer: ipywidgets.VBox) -> tuple:
    """Text box, picture chooser, message and chart."""
    controls, message, chart, _errors = explorer.children
    return (*controls.children, message, chart)


def test_prompts_are_read_one_a_line():
    assert read_prompts("  a red star \n\n a heart\n") == ["a red star", "a heart"]


@pytest.mark.parametrize("text", ["", " \n \n", "a star\na star", "\n".join(map(str, range(MAX_PROMPTS + 1)))])
def test_prompts_that_cannot_be_compared(text):
    with pytest.raises(ConfigError, match="one a line"):
        read_prompts(text)


@pytest.mark.parametrize(("scale", "used"), [(3.0, 3.0), (1000.0, 100.0)])
def test_shares_are_the_softmax_of_scaled_cosines(scale, used):
    image = torch.tensor([0.6, 0.8])
    cosines, shares = compare_prompts(Compass(scale), compass_tokens, image, ["a", "b", "c"])
    expected = np.array([0.6, 0.8, 1.4 * math.sqrt(0.5)])
    assert cosines == pytest.approx(expected)
    exponents = np.exp(used * (expected - expected.max()))
    assert shares == pytest.approx(exponents / exponents.sum(), rel=1e-3)
    assert shares.sum() == pytest.approx(1)


def test_a_model_that_diverged_is_named():
    with pytest.raises(EvaluationError, match="not finite"):
        compare_prompts(Compass(1.0), compass_tokens, torch.tensor([1.0, 0.0]), ["nan"])


def test_chart_shows_every_prompt_and_marks_the_best(pictures):
    fig = prompt_chart(pictures[0].numpy(), ["a $ star", "a heart"], [0.1, 0.3], [0.2, 0.8])
    _, right = fig.axes
    assert [label.get_text() for label in right.get_yticklabels()] == [r"a \$ star", "a heart"]
    widths = [bar.get_width() for bar in right.patches]
    assert widths == pytest.approx([0.2, 0.8])
    assert right.patches[0].get_facecolor() != right.patches[1].get_facecolor()
    assert fig._repr_png_().startswith(PNG)


def test_explorer_follows_both_controls(student, pictures):
    box, chooser, message, chart = parts(prompt_explorer(student, student.tokenizer, pictures, PROMPTS))
    first = bytes(chart.value)
    assert first.startswith(PNG)
    chooser.value = 2
    second = bytes(chart.value)
    box.value = "a red star\na heart"
    assert len({first, second, bytes(chart.value)}) == 3
    assert message.value == ""


def test_a_bad_prompt_is_shown_and_the_old_chart_is_not_left_to_mislead(student, pictures):
    box, _, message, chart = parts(prompt_explorer(student, student.tokenizer, pictures, PROMPTS))
    box.value = "<b>\n<b>"
    assert "no two alike" in message.value
    assert "&lt;b&gt;" in message.value
    assert bytes(chart.value) == b""
    box.value = "a heart"
    assert message.value == ""
    assert bytes(chart.value).startswith(PNG)


def test_an_unexpected_error_is_not_swallowed():
    def broken(_text: str) -> NotebookFigure:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        follow([ipywidgets.Text("a")], broken)
