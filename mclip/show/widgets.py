"""Charts that follow controls, and the first of them: prompts beside a bar chart of the model's answer.

What a widget does lives in plain functions, which are tested without a browser. A mistake in what was typed or
chosen is shown as a sentence; any other error appears with its traceback under the chart, because Jupyter drops
what a callback raises.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from mclip import losses
from mclip.balancing import STRATEGIES, Schedule, gradient_norms, make_balancer
from mclip.config import DistillConfig, TrainConfig, require
from mclip.evaluate import embed_images, embed_texts
from mclip.show.figures import training_curves
from mclip.show.style import COLOURS, HATCHES, PALETTE, NotebookFigure, figure, label, styled
from mclip.train import make_optimizer

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
    read: Callable[[], tuple[Any, ...]],
    draw: Callable[..., bytes],
    chart: ipywidgets.Image,
    message: ipywidgets.HTML,
    errors: ipywidgets.Output,
) -> Callable[[Any], None]:
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
        lambda: tuple(control.value for control in controls),
        lambda *values: draw(*values)._repr_png_(),
        chart,
        message,
        errors,
    )
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
    box = ipywidgets.Textarea(
        "\n".join(prompts),
        description="prompts",
        rows=max(4, len(prompts)),
        continuous_update=False,
        layout={"width": "400px"},
    )
    count = len(embeddings)
    chooser = ipywidgets.BoundedIntText(1, min=1, max=count, description=f"picture, 1 to {count}")

    def draw(text: str, number: int) -> NotebookFigure:
        lines = read_prompts(text)
        cosines, shares = compare_prompts(model, tokenizer, embeddings[number - 1], lines)
        return prompt_chart(np.asarray(images[number - 1]), lines, cosines, shares)

    return follow([box, chooser], draw)


Embeddings = tuple[Tensor, Tensor]  # normalised, of the pictures (B, d) and of their captions (B, d)
Log = Sequence[Mapping[str, Any]]
TEMPERATURES = np.geomspace(0.5, 32, 25)
WIDE = {"width": "380px", "margin": "2px 16px 2px 2px"}


def response_and_gradient(
    student: Embeddings, teacher: Embeddings, scale: float, teacher_scale: float, temperature: float
) -> tuple[float, float]:
    """``losses.response`` in nats, T^2 included, and the norm of its gradient at the student's embeddings."""
    leaves = [embedding.detach().clone().requires_grad_() for embedding in student]
    loss = losses.response(*leaves, *teacher, scale, teacher_scale, temperature)
    return loss.item(), gradient_norms({"response": loss}, leaves)["response"]


