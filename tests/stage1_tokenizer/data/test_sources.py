"""A folder, file or name becomes the expected splits, ids and labels, or the error states the reason in one line."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from stage1_tokenizer.data.folder_sources import FileStore, image_extensions, list_files
from stage1_tokenizer.data.sources import ImageSplit, UnreadableImage, open_source
from stage1_tokenizer.data.statistics import dataset_statistics
from training_harness.errors import UserError

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "grey": (90, 90, 90), "clear": (0, 0, 200, 40)}


def make_image(colour="red", size=(6, 4)) -> PIL.Image.Image:
    rgb = COLOURS[colour]
    return PIL.Image.new("RGBA" if len(rgb) == 4 else "RGB", size, rgb)


def encode_png(colour="red", size=(6, 4)) -> bytes:
    buffer = io.BytesIO()
    make_image(colour, size).save(buffer, "PNG")
    return buffer.getvalue()


def encode_noisy_png() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(root: Path, *paths: str, content: bytes | None = None) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encode_png() if content is None else content)
    return root


def sorted_ids(*splits: ImageSplit) -> list[str]:
    return sorted({split.source_id(i) for split in splits for i in range(len(split))})


def classes_by_id(source, split: ImageSplit) -> dict[str, str]:
    return {split.source_id(i): source.label_names[split.label(i)] for i in range(len(split))}


def assert_one_line(message: str, *parts: str) -> None:
    assert "\n" not in message
    assert "expected" in message
    for part in parts:
        assert part in message


# Folders


def test_a_flat_folder_has_all_its_images_and_no_labels(tmp_path):
    source = open_source(write_files(tmp_path, "b.png", "a.JPG", "c.webp"))
    assert source.name == tmp_path.name
    assert source.label_names is None
    assert source.train.labels is None
    assert source.train.label(0) is None
    assert source.test is None
    assert sorted_ids(source.train, source.validation) == ["a.JPG", "b.png", "c.webp"]


def test_class_folders_are_sorted_labels_at_any_depth_of_their_files(tmp_path):
    source = open_source(
        write_files(tmp_path, "dog/1.png", "cat/deep/er/2.png", "cat/3.png", "ant/4.png", "empty/notes.txt")
    )
    assert source.label_names == ("ant", "cat", "dog")
    classes = classes_by_id(source, source.train) | classes_by_id(source, source.validation)
    assert classes == {"dog/1.png": "dog", "cat/deep/er/2.png": "cat", "cat/3.png": "cat", "ant/4.png": "ant"}


def test_a_single_outer_folder_is_no_class_and_hides_no_classes(tmp_path):
    assert open_source(write_files(tmp_path / "flat", "all/1.png", "all/2.png")).label_names is None
    nested = open_source(write_files(tmp_path / "nested", "archive/data/cat/1.png", "archive/data/dog/2.png"))
    assert nested.label_names == ("cat", "dog")
    assert sorted_ids(nested.train, nested.validation) == ["archive/data/cat/1.png", "archive/data/dog/2.png"]


def test_images_outside_class_folders_make_the_folder_flat(tmp_path):
    source = open_source(write_files(tmp_path, "loose.png", "cat/1.png", "dog/2.png"))
    assert source.label_names is None
    assert sorted_ids(source.train, source.validation) == ["cat/1.png", "dog/2.png", "loose.png"]


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "dev"])
def test_split_folders_are_splits_with_common_labels(tmp_path, validation):
    write_files(
        tmp_path, "Train/cat/1.png", "Train/dog/2.png", f"{validation}/dog/3.png", "test/dog/4.png", "preview.png"
    )
    source = open_source(tmp_path)
    assert source.label_names == ("cat", "dog")
    assert classes_by_id(source, source.train) == {"Train/cat/1.png": "cat", "Train/dog/2.png": "dog"}
    assert classes_by_id(source, source.validation) == {f"{validation}/dog/3.png": "dog"}
    assert classes_by_id(source, source.test) == {"test/dog/4.png": "dog"}


def test_a_flat_test_folder_leaves_the_training_images_labelled(tmp_path):
    source = open_source(write_files(tmp_path, "train/cat/1.png", "train/dog/2.png", "train/dog/3.png", "test/4.png"))
    assert source.label_names == ("cat", "dog")
    assert source.train.labels is not None
    assert source.test.labels is None


def test_a_class_with_the_name_train_is_a_class(tmp_path):
    source = open_source(write_files(tmp_path, "train/1.png", "bus/2.png", "boat/3.png"))
    assert source.label_names == ("boat", "bus", "train")


def test_several_splits_without_train_are_refused_and_a_single_split_is_the_train_split(tmp_path):
    assert sorted_ids(open_source(write_files(tmp_path / "one", "test/1.png")).train) == ["test/1.png"]
    with pytest.raises(UserError) as error:
        open_source(write_files(tmp_path / "two", "val/1.png", "test/2.png"))
    assert_one_line(str(error.value), "test, val", "'train'")


def test_hidden_files_and_other_extensions_are_ignored_and_links_are_followed(tmp_path):
    outside = write_files(tmp_path / "outside", "x.png", "folder/y.png")
    root = write_files(
        tmp_path / "set", "a.png", "._a.png", ".cache/b.png", "__MACOSX/c.png", "notes.txt", "features.h5"
    )
    (root / "x.png").symlink_to(outside / "x.png")
    (root / "linked").symlink_to(outside / "folder")
    (root / "endless").symlink_to(root)
    source = open_source(root)
    assert sorted_ids(source.train, source.validation) == ["a.png", "linked/y.png", "x.png"]
    assert all(source.train.image(i).size == (6, 4) for i in range(len(source.train)))


def test_a_file_name_that_is_not_utf8_has_a_printable_id_and_opens(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"\xe9.png")).write_bytes(encode_png())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    train = open_source(tmp_path).train
    assert train.source_id(0).encode() == rb"\xe9.png"
    assert train.image(0).size == (6, 4)


# Images


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (encode_png()[:45], "truncated"),
        (encode_noisy_png()[:-999], "truncated"),
    ],
    ids=["empty", "text", "header only", "cut short"],
)
def test_a_broken_file_is_listed_and_raises_an_error_when_it_is_read(tmp_path, content, reason):
    write_files(tmp_path, "good.png")
    write_files(tmp_path, "bad.png", content=content)
    source = open_source(tmp_path)
    splits = {split.source_id(0): split for split in (source.train, source.validation)}
    assert splits["good.png"].image(0).getpixel((0, 0)) == COLOURS["red"]
    with pytest.raises(UnreadableImage) as error:
        splits["bad.png"].image(0)
    assert error.value.source_id == "bad.png"
    assert reason in error.value.reason
    assert "\n" not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # workers send it to the main process


def test_a_deleted_file_is_unreadable_and_an_index_out_of_range_is_an_index_error(tmp_path):
    train = open_source(write_files(tmp_path, "a.png")).train
    (tmp_path / "a.png").unlink()
    with pytest.raises(UnreadableImage, match="No such file") as error:
        train.image(0)
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(IndexError):
        train.image(1)


def test_a_large_jpeg_is_decoded_smaller_on_request_but_not_below_the_requested_size(tmp_path):
    make_image(size=(640, 480)).save(tmp_path / "large.jpg")
    train = open_source(tmp_path).train
    assert train.size(0) == (480, 640)
    assert train.image(0).size == (640, 480)
    assert train.image(0, at_least=(100, 100)).size == (160, 120)
    assert train.image(0, at_least=(400, 400)).size == (640, 480)


def test_select_keeps_ids_and_labels_of_the_images(tmp_path):
    train = open_source(write_files(tmp_path, *(f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(9)))).train
    subset = train.select([5, 0, 5]).select([2, 1])
    assert [subset.source_id(i) for i in range(2)] == [train.source_id(5), train.source_id(0)]
    assert subset.labels == [train.labels[5], train.labels[0]]


# The validation split


def split_names(tmp_path: Path, names: list[str]) -> tuple[list[str], list[str]]:
    source = open_source(write_files(tmp_path, *names, content=b""))
    return sorted_ids(source.train), sorted_ids(source.validation)


def test_validation_is_about_5_percent_and_new_images_do_not_change_the_split_of_others(tmp_path):
    names = [f"{i}.png" for i in range(2000)]
    few_train, few_validation = split_names(tmp_path / "few", names[:1000])
    train, validation = split_names(tmp_path / "many", names)
    assert 60 < len(validation) < 140  # fixed by the names
    assert set(few_validation) <= set(validation)
    assert set(few_train) <= set(train)
    assert sorted(train + validation) == sorted(names)


def test_validation_is_the_same_in_every_process(tmp_path):
    assert split_names(tmp_path, [f"{i}.png" for i in range(60)])[1] == ["33.png", "40.png", "6.png"]


def test_validation_is_capped_at_the_smallest_hashes(tmp_path, monkeypatch):
    names = [f"{i}.png" for i in range(400)]
    uncapped = split_names(tmp_path, names)[1]
    monkeypatch.setattr("stage1_tokenizer.data.sources.MAX_VALIDATION_IMAGES", 7)
    capped = split_names(tmp_path, names)[1]
    assert len(capped) == 7 < len(uncapped)
    assert set(capped) < set(uncapped)


def test_two_images_make_two_splits_and_a_single_image_is_in_both(tmp_path):
    for number in range(20):
        train, validation = split_names(tmp_path / str(number), [f"{number}a.png", f"{number}b.png"])
        assert len(train) == len(validation) == 1
        assert train != validation
    assert split_names(tmp_path / "one", ["only.png"]) == (["only.png"], ["only.png"])


# Rows, through `datasets`


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return datasets


def make_rows(datasets, count=4, label=None, **columns):
    """Create rows of images, the last one broken; `label` is the feature of the column `label`."""
    cells = [{"bytes": encode_png(), "path": None} for _ in range(count - 1)] + [{"bytes": b"broken", "path": None}]
    features = {"image": datasets.Image()} | ({"label": label} if label is not None else {})
    features |= {name: datasets.Value("string" if isinstance(v[0], str) else "int64") for name, v in columns.items()}
    columns |= {"label": [i % 2 for i in range(count)]} if label is not None else {}
    return datasets.Dataset.from_dict({"image": cells, **columns}, features=datasets.Features(features))


def test_parquet_files_are_splits_by_name_with_their_label_names(datasets, tmp_path):
    root = tmp_path / "set" / "data"
    root.mkdir(parents=True)
    table = make_rows(datasets, label=datasets.ClassLabel(names=["zebra", "ant"]))
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000", "test"):
        table.to_parquet(root / f"{name}.parquet")
    source = open_source(root.parent)
    assert [len(split) for split in (source.train, source.validation, source.test)] == [8, 4, 4]
    assert source.label_names == ("zebra", "ant")
    assert source.train.labels == [0, 1] * 4
    assert source.train.source_id(5) == "train/00005"
    assert source.test.source_id(0) == "test/00000"
    assert source.train.image(0).getpixel((0, 0)) == COLOURS["red"]
    with pytest.raises(UnreadableImage, match="train/00003"):
        source.train.image(3)


def test_any_parquet_file_is_the_train_split_and_keeps_its_source_ids(datasets, tmp_path):
    make_rows(datasets, source_id=[f"photo-{i}" for i in range(4)]).to_parquet(tmp_path / "mine.parquet")
    source = open_source(tmp_path / "mine.parquet")
    assert source.name == "mine"
    assert source.label_names is None
    assert sorted_ids(source.train, source.validation) == [f"photo-{i}" for i in range(4)]


def test_labels_without_names_get_their_values_as_names(datasets, tmp_path):
    make_rows(datasets, labels=["b", "c", "a", "b"]).to_parquet(tmp_path / "words.parquet")
    make_rows(datasets, labels=[0, 10, 2, 0]).to_parquet(tmp_path / "numbers.parquet")
    words, numbers = open_source(tmp_path / "words.parquet"), open_source(tmp_path / "numbers.parquet")
    assert words.label_names == ("a", "b", "c")
    assert numbers.label_names == ("0", "2", "10")
    classes = classes_by_id(words, words.train) | classes_by_id(words, words.validation)
    assert [classes[f"train/{i:05d}"] for i in range(4)] == ["b", "c", "a", "b"]


def test_hidden_test_labels_are_none_and_a_single_missing_label_is_refused(datasets, tmp_path):
    named = make_rows(datasets, label=datasets.ClassLabel(names=["x", "y"]))
    hidden = named.remove_columns("label").add_column("label", [-1] * 4).cast(named.features)
    datasets.DatasetDict({"train": named, "test": hidden}).save_to_disk(tmp_path / "hidden")
    source = open_source(tmp_path / "hidden")
    assert source.train.labels is not None
    assert source.test.labels is None
    make_rows(datasets, labels=["a", None, "b", "a"]).to_parquet(tmp_path / "holes.parquet")
    with pytest.raises(UserError) as error:
        open_source(tmp_path / "holes.parquet")
    assert_one_line(str(error.value), "train/00001", "labels")


def test_a_saved_data_set_opens_with_or_without_splits(datasets, tmp_path):
    make_rows(datasets).save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": make_rows(datasets), "validation": make_rows(datasets, 2)}).save_to_disk(
        tmp_path / "split"
    )
    plain, split = open_source(tmp_path / "plain"), open_source(tmp_path / "split")
    assert len(plain.train) + len(plain.validation) == 4
    assert (len(split.train), len(split.validation), split.test) == (4, 2, None)


def test_a_name_that_is_no_path_is_loaded_from_the_hub(datasets, monkeypatch):
    loaded_names = []
    monkeypatch.setattr("stage1_tokenizer.data.row_sources._is_hub_reachable", lambda name: True)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name: loaded_names.append(name) or {"train": make_rows(datasets)}
    )
    assert open_source("someone/images").name == "someone/images"
    assert loaded_names == ["someone/images"]


def test_the_error_for_an_unknown_hub_name_is_one_line(datasets, monkeypatch):
    def refuse(name):
        raise FileNotFoundError("no such\ndata set")

    monkeypatch.setattr("stage1_tokenizer.data.row_sources._is_hub_reachable", lambda name: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError) as error:
        open_source("someone/images")
    assert_one_line(str(error.value), "'someone/images'", "no such data set")


def test_the_error_for_parquet_without_images_or_a_broken_file_is_one_line(datasets, tmp_path):
    datasets.Dataset.from_dict({"height": [1], "width": [2]}).to_parquet(tmp_path / "numbers.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    for name, message in (("numbers", "height, width"), ("torn", "Parquet")):
        with pytest.raises(UserError) as error:
            open_source(tmp_path / f"{name}.parquet")
        assert_one_line(str(error.value), f"{name}.parquet", message)


# Bad input


@pytest.mark.parametrize(
    "data", ["./missing", "../missing", "/missing", "~/missing", "a/b/c", "missing/", "missing.png"]
)
def test_a_path_that_does_not_exist_is_never_loaded_from_the_hub(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        "stage1_tokenizer.data.sources.load_from_hub", lambda name: pytest.fail(f"loaded {name} from the Hub")
    )
    with pytest.raises(UserError) as error:
        open_source(data)
    assert_one_line(str(error.value), f"nothing at {data!r}")


def test_errors_for_an_empty_folder_and_a_folder_without_images_and_a_file_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    write_files(tmp_path, "words/a.txt", "photos.zip")
    for name, message in (("empty", "is empty"), ("words", "holds no image"), ("photos.zip", "is a file")):
        with pytest.raises(UserError) as error:
            open_source(tmp_path / name)
        assert_one_line(str(error.value), name, message)


def test_a_folder_of_images_opens_without_datasets(tmp_path):
    write_files(tmp_path, "cat/a.png", "dog/b.png")
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from stage1_tokenizer.data import image_processor, sources, statistics\n"
        f"statistics.dataset_statistics(sources.open_source({str(tmp_path)!r}).train)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


# Statistics


def open_all(folder: Path) -> ImageSplit:
    return ImageSplit(FileStore(folder, list_files(folder, image_extensions())))


def test_statistics_measure_sizes_of_upright_images_and_count_unreadable_ones(tmp_path):
    for i, size in enumerate([(6, 4), (9, 9), (2, 3)]):
        make_image("red", size).save(tmp_path / f"{i}.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    make_image("red", (4, 6)).save(tmp_path / "turned.jpg", exif=exif)
    make_image("red", (3000, 2000)).save(tmp_path / "large.jpg")
    write_files(tmp_path, "broken.png", content=b"")
    measured = dataset_statistics(open_all(tmp_path))
    assert (measured.images_read, measured.unreadable_images) == (5, 1)
    assert (measured.most_common_size, measured.smallest_size, measured.largest_size) == ((4, 6), (3, 2), (2000, 3000))


@pytest.mark.parametrize(("colours", "channels"), [(["grey"], 1), (["grey", "red"], 3), (["red", "grey", "clear"], 4)])
def test_statistics_count_the_channels_that_the_images_use(tmp_path, colours, channels):
    for colour in colours:
        make_image(colour).save(tmp_path / f"{colour}.png")
        make_image(colour).convert("RGBA").save(tmp_path / f"{colour}_with_alpha_channel.png")
    assert dataset_statistics(open_all(tmp_path)).channels == channels


def test_the_error_of_statistics_without_readable_images_names_one(tmp_path):
    write_files(tmp_path, "a.png", "b.png", content=b"no image")
    with pytest.raises(UserError) as error:
        dataset_statistics(open_all(tmp_path))
    assert_one_line(str(error.value), "none of 2 images", "a.png")


def test_statistics_measure_evenly_spaced_images_up_to_the_limit(tmp_path):
    write_files(tmp_path, *(f"{i:03d}.png" for i in range(50)))
    for i in range(0, 50, 10):
        make_image("grey", (i + 1, 1)).save(tmp_path / f"{i:03d}.png")
    measured = dataset_statistics(open_all(tmp_path), limit=5)
    assert (measured.images_read, measured.channels, measured.smallest_size, measured.largest_size) == (
        5,
        1,
        (1, 1),
        (1, 41),
    )
    assert dataset_statistics(open_all(tmp_path), limit=6).channels == 3
