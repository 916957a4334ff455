"""Costs against closed forms and other counters; the deployed and the exported forms against the trained one."""

from __future__ import annotations

import math
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.layers import BatchNormAct2d
from timm.utils import reparameterize_model
from torch import nn

from mclip.cli.main import main
from mclip.config import ConfigError
from mclip.deploy import cost
from mclip.deploy.cost import candidate, latency, multiply_adds, parameter_parts, random_model, threads, time_by_kind
from mclip.deploy.export import quiet
from mclip.deploy.fused import fold_batch_norm, fused
from mclip.deploy.reader import session
from mclip.files import DATA
from mclip.recipes import load_model
from mclip.results import ResultError, describe_model, load_results, weights_sha256
from mclip.scenes.world import SceneConfig, make_scenes
from mclip.show import tables
from mclip.show.figures import cost_of_models
from mclip.show.grounding import stage_names
from mclip.sources.zero_shot import EXCERPTS
from mclip.study import bench
from mclip.study.bench import in_new_process, peak_memory


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 2), st.integers(6, 12))
def test_multiply_adds_of_a_convolution(groups, width, kernel, stride, side):
    conv = nn.Conv2d(groups * width, 2 * groups, kernel, stride, kernel // 2, groups=groups)
    out = math.ceil(side / stride)
    x = torch.zeros(1, groups * width, side, side)
    assert multiply_adds(lambda: conv(x)) == out * out * 2 * groups * width * kernel**2


def test_multiply_adds_of_a_transformer_block_count_attention():
    """Four projections, scores and their sum of values, two feed-forward layers: nothing is lost in a fused path."""
    block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    length = 10
    x = torch.zeros(1, length, 32)
    assert multiply_adds(lambda: block(x)) == length * (4 * 32 * 32 + 2 * length * 32 + 2 * 32 * 64)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_time_of_a_graph_goes_to_the_operations_that_it_holds(tmp_path):
    module, pictures = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 14**2, 4)),
        torch.zeros(1, 3, 16, 16),
    )
    with quiet():
        torch.onnx.export(module.eval(), (pictures,), tmp_path / "two.onnx", input_names=["pictures"], verbose=False)
    begun = time.perf_counter()
    times = time_by_kind(tmp_path / "two.onnx", {"pictures": pictures.numpy()}, rounds=5)
    assert 0 < 5 * sum(times.values()) < 1000 * (time.perf_counter() - begun)
    assert min(times["convolutions"], times["matrix products"]) > 0 == times["means and norms"]


def test_parts_are_all_parameters():
    for model in (random_model("course")[0], load_model("clip")[0], load_model("teacher")[0]):
        parts = parameter_parts(model)
        total = parts.pop("total")
        assert total == sum(parts.values()) == sum(p.numel() for p in model.parameters())
        table = next(m for m in model.modules() if isinstance(m, nn.Embedding))
        assert parts["token table"] >= table.weight.numel()


def test_the_published_count_and_its_56_8_per_cent():
    """klmobile rebuilds the published student to half a per cent; CLIP is counted to the last parameter."""
    small, large = (candidate(name, "trained").parameters["total"] for name in ("klmobile", "ViT-B-32"))
    assert large == 151_277_313
    assert small == pytest.approx(65_315_793, rel=0.005)
    assert 100 * (1 - small / large) == pytest.approx(56.8, abs=0.3)


