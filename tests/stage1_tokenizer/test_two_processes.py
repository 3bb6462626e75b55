"""Two processes hold one codebook and train one model. Both are spawned once, for all claims of this file."""

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
from stage1_tokenizer.training_config import TokenizerTraining, completed, model_config
from stage1_tokenizer.vqgan import VQGAN, VQGANModel
from training_harness.metric_log import read_metrics

K, D = 12, 5


def latents(seed: int) -> torch.Tensor:
    return torch.randn(3, D, 4, 2, generator=seeded(seed))


def known_quantizer(**options: Any) -> EMAVectorQuantizer:
    """Its codebook counts as in use, so that the first batch does not replace it."""
    q = EMAVectorQuantizer(EMAVectorQuantizerConfig(**options), K, D).train()
    q.codebook.copy_(torch.randn(K, D, generator=seeded(9)))
    q.usage.fill_(2.0)
    q.sums.copy_(q.codebook * 2.0)
    return q


def quantize(rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)  # what is drawn from the global state differs
    restarting, following = known_quantizer(usage_decay=0.7), known_quantizer(restart_threshold=0.0)
    restarts = 0
    for step in range(50):
        mine = latents(2 * step + rank) * (0.1 if step < 25 else 3.0)  # the jump leaves entries dead
        restarts += int((restarting.usage <= restarting.config.restart_threshold * 2 * 24 / K).sum())
        restarting(mine)
        following(latents(2 * step + rank))
    return {"restarting": restarting.state_dict(), "following": following.state_dict(), "restarts": restarts}


def train(folder: Path) -> dict[str, torch.Tensor]:
    """A run with a discriminator; returns this process's own weights and those of its discriminator."""
    held: dict[str, torch.Tensor] = {}
    export = stage_one.export

    def noted(run: Any, tokenizer: VQGAN, pixels: ImageLoader) -> Path:
        for name in ("model", "ema", "discriminator"):
            held.update({f"{name}.{key}": value for key, value in run._tracked[name].state_dict().items()})
        return export(run, tokenizer, pixels)

    stage_one.export = noted
    source = open_source(folder / "pictures")
    seen = dataset_statistics(source.train)
    model = VQGANModel(channels=(8, 8), blocks=(0, 1), attention=(2,), latent_channels=4, codebook_size=16)
    adversarial = AdversarialConfig(weight=0.5, start=1, warmup=1, ramp=1, channels=4, layers=2)
    steps = {"max_steps": 5, "batch_size": 4, "log_every": 1, "sample_every": 5, "checkpoint_every": 5}
    config = TokenizerTraining(output=folder / "run", data="pictures", model=model, adversarial=adversarial, **steps)
    config = completed(config, seen)
    shape = model_config(config, seen)
    pixels = (ImageLoader(split, shape.image_processor) for split in (source.train, source.validation))
    stage_one.train_tokenizer(config, shape, *pixels)
    return held


def one_of_two(rank: int, processes: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    set_launch_environment(rank, processes, port)
    held = train(folder)
    torch.save(quantize(rank) | {"held": held}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    write_images(folder / "pictures")
    assert wait_for_exit(start_processes(one_of_two, 2, folder)) == [0, 0]
    return folder


def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_hold_one_codebook_after_restarts(folder):
    first, second = results(folder)
    assert first["restarts"] > 0
    for key, value in first["restarting"].items():
        assert torch.equal(value, second["restarting"][key]), f"{key} differs between the processes"


def test_their_codebook_is_that_of_one_process_on_both_batches(folder):
    both, mine_alone = known_quantizer(restart_threshold=0.0), known_quantizer(restart_threshold=0.0)
    for step in range(50):
        both(torch.cat([latents(2 * step), latents(2 * step + 1)]))
        mine_alone(latents(2 * step))
    for result in results(folder):
        assert torch.allclose(both.codebook, result["following"]["codebook"], atol=1e-5)
        assert not torch.allclose(mine_alone.codebook, result["following"]["codebook"], atol=1e-2)


def test_two_processes_train_one_model_and_write_it_once(folder):
    first, second = (result["held"] for result in results(folder))
    assert {name.split(".")[0] for name in first} == {"model", "ema", "discriminator"}
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between the processes"
    VQGAN.from_pretrained(folder / "run" / "model")
    rows = [row for row in read_metrics(folder / "run" / "metrics.jsonl") if "l1" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert "generator" in rows[-1]
