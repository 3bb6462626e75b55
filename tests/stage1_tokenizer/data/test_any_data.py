"""Any folder, Parquet file or image is read, or refused with one of the two errors that loops expect."""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.image_processor import ImageProcessor
from stage1_tokenizer.data.sources import UnreadableImage, open_source
from stage1_tokenizer.data.statistics import dataset_statistics
from training_harness.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

HUNDRED_EXAMPLES = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
FORTY_EXAMPLES = settings(HUNDRED_EXAMPLES, max_examples=40)


def encode_image(kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new(mode, (5, 3)).save(buffer, kind)
    return buffer.getvalue()


INTACT_FILES = [
    encode_image(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000")
]
INTACT_FILES += [encode_image("TIFF", mode) for mode in ("F", "I", "I;16", "1", "CMYK", "LAB")]


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """Generate an image file with some bytes changed or cut off."""
    content = bytearray(draw(st.sampled_from(INTACT_FILES)))
    for _ in range(draw(st.integers(0, 4))):
        content[draw(st.integers(0, min(len(content) - 1, 400)))] = draw(st.integers(0, 255))
    begin, end = draw(st.integers(0, 3)), draw(st.integers(1, len(content)))
    return bytes(content[begin if draw(st.booleans()) else 0 : end if draw(st.booleans()) else None])


contents = st.one_of(st.sampled_from(INTACT_FILES), damaged_files(), st.binary(max_size=64))
# fmt: off
names = st.sampled_from([
    "train", "val", "test", "training_set", "test-set", "images", "data", "cat", "dog", "1", "10", "2", "@eaDir", "Trains",
    "valid", "trainA", "trainB", ".hidden", "é", "e\u0301", "[a]", "*", "?", "%20",
])
# fmt: on
endings = st.sampled_from([".png", ".JPG", ".tif", ".npy", ".gif", "", ".txt", ".parquet", ".3f9c01d2", ".db"])


@contextmanager
def folder_with(files: dict[str, bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as parent:
        root = Path(parent) / "data"
        root.mkdir()
        for name, content in files.items():
            try:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                continue  # the name of a file is also the name of a folder
        yield root


def assert_one_line(error: Exception, *parts: str) -> None:
    for part in parts:
        assert part in str(error)
    assert "\n" not in str(error)


def read_all(path: Path) -> None:
    """Read all images as every command does; fail for any error other than the two expected ones."""
    try:
        source = open_source(path)
    except UserError as error:
        assert_one_line(error, path.name)
        return
    assert source.describe_classes()
    for split in filter(None, (source.train, source.validation, source.test)):
        assert split.labels is None or all(0 <= label < len(source.label_names) for label in split.labels)
        for i in range(len(split)):
            try:
                split.size(i)
                split.image(i)
            except UnreadableImage as error:
                assert_one_line(error)
    try:
        channels = dataset_statistics(source.train).channels
        ImageLoader(source.train, ImageProcessor(channels=channels, content_size=(4, 6), image_size=(4, 6)))
    except UserError as error:
        assert_one_line(error, path.name)


@pytest.fixture(autouse=True, scope="module")
def temporary_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@given(
    st.dictionaries(
        st.builds(lambda a, b: "/".join(a) + b, st.lists(names, min_size=1, max_size=4), endings), contents, max_size=8
    )
)
@HUNDRED_EXAMPLES
@pytest.mark.filterwarnings("ignore")
def test_any_folder_is_read_or_refused(files):
    with folder_with(files) as path:
        read_all(path)


@given(damaged_files())
@settings(HUNDRED_EXAMPLES, max_examples=300)
@pytest.mark.filterwarnings("ignore")
def test_any_damaged_image_is_read_or_refused(content):
    with folder_with({"a.png": content, "b.png": INTACT_FILES[0]}) as path:
        read_all(path)


numbers = st.one_of(
    arrays.integer_dtypes(), arrays.unsigned_integer_dtypes(), arrays.floating_dtypes(), arrays.boolean_dtypes(),
    arrays.complex_number_dtypes(),
)  # fmt: skip


@given(
    numbers.flatmap(
        lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=7))
    )
)
@settings(HUNDRED_EXAMPLES, max_examples=150)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_any_array_is_read_or_refused(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    with folder_with({"a.npy": buffer.getvalue()}) as path:
        read_all(path)


cells = st.one_of(st.none(), contents)
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLUMNS = [
    *((kind, cells) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    (pa.list_(pa.binary()), st.lists(cells, max_size=2)),
    (STRUCT, st.fixed_dictionaries({"bytes": cells, "path": st.sampled_from([None, "nowhere.png"])})),
]
LABELS = [
    *((kind, st.one_of(st.none(), st.integers(-2, 3))) for kind in (pa.int8(), pa.int64())),
    *((kind, st.one_of(st.none(), st.floats(width=32))) for kind in (pa.float32(), pa.float64())),
    *((kind, st.one_of(st.none(), st.text(max_size=3))) for kind in (pa.string(), pa.large_string())),
    (pa.list_(pa.int64()), st.lists(st.integers(-1, 2), max_size=2)),
    (pa.map_(pa.string(), pa.int64()), st.none()),
]


@given(
    st.data(),
    st.integers(0, 5),
    st.lists(st.sampled_from(["train", "test-0", "x", "val/0"]), min_size=1, max_size=2, unique=True),
)
@FORTY_EXAMPLES
@pytest.mark.filterwarnings("ignore")
def test_any_rows_are_read_or_refused(data, count, files):
    with folder_with({}) as path:
        for file in files:
            kinds = {"image": data.draw(st.sampled_from(COLUMNS)), "label": data.draw(st.sampled_from(LABELS))}
            table = {
                name: pa.array(data.draw(st.lists(cell, min_size=count, max_size=count)), kind)
                for name, (kind, cell) in kinds.items()
            }
            (path / file).parent.mkdir(exist_ok=True)
            pq.write_table(pa.table(table), path / f"{file}.parquet")
        read_all(path)


@given(st.text(max_size=40).filter(lambda text: os.sep in text or text[:1] in ("", ".", "~", "\0")))
@HUNDRED_EXAMPLES
def test_any_text_that_is_no_path_is_refused(text):
    with tempfile.TemporaryDirectory() as folder, pytest.raises(UserError):
        open_source(f"./{folder}-is-not/{text}")
