"""What a user points at becomes the splits, ids and labels that they expect, or one line that says why not."""

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


def picture(colour="red", size=(6, 4)) -> PIL.Image.Image:
    rgb = COLOURS[colour]
    return PIL.Image.new("RGBA" if len(rgb) == 4 else "RGB", size, rgb)


def png(colour="red", size=(6, 4)) -> bytes:
    buffer = io.BytesIO()
    picture(colour, size).save(buffer, "PNG")
    return buffer.getvalue()


def noisy_png() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, *paths: str, content: bytes | None = None) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png() if content is None else content)
    return root


def ids(*splits: ImageSplit) -> list[str]:
    return sorted({split.source_id(i) for split in splits for i in range(len(split))})


def classes(source, split: ImageSplit) -> dict[str, str]:
    return {split.source_id(i): source.label_names[split.label(i)] for i in range(len(split))}


def assert_one_line(message: str, *parts: str) -> None:
    assert "\n" not in message
    assert "expected" in message
    for part in parts:
        assert part in message


# Folders


def test_a_flat_folder_has_no_labels_and_every_picture_in_it(tmp_path):
    source = open_source(write(tmp_path, "b.png", "a.JPG", "c.webp"))
    assert source.name == tmp_path.name
    assert source.label_names is None
    assert source.train.labels is None
    assert source.train.label(0) is None
    assert source.test is None
    assert ids(source.train, source.validation) == ["a.JPG", "b.png", "c.webp"]


def test_class_folders_are_labels_in_sorted_order_however_deep_their_files_lie(tmp_path):
    source = open_source(write(tmp_path, "dog/1.png", "cat/deep/er/2.png", "cat/3.png", "ant/4.png", "empty/notes.txt"))
    assert source.label_names == ("ant", "cat", "dog")
    found = classes(source, source.train) | classes(source, source.validation)
    assert found == {"dog/1.png": "dog", "cat/deep/er/2.png": "cat", "cat/3.png": "cat", "ant/4.png": "ant"}


def test_one_folder_around_everything_is_no_class_and_hides_none(tmp_path):
    assert open_source(write(tmp_path / "flat", "all/1.png", "all/2.png")).label_names is None
    nested = open_source(write(tmp_path / "nested", "archive/data/cat/1.png", "archive/data/dog/2.png"))
    assert nested.label_names == ("cat", "dog")
    assert ids(nested.train, nested.validation) == ["archive/data/cat/1.png", "archive/data/dog/2.png"]


def test_pictures_beside_class_folders_make_the_folder_flat(tmp_path):
    source = open_source(write(tmp_path, "loose.png", "cat/1.png", "dog/2.png"))
    assert source.label_names is None
    assert ids(source.train, source.validation) == ["cat/1.png", "dog/2.png", "loose.png"]


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "dev"])
def test_split_folders_are_splits_with_one_numbering_of_classes(tmp_path, validation):
    write(tmp_path, "Train/cat/1.png", "Train/dog/2.png", f"{validation}/dog/3.png", "test/dog/4.png", "preview.png")
    source = open_source(tmp_path)
    assert source.label_names == ("cat", "dog")
    assert classes(source, source.train) == {"Train/cat/1.png": "cat", "Train/dog/2.png": "dog"}
    assert classes(source, source.validation) == {f"{validation}/dog/3.png": "dog"}
    assert classes(source, source.test) == {"test/dog/4.png": "dog"}


def test_a_flat_test_folder_beside_labelled_training_is_unlabelled_alone(tmp_path):
    source = open_source(write(tmp_path, "train/cat/1.png", "train/dog/2.png", "train/dog/3.png", "test/4.png"))
    assert source.label_names == ("cat", "dog")
    assert source.train.labels is not None
    assert source.test.labels is None


def test_a_class_that_is_called_train_among_others_is_a_class(tmp_path):
    source = open_source(write(tmp_path, "train/1.png", "bus/2.png", "boat/3.png"))
    assert source.label_names == ("boat", "bus", "train")


def test_splits_without_a_train_folder_are_refused_and_one_split_alone_is_trained_on(tmp_path):
    assert ids(open_source(write(tmp_path / "one", "test/1.png")).train) == ["test/1.png"]
    with pytest.raises(UserError) as error:
        open_source(write(tmp_path / "two", "val/1.png", "test/2.png"))
    assert_one_line(str(error.value), "test, val", "'train'")


