"""The image encoder against torchvision's and timm's MobileNetV3-Large."""

import urllib.error
import warnings
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import TINY, toy_pairs
from torchvision.models import MobileNet_V3_Large_Weights, mobilenet_v3_large
from torchvision.models.mobilenetv3 import _mobilenet_v3_conf

from mclip import recipes
from mclip.config import ConfigError, ImageConfig, TrainConfig
from mclip.image_encoder import DepthwiseConv, ImageEncoder, stage_table
from mclip.recipes import imagenet_trunk


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def with_random_statistics(model: torch.nn.Module) -> torch.nn.Module:
    """BatchNorm as after training: statistics and affine parameters that are not 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_same_output_as_torchvision_with_its_weights(width):
    library = with_random_statistics(mobilenet_v3_large(weights=None, width_mult=width)).eval()
    encoder = ImageEncoder(ImageConfig(width=width, image_size=96)).eval()
    encoder.trunk.load_state_dict(library.features.state_dict())
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = library.avgpool(library.features(images)).flatten(1)
        assert expected.std() > 1e-3
        torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)
    assert encoder.features == expected.shape[1] == int(960 * width)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    size=st.integers(1, 6),
    kernel=st.sampled_from([3, 5]),
    stride=st.integers(1, 2),
)
def test_depthwise_convolution_is_torchs_forward_and_backward(batch, channels, size, kernel, stride):
    conv = torch.nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False).double()
    ours = DepthwiseConv(conv)
    x = torch.randn(batch, channels, size, size, dtype=torch.double, requires_grad=True)
    weights = torch.randn_like(expected := conv(x))
    gradients = []
    for module in (ours, conv):
        output = module(x)
        torch.testing.assert_close(output, expected)
        gradients.append(torch.autograd.grad(output, [x, conv.weight], weights))
    for mine, torchs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, torchs)


def test_stage_table_is_torchvisions():
    expected, _ = _mobilenet_v3_conf("mobilenet_v3_large")
    assert [vars(row) for row in stage_table()] == [vars(row) for row in expected]


def test_parameters_agree_with_timm():
    """timm's 5,483,032 less its two fully connected layers (960 -> 1280 -> 1000, with biases)."""
    network = timm.create_model("mobilenetv3_large_100", pretrained=False)
    fully_connected = 960 * 1280 + 1280 + 1280 * 1000 + 1000
    assert count(network) == 5_483_032
    assert count(ImageEncoder(ImageConfig())) == count(network) - fully_connected == 2_971_952


def test_head_and_momentum_follow_the_configuration():
    encoder = ImageEncoder(ImageConfig(width=0.5, image_size=64, bn_momentum=0.2, head=(48, 24)))
    assert encoder.features == 24
    assert [type(layer).__name__ for layer in encoder.head] == ["Linear", "Hardswish", "Linear"]
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 46
    assert {(m.momentum, m.eps) for m in norms} == {(0.2, 0.001)}
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 24)


def test_reads_other_sizes_than_its_own():
    encoder = ImageEncoder(ImageConfig(width=0.5, image_size=64)).eval()
    assert encoder(torch.randn(1, 3, 100, 80)).shape == (1, 480)


def test_gradients_reach_every_parameter():
    encoder = ImageEncoder(ImageConfig(width=0.5, image_size=64, head=(16,)))
    encoder(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize(
    "failure",
    [urllib.error.URLError("no network"), TimeoutError("timed out"), RuntimeError("invalid hash value")],
    ids=lambda failure: type(failure).__name__,
)
def test_unreachable_imagenet_weights_warn_and_go_on(monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.warns(UserWarning, match="Going on with random initialisation") as caught:
        assert imagenet_trunk() is None
    message = next(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning))
    assert str(failure.args[0]) in message
    assert "mobilenet_v3_large-5c1a4163.pth" in message
    assert torch.hub.get_dir() in message


def test_training_starts_from_imagenet_weights_in_the_hub_cache(monkeypatch, tmp_path):
    """A file that was put there by hand counts, and nothing is downloaded; a model that is built asks for none."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    library = with_random_statistics(mobilenet_v3_large(weights=None))
    name = MobileNet_V3_Large_Weights.IMAGENET1K_V2.url.rsplit("/", 1)[-1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(library.state_dict(), tmp_path / "hub" / "checkpoints" / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = replace(TINY, image=ImageConfig(image_size=32, pretrained=True))
        monkeypatch.setattr(recipes, "train", lambda model, *_, **__: model)
        started = recipes.train_student(config, toy_pairs(), toy_pairs(), TrainConfig(batch_size=8), tmp_path / "run")
    for key, value in library.features.state_dict().items():
        assert torch.equal(started.image_encoder.trunk.state_dict()[key], value), key


def test_a_damaged_file_in_the_hub_cache_warns_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = MobileNet_V3_Large_Weights.IMAGENET1K_V2.url.rsplit("/", 1)[-1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / name).write_bytes(b"not a checkpoint")
    with pytest.warns(UserWarning, match="Going on with random initialisation"):
        assert imagenet_trunk() is None


def test_imagenet_weights_need_width_one():
    with pytest.raises(ConfigError, match=r"image\.pretrained"):
        ImageConfig(width=0.5, pretrained=True)
