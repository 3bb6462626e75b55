"""Variants on the command line: the name of a variant decides which options exist."""

import re
from pathlib import Path

import pytest
import yaml
from command_line import latentloom
from small_parts import write_images

from latentloom.commands.arguments import training_values
from latentloom.commands.variants import draft_training
from latentloom.recipes import recipe_names, recipe_values, training_type
from stage1_tokenizer.quantizers import FSQConfig
from stage1_tokenizer.registry import saved_tokenizer
from stage1_tokenizer.training_config import TokenizerTraining
from stage1_tokenizer.vqgan import VQGANModel
from stage2_prior.diffusion.config import DiTModel, UNetModel
from stage2_prior.diffusion.mean_flow import MeanFlow
from stage2_prior.training_config import DiffusionTraining
from training_harness.configuration import from_mapping

FSQ = "--model.quantizer.name fsq --model.quantizer.levels 4 4 --model.latent-channels 2 --model.codebook-size 16"
SMALL = "--model.channels 4 4 --model.blocks 0 0 --max-steps 1 --batch-size 4 --resolution 16"
PATHS = {"output": "run", "data": "x", "codes": "codes"}


def options(capsys: pytest.CaptureFixture[str], words: str) -> set[str]:
    """Return the options of the section `model` that --help lists."""
    with pytest.raises(SystemExit):
        latentloom(*words.split(), "--help")
    return set(re.findall(r"--model\.([\w.-]+)", capsys.readouterr().out))


SHAPE = {"name", "channels", "blocks", "attention", "latent-channels"}
LISTED = {
    "train-tokenizer --recipe identity": {"name"},
    "train-tokenizer --recipe kl": {*SHAPE, "prior"},
    "train-tokenizer --recipe vqgan-f4 --model.name kl": {*SHAPE, "prior"},
    "train-tokenizer --recipe vqgan-f4 --model.quantizer.name=fsq": {
        *(*SHAPE, "codebook-size", "quantizer.name", "quantizer.levels"),
    },
    "train-prior --recipe diffusion-ddpm-pixels": {
        *("name", "hidden-size", "num-layers", "schedule", "prediction", "zero-terminal-snr", "no-zero-terminal-snr"),
        *("channel-multipliers", "attention"),
    },
}


