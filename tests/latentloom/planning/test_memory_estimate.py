"""The memory estimate equals the memory of a real step, and a failed allocation ends in a useful message."""

import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from new_process import run_forked
from small_runs import write_training_data
from tiny_models import tiny_tokenizer

from latentloom.planning.memory_estimate import estimate_memory, explain_out_of_memory, recommend_memory_savings
from latentloom.planning.step_timing import TimedStep, learns_spans, time_prior_step, time_tokenizer_step
from stage1_tokenizer.losses.adversarial import AdversarialConfig
from stage1_tokenizer.training_config import TokenizerTraining
from stage1_tokenizer.vqgan import VQGANConfig
from stage2_prior.diffusion.config import DiTModel
from stage2_prior.diffusion.mean_flow import MeanFlow
from stage2_prior.training_config import AutoregressiveModel, AutoregressiveTraining, DiffusionTraining
from training_harness.errors import UserError
from training_harness.optimization import OptimizerConfig

PRIOR = AutoregressiveModel(hidden_size=64, num_layers=3, num_heads=2, intermediate_size=128)
SPEC = tiny_tokenizer().latent_spec()
TOKENIZER = VQGANConfig(image_channels=1, image_size=(32, 32), channels=(8, 16), blocks=(1, 1))


def prior_training(**fields: Any) -> AutoregressiveTraining:
    return AutoregressiveTraining(output=Path("run"), codes=Path("codes"), **{"model": PRIOR, "batch_size": 6} | fields)


def build_prior_step(config: AutoregressiveTraining) -> TimedStep:
    return time_prior_step(config, SPEC, num_classes=3)


def build_tokenizer_step(config: TokenizerTraining) -> TimedStep:
    return time_tokenizer_step(config, TOKENIZER)


def count_saved_bytes(timed_step: TimedStep, images: int) -> int:
    """Count the bytes that a forward pass on real tensors keeps for the backward pass, without weights and empty tensors."""
    weights = {p.untyped_storage().data_ptr() for network in timed_step.networks.values() for p in network.parameters()}
    saved: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.setdefault(tensor.untyped_storage().data_ptr(), tensor) if tensor.numel() else tensor,
        lambda tensor: tensor,
    ):
        timed_step.compute_loss(images)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in weights)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_estimated_activations_of_a_prior_equal_the_saved_tensors_of_a_real_step(
    gradient_checkpointing: bool,
) -> None:
    config = prior_training(gradient_checkpointing=gradient_checkpointing)
    timed_step = build_prior_step(config)
    saved_bytes = count_saved_bytes(timed_step, 6) - count_saved_bytes(timed_step, 5)
    assert estimate_memory(config, build_prior_step).activations == pytest.approx(saved_bytes, rel=0.02)


def test_mean_flow_targets_save_no_tensors_and_every_second_timed_step_has_them() -> None:
    mean_flow = MeanFlow(spans_from=0.5)
    model = DiTModel(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, mean_flow=mean_flow)
    config = DiffusionTraining(output=Path("run"), codes=Path("codes"), model=model, batch_size=6)

    def build_step(step_config: DiffusionTraining) -> TimedStep:
        return time_prior_step(step_config, SPEC, num_classes=3)

    timed_step = build_step(config)
    saved_bytes = [count_saved_bytes(timed_step, 6) - count_saved_bytes(timed_step, 5) for _ in range(2)]
    assert estimate_memory(config, build_step).activations == pytest.approx(saved_bytes[0], rel=0.1)
    assert [learns_spans(mean_flow, number) for number in range(4)] == [False, True, False, True]


def test_the_estimated_activations_of_a_tokenizer_equal_the_saved_tensors_of_a_real_step() -> None:
    config = TokenizerTraining(output=Path("run"), data="x", adversarial=AdversarialConfig(layers=2, channels=8))
    timed_step = build_tokenizer_step(config)
    timed_step.networks["tokenizer"].quantizer.eval()
    saved_bytes = count_saved_bytes(timed_step, 6) - count_saved_bytes(timed_step, 5)
    assert estimate_memory(config, build_tokenizer_step).activations == pytest.approx(saved_bytes, rel=0.02)


