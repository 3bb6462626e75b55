"""The code cache has the tokenizer's output, opens as an Arrow data set, and is never overwritten."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from small_parts import error_message, small_tokenizer, write_images

from stage1_tokenizer.codes import manifest, writer
from stage1_tokenizer.codes.manifest import codes_fingerprint
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.codes.writer import write_code_cache
from stage1_tokenizer.data.sources import ImageSource, open_source
from stage1_tokenizer.latent_spec import LatentSpec
from stage1_tokenizer.vqgan import VQGAN
from training_harness.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ImageSource:
    folder = write_images(tmp_path_factory.mktemp("source") / "pictures")
    (folder / "a" / "00.png").write_bytes(b"a letter")
    return open_source(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[VQGAN, Path]:
    folder = tmp_path_factory.mktemp("model") / "model"
    tokenizer = small_tokenizer()
    tokenizer.config.tokenizer_id = tokenizer.compute_id()
    tokenizer.save_pretrained(folder)
    return tokenizer, folder


def write_codes(model, source, output: Path, **options) -> Path:
    return write_code_cache(*model, source, output, batch_size=7, **options)


def load_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def load_rows(folder: Path, split: str = "train") -> datasets.Dataset:
    shards = [
        datasets.Dataset.from_file(str(folder / s["file"])) for s in load_manifest(folder)["splits"][split]["shards"]
    ]
    return datasets.concatenate_datasets(shards).with_format("numpy")


def load_pixel_values(split, tokenizer: VQGAN) -> dict[str, torch.Tensor]:
    """Map source ids to pixel values (1, C, H, W), without the code cache."""
    processor = tokenizer.config.image_processor
    return {
        split.source_id(i): processor.preprocess(processor.read(split.image(i))[None])
        for i in range(len(split))
        if split.source_id(i) != "a/00.png"
    }


def test_a_cache_with_the_same_classes_in_another_order_is_reused(tmp_path, model, capsys):
    for name in ("1", "2", "10"):
        write_images(tmp_path / "pictures" / name, count=4)
    source = open_source(tmp_path / "pictures")
    assert source.label_names == ("1", "2", "10")
    reordered = source.with_label_order(["1", "10", "2"])  # the order of earlier versions
    before = load_rows(write_codes(model, reordered, tmp_path / "codes"))["label"]
    assert write_codes(model, source, tmp_path / "codes") == tmp_path / "codes"
    assert "already" in capsys.readouterr().out
    assert np.array_equal(before, load_rows(tmp_path / "codes")["label"])
    assert CodeCache(tmp_path / "codes").label_names == ("1", "10", "2")


def test_a_cache_lists_the_classes_with_training_images(tmp_path, model, source):
    cache = CodeCache(write_codes(model, source.with_label_names(("none", "a", "b")), tmp_path / "codes"))
    assert cache.label_names == ("none", "a", "b")
    assert cache.trained_classes == (1, 2)


@torch.no_grad()
def test_residual_codes_are_stored_by_level(tmp_path, source):
    tokenizer = small_tokenizer(quantizer={"name": "residual", "depth": 3})
    tokenizer.config.tokenizer_id = tokenizer.compute_id()
    tokenizer.save_pretrained(tmp_path / "model")
    cache = CodeCache(write_codes((tokenizer, tmp_path / "model"), source, tmp_path / "codes"))
    assert (cache.spec.levels, cache.spec.codebook_size) == (3, 16)
    expected = torch.cat([tokenizer.encode_indices(x) for x in load_pixel_values(source.train, tokenizer).values()])
    assert torch.equal(cache.train.indices(np.arange(len(cache.train))), expected)
    vectors, quantizer = cache.code_vectors().view(3, 16, 4), tokenizer.quantizer
    std = torch.tensor(tokenizer.config.latent_std)
    for level, level_vectors in zip(quantizer.levels, vectors, strict=True):
        normalized = level.codebook / std
        assert torch.allclose(level_vectors, normalized - normalized.mean(0), atol=1e-5)


@torch.no_grad()
def test_the_rows_are_the_codes_latents_labels_and_ids_of_the_images(tmp_path, model, source):
    tokenizer = model[0]
    folder = write_codes(model, source, tmp_path / "codes", contents="both")
    for name, split in (("train", source.train), ("validation", source.validation)):
        rows, expected = load_rows(folder, name), load_pixel_values(split, tokenizer)
        assert rows["source_id"][:].tolist() == list(expected)
        labels = {split.source_id(i): split.label(i) for i in range(len(split))}
        for row in rows:
            x = expected[row["source_id"]]
            assert row["indices"].tolist() == tokenizer.encode_indices(x).flatten().tolist()
            latents = torch.from_numpy(row["latents"].astype(np.float32))
            assert torch.allclose(latents, tokenizer.encode_latents(x).flatten(), atol=2e-3, rtol=2e-3)
            assert row["label"] == labels[row["source_id"]]


def test_indices_are_uint16_and_latents_float16_in_lists_of_fixed_size(tmp_path, model, source):
    folder = write_codes(model, source, tmp_path / "codes", contents="both")
    features = load_rows(folder).features
    assert (features["indices"].feature.dtype, features["indices"].length) == ("uint16", 16)
    assert (features["latents"].feature.dtype, features["latents"].length) == ("float16", 4 * 16)
    assert features["label"].dtype == "int64"
    assert features["source_id"].dtype == "string"


@pytest.mark.parametrize(("contents", "columns"), [("indices", ["indices"]), ("latents", ["latents"])])
def test_only_the_requested_columns_are_written(tmp_path, model, source, contents, columns):
    rows = load_rows(write_codes(model, source, tmp_path / "codes", contents=contents))
    assert rows.column_names == [*columns, "label", "source_id"]


def test_a_codebook_beyond_uint16_is_written_as_int32(tmp_path, source):
    tokenizer = small_tokenizer(codebook_size=2**16 + 1)
    tokenizer.save_pretrained(tmp_path / "model")
    rows = load_rows(write_codes((tokenizer, tmp_path / "model"), source, tmp_path / "codes"))
    assert rows.features["indices"].feature.dtype == "int32"


@torch.no_grad()
def test_the_mirror_view_doubles_the_training_rows_and_leaves_validation_alone(tmp_path, model, source):
    once = load_rows(write_codes(model, source, tmp_path / "once"))
    both = write_codes(model, source, tmp_path / "both", views=("original", "flip"))
    rows, tokenizer = load_rows(both), model[0]
    assert len(rows) == 2 * len(once)
    assert len(load_rows(both, "validation")) == len(load_pixel_values(source.validation, tokenizer))
    expected = load_pixel_values(source.train, tokenizer)
    for name in expected:
        codes = [row["indices"].tolist() for row in rows if row["source_id"] == name]
        views = [tokenizer.encode_indices(x).flatten().tolist() for x in (expected[name], expected[name].flip(-1))]
        assert codes == views


def test_the_folder_has_a_manifest_with_counts_and_checksums_and_the_tokenizer(tmp_path, model, source):
    folder = write_codes(model, source, tmp_path / "codes")
    manifest, tokenizer = load_manifest(folder), model[0]
    assert manifest["spec"] == tokenizer.latent_spec().to_dict()
    assert manifest["label_names"] == ["a", "b"]
    assert manifest["source"] == "pictures"
    for name, split in manifest["splits"].items():
        assert split["rows"] == len(load_rows(folder, name))
        for shard in split["shards"]:
            content = (folder / shard["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
            assert len(content) == shard["bytes"]
    assert VQGAN.from_pretrained(folder / "tokenizer").compute_id() == tokenizer.config.tokenizer_id
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [row["source_id"] for row in skipped] == ["a/00.png"]
    assert skipped[0]["reason"]
    assert len(source.train) + len(source.validation) == 24 == sum(s["rows"] for s in manifest["splits"].values()) + 1


def test_many_shards_have_the_rows_of_a_single_one(tmp_path, model, source, monkeypatch):
    one = load_rows(write_codes(model, source, tmp_path / "one"))
    monkeypatch.setattr(writer, "SHARD_IMAGES", 10)
    folder = write_codes(model, source, tmp_path / "many")
    many = load_rows(folder)
    assert len(load_manifest(folder)["splits"]["train"]["shards"]) > 1
    assert one["indices"][:].tolist() == many["indices"][:].tolist()
    assert one["source_id"][:].tolist() == many["source_id"][:].tolist()


def test_a_shard_is_one_record_batch_that_is_mapped_without_a_copy(tmp_path, model, source):
    folder = write_codes(model, source, tmp_path / "codes")
    table = pa.ipc.open_stream(pa.memory_map(str(folder / "train-00000.arrow"))).read_all()
    assert table["indices"].num_chunks == 1
    values = table["indices"].chunk(0).flatten().to_numpy(zero_copy_only=True)
    assert values.dtype == np.uint16


# Existing folders


def test_an_equal_request_writes_nothing(tmp_path, model, source, capsys):
    folder = write_codes(model, source, tmp_path / "codes")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_codes(model, source, folder) == folder
    assert "holds these codes already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("change", ["contents", "views", "spec", "images", "fingerprint"])
def test_another_request_is_refused_with_the_differences_and_the_old_codes_stay(tmp_path, model, source, change):
    folder = write_codes(model, source, tmp_path / "codes")
    before = (folder / "manifest.json").read_bytes()
    options, other_model, other_source = {}, model, source
    if change == "contents":
        options = {"contents": "both"}
    elif change == "views":
        options = {"views": ("flip",)}
    elif change == "spec":
        tokenizer = small_tokenizer()
        tokenizer.config.tokenizer_id = "another"
        other_model = tokenizer, model[1]
    elif change == "images":
        other_source = open_source(write_images(tmp_path / "pictures", count=30))
    else:  # files of the same names; one has other content
        other_folder = write_images(tmp_path / "pictures")
        (other_folder / "a" / "00.png").write_bytes(b"a letter")
        same = open_source(other_folder)
        assert same.train.fingerprint() == source.train.fingerprint()
        Image.new("RGB", (16, 16)).save(other_folder / same.train.source_id(0))
        other_source = open_source(other_folder)
    with pytest.raises(UserError) as caught:
        write_codes(other_model, other_source, folder, **options)
    assert f"another {change}" in error_message(caught)
    assert (folder / "manifest.json").read_bytes() == before


def test_a_folder_with_other_files_is_refused(tmp_path, model, source):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError) as caught:
        write_codes(model, source, tmp_path / "codes")
    assert "holds no code cache" in str(caught.value)


def test_an_interrupted_write_leaves_no_folder(tmp_path, model, source, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_codes(model, source, tmp_path / "codes")
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True, kw_only=True)
class LaterSpec(LatentSpec):
    scales: int = 1


def test_a_cache_is_still_valid_after_a_field_is_added_to_the_spec(tmp_path, model, source, monkeypatch, capsys):
    folder, spec = write_codes(model, source, tmp_path / "codes"), model[0].latent_spec().to_dict()
    monkeypatch.setattr(manifest, "LatentSpec", LaterSpec)
    monkeypatch.setattr(VQGAN, "latent_spec", lambda self: LaterSpec(**spec))
    capsys.readouterr()
    write_codes(model, source, folder)
    assert "holds these codes already" in capsys.readouterr().out
    later, other = (load_manifest(folder) | {"spec": spec | {"scales": scales}} for scales in (1, 2))
    assert codes_fingerprint(later) == codes_fingerprint(load_manifest(folder)) != codes_fingerprint(other)
    monkeypatch.setattr(VQGAN, "latent_spec", lambda self: LaterSpec(**spec, scales=2))
    with pytest.raises(UserError, match="another spec"):
        write_codes(model, source, folder)
