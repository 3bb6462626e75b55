"""The code cache as stage two reads it: what stage one wrote, without a copy, and nothing that is torn."""

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

EVERY = np.arange(40)


def written(folder: Path, name: str = "codes", labelled: bool = True, **options) -> Path:
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
    return written(tmp_path, contents="both")


def test_what_was_written_is_read_in_order(tmp_path: Path) -> None:
    tokenizer, source = tiny_tokenizer(), tiny_source()
    codes = CodeCache(written(tmp_path, contents="both"))
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
    assert torch.equal(codes.train.indices(shuffled), codes.train.indices(EVERY)[shuffled])
    assert len(codes.train.indices(EVERY).unique()) > 1


def test_reading_copies_nothing_but_the_rows_that_are_asked_for(tmp_path: Path) -> None:
    before = pa.total_allocated_bytes()
    split = CodeCache(written(tmp_path, contents="both")).train
    assert pa.total_allocated_bytes() == before
    for name, dtype in (("indices", np.uint16), ("latents", np.float16), ("label", np.int64)):
        (column,) = split._columns[name]
        assert column.dtype == dtype
        assert not column.flags.owndata
        assert not column.flags.writeable  # a view of the mapped file
    rows = split.indices(np.array([0, 1]))
    assert rows.dtype == torch.int64
    rows[0] = 0  # a copy: the file stays as it is
    CodeCache(tmp_path / "codes").verify()


def test_the_columns_are_the_file_itself_mapped_and_not_read(tmp_path: Path) -> None:
    shard = written(tmp_path) / "train-00000.arrow"
    (labels,) = CodeCache(tmp_path / "codes").train._columns["label"]
    place = shard.read_bytes().index(labels.tobytes())
    with shard.open("r+b") as file:
        file.seek(place)
        file.write(np.array([77], np.int64).tobytes())
    assert labels[:4].tolist() == [77, 1, 2, 0]


def test_several_shards_give_the_rows_of_one(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    one, several = CodeCache(written(sharded.parent, "one", contents="both")), CodeCache(sharded)
    assert [shard["rows"] for shard in several.manifest["splits"]["train"]["shards"]] == [14, 14, 12]
    assert len(one.manifest["splits"]["train"]["shards"]) == 1
    for rows in (EVERY, EVERY[::-1].copy(), np.array([13, 14, 27, 28, 39, 0, 13])):
        assert torch.equal(one.train.indices(rows), several.train.indices(rows))
        assert torch.equal(one.train.latents(rows), several.train.latents(rows))
        assert torch.equal(one.train.labels(rows), several.train.labels(rows))


def test_images_without_labels_have_the_label_minus_one(tmp_path: Path) -> None:
    codes = CodeCache(written(tmp_path, labelled=False))
    assert codes.label_names is None
    assert codes.train.labels(EVERY).eq(-1).all()


def test_a_shard_that_is_cut_short_or_missing_is_named(sharded: Path) -> None:
    shard = sharded / "train-00001.arrow"
    whole = shard.read_bytes()
    CodeCache(sharded)
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"train-00001.arrow holds {len(whole) - 1} bytes; expected {len(whole)}"):
        CodeCache(sharded)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001.arrow holds 0 bytes.*latentloom tokenize"):
        CodeCache(sharded)


def test_verify_finds_one_flipped_bit_and_names_its_file(sharded: Path) -> None:
    shard = sharded / "train-00002.arrow"
    whole = bytearray(shard.read_bytes())
    CodeCache(sharded).verify()
    whole[len(whole) // 2] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(UserError, match=r"train-00002.arrow has sha256 .*the file was altered"):
        CodeCache(sharded).verify()


def test_a_shard_whose_beginning_was_overwritten_is_one_line(sharded: Path) -> None:
    shard = sharded / "train-00000.arrow"
    shard.write_bytes(b"\x07" * shard.stat().st_size)
    with pytest.raises(UserError, match=r"train-00000.arrow is no Arrow stream") as caught:
        CodeCache(sharded)
    assert "\n" not in str(caught.value)


def test_columns_that_were_not_written_are_an_error_that_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no latents; run: latentloom tokenize --contents latents"):
        CodeCache(written(tmp_path, "a", contents="indices")).train.latents(EVERY)
    with pytest.raises(UserError, match="no indices; run: latentloom tokenize --contents indices"):
        CodeCache(written(tmp_path, "b", contents="latents")).train.indices(EVERY)


@pytest.mark.parametrize("content", [None, b"", b'{"spec": ', b"[]", b'{"splits": {}}', b"\xff\xfe\x00"])
def test_a_folder_without_a_whole_manifest_is_no_cache_and_the_error_says_what_writes_one(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"no code cache in .*run: latentloom tokenize") as caught:
        CodeCache(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_manifest_with_a_field_missing_or_unknown_in_its_spec_is_one_line(tmp_path: Path) -> None:
    manifest = written(tmp_path) / "manifest.json"
    values = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps(values | {"spec": values["spec"] | {"hieght": 4}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown field 'spec.hieght'; did you mean 'height'"):
        CodeCache(tmp_path / "codes")


def test_codes_that_the_codebook_does_not_have_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    highest = CodeCache(folder).train.highest_code()
    manifest["spec"]["codebook_size"] = highest
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=f"holds the code {highest}; expected 0 to {highest - 1}"):
        CodeCache(folder).verify()
