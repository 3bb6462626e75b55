"""What a step is said to take is what it takes; and what is said when there is not enough."""

import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_python
from small_runs import write_training_data
from tiny_models import tiny_tokenizer

from latentloom.planning.memory_estimate import advice_when_memory_runs_out, estimate_memory, recommendations
from latentloom.planning.step_timing import TimedStep, has_spans, time_prior_step, time_tokenizer_step
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
SHAPE = VQGANConfig(image_channels=1, image_size=(32, 32), channels=(8, 16), blocks=(1, 1))


def prior_training(**fields: Any) -> AutoregressiveTraining:
    return AutoregressiveTraining(output=Path("run"), codes=Path("codes"), **{"model": PRIOR, "batch_size": 6} | fields)


def of_prior(config: AutoregressiveTraining) -> TimedStep:
    return time_prior_step(config, SPEC, num_classes=3)


def measure_tokenizer(config: TokenizerTraining) -> TimedStep:
    return time_tokenizer_step(config, SHAPE)


def really_kept(rehearsal: TimedStep, images: int) -> int:
    """Bytes that a forward pass on numbers keeps for the backward pass, weights and single numbers left out."""
    weights = {p.untyped_storage().data_ptr() for part in rehearsal.parts.values() for p in part.parameters()}
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor) if tensor.numel() else tensor,
        lambda tensor: tensor,
    ):
        rehearsal.loss(images)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_activations_of_a_prior_are_those_that_a_step_on_numbers_keeps(recomputed: bool) -> None:
    config = prior_training(gradient_checkpointing=recomputed)
    rehearsal = of_prior(config)
    real = really_kept(rehearsal, 6) - really_kept(rehearsal, 5)
    assert estimate_memory(config, of_prior).activations == pytest.approx(real, rel=0.02)


def test_the_targets_of_a_mean_flow_keep_nothing_and_every_other_rehearsed_step_has_them() -> None:
    mean_flow = MeanFlow(spans_from=0.5)
    model = DiTModel(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, mean_flow=mean_flow)
    config = DiffusionTraining(output=Path("run"), codes=Path("codes"), model=model, batch_size=6)

    def time_step(changed: DiffusionTraining) -> TimedStep:
        return time_prior_step(changed, SPEC, num_classes=3)

    rehearsal = time_step(config)
    real = [really_kept(rehearsal, 6) - really_kept(rehearsal, 5) for _ in range(2)]
    assert estimate_memory(config, time_step).activations == pytest.approx(real[0], rel=0.1)
    assert [has_spans(mean_flow, number) for number in range(4)] == [False, True, False, True]


def test_the_activations_of_a_tokenizer_are_those_that_a_step_on_numbers_keeps() -> None:
    config = TokenizerTraining(output=Path("run"), data="x", adversarial=AdversarialConfig(layers=2, channels=8))
    rehearsal = measure_tokenizer(config)
    rehearsal.parts["tokenizer"].quantizer.eval()
    real = really_kept(rehearsal, 6) - really_kept(rehearsal, 5)
    assert estimate_memory(config, measure_tokenizer).activations == pytest.approx(real, rel=0.02)


def test_weights_gradients_average_and_optimiser_are_counted_by_their_kind() -> None:
    found = estimate_memory(prior_training(), of_prior)
    number = sum(found.parameters.values())
    assert number == sum(p.numel() for p in of_prior(prior_training()).parts["prior"].parameters())
    assert (found.weights, found.gradients, found.average, found.optimizer) == (
        4 * number,
        4 * number,
        4 * number,
        8 * number,
    )
    muon = prior_training(optimizer=OptimizerConfig(name="muon"))
    optimizer = of_prior(muon).optimizer
    matrices = sum(p.numel() for group in optimizer.param_groups if group["orthogonalize"] for p in group["params"])
    assert estimate_memory(muon, of_prior).optimizer == 8 * number - 4 * matrices


def test_a_step_of_a_prior_costs_six_operations_a_weight_and_token() -> None:
    """Two forward, four backward; embeddings multiply nothing, and attention adds its scores."""
    tokens, prior = 16, of_prior(prior_training()).parts["prior"]
    multiplying = sum(p.numel() for name, p in prior.named_parameters() if p.ndim == 2 and "embedding" not in name)
    scores = PRIOR.num_layers * 3 * 2 * 2 * tokens**2 * PRIOR.hidden_size
    assert estimate_memory(prior_training(), of_prior).flop == pytest.approx(
        6 * multiplying * tokens + scores, rel=0.02
    )


def test_each_remedy_states_what_its_own_run_would_take_and_that_is_less() -> None:
    config = prior_training(batch_size=64)
    before = estimate_memory(config, of_prior).memory(64)
    said = recommendations(config, of_prior, on_accelerator=True)
    assert [line.split()[0] for line in said] == [
        "--batch-size",
        "--gradient-checkpointing",
        "--mixed-precision",
        "--ema.device",
    ]
    for line in said:
        number, unit = re.search(r"\(([\d.]+) ([MG])iB\)", line).groups()  # type: ignore[union-attr]
        assert float(number) * 2.0 ** {"M": 20, "G": 30}[unit] < before, line
    half = estimate_memory(replace(config, batch_size=32), of_prior).memory(32)
    assert f"({half / 2**20:.3g} MiB)" in said[0]
    assert len(recommendations(config, of_prior, on_accelerator=False)) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_an_allocation_that_fails_becomes_advice(error: Exception) -> None:
    with pytest.raises(UserError, match=r"--batch-size 3 --accumulation-steps 2 .*--gradient-checkpointing") as caught:  # noqa: SIM117
        with advice_when_memory_runs_out(prior_training(), of_prior):
            raise error
    assert "\n" not in str(caught.value)


def test_counting_begins_when_the_failed_step_has_let_its_tensors_go() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def step() -> None:
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        raise MemoryError

    def time_step(config: AutoregressiveTraining) -> TimedStep:
        assert held[0]() is None
        return of_prior(config)

    with pytest.raises(UserError), advice_when_memory_runs_out(prior_training(), time_step):
        step()


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), advice_when_memory_runs_out(prior_training(), of_prior):
        raise RuntimeError("shapes differ")


LIMITED = """
import resource, sys
from latentloom.cli import main
import latentloom.jobs.stages
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits a process's memory as Linux does")
def test_a_run_without_enough_memory_ends_in_one_line_and_the_advised_command_trains(tmp_path: Path) -> None:
    write_training_data(tmp_path)
    words = ["train-prior", "--codes", tmp_path / "codes", "--output", tmp_path / "run", "--max-steps", 1]
    done = run_python("-c", LIMITED, *words, "--batch-size", 40_000)
    assert done.returncode == 2, done.stderr[-2000:]
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: out of memory on this machine with batches of 40000 images"), line
    assert "--batch-size 20000 --accumulation-steps 2" in line
    done = run_python("-m", "latentloom", *words, "--batch-size", 4)
    assert done.returncode == 0, done.stderr[-2000:]
