"""Compared contenders do the same work: quantizers choose the same codes and learn alike, networks need equal arithmetic."""

import gc
import importlib
import os
import sys
from importlib.util import find_spec

import pytest
import quantizers
import tokenizer_step
import torch
from command_line import run_python
from quantizers import AVERAGES, CONTENDERS, GRADIENT, JOBS, OURS
from tiny_models import seeded
from tokenizer_step import FULL, NETWORKS, PEER, PLAIN
from torch import Tensor
from torch.testing import assert_close

PEERS = ("diffusers", "vector_quantize_pytorch")
RULES = [(rule, contender) for rule, of in CONTENDERS.items() for contender in of if contender != OURS]
CODES, CHANNELS = 40, 6
needs_peers = pytest.mark.skipif(
    not all(map(find_spec, PEERS)), reason="the peers of the benchmarks are in the extra `bench`"
)
needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak memory is read from /proc"
)


@pytest.fixture(scope="module")
def vectors() -> tuple[Tensor, Tensor]:
    """Return latents of 75 positions and a codebook."""
    return quantizers.draw_vectors(CHANNELS, CODES, images=3, side=5)


@pytest.mark.parametrize("name", ["quantizers", "tokenizer_step"])
def test_a_benchmark_imports_without_its_peers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in PEERS:
        monkeypatch.setitem(sys.modules, peer, None)
    monkeypatch.delitem(sys.modules, name)
    assert callable(importlib.import_module(name).run)


@needs_peers
@pytest.mark.parametrize("job", JOBS)
def test_all_contenders_choose_the_same_codes(job: str, vectors: tuple[Tensor, Tensor]) -> None:
    latents, codebook = vectors
    rule, build_work = JOBS[job]
    indices = {contender: build_work(build(codebook), latents)() for contender, build in CONTENDERS[rule].items()}
    assert {chosen.shape for chosen in indices.values()} == {(3, 5, 5)}
    assert set(quantizers.check_agreement(indices, latents, codebook).values()) == {1.0}
    assert len(indices[OURS].unique()) > CODES / 2


def test_another_code_ends_the_benchmark_but_a_tie_does_not(vectors: tuple[Tensor, Tensor]) -> None:
    latents, codebook = vectors
    doubled_codebook = torch.cat([codebook, codebook])
    our_indices = quantizers.build_search(CONTENDERS[GRADIENT][OURS](codebook), latents)()
    peer_indices = our_indices.clone()
    peer_indices[0, 0, 0] += CODES  # another index of the same vector
    assert quantizers.check_agreement({OURS: our_indices, "peer": peer_indices}, latents, doubled_codebook)[
        "peer"
    ] == pytest.approx(74 / 75)
    doubled_codebook[CODES:] += 1e-3
    with pytest.raises(SystemExit, match="peer and latentloom chose codes"):
        quantizers.check_agreement({OURS: our_indices, "peer": peer_indices}, latents, doubled_codebook)


@needs_peers
@pytest.mark.parametrize(("rule", "peer"), RULES)
def test_a_training_step_of_each_peer_gives_the_same_codes_and_gradients_as_ours(
    rule: str, peer: str, vectors: tuple[Tensor, Tensor]
) -> None:
    latents, codebook = vectors
    contenders = {name: CONTENDERS[rule][name](codebook) for name in (OURS, peer)}
    tensors = {}
    for name, contender in contenders.items():
        contender.module.train()
        leaf = latents.clone().requires_grad_()
        _, codes, loss = contender.learn(leaf)
        torch.autograd.backward((codes, loss), (latents, None))
        tensors[name] = [codes.detach(), leaf.grad, *(p.grad.view(CODES, -1) for p in contender.module.parameters())]
    assert_close(tensors[OURS], tensors[peer], rtol=1e-4, atol=1e-6)
    if rule == AVERAGES:
        ours, theirs = (contender.module.codebook for contender in contenders.values())
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # the peer smooths the counts a little
        assert (ours - codebook).abs().max() > 0.05
    else:
        assert len(tensors[peer]) == 3  # with the gradient of the codebook


GROWTH = """
import sys; sys.path.insert(0, "benchmarks")
import torch
from quantizers import measure_growth_mib
print(measure_growth_mib(lambda: [len(torch.ones(16 << 20)) for _ in range(4)]))
print(measure_growth_mib(lambda: [torch.ones(16 << 20) for _ in range(2)]))
"""


@needs_proc
def test_the_memory_growth_is_the_peak_and_not_the_sum_of_freed_tensors() -> None:
    process = run_python("-c", GROWTH)  # a new process, because this one may hold freed memory to use again
    assert [float(line) for line in process.stdout.split()] == pytest.approx([64, 128], abs=10), process.stderr


@needs_peers
def test_steps_of_both_networks_need_the_same_arithmetic_within_five_percent() -> None:
    flop = {contender: tokenizer_step.count_step_flop(build()) for contender, build in NETWORKS.items()}
    assert flop[OURS] / flop[PEER] == pytest.approx(1, abs=0.05)


@needs_peers
@pytest.mark.parametrize("contender", NETWORKS)
def test_convolutions_by_resolution_add_up_to_the_forward_pass(contender: str) -> None:
    network = NETWORKS[contender]()
    by_side, step = tokenizer_step.count_convolution_flop(network), tokenizer_step.count_step_flop(network)
    assert set(by_side) == {32, 16, 8}
    assert by_side.total() / step == pytest.approx(1 / 3, rel=0.01)  # the backward pass needs twice as much


@needs_peers
@pytest.mark.parametrize("setting", [PLAIN, FULL], ids=str)
@pytest.mark.parametrize("contender", NETWORKS)
def test_the_plain_loop_trains_a_network_and_restores_the_matmul_precision(
    contender: str, setting: tokenizer_step.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_step, "BATCH", 4)
    torch.manual_seed(0)
    pixel_values = 0.5 + 0.2 * torch.rand(16, 1, 32, 32, generator=seeded(0))
    network = NETWORKS[contender]()

    @torch.no_grad()
    def loss() -> float:
        return float(network.loss(pixel_values))

    initial_loss, train = loss(), tokenizer_step.build_plain_loop(network, setting, pixel_values)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    ends = train(2) + train(4)
    assert len(ends) == 6
    assert ends == sorted(ends)
    assert loss() < initial_loss
    assert torch.backends.mkldnn.matmul.fp32_precision == precision


def test_seconds_per_step_leave_out_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", int)  # takes half a second here, where every test module is loaded
    warm_up = [10.0 * i for i in range(tokenizer_step.WARM_UP)]
    loops = {name: lambda steps: [*warm_up, warm_up[-1] + 1, warm_up[-1] + 3] for name in "ab"}
    assert tokenizer_step.time_in_turn(loops, steps=2, rounds=3) == {"a": [1.5] * 3, "b": [1.5] * 3}
