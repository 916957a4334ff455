"""The long runs in their smallest form, and the tables that are written from results files."""

import numpy as np
import pytest
from matplotlib.image import imread

from mclip.config import PROFILES, ConfigError
from mclip.files import DATA, read_json
from mclip.recipes import load_model
from mclip.results import ResultError, load_results, weights_sha256
from mclip.scenes.world import SceneConfig, export_scenes, make_scenes
from mclip.show.tables import markdown_table, replace_block, retrieval_table, zero_shot_table
from mclip.sources.loading import load_pairs as load_scenes
from mclip.study import examples, reproduce
from mclip.study.defect_runs import MEASURES
from mclip.study.examples import prompt_sensitivity
from mclip.study.reproduce import README


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Results of a run over drawn pictures in files, as if they were photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCLIP_CACHE", str(folder / "cache"))
        patch.setattr(reproduce, "RESULTS", folder / "results")
        for split, count in (("train", 40), ("val", 16)):
            export_scenes(make_scenes(SceneConfig(count, 64, split), progress=False), folder / split)
        for index in range(12):
            source = folder / "test" / ("cat", "dog")[index % 2] / f"{index}.jpg"
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_bytes(sorted((folder / "val").rglob("*.jpg"))[index].read_bytes())
        csvs = [str(next((folder / split).glob("*.csv"))) for split in ("train", "val")]
        reproduce.photographs(
            *csvs,
            data_size=0.5,
            teacher_epochs=1,
            max_epochs=1,
            batch_size=16,
            teacher_batch_size=16,
            seeds=2,
            dataset=str(folder / "test"),
            out_dir=str(folder / "runs"),
        )
    assert not (folder / "results").exists(), "what ships is overwritten"
    return folder / "runs" / "results"


def test_photographs_leave_a_record_of_each_model_seed_and_task(photographs):
    records = load_results(photographs)
    found = sorted((r["task"], r["model"]["name"], r["seed"]) for r in records)
    expected = [("teacher", 0), *((name, seed) for name in ("base", "kd") for seed in (0, 1))]
    assert found == sorted((task, *each) for task in ("retrieval", "zero_shot") for each in expected)
    assert {r["n"] for r in records if r["task"] == "zero_shot"} == {12}


@pytest.mark.parametrize(
    ("name", "value"),
    [("data_size", 2.0), ("seeds", 0), ("max_epochs", 0), ("teacher_epochs", 0), ("batch_size", 9), ("batch_size", 1)],
)
def test_photographs_look_at_their_options_before_the_teacher_is_trained(name, value, monkeypatch):
    monkeypatch.setattr(reproduce, "train_open_clip", lambda *_, **__: pytest.fail("the teacher was trained"))
    monkeypatch.setattr(
        reproduce, "load_pairs", lambda *_: load_scenes("scenes", 64, scenes=SceneConfig(16, 64, "val"), progress=False)
    )
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        reproduce.photographs("train.csv", "val.csv", **{"data_size": 0.5, name: value})


def test_tables_hold_the_mean_of_the_seeds(photographs):
    records = load_results(photographs)
    values = [
        r["metrics"]["image_to_text"]["r5"]["value"]
        for r in records
        if r["task"] == "retrieval" and r["model"]["name"] == "kd"
    ]
    table = retrieval_table(records)
    assert table["image to text, R@5"]["kd"]["value"] == pytest.approx(sum(values) / 2)
    text = markdown_table(table | zero_shot_table(records), ("base", "kd", "teacher", "absent"))
    assert len(text.splitlines()) == 2 + len(table) + 1
    assert f"| {sum(values) / 2:.1f} (" in next(row for row in text.splitlines() if "image to text, R@5" in row)
    assert all(row.endswith("|  |") for row in text.splitlines()[2:])


def test_a_block_is_replaced_and_nothing_else():
    text = "before\n<!-- a -->\nold\n<!-- end -->\nbetween\n<!-- b -->\n<!-- end -->\nafter\n"
    assert replace_block(text, "a", "new") == text.replace("old", "new")
    assert replace_block(replace_block(text, "b", "x"), "b", "y") == replace_block(text, "b", "y")
    with pytest.raises(ResultError, match="<!-- c -->"):
        replace_block(text, "c", "new")


def test_the_readme_holds_what_the_results_files_say():
    text = reproduce.README.read_text(encoding="utf-8")
    kinds = [load_results(DATA / "results" / kind) for kind in ("ablations", "defects")]
    for name, table in reproduce.readme_tables(reproduce.scene_results(), *kinds).items():
        assert replace_block(text, name, table) == text, f"run `make figures`: the table {name!r} is out of date"


