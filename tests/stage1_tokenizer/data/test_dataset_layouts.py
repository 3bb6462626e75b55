"""Layouts of real data sets: names of splits, system folders, tables next to images, and cells of every Arrow type."""

import io
import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.image_processor import ImageProcessor
from stage1_tokenizer.data.source_splits import find_split_roles, sort_naturally
from stage1_tokenizer.data.sources import ImageSource, UnreadableImage, open_source
from stage1_tokenizer.data.statistics import dataset_statistics
from training_harness.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")


def encode_image(kind: str = "PNG", colour: tuple[int, int, int] = (200, 0, 0)) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), colour).save(buffer, kind)
    return buffer.getvalue()


PNG = encode_image()


@pytest.fixture(autouse=True)
def temporary_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_files(root: Path, *paths: str, content: bytes = PNG) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def write_rows(path: Path, rows: int = 3, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pq.write_table(pa.table({"image": pa.array([PNG] * rows)} | columns), file)
    return path


def count_images(source: ImageSource) -> tuple[int, int | None]:
    """Count the images for training and validation, and those of the test split."""
    ids = {split.source_id(i) for split in (source.train, source.validation) for i in range(len(split))}
    return len(ids), None if source.test is None else len(source.test)


# Names of splits


@pytest.mark.parametrize(
    "names",
    [
        "train2017 val2017 test2017",
        "training_set test_set",
        "images_train images_val",
        "TrainingSet TestSet",
        "train-images-256x256 dev-images-256x256",
        "seg_train seg_test",
        "DIV2K_train_HR DIV2K_valid_HR",
        "trainset testset",
    ],
)
def test_folders_with_common_split_names_are_splits(names, tmp_path):
    source = open_source(
        write_files(tmp_path, *(f"{name}/{kind}/1.png" for name in names.split() for kind in ("cat", "dog")))
    )
    assert source.label_names == ("cat", "dog")
    with_test = "est" in names
    assert (source.test is not None) == with_test


@pytest.mark.parametrize(
    "names",
    [
        "trains testimonials training_shoes",
        "training-shoes test-tubes",
        "valid invalid",
        "latest greatest",
        "train bus",
        "test_1 test_2",
        "blood_test stress_test",
    ],
)
def test_class_folders_with_names_similar_to_splits_are_classes(names, tmp_path):
    source = open_source(write_files(tmp_path, *(f"{name}/1.png" for name in names.split())))
    assert source.label_names == tuple(sorted(names.split()))
    assert source.test is None


@pytest.mark.parametrize("inner", ["images", "training_set"])
def test_a_single_folder_with_a_neutral_name_in_a_split_is_no_class(inner, tmp_path):
    test = inner.replace("training", "test")
    paths = [f"training_set/{inner}/{kind}/1.png" for kind in ("cat", "dog")] + [f"test_set/{test}/cat/1.png"]
    assert open_source(write_files(tmp_path, *paths)).label_names == ("cat", "dog")


def test_evaluation_is_the_test_split_if_there_is_a_validation_split():
    assert find_split_roles(["training", "evaluation"])["evaluation"] == "validation"
    assert find_split_roles(["training", "validation", "evaluation"])["evaluation"] == "test"


def test_splits_below_class_folders_are_splits(tmp_path):
    source = open_source(write_files(tmp_path, *(f"{k}/{s}/1.png" for k in ("cat", "dog") for s in ("train", "test"))))
    assert source.label_names == ("cat", "dog")
    assert count_images(source) == (2, 2)


def test_the_two_domains_of_unpaired_translation_are_classes(tmp_path):
    source = open_source(write_files(tmp_path, *(f"{split}{d}/1.png" for split in ("train", "test") for d in "AB")))
    assert source.label_names == ("A", "B")
    assert count_images(source) == (2, 2)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("default/train/0000", "default/test/0000"),
        ("mnist-train", "mnist-test"),
        ("train-00000-of-00002", "test-00000-of-00001-a09b74b3ef9c3b56"),
        ("all/partial-train/0000", "all/partial-test/0000"),
        ("split=train/part-0", "split=test/part-0"),
        ("training_set", "test_set"),
    ],
)
def test_parquet_is_split_by_files_or_folders(train, test, tmp_path):
    write_rows(tmp_path / f"{train}.parquet", 5)
    write_rows(tmp_path / f"{test}.parquet", 2)
    assert count_images(open_source(tmp_path)) == (5, 2)


def test_parquet_files_with_other_names_are_the_train_split(tmp_path):
    for name in ("trains", "contest", "testimonials"):
        write_rows(tmp_path / f"{name}.parquet", 2)
    assert count_images(open_source(tmp_path)) == (6, None)


