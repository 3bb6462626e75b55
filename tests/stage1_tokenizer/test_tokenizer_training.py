"""Stage one trains a tokenizer, writes the documented run folder, and resumes a killed run with equal results."""

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
from stage1_tokenizer.training_config import TokenizerTraining, build_model_config, complete_config, parse_size
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
def image_folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("source") / "images")


def create_config(output: Path, image_folder: Path, **fields: Any) -> TokenizerTraining:
    steps = {"max_steps": 12, "batch_size": 4, "log_every": 1, "sample_every": 6, "checkpoint_every": 3}
    defaults = {"output": output, "data": str(image_folder), "model": MODEL, "keep_checkpoints": 9, **steps}
    return TokenizerTraining(**defaults | fields)


def load_images(config: TokenizerTraining) -> tuple[ImageLoader, ImageLoader]:
    source = open_source(config.data)
    processor = build_model_config(config, dataset_statistics(source.train)).image_processor
    return ImageLoader(source.train, processor), ImageLoader(source.validation, processor)


def run_training(config: TokenizerTraining, perceptual: Callable | None = None) -> Path:
    statistics = dataset_statistics(open_source(config.data).train)
    config = complete_config(config, statistics)
    return train_tokenizer(config, build_model_config(config, statistics), *load_images(config), perceptual)


def read_rows(output: Path) -> list[dict[str, float]]:
    """Read the logged rows without the values that depend on time or on a restart."""
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "resumed_from" not in row]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The run folder


@pytest.fixture(scope="module")
def finished_run(image_folder, tmp_path_factory) -> Path:
    """The output folder of a run of 12 steps with a discriminator."""
    output = tmp_path_factory.mktemp("run") / "run"
    run_training(create_config(output, image_folder, adversarial=ADVERSARIAL))
    return output


