"""What is timed side by side does the same: quantizers choose the same codes and learn alike, networks compute as much."""

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
RULES = [(rule, who) for rule, of in CONTENDERS.items() for who in of if who != OURS]
CODES, CHANNELS = 40, 6
needs_peers = pytest.mark.skipif(
    not all(map(find_spec, PEERS)), reason="the peers of the benchmarks are in the extra `bench`"
)
needs_proc = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from /proc")


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor]:
    """Latents of 75 positions, and a codebook."""
    return quantizers.drawn(CHANNELS, CODES, images=3, side=5)


@pytest.mark.parametrize("name", ["quantizers", "tokenizer_step"])
def test_the_benchmark_is_imported_where_its_peers_cannot_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in PEERS:
        monkeypatch.setitem(sys.modules, peer, None)
    monkeypatch.delitem(sys.modules, name)
    assert callable(importlib.import_module(name).run)


@needs_peers
@pytest.mark.parametrize("job", JOBS)
def test_all_contenders_choose_the_same_codes(job: str, problem: tuple[Tensor, Tensor]) -> None:
    latents, codebook = problem
    rule, work_of = JOBS[job]
    indices = {who: work_of(build(codebook), latents)() for who, build in CONTENDERS[rule].items()}
    assert {chosen.shape for chosen in indices.values()} == {(3, 5, 5)}
    assert set(quantizers.agreement(indices, latents, codebook).values()) == {1.0}
    assert len(indices[OURS].unique()) > CODES / 2


def test_another_code_ends_the_benchmark_and_a_tie_does_not(problem: tuple[Tensor, Tensor]) -> None:
    latents, codebook = problem
    twice = torch.cat([codebook, codebook])
    own = quantizers.searching(CONTENDERS[GRADIENT][OURS](codebook), latents)()
    other = own.clone()
    other[0, 0, 0] += CODES  # the same vector by another index
    assert quantizers.agreement({OURS: own, "peer": other}, latents, twice)["peer"] == pytest.approx(74 / 75)
    twice[CODES:] += 1e-3
    with pytest.raises(SystemExit, match="peer and latentloom chose codes"):
        quantizers.agreement({OURS: own, "peer": other}, latents, twice)


@needs_peers
@pytest.mark.parametrize(("rule", "who"), RULES)
def test_a_training_step_of_each_peer_learns_what_ours_does(
    rule: str, who: str, problem: tuple[Tensor, Tensor]
) -> None:
    latents, codebook = problem
    contenders = {name: CONTENDERS[rule][name](codebook) for name in (OURS, who)}
    found = {}
    for name, contender in contenders.items():
        contender.module.train()
        leaf = latents.clone().requires_grad_()
        _, codes, loss = contender.learn(leaf)
        torch.autograd.backward((codes, loss), (latents, None))
        found[name] = [codes.detach(), leaf.grad, *(p.grad.view(CODES, -1) for p in contender.module.parameters())]
    assert_close(found[OURS], found[who], rtol=1e-4, atol=1e-6)
    if rule == AVERAGES:
        ours, theirs = (contender.module.codebook for contender in contenders.values())
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # theirs smooths the counts a little
        assert (ours - codebook).abs().max() > 0.05
    else:
        assert len(found[who]) == 3  # the codebook's gradient too


GROWTH = """
import sys; sys.path.insert(0, "benchmarks")
import torch
from quantizers import growth_mib
print(growth_mib(lambda: [len(torch.ones(16 << 20)) for _ in range(4)]))
print(growth_mib(lambda: [torch.ones(16 << 20) for _ in range(2)]))
"""


@needs_proc
def test_memory_held_at_once_is_seen_and_memory_held_in_turn_is_not_added_up() -> None:
    done = run_python("-c", GROWTH)  # this process may hold freed memory to use again
    assert [float(line) for line in done.stdout.split()] == pytest.approx([64, 128], abs=10), done.stderr


@needs_peers
def test_a_step_of_both_networks_is_as_much_arithmetic_within_five_percent() -> None:
    flop = {who: tokenizer_step.flop_a_step(build()) for who, build in NETWORKS.items()}
    assert flop[OURS] / flop[PEER] == pytest.approx(1, abs=0.05)


@needs_peers
@pytest.mark.parametrize("who", NETWORKS)
def test_convolutions_by_resolution_add_up_to_those_of_the_forward_pass(who: str) -> None:
    network = NETWORKS[who]()
    by_side, step = tokenizer_step.convolution_flop(network), tokenizer_step.flop_a_step(network)
    assert set(by_side) == {32, 16, 8}
    assert by_side.total() / step == pytest.approx(1 / 3, rel=0.01)  # backward is twice as much


@needs_peers
@pytest.mark.parametrize("setting", [PLAIN, FULL], ids=str)
@pytest.mark.parametrize("who", NETWORKS)
def test_the_plain_loop_trains_a_network_and_leaves_no_setting_behind(
    who: str, setting: tokenizer_step.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_step, "BATCH", 4)
    torch.manual_seed(0)
    pixel_values = 0.5 + 0.2 * torch.rand(16, 1, 32, 32, generator=seeded(0))
    network = NETWORKS[who]()

    @torch.no_grad()
    def loss() -> float:
        return float(network.loss(pixel_values))

    before, train = loss(), tokenizer_step.plain_loop(network, setting, pixel_values)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    ends = train(2) + train(4)
    assert len(ends) == 6
    assert ends == sorted(ends)
    assert loss() < before
    assert torch.backends.mkldnn.matmul.fp32_precision == precision


def test_seconds_a_step_leave_the_first_steps_out() -> None:
    first = [10.0 * i for i in range(tokenizer_step.WARM_UP)]
    loops = {name: lambda steps: [*first, first[-1] + 1, first[-1] + 3] for name in "ab"}
    assert tokenizer_step.in_turn(loops, steps=2, rounds=3) == {"a": [1.5] * 3, "b": [1.5] * 3}
