"""The reader maps the codes that stage one wrote without a copy, and refuses broken files."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_models import LABEL_NAMES, tiny_source, tiny_tokenizer

from stage1_tokenizer.codes import writer
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.codes.writer import write_code_cache
from stage1_tokenizer.data.image_loader import ImageLoader
from training_harness.errors import UserError

ALL_ROWS = np.arange(40)


def write_codes(folder: Path, name: str = "codes", labelled: bool = True, **options) -> Path:
    tokenizer = tiny_tokenizer()
    if not (folder / "tokenizer").exists():
        tokenizer.save_pretrained(folder / "tokenizer")
    return write_code_cache(
        tokenizer, folder / "tokenizer", tiny_source(labelled=labelled), folder / name, batch_size=7, **options
    )


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train images in three shards: 14, 14 and 12 rows."""
    monkeypatch.setattr(writer, "SHARD_IMAGES", 10)
    return write_codes(tmp_path, contents="both")


def test_the_written_rows_are_read_in_order(tmp_path: Path) -> None:
    tokenizer, source = tiny_tokenizer(), tiny_source()
    codes = CodeCache(write_codes(tmp_path, contents="both"))
    assert codes.spec == tokenizer.latent_spec()
    assert codes.label_names == LABEL_NAMES
    for split, images in ((codes.train, source.train), (codes.validation, source.validation)):
        pixels = ImageLoader(images, tokenizer.config.image_processor)
        rows = np.arange(len(images))
        pixel_values = tokenizer.config.image_processor.preprocess(pixels[rows])
        with torch.no_grad():
            assert len(split) == len(images)
            assert torch.equal(split.indices(rows), tokenizer.encode_indices(pixel_values))
            assert torch.equal(split.latents(rows), tokenizer.encode_latents(pixel_values).half().float())
        assert split.labels(rows).tolist() == images.labels
    shuffled = np.array([31, 2, 2, 17])
    assert torch.equal(codes.train.indices(shuffled), codes.train.indices(ALL_ROWS)[shuffled])
    assert len(codes.train.indices(ALL_ROWS).unique()) > 1


def test_reading_copies_the_requested_rows_only(tmp_path: Path) -> None:
    before = pa.total_allocated_bytes()
    split = CodeCache(write_codes(tmp_path, contents="both")).train
    assert pa.total_allocated_bytes() == before
    for name, dtype in (("indices", np.uint16), ("latents", np.float16), ("label", np.int64)):
        (column,) = split._columns[name]
        assert column.dtype == dtype
        assert not column.flags.owndata
        assert not column.flags.writeable  # a view of the mapped file
    rows = split.indices(np.array([0, 1]))
    assert rows.dtype == torch.int64
    rows[0] = 0  # a copy: the file does not change
    CodeCache(tmp_path / "codes").verify()


def test_the_columns_are_memory_mapped(tmp_path: Path) -> None:
    shard = write_codes(tmp_path) / "train-00000.arrow"
    (labels,) = CodeCache(tmp_path / "codes").train._columns["label"]
    offset = shard.read_bytes().index(labels.tobytes())
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(np.array([77], np.int64).tobytes())
    assert labels[:4].tolist() == [77, 1, 2, 0]


def test_several_shards_have_the_rows_of_a_single_one(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    one, several = CodeCache(write_codes(sharded.parent, "one", contents="both")), CodeCache(sharded)
    assert [shard["rows"] for shard in several.manifest["splits"]["train"]["shards"]] == [14, 14, 12]
    assert len(one.manifest["splits"]["train"]["shards"]) == 1
    for rows in (ALL_ROWS, ALL_ROWS[::-1].copy(), np.array([13, 14, 27, 28, 39, 0, 13])):
        assert torch.equal(one.train.indices(rows), several.train.indices(rows))
        assert torch.equal(one.train.latents(rows), several.train.latents(rows))
        assert torch.equal(one.train.labels(rows), several.train.labels(rows))


def test_images_without_labels_have_the_label_minus_one(tmp_path: Path) -> None:
    codes = CodeCache(write_codes(tmp_path, labelled=False))
    assert codes.label_names is None
    assert codes.train.labels(ALL_ROWS).eq(-1).all()


def test_the_error_names_a_shard_that_is_cut_short_or_missing(sharded: Path) -> None:
    shard = sharded / "train-00001.arrow"
    content = shard.read_bytes()
    CodeCache(sharded)
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"train-00001.arrow holds {len(content) - 1} bytes; expected {len(content)}"):
        CodeCache(sharded)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001.arrow holds 0 bytes.*latentloom tokenize"):
        CodeCache(sharded)


def test_verify_detects_a_flipped_bit_and_names_the_file(sharded: Path) -> None:
    shard = sharded / "train-00002.arrow"
    content = bytearray(shard.read_bytes())
    CodeCache(sharded).verify()
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00002.arrow has sha256 .*the file was altered"):
        CodeCache(sharded).verify()


def test_the_error_for_an_overwritten_shard_is_one_line(sharded: Path) -> None:
    shard = sharded / "train-00000.arrow"
    shard.write_bytes(b"\x07" * shard.stat().st_size)
    with pytest.raises(UserError, match=r"train-00000.arrow is no Arrow stream") as caught:
        CodeCache(sharded)
    assert "\n" not in str(caught.value)


def test_the_error_for_a_missing_column_says_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no latents; run: latentloom tokenize --contents latents"):
        CodeCache(write_codes(tmp_path, "a", contents="indices")).train.latents(ALL_ROWS)
    with pytest.raises(UserError, match="no indices; run: latentloom tokenize --contents indices"):
        CodeCache(write_codes(tmp_path, "b", contents="latents")).train.indices(ALL_ROWS)


@pytest.mark.parametrize("content", [None, b"", b'{"spec": ', b"[]", b'{"splits": {}}', b"\xff\xfe\x00"])
def test_the_error_for_a_folder_without_a_valid_manifest_says_how_to_write_a_cache(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"no code cache in .*run: latentloom tokenize") as caught:
        CodeCache(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_error_for_an_unknown_field_in_the_spec_suggests_the_nearest(tmp_path: Path) -> None:
    manifest = write_codes(tmp_path) / "manifest.json"
    values = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps(values | {"spec": values["spec"] | {"hieght": 4}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown field 'spec.hieght'; did you mean 'height'"):
        CodeCache(tmp_path / "codes")


def test_indices_beyond_the_codebook_are_refused(tmp_path: Path) -> None:
    folder = write_codes(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    max_code = CodeCache(folder).train.max_code()
    manifest["spec"]["codebook_size"] = max_code
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=f"holds the code {max_code}; expected 0 to {max_code - 1}"):
        CodeCache(folder).verify()