def test_a_damaged_results_file_is_named(tmp_path):
    (tmp_path / "bench.json").write_text('{"parts": {\n "steps": [', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bench\.json: line 2 is not JSON"):
        read_json(tmp_path / "bench.json")
    with pytest.raises(ConfigError, match="no such file"):
        read_json(tmp_path / "other.json")


def test_make_figures_draws_every_committed_figure_from_the_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "FIGURES", tmp_path)
    monkeypatch.setattr(reproduce, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("train_student", "train_open_clip", "load_model", "load_data"):
        monkeypatch.setattr(reproduce, name, None)
    reproduce.figures()
    committed = DATA.parent / "figures"
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in committed.glob("*.png")}
    for path in committed.glob("*.png"):
        ours, drawn = imread(path), imread(tmp_path / path.name)
        assert ours.shape == drawn.shape, path.name
        # Fonts and rounding differ between machines; the picture may not.
        assert np.abs(ours - drawn).mean() < 0.02, f"{path.name}: run `make figures`"


def test_wordings_and_pairs_are_those_of_the_file():
    shown = read_json(DATA / "results" / "examples.json")
    fig = prompt_sensitivity({name: one["wordings"] for name, one in shown["models"].items()})
    drawn = [container.lines[0].get_xdata()[0] for container in fig.axes[0].containers]
    assert drawn == [m["value"] for one in shown["models"].values() for m in one["wordings"].values()]
    for one in shown["models"].values():
        assert np.shape(one["cosines"]) == (len(shown["captions"]),) * 2


def test_what_was_measured_of_the_student_that_ships_names_its_weights():
    results = DATA / "results"
    defects = [r for r in load_results(results / "defects") if r["details"]["configuration"]["defect"] in MEASURES]
    grounding = [r for r in load_results(results / "grounding") if r["model"]["name"] == "kd"]
    assert (len(defects), len(grounding)) == (len(MEASURES), 1)
    models = [r["model"] for r in defects + grounding] + [read_json(results / "examples.json")["models"]["kd"]["model"]]
    assert {model["sha256"] for model in models} == {weights_sha256(load_model("kd")[0])}


@pytest.fixture
def without_work(monkeypatch, tmp_path) -> list[str]:
    """What the long runs would write, in place of the work; a data folder of its own takes what they write anyway."""
    written: list[str] = []

    def students(out, *_):
        for name in ("base", "kd"):
            (out / f"{name}-0").mkdir(parents=True, exist_ok=True)
            (out / f"{name}-0" / "log.jsonl").write_text("{}\n", encoding="utf-8")
        return {}

    def record(path):
        written.append(str(path.relative_to(tmp_path)))

    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "data")
    monkeypatch.setattr(reproduce, "_students", students)
    monkeypatch.setattr(reproduce, "train_student", lambda *_, **__: None)
    monkeypatch.setattr(reproduce, "load_data", lambda *_, **__: (None, None))
    monkeypatch.setattr(reproduce, "load_model", lambda *_: None)
    monkeypatch.setattr(reproduce, "evaluate_all", lambda *_, save_results, **__: record(save_results))
    monkeypatch.setattr(reproduce, "compare_all", lambda *_, save_results: record(save_results))
    monkeypatch.setattr(reproduce, "_ship", lambda models: written.append("checkpoints"))
    monkeypatch.setattr(reproduce, "figures", lambda: written.append("figures"))
    return written


def test_the_long_run_ships_what_the_committed_settings_give_and_nothing_else(without_work, tmp_path):
    reproduce.reproduce(seeds=1, profile="smoke", out_dir=str(tmp_path / "runs"))
    assert {place.split("/results/")[0] for place in without_work} == {"runs"}
    assert not (tmp_path / "data").exists()
    without_work.clear()
    reproduce.reproduce(seeds=1, out_dir=str(tmp_path / "runs"))
    assert set(without_work) == {"data/teacher", "data/seed-0", "checkpoints", "figures"}
    logs = tmp_path / "data" / "logs"
    assert {path.name: path.read_text(encoding="utf-8") for path in logs.iterdir()} == {
        "base.jsonl": "{}\n",
        "kd.jsonl": "{}\n",
    }


def test_views_of_other_settings_do_not_ship(without_work, tmp_path):
    reproduce.views(views=2, out_dir=str(tmp_path / "runs"))
    assert set(without_work) == {"runs/results"}
    without_work.clear()
    reproduce.views(out_dir=str(tmp_path / "runs"))
    assert set(without_work) == {"data/views", "figures"}


def test_a_log_is_written_whole_or_not_at_all(without_work, tmp_path, monkeypatch):
    def cut_off(source, target):
        target.write_text("{", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce.shutil, "copyfile", cut_off)
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce(seeds=1, out_dir=str(tmp_path / "runs"))
    assert not list((tmp_path / "data").rglob("*.jsonl"))


def test_examples_of_other_settings_do_not_ship(monkeypatch, tmp_path):
    monkeypatch.setattr(examples, "FILE", tmp_path / "data" / "examples.json")
    monkeypatch.setattr(examples, "MODELS", ("kd",))
    monkeypatch.setattr(examples, "get_profile", lambda _: PROFILES["smoke"])
    monkeypatch.setattr(examples, "WORDINGS", ("a {}",))
    examples.examples(pairs=3, out_dir=str(tmp_path / "runs"))
    assert not (tmp_path / "data").exists()
    assert len(read_json(tmp_path / "runs" / "results" / "examples.json")["captions"]) == 3
