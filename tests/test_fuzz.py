"""Files from outside, damaged at random: every reader answers with its own error, or with data, and nothing else."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mclip.config import ConfigError, DistillConfig, ImageConfig, ModelConfig, TextConfig
from mclip.model import MobileCLIP, ModelError
from mclip.recipes import from_yaml
from mclip.results import ResultError, load_results
from mclip.sources.loading import load_pairs
from mclip.sources.readers import DataError

TINY = ModelConfig(
    "tiny", 8, ImageConfig(0.25, 32), TextConfig(width=8, heads=2, kernels=(3,), feed_forward=8, embedding_rank=2)
)
FUZZ = settings(
    max_examples=int(os.environ.get("MCLIP_FUZZ", 60)),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """``whole`` cut, overwritten or lengthened somewhere; or other bytes altogether."""
    place = st.integers(0, max(0, len(whole) - 1))
    return st.one_of(
        st.binary(max_size=200),
        st.builds(lambda at: whole[:at], place),
        st.builds(lambda at, new: whole[:at] + new + whole[at + len(new) :], place, st.binary(min_size=1, max_size=8)),
        st.builds(lambda at, new: whole[:at] + new + whole[at:], place, st.binary(min_size=1, max_size=8)),
    )


def read(reader: Callable[[], object], errors: type[Exception] | tuple[type[Exception], ...], name: str) -> object:
    """What ``reader`` returns; None for one of ``errors``, which must name the file."""
    try:
        return reader()
    except errors as error:
        message = str(error)
    assert name in message
    return None


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three pictures, to be named by the files under test."""
    place = tmp_path_factory.mktemp("fuzz")
    for name in ("a", "b", "c"):
        Image.fromarray(np.full((40, 48, 3), ord(name), np.uint8)).save(place / f"{name}.jpg")
    return place


CSV = b'file_name,image_path,caption\na.jpg,.,a red star\nb.jpg,.,"a ring, blue"\nc.jpg,,the moon\n'
COCO = json.dumps(
    {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [
            {"id": 7, "image_id": 1, "caption": "a red star"},
            {"id": 8, "image_id": 2, "caption": "a ring"},
        ],
    }
).encode()
YAML = b"phases: [0.1, 0.4, 0.9]\nbalancers: [gradient_norm, fixed]\nfeature_weight: 3.0\naligner: mlp\n"


@FUZZ
@given(content=damaged(CSV), on_error=st.sampled_from(["raise", "skip"]))
def test_csv(folder, content, on_error):
    (folder / "pairs.csv").write_bytes(content)
    pairs = read(
        lambda: load_pairs(folder / "pairs.csv", 32, on_error=on_error, progress=False), DataError, "pairs.csv"
    )
    assert pairs is None or len(pairs) == len(pairs.captions) >= 1


@FUZZ
@given(content=damaged(COCO), on_error=st.sampled_from(["raise", "skip"]))
def test_coco_json(folder, content, on_error):
    (folder / "pairs.json").write_bytes(content)
    source = folder / "pairs.json"
    pairs = read(lambda: load_pairs(source, 32, on_error=on_error, progress=False), DataError, "pairs.json")
    assert pairs is None or len(pairs) >= 1


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["images", "annotations", "id", "image_id", "file_name", "caption"]), inner)
    ),
    max_leaves=12,
)


@FUZZ
@given(value=JSON_VALUES)
def test_json_of_another_shape(folder, value):
    (folder / "shape.json").write_text(json.dumps(value), encoding="utf-8")
    read(lambda: load_pairs(folder / "shape.json", 32, on_error="skip", progress=False), DataError, "shape.json")


@FUZZ
@given(content=damaged(YAML))
def test_yaml(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "terms.yaml"
    path.write_bytes(content)
    terms = read(lambda: from_yaml(DistillConfig, path), ConfigError, "")
    assert terms is None or isinstance(terms, DistillConfig)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_pictures(tmp_path, kind):
    name = tmp_path / f"whole.{kind.lower()}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(name, kind)
    (tmp_path / "one.csv").write_text(f"file_name,caption\n{name.name},a star\n", encoding="utf-8")
    whole = name.read_bytes()

    @FUZZ
    @given(content=damaged(whole))
    def check(content):
        name.write_bytes(content)
        pairs = read(lambda: load_pairs(tmp_path / "one.csv", 32, progress=False), DataError, name.name)
        assert pairs is None or pairs.images.shape == (1, 3, 32, 32)

    check()


def test_a_decompression_bomb_is_refused(tmp_path):
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    (tmp_path / "one.csv").write_text("file_name,caption\nbomb.png,a star\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"one\.csv, line 2.*bomb\.png.*decompression bomb"):
        load_pairs(tmp_path / "one.csv", 32, progress=False)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_model_folder(tmp_path, name):
    MobileCLIP(TINY).save_pretrained(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()

    @settings(FUZZ, max_examples=25)
    @given(content=damaged(whole))
    def check(content):
        path.write_bytes(content)
        read(lambda: MobileCLIP.from_pretrained(tmp_path), (ModelError, ConfigError), str(tmp_path))

    check()


def test_results_file(tmp_path):
    source = Path(__file__).parents[1] / "data" / "results" / "grounding.json"
    whole = json.dumps(json.loads(source.read_text(encoding="utf-8"))[:2]).encode()

    @FUZZ
    @given(content=damaged(whole))
    def check(content):
        (tmp_path / "record.json").write_bytes(content)
        read(lambda: load_results(tmp_path), ResultError, "record.json")

    check()