def test_the_word_of_a_split_is_a_separate_word():
    assert find_split_roles(["my_train", "retrain", "train_val", "train of thought", "dev1"]) == {
        "train_val": "train",
        "dev1": "validation",
    }


# Files


@pytest.mark.parametrize(
    "junk", ["@eaDir/a.jpg", "#recycle/b.png", "$RECYCLE.BIN/c.png", "System Volume Information/d.png", "lost+found/e.png",
             "__MACOSX/f.png", ".ipynb_checkpoints/g.png", "cat/@eaDir/h.png/SYNOPHOTO_THUMB_M.png", "cat/._1.png"]
)  # fmt: skip
def test_files_of_operating_systems_are_no_images(junk, tmp_path):
    write_files(tmp_path, "cat/1.png", "dog/1.png", junk)
    write_files(tmp_path, "cat/Thumbs.db", "dog/desktop.ini", ".DS_Store", content=b"\xd0\xcf\x11\xe0")
    source = open_source(tmp_path)
    assert source.label_names == ("cat", "dog")
    assert count_images(source) == (2, None)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("name", ["0001", "3f9c01d2", "a.9e107d9d372bb682", "b.jpg?w=64"])
def test_an_image_without_an_extension_is_recognized_by_its_first_bytes(name, kind, tmp_path):
    write_files(tmp_path, name, content=encode_image(kind))
    write_files(tmp_path, "README", content=b"BMP, GIF8 and\nPNG pictures\n")
    write_files(tmp_path, "LICENSE", "Pypi", content=b"P5 is a permission\n")
    source = open_source(tmp_path)
    assert source.train.source_id(0) == name
    assert len(source.train) == 1


def test_the_error_for_a_folder_without_images_lists_its_extensions(tmp_path):
    with pytest.raises(UserError, match=r"2 \.heic, 1 no extension"):
        open_source(write_files(tmp_path, "a.heic", "b.HEIC", "README", content=b"text"))


def test_tables_without_images_are_ignored_if_there_are_image_files(tmp_path):
    write_files(tmp_path, "00000/1.png", "00000/2.png")
    for name in ("00000.parquet", "metadata.parquet"):
        with (tmp_path / name).open("wb") as file:
            pq.write_table(pa.table({"url": ["x"], "hash": [b"0123"]}), file)
    write_files(tmp_path, "torn.parquet", content=b"PAR1")
    assert count_images(open_source(tmp_path)) == (2, None)
    write_rows(tmp_path / "rows.parquet", 7)
    (tmp_path / "torn.parquet").unlink()
    assert count_images(open_source(tmp_path)) == (7, None)


@pytest.mark.parametrize(
    "name", ["d [v2]", "a*b", "q?x", "{a,b}", "x::y", "a%20b#c", "é", "e\u0301", os.fsdecode(b"\xe9")]
)
def test_a_parquet_folder_with_any_name_opens(name, tmp_path):
    write_rows(tmp_path / name / "train [0].parquet")
    source = open_source(tmp_path / name)
    assert count_images(source) == (3, None)
    assert source.train.image(0).size == (6, 4)


def test_names_that_differ_only_in_unicode_normalization_are_two_classes(tmp_path):
    source = open_source(write_files(tmp_path, "caf\u00e9/1.png", "cafe\u0301/1.png"))
    assert len(source.label_names) == 2
    assert source.train.source_id(0) != source.validation.source_id(0)


def test_a_class_name_that_is_not_utf8_can_be_written_as_json(tmp_path):
    source = open_source(write_files(tmp_path, os.fsdecode(b"\xe9/1.png"), "dog/1.png"))
    assert json.loads(json.dumps(source.label_names).encode()) == ["\\xe9", "dog"]


# Classes


def test_classes_are_in_natural_order():
    assert sort_naturally(["10", "2", "1", "02", "0"]) == ["0", "1", "02", "2", "10"]
    assert sort_naturally(["-1", "1.5", "-10", "0"]) == ["-10", "-1", "0", "1.5"]
    assert sort_naturally(["img10", "img9", "dog", "img"]) == ["dog", "img", "img9", "img10"]
    assert sort_naturally(["9" * 5000, "8" * 5000 + "x"]) == ["8" * 5000 + "x", "9" * 5000]


