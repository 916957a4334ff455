"""The prompt widget without a browser: its functions, and its callbacks as a click or an upload would call them."""

from __future__ import annotations

import io
import math
from datetime import UTC, datetime

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import nn

from mclip.config import PRESETS, ConfigError
from mclip.metrics import EvaluationError
from mclip.model import MobileCLIP
from mclip.pictures import PictureError
from mclip.show.grounding import prompt_explorer
from mclip.show.style import NotebookFigure
from mclip.show.widgets import (
    MAX_PROMPTS,
    compare_prompts,
    follow,
    free_photographs,
    open_upload,
    prompt_chart,
    read_prompts,
)

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
def pictures() -> dict[str, Image.Image]:
    arrays = np.random.default_rng(1).integers(0, 256, (3, 64, 96, 3), np.uint8)
    return {f"noise {n}": Image.fromarray(array) for n, array in enumerate(arrays)}


def parts(explorer: ipywidgets.VBox) -> tuple:
    """Text box, picture chooser, choice of layer, upload button, message and chart."""
    controls, message, chart, _errors = explorer.children
    return (*controls.children, message, chart)


def uploaded(name: str, content: bytes) -> tuple[dict, ...]:
    """What the browser's half of the button sets."""
    file = {"name": name, "type": "", "size": len(content), "content": memoryview(content)}
    return ({**file, "last_modified": datetime.now(UTC)},)


def as_png(picture: Image.Image, **settings) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **settings)
    return buffer.getvalue()


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


@pytest.mark.parametrize("heat", [None, np.eye(64)])
def test_chart_shows_every_prompt_and_marks_the_best(heat):
    picture = np.zeros((3, 64, 64), np.uint8)
    fig = prompt_chart(picture, ["a $ star", "a heart"], [0.1, 0.3], [0.2, 0.8], heat)
    _, *middle, right = fig.axes
    assert [np.array_equal(ax.images[-1].get_array(), heat) for ax in middle] == [True] * (heat is not None)
    assert [label.get_text() for label in right.get_yticklabels()] == [r"a \$ star", "a heart"]
    widths = [bar.get_width() for bar in right.patches]
    assert widths == pytest.approx([0.2, 0.8])
    assert right.patches[0].get_facecolor() != right.patches[1].get_facecolor()
    assert fig._repr_png_().startswith(PNG)


def explorer_of(student: MobileCLIP, pictures: dict[str, Image.Image]) -> tuple:
    return parts(prompt_explorer(student, student.tokenizer, pictures, PROMPTS, "stage4"))


def test_explorer_follows_both_controls(student, pictures):
    box, chooser, _, _, message, chart = explorer_of(student, pictures)
    first = bytes(chart.value)
    assert first.startswith(PNG)
    chooser.label = "noise 1"
    second = bytes(chart.value)
    box.value = "a red star\na heart"
    assert len({first, second, bytes(chart.value)}) == 3
    assert message.value == ""


def test_of_several_layers_one_is_chosen(student, pictures):
    layers = ("stage1", "stage3")
    _, _, choice, *_, chart = parts(prompt_explorer(student, student.tokenizer, pictures, PROMPTS, *layers))
    first = bytes(chart.value)
    choice.value = "stage3"
    assert bytes(chart.value) not in (first, b"")
    assert choice.layout.display is None
    assert explorer_of(student, pictures)[2].layout.display == "none"


def test_a_bad_prompt_is_shown_and_the_old_chart_is_not_left_to_mislead(student, pictures):
    box, _, _, _, message, chart = explorer_of(student, pictures)
    box.value = "<b>\n<b>"
    assert "no two alike" in message.value
    assert "&lt;b&gt;" in message.value
    assert bytes(chart.value) == b""
    box.value = "a heart"
    assert message.value == ""
    assert bytes(chart.value).startswith(PNG)


def test_an_upload_is_shown_as_the_same_picture_from_the_menu(student, pictures):
    _, chooser, _, upload, message, chart = explorer_of(student, pictures)
    chooser.label = "noise 2"
    expected = bytes(chart.value)
    chooser.label = "noise 0"
    upload.value = uploaded("mine.png", as_png(pictures["noise 2"]))
    assert chooser.label == "mine.png"
    assert bytes(chart.value) == expected
    # Cameras call every photograph alike: the next one takes the place of the first.
    upload.value = uploaded("mine.png", as_png(pictures["noise 1"]))
    assert list(chooser.options) == ["mine.png", *pictures]
    assert bytes(chart.value) not in (expected, b"")
    assert message.value == ""


def test_an_upload_that_is_no_picture_is_a_sentence_and_nothing_breaks(student, pictures):
    box, chooser, _, upload, message, chart = explorer_of(student, pictures)
    first = bytes(chart.value)
    upload.value = uploaded("<notes>.txt", b"hello")
    assert "&lt;notes&gt;.txt: not readable as a picture" in message.value
    assert "choose a picture" in message.value
    assert bytes(chart.value) == b""
    box.value = "a heart"
    assert "not readable" in message.value
    box.value = "\n".join(PROMPTS)
    chooser.label = "noise 0"
    assert message.value == ""
    assert bytes(chart.value) == first


def test_odd_kinds_of_uploads_are_upright_rgb():
    clear = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    assert open_upload({"name": "a", "content": as_png(clear)}).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((1, 2), 257 * 99, np.uint16))
    assert open_upload({"name": "a", "content": as_png(deep)}).getpixel((0, 0)) == (99, 99, 99)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # the camera was held upright: turn it clockwise
    row = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))
    upright = open_upload({"name": "a", "content": as_png(row, exif=turned)})
    assert upright.size == (1, 2)
    assert upright.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("content", [b"", b"GIF89a", as_png(Image.effect_noise((64, 64), 50))[:900]])
def test_files_that_cannot_be_read_are_named_without_addresses(content):
    with pytest.raises(
        PictureError, match=r"^mine\.jpg: not readable as a picture \([^<]+\); choose a picture"
    ) as error:
        open_upload({"name": "mine.jpg", "content": content})
    assert "0x" not in str(error.value)


def test_the_free_photographs_are_six_in_colour():
    photographs = free_photographs()
    assert list(photographs) == ["astronaut", "chelsea", "coffee", "rocket", "temple", "flower"]
    assert all(picture.mode == "RGB" and min(picture.size) >= 300 for picture in photographs.values())


def test_an_unexpected_error_is_not_swallowed():
    def broken(_text: str) -> NotebookFigure:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        follow([ipywidgets.Text("a")], broken)
