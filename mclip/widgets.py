"""Charts that follow controls, and the first of them: prompts beside a bar chart of the model's answer.

What a widget does lives in plain functions, which are tested without a browser. A mistake in what was typed or
chosen is shown as a sentence; any other error appears with its traceback under the chart, because Jupyter drops
what a callback raises.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
import numpy as np
from torch import Tensor, nn

from mclip.config import require
from mclip.evaluate import embed_images, embed_texts
from mclip.style import PALETTE, NotebookFigure, figure, label, styled

EXAMPLE_PROMPTS = ("a circle", "a square", "a star", "a heart")
MAX_PROMPTS = 20


def read_prompts(text: str) -> list[str]:
    """The prompts in ``text``, one a line, without blank lines; ConfigError for none, too many, or one twice."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    remedy = f"write 1 to {MAX_PROMPTS} prompts, one a line, no two alike"
    require(0 < len(prompts) <= MAX_PROMPTS and len(set(prompts)) == len(prompts), "prompts", prompts, remedy)
    return prompts


def compare_prompts(
    model: nn.Module, tokenizer: Any, image: Tensor, prompts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (P,) of one picture's normalised embedding (d,) with ``prompts``, and their softmax (P,).

    The cosines are multiplied by the model's learned scale, at most 100, before the softmax.
    """
    cosines = (embed_texts(model, tokenizer, prompts) @ image).double()
    scale = model.logit_scale.detach().cpu().double().exp().clamp(max=100)
    return cosines.numpy(), (scale * cosines).softmax(0).numpy()


@styled
def prompt_chart(
    image: np.ndarray, prompts: Sequence[str], cosines: Sequence[float], shares: Sequence[float]
) -> NotebookFigure:
    """The picture, uint8 (3, H, W), beside a bar for each prompt, with its cosine behind the bar."""
    fig = figure(7.5, max(2.2, 1.2 + 0.28 * len(prompts)))
    left, right = fig.subplots(1, 2, width_ratios=(1, 2.2))
    left.imshow(np.asarray(image).transpose(1, 2, 0), interpolation="nearest")
    left.axis("off")
    best = int(np.argmax(cosines))
    colours = [PALETTE[0] if row == best else PALETTE[7] for row in range(len(prompts))]
    right.barh(range(len(prompts)), shares, color=colours)
    for row, (cosine, share) in enumerate(zip(cosines, shares, strict=True)):
        right.text(share + 0.02, row, f"{share:.0%}, cosine {cosine:+.2f}", va="center")
    right.set_yticks(range(len(prompts)), [label(text, 40) for text in prompts])
    right.invert_yaxis()
    right.set(title="The prompt that fits best", xlabel="softmax over the prompts", xlim=(0, 1.6))
    right.set_xticks(np.linspace(0, 1, 5))
    right.grid(False, axis="y")
    return fig


def make_update(
    read: Callable[[], tuple[Any, ...]], draw: Callable[..., bytes], chart: ipywidgets.Image,
    message: ipywidgets.HTML, errors: ipywidgets.Output,
) -> Callable[[Any], None]:  # fmt: skip
    """The callback: draw what ``read`` says into ``chart``, or hide it and put into ``message`` what is wrong."""

    def update(_change: Any = None) -> None:
        drawn, message.value = b"", ""
        errors.clear_output()
        with errors:
            try:
                drawn = draw(*read())
            except ValueError as error:  # ConfigError and EvaluationError are of this kind
                message.value = f"<b>{html.escape(str(error))}</b>"
            finally:
                chart.value, chart.layout.display = drawn, None if drawn else "none"

    return update


def follow(controls: Sequence[ipywidgets.ValueWidget], draw: Callable[..., NotebookFigure]) -> ipywidgets.VBox:
    """The chart that ``draw`` makes of the values of ``controls``, under these; drawn anew when one changes."""
    chart = ipywidgets.Image(format="png", width=800, layout={"max_width": "100%"})
    message, errors = ipywidgets.HTML(), ipywidgets.Output()
    update = make_update(
        lambda: tuple(control.value for control in controls), lambda *values: draw(*values)._repr_png_(),
        chart, message, errors)  # fmt: skip
    for control in controls:
        control.style.description_width = "initial"
        control.observe(update, names="value")
    update()
    above = ipywidgets.HBox(controls, layout={"flex_flow": "row wrap", "align_items": "flex-start"})
    return ipywidgets.VBox([above, message, chart, errors])


def prompt_explorer(
    model: nn.Module, tokenizer: Any, images: Any, prompts: Sequence[str] = EXAMPLE_PROMPTS
) -> ipywidgets.VBox:
    """A text box of prompts and a picture chooser over ``images``, uint8 (N, 3, H, W); the chart follows both."""
    embeddings, _ = embed_images(model, images)
    box = ipywidgets.Textarea("\n".join(prompts), description="prompts", rows=max(4, len(prompts)),
                              continuous_update=False, layout={"width": "400px"})  # fmt: skip
    count = len(embeddings)
    chooser = ipywidgets.BoundedIntText(1, min=1, max=count, description=f"picture, 1 to {count}")

    def draw(text: str, number: int) -> NotebookFigure:
        lines = read_prompts(text)
        cosines, shares = compare_prompts(model, tokenizer, embeddings[number - 1], lines)
        return prompt_chart(np.asarray(images[number - 1]), lines, cosines, shares)

    return follow([box, chooser], draw)