def test_a_run_writes_the_documented_files(finished_run, image_folder):
    assert {path.name for path in finished_run.iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "run.json",
        "samples",
        "checkpoints",
        "model",
    }
    assert sorted(path.name for path in (finished_run / "samples").iterdir()) == ["step_000006.png", "step_000012.png"]
    steps = sorted(path.name for path in (finished_run / "checkpoints").iterdir())
    assert steps == [f"step_{step:06d}" for step in (3, 6, 9, 12)]
    assert sorted(p.name for p in (finished_run / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    with Image.open(finished_run / "samples" / "step_000012.png") as image:
        assert len(image.getcolors(1 << 20)) > 10


def test_the_saved_configuration_repeats_the_run(finished_run, image_folder, tmp_path):
    config = from_mapping(TokenizerTraining, TRAINING.migrate(read_yaml(finished_run / "config.yaml")))
    assert (config.resolution, config.image_channels) == ("16x16", 3)
    repeated = run_training(replace(config, output=tmp_path / "repeated"))
    assert equal_weights(load_weights(repeated), load_weights(finished_run / "model"))
    assert read_rows(tmp_path / "repeated") == read_rows(finished_run)
    other_seed = run_training(replace(config, output=tmp_path / "other_seed", seed=1))
    assert not equal_weights(load_weights(other_seed), load_weights(finished_run / "model"))


def test_the_log_has_every_term_from_its_first_step(finished_run):
    rows = [row for row in read_rows(finished_run) if "l1" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all({"l1", "l2", "commitment", "learning_rate", "gradient_norm"} <= row.keys() for row in rows)
    for term in ("discriminator", "logits_real", "logits_fake", "discriminator_gradient_norm"):
        assert [row["step"] for row in rows if term in row] == list(range(3, 13)), term
    for term in ("generator", "adaptive_weight"):
        assert [row["step"] for row in rows if term in row] == list(range(5, 13)), term
    metrics = [row for row in read_rows(finished_run) if "validation_psnr" in row]
    assert [row["step"] for row in metrics] == [6, 12]
    assert all(1 <= row["codes_used"] <= 16 and row["perplexity"] <= row["codes_used"] + 1e-3 for row in metrics)


def test_the_model_card_has_the_metrics_and_code_that_runs(finished_run):
    card = (finished_run / "model" / "README.md").read_text(encoding="utf-8")
    metrics = [row for row in read_rows(finished_run) if "validation_psnr" in row][-1]
    assert f"{metrics['validation_psnr']:.2f} dB" in card
    snippet = card.split("```python\n")[1].split("```")[0].replace("path/or/repo-id", str(finished_run / "model"))
    names: dict[str, Any] = {"pixel_values": torch.zeros(2, 3, 16, 16)}
    exec(snippet, names)
    assert names["images"].shape == (2, 3, 16, 16)


def test_the_model_has_the_ema_weights(finished_run):
    state = torch.load(finished_run / "checkpoints" / "step_000012" / "state.pt", weights_only=True)["objects"]
    model = load_weights(finished_run / "model")
    assert equal_weights(model, {name: value.contiguous() for name, value in state["ema"].items()})
    assert not equal_weights(model, {name: value.contiguous() for name, value in state["model"].items()})


@torch.no_grad()
def test_latents_have_zero_mean_and_unit_variance_over_the_training_set_only(finished_run):
    tokenizer = VQGAN.from_pretrained(finished_run / "model")
    config = from_mapping(TokenizerTraining, TRAINING.migrate(read_yaml(finished_run / "config.yaml")))
    train, _ = load_images(config)
    processor = tokenizer.config.image_processor
    latents = tokenizer.encode_latents(processor.preprocess(train[range(len(train))])).double()
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert (latents.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-3
    other = tokenizer.encode_latents(processor.preprocess(255 - train[range(len(train))]))
    assert other.mean((0, 2, 3)).abs().max() > 1e-2
    assert tokenizer.config.tokenizer_id == tokenizer.compute_id()


# Learning


def test_a_few_images_are_memorized(tmp_path):
    config = create_config(
        tmp_path / "run",
        write_images(tmp_path / "four", count=5),
        max_steps=80,
        sample_every=80,
        checkpoint_every=80,
        optimizer=OptimizerConfig(learning_rate=5e-3),
    )
    run_training(config)
    errors = [row["l1"] for row in read_rows(config.output) if "l1" in row]
    assert min(errors[-5:]) < 0.4 * errors[0]


def test_the_minimized_loss_equals_the_weighted_sum_of_the_logged_terms(tmp_path, image_folder, monkeypatch):
    losses: list[float] = []
    backward = Accelerator.backward

    def record_loss(self: Accelerator, loss: torch.Tensor, **kwargs: Any) -> None:
        losses.append(loss.item())
        backward(self, loss, **kwargs)

    monkeypatch.setattr(Accelerator, "backward", record_loss)
    reconstruction = ReconstructionConfig(l1=0.7, l2=1.3, perceptual=0.6, commitment=0.2, codebook=1.1)
    model = replace(MODEL, quantizer=VectorQuantizerConfig())
    config = create_config(
        tmp_path / "run", image_folder, reconstruction=reconstruction, adversarial=ADVERSARIAL, model=model
    )
    run_training(config, perceptual=lambda a, b: (a - b).abs().amax())
    for row in read_rows(config.output):
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


def test_beta_changes_the_encoder_s_step_and_not_the_codebook_s_step(tmp_path, image_folder):
    def train_one_step(beta: float) -> dict[str, torch.Tensor]:
        config = create_config(
            tmp_path / str(beta),
            image_folder,
            max_steps=1,
            model=replace(MODEL, quantizer=VectorQuantizerConfig(restart_threshold=0.0)),
            reconstruction=ReconstructionConfig(commitment=beta),
            optimizer=OptimizerConfig(max_grad_norm=0.0),
            schedule=ScheduleConfig(warmup=0, decay="constant"),
            ema=EMAConfig(decay=0.0),
        )
        return load_weights(run_training(config))

    zero, large = train_one_step(0.0), train_one_step(5.0)
    assert torch.equal(zero["quantizer.codebook"], large["quantizer.codebook"])
    assert not torch.equal(zero["encoder.0.weight"], large["encoder.0.weight"])


def test_one_bad_step_is_skipped_and_successive_bad_steps_end_the_run_with_one_line(tmp_path, image_folder):
    def nan_at(*calls: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        count = iter(range(1, 100))
        return lambda a, b: (a - b).square().mean() * (float("nan") if next(count) in calls else 1.0)

    folder = run_training(create_config(tmp_path / "once", image_folder, adversarial=ADVERSARIAL), nan_at(7))
    assert all(value.isfinite().all() for value in load_weights(folder).values())
    state = torch.load(tmp_path / "once" / "checkpoints" / "step_000012" / "state.pt", weights_only=True)["objects"]
    assert all(value.isfinite().all() for value in state["discriminator"].values())
    with pytest.raises(NonFiniteLossError) as caught:
        run_training(create_config(tmp_path / "often", image_folder), nan_at(*range(4, 12)))
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
    """Patch the training loop so that it computes NaN for a loss term in the given steps."""
    count = iter(range(1, 1000))

    def inject_nan(loss: Any) -> Any:
        if next(count) not in steps:
            return loss
        return {**loss, term: loss[term] * math.nan} if isinstance(loss, dict) else loss * math.nan

    if term in ("codebook", "commitment", "kl"):
        tokenizer_class = AutoencoderKL if term == "kl" else VQGAN
        forward = tokenizer_class.forward

        def forward_with_nan(self: VQGAN, pixel_values: torch.Tensor) -> Any:
            output = forward(self, pixel_values)
            return output._replace(losses=inject_nan(output.losses)) if self.training else output

        monkeypatch.setattr(tokenizer_class, "forward", forward_with_nan)
        return
    names = {
        "generator": "generator_loss",
        "discriminator": "discriminator_loss",
        "adaptive_weight": "adaptive_weight",
        "r1": "r1_penalty",
    }
    owner, name = (LeCAM, "penalty") if term == "lecam" else (stage_one, names.get(term, "reconstruction_terms"))
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: inject_nan(function(*arguments)))


@pytest.mark.parametrize("term", TERMS)
def test_a_nan_in_any_loss_term_is_named_and_reaches_no_weight(tmp_path, image_folder, monkeypatch, term):
    adversarial = replace(ADVERSARIAL, start=0, warmup=0, ramp=1, r1=0.1, lecam=0.1)
    config = create_config(
        tmp_path / "run", image_folder, adversarial=adversarial, checkpoint_every=1, keep_checkpoints=20
    )
    config = replace(config, reconstruction=replace(config.reconstruction, charbonnier=1.0))
    if term == "codebook":  # the EMA quantizer has no codebook loss
        config = replace(config, model=replace(MODEL, quantizer=VectorQuantizerConfig()))
    if term == "kl":
        config = replace(config, model=AutoencoderKLModel(**SHAPE))
    with monkeypatch.context() as patch:
        break_term(patch, term, range(6, 100))
        with pytest.raises(NonFiniteLossError) as caught:
            run_training(config)
    assert re.match(rf"step 10: .*\b{term} = nan", error_message(caught))
    rows = read_metrics(config.output / "skipped_steps.0.jsonl")
    assert [row["step"] for row in rows] == [6, 7, 8, 9, 10]
    assert all(row[term] == "nan" and len(row["source_ids"]) == config.batch_size for row in rows)
    for step in (5, 9):
        state = torch.load(config.output / f"checkpoints/step_{step:06d}/state.pt", weights_only=True)["objects"]
        for name in ("discriminator", "model", "ema"):
            assert all(value.isfinite().all() for value in state[name].values()), (step, name)
    run_training(config)  # without NaN it resumes from step 9
    assert all(value.isfinite().all() for value in load_weights(config.output / "model").values())


def test_a_non_finite_reconstruction_does_not_reach_the_discriminator(tmp_path, image_folder, monkeypatch):
    forward, count = VQGAN.forward, iter(range(1, 100))

    def forward_with_nan(self: VQGAN, pixel_values: torch.Tensor):
        output = forward(self, pixel_values)
        inject_nan = self.training and next(count) == 7
        return output._replace(reconstruction=output.reconstruction * float("nan")) if inject_nan else output

    monkeypatch.setattr(VQGAN, "forward", forward_with_nan)
    config = create_config(tmp_path / "run", image_folder, adversarial=ADVERSARIAL)
    run_training(config)
    state = torch.load(config.output / "checkpoints" / "step_000012" / "state.pt", weights_only=True)["objects"]
    assert math.isnan([row["l1"] for row in read_rows(config.output) if "l1" in row][6])
    for name in ("discriminator", "model", "ema"):
        assert all(value.isfinite().all() for value in state[name].values()), name


def test_a_bfloat16_run_validates_and_saves_float32_ema_weights(tmp_path, image_folder):
    config = create_config(tmp_path / "run", image_folder, mixed_precision="bf16", adversarial=ADVERSARIAL, max_steps=6)
    folder = run_training(config)
    metrics = [row for row in read_rows(config.output) if "validation_psnr" in row][-1]
    tokenizer = VQGAN.from_pretrained(folder)
    _, validation = load_images(complete_config(config, dataset_statistics(open_source(image_folder).train)))
    psnr = stage_one.validation_psnr(tokenizer, validation)
    assert psnr == pytest.approx(metrics["validation_psnr"], abs=0.2)  # the run validates in bfloat16
    floats = [value for value in load_weights(folder).values() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}


# Resuming


VARIANTS: dict[str, dict[str, Any]] = {
    "ema codebook that restarts, discriminator": {
        "adversarial": ADVERSARIAL,
        "model": replace(MODEL, codebook_size=64, quantizer=EMAVectorQuantizerConfig(usage_decay=0.5)),
    },
    "learned codebook, muon, discriminator": {
        "adversarial": ADVERSARIAL,
        "model": replace(MODEL, quantizer=VectorQuantizerConfig()),
        "optimizer": OptimizerConfig(name="muon"),
    },
    "accumulated": {"accumulation_steps": 2, "batch_size": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("truncated", [False, True], ids=["killed", "truncated checkpoint"])
def test_a_killed_run_resumes_to_bitwise_equal_weights(tmp_path, image_folder, variant, truncated):
    config = create_config(tmp_path / "complete", image_folder, **VARIANTS[variant])
    complete = run_training(config)
    killed = tmp_path / "killed"
    for step in (3, 6, *([9] if truncated else [])):
        name = f"step_{step:06d}"
        shutil.copytree(config.output / "checkpoints" / name, killed / "checkpoints" / name)
    if truncated:
        newest = killed / "checkpoints" / "step_000009" / "state.pt"
        newest.write_bytes(newest.read_bytes()[:-1000])
    log = (config.output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(log[:8]) + log[8][:20])  # the last line is truncated
    resumed = run_training(replace(config, output=killed))
    assert {"step": 6, "resumed_from": 6} in read_metrics(killed / "metrics.jsonl")
    assert equal_weights(load_weights(resumed), load_weights(complete))
    assert (resumed / "config.json").read_bytes() == (complete / "config.json").read_bytes()
    assert read_rows(killed) == read_rows(config.output)


def test_a_finished_run_is_detected_and_more_steps_extend_it(tmp_path, image_folder):
    statistics = dataset_statistics(open_source(image_folder).train)
    config = complete_config(create_config(tmp_path / "run", image_folder, max_steps=6), statistics)
    first = load_weights(run_training(config))
    assert check_run_folder(config, "tokenizer") == 6
    longer = replace(config, max_steps=9)
    assert check_run_folder(longer, "tokenizer") is None
    assert not equal_weights(load_weights(run_training(longer)), first)
    assert check_run_folder(longer, "tokenizer") == 9
    assert [row["step"] for row in read_rows(config.output) if "l1" in row] == list(range(1, 10))
    assert yaml.safe_load((config.output / "config.yaml").read_text())["max_steps"] == 9


def test_a_missing_model_folder_is_written_again_without_another_step(tmp_path, image_folder):
    config = create_config(tmp_path / "run", image_folder, max_steps=3)
    before = load_weights(run_training(config))
    shutil.rmtree(config.output / "model")
    assert equal_weights(load_weights(run_training(config)), before)


# Sizes


def test_sizes_are_parsed_as_height_and_width():
    assert (parse_size(64), parse_size("64"), parse_size("64x96")) == ((64, 64), (64, 64), (64, 96))
    for wrong in ("", "64x", "x64", "64x96x3", "-64", "0", "big", "64.5"):
        with pytest.raises(ConfigError) as caught:
            parse_size(wrong)
        assert wrong in error_message(caught)


def build_config(tmp_path: Path, size: tuple[int, int], **fields: Any):
    statistics = dataset_statistics(open_source(write_images(tmp_path / "images", count=3, size=size)).train)
    config = complete_config(create_config(tmp_path / "run", tmp_path / "images", **fields), statistics)
    return build_model_config(config, statistics)


def test_sizes_that_are_no_multiple_of_f_are_padded_or_refused(tmp_path):
    padded = build_config(tmp_path, (14, 18))
    assert (tuple(padded.image_size), tuple(padded.content_size)) == ((16, 20), (14, 18))
    with pytest.raises(ConfigError) as caught:
        build_config(tmp_path, (14, 18), padding="refuse")
    assert "16x20" in error_message(caught)


def test_a_slightly_larger_resolution_pads_and_a_much_larger_one_resamples(tmp_path):
    assert tuple(build_config(tmp_path, (28, 28), resolution=32).content_size) == (28, 28)
    assert tuple(build_config(tmp_path, (28, 28), resolution=64).content_size) == (64, 64)


def test_images_that_are_too_small_for_the_discriminator_are_refused_before_the_run(tmp_path):
    adversarial = AdversarialConfig(weight=1.0, layers=3)
    with pytest.raises(ConfigError) as caught:
        build_config(tmp_path, (16, 32), adversarial=adversarial)
    assert "adversarial.layers" in error_message(caught)
    assert "at least 24 pixels" in str(caught.value)
    assert build_config(tmp_path, (16, 32), adversarial=replace(adversarial, weight=0.0))


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
def test_an_invalid_model_gives_one_line_with_the_field(fields):
    with pytest.raises(ConfigError) as caught:
        replace(MODEL, **fields)
    assert f"model.{next(iter(fields))}" in error_message(caught)
