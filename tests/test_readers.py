"""Captions from the tools that people use: read as they are meant, or a named error or a counted row."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mclip.sources.loading import load_pairs
from mclip.sources.readers import DataError

FUZZ = settings(
    max_examples=int(os.environ.get("MCLIP_FUZZ", 60)),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
NAMES = ["a.png", "b c.png", "d;e.png", "sub/f,g.png"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("tables")
    for number, name in enumerate(NAMES):
        (place / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCLIP_CACHE", str(place / "cache"))
        yield place


def read(path: Path, **options) -> list[tuple[str, str]]:
    """(picture, caption) of each pair, in order of pictures; nothing is decoded."""
    pairs = load_pairs(path, 8, decoding="always", progress=False, **options)
    return [(file, text) for file, own in zip(pairs.files, pairs.captions, strict=True) for text in own]


def attempt(path: Path, **options) -> tuple[list[tuple[str, str]], str]:
    """What is read, or the message of the DataError."""
    try:
        return read(path, **options), ""
    except DataError as error:
        return [], str(error)


def by_picture(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Captions of one picture beside each other, pictures in the order in which they come."""
    order = list(dict.fromkeys(name for name, _ in rows))
    return sorted(rows, key=lambda row: order.index(row[0]))


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=15).map(lambda text: text + "x")
PATHS = st.sampled_from(["{}", "./{}", "{root}/{}", "~/{}", "sub/../{}"])
CAPTIONS = st.lists(st.tuples(st.sampled_from(NAMES), PATHS, WORDS), min_size=1, max_size=6)


@FUZZ
@given(
    rows=CAPTIONS,
    separator=st.sampled_from(",;|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    last_end=st.booleans(),
)
def test_a_well_formed_csv_is_read_as_the_csv_module_reads_it(
    folder, monkeypatch, rows, separator, quoting, end, encoding, last_end
):
    monkeypatch.setenv("HOME", str(folder))
    table = [(path.format(name, root=folder), caption) for name, path, caption in rows]
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writerows([("file_name", "caption"), *table])
    content = text.getvalue() if last_end else text.getvalue().removesuffix(end)
    (folder / "t.csv").write_bytes(content.encode(encoding))
    theirs = [tuple(row) for row in csv.reader(io.StringIO(content, newline=""), delimiter=separator)][1:]
    assert theirs == table
    expected = [(os.path.join(folder, os.path.expanduser(path)), caption) for path, caption in theirs]
    assert read(folder / "t.csv", csv_separator=separator) == by_picture(expected)


@FUZZ
@given(rows=CAPTIONS, index=st.booleans(), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]))
def test_a_table_that_pandas_writes_is_read_as_pandas_reads_it(folder, rows, index, quoting):
    frame = pd.DataFrame({"file_name": [name for name, _, _ in rows], "caption": [text for _, _, text in rows]})
    for kind, separator in (("csv", ","), ("tsv", "\t")):
        lines = "[\r\n]" if kind == "tsv" else "\r"  # a TSV holds one row on each line
        frame["caption"] = frame["caption"].str.replace(lines, " ", regex=True)
        frame.to_csv(folder / f"t.{kind}", sep=separator, index=index, quoting=quoting)
        theirs = pd.read_csv(folder / f"t.{kind}", sep=separator, dtype=str, keep_default_na=False)
        expected = [
            (str(folder / name), text) for name, text in zip(theirs["file_name"], theirs["caption"], strict=True)
        ]
        assert read(folder / f"t.{kind}") == by_picture(expected)


ANY_TEXT = st.lists(st.sampled_from(["a.png", "cat", ",", '"', '""', "\n", "\r\n", "\t", " ", "", "é"]), max_size=25)


@FUZZ
@given(pieces=ANY_TEXT, kind=st.sampled_from(["csv", "tsv"]), encoding=st.sampled_from(["utf-8", "cp1252"]))
@example(pieces=["a.png,", '"cat', "\n", "a.png,cat"], kind="csv", encoding="utf-8")
def test_any_other_text_is_a_named_error_or_a_counted_row(folder, pieces, kind, encoding):
    header = "file_name,caption\n" if kind == "csv" else "file_name\tcaption\n"
    path = folder / f"any.{kind}"
    path.write_bytes((header + "".join(pieces)).encode(encoding))
    rows, error = attempt(path)
    assert not error or f"any.{kind}, line " in error or "no usable rows" in error
    if not error:
        text = path.read_text(encoding="utf-8")
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter="," if kind == "csv" else "\t", strict=True))
        if kind == "csv" or '"' not in text:
            assert [row for _, row in rows] == [row[1] for row in records[1:] if row and row != [" "]]
    rows, error = attempt(path, on_error="skip")
    assert rows or "no usable rows" in error


