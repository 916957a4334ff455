"""Charts that follow controls: circle, kernel, prompts against a picture, losses of distillation, pairs of recipes."""

import html
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import numpy as np
import pandas as pd
import skimage.data
import torch
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn

from mclip import losses
from mclip.balancing import STRATEGIES, Balancer, Schedule, gradient_norms
from mclip.config import DistillConfig, TrainConfig, require
from mclip.evaluate import embed_texts
from mclip.pictures import UNREADABLE, Crops, PictureError, as_rgb
from mclip.show import style
from mclip.show.ablations import MEASURES, VERDICTS, difference, in_points, means_of, plan_of
from mclip.show.figures import caption_matrix, training_curves
from mclip.show.style import PALETTE, NotebookFigure, figure, label, name_rows
from mclip.steps import make_optimizer
from mclip.text_encoder import mix_steps, toeplitz

MAX_PROMPTS = 20
TEMPERATURES = np.geomspace(0.5, 32, 25)
SHARPNESS = {"min": 0, "max": 2, "step": 0.02, "readout_format": ".1f"}  # of a logit scale, as a power of 10
WIDE = {"continuous_update": False, "layout": {"width": "380px", "margin": "2px 16px 2px 2px"}}
Model = tuple[Tensor, Tensor, float]  # embeddings of pictures and captions (B, d), normalised, and the logit scale
Log = Sequence[Mapping[str, Any]]
Array = np.ndarray


def follow(
    controls: Sequence[ipywidgets.ValueWidget], draw: Callable[..., NotebookFigure], *beside: ipywidgets.Widget
) -> ipywidgets.VBox:
    """The chart that ``draw`` makes of the values of ``controls``, under these; drawn anew when one changes.

    ``beside`` stand behind the controls. A ValueError, such as a ConfigError, hides the chart, and its message takes
    the place. Any other error appears with its traceback under the chart.
    """
    chart, message = ipywidgets.Image(width=800, layout={"max_width": "100%"}), ipywidgets.HTML()

    def update(**values: Any) -> None:
        drawn, message.value = b"", ""
        try:
            drawn = draw(*values.values())._repr_png_()
        except ValueError as error:
            message.value = f"<b>{html.escape(str(error))}</b>"
        finally:
            chart.value, chart.layout.display = drawn, None if drawn else "none"

    errors = ipywidgets.interactive_output(update, {f"control {i}": each for i, each in enumerate(controls)})
    for control in controls:
        if hasattr(control, "style"):  # what has a description
            control.style.description_width = "initial"
    above = ipywidgets.HBox([*controls, *beside], layout={"flex_flow": "row wrap", "align_items": "flex-start"})
    return ipywidgets.VBox([above, message, chart, errors])


def read_prompts(text: str) -> list[str]:
    """The prompts in ``text``, one a line, without blank lines; ConfigError for none, too many, or one twice."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    remedy = f"write 1 to {MAX_PROMPTS} prompts, one a line, no two alike"
    require(0 < len(prompts) <= MAX_PROMPTS and len(set(prompts)) == len(prompts), "prompts", prompts, remedy)
    return prompts


def compare_prompts(model: nn.Module, tokenizer: Any, image: Tensor, prompts: Sequence[str]) -> tuple[Array, Array]:
    """Cosines (P,) of a normalised embedding (d,) with ``prompts``, and their softmax (P,) at the model's scale."""
    cosines = (embed_texts(model, tokenizer, prompts) @ image).double()
    scale = model.logit_scale.detach().cpu().double().exp().clamp(max=100)
    return cosines.numpy(), (scale * cosines).softmax(0).numpy()


