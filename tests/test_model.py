"""The student as a whole: its sizes, its outputs and its files."""

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from mclip.config import PRESETS, ImageConfig, ModelConfig, TextConfig
from mclip.model import MobileCLIP, ModelError, ProjectionHead
from mclip.pictures import PictureError
from mclip.recipes import load_student
from mclip.show.figures import CLIP_VIT_B32_PARAMETERS, parameter_counts

SMALL = ModelConfig(
    "small",
    16,
    ImageConfig(width=0.25, image_size=64),
    TextConfig(width=16, heads=2, kernels=(3,), feed_forward=16, context_length=16, embedding_rank=4),
)


@pytest.fixture
def model() -> MobileCLIP:
    """A small student whose BatchNorm has seen a batch, so that no stored value is still at its start."""
    torch.manual_seed(0)
    student = MobileCLIP(SMALL)
    student(torch.randn(4, 3, 64, 64), student.tokenizer(["a dog", "a cat", "a red bird", "two birds"]))
    return student.eval()


def counts_of(config: ModelConfig) -> dict[str, int]:
    """Parameter counts without allocating weights."""
    with torch.device("meta"):
        return parameter_counts(MobileCLIP(config))


# --- sizes


def test_klmobile_has_the_published_size_and_reduction():
    total = counts_of(PRESETS["klmobile"])["total"]
    assert total == pytest.approx(65_315_793, rel=0.01)
    assert 100 * (1 - total / CLIP_VIT_B32_PARAMETERS) == pytest.approx(56.8, abs=0.5)
    narrow = dataclasses.replace(PRESETS["klmobile"], embed_dim=512)
    assert counts_of(narrow)["total"] == pytest.approx(51.9e6, rel=0.01)


def test_mobile_presets_are_small():
    course, mobile_256, mobile_512 = (
        counts_of(PRESETS[name])["total"] for name in ("course", "mobile-256", "mobile-512")
    )
    assert course < 3e6 < mobile_256 < mobile_512 < 20e6
    assert 1 - mobile_512 / CLIP_VIT_B32_PARAMETERS > 0.87


def test_clip_vit_b32_is_counted_right():
    with torch.device("meta"):
        teacher = open_clip.create_model("ViT-B-32", pretrained=None, device="meta")
    assert sum(p.numel() for p in teacher.parameters()) == CLIP_VIT_B32_PARAMETERS


def test_parts_add_up(model):
    counts = parameter_counts(model)
    assert list(counts) == [
        "image_encoder",
        "text_encoder",
        "token_embedding",
        "image_projection",
        "text_projection",
        "other",
        "total",
    ]
    total = counts.pop("total")
    assert sum(counts.values()) == total == sum(p.numel() for p in model.parameters())
    assert counts["token_embedding"] == 49408 * 4 + 4 * 16
    assert counts["other"] == 2


# --- outputs


def test_projection_head_is_its_formula():
    torch.manual_seed(0)
    head, x = ProjectionHead(6, 4), torch.randn(3, 6)
    up, _, down = head.residual
    summed = head.shortcut(x) + down(torch.nn.functional.gelu(up(x)))
    centred = summed - summed.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(x), expected)


def test_forward_agrees_with_the_encoders(model):
    images, tokens = torch.randn(2, 3, 64, 64), model.tokenizer(["a dog", "a red bird"])
    out = model(images, tokens)
    torch.testing.assert_close(out["image_features"], model.encode_image(images, normalize=True))
    torch.testing.assert_close(out["text_features"], model.encode_text(tokens, normalize=True))
    for key in ("image_features", "text_features"):
        assert out[key].shape == (2, 16)
        torch.testing.assert_close(out[key].norm(dim=1), torch.ones(2))
    torch.testing.assert_close(model.image_projection(out["image_penultimate"]), model.encode_image(images))
    torch.testing.assert_close(model.text_projection(out["text_penultimate"]), model.encode_text(tokens))
    assert out["logit_scale"].item() == pytest.approx(1 / 0.07)
    assert out["logit_bias"].item() == -10