NAMED = [  # name of the file, its content, what the message says
    ("t.csv", "file_name,caption\na.png,A dog, a cat\n", "line 2: 3 fields, but the header has 2"),
    ("t.csv", 'file_name,caption\na.png,"A dog\nb.png,a cat\n', "line 2: a double quote is not closed"),
    ("t.csv", 'file_name,caption\na.png,"A dog\na.png,"a cat"\n', "line 2: a double quote is not closed"),
    ("t.csv", "file_name,caption\na.png\n", "line 2: 1 fields, but the header has 2"),
    ("t.csv", "file_name,caption\na.png,caf\u00e9\n".encode("cp1252"), "line 2: not UTF-8"),
    ("t.csv", "file_name;caption\na.png;a dog\n", r"separated by ';': pass csv_separator=';' \(--csv_separator\)"),
    ("t.csv", "filepath\ttitle\na.png\ta dog\n", r"separated by '\\t': pass csv_separator='\\t'"),
    ("t.tsv", "file_name,caption\na.png,a dog\n", "separated by ','"),
    ("t.csv", "file_name;caption;lic,ense\na.png;a dog;free\n", "separated by ';'"),
    ("t.csv", "img_1,dog\nimg_2,cat\n", r"columns are img_1, dog\. Name .*, or, if this line is data, write a header"),
    (
        "t.csv",
        "file_name, caption\na.png,a dog\n",
        r"a stray space.* pass ' caption' as caption_key \(--csv_caption_key\)",
    ),
    ("t.csv", "a.png,a dog\nb c.png,a cat\n", "the first line looks like data: write a header line"),
    ("t.csv", "file_name,Caption\na.png,a dog\n", "did you mean 'Caption'.*--csv_caption_key"),
    ("t.csv", "file_name,caption,caption\na.png,a dog,x\n", "two columns have this name"),
    ("t.csv", "file_name,caption\n".encode("utf-16-le"), "not UTF-8"),
    ("t.csv", "file_name,caption\nx".encode("utf-16") + b"\0", "not readable as UTF-16"),
    (
        "t.json",
        {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": None}]},
        "None",
    ),
    ("t.json", {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 2}]}, "no image with id 2"),
    ("t.json", {"images": [{"filename": "a.png", "sentences": [], "split": "train"}]}, "annotation 0: .*not a text"),
]


@pytest.mark.parametrize(("name", "content", "message"), NAMED)
def test_what_is_wrong_is_named(folder, name, content, message):
    content = json.dumps(content) if isinstance(content, dict) else content
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as error:
        read(folder / name)
    assert str(folder / name) in str(error.value)


def test_after_a_bad_row_the_rest_is_read(folder, capsys):
    lines = [
        "file_name,caption",
        'a.png,"open',
        "a.png,one",
        "a.png,two, three",
        'a.png,"four',
        'and five"',
        "b c.png,six",
    ]
    (folder / "t.csv").write_text("\n".join(lines), encoding="utf-8")
    rows = read(folder / "t.csv", on_error="skip")
    assert [caption for _, caption in rows] == ["one", "four\nand five", "six"]
    assert "2 rows left out" in capsys.readouterr().out


def test_a_stray_quote_in_a_tsv_is_a_character(folder):
    lines = ["file_name\tcaption", 'a.png\t"A dog', "a.png\ta cat", 'a.png\t12" tall', 'a.png\t"a ""red"" one"']
    (folder / "t.tsv").write_text("\n".join(lines), encoding="utf-8")
    assert [caption for _, caption in read(folder / "t.tsv")] == ['"A dog', "a cat", '12" tall', 'a "red" one']


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_the_columns_of_open_clip_need_no_option(folder, kind):
    separator = "," if kind == "csv" else "\t"
    (folder / f"t.{kind}").write_text(f"filepath{separator}title\n{folder}/a.png{separator}a dog\n", encoding="utf-8")
    assert read(folder / f"t.{kind}") == [(str(folder / "a.png"), "a dog")]
    assert read(folder / f"t.{kind}", csv_separator="\\t" if kind == "tsv" else "") == [
        (str(folder / "a.png"), "a dog")
    ]


def test_a_list_in_coco_is_several_captions(folder):
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": str(folder / "b c.png")}]
    captions = [(1, ["a dog", "a cat"]), (2, "a cow"), (1, None), (1, ["an ox", 3]), ([], "x")]
    annotations = [{"image_id": key, "caption": caption} for key, caption in captions]
    (folder / "t.json").write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8-sig")
    pairs = load_pairs(folder / "t.json", 8, on_error="skip", progress=False)
    assert (pairs.captions, pairs.skipped) == ([["a dog", "a cat", "an ox"], ["a cow"]], 3)


def test_the_splits_of_karpathy(folder):
    def image(name: str, split: str, *raw: str, **more: str) -> dict:
        return {"filename": name, "split": split, "sentences": [{"raw": text, "tokens": []} for text in raw], **more}

    images = [
        image("a.png", "train", "a dog", "the dog"),
        image("f,g.png", "restval", "a cow", filepath="sub"),
        image("b c.png", "val", "a cat"),
        image("d;e.png", "test", "an ox"),
    ]
    (folder / "dataset.json").write_text(json.dumps({"dataset": "coco", "images": images}), encoding="utf-8")
    found = {split: load_pairs(folder / "dataset.json", 8, split=split).captions for split in ("train", "val", "test")}
    assert found == {"train": [["a dog", "the dog"], ["a cow"]], "val": [["a cat"]], "test": [["an ox"]]}
    with pytest.raises(
        DataError, match=r"dataset\.json: no picture of the split 'dev'; it has restval, test, train, val"
    ):
        load_pairs(folder / "dataset.json", 8, split="dev")


def test_a_million_captions_are_one_array(folder):
    (folder / "t.csv").write_text("file_name,caption\na.png,a dog\nb c.png,a cat\na.png,two dogs\n", encoding="utf-8")
    pairs = load_pairs(folder / "t.csv", 8, progress=False)
    assert isinstance(pairs.captions.texts.dtype, np.dtypes.StringDType)
    assert pairs.captions == [["a dog", "two dogs"], ["a cat"]]
    assert pairs.captions[-1] == ["a cat"]
    assert pairs.captions[:1] == [["a dog", "two dogs"]]
    np.testing.assert_array_equal(pairs.first_caption, [0, 2, 3])
    with pytest.raises(IndexError):
        pairs.captions[2]