def prompt_chart(
    image: Array, prompts: Sequence[str], cosines: Array, shares: Array, heat: Array | None = None
) -> NotebookFigure:
    """The picture, uint8 (3, H, W), beside a bar for each prompt, with its cosine behind the bar.

    ``heat`` (H, W), from 0 to 1, shows over a grey copy of the picture where the best prompt was found.
    """
    width, ratios = (7.5, (1, 2.2)) if heat is None else (8.6, (1, 1, 1.9))
    fig = figure(width, max(2.2, 1.2 + 0.28 * len(prompts)))
    left, *middle, right = fig.subplots(1, len(ratios), width_ratios=ratios)
    show_picture(left, image)
    for ax in middle:
        show_picture(ax, image, heat)
        ax.set_title("Where it looks")
    bars = right.barh(range(len(prompts)), shares, color=PALETTE[7])
    bars[int(np.argmax(cosines))].set_facecolor(PALETTE[0])
    for row, (cosine, share) in enumerate(zip(cosines, shares, strict=True)):
        right.text(share + 0.02, row, f"{share:.0%}, cosine {cosine:+.2f}", va="center")
    name_rows(right, [label(text, 40) for text in prompts])
    right.set(title="Shares among the sentences offered", xlabel="share (softmax over the sentences)", xlim=(0, 1.6))
    right.set_xticks(np.linspace(0, 1, 5))
    return fig


def show_picture(ax: Axes, image: Array, heat: Array | None = None) -> AxesImage:
    """A picture, uint8 (3, H, W), without axes; with ``heat`` (H, W), from 0 to 1, this over a grey copy of it."""
    ax.axis("off")
    picture = np.asarray(image).transpose(1, 2, 0)
    if heat is None:
        return ax.imshow(picture, interpolation="nearest")
    ax.imshow(picture.mean(2), cmap="gray", interpolation="nearest")
    return ax.imshow(heat, cmap="viridis", alpha=0.65, vmin=0, vmax=1)


def free_photographs() -> dict[str, Image.Image]:
    """Six photographs that anyone may use, from scikit-image and scikit-learn, by name."""
    from sklearn.datasets import load_sample_images  # takes a second or two to import

    names = ("astronaut", "chelsea", "coffee", "rocket")
    arrays = [*(getattr(skimage.data, name)() for name in names), *load_sample_images().images]
    return dict(zip((*names, "temple", "flower"), map(Image.fromarray, arrays), strict=True))


def free_crops(size: int, count: int) -> np.ndarray:
    """Crops (count, 3, size, size), uint8, of :func:`free_photographs`, in turns."""
    photographs = [torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in free_photographs().values()]
    views, rows = divmod(np.arange(count), len(photographs))
    crops = Crops(smallest=0.15, views=count, seed=0)
    cuts = zip(rows, crops.seeds(rows, views), strict=True)
    return np.stack([crops.cut(photographs[row], size, int(seed)).numpy() for row, seed in cuts])


def open_upload(file: Mapping[str, Any]) -> Image.Image:
    """The picture in a file from an upload widget, ``{"name", "content"}``, as :func:`~mclip.pictures.as_rgb` makes it.

    Raises: PictureError, which names the file and the remedy.
    """
    try:
        return as_rgb(Image.open(io.BytesIO(file["content"])))
    except UNREADABLE as error:
        cause = str(error).partition(" <")[0]  # Pillow names the buffer by its address
        remedy = "choose a picture, such as a JPEG or PNG file"
        raise PictureError(f"{file['name']}: not readable as a picture ({cause}); {remedy}.") from error


def picture_chooser(pictures: Mapping[str, Image.Image]) -> tuple[ipywidgets.Dropdown, ipywidgets.FileUpload]:
    """A chooser over ``pictures``, and a button that adds the reader's own file and chooses it.

    The chooser's value is one of ``pictures``, or a file for :func:`open_upload`.
    """
    chooser = ipywidgets.Dropdown(options=dict(pictures), description="picture")
    upload = ipywidgets.FileUpload(accept="image/*", description="your own picture", layout={"width": "180px"})

    def add(change: Mapping[str, Any]) -> None:
        own = {file["name"]: file for file in change["new"]}
        chooser.options = own | chooser.options | own  # the first of new options is chosen

    upload.observe(add, "value")
    return chooser, upload


def response_and_gradient(student: Model, teacher: Model, temperature: float) -> tuple[float, float]:
    """``losses.response`` in nats, T^2 included, and the norm of its gradient at the student's embeddings."""
    leaves = [embedding.detach().clone().requires_grad_() for embedding in student[:2]]
    loss = losses.response(*leaves, *teacher[:2], student[2], teacher[2], temperature)
    return loss.item(), gradient_norms({"response": loss}, leaves)["response"]