def test_a_source_states_why_it_has_no_classes(tmp_path):
    assert (
        open_source(write_files(tmp_path / "both", "cat/1.png", "dog/1.png")).describe_classes()
        == "2 classes: cat, dog"
    )
    mixed = open_source(write_files(tmp_path / "mixed", "cat/1.png", "dog/1.png", "stray.png"))
    assert mixed.describe_classes().startswith("no classes: stray.png is in no class folder, unlike the images in cat")
    flat = open_source(write_files(tmp_path / "flat", "1.png", "2.png"))
    assert flat.describe_classes() == "no classes: there are no class folders"
    one = open_source(write_files(tmp_path / "one", "train/cat/1.png", "train/cat/2.png", "val/cat/3.png"))
    assert one.describe_classes() == "no classes: all images are of one class, cat"
    fractions = write_rows(tmp_path / "f.parquet", label=pa.array([0.5, 1.0, 2.0]))
    assert "fractions" in open_source(fractions).describe_classes()
    hidden = write_rows(tmp_path / "h.parquet", label=pa.nulls(3, pa.int64()))
    assert "holds no labels" in open_source(hidden).describe_classes()


def test_with_one_image_a_class_all_are_in_train_and_one_is_in_both_splits(tmp_path):
    source = open_source(write_files(tmp_path, *(f"{i}/1.png" for i in range(30))))
    assert source.classes_without_images == ()
    assert len(source.train) == 30
    assert len(source.validation) == 1


def test_no_class_loses_its_only_image_to_validation(tmp_path):
    paths = [f"{i}/1.png" for i in range(40)] + [f"many/{i}.png" for i in range(200)]
    source = open_source(write_files(tmp_path, *paths))
    assert source.classes_without_images == ()
    held_out = {source.validation.source_id(i).split("/")[0] for i in range(len(source.validation))}
    assert held_out == {"many"}
    assert len(source.train) + len(source.validation) == 240


def test_a_readable_image_is_added_to_a_validation_split_of_broken_ones(tmp_path):
    names = [f"{i}.png" for i in range(6)]
    (broken,) = (s.source_id(i) for s in [open_source(write_files(tmp_path, *names)).validation] for i in range(len(s)))
    write_files(tmp_path, broken, content=b"")
    source = open_source(tmp_path)
    assert [source.validation.is_readable(i) for i in range(len(source.validation))].count(True) == 1
    assert len(source.train) == 4


def test_stored_label_names_decide_the_labels_if_the_classes_are_the_same(tmp_path):
    source = open_source(write_files(tmp_path, *(f"{i}/1.png" for i in (1, 2, 10))))
    assert source.label_names == ("1", "2", "10")
    reordered = source.with_label_order(["1", "10", "2"])
    assert reordered.label_names == ("1", "10", "2")
    for i in range(3):
        assert reordered.label_names[reordered.train.label(i)] == source.label_names[source.train.label(i)]
    assert source.with_label_order(["1", "2", "3"]) is source
    assert source.with_label_order(None) is source


# Cells


def cell_types() -> dict[str, pa.Array]:
    cells = {
        "binary": pa.array([PNG] * 3),
        "large": pa.array([PNG] * 3, pa.large_binary()),
        "view": pa.array([PNG] * 3, pa.binary_view()),
        "fixed": pa.array([PNG] * 3, pa.binary(len(PNG))),
        "dictionary": pa.array([PNG] * 3).dictionary_encode(),
        "list": pa.array([[PNG]] * 3),
        "large list": pa.array([[PNG]] * 3, pa.large_list(pa.large_binary())),
        "fixed list": pa.array([[PNG]] * 3, pa.list_(pa.binary(), 1)),
    }
    for content in (pa.binary(), pa.large_binary(), pa.binary_view()):
        for path in (pa.string(), pa.large_string(), pa.string_view()):
            kind = pa.struct([("bytes", content), ("path", path)])
            cells[f"{content} {path}"] = pa.array([{"bytes": PNG, "path": None}] * 3, kind)
    fixed = pa.struct([("bytes", pa.binary(len(PNG))), ("path", pa.string())])
    cells["fixed with a path"] = pa.array([{"bytes": PNG, "path": None}] * 3, fixed)
    cells["list of structs"] = pa.array([[{"path": "x", "bytes": PNG}]] * 3)
    return cells


CELLS = cell_types()


@pytest.mark.parametrize("name", CELLS)
def test_an_image_of_any_arrow_type_is_read(name, tmp_path):
    source = open_source(write_rows(tmp_path / "rows.parquet", image=CELLS[name]))
    assert source.train.image(0).getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        *((pa.array([2, 10, 2]).cast(kind), ("2", "10")) for kind in (pa.int8(), pa.uint64(), pa.float32())),
        *((pa.array(["b", "a", "b"], kind), ("a", "b")) for kind in (pa.string(), pa.large_string(), pa.string_view())),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ("a", "b")),
        (pa.array([True, False, True]), ("False", "True")),
        (pa.array([[3], [4], [3]]), ("3", "4")),
        (pa.array(["2", "10", "2"]), ("2", "10")),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_labels_of_any_arrow_type_are_classes(labels, names, tmp_path):
    source = open_source(write_rows(tmp_path / "rows.parquet", label=labels))
    assert source.label_names == names
    classes = {
        s.source_id(i): source.label_names[s.label(i)] for s in (source.train, source.validation) for i in range(len(s))
    }
    assert classes["train/00000"] == classes["train/00002"] != classes["train/00001"]


