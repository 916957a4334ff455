"""Pictures without captions beside pairs: what is read, what a batch holds, and which loss sees it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mclip import losses
from mclip.config import ConfigError, DistillConfig
from mclip.objectives import Contrastive, Distillation
from mclip.pairs import Batch, BatchSource, spread
from mclip.sources.folders import unlabelled_pictures
from mclip.sources.loading import Rows, add_unpaired, load_pairs
from mclip.sources.readers import DataError
from mclip.text_encoder import Tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Four captioned pictures, five in ``others`` without captions, and three sentences."""
    rows = ["file_name,caption"]
    for number in range(4):
        Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows += [f"{number}.png,caption {number} first", f"{number}.png,caption {number} second"]
    (tmp_path / "data.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "others").mkdir()
    for number in range(5):
        Image.new("RGB", (40, 40), (0, 0, 50 * number)).save(tmp_path / "others" / f"{number}.png")
    (tmp_path / "texts.txt").write_text("a frog\n\na toad\na newt\n", encoding="utf-8")
    return tmp_path


def joined(folder, texts="", **options):
    pairs = load_pairs(folder / "data.csv", 32, progress=False)
    path = folder / "texts.txt" if texts else ""
    return add_unpaired(pairs, folder / "others", path, image_size=32, progress=False, **options)


def test_a_link_back_up_is_not_followed_round(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert unlabelled_pictures(tmp_path) == [str(tmp_path / "a.png")]


def test_pictures_without_captions_come_after_the_pairs(folder):
    both = joined(folder, texts=True)
    assert both.paired.tolist() == [True] * 4 + [False] * 5
    assert both.captions[1] == ["caption 1 first", "caption 1 second"]
    assert sorted({text for row in range(4, 9) for text in both.captions[row]}) == ["a frog", "a newt", "a toad"]
    assert both.images[np.array([8, 1])][:, :, 16, 16].tolist() == [[0, 0, 200], [60, 0, 0]]
    assert both.picture(5).getpixel((0, 0)) == (0, 0, 50)


def test_without_sentences_every_caption_stands_beside_some_picture(folder):
    both = joined(folder)
    assert sorted({text for row in range(4, 9) for text in both.captions[row]}) == sorted(
        text for row in range(4) for text in both.captions[row]
    )


@given(st.integers(0, 6), st.integers(0, 6), st.data())
def test_two_arrays_are_indexed_as_one(first, second, data):
    one = np.arange(3 * first, dtype=np.uint8).reshape(first, 3)
    other = 100 + np.arange(3 * second, dtype=np.uint8).reshape(second, 3)
    whole, found = np.concatenate([one, other]), Rows(one, other)
    assert found.dtype == whole.dtype  # which says that they are pictures
    rows = data.draw(st.lists(st.integers(0, max(0, first + second - 1)), max_size=8 * (first + second > 0)))
    assert found.shape == whole.shape
    assert np.array_equal(found[np.array(rows, int)], whole[np.array(rows, int)])
    assert np.array_equal(found[1:5], whole[1:5])


@pytest.mark.parametrize(
    ("break_it", "names"),
    [
        (lambda folder: (folder / "others" / "0.txt").write_text("a caption"), ["0.png", "train_data_path"]),
        (lambda folder: (folder / "texts.txt").write_text(" \n"), ["texts.txt", "no sentence"]),
        (lambda folder: (folder / "texts.txt").write_bytes(b"fine\n\xff\xfe bad\n"), ["texts.txt, line 2", "UTF-8"]),
        (lambda folder: (folder / "texts.txt").write_text("fine\n\n...\n"), ["texts.txt, line 3", "no word"]),
        (lambda folder: (folder / "texts.txt").unlink(), ["texts.txt", "no such file"]),
        (lambda folder: [file.unlink() for file in (folder / "others").iterdir()], ["others", "no picture"]),
    ],
)
def test_what_cannot_be_used_is_named(folder, break_it, names):
    break_it(folder)
    with pytest.raises(DataError) as error:
        joined(folder, texts=True)
    assert all(name in str(error.value) for name in names)


def test_a_file_of_captions_is_no_folder_of_pictures(folder):
    pairs = load_pairs(folder / "data.csv", 32, progress=False)
    with pytest.raises(DataError, match="give it as train_data_path"):
        add_unpaired(pairs, folder / "data.csv", image_size=32, progress=False)


def test_scenes_take_no_photographs_beside_them(folder):
    scenes = load_pairs("scenes", 32, progress=False, data_size=0.001)
    with pytest.raises(ConfigError, match="unlabelled_data_path"):
        add_unpaired(scenes, folder / "others", image_size=32, progress=False)


@given(st.lists(st.booleans(), min_size=1, max_size=200), st.integers(1, 20))
def test_every_batch_has_its_share_of_pairs(kinds, size):
    paired = np.array(kinds)
    order = np.arange(len(paired))
    spread_out = spread(order, paired)
    assert sorted(spread_out) == order.tolist()
    assert np.array_equal(np.sort(spread_out[paired[spread_out]]), spread_out[paired[spread_out]])
    for start in range(0, len(order) - size + 1):
        share = paired[spread_out[start : start + size]].sum()
        assert abs(share - size * paired.mean()) <= 2


def test_a_batch_knows_its_pairs(folder):
    both = joined(folder, texts=True)
    source = BatchSource(both, Tokenizer(32), lambda pixels: pixels, 9, 0)
    batch = next(source.epoch(0))
    assert torch.equal(batch.paired, batch.index < 4)
    with pytest.raises(ConfigError, match="batch_size=4 cannot work: only 1"):
        BatchSource(both, Tokenizer(32), lambda pixels: pixels, 4, 0)


def test_losses_that_look_for_the_pair_see_pairs_alone():
    torch.manual_seed(0)
    image, text, teacher_image, teacher_text = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in "abcd")
    paired = torch.tensor([True, False, True, True, False, True])
    output = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(10.0)}
    batch = Batch(image, text, torch.arange(6), teacher_image, teacher_text, paired)
    config = DistillConfig(icl_weight=1.0, aligner="identity")
    objective = Distillation(config, (8, 8), 8, 10.0)
    terms = objective(output, batch, ("original", "icl", "response", "feature"), 1.0)
    pairs = image[paired], text[paired]
    assert torch.equal(terms["original"], losses.info_nce(*pairs, 10.0))
    assert torch.equal(terms["icl"], losses.icl(*pairs, teacher_image[paired], teacher_text[paired], 10.0))
    everything = Distillation(config, (8, 8), 8, 10.0)(
        output, replace(batch, paired=None), ("response", "feature"), 1.0
    )
    assert torch.equal(terms["response"], everything["response"])
    assert torch.equal(terms["feature"], everything["feature"])
    alone = Contrastive(config)(output, replace(batch, paired=None), ("original",), 1.0)["original"]
    assert not torch.equal(terms["original"], alone)


def test_icl_of_a_student_narrower_than_its_teacher_is_taken_in_the_teachers_space():
    torch.manual_seed(0)
    output = {"image_features": torch.randn(6, 4), "text_features": torch.randn(6, 4), "logit_scale": torch.tensor(9.0)}
    teacher_image, teacher_text = torch.randn(2, 6, 8)
    batch = Batch(output["image_features"], output["text_features"], torch.arange(6), teacher_image, teacher_text)
    config = DistillConfig(order=("original", "feature", "response"), feature_weight=0.0)
    objective = Distillation(config, (4, 4), 8, 10.0).eval()
    term = objective(output, batch, ("icl",), 1.0)["icl"]
    sides = objective.image_aligner(output["image_features"]), objective.text_aligner(output["text_features"])
    sides = [torch.nn.functional.normalize(side, dim=-1) for side in sides]
    assert torch.equal(term, losses.icl(*sides, teacher_image, teacher_text, 9.0))
    with torch.no_grad():  # longer vectors of the same directions
        for last in (objective.image_aligner[-1], objective.text_aligner[-1]):
            last.weight.mul_(100)
            last.bias.mul_(100)
    torch.testing.assert_close(objective(output, batch, ("icl",), 1.0)["icl"], term)