def loss_chart(student: Model, teacher: Model, captions: Sequence[str], temperature: float, row: int) -> NotebookFigure:
    """Both softmax matrices of a batch, one ``row`` of each as bars, and loss and gradient over the temperature.

    Rows of the matrices are pictures, columns captions; ``row`` counts from 0.
    """
    models = {"teacher": teacher, "student": student}
    logits = {name: scale * losses.cosines(image, text) for name, (image, text, scale) in models.items()}
    shares = {name: (table / temperature).softmax(1).numpy() for name, table in logits.items()}
    count, top = len(captions), max(table.max() for table in shares.values())
    fig = figure(8.3, 6.6)
    above, (bars, curves) = fig.subplots(2, 2, height_ratios=(1.15, 1))
    for ax, (name, table) in zip(above, shares.items(), strict=True):
        matrix = caption_matrix(ax, table, captions if name == "teacher" else [""] * count, 0, top)
        ax.add_patch(Rectangle((-0.5, row - 0.5), count, 1, fill=False, edgecolor=PALETTE[1], linewidth=2))
        ax.set_title(f"{name.title()}, logit scale {models[name][2]:.1f}, T = {temperature:.3g}")
    above[0].set_ylabel("picture, named by its caption")
    fig.colorbar(matrix, ax=above[1], label="probability of the caption")
    for (name, table), look, offset in zip(shares.items(), ("teacher", "kd"), (-0.2, 0.2), strict=True):
        fill = {"color": style.COLOURS[look], "hatch": style.HATCHES[look], "edgecolor": "white", "linewidth": 0}
        bars.barh(np.arange(count) + offset, table[row], 0.4, label=name, **fill)
    bars.set(title=f"Row {row + 1} of both, as bars", xlabel="probability", xlim=(0, 1))
    name_rows(bars, [f"{label(text, 34)}  {n}" for n, text in enumerate(captions, 1)])
    measured = [(t, *response_and_gradient(student, teacher, t)) for t in (*TEMPERATURES, temperature)]
    series = np.array([(loss / t**2, loss, norm) for t, loss, norm in measured]).T
    styles = {"KL": (":", "black"), "KL times T²": ("-", PALETTE[4]), "norm of its gradient": ("--", PALETTE[1])}
    for (name, (dash, colour)), curve in zip(styles.items(), series, strict=True):
        curves.plot(TEMPERATURES, curve[:-1], dash, color=colour, label=name)
        curves.plot(temperature, curve[-1], "o", color=colour, markersize=5)
    curves.axvline(temperature, color=PALETTE[7], linewidth=1)
    curves.set(title="KL {:.3g}, times T² {:.3g}, gradient {:.3g}".format(*series[:, -1]), xscale="log", yscale="log")
    curves.set(xlabel="temperature T (log scale)", ylabel="nats, or norm (log scale)")
    curves.set_xticks((0.5, 1, 2, 4, 8, 16, 32), ("0.5", "1", "2", "4", "8", "16", "32"))
    curves.minorticks_off()
    fig.legend(loc="outside lower center", ncols=5, columnspacing=1.2)
    return fig


def loss_explorer(student: Model, teacher: Model, captions: Sequence[str]) -> ipywidgets.VBox:
    """Sliders for temperature, the student's logit scale and the picture, over :func:`loss_chart` of a small batch."""
    heat = {"min": -1, "max": 5, "base": 2, "step": 0.25, "readout_format": ".2f"}
    controls = [
        ipywidgets.FloatLogSlider(4.0, description="temperature T", **heat, **WIDE),
        ipywidgets.FloatLogSlider(student[2], description="student's logit scale", **SHARPNESS, **WIDE),
        ipywidgets.IntSlider(1, min=1, max=len(captions), description="picture", **WIDE),
    ]
    image, text, _ = student
    return follow(controls, lambda heat, scale, row: loss_chart((image, text, scale), teacher, captions, heat, row - 1))


