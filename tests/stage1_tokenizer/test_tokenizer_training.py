"""Stage one learns, leaves the run folder of the design, and goes on after a kill as if nothing had happened."""

import math
import re
import shutil
from collections.abc import Callable, Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from small_parts import error_message, write_images

from stage1_tokenizer import train as stage_one
from stage1_tokenizer.autoencoder_kl import AutoencoderKL, AutoencoderKLModel
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.sources import open_source
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.losses.adversarial import AdversarialConfig, LeCAM
from stage1_tokenizer.losses.reconstruction import ReconstructionConfig
from stage1_tokenizer.migration import TRAINING
from stage1_tokenizer.quantizers import EMAVectorQuantizerConfig, VectorQuantizerConfig
from stage1_tokenizer.train import train_tokenizer
from stage1_tokenizer.training_config import TokenizerTraining, completed, model_config, parse_size
from stage1_tokenizer.vqgan import VQGAN, VQGANModel
from training_harness.configuration import from_mapping, read_yaml
from training_harness.ema import EMAConfig
from training_harness.errors import ConfigError
from training_harness.guard import NonFiniteLossError
from training_harness.metric_log import read_metrics
from training_harness.optimization import OptimizerConfig, ScheduleConfig
from training_harness.run_folder import check_run_folder

SHAPE: dict[str, Any] = {"channels": (8, 8, 16), "blocks": (0, 1, 1), "attention": (4,), "latent_channels": 4}
MODEL = VQGANModel(**SHAPE, codebook_size=16)
ADVERSARIAL = AdversarialConfig(weight=0.5, start=2, warmup=2, ramp=4, channels=4, layers=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("source") / "pictures")


def training(output: Path, pictures: Path, **fields: Any) -> TokenizerTraining:
    steps = {"max_steps": 12, "batch_size": 4, "log_every": 1, "sample_every": 6, "checkpoint_every": 3}
    defaults = {"output": output, "data": str(pictures), "model": MODEL, "keep_checkpoints": 9, **steps}
    return TokenizerTraining(**defaults | fields)


def pixels_of(config: TokenizerTraining) -> tuple[ImageLoader, ImageLoader]:
    source = open_source(config.data)
    processor = model_config(config, dataset_statistics(source.train)).image_processor
    return ImageLoader(source.train, processor), ImageLoader(source.validation, processor)


def trained(config: TokenizerTraining, perceptual: Callable | None = None) -> Path:
    seen = dataset_statistics(open_source(config.data).train)
    config = completed(config, seen)
    return train_tokenizer(config, model_config(config, seen), *pixels_of(config), perceptual)


def rows_of(output: Path) -> list[dict[str, float]]:
    """Logged rows without what a clock or a restart writes."""
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "resumed_from" not in row]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The run folder


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory) -> Path:
    """The output of a run of 12 steps with a discriminator."""
    output = tmp_path_factory.mktemp("run") / "run"
    trained(training(output, pictures, adversarial=ADVERSARIAL))
    return output


