"""Compiled runs have the same losses and write the same files as eager runs."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_parts import write_images
from small_runs import RUN_FIELDS, train, write_training_data

from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.sources import open_source
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.losses.adversarial import AdversarialConfig
from stage1_tokenizer.train import train_tokenizer
from stage1_tokenizer.training_config import TokenizerTraining, build_model_config, complete_config
from stage1_tokenizer.vqgan import VQGANModel
from training_harness.metric_log import read_metrics


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_trains_a_discriminator_with_an_adaptive_weight_and_r1(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "images"))
    statistics = dataset_statistics(source.train)
    model = VQGANModel(channels=(8, 8), blocks=(0, 1), latent_channels=4, codebook_size=16)
    adversarial = AdversarialConfig(weight=0.5, start=1, warmup=1, ramp=1, channels=4, layers=2, r1=1.0)
    fields: dict[str, Any] = RUN_FIELDS | {"max_steps": 5, "compile": True, "output": tmp_path / "run"}
    config = complete_config(
        TokenizerTraining(data="images", model=model, adversarial=adversarial, **fields), statistics
    )
    model_fields = build_model_config(config, statistics)
    loaders = (ImageLoader(split, model_fields.image_processor) for split in (source.train, source.validation))
    train_tokenizer(config, model_fields, *loaders)
    last_row = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "generator" in row][-1]
    assert last_row["step"] == 5
    assert {"adaptive_weight", "discriminator", "r1", "logits_real", "logits_fake"} <= last_row.keys()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("stage", [pytest.param("tokenizer", marks=pytest.mark.slow), "prior"])
def test_a_compiled_run_has_the_losses_of_an_eager_run(tmp_path: Path, stage: str) -> None:
    write_training_data(tmp_path)
    fields: dict[str, Any] = RUN_FIELDS | {"max_steps": 6, "checkpoint_every": 3, "matmul_precision": "highest"}
    for name, extra_fields in {
        "eager": {},
        "compiled": {"compile": True},
        "stopped": {"compile": True, "max_steps": 3},
    }.items():
        train(stage, tmp_path, tmp_path / name, fields | extra_fields, dropout=0.0, adversarial=0.0)
    train(stage, tmp_path, tmp_path / "stopped", fields | {"compile": True}, dropout=0.0, adversarial=0.0)
    logs = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ("eager", "compiled", "stopped")}
    for eager_row, compiled_row in zip(logs["eager"], logs["compiled"], strict=True):
        expected = {key: value for key, value in eager_row.items() if key != "images_per_second"}
        assert {key: compiled_row[key] for key in expected} == pytest.approx(expected, rel=1e-3)
    assert [row["resumed_from"] for row in logs["stopped"] if "resumed_from" in row] == [3]
    eager, compiled = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    assert all(math.isclose(float(eager[k].sum()), float(compiled[k].sum()), rel_tol=1e-3, abs_tol=1e-3) for k in eager)
