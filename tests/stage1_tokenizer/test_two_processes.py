"""Two processes have equal codebooks and train equal models. All tests of this file use one pair of processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_parts import write_images
from small_runs import set_launch_environment, start_processes, wait_for_exit
from tiny_models import seeded

from stage1_tokenizer import train as stage_one
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.sources import open_source
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.losses.adversarial import AdversarialConfig
from stage1_tokenizer.quantizers import EMAVectorQuantizer, EMAVectorQuantizerConfig
from stage1_tokenizer.training_config import TokenizerTraining, build_model_config, complete_config
from stage1_tokenizer.vqgan import VQGAN, VQGANModel
from training_harness.metric_log import read_metrics

K, D = 12, 5


def latents(seed: int) -> torch.Tensor:
    return torch.randn(3, D, 4, 2, generator=seeded(seed))


def initialized_quantizer(**options: Any) -> EMAVectorQuantizer:
    """Create a quantizer whose codebook is in use, so that the first batch does not replace it."""
    q = EMAVectorQuantizer(EMAVectorQuantizerConfig(**options), K, D).train()
    q.codebook.copy_(torch.randn(K, D, generator=seeded(9)))
    q.usage.fill_(2.0)
    q.sums.copy_(q.codebook * 2.0)
    return q


def quantize(rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)  # the processes have different global random states
    with_restarts, without_restarts = (
        initialized_quantizer(usage_decay=0.7),
        initialized_quantizer(restart_threshold=0.0),
    )
    restarts = 0
    for step in range(50):
        scaled = latents(2 * step + rank) * (0.1 if step < 25 else 3.0)  # the change of scale creates dead entries
        restarts += int((with_restarts.usage <= with_restarts.config.restart_threshold * 2 * 24 / K).sum())
        with_restarts(scaled)
        without_restarts(latents(2 * step + rank))
    return {
        "with_restarts": with_restarts.state_dict(),
        "without_restarts": without_restarts.state_dict(),
        "restarts": restarts,
    }


def train_and_collect_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Train with a discriminator, and return this process's weights of the model, its EMA and the discriminator."""
    weights: dict[str, torch.Tensor] = {}
    export_model = stage_one.export_model

    def record_weights(run: Any, tokenizer: VQGAN, train_images: ImageLoader) -> Path:
        for name in ("model", "ema", "discriminator"):
            weights.update({f"{name}.{key}": value for key, value in run._tracked[name].state_dict().items()})
        return export_model(run, tokenizer, train_images)

    stage_one.export_model = record_weights
    source = open_source(folder / "images")
    statistics = dataset_statistics(source.train)
    model = VQGANModel(channels=(8, 8), blocks=(0, 1), attention=(2,), latent_channels=4, codebook_size=16)
    adversarial = AdversarialConfig(weight=0.5, start=1, warmup=1, ramp=1, channels=4, layers=2)
    steps = {"max_steps": 5, "batch_size": 4, "log_every": 1, "sample_every": 5, "checkpoint_every": 5}
    config = TokenizerTraining(output=folder / "run", data="images", model=model, adversarial=adversarial, **steps)
    config = complete_config(config, statistics)
    model_config = build_model_config(config, statistics)
    loaders = (ImageLoader(split, model_config.image_processor) for split in (source.train, source.validation))
    stage_one.train_tokenizer(config, model_config, *loaders)
    return weights


def run_process(rank: int, processes: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    set_launch_environment(rank, processes, port)
    weights = train_and_collect_weights(folder)
    torch.save(quantize(rank) | {"weights": weights}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    write_images(folder / "images")
    assert wait_for_exit(start_processes(run_process, 2, folder)) == [0, 0]
    return folder


def load_results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_have_equal_codebooks_after_restarts(folder):
    first, second = load_results(folder)
    assert first["restarts"] > 0
    for key, value in first["with_restarts"].items():
        assert torch.equal(value, second["with_restarts"][key]), f"{key} differs between the processes"


def test_the_codebook_of_two_processes_equals_one_process_with_both_batches(folder):
    both_batches, one_batch = (initialized_quantizer(restart_threshold=0.0) for _ in range(2))
    for step in range(50):
        both_batches(torch.cat([latents(2 * step), latents(2 * step + 1)]))
        one_batch(latents(2 * step))
    for result in load_results(folder):
        assert torch.allclose(both_batches.codebook, result["without_restarts"]["codebook"], atol=1e-5)
        assert not torch.allclose(one_batch.codebook, result["without_restarts"]["codebook"], atol=1e-2)


def test_two_processes_train_equal_models_and_write_one(folder):
    first, second = (result["weights"] for result in load_results(folder))
    assert {name.split(".")[0] for name in first} == {"model", "ema", "discriminator"}
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between the processes"
    VQGAN.from_pretrained(folder / "run" / "model")
    rows = [row for row in read_metrics(folder / "run" / "metrics.jsonl") if "l1" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert "generator" in rows[-1]