def test_hidden_and_mac_files_and_other_endings_are_left_out_and_links_are_followed(tmp_path):
    outside = write(tmp_path / "outside", "x.png", "folder/y.png")
    root = write(tmp_path / "set", "a.png", "._a.png", ".cache/b.png", "__MACOSX/c.png", "notes.txt", "features.h5")
    (root / "x.png").symlink_to(outside / "x.png")
    (root / "linked").symlink_to(outside / "folder")
    (root / "endless").symlink_to(root)
    source = open_source(root)
    assert ids(source.train, source.validation) == ["a.png", "linked/y.png", "x.png"]
    assert all(source.train.image(i).size == (6, 4) for i in range(len(source.train)))


def test_a_file_name_that_is_no_utf8_still_has_a_printable_id_and_opens(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"\xe9.png")).write_bytes(png())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    train = open_source(tmp_path).train
    assert train.source_id(0).encode() == rb"\xe9.png"
    assert train.image(0).size == (6, 4)


# Pictures


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not an image"), (b"hello", "not an image"), (png()[:45], "truncated"), (noisy_png()[:-999], "truncated")],
    ids=["empty", "text", "header only", "cut short"],
)
def test_a_broken_file_is_listed_and_says_so_when_it_is_opened(tmp_path, content, reason):
    write(tmp_path, "good.png")
    write(tmp_path, "bad.png", content=content)
    source = open_source(tmp_path)
    everything = {split.source_id(0): split for split in (source.train, source.validation)}
    assert everything["good.png"].image(0).getpixel((0, 0)) == COLOURS["red"]
    with pytest.raises(UnreadableImage) as error:
        everything["bad.png"].image(0)
    assert error.value.source_id == "bad.png"
    assert reason in error.value.reason
    assert "\n" not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # workers send it to the main process


def test_a_file_that_vanished_is_unreadable_and_an_index_out_of_range_is_not(tmp_path):
    train = open_source(write(tmp_path, "a.png")).train
    (tmp_path / "a.png").unlink()
    with pytest.raises(UnreadableImage, match="No such file") as error:
        train.image(0)
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(IndexError):
        train.image(1)


def test_a_large_jpeg_is_decoded_smaller_only_when_asked_and_never_below_what_was_asked(tmp_path):
    picture(size=(640, 480)).save(tmp_path / "large.jpg")
    train = open_source(tmp_path).train
    assert train.size(0) == (480, 640)
    assert train.image(0).size == (640, 480)
    assert train.image(0, at_least=(100, 100)).size == (160, 120)
    assert train.image(0, at_least=(400, 400)).size == (640, 480)


def test_select_takes_pictures_ids_and_labels_along(tmp_path):
    train = open_source(write(tmp_path, *(f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(9)))).train
    chosen = train.select([5, 0, 5]).select([2, 1])
    assert [chosen.source_id(i) for i in range(2)] == [train.source_id(5), train.source_id(0)]
    assert chosen.labels == [train.labels[5], train.labels[0]]


# The validation split


def split_of_names(tmp_path: Path, names: list[str]) -> tuple[list[str], list[str]]:
    source = open_source(write(tmp_path, *names, content=b""))
    return ids(source.train), ids(source.validation)


def test_validation_is_about_5_percent_and_a_picture_keeps_its_side_when_others_come(tmp_path):
    names = [f"{i}.png" for i in range(2000)]
    few_train, few_validation = split_of_names(tmp_path / "few", names[:1000])
    train, validation = split_of_names(tmp_path / "many", names)
    assert 60 < len(validation) < 140  # fixed by the names
    assert set(few_validation) <= set(validation)
    assert set(few_train) <= set(train)
    assert sorted(train + validation) == sorted(names)


def test_validation_is_the_same_in_every_process(tmp_path):
    assert split_of_names(tmp_path, [f"{i}.png" for i in range(60)])[1] == ["33.png", "40.png", "6.png"]


def test_validation_is_capped_at_the_smallest_hashes(tmp_path, monkeypatch):
    names = [f"{i}.png" for i in range(400)]
    uncapped = split_of_names(tmp_path, names)[1]
    monkeypatch.setattr("stage1_tokenizer.data.sources.MAX_VALIDATION_IMAGES", 7)
    capped = split_of_names(tmp_path, names)[1]
    assert len(capped) == 7 < len(uncapped)
    assert set(capped) < set(uncapped)


