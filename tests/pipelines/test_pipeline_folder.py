"""The pipeline's folder: what is saved comes back, what is broken is refused in one line, and nothing is lost."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import CHECKOUT, latentloom
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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def images(pipeline: LatentGenerationPipeline, **options: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(["dog", 0], 2, generator=seeded(0), output_type="pt", **options).images


# -- round trip -------------------------------------------------------------------------------------------------------


def test_classes_without_training_images_are_sampled_only_when_named(folder: Path, tmp_path: Path) -> None:
    whole = LatentGenerationPipeline.from_pretrained(folder)
    assert whole.trained_classes == (0, 1, 2)
    assert "trained_classes" not in json.loads((folder / "model_index.json").read_text())
    part = LatentGenerationPipeline(whole.tokenizer, whole.prior, LABEL_NAMES, trained_classes=[2, 0])
    part.save_pretrained(tmp_path / "part")
    again = LatentGenerationPipeline.from_pretrained(tmp_path / "part")
    assert again.trained_classes == (0, 2)
    assert balanced_labels(again, 4).tolist() == [0, 0, 2, 2]
    assert again.label_ids(LABEL_NAMES[1]) == [1]
    assert (
        latentloom("sample", "--pipeline", tmp_path / "part", "--num-images", 4, "--output", tmp_path / "samples") == 0
    )
    names = {path.stem.split("-")[1] for path in (tmp_path / "samples").glob("0*.png")}
    assert names == {LABEL_NAMES[0], LABEL_NAMES[2]}


def test_a_new_process_samples_the_same_images_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    program = f"""
import torch
from pipelines import LatentGenerationPipeline
torch.set_num_threads(1)
pipeline = LatentGenerationPipeline.from_pretrained({str(folder)!r})
generator = torch.Generator().manual_seed(0)
torch.save(pipeline(["dog", 0], 2, generator=generator, output_type="pt").images, {str(tmp_path / "images.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    there = torch.load(tmp_path / "images.pt", weights_only=True)
    assert torch.equal(there, images(tiny_pipeline()))
    assert not torch.equal(there, images(tiny_pipeline(), top_k=1))


def test_names_options_and_every_weight_come_back(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    prior = tiny_prior(tokenizer_id=tokenizer.compute_id())
    sampling = SamplingOptions(guidance_scale=1.75, temperature=0.9, top_k=12, top_p=0.95)
    LatentGenerationPipeline(tokenizer, prior, LABEL_NAMES, sampling).save_pretrained(tmp_path / "pipeline")
    assert set(contents(tmp_path / "pipeline")) == {*PARTS, "README.md"}
    again = LatentGenerationPipeline.from_pretrained(tmp_path / "pipeline")
    assert again.label_names == LABEL_NAMES
    assert again.sampling == sampling
    for ours, theirs in ((tokenizer, again.tokenizer), (prior, again.prior)):
        assert ours.config.to_diff_dict() == theirs.config.to_diff_dict()
        assert all(torch.equal(theirs.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


def test_a_run_folder_is_as_good_as_the_pipeline_in_it(folder: Path) -> None:
    assert torch.equal(images(LatentGenerationPipeline.from_pretrained(folder.parent)), images(tiny_pipeline()))


def test_half_precision_is_loaded_saved_and_still_fits_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    half = LatentGenerationPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.tokenizer.dtype == half.prior.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    again = LatentGenerationPipeline.from_pretrained(tmp_path / "half")
    assert again.prior.dtype == torch.bfloat16
    assert torch.equal(images(again), images(half))
    size = (tmp_path / "half/prior/model.safetensors").stat().st_size
    assert size < 0.65 * (folder / "prior/model.safetensors").stat().st_size


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"tokenizer": "cpu", "prior": "auto"}])
def test_a_device_map_places_the_parts(folder: Path, device_map: Any) -> None:
    placed = LatentGenerationPipeline.from_pretrained(folder, device_map=device_map)
    if not torch.cuda.is_available():
        assert placed.device.type == placed.tokenizer.device.type == "cpu"
    assert images(placed).shape == (4, 1, 14, 14)


def test_a_device_map_that_names_another_part_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="device_map names 'decoder'; expected 'tokenizer' or 'prior'"):
        LatentGenerationPipeline.from_pretrained(folder, device_map={"decoder": "cpu"})


# -- broken folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "cut short", "empty"])
@pytest.mark.parametrize("file", PARTS)
def test_a_file_missing_or_cut_short_is_one_line_and_the_folder_is_left_as_it_was(
    folder: Path, file: str, damage: str
) -> None:
    whole = (folder / file).read_bytes()
    if damage == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(whole[: len(whole) // 2] if damage == "cut short" else b"")
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        LatentGenerationPipeline.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message
    assert str(folder) in message
    if file.count("/"):
        assert str(folder / file.split("/")[0]) in message, "which part is broken"
    assert contents(folder) == before


@pytest.mark.parametrize("part", ["tokenizer", "prior"])
def test_a_part_that_is_missing_altogether_is_never_looked_for_on_the_hub(
    folder: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `pipeline/prior`, relative, has the form of a repository's name.
    (folder / part).rename(folder.parent / "elsewhere")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UserError, match=f"pipeline/{part} holds no config.json"):
        LatentGenerationPipeline.from_pretrained("pipeline")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "not that of a pipeline"),
        (b"\xff\xfe", "not that of a pipeline"),
        (b'{"tokenizer": "VQGAN", "prior": "os.system"}', "not that of a pipeline.*KeyError: 'os.system'"),
        (b'{"tokenizer": "VQGAN", "prior": "AutoregressivePrior", "sampling": {"topk": 3}}', "unknown.*'top_k'"),
        (b'{"tokenizer": "VQGAN", "prior": "AutoregressivePrior", "label_names": ["a"]}', "1 label names"),
    ],
)
def test_an_index_that_does_not_fit_is_one_line(folder: Path, content: bytes, message: str) -> None:
    (folder / "model_index.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        LatentGenerationPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_prior_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    tiny_pipeline(codebook_size=16, latent_mean=[0.0] * 4).save_pretrained(tmp_path / "other")
    (folder / "prior").rename(tmp_path / "unused")
    (tmp_path / "other" / "prior").rename(folder / "prior")
    with pytest.raises(UserError, match="the prior was trained on codes of another tokenizer"):
        LatentGenerationPipeline.from_pretrained(folder)


@pytest.mark.parametrize("source", ["", "nowhere", "./no/such", "/no/such/folder", "a/b/c", "../me/model"])
def test_a_source_that_is_no_folder_and_no_repository_is_one_line(source: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"expected a folder with model_index\.json") as caught:
        LatentGenerationPipeline.from_pretrained(source)
    assert "\n" not in str(caught.value)


# -- saving over something --------------------------------------------------------------------------------------------


def test_saving_over_an_earlier_pipeline_takes_its_place(folder: Path) -> None:
    tiny_pipeline().save_pretrained(folder, metrics=METRICS, samples=Image.new("L", (8, 8)))
    LatentGenerationPipeline.from_pretrained(folder).save_pretrained(folder)  # over the one that it was loaded from
    assert set(contents(folder)) == {*PARTS, "README.md"}, "figures of another pipeline stayed"
    assert torch.equal(images(LatentGenerationPipeline.from_pretrained(folder)), images(tiny_pipeline()))
    assert [path.name for path in folder.parent.iterdir()] == ["pipeline"]


def test_files_of_the_user_stay_when_a_pipeline_is_saved_among_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    (clone / ".git").mkdir(parents=True)
    mine = {".git/HEAD": "ref: refs/heads/main", "notes.txt": "mine", "prior.txt": "also mine"}
    for name, text in mine.items():
        (clone / name).write_text(text)
    (clone / "README.md").write_text("---\nlicense: mit\n---\n\nWords of mine.\n")
    monkeypatch.chdir(clone)
    for _ in range(2):
        tiny_pipeline().save_pretrained(".")
        card = (clone / "README.md").read_text()
        assert card.startswith("---\nlicense: mit\n---\n\nWords of mine.\n")
        assert card.count("# Image generator") == 1
        (clone / "README.md").write_text(
            card.replace("<!-- latentloom: end -->", "<!-- latentloom: end -->\n\nAfter it.")
        )
    assert card.count("After it.") == 1
    assert {name: (clone / name).read_text() for name in mine} == mine
    assert set(contents(clone)) == {*mine, *PARTS, "README.md"}
    LatentGenerationPipeline.from_pretrained(".")


def test_a_card_of_an_earlier_version_is_replaced_as_long_as_nothing_was_added_to_it(folder: Path) -> None:
    earlier = (FIXTURES / "pipelines" / "diffusion-unet" / "README.md").read_text()
    for added, titles in (("", 1), ("\nA sentence of mine.\n", 2)):
        (folder / "README.md").write_text(earlier + added)
        tiny_pipeline().save_pretrained(folder)
        card = (folder / "README.md").read_text()
        assert card.count("# Image generator") == titles
        assert added.strip() in card


def test_a_name_that_no_pipeline_wrote_is_refused_and_left_as_it_was(folder: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    (foreign / "prior").mkdir(parents=True)
    (foreign / "prior" / "one.txt").write_text("irreplaceable", encoding="utf-8")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    for target, named in ((foreign, "holds prior"), (folder / "notes.txt", "is a file")):
        before = contents(tmp_path)
        with pytest.raises(UserError, match=named) as caught:
            tiny_pipeline().save_pretrained(target)
        error_message(caught)
        assert contents(tmp_path) == before


def test_a_save_that_was_cut_short_is_recognised_and_saving_again_mends_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves, move = iter(range(10)), files._move

    def killed_at_the_third(source: Path, target: Path) -> None:
        if target.parent.parent == folder and next(moves) == 2:
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_move", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            tiny_pipeline().save_pretrained(folder)
    with pytest.raises(UserError, match="cut short") as caught:
        LatentGenerationPipeline.from_pretrained(folder)
    error_message(caught)
    tiny_pipeline().save_pretrained(folder)
    LatentGenerationPipeline.from_pretrained(folder)


def test_a_save_that_fails_leaves_the_earlier_pipeline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, pipeline = contents(folder), tiny_pipeline()
    monkeypatch.setattr(pipeline.prior, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pipeline.save_pretrained(folder)
    assert contents(folder.parent) == {f"pipeline/{name}": content for name, content in before.items()}


# -- the card ---------------------------------------------------------------------------------------------------------


def test_the_cards_front_matter_is_yaml_and_its_snippet_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])  # type: ignore[index]
    assert header["library_name"] == "latentloom"
    assert header["pipeline_tag"] == "unconditional-image-generation"
    assert "class-conditional" in header["tags"]
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(folder.parent)
    exec(snippet.replace("path/or/repo-id", os.fspath(folder)), {})
    assert Image.open(folder.parent / "sample.png").size == (14, 14)
    assert "cat, dog, 7" in card


def test_the_card_and_the_folder_carry_the_figures_and_the_grid(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "p", metrics=METRICS, samples=Image.new("L", (8, 8), 7))
    card = (tmp_path / "p" / "README.md").read_text(encoding="utf-8")
    for row in ("dB | 25.06 |", "used | 15 |", "perplexity | 12 |", "| 87.3% |", "| 10.26 |", "recall | 0.512 |"):
        assert row in card
    assert "N = 2000, seed 0, features: pixels-8x8" in card
    assert "![samples](samples.png)" in card
    assert json.loads((tmp_path / "p" / "metrics.json").read_text(encoding="utf-8")) == METRICS
    assert Image.open(tmp_path / "p" / "samples.png").getpixel((0, 0)) == 7


def test_a_card_without_figures_grid_or_classes_mentions_none(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    prior = tiny_prior(num_classes=0, tokenizer_id=tokenizer.compute_id())
    LatentGenerationPipeline(tokenizer, prior).save_pretrained(tmp_path / "p")
    card = (tmp_path / "p" / "README.md").read_text(encoding="utf-8")
    assert "Figures" not in card
    assert "samples.png" not in card
    assert "class-conditional" not in card
    assert "Classes: none" in card