def replay(log: Log, config: DistillConfig) -> list[dict[str, Any]]:
    """What schedule and balancer of ``config`` make of the losses in ``log``: phase, weights and temperature by step.

    Losses and gradient norms stay those of the whole distillation in ``log``: this shows the weights that other
    settings would have given them, not how the run would have gone on. Until the log has a term, its first loss and
    norm stand in. Log-variances of "uncertainty" are trained as in the run. ConfigError for a log without norms.
    """
    steps = [record for record in log if "terms" in record]
    values = pd.DataFrame([record["terms"] for record in steps]).bfill()
    measured = pd.DataFrame([record.get("pulls", {}) for record in steps])
    remedy = "it holds no gradient norms of all terms; distil again with this version"
    require(set(measured) == set(values), "log", f"{len(steps)} steps", remedy)
    pulls = measured[values.columns].ffill().bfill()
    schedule, balancer = Schedule(config, len(steps)), Balancer(config)
    optimizer = make_optimizer(balancer, TrainConfig())
    origin = torch.zeros(len(values.columns), dtype=torch.float64, requires_grad=True)
    rows, replayed = zip(values.to_numpy(), pulls.to_numpy(), strict=True), []
    for record in log:
        if "validation" in record:
            balancer.observe(record["validation"]["r1"])
            continue
        step, active = record["step"], schedule.active(record["step"])
        # At the origin each of these has its loss as value and its norm as the length of its gradient.
        terms = {name: loss + pull * x for name, loss, pull, x in zip(values.columns, *next(rows), origin, strict=True)}
        loss, weights = balancer.combine(terms, active, step, [origin])
        settings = {"phase": schedule.phase(step), "temperature": schedule.temperature(step)}
        replayed.append({"step": step, **settings, "weights": weights, "strategy": balancer.strategy})
        replayed[-1]["terms"] = {name: terms[name].item() for name in active}
        if balancer.strategy == "uncertainty":
            optimizer.param_groups[1]["lr"] = record["lr"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return replayed


def schedule_explorer(log: Log) -> ipywidgets.VBox:
    """Sliders for phases, ramp and temperature and a choice of balancer, over the curves of :func:`replay`."""
    default = DistillConfig()
    share = {"min": 0.0, "max": 1.0, "step": 0.01, "readout_format": ".2f", **WIDE}
    heat = {"min": 1.0, "max": 16.0, "step": 0.5, "readout_format": ".1f", **WIDE}
    temperatures = default.min_temperature, default.max_temperature
    names = {", then ".join(row): row for row in (default.balancers, *((name,) for name in STRATEGIES))}
    controls = [
        ipywidgets.FloatRangeSlider(value=default.phases[:2], description="starts of phases 2 and 3", **share),
        ipywidgets.FloatSlider(value=default.phases[2], description="end of the cooling", **share),
        ipywidgets.FloatSlider(value=default.ramp, description="ramp", **share),
        ipywidgets.FloatRangeSlider(value=temperatures, description="temperature T", **heat),
        ipywidgets.Dropdown(options=names, description="balancer", layout=WIDE["layout"]),
    ]

    def draw(starts: Sequence, end: float, ramp: float, heat: Sequence, balancers: tuple[str, ...]) -> NotebookFigure:
        bounds = dict(zip(("min_temperature", "max_temperature"), heat, strict=True))
        config = DistillConfig(phases=(*starts, end), ramp=ramp, balancers=balancers, **bounds)
        return training_curves(replay(log, config))

    return follow(controls, draw)


def circle_chart(image: Tensor, text: Tensor, scale: float) -> NotebookFigure:
    """InfoNCE of pictures and captions (B, 2) on the unit circle: gradient of the logits, arrows, loss by scale.

    The arrows show where gradient descent moves each picture; the longest always has the same length.
    """
    moving = image.clone().requires_grad_()
    loss = losses.info_nce(moving, text, scale)
    loss.backward()
    tangent = torch.stack([-image[:, 1], image[:, 0]], 1)  # a unit vector can only move along the circle
    steps = -(moving.grad * tangent).sum(1, keepdim=True) * tangent
    logits, count = scale * losses.cosines(image, text), len(image)
    slope = (logits.softmax(1) + logits.softmax(0) - 2 * torch.eye(count)) / (2 * count)
    fig = figure(9.6, 3.4)
    circle, matrix, curve = fig.subplots(1, 3, width_ratios=(1.1, 1, 0.95))
    length = {"angles": "xy", "scale_units": "xy", "scale": 2 * max(steps.norm(dim=1).max().item(), 1e-9)}
    for i in range(count):
        for points, marker, name in ((image, "o", "picture"), (text, "s", "caption")):
            circle.plot(*points[i], marker, color=PALETTE[i], label=f"{name}s" if i == 0 else None)
            beside = points[i] * (1.15 if name == "picture" else 0.84)
            circle.annotate(f"{name[0]}{i}", beside, ha="center", va="center")
        circle.quiver(*image[i], *steps[i], color=PALETTE[i], width=0.012, **length)
    circle.set(title="Where descent moves each picture", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
    circle.set(xlabel="first coordinate", ylabel="second coordinate")
    circle.legend(loc="center")
    heatmap = matrix.imshow(slope, cmap="PuOr", vmin=-0.25, vmax=0.25)
    matrix.set(title="Purple pushes apart, orange pulls together", xlabel="caption", ylabel="picture")
    matrix.set_xticks(range(count), [f"c{i}" for i in range(count)])
    matrix.set_yticks(range(count), [f"p{i}" for i in range(count)])
    matrix.grid(False)
    fig.colorbar(heatmap, ax=matrix, label="derivative of the loss w.r.t. the logit", shrink=0.8)
    grid = np.geomspace(1, 100, 60)
    curve.semilogx(grid, [losses.info_nce(image, text, each).item() for each in grid], color=PALETTE[0])
    curve.plot(scale, loss.item(), "o", color=PALETTE[1])
    curve.axhline(np.log(count), color="black", linestyle=":", label="blind guess, log B")
    curve.set(title=f"Loss {loss.item():.2f} at scale {scale:.3g}", xlabel="scale s (log)", ylabel="InfoNCE loss")
    curve.legend()
    return fig


class CirclePoints(anywidget.AnyWidget, ipywidgets.ValueWidget):
    """Points on a circle to drag with mouse, finger or arrow keys; ``value`` holds their angles in degrees.

    A name that begins with "c" is that of a caption, and drawn as a square.
    """

    _esm = Path(__file__).with_name("circle.js")
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    colours = traitlets.List(traitlets.Unicode()).tag(sync=True)
    value = traitlets.List(traitlets.Float()).tag(sync=True)

    def __repr__(self) -> str:
        return f"CirclePoints(value={self.value})"  # without its address, which would be new in each stored notebook


def circle_explorer(pictures: Sequence[float], captions: Sequence[float], scale: float) -> ipywidgets.VBox:
    """Pictures and captions to drag, by their angles in degrees, and a slider for the scale, over circle_chart."""
    names = [f"{kind}{i}" for kind, angles in (("p", pictures), ("c", captions)) for i in range(len(angles))]
    colours = [to_hex(PALETTE[int(name[1:])]) for name in names]
    points = CirclePoints(names=names, colours=colours, value=[*pictures, *captions])

    def draw(value: Sequence[float], scale: float) -> NotebookFigure:
        angles = torch.deg2rad(torch.tensor(value))
        vectors = torch.stack([angles.cos(), angles.sin()], 1)
        return circle_chart(vectors[: len(pictures)], vectors[len(pictures) :], scale)

    return follow([points, ipywidgets.FloatLogSlider(scale, description="scale s", **SHARPNESS, **WIDE)], draw)


def kernel_chart(words: Sequence[str], place: int, logits: Sequence[float]) -> NotebookFigure:
    """LightConv's kernel, the softmax of ``logits`` (K,), and what it makes of a 1 at ``place`` of a sentence."""
    kernel, impulse = torch.tensor([logits]).softmax(1), torch.zeros(1, len(words), 1)
    impulse[0, place] = 1
    answer, reach = mix_steps(toeplitz(kernel, len(words)), impulse), len(logits) // 2
    fig = figure(8.3, 2.9)
    left, right = fig.subplots(1, 2, width_ratios=(1, 2), sharey=True)
    left.bar(range(-reach, reach + 1), kernel[0], color=PALETTE[1])
    left.set(title="The kernel: softmax of the taps", xlabel="neighbour that is read (tokens)", ylabel="weight")
    for series, offset, name, hatch in ((impulse, -0.2, "input", "//"), (answer, 0.2, "output", "")):
        right.bar(np.arange(len(words)) + offset, series[0, :, 0], 0.4, label=name, hatch=hatch, edgecolor="white")
    right.set(title="The impulse and what the convolution makes of it", ylim=(0, 1.05))
    right.set_xticks(range(len(words)), [label(word, 12) for word in words], rotation=40, ha="right")
    right.legend()
    return fig


def kernel_explorer(words: Sequence[str], logits: Sequence[float]) -> ipywidgets.VBox:
    """A slider for the place of the impulse in a sentence, and one for each tap of the kernel, over kernel_chart."""
    looks = {"min": -4.0, "max": 4.0, "step": 0.1, "continuous_update": False, "layout": {"width": "260px"}}
    place = ipywidgets.IntSlider(len(words) // 2, min=0, max=len(words) - 1, description="impulse at token", **WIDE)
    numbered = enumerate(logits, start=-(len(logits) // 2))
    taps = [ipywidgets.FloatSlider(value, description=f"tap {number:+d}", **looks) for number, value in numbered]
    return follow([place, *taps], lambda place, *values: kernel_chart(words, place, values))


def pair_chart(records: Sequence[Mapping[str, Any]], one: str, other: str) -> NotebookFigure:
    """Scores of two configurations seed by seed, and below the points by which ``one`` is ahead of ``other``.

    There is a column for each of MEASURES that the records hold. ResultError where the two share no seed.
    """
    plan, means = plan_of(records), {}
    for measure in MEASURES:
        with suppress(KeyError):  # records of test sets have no retrieval
            means[measure] = means_of(records, measure)
    words = {"helps": "better", "hurts": "worse", "identical": "the same run"}
    fig = figure(8.6, 3.6)
    axes = fig.subplots(2, len(means), sharey="row", height_ratios=(1.5, 1), squeeze=False)
    for (above, below), (measure, scores) in zip(axes.T, means.items(), strict=True):
        effect = difference(scores, one, other)
        for seed in sorted(scores[one].keys() | scores[other].keys()):
            points = [(scores[name][seed], row) for row, name in enumerate((one, other)) if seed in scores[name]]
            above.plot(*zip(*points, strict=True), "o-", color=PALETTE[seed], label=f"seed {seed}")
        above.set(title=measure, xlabel="%")
        name_rows(above, [label(plan[name]["title"], 24, 2) for name in (one, other)])
        above.set_ylim(1.5, -0.5)
        colour, marker = VERDICTS[effect["verdict"]]
        below.errorbar(effect["value"], 0, xerr=style.whiskers([effect]), fmt=marker, color=colour, capsize=2)
        below.axvline(0, color="black", linewidth=1)
        verdict = words.get(effect["verdict"], "undecided") if "low" in effect else "no interval: one seed each"
        below.set(title=f"{in_points(effect)}\n{verdict}", xlabel="points, first minus second", yticks=())
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def ablation_explorer(records: Sequence[Mapping[str, Any]], one: str, other: str) -> ipywidgets.VBox:
    """Two choices among the configurations of a study, at first ``one`` and ``other``, over :func:`pair_chart`."""
    names = {f"{row['group']}: {row['title']}": name for name, row in plan_of(records).items()}
    settings, chosen = {"options": names, "layout": {"width": "420px"}}, {"first": one, "second": other}
    controls = [ipywidgets.Dropdown(value=name, description=which, **settings) for which, name in chosen.items()]
    return follow(controls, lambda first, second: pair_chart(records, first, second))