def test_folding_is_the_closed_form_and_leaves_other_layers():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm, nn.ReLU(), nn.BatchNorm2d(6)).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    folded = fold_batch_norm(model)
    assert [type(layer) for layer in folded] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d]
    torch.testing.assert_close(folded(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", [("0", "1"), ("conv", "norm"), ("-1", "0")])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6), BatchNormAct2d(6)])
def test_folding_keeps_activations_whatever_the_layers_are_called(names, norm):
    torch.manual_seed(0)
    norm.running_mean.normal_()
    layers = zip(names, (nn.Conv2d(3, 6, 3, bias=False), norm), strict=True)
    model, x = nn.Sequential(OrderedDict(layers)).eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    folded = fold_batch_norm(model)
    torch.testing.assert_close(folded(x), expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded)


def test_only_a_student_is_fused_and_only_once(shipped):
    for model in (open_clip.create_model("ViT-S-32-alt"), fused(shipped[0])):
        with pytest.raises(ConfigError, match="give a student"):
            fused(model)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is known on Linux alone")
def test_peak_memory_is_the_weights_and_what_the_calls_add():
    deployed, trained = (in_new_process(peak_memory, "mobile-256", form) for form in ("deployed", "trained"))
    weights = candidate("mobile-256").megabytes * 1e6 / 2**20
    assert weights < deployed < 2 * weights, "a copy of the weights is counted"
    assert deployed < trained + 20, "what folding left behind is counted"
    pictures = 16 * 3 * 224 * 224 * 4 / 2**20
    assert in_new_process(peak_memory, "mobile-256", "deployed", 16) > deployed + pictures


@pytest.mark.parametrize("name", ["course", "mobile-256"])
def test_the_deployed_student_says_the_same(name):
    model, config = random_model(name)
    for module in model.modules():  # statistics as after some training
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    model.eval()
    before, deployed = weights_sha256(model), fused(model)
    assert weights_sha256(model) == before
    images = torch.randn(2, 3, config.image.image_size, config.image.image_size)
    tokens = model.tokenizer(["a dog", "a small brown dog runs across the green grass today"])
    with torch.inference_mode():
        for text in (tokens, tokens[:1], tokens[1:]):
            torch.testing.assert_close(
                deployed.encode_text(text, normalize=True), model.encode_text(text, normalize=True), atol=1e-5, rtol=0
            )
        torch.testing.assert_close(
            deployed.encode_image(images, normalize=True), model.encode_image(images, normalize=True), atol=1e-5, rtol=0
        )
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())


def test_a_mobileclip_is_measured_as_it_would_be_deployed():
    trained = candidate("MobileCLIP2-S0", "trained")
    images = torch.rand(1, 3, trained.image_size, trained.image_size)
    with torch.inference_mode():
        expected = trained.model.encode_image(images, normalize=True)
        deployed = fold_batch_norm(reparameterize_model(trained.model))
        torch.testing.assert_close(deployed.encode_image(images, normalize=True), expected, atol=1e-4, rtol=0)
    assert sum(p.numel() for p in deployed.parameters()) < trained.parameters["total"]


@pytest.fixture(scope="module")
def shipped():
    return load_model("kd")


@pytest.fixture(scope="module")
def graphs():
    return {form: candidate("course", form) for form in ("ONNX", "int8")}


def test_graphs_are_the_deployed_student(graphs):
    deployed = candidate("course")
    images, tokens = torch.randn(3, 3, 64, 64), deployed.tokenizer(["a red star on grass", "a blue heart"])
    for form, tolerance in (("ONNX", 1e-5), ("int8", 0.2)):
        image, text = (session(graph, 1) for graph in graphs[form].graphs)
        with torch.inference_mode():
            for ours, theirs in (
                (text.run(None, {"tokens": tokens.numpy()}), deployed.model.encode_text(tokens, normalize=True)),
                (image.run(None, {"images": images.numpy()}), deployed.model.encode_image(images, normalize=True)),
            ):
                assert (torch.from_numpy(ours[0]) * theirs).sum(1).min() > 1 - tolerance
        assert graphs[form].name == f"course, {form}"
        assert graphs[form].parameters == deployed.parameters
        assert graphs[form].multiply_adds() == {}
    assert graphs["ONNX"].megabytes == pytest.approx(deployed.megabytes, rel=0.05)
    assert graphs["int8"].megabytes < 0.35 * deployed.megabytes


def test_graphs_compute_with_as_many_threads_as_pytorch(graphs, monkeypatch):
    opened, original = [], cost.session
    monkeypatch.setattr(cost, "session", lambda file, count: opened.append(count) or original(file, count))
    for count in (3, 2):
        with threads(count):
            for call in graphs["ONNX"].calls().values():
                assert call()[0].shape == (1, 256)
    assert opened == [3, 3, 2, 2]


def test_latency_is_of_turns_and_knows_its_percentiles(monkeypatch):
    now, order = [0.0], []
    clock = {"a": iter(range(1, 100)), "b": iter([2.0] * 99)}
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])

    def call(name):
        def work():
            order.append(name)
            now[0] += next(clock[name])

        return work

    found = latency({name: call(name) for name in clock}, rounds=3, repeats=2)
    assert order == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3
    kept = [2, 3, 5, 6, 8, 9]  # the first of each turn warms up
    assert found["a"]["median"] == pytest.approx(1000 * np.median(kept))
    assert found["a"]["p95"] == pytest.approx(1000 * np.quantile(kept, 0.95))
    assert found["b"] == pytest.approx({"median": 2000, "p95": 2000})