@styled
def loss_chart(
    student: Embeddings,
    teacher: Embeddings,
    captions: Sequence[str],
    scale: float,
    teacher_scale: float,
    temperature: float,
    picture: int,
) -> NotebookFigure:
    """Both softmax matrices of a batch, the rows of one ``picture``, and loss and gradient over the temperature.

    Rows of the matrices are pictures, columns captions; ``picture`` counts from 0.
    """
    scaled = {"teacher": teacher_scale * losses.cosines(*teacher), "student": scale * losses.cosines(*student)}
    shares = {name: (table / temperature).softmax(1).numpy() for name, table in scaled.items()}
    fig = figure(8.3, 6.6)
    above, (rows, curves) = fig.subplots(2, 2, height_ratios=(1.15, 1))
    numbers, top = range(len(captions)), max(table.max() for table in shares.values())
    names = [label(caption, 34) for caption in captions]
    for ax, (name, table), own in zip(above, shares.items(), (teacher_scale, scale), strict=True):
        shown = ax.imshow(table, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        ax.add_patch(Rectangle((-0.5, picture - 0.5), len(names), 1, fill=False, edgecolor=PALETTE[1], linewidth=2))
        ax.set(title=f"{name.title()}, logit scale {own:.1f}, T = {temperature:.3g}", xlabel="caption number")
        ax.set_xticks(numbers, [n + 1 for n in numbers])
        ax.set_yticks(numbers, [f"{text}  {n + 1}" if name == "teacher" else n + 1 for n, text in enumerate(names)])
        ax.grid(False)
    above[0].set_ylabel("picture, named by its caption")
    fig.colorbar(shown, ax=above[1], label="probability of the caption")
    looks = zip((-0.2, 0.2), ("teacher", "kd"), shares.items(), strict=True)
    for offset, look, (name, table) in looks:
        rows.barh(
            [n + offset for n in numbers],
            table[picture],
            0.4,
            label=name,
            color=COLOURS[look],
            hatch=HATCHES[look],
            edgecolor="white",
            linewidth=0,
        )
    rows.set(title=f"Row {picture + 1} of both, as bars", xlabel="probability", xlim=(0, 1))
    rows.set_yticks(numbers, [f"{text}  {n + 1}" for n, text in enumerate(names)])
    rows.invert_yaxis()
    rows.grid(False, axis="y")
    _draw_temperatures(curves, temperature, lambda t: response_and_gradient(student, teacher, scale, teacher_scale, t))
    fig.legend(
        *map(sum, zip(*(ax.get_legend_handles_labels() for ax in (rows, curves)), strict=True), ([], [])),
        loc="outside lower center",
        ncols=5,
        columnspacing=1.2,
    )
    return fig


def _draw_temperatures(ax: Axes, chosen: float, measure: Callable[[float], tuple[float, float]]) -> None:
    """Loss and gradient that ``measure`` gives over the temperatures, with a dot on each curve at ``chosen``."""
    styles = {"KL": (":", "black"), "KL times T²": ("-", PALETTE[4]), "norm of its gradient": ("--", PALETTE[1])}
    curves = np.array([(loss / t**2, loss, norm) for t in TEMPERATURES for loss, norm in [measure(t)]]).T
    loss, norm = measure(chosen)
    values = loss / chosen**2, loss, norm
    for (name, (dash, colour)), curve, value in zip(styles.items(), curves, values, strict=True):
        ax.plot(TEMPERATURES, curve, dash, color=colour, label=name)
        ax.plot(chosen, value, "o", color=colour, markersize=5)
    ax.axvline(chosen, color=PALETTE[7], linewidth=1)
    kl, times, pull = (f"{value:.3g}" for value in values)
    ax.set(
        title=f"KL {kl}, times T² {times}, gradient {pull}",
        xscale="log",
        yscale="log",
        xlabel="temperature T (log scale)",
        ylabel="nats, or norm (log scale)",
    )
    ax.set_xticks((0.5, 1, 2, 4, 8, 16, 32), ("0.5", "1", "2", "4", "8", "16", "32"))
    ax.minorticks_off()


def loss_explorer(
    student: Embeddings, teacher: Embeddings, captions: Sequence[str], scale: float, teacher_scale: float
) -> ipywidgets.VBox:
    """Sliders for temperature, the student's logit scale and the picture, over :func:`loss_chart` of a small batch."""
    controls = [
        ipywidgets.FloatLogSlider(
            4.0,
            min=-1,
            max=5,
            base=2,
            step=0.25,
            description="temperature T",
            readout_format=".2f",
            continuous_update=False,
            layout=WIDE,
        ),
        ipywidgets.FloatLogSlider(
            scale,
            min=0,
            max=2,
            step=0.02,
            description="student's logit scale",
            readout_format=".1f",
            continuous_update=False,
            layout=WIDE,
        ),
        ipywidgets.IntSlider(1, min=1, max=len(captions), description="picture", continuous_update=False, layout=WIDE),
    ]

    def draw(temperature: float, scale: float, picture: int) -> NotebookFigure:
        return loss_chart(student, teacher, captions, scale, teacher_scale, temperature, picture - 1)

    return follow(controls, draw)


def recorded_pulls(log: Log, config: DistillConfig) -> pd.DataFrame:
    """Gradient norms of the terms by step, as multiples of that of "original": what made the weights of ``log``.

    The log of a run holds weights, no norms. Prior and ramp of its ``config`` are divided out and the smoothing is
    undone, which leaves the norms at the steps that were measured; steps between keep the last, steps before a
    term's first its first. ConfigError for a log without a step that "gradient_norm" has balanced.
    """
    steps = [record for record in log if "terms" in record]
    schedule, priors = Schedule(config, len(steps)), pd.Series(make_balancer(config).priors)
    weights = pd.DataFrame([record["weights"] for record in steps])
    ramps = pd.DataFrame([schedule.active(record["step"]) for record in steps])
    factors = np.log(weights / (ramps * priors)[weights.columns])
    factors = factors.sub(factors.mean(axis=1), axis=0)
    before = factors.shift().fillna(0.0)  # a term that has just joined starts at the mean, which is 0
    targets = (factors - (1 - config.adaptation_rate) * before) / config.adaptation_rate
    measured = [
        record["strategy"] == "gradient_norm"
        and record["step"] % config.gradient_check_frequency == 0
        and len(record["weights"]) > 1
        for record in steps
    ]
    require(any(measured), "log", f"{len(steps)} steps", "none was balanced by gradient_norm")
    norms = np.exp(-targets.sub(targets["original"], axis=0))
    return norms[measured].reindex(norms.index).ffill().bfill()


def replay(log: Log, config: DistillConfig, recorded: DistillConfig | None = None) -> list[dict[str, Any]]:
    """What schedule and balancer of ``config`` make of the losses in ``log``: phase, weights and temperature by step.

    ``log`` holds the records of a whole run that ``recorded``, by default ``DistillConfig()``, has balanced. Its
    losses stay what they were: this shows the weights that other settings would have given them, not how the run
    would have gone on. Before its first step in the log a term counts with the loss it had there. The log-variances
    of "uncertainty" are trained by the run's optimiser at the logged learning rate.
    """
    steps = [record for record in log if "terms" in record]
    values = pd.DataFrame([record["terms"] for record in steps]).bfill()
    pulls = recorded_pulls(log, recorded or DistillConfig())[values.columns]
    schedule, balancer = Schedule(config, len(steps)), make_balancer(config)
    optimizer = make_optimizer(balancer, TrainConfig())
    place = torch.zeros(len(values.columns), dtype=torch.float64, requires_grad=True)
    rows, replayed = zip(values.to_numpy(), pulls.to_numpy(), strict=True), []
    for record in log:
        if "validation" in record:
            balancer.observe(record["validation"]["r1"])
            continue
        step, active = record["step"], schedule.active(record["step"])
        # At 0 each of these has its loss as value and its norm as the length of its gradient.
        terms = {
            name: loss + pull * at for name, loss, pull, at in zip(values.columns, *next(rows), place, strict=True)
        }
        loss, weights = balancer.combine(terms, active, step, [place])
        if balancer.strategy == "uncertainty":
            optimizer.param_groups[1]["lr"] = record["lr"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        replayed.append(
            {
                "step": step,
                "phase": schedule.phase(step),
                "temperature": schedule.temperature(step),
                "terms": {name: terms[name].item() for name in active},
                "weights": weights,
                "strategy": balancer.strategy,
            }
        )
    return replayed


def schedule_explorer(log: Log) -> ipywidgets.VBox:
    """Sliders for phases, ramp and temperature and a choice of balancer, over the curves of :func:`replay`."""
    default = DistillConfig()
    shared = {"min": 0.0, "max": 1.0, "step": 0.01, "readout_format": ".2f", "continuous_update": False, "layout": WIDE}
    names = {", then ".join(row): row for row in (default.balancers, *((name,) for name in STRATEGIES))}
    controls = [
        ipywidgets.FloatRangeSlider(value=default.phases[:2], description="starts of phases 2 and 3", **shared),
        ipywidgets.FloatSlider(value=default.phases[2], description="end of the cooling", **shared),
        ipywidgets.FloatSlider(value=default.ramp, description="ramp", **shared),
        ipywidgets.FloatRangeSlider(
            value=(default.min_temperature, default.max_temperature),
            description="temperature T",
            **shared | {"min": 1.0, "max": 16.0, "step": 0.5, "readout_format": ".1f"},
        ),
        ipywidgets.Dropdown(options=names, description="balancer", layout=WIDE),
    ]

    def draw(
        starts: tuple[float, float], end: float, ramp: float, heat: tuple[float, float], balancers: tuple[str, ...]
    ) -> NotebookFigure:
        chosen = DistillConfig(
            phases=(*starts, end), ramp=ramp, min_temperature=heat[0], max_temperature=heat[1], balancers=balancers
        )
        return training_curves(replay(log, chosen))

    return follow(controls, draw)