def test_logit_scale_is_capped_and_can_come_back(model):
    images, tokens = torch.randn(2, 3, 64, 64), model.tokenizer(["a dog", "a red bird"])
    with torch.no_grad():
        model.logit_scale.fill_(np.log(150))
    scale = model(images, tokens)["logit_scale"]
    assert scale.item() == 100
    scale.backward()
    assert model.logit_scale.grad.item() == pytest.approx(150, rel=1e-4)


def test_keys_are_those_of_open_clip(model):
    vision = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    theirs = open_clip.CLIP(8, vision, text, output_dict=True)
    tokens = open_clip.tokenize(["a dog"], context_length=16)
    assert theirs(torch.randn(1, 3, 32, 32), tokens).keys() <= model(torch.randn(1, 3, 64, 64), tokens).keys()


def test_it_learns_to_tell_a_few_pairs_apart():
    """A wrong sign, a detached branch or a dead gradient would keep eight pairs at chance."""
    torch.manual_seed(0)
    config = ModelConfig("small", 32, ImageConfig(width=0.25, image_size=32, bn_momentum=0.1), SMALL.text)
    student = MobileCLIP(config)
    images = torch.randn(8, 3, 32, 32)
    colours = ("red", "green", "blue", "black", "white", "pink", "brown", "grey")
    tokens = student.tokenizer([f"a {colour} bird" for colour in colours])
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(40):
        out = student(images, tokens)
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


def test_preprocess_keeps_the_proportions_and_normalises(model):
    wide = Image.new("L", (200, 100), 255)
    wide.paste(0, (0, 0, 50, 100))  # outside the centre square of 100
    tensor = model.preprocess(wide)
    assert tensor.shape == (3, 64, 64)
    white = (1 - torch.tensor(model.MEAN)) / torch.tensor(model.STD)
    torch.testing.assert_close(tensor[:, :, 4:], white[:, None, None].expand(3, 64, 60), atol=0.1, rtol=0)


# --- files


def test_round_trip_is_bit_exact(model, tmp_path):
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = MobileCLIP.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == SMALL
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        stored = loaded.state_dict()[key]
        assert stored.dtype == value.dtype, key
        assert torch.equal(stored, value), key
    images, tokens = torch.randn(2, 3, 64, 64), model.tokenizer(["a dog", "a red bird"])
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))
    assert torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == ["config.json", "model.safetensors"]


def test_half_precision_file_is_half_as_large_and_rounds_once(model, tmp_path):
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", half=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    loaded = MobileCLIP.from_pretrained(tmp_path / "half")
    for key, value in model.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[key], expected), key
    loaded.save_pretrained(tmp_path / "again", half=True)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "again")]
    assert files[0] == files[1]


def test_a_weight_that_half_precision_cannot_hold_is_an_error(model, tmp_path):
    with torch.no_grad():
        model.logit_bias.fill_(1e6)
    with pytest.raises(ModelError, match="logit_bias"):
        model.save_pretrained(tmp_path, half=True)
    assert list(tmp_path.iterdir()) == []


def test_loading_does_not_ask_for_imagenet_weights(tmp_path):
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        config = ModelConfig("p", 8, ImageConfig(), SMALL.text)
        MobileCLIP(config).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["config"]["image"]["pretrained"] = True
    (tmp_path / "config.json").write_text(json.dumps(record))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load_student(tmp_path, config).config.image.pretrained