def test_columns_of_types_that_datasets_does_not_know_are_ignored(tmp_path):
    unsupported = pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int32()))
    source = open_source(write_rows(tmp_path / "rows.parquet", tags=unsupported, label=unsupported))
    assert source.train.image(0).size == (6, 4)
    assert "no column of labels" in source.unlabelled_reason


def test_files_of_a_split_may_differ_in_their_types_and_be_empty(tmp_path):
    write_rows(tmp_path / "train-0.parquet", label=pa.array([0, 1, 0]))
    write_rows(
        tmp_path / "train-1.parquet", image=pa.array([PNG] * 3, pa.large_binary()), label=pa.array([0, 1, 0], pa.int8())
    )
    write_rows(tmp_path / "train-2.parquet", image=pa.array([], pa.binary()), label=pa.array([], pa.int64()))
    write_rows(tmp_path / "test.parquet", label=pa.array([-1] * 3))
    source = open_source(tmp_path)
    assert source.label_names == ("0", "1")
    assert count_images(source) == (6, 3)
    assert source.test.labels is None


@pytest.mark.parametrize("kind", ["torch", "numpy", "jax", "tensorflow", "polars"])
def test_a_data_set_saved_with_any_format_is_read(kind, tmp_path):
    cells = [{"bytes": PNG, "path": None}] * 4
    names = datasets.ClassLabel(names=["zebra", "ant", "bee"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    rows = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 0, 1]}, features)
    rows.save_to_disk(tmp_path / "set")
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    (tmp_path / "set" / "state.json").write_text(
        json.dumps(state | {"_format_type": kind, "_format_columns": ["label"]})
    )
    source = open_source(tmp_path / "set")
    assert source.train.image(0).size == (6, 4)
    assert source.label_names == ("zebra", "ant", "bee")
    assert source.classes_without_images == ("bee",)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"image": [PNG, PNG, None]}, "holds no image"),
        ({"image": [[PNG], [PNG], [PNG, PNG]]}, "holds 2 images"),
        ({"image": [PNG, PNG, b""]}, "not an image"),
    ],
)
def test_a_cell_without_exactly_one_image_is_unreadable_with_the_reason(columns, reason, tmp_path):
    source = open_source(
        write_rows(tmp_path / "rows.parquet", **{k: pa.array(v) for k, v in columns.items()}), hold_out=False
    )
    with pytest.raises(UnreadableImage, match=reason):
        source.train.image(2)


@pytest.mark.parametrize("label", [[0, 5, 1], [0, None, 1]], ids=["a number without a name", "a row without a label"])
def test_the_error_for_an_invalid_label_names_the_file_and_the_row_in_one_line(label, tmp_path):
    features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["x", "y"])})
    written = json.dumps({"info": {"features": features.to_dict()}})
    table = pa.table({"image": [PNG] * 3, "label": label}).replace_schema_metadata({"huggingface": written})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="train/00001") as error:
        open_source(tmp_path / "rows.parquet")
    assert "rows.parquet" in str(error.value)
    assert "\n" not in str(error.value)


def test_datasets_prints_nothing(tmp_path, capfd):
    write_rows(tmp_path / "set" / "train.parquet")
    write_files(tmp_path / "torn", "train.parquet", content=b"PAR1")
    open_source(tmp_path / "set")
    with pytest.raises(UserError):
        open_source(tmp_path / "torn")
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("data", ["", " ", "~nobody-of-this-name/x", "a\0b", "x" * 5000, "/" + "x" * 300])
def test_the_error_for_a_name_that_is_no_path_is_one_line(data):
    with pytest.raises(UserError) as error:
        open_source(data)
    assert "\n" not in str(error.value)


def test_errors_name_the_folder_that_the_user_passed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(Path("mine"), "a.png", "b.png", content=b"no image")
    split = open_source("mine").train
    with pytest.raises(UserError, match="'mine'"):
        dataset_statistics(split)
    with pytest.raises(UserError, match="'mine'"):
        ImageLoader(split, ImageProcessor(channels=3, content_size=(4, 4), image_size=(4, 4)))


def test_statistics_cover_images_and_arrays_together(tmp_path):
    write_files(tmp_path, "a.png")
    np.save(tmp_path / "b.npy", np.zeros((3, 4, 6), np.float32))
    measured = dataset_statistics(open_source(tmp_path, hold_out=False).train)
    assert (measured.channels, measured.most_common_size, measured.unreadable_images) == (3, (4, 6), 0)