def test_weights_gradients_ema_and_optimizer_state_are_counted() -> None:
    estimate = estimate_memory(prior_training(), build_prior_step)
    count = sum(estimate.parameters.values())
    assert count == sum(p.numel() for p in build_prior_step(prior_training()).networks["prior"].parameters())
    assert (estimate.weights, estimate.gradients, estimate.ema_weights, estimate.optimizer) == (
        4 * count,
        4 * count,
        4 * count,
        8 * count,
    )
    muon = prior_training(optimizer=OptimizerConfig(name="muon"))
    optimizer = build_prior_step(muon).optimizer
    matrices = sum(p.numel() for group in optimizer.param_groups if group["orthogonalize"] for p in group["params"])
    assert estimate_memory(muon, build_prior_step).optimizer == 8 * count - 4 * matrices


def test_a_prior_step_costs_six_operations_per_weight_and_token() -> None:
    """Two operations forward and four backward. Embeddings need none, and attention adds its scores."""
    tokens, prior = 16, build_prior_step(prior_training()).networks["prior"]
    matmul_weights = sum(p.numel() for name, p in prior.named_parameters() if p.ndim == 2 and "embedding" not in name)
    scores = PRIOR.num_layers * 3 * 2 * 2 * tokens**2 * PRIOR.hidden_size
    assert estimate_memory(prior_training(), build_prior_step).flop == pytest.approx(
        6 * matmul_weights * tokens + scores, rel=0.02
    )


def test_each_recommended_option_states_its_memory_which_is_less() -> None:
    config = prior_training(batch_size=64)
    full_memory = estimate_memory(config, build_prior_step).total_bytes(64)
    options = recommend_memory_savings(config, build_prior_step, on_accelerator=True)
    assert [option.split()[0] for option in options] == [
        "--batch-size",
        "--gradient-checkpointing",
        "--mixed-precision",
        "--ema.device",
    ]
    for option in options:
        number, unit = re.search(r"\(([\d.]+) ([MG])iB\)", option).groups()  # type: ignore[union-attr]
        assert float(number) * 2.0 ** {"M": 20, "G": 30}[unit] < full_memory, option
    half_memory = estimate_memory(replace(config, batch_size=32), build_prior_step).total_bytes(32)
    assert f"({half_memory / 2**20:.3g} MiB)" in options[0]
    assert len(recommend_memory_savings(config, build_prior_step, on_accelerator=False)) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_failed_allocation_is_explained_with_options(error: Exception) -> None:
    with pytest.raises(UserError, match=r"--batch-size 3 --accumulation-steps 2 .*--gradient-checkpointing") as caught:  # noqa: SIM117
        with explain_out_of_memory(prior_training(), build_prior_step):
            raise error
    assert "\n" not in str(caught.value)


def test_the_estimate_begins_after_the_failed_step_has_freed_its_tensors() -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        activations = torch.zeros(8)
        tensors.append(weakref.ref(activations))
        raise MemoryError

    def build_step(config: AutoregressiveTraining) -> TimedStep:
        assert tensors[0]() is None
        return build_prior_step(config)

    with pytest.raises(UserError), explain_out_of_memory(prior_training(), build_step):
        fail()


def test_other_errors_are_raised_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), explain_out_of_memory(prior_training(), build_prior_step):
        raise RuntimeError("shapes differ")


LIMITED = """
import resource, sys
from latentloom.cli import main
import latentloom.jobs.stages
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits the memory of a process, which needs Linux")
def test_a_run_without_enough_memory_ends_in_one_line_and_its_recommendation_trains(tmp_path: Path) -> None:
    write_training_data(tmp_path)
    arguments = ["train-prior", "--codes", tmp_path / "codes", "--output", tmp_path / "run", "--max-steps", 1]
    process = run_forked("-c", LIMITED, *arguments, "--batch-size", 40_000)
    assert process.returncode == 2, process.stderr[-2000:]
    line = process.stderr.splitlines()[-1]
    assert line.startswith("error: out of memory on this machine with batches of 40000 images"), line
    assert "--batch-size 20000 --accumulation-steps 2" in line
    process = run_forked("-m", "latentloom", *arguments, "--batch-size", 4)
    assert process.returncode == 0, process.stderr[-2000:]