def forget_hash(folder: Path) -> None:
    """Make ``folder`` one of before hashes were kept."""
    record = json.loads((folder / "config.json").read_text())
    del record["sha256"]
    (folder / "config.json").write_text(json.dumps(record))


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def test_missing_folder_or_file_is_named(saved):
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        MobileCLIP.from_pretrained(saved / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors in it"):
        MobileCLIP.from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not the settings of a student"),
        ("\xff", "not the settings of a student"),
        ('{"embed_dim": 512, "vision_cfg": {}}', "another kind of model"),
        ("[]", "another kind of model"),
        ('{"kind": "mclip.MobileCLIP"}', "give a mapping of settings"),
        ('{"kind": "mclip.MobileCLIP", "config": {"embed_dims": 16}}', "did you mean 'embed_dim'"),
        ('{"kind": "mclip.MobileCLIP", "config": {"embed_dim": -1}}', "embed_dim=-1"),
    ],
)
def test_a_configuration_that_is_not_ours_is_refused(saved, text, message):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=message) as caught:
        MobileCLIP.from_pretrained(saved)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "pickle"])
def test_damaged_weights_are_refused(saved, damage, hashed):
    if not hashed:
        forget_hash(saved)
    path = saved / "model.safetensors"
    content = path.read_bytes()
    if damage == "pickle":
        torch.save({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "garbage": b"\x00" * 64, "empty": b""}[damage])
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged"):
        MobileCLIP.from_pretrained(saved)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_must_fit_exactly(saved, change):
    state = load_file(saved / "model.safetensors")
    if change == "missing":
        del state["logit_scale"]
    elif change == "unexpected":
        state["teacher.weight"] = torch.zeros(2)
    else:
        state["text_encoder.norm.weight"] = torch.zeros(2)
    save_file(state, saved / "model.safetensors")
    forget_hash(saved)
    with pytest.raises(ModelError, match=r"does not fit config\.json"):
        MobileCLIP.from_pretrained(saved)


def test_a_flipped_bit_in_the_middle_is_found_and_a_folder_without_a_hash_still_loads(saved, model):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged.*config\.json\); copy or save it again"):
        MobileCLIP.from_pretrained(saved)
    model.save_pretrained(saved)
    forget_hash(saved)
    MobileCLIP.from_pretrained(saved)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "CMYK"])
def test_preprocess_sees_what_a_viewer_shows(model, mode):
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1)))
    pictures = {
        "RGBA": Image.merge("RGBA", [Image.new("L", (64, 64))] * 3 + [ImageOps.invert(ramp)]),
        "LA": Image.merge("LA", [Image.new("L", (64, 64)), ImageOps.invert(ramp)]),
        "P": ramp.convert("P"),
        "I;16": Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257),
        "CMYK": ramp.convert("RGB").convert("CMYK"),
    }
    torch.testing.assert_close(model.preprocess(pictures[mode]), model.preprocess(ramp), atol=0.02, rtol=0)


def test_preprocess_turns_a_picture_upright_and_names_one_that_cannot_be_read(model, tmp_path):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 90, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    assert torch.equal(model.preprocess(Image.open(tmp_path / "lying.png")), model.preprocess(wide))
    content = (tmp_path / "lying.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(PictureError, match=r"cut\.png: not readable as a picture"):
        model.preprocess(Image.open(tmp_path / "cut.png"))


def test_a_configuration_that_disagrees_is_named_with_both_values(saved):
    other = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, kernels=(5,)))
    with pytest.raises(ModelError, match=r"text\.kernels was \(3,\) and is now \(5,\)"):
        load_student(saved, other)
    with pytest.raises(ModelError, match="embed_dim was 16 and is now 32"):
        load_student(saved, dataclasses.replace(SMALL, embed_dim=32))
    assert load_student(saved, dataclasses.replace(SMALL, name="other")).config == SMALL


def test_a_folder_that_cannot_be_written_is_named_and_the_old_model_stays(saved, model):
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="cannot write here"):
        model.save_pretrained(saved / "config.json")
    assert (saved / "model.safetensors").read_bytes() == before


def test_an_interrupted_save_leaves_the_old_model(saved, model, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()

    def interrupted(state, path):
        path.write_bytes(b"half of a file")
        raise OSError("disk full")

    monkeypatch.setattr("mclip.model.save_file", interrupted)
    with pytest.raises(ModelError, match="disk full"):
        model.save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