def test_two_pictures_make_both_splits_and_one_serves_as_both(tmp_path):
    for number in range(20):
        train, validation = split_of_names(tmp_path / str(number), [f"{number}a.png", f"{number}b.png"])
        assert len(train) == len(validation) == 1
        assert train != validation
    assert split_of_names(tmp_path / "one", ["only.png"]) == (["only.png"], ["only.png"])


# Rows, through `datasets`


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return datasets


def rows(datasets, count=4, label=None, **columns):
    """Pictures of one column, the last one broken; `label` is the feature of the column `label`."""
    cells = [{"bytes": png(), "path": None} for _ in range(count - 1)] + [{"bytes": b"broken", "path": None}]
    features = {"image": datasets.Image()} | ({"label": label} if label is not None else {})
    features |= {name: datasets.Value("string" if isinstance(v[0], str) else "int64") for name, v in columns.items()}
    columns |= {"label": [i % 2 for i in range(count)]} if label is not None else {}
    return datasets.Dataset.from_dict({"image": cells, **columns}, features=datasets.Features(features))


def test_parquet_files_are_splits_by_their_names_with_the_label_names_they_carry(datasets, tmp_path):
    root = tmp_path / "set" / "data"
    root.mkdir(parents=True)
    table = rows(datasets, label=datasets.ClassLabel(names=["zebra", "ant"]))
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


def test_any_parquet_file_is_the_train_split_and_its_own_source_ids_are_kept(datasets, tmp_path):
    rows(datasets, source_id=[f"photo-{i}" for i in range(4)]).to_parquet(tmp_path / "mine.parquet")
    source = open_source(tmp_path / "mine.parquet")
    assert source.name == "mine"
    assert source.label_names is None
    assert ids(source.train, source.validation) == [f"photo-{i}" for i in range(4)]


def test_labels_without_names_are_named_by_their_values(datasets, tmp_path):
    rows(datasets, labels=["b", "c", "a", "b"]).to_parquet(tmp_path / "words.parquet")
    rows(datasets, labels=[0, 10, 2, 0]).to_parquet(tmp_path / "numbers.parquet")
    words, numbers = open_source(tmp_path / "words.parquet"), open_source(tmp_path / "numbers.parquet")
    assert words.label_names == ("a", "b", "c")
    assert numbers.label_names == ("0", "2", "10")
    found = classes(words, words.train) | classes(words, words.validation)
    assert [found[f"train/{i:05d}"] for i in range(4)] == ["b", "c", "a", "b"]


def test_hidden_test_labels_are_none_and_a_label_missing_here_and_there_is_refused(datasets, tmp_path):
    named = rows(datasets, label=datasets.ClassLabel(names=["x", "y"]))
    hidden = named.remove_columns("label").add_column("label", [-1] * 4).cast(named.features)
    datasets.DatasetDict({"train": named, "test": hidden}).save_to_disk(tmp_path / "hidden")
    source = open_source(tmp_path / "hidden")
    assert source.train.labels is not None
    assert source.test.labels is None
    rows(datasets, labels=["a", None, "b", "a"]).to_parquet(tmp_path / "holes.parquet")
    with pytest.raises(UserError) as error:
        open_source(tmp_path / "holes.parquet")
    assert_one_line(str(error.value), "train/00001", "labels")


def test_a_saved_data_set_opens_with_or_without_splits(datasets, tmp_path):
    rows(datasets).save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": rows(datasets), "validation": rows(datasets, 2)}).save_to_disk(tmp_path / "split")
    plain, split = open_source(tmp_path / "plain"), open_source(tmp_path / "split")
    assert len(plain.train) + len(plain.validation) == 4
    assert (len(split.train), len(split.validation), split.test) == (4, 2, None)


def test_a_name_that_is_no_path_is_asked_of_the_hub(datasets, monkeypatch):
    asked = []
    monkeypatch.setattr("stage1_tokenizer.data.row_sources._is_hub_reachable", lambda name: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or {"train": rows(datasets)})
    assert open_source("someone/pictures").name == "someone/pictures"
    assert asked == ["someone/pictures"]