def test_stages_are_named_layer_by_layer():
    trunk = random_model("course")[0].image_encoder.trunk
    assert len(stage_names()) == len(trunk)
    sides, x = {}, torch.zeros(1, 3, 64, 64)
    for name, layer in zip(stage_names(), trunk.eval(), strict=True):
        x = layer(x)
        sides.setdefault(name, x.shape[-1])
    assert sides == {"stem": 32, "stage1": 32, "stage2": 16, "stage3": 8, "stage4": 4, "stage5": 2, "last": 2}


def test_a_wrong_model_or_form_is_named():
    with pytest.raises(ConfigError, match="did you mean 'mobile-256'"):
        candidate("mobile-265")
    with pytest.raises(ConfigError, match="only the student has the form int8"):
        candidate("ViT-B-32", "int8")


@pytest.fixture(scope="module")
def record():
    return load_results(DATA / "results" / "efficiency.json")[0]["metrics"]


def test_the_figure_shows_the_committed_numbers(record):
    left, right = cost_of_models(record).axes
    drawn = {text.get_text(): text.xy for text in left.texts}
    assert drawn.keys() == {name for name, form in bench.MODELS if form == "deployed"}
    for name, (x, y) in drawn.items():
        halves = record["models"][name]["latency"]["1 thread, batch 1"]
        assert x == pytest.approx(halves["image"]["median"] + halves["text"]["median"])
        assert y == record["models"][name]["megabytes"]
    widths = sorted(bar.get_width() for bar in right.patches)
    assert widths == sorted(value for name in drawn for value in tables.milliseconds(record["models"][name]).values())


def test_the_aims_are_judged_by_the_numbers(record):
    lines = tables.efficiency_goals(record).splitlines()[2:]
    times = {name: tables.milliseconds(model) for name, model in record["models"].items()}
    ours = ("mobile-256", "pocket-256", "pocket-256, ONNX")
    expected = [
        sum(times[rival].values()) / sum(times[own].values())
        for own in ours
        for rival in ("ViT-B-32", "MobileCLIP2-S0")
    ]
    expected.append(times["ViT-B-32"]["text"] / times["mobile-256"]["text"])
    for line, value, aim in zip(lines, expected, (12, 8, 30, 20, 30, 20, 15), strict=True):
        assert f"{value:.1f} times" in line
        assert line.endswith("| yes |" if value >= aim else "| no |")
    with pytest.raises(ResultError, match="mclip efficiency"):
        tables.milliseconds({"latency": {}})


def test_a_form_that_was_not_timed_has_a_row_without_milliseconds(record):
    models = {name: dict(record["models"][name]) for name in ("ViT-B-32", "mobile-256")}
    del models["mobile-256"]["latency"]
    line = tables.efficiency_table({"models": models}).splitlines()[3]
    assert line.startswith("| mobile-256 | 16.2 |")
    assert line.endswith("| 65 |  |  |  |  |")


def test_parts_are_kept_one_by_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    parts = {name: lambda name=name: {name: 1.0} for name in bench.COSTS}
    monkeypatch.setattr(bench, "COSTS", parts)
    assert main(["efficiency", "--only", "models"]) == 0
    assert main(["efficiency", "--only", "int8", "memory"]) == 0
    (kept,) = load_results(tmp_path / "efficiency.json")
    assert kept["metrics"] == {name: {name: 1.0} for name in ("models", "int8", "memory")}
    assert main(["efficiency", "--only", "model"]) == 2
    assert "models" in capsys.readouterr().err
    assert main(["efficiency", "--only", "models", "--out", str(tmp_path / "other.json")]) == 0
    assert load_results(tmp_path / "other.json")[0]["metrics"] == {"models": {"models": 1.0}}


