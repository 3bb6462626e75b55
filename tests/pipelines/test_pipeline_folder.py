"""Pipeline folders: saved pipelines are loaded unchanged, broken folders are one-line errors, and user files stay."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import CHECKOUT, latentloom
from new_process import run_forked
from PIL import Image
from small_parts import error_message
from tiny_models import LABEL_NAMES, seeded, tiny_pipeline, tiny_prior, tiny_tokenizer

from pipelines.evaluation.pipeline_metrics import balanced_labels
from pipelines.latent_generation import LatentGenerationPipeline
from stage2_prior.autoregressive.sampling import SamplingOptions
from training_harness import files
from training_harness.errors import UserError

FIXTURES = CHECKOUT / "tests" / "fixtures" / "53679bd"

PARTS = [
    "model_index.json",
    "tokenizer/config.json",
    "tokenizer/model.safetensors",
    "prior/config.json",
    "prior/model.safetensors",
]
METRICS = {
    "psnr": 25.0625,
    "codes_used": 15,
    "perplexity": 11.6,
    "class_agreement": 0.873,
    "frechet": 10.256,
    "recall": 0.5123,
    "num_images": 2000,
    "seed": 0,
    "features": "pixels-8x8",
}


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def sample_images(pipeline: LatentGenerationPipeline, **options: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(["dog", 0], 2, generator=seeded(0), output_type="pt", **options).images


# -- round trip -------------------------------------------------------------------------------------------------------


def test_classes_without_training_images_are_sampled_only_when_named(folder: Path, tmp_path: Path) -> None:
    pipeline = LatentGenerationPipeline.from_pretrained(folder)
    assert pipeline.trained_classes == (0, 1, 2)
    assert "trained_classes" not in json.loads((folder / "model_index.json").read_text())
    two_classes = LatentGenerationPipeline(pipeline.tokenizer, pipeline.prior, LABEL_NAMES, trained_classes=[2, 0])
    two_classes.save_pretrained(tmp_path / "two classes")
    loaded = LatentGenerationPipeline.from_pretrained(tmp_path / "two classes")
    assert loaded.trained_classes == (0, 2)
    assert balanced_labels(loaded, 4).tolist() == [0, 0, 2, 2]
    assert loaded.label_ids(LABEL_NAMES[1]) == [1]
    assert (
        latentloom(
            "sample", "--pipeline", tmp_path / "two classes", "--num-images", 4, "--output", tmp_path / "samples"
        )
        == 0
    )
    names = {path.stem.split("-")[1] for path in (tmp_path / "samples").glob("0*.png")}
    assert names == {LABEL_NAMES[0], LABEL_NAMES[2]}


def test_a_new_process_samples_the_same_images_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    program = f"""
import torch
from pipelines import LatentGenerationPipeline
pipeline = LatentGenerationPipeline.from_pretrained({str(folder)!r})
generator = torch.Generator().manual_seed(0)
torch.save(pipeline(["dog", 0], 2, generator=generator, output_type="pt").images, {str(tmp_path / "images.pt")!r})
"""
    process = run_forked("-c", program)
    assert process.returncode == 0, process.stderr
    loaded_images = torch.load(tmp_path / "images.pt", weights_only=True)
    assert torch.equal(loaded_images, sample_images(tiny_pipeline()))
    assert not torch.equal(loaded_images, sample_images(tiny_pipeline(), top_k=1))


def test_names_options_and_all_weights_are_loaded(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    prior = tiny_prior(tokenizer_id=tokenizer.compute_id())
    sampling = SamplingOptions(guidance_scale=1.75, temperature=0.9, top_k=12, top_p=0.95)
    LatentGenerationPipeline(tokenizer, prior, LABEL_NAMES, sampling).save_pretrained(tmp_path / "pipeline")
    assert set(read_files(tmp_path / "pipeline")) == {*PARTS, "README.md"}
    loaded = LatentGenerationPipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.label_names == LABEL_NAMES
    assert loaded.sampling == sampling
    for saved_model, loaded_model in ((tokenizer, loaded.tokenizer), (prior, loaded.prior)):
        assert saved_model.config.to_diff_dict() == loaded_model.config.to_diff_dict()
        loaded_state = loaded_model.state_dict()
        assert all(torch.equal(loaded_state[name], tensor) for name, tensor in saved_model.state_dict().items())


def test_a_run_folder_loads_the_pipeline_in_it(folder: Path) -> None:
    assert torch.equal(
        sample_images(LatentGenerationPipeline.from_pretrained(folder.parent)), sample_images(tiny_pipeline())
    )


def test_a_pipeline_can_be_loaded_and_saved_in_half_precision(folder: Path, tmp_path: Path) -> None:
    half = LatentGenerationPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.tokenizer.dtype == half.prior.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    loaded = LatentGenerationPipeline.from_pretrained(tmp_path / "half")
    assert loaded.prior.dtype == torch.bfloat16
    assert torch.equal(sample_images(loaded), sample_images(half))
    size = (tmp_path / "half/prior/model.safetensors").stat().st_size
    assert size < 0.65 * (folder / "prior/model.safetensors").stat().st_size


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"tokenizer": "cpu", "prior": "auto"}])
def test_a_device_map_moves_the_parts_to_their_devices(folder: Path, device_map: Any) -> None:
    pipeline = LatentGenerationPipeline.from_pretrained(folder, device_map=device_map)
    if not torch.cuda.is_available():
        assert pipeline.device.type == pipeline.tokenizer.device.type == "cpu"
    assert sample_images(pipeline).shape == (4, 1, 14, 14)


def test_a_device_map_with_an_unknown_part_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match="device_map names 'decoder'; expected 'tokenizer' or 'prior'"):
        LatentGenerationPipeline.from_pretrained(folder, device_map={"decoder": "cpu"})


# -- broken folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
@pytest.mark.parametrize("file", PARTS)
def test_a_missing_or_truncated_file_is_a_one_line_error_and_the_folder_stays_unchanged(
    folder: Path, file: str, damage: str
) -> None:
    content = (folder / file).read_bytes()
    if damage == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    before = read_files(folder)
    with pytest.raises(UserError) as caught:
        LatentGenerationPipeline.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message
    assert str(folder) in message
    if file.count("/"):
        assert str(folder / file.split("/")[0]) in message, "the message must name the broken part"
    assert read_files(folder) == before


@pytest.mark.parametrize("part", ["tokenizer", "prior"])
def test_a_missing_part_is_never_searched_on_the_hub(folder: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the relative path `pipeline/prior` looks like the name of a repository
    (folder / part).rename(folder.parent / "elsewhere")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UserError, match=f"pipeline/{part} holds no config.json"):
        LatentGenerationPipeline.from_pretrained("pipeline")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "not the index of a pipeline"),
        (b"\xff\xfe", "not the index of a pipeline"),
        (b'{"tokenizer": "VQGAN", "prior": "os.system"}', "not the index of a pipeline.*KeyError: 'os.system'"),
        (b'{"tokenizer": "VQGAN", "prior": "AutoregressivePrior", "sampling": {"topk": 3}}', "unknown.*'top_k'"),
        (b'{"tokenizer": "VQGAN", "prior": "AutoregressivePrior", "label_names": ["a"]}', "1 label names"),
    ],
)
def test_an_invalid_index_is_a_one_line_error(folder: Path, content: bytes, message: str) -> None:
    (folder / "model_index.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        LatentGenerationPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_prior_of_another_tokenizer_is_an_error(folder: Path, tmp_path: Path) -> None:
    tiny_pipeline(codebook_size=16, latent_mean=[0.0] * 4).save_pretrained(tmp_path / "other")
    (folder / "prior").rename(tmp_path / "unused")
    (tmp_path / "other" / "prior").rename(folder / "prior")
    with pytest.raises(UserError, match="the prior was trained on codes of another tokenizer"):
        LatentGenerationPipeline.from_pretrained(folder)


@pytest.mark.parametrize("source", ["", "nowhere", "./no/such", "/no/such/folder", "a/b/c", "../me/model"])
def test_a_source_that_is_no_folder_and_no_repository_is_a_one_line_error(
    source: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"expected a folder with model_index\.json") as caught:
        LatentGenerationPipeline.from_pretrained(source)
    assert "\n" not in str(caught.value)


# -- saving over existing files ---------------------------------------------------------------------------------------


def test_saving_over_an_earlier_pipeline_replaces_it(folder: Path) -> None:
    tiny_pipeline().save_pretrained(folder, metrics=METRICS, samples=Image.new("L", (8, 8)))
    LatentGenerationPipeline.from_pretrained(folder).save_pretrained(folder)  # over the pipeline that was loaded
    assert set(read_files(folder)) == {*PARTS, "README.md"}, "metrics of the earlier pipeline stayed"
    assert torch.equal(sample_images(LatentGenerationPipeline.from_pretrained(folder)), sample_images(tiny_pipeline()))
    assert [path.name for path in folder.parent.iterdir()] == ["pipeline"]


def test_files_of_the_user_stay_when_a_pipeline_is_saved_in_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    (clone / ".git").mkdir(parents=True)
    user_files = {".git/HEAD": "ref: refs/heads/main", "notes.txt": "mine", "prior.txt": "also mine"}
    for name, text in user_files.items():
        (clone / name).write_text(text)
    (clone / "README.md").write_text("---\nlicense: mit\n---\n\nMy own text.\n")
    monkeypatch.chdir(clone)
    for _ in range(2):
        tiny_pipeline().save_pretrained(".")
        card = (clone / "README.md").read_text()
        assert card.startswith("---\nlicense: mit\n---\n\nMy own text.\n")
        assert card.count("# Image generator") == 1
        (clone / "README.md").write_text(
            card.replace("<!-- latentloom: end -->", "<!-- latentloom: end -->\n\nAfter it.")
        )
    assert card.count("After it.") == 1
    assert {name: (clone / name).read_text() for name in user_files} == user_files
    assert set(read_files(clone)) == {*user_files, *PARTS, "README.md"}
    LatentGenerationPipeline.from_pretrained(".")


def test_a_card_of_an_earlier_version_is_replaced_unless_the_user_added_text(folder: Path) -> None:
    earlier_card = (FIXTURES / "pipelines" / "diffusion-unet" / "README.md").read_text()
    for added_text, num_titles in (("", 1), ("\nA sentence of mine.\n", 2)):
        (folder / "README.md").write_text(earlier_card + added_text)
        tiny_pipeline().save_pretrained(folder)
        card = (folder / "README.md").read_text()
        assert card.count("# Image generator") == num_titles
        assert added_text.strip() in card


def test_saving_over_files_that_no_pipeline_wrote_is_an_error_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    user_folder = tmp_path / "thesis"
    (user_folder / "prior").mkdir(parents=True)
    (user_folder / "prior" / "one.txt").write_text("irreplaceable", encoding="utf-8")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    for target, message in ((user_folder, "holds prior"), (folder / "notes.txt", "is a file")):
        before = read_files(tmp_path)
        with pytest.raises(UserError, match=message) as caught:
            tiny_pipeline().save_pretrained(target)
        error_message(caught)
        assert read_files(tmp_path) == before


def test_an_interrupted_save_is_detected_and_saving_again_repairs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves, move = iter(range(10)), files._move

    def interrupt_third_move(source: Path, target: Path) -> None:
        if target.parent.parent == folder and next(moves) == 2:
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_move", interrupt_third_move)
        with pytest.raises(KeyboardInterrupt):
            tiny_pipeline().save_pretrained(folder)
    with pytest.raises(UserError, match="cut short") as caught:
        LatentGenerationPipeline.from_pretrained(folder)
    error_message(caught)
    tiny_pipeline().save_pretrained(folder)
    LatentGenerationPipeline.from_pretrained(folder)


def test_a_failed_save_leaves_the_earlier_pipeline_unchanged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, pipeline = read_files(folder), tiny_pipeline()
    monkeypatch.setattr(pipeline.prior, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pipeline.save_pretrained(folder)
    assert read_files(folder.parent) == {f"pipeline/{name}": content for name, content in before.items()}


# -- the model card ----------------------------------------------------------------------------------------------------


def test_the_header_of_the_card_is_yaml_and_its_example_code_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])  # type: ignore[index]
    assert header["library_name"] == "latentloom"
    assert header["pipeline_tag"] == "unconditional-image-generation"
    assert "class-conditional" in header["tags"]
    (example_code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(folder.parent)
    exec(example_code.replace("path/or/repo-id", os.fspath(folder)), {})
    assert Image.open(folder.parent / "sample.png").size == (14, 14)
    assert "cat, dog, 7" in card


def test_the_card_and_the_folder_contain_the_metrics_and_the_grid(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "p", metrics=METRICS, samples=Image.new("L", (8, 8), 7))
    card = (tmp_path / "p" / "README.md").read_text(encoding="utf-8")
    for row in ("dB | 25.06 |", "used | 15 |", "perplexity | 12 |", "| 87.3% |", "| 10.26 |", "recall | 0.512 |"):
        assert row in card
    assert "N = 2000, seed 0, features: pixels-8x8" in card
    assert "![samples](samples.png)" in card
    assert json.loads((tmp_path / "p" / "metrics.json").read_text(encoding="utf-8")) == METRICS
    assert Image.open(tmp_path / "p" / "samples.png").getpixel((0, 0)) == 7


def test_a_card_without_metrics_grid_and_classes_mentions_none_of_them(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    prior = tiny_prior(num_classes=0, tokenizer_id=tokenizer.compute_id())
    LatentGenerationPipeline(tokenizer, prior).save_pretrained(tmp_path / "p")
    card = (tmp_path / "p" / "README.md").read_text(encoding="utf-8")
    assert "## Metrics" not in card
    assert "samples.png" not in card
    assert "class-conditional" not in card
    assert "Classes: none" in card