def test_a_hub_name_that_cannot_be_loaded_is_one_line(datasets, monkeypatch):
    def refuse(name):
        raise FileNotFoundError("no such\ndata set")

    monkeypatch.setattr("stage1_tokenizer.data.row_sources._is_hub_reachable", lambda name: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError) as error:
        open_source("someone/pictures")
    assert_one_line(str(error.value), "'someone/pictures'", "no such data set")


def test_parquet_without_pictures_or_torn_is_one_line(datasets, tmp_path):
    datasets.Dataset.from_dict({"height": [1], "width": [2]}).to_parquet(tmp_path / "numbers.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    for name, found in (("numbers", "height, width"), ("torn", "Parquet")):
        with pytest.raises(UserError) as error:
            open_source(tmp_path / f"{name}.parquet")
        assert_one_line(str(error.value), f"{name}.parquet", found)


# Bad input


@pytest.mark.parametrize(
    "data", ["./missing", "../missing", "/missing", "~/missing", "a/b/c", "missing/", "missing.png"]
)
def test_a_path_with_nothing_at_it_is_never_asked_of_the_hub(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        "stage1_tokenizer.data.sources.load_from_hub", lambda name: pytest.fail(f"asked the Hub for {name}")
    )
    with pytest.raises(UserError) as error:
        open_source(data)
    assert_one_line(str(error.value), f"nothing at {data!r}")


def test_an_empty_folder_one_without_images_and_a_file_are_one_line_each(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path, "words/a.txt", "photos.zip")
    for name, found in (("empty", "is empty"), ("words", "holds no image"), ("photos.zip", "is a file")):
        with pytest.raises(UserError) as error:
            open_source(tmp_path / name)
        assert_one_line(str(error.value), name, found)


def test_a_folder_of_images_opens_without_datasets(tmp_path):
    write(tmp_path, "cat/a.png", "dog/b.png")
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from stage1_tokenizer.data import image_processor, sources, statistics\n"
        f"statistics.dataset_statistics(sources.open_source({str(tmp_path)!r}).train)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


# The survey


def all_in(folder: Path) -> ImageSplit:
    return ImageSplit(FileStore(folder, list_files(folder, image_extensions())))


def test_the_survey_finds_sizes_of_upright_pictures_and_counts_the_unreadable(tmp_path):
    for i, size in enumerate([(6, 4), (9, 9), (2, 3)]):
        picture("red", size).save(tmp_path / f"{i}.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture("red", (4, 6)).save(tmp_path / "turned.jpg", exif=exif)
    picture("red", (3000, 2000)).save(tmp_path / "large.jpg")
    write(tmp_path, "broken.png", content=b"")
    seen = dataset_statistics(all_in(tmp_path))
    assert (seen.images_read, seen.unreadable_images) == (5, 1)
    assert (seen.most_common_size, seen.smallest_size, seen.largest_size) == ((4, 6), (3, 2), (2000, 3000))


@pytest.mark.parametrize(("colours", "channels"), [(["grey"], 1), (["grey", "red"], 3), (["red", "grey", "clear"], 4)])
def test_the_survey_asks_for_the_channels_that_the_pictures_use(tmp_path, colours, channels):
    for colour in colours:
        picture(colour).save(tmp_path / f"{colour}.png")
        picture(colour).convert("RGBA").save(tmp_path / f"{colour}_with_alpha_channel.png")
    assert dataset_statistics(all_in(tmp_path)).channels == channels


def test_a_survey_of_nothing_readable_names_an_example(tmp_path):
    write(tmp_path, "a.png", "b.png", content=b"no picture")
    with pytest.raises(UserError) as error:
        dataset_statistics(all_in(tmp_path))
    assert_one_line(str(error.value), "none of 2 images", "a.png")


def test_a_survey_looks_at_no_more_than_its_limit_and_evenly(tmp_path):
    write(tmp_path, *(f"{i:03d}.png" for i in range(50)))
    for i in range(0, 50, 10):
        picture("grey", (i + 1, 1)).save(tmp_path / f"{i:03d}.png")
    seen = dataset_statistics(all_in(tmp_path), limit=5)
    assert (seen.images_read, seen.channels, seen.smallest_size, seen.largest_size) == (5, 1, (1, 1), (1, 41))
    assert dataset_statistics(all_in(tmp_path), limit=6).channels == 3