def test_forms_are_measured_against_pytorch(monkeypatch, tmp_path):
    """On scenes in the folders of two sets; rows of an engine that is not installed stay."""
    names = {
        "imagenette": [f"n{number}" for number in range(10)],
        "cifar10": [f"class {number}" for number in range(10)],
    }
    scenes = make_scenes(SceneConfig(20, 64), progress=False)
    pictures = [Image.fromarray(picture.transpose(1, 2, 0)) for picture in np.array(scenes.images)]
    for name, classes in names.items():
        for number, own in enumerate(classes):
            place = tmp_path / EXCERPTS[name][0] / own
            place.mkdir(parents=True)
            for copy in (number, number + 10):
                pictures[copy].save(place / f"{copy}.png")
    (tmp_path / "flickr8k" / "images").mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "flickr8k" / "images" / f"{number}.png")
    rows = [f"images/{number}.png,a picture" for number in range(len(pictures))]
    (tmp_path / "flickr8k" / "train.csv").write_text("\n".join(["file_name,caption", *rows]))
    student = load_model("kd")[0]
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(bench, "EXCERPTS", {name: EXCERPTS[name] for name in names})
    monkeypatch.setattr(bench, "load_model", lambda name: (student, None))
    monkeypatch.setitem(sys.modules, "executorch", None)  # as if it were not installed
    monkeypatch.setattr(bench, "PHOTOGRAPHS", 8)
    out, measure = tmp_path / "costs.json", bench.forms
    monkeypatch.setitem(bench.OF_PHOTO, "forms", lambda student: {"executorch int8": {"megabytes": 1.0}})
    assert main(["efficiency", "--only", "forms", "--out", str(out)]) == 0
    monkeypatch.setitem(bench.OF_PHOTO, "forms", lambda student: measure(student, rounds=1))
    assert main(["efficiency", "--only", "forms", "--out", str(out)]) == 0
    (kept,) = load_results(out)
    assert (kept["dataset"], kept["n"], kept["model"]) == ("forms", 8, describe_model("photo", student))
    forms = kept["metrics"]
    assert forms.pop("executorch int8") == {"megabytes": 1.0}
    assert list(forms) == ["PyTorch", "float32", "int8"]
    for form, row in forms.items():
        assert row["megabytes"] == pytest.approx({"int8": 0.25}.get(form, 1) * forms["PyTorch"]["megabytes"], rel=0.2)
        assert all(row["latency"][half]["median"] > 0 for half in ("image", "text"))
        assert min(row["cosine"].values()) > (0.95 if form == "int8" else 1 - 1e-5)
        assert row["top1"].keys() == row["same answer"].keys() == names.keys()
    assert forms["float32"]["same answer"] == forms["PyTorch"]["same answer"] == dict.fromkeys(names, 100.0)
    assert forms["float32"]["top1"] == forms["PyTorch"]["top1"]
    lines = tables.forms_table(forms).splitlines()
    assert lines[0].endswith("| imagenette | cifar10 |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| PyTorch", "| float32", "| int8"]
    assert lines[3].endswith(" (100.0) |")
    monkeypatch.setattr(bench, "INT8_CHOICES", {"the default": {}})
    choices = bench.choices(student)
    assert choices["PyTorch"]["same answer"] == dict.fromkeys(names, 100.0)
    assert choices["the default"].keys() == {"cosine", "top1", "same answer"}
    with torch.no_grad():
        student.logit_scale.add_(1.0)
    monkeypatch.setitem(bench.OF_PHOTO, "forms", lambda student: {"int8": {"megabytes": 2.0}})
    assert main(["efficiency", "--only", "forms", "--out", str(out)]) == 0
    assert load_results(out)[0]["metrics"] == {"int8": {"megabytes": 2.0}}, "rows of another student were kept"


def test_the_committed_forms_keep_what_they_promise():
    """They are of the student that ships; int8 takes at most 6 MB, and float32 forms answer as PyTorch does."""
    records = load_results(DATA / "results" / "efficiency.json")
    (kept,) = [record for record in records if record["dataset"] == "forms"]
    assert kept["model"] == describe_model("photo", load_model("photo")[0])
    forms = kept["metrics"]
    assert list(forms) == ["PyTorch", "float32", "int8", "executorch float32", "executorch int8"]
    assert forms["int8"]["megabytes"] <= 6.0
    for form in ("float32", "executorch float32"):
        assert min(forms[form]["cosine"].values()) > 1 - 1e-3
        assert min(forms[form]["same answer"].values()) > 99
    for name, top1 in forms["PyTorch"]["top1"].items():
        assert f"{top1:.1f} (100.0)" in tables.forms_table(forms).splitlines()[2], name