@pytest.mark.parametrize(("words", "listed"), LISTED.items(), ids=LISTED.keys())
def test_help_lists_only_the_options_of_the_variant(
    words: str, listed: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert options(capsys, words) == listed


def test_help_lists_mean_flow_options_only_for_a_prior_with_a_mean_flow(capsys: pytest.CaptureFixture[str]) -> None:
    mean_flow = {"mean-flow.max-guidance", "mean-flow.instant-share", "mean-flow.spans-from"}
    assert mean_flow <= options(capsys, "train-prior --recipe diffusion-tiny-few-steps")
    assert mean_flow <= options(capsys, "train-prior --recipe diffusion-tiny --model.mean-flow.max-guidance 3")
    assert not mean_flow & options(capsys, "train-prior --recipe diffusion-tiny")
    assert not mean_flow & options(capsys, "train-prior --recipe diffusion-tiny-few-steps --model.mean-flow none")


REFUSED = {
    "of another quantizer": (
        "train-tokenizer --recipe vqgan-f4 --model.quantizer.levels 8 8",
        "unknown option '--model.quantizer.levels'; it belongs to another variant; give --model.quantizer.name fsq",
    ),
    "of another tokenizer": (
        "train-tokenizer --recipe vqgan-f4 --model.name kl --model.quantizer.name fsq",
        "unknown option '--model.quantizer.name'; it belongs to another variant; give --model.name vqgan",
    ),
    "of another denoiser": (
        "train-prior --recipe diffusion-ddpm-pixels --model.mean-flow.max-guidance 3",
        "unknown option '--model.mean-flow.max-guidance'; it belongs to another variant; give --model.name dit",
    ),
    "no variant": (
        "train-tokenizer --recipe vqgan-f4 --model.name vqgn",
        "--model.name is 'vqgn'; did you mean 'vqgan'?",
    ),
    "a required option": (
        "train-tokenizer --recipe vqgan-f4 --model.quantizer.name fsq",
        "--model.quantizer.levels missing; expected a value after it",
    ),
    "values that do not go together": (
        "train-tokenizer --recipe vqgan-f4 --model.quantizer.name fsq --model.quantizer.levels 8 8",
        "model.codebook_size is 512 and model.latent_channels is 16; expected 64 and 2",
    ),
    "an old name": (
        "train-prior --recipe diffusion-tiny --model.denoiser unet",
        "unknown option '--model.denoiser'; it is --model.name now",
    ),
    "an old place": (
        "train-prior --model.class-dropout=0.2",
        "unknown option '--model.class-dropout'; it is --class-dropout now",
    ),
    "an old choice": (
        "train-prior --recipe diffusion-tiny-few-steps --model.mean-flow False",
        "--model.mean-flow is given with 'False'; expected none, or an option of the section, such as "
        "--model.mean-flow.max-guidance",
    ),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_of_another_variant_is_an_error_of_one_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *rest = words.split()
    source = "--data" if verb == "train-tokenizer" else "--codes"
    assert latentloom(verb, source, write_images(tmp_path / "images"), "--output", tmp_path / "run", *rest) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


def test_the_command_line_chooses_the_variant_that_the_parser_gets() -> None:
    values = training_values("tokenizer", "vqgan-f4", None, {"data": "x", "output": "run"})
    training, words = draft_training(TokenizerTraining, values, FSQ.split())
    assert words == FSQ.split()
    assert isinstance(training.model, VQGANModel)
    assert isinstance(training.model.quantizer, FSQConfig)
    assert training.model.channels == (16, 64, 128)  # from the recipe, because the variant has this field too
    values = training_values("prior", "diffusion-tiny-few-steps", None, {"codes": "x", "output": "run"})
    plain, words = draft_training(DiffusionTraining, values, ["--seed", "3", "--model.mean-flow", "none"])
    assert words == ["--seed", "3"]
    assert isinstance(plain.model, DiTModel)
    assert plain.model.mean_flow is None
    unet, _ = draft_training(DiffusionTraining, values, ["--model.name", "unet"])
    assert isinstance(unet.model, UNetModel)
    assert unet.model.hidden_size == 192
    values = training_values("prior", "diffusion-tiny", None, {"codes": "x", "output": "run"})
    flow, _ = draft_training(DiffusionTraining, values, ["--model.mean_flow.spans_from=0.5"])
    assert flow.model.mean_flow == MeanFlow()  # the parser reads the value later


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_every_recipe_has_only_options_of_its_variants(stage: str) -> None:
    for name in recipe_names(stage):
        values = recipe_values(name, stage)
        cls = training_type(stage, values)
        paths = {field: path for field, path in PATHS.items() if field in cls.__dataclass_fields__}
        from_mapping(cls, values | paths)  # strictly, in the present format


def test_a_yaml_file_over_a_recipe_may_name_another_variant(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("model: {latent_channels: 3, quantizer: {name: fsq, levels: [8, 8, 8]}}\n")
    values = training_values("tokenizer", "vqgan-f4", path, {"data": "x", "output": "run"})
    model = from_mapping(TokenizerTraining, values).model
    assert model == VQGANModel(
        channels=(16, 64, 128), blocks=(1, 1, 1), latent_channels=3, quantizer=FSQConfig(levels=(8, 8, 8))
    )
    path.write_text("model: {denoiser: unet, channel_multipliers: [1, 2]}\n")
    values = training_values("prior", "diffusion-tiny", path, {"codes": "x", "output": "run"})
    assert from_mapping(DiffusionTraining, values).model == UNetModel(
        hidden_size=192, num_layers=4, channel_multipliers=(1, 2)
    )


def test_the_configuration_of_a_run_repeats_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, run, again = write_images(tmp_path / "images"), tmp_path / "run", tmp_path / "again"
    arguments = ["--data", images, "--recipe", "vqgan-f4", *SMALL.split(), *FSQ.split()]
    assert latentloom("train-tokenizer", *arguments, "--output", run) == 0
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["format"] == 2
    assert stored["model"]["quantizer"] == {"name": "fsq", "levels": [4, 4]}
    assert latentloom("train-tokenizer", "--config", run / "config.yaml", "--output", again) == 0
    assert yaml.safe_load((again / "config.yaml").read_text()) == stored | {"output": str(again)}
    first, second = (saved_tokenizer(folder / "model") for folder in (run, again))
    assert first.config.tokenizer_id == second.config.tokenizer_id
    capsys.readouterr()
    assert latentloom("train-tokenizer", "--config", run / "config.yaml") == 0
    assert "has finished its 1 steps" in capsys.readouterr().out