def test_a_run_leaves_the_folder_of_the_design(finished, pictures):
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "run.json",
        "samples",
        "checkpoints",
        "model",
    }
    assert sorted(path.name for path in (finished / "samples").iterdir()) == ["step_000006.png", "step_000012.png"]
    steps = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert steps == [f"step_{step:06d}" for step in (3, 6, 9, 12)]
    assert sorted(p.name for p in (finished / "model").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    with Image.open(finished / "samples" / "step_000012.png") as sheet:
        assert len(sheet.getcolors(1 << 20)) > 10


def test_the_configuration_it_leaves_repeats_the_run(finished, pictures, tmp_path):
    config = from_mapping(TokenizerTraining, TRAINING.migrate(read_yaml(finished / "config.yaml")))
    assert (config.resolution, config.image_channels) == ("16x16", 3)
    again = trained(replace(config, output=tmp_path / "again"))
    assert same(weights(again), weights(finished / "model"))
    assert rows_of(tmp_path / "again") == rows_of(finished)
    other = trained(replace(config, output=tmp_path / "other", seed=1))
    assert not same(weights(other), weights(finished / "model"))


def test_the_log_has_every_term_from_the_step_it_begins(finished):
    rows = [row for row in rows_of(finished) if "l1" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all({"l1", "l2", "commitment", "learning_rate", "gradient_norm"} <= row.keys() for row in rows)
    for term in ("discriminator", "logits_real", "logits_fake", "discriminator_gradient_norm"):
        assert [row["step"] for row in rows if term in row] == list(range(3, 13)), term
    for term in ("generator", "adaptive_weight"):
        assert [row["step"] for row in rows if term in row] == list(range(5, 13)), term
    figures = [row for row in rows_of(finished) if "validation_psnr" in row]
    assert [row["step"] for row in figures] == [6, 12]
    assert all(1 <= row["codes_used"] <= 16 and row["perplexity"] <= row["codes_used"] + 1e-3 for row in figures)


def test_the_model_card_shows_the_figures_and_code_that_runs(finished):
    card = (finished / "model" / "README.md").read_text(encoding="utf-8")
    figures = [row for row in rows_of(finished) if "validation_psnr" in row][-1]
    assert f"{figures['validation_psnr']:.2f} dB" in card
    snippet = card.split("```python\n")[1].split("```")[0].replace("path/or/repo-id", str(finished / "model"))
    names: dict[str, Any] = {"pixel_values": torch.zeros(2, 3, 16, 16)}
    exec(snippet, names)
    assert names["images"].shape == (2, 3, 16, 16)


def test_the_model_is_the_averaged_one(finished):
    state = torch.load(finished / "checkpoints" / "step_000012" / "state.pt", weights_only=True)["objects"]
    model = weights(finished / "model")
    assert same(model, {name: value.contiguous() for name, value in state["ema"].items()})
    assert not same(model, {name: value.contiguous() for name, value in state["model"].items()})


@torch.no_grad()
def test_latents_have_zero_mean_and_unit_variance_over_the_training_set_and_not_over_another(finished):
    tokenizer = VQGAN.from_pretrained(finished / "model")
    config = from_mapping(TokenizerTraining, TRAINING.migrate(read_yaml(finished / "config.yaml")))
    train, _ = pixels_of(config)
    processor = tokenizer.config.image_processor
    latents = tokenizer.encode_latents(processor.preprocess(train[range(len(train))])).double()
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert (latents.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-3
    other = tokenizer.encode_latents(processor.preprocess(255 - train[range(len(train))]))
    assert other.mean((0, 2, 3)).abs().max() > 1e-2
    assert tokenizer.config.tokenizer_id == tokenizer.compute_id()


# Learning


def test_a_few_pictures_are_learnt_by_heart(tmp_path):
    config = training(
        tmp_path / "run",
        write_images(tmp_path / "four", count=5),
        max_steps=80,
        sample_every=80,
        checkpoint_every=80,
        optimizer=OptimizerConfig(learning_rate=5e-3),
    )
    trained(config)
    errors = [row["l1"] for row in rows_of(config.output) if "l1" in row]
    assert min(errors[-5:]) < 0.4 * errors[0]


def test_the_loss_that_is_minimised_is_the_weighted_sum_of_the_logged_terms(tmp_path, pictures, monkeypatch):
    losses: list[float] = []
    backward = Accelerator.backward

    def noted(self: Accelerator, loss: torch.Tensor, **kwargs: Any) -> None:
        losses.append(loss.item())
        backward(self, loss, **kwargs)

    monkeypatch.setattr(Accelerator, "backward", noted)
    reconstruction = ReconstructionConfig(l1=0.7, l2=1.3, perceptual=0.6, commitment=0.2, codebook=1.1)
    model = replace(MODEL, quantizer=VectorQuantizerConfig())
    config = training(tmp_path / "run", pictures, reconstruction=reconstruction, adversarial=ADVERSARIAL, model=model)
    trained(config, perceptual=lambda a, b: (a - b).abs().amax())
    for row in rows_of(config.output):
        if "l1" not in row:
            continue
        expected = 0.7 * row["l1"] + 1.3 * row["l2"] + 0.6 * row["perceptual"]
        expected += 1.1 * row["codebook"] + 0.2 * row["commitment"]
        if "generator" in row:
            share = min(1.0, (row["step"] - 4) / 4)
            expected += share * 0.5 * row["adaptive_weight"] * row["generator"]
        assert losses.pop(0) == pytest.approx(expected, rel=1e-4)
        if "discriminator" in row:
            assert losses.pop(0) == pytest.approx(row["discriminator"], rel=1e-4)
    assert losses == []


def test_beta_weighs_the_commitment_of_the_encoder_and_leaves_the_codebook_s_step_alone(tmp_path, pictures):
    def after_one_step(beta: float) -> dict[str, torch.Tensor]:
        config = training(
            tmp_path / str(beta),
            pictures,
            max_steps=1,
            model=replace(MODEL, quantizer=VectorQuantizerConfig(restart_threshold=0.0)),
            reconstruction=ReconstructionConfig(commitment=beta),
            optimizer=OptimizerConfig(max_grad_norm=0.0),
            schedule=ScheduleConfig(warmup=0, decay="constant"),
            ema=EMAConfig(decay=0.0),
        )
        return weights(trained(config))

    without, strong = after_one_step(0.0), after_one_step(5.0)
    assert torch.equal(without["quantizer.codebook"], strong["quantizer.codebook"])
    assert not torch.equal(without["encoder.0.weight"], strong["encoder.0.weight"])


def test_a_single_bad_step_is_passed_over_and_bad_steps_in_a_row_end_the_run_in_one_line(tmp_path, pictures):
    def bad_at(*calls: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        count = iter(range(1, 100))
        return lambda a, b: (a - b).square().mean() * (float("nan") if next(count) in calls else 1.0)

    folder = trained(training(tmp_path / "once", pictures, adversarial=ADVERSARIAL), bad_at(7))
    assert all(value.isfinite().all() for value in weights(folder).values())
    state = torch.load(tmp_path / "once" / "checkpoints" / "step_000012" / "state.pt", weights_only=True)["objects"]
    assert all(value.isfinite().all() for value in state["discriminator"].values())
    with pytest.raises(NonFiniteLossError) as caught:
        trained(training(tmp_path / "often", pictures), bad_at(*range(4, 12)))
    assert "perceptual = nan" in error_message(caught)
    assert not (tmp_path / "often" / "model").exists()


TERMS = (
    "l1",
    "l2",
    "charbonnier",
    "codebook",
    "commitment",
    "kl",
    "generator",
    "adaptive_weight",
    "discriminator",
    "r1",
    "lecam",
)


def break_term(monkeypatch: pytest.MonkeyPatch, term: str, steps: Container[int]) -> None:
    """Makes a loss term NaN in those steps, where the loop computes it."""
    count = iter(range(1, 1000))

    def broken(found: Any) -> Any:
        if next(count) not in steps:
            return found
        return {**found, term: found[term] * math.nan} if isinstance(found, dict) else found * math.nan

    if term in ("codebook", "commitment", "kl"):
        kind = AutoencoderKL if term == "kl" else VQGAN
        forward = kind.forward

        def bad(self: VQGAN, pixel_values: torch.Tensor) -> Any:
            output = forward(self, pixel_values)
            return output._replace(losses=broken(output.losses)) if self.training else output

        monkeypatch.setattr(kind, "forward", bad)
        return
    names = {
        "generator": "generator_loss",
        "discriminator": "discriminator_loss",
        "adaptive_weight": "adaptive_weight",
        "r1": "r1_penalty",
    }
    place, name = (LeCAM, "penalty") if term == "lecam" else (stage_one, names.get(term, "reconstruction_terms"))
    whole = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *arguments: broken(whole(*arguments)))


@pytest.mark.parametrize("term", TERMS)
def test_a_nan_in_any_loss_term_is_named_and_reaches_no_weight(tmp_path, pictures, monkeypatch, term):
    judged = replace(ADVERSARIAL, start=0, warmup=0, ramp=1, r1=0.1, lecam=0.1)
    config = training(tmp_path / "run", pictures, adversarial=judged, checkpoint_every=1, keep_checkpoints=20)
    config = replace(config, reconstruction=replace(config.reconstruction, charbonnier=1.0))
    if term == "codebook":  # that of moving averages has none
        config = replace(config, model=replace(MODEL, quantizer=VectorQuantizerConfig()))
    if term == "kl":
        config = replace(config, model=AutoencoderKLModel(**SHAPE))
    with monkeypatch.context() as patch:
        break_term(patch, term, range(6, 100))
        with pytest.raises(NonFiniteLossError) as caught:
            trained(config)
    assert re.match(rf"step 10: .*\b{term} = nan", error_message(caught))
    rows = read_metrics(config.output / "skipped_steps.0.jsonl")
    assert [row["step"] for row in rows] == [6, 7, 8, 9, 10]
    assert all(row[term] == "nan" and len(row["source_ids"]) == config.batch_size for row in rows)
    for step in (5, 9):
        state = torch.load(config.output / f"checkpoints/step_{step:06d}/state.pt", weights_only=True)["objects"]
        for name in ("discriminator", "model", "ema"):
            assert all(value.isfinite().all() for value in state[name].values()), (step, name)
    trained(config)  # without the fault it goes on from step 9
    assert all(value.isfinite().all() for value in weights(config.output / "model").values())


def test_a_batch_whose_reconstruction_is_not_finite_never_reaches_the_discriminator(tmp_path, pictures, monkeypatch):
    forward, count = VQGAN.forward, iter(range(1, 100))

    def sometimes_broken(self: VQGAN, pixel_values: torch.Tensor):
        output = forward(self, pixel_values)
        broken = self.training and next(count) == 7
        return output._replace(reconstruction=output.reconstruction * float("nan")) if broken else output

    monkeypatch.setattr(VQGAN, "forward", sometimes_broken)
    config = training(tmp_path / "run", pictures, adversarial=ADVERSARIAL)
    trained(config)
    state = torch.load(config.output / "checkpoints" / "step_000012" / "state.pt", weights_only=True)["objects"]
    assert math.isnan([row["l1"] for row in rows_of(config.output) if "l1" in row][6])
    for name in ("discriminator", "model", "ema"):
        assert all(value.isfinite().all() for value in state[name].values()), name


def test_under_bfloat16_the_run_learns_and_the_average_is_what_is_shown(tmp_path, pictures):
    config = training(tmp_path / "run", pictures, mixed_precision="bf16", adversarial=ADVERSARIAL, max_steps=6)
    folder = trained(config)
    figures = [row for row in rows_of(config.output) if "validation_psnr" in row][-1]
    tokenizer = VQGAN.from_pretrained(folder)
    _, validation = pixels_of(completed(config, dataset_statistics(open_source(pictures).train)))
    shown = stage_one.validation_psnr(tokenizer, validation)
    assert shown == pytest.approx(figures["validation_psnr"], abs=0.2)  # bfloat16's rounding
    floats = [value for value in weights(folder).values() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}


# Going on


VARIANTS: dict[str, dict[str, Any]] = {
    "ema codebook that restarts, discriminator": {
        "adversarial": ADVERSARIAL,
        "model": replace(MODEL, codebook_size=64, quantizer=EMAVectorQuantizerConfig(usage_decay=0.5)),
    },
    "learnt codebook, muon, discriminator": {
        "adversarial": ADVERSARIAL,
        "model": replace(MODEL, quantizer=VectorQuantizerConfig()),
        "optimizer": OptimizerConfig(name="muon"),
    },
    "accumulated": {"accumulation_steps": 2, "batch_size": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("torn", [False, True], ids=["killed", "torn checkpoint"])
def test_a_killed_run_goes_on_to_bitwise_the_weights_of_one_that_was_not(tmp_path, pictures, variant, torn):
    config = training(tmp_path / "whole", pictures, **VARIANTS[variant])
    whole = trained(config)
    part = tmp_path / "part"
    for step in (3, 6, *([9] if torn else [])):
        name = f"step_{step:06d}"
        shutil.copytree(config.output / "checkpoints" / name, part / "checkpoints" / name)
    if torn:
        newest = part / "checkpoints" / "step_000009" / "state.pt"
        newest.write_bytes(newest.read_bytes()[:-1000])
    log = (config.output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (part / "metrics.jsonl").write_text("".join(log[:8]) + log[8][:20])  # and a line cut short
    resumed = trained(replace(config, output=part))
    assert {"step": 6, "resumed_from": 6} in read_metrics(part / "metrics.jsonl")
    assert same(weights(resumed), weights(whole))
    assert (resumed / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert rows_of(part) == rows_of(config.output)


def test_a_finished_run_is_left_alone_and_a_larger_number_of_steps_extends_it(tmp_path, pictures):
    seen = dataset_statistics(open_source(pictures).train)
    config = completed(training(tmp_path / "run", pictures, max_steps=6), seen)
    first = weights(trained(config))
    assert check_run_folder(config, "tokenizer") == 6
    longer = replace(config, max_steps=9)
    assert check_run_folder(longer, "tokenizer") is None
    assert not same(weights(trained(longer)), first)
    assert check_run_folder(longer, "tokenizer") == 9
    assert [row["step"] for row in rows_of(config.output) if "l1" in row] == list(range(1, 10))
    assert yaml.safe_load((config.output / "config.yaml").read_text())["max_steps"] == 9


def test_a_model_that_was_not_written_any_more_is_written_without_another_step(tmp_path, pictures):
    config = training(tmp_path / "run", pictures, max_steps=3)
    before = weights(trained(config))
    shutil.rmtree(config.output / "model")
    assert same(weights(trained(config)), before)


# Sizes


def test_sizes_read_as_height_and_width():
    assert (parse_size(64), parse_size("64"), parse_size("64x96")) == ((64, 64), (64, 64), (64, 96))
    for wrong in ("", "64x", "x64", "64x96x3", "-64", "0", "big", "64.5"):
        with pytest.raises(ConfigError) as caught:
            parse_size(wrong)
        assert wrong in error_message(caught)


def config_for(tmp_path: Path, size: tuple[int, int], **fields: Any):
    seen = dataset_statistics(open_source(write_images(tmp_path / "pictures", count=3, size=size)).train)
    config = completed(training(tmp_path / "run", tmp_path / "pictures", **fields), seen)
    return model_config(config, seen)


def test_pictures_that_f_does_not_divide_are_padded_or_refused_as_asked(tmp_path):
    padded = config_for(tmp_path, (14, 18))
    assert (tuple(padded.image_size), tuple(padded.content_size)) == ((16, 20), (14, 18))
    with pytest.raises(ConfigError) as caught:
        config_for(tmp_path, (14, 18), padding="refuse")
    assert "16x20" in error_message(caught)


def test_a_resolution_a_little_above_the_pictures_pads_them_and_another_resamples(tmp_path):
    assert tuple(config_for(tmp_path, (28, 28), resolution=32).content_size) == (28, 28)
    assert tuple(config_for(tmp_path, (28, 28), resolution=64).content_size) == (64, 64)


def test_pictures_too_small_for_the_discriminator_are_refused_before_the_run(tmp_path):
    adversarial = AdversarialConfig(weight=1.0, layers=3)
    with pytest.raises(ConfigError) as caught:
        config_for(tmp_path, (16, 32), adversarial=adversarial)
    assert "adversarial.layers" in error_message(caught)
    assert "24 pixels" in str(caught.value)
    assert config_for(tmp_path, (16, 32), adversarial=replace(adversarial, weight=0.0))


@pytest.mark.parametrize(
    "fields",
    [
        {"blocks": (1, 1)},
        {"channels": (), "blocks": (), "attention": ()},
        {"channels": (8, -8, 8)},
        {"blocks": (0, -1, 1)},
        {"codebook_size": 0},
        {"latent_channels": -4},
    ],
    ids=str,
)
def test_a_model_that_cannot_be_is_one_line_with_its_field(fields):
    with pytest.raises(ConfigError) as caught:
        replace(MODEL, **fields)
    assert f"model.{next(iter(fields))}" in error_message(caught)
