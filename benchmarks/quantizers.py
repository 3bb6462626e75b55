"""Quantizers against those of diffusers and vector-quantize-pytorch.

The latents have D channels at 16×16 positions of 16 images (N = 4,096 vectors), with K codes. All numbers are normal, in
float32, without autocast. The forward pass finds the nearest codes and their vectors, without gradients. A training step is a
forward pass in training mode and a backward pass, from a given gradient at the output and from the loss ‖sg[z] − e‖² + ‖z −
sg[e]‖². A codebook of moving averages replaces the first term by its update, which is part of the step. All use the
straight-through gradient and the same decay. Dead codes are not restarted: diffusers has no restart, so ours and the one of
vector-quantize-pytorch are off. The optimizer is left out for all. Before the timing starts, each contender must choose the
same codes as ours, apart from ties within rounding.

The bare product is N × D by D × K alone, in our chunks, with nothing stored. A ratio is the peer's time over ours.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from frame import OURS, Report, compared, interleaved, table
from torch import Tensor, nn

from stage1_tokenizer.quantizers import QUANTIZERS, AnyQuantizerConfig
from stage1_tokenizer.quantizers.protocol import as_vectors
from stage1_tokenizer.quantizers.vector_quantizer import CHUNK_ELEMENTS
from training_harness.configuration import build_section
from training_harness.processes import accelerated_device

DIFFUSERS, LUCIDRAINS, PRODUCT = "diffusers", "vector-quantize-pytorch", "bare product"
GRADIENT, AVERAGES = "by gradient", "of moving averages"
SIZES = ((256, 1_024), (8, 16_384), (256, 16_384))  # D, K
SIDE, IMAGES, MANY_IMAGES = 16, 16, 64
DECAY = 0.95
TIE = 2e-6  # of ‖z‖² + ‖e‖²: differences of squared distances that float32 does not see


class Contender(NamedTuple):
    module: nn.Module
    search: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Latents (B, D, h, w) to indices (B, h, w) and their codes (B, D, h, w)."""
    learn: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    """Latents to indices, codes through which the gradient passes, and the loss."""


def ours(name: str, codebook: Tensor) -> Contender:
    options = {"name": name, "usage_decay": DECAY, "restart_threshold": 0}
    config = build_section(AnyQuantizerConfig, options, "model.quantizer")
    quantizer: Any = QUANTIZERS[name](config, *codebook.shape)
    quantizer.codebook.data.copy_(codebook)
    quantizer.usage.fill_(1)  # or the first batch would give every code a vector
    if name == "ema":
        quantizer.sums.copy_(codebook)

    def search(latents: Tensor) -> tuple[Tensor, Tensor]:
        indices = quantizer.quantize(latents)
        return indices, quantizer.lookup(indices)

    def learn(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = quantizer(latents)
        return output.indices, output.quantized, torch.stack([*output.losses.values()]).sum()

    return Contender(quantizer.to(codebook.device), search, learn)


def of_diffusers(codebook: Tensor) -> Contender:
    from diffusers.models.autoencoders.vq_model import VectorQuantizer

    quantizer = VectorQuantizer(*codebook.shape, beta=1.0, legacy=False, sane_index_shape=True)
    quantizer.embedding.weight.data.copy_(codebook)

    def learn(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, loss, (_, _, indices) = quantizer(latents)
        return indices, codes, loss

    return Contender(quantizer.to(codebook.device), lambda latents: learn(latents)[:2], learn)


def of_lucidrains(learnable: bool, codebook: Tensor) -> Contender:
    from vector_quantize_pytorch import VectorQuantize

    size, channels = codebook.shape
    rule: dict[str, Any] = {"ema_update": not learnable, "learnable_codebook": learnable, "decay": DECAY}
    rest: dict[str, Any] = {"commitment_weight": 1.0, "rotation_trick": False, "accept_image_fmap": True}
    quantizer = VectorQuantize(channels, size, **rule, **rest)
    for held in (quantizer._codebook.embed, quantizer._codebook.embed_avg):
        held.data.copy_(codebook)

    def learn(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, indices, loss = quantizer(latents)
        return (
            indices,
            codes,
            loss,
        )  # of a learnable codebook ‖z − e‖² once: half the value, and the gradients of both terms

    return Contender(quantizer.to(codebook.device), lambda latents: learn(latents)[:2], learn)


CONTENDERS: dict[str, dict[str, Callable[[Tensor], Contender]]] = {
    GRADIENT: {OURS: partial(ours, "vq"), DIFFUSERS: of_diffusers, LUCIDRAINS: partial(of_lucidrains, True)},
    AVERAGES: {OURS: partial(ours, "ema"), LUCIDRAINS: partial(of_lucidrains, False)},
}


def drawn(channels: int, codes: int, images: int, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Latents (B, D, h, w) and a codebook (K, D)."""
    generator, device = torch.Generator().manual_seed(0), accelerated_device()
    latents = torch.randn(images, channels, side, side, generator=generator)
    return latents.to(device), torch.randn(codes, channels, generator=generator).to(device)


def searching(contender: Contender, latents: Tensor) -> Callable[[], Tensor]:
    """A forward pass; returns the indices."""
    contender.module.eval()

    def work() -> Tensor:
        with torch.no_grad():
            return contender.search(latents)[0]

    return work


def learning(contender: Contender, latents: Tensor) -> Callable[[], Tensor]:
    """A training step; returns the indices."""
    contender.module.train()
    leaf, from_above = latents.clone().requires_grad_(), latents / latents.numel()

    def work() -> Tensor:
        indices, codes, loss = contender.learn(leaf)
        torch.autograd.backward((codes, loss), (from_above, None))
        leaf.grad = None
        contender.module.zero_grad()
        return indices

    return work


def multiplying(latents: Tensor, codebook: Tensor) -> Callable[[], None]:
    chunks = as_vectors(latents).split(max(1, CHUNK_ELEMENTS // len(codebook)))

    def work() -> None:
        for chunk in chunks:
            torch.mm(chunk, codebook.T)

    return work


JOBS: dict[str, tuple[str, Callable[[Contender, Tensor], Callable[[], Tensor]]]] = {
    "forward": (GRADIENT, searching),  # a codebook of moving averages is searched no differently
    f"step, codebook {GRADIENT}": (GRADIENT, learning),
    f"step, codebook {AVERAGES}": (AVERAGES, learning),
}


def agreement(indices: Mapping[str, Tensor], latents: Tensor, codebook: Tensor) -> dict[str, float]:
    """Share of positions at which each chose the same code as ours; ends the benchmark where that is no matter of ties."""
    vectors, codes = as_vectors(latents).double(), codebook.double()

    def distances(chosen: Tensor) -> Tensor:
        return (vectors - codes[chosen.flatten()]).square().sum(1)

    own, shares = indices[OURS], {}
    size = vectors.square().sum(1) + codes[own.flatten()].square().sum(1)
    for who, chosen in indices.items():
        apart = float(((distances(chosen) - distances(own)).abs() / size).max())
        if apart > TIE:
            raise SystemExit(
                f"{who} and {OURS} chose codes whose squared distances differ by {apart:.0e} of ‖z‖² + ‖e‖²; expected at most "
                f"{TIE:.0e} on the same codebook"
            )
        shares[who] = float((chosen == own).double().mean())
    return shares


def timed(channels: int, codes: int, rounds: int) -> list[dict[str, Any]]:
    latents, codebook = drawn(channels, codes, IMAGES)
    found = []
    for job, (rule, work_of) in JOBS.items():
        works = {who: work_of(build(codebook), latents) for who, build in CONTENDERS[rule].items()}
        shares = agreement({who: work() for who, work in works.items()}, latents, codebook)
        seconds = interleaved({**works, PRODUCT: multiplying(latents, codebook)}, rounds, warm_up=0)
        found.append({"D": channels, "K": codes, "job": job, "agreement": shares, "timing": compared(seconds)})
    return found


def resident_mib(field: str) -> float:
    """VmRSS, the resident set now, or VmHWM, the largest so far: proc(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def growth_mib(work: Callable[[], object]) -> float:
    """How much more memory than before was held at once within `work`: resident in the process, or allocated on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with suppress(PermissionError):
        Path("/proc/self/clear_refs").write_text("5")  # the largest set is counted anew
    before = resident_mib("VmRSS")
    work()
    return resident_mib("VmHWM") - before


def step_growth_mib(rule: str, who: str, images: int) -> float:
    """Of the first large training step of this process."""
    (latents, codebook), build = drawn(*SIZES[-1], images), CONTENDERS[rule][who]
    learning(build(codebook[:64]), latents[:1])()  # threads and code are there from here on
    return growth_mib(learning(build(codebook), latents))


def measured_apart(rule: str, who: str, images: int) -> float:
    """`step_growth_mib` in a process of its own, which holds no freed memory to use again."""
    code = f"from quantizers import step_growth_mib; print('growth', step_growth_mib({rule!r}, {who!r}, {images}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split("growth")[1])


def beside(timing: dict[str, dict[str, Any]], peer: str) -> list[object]:
    """Milliseconds and ratio of a peer, where it takes part."""
    if peer not in timing:
        return [None, None]
    low, high = timing[peer]["quartiles"]
    return [1e3 * timing[peer]["seconds"], f"{timing[peer]['ratio']:.2f} ({low:.2f} … {high:.2f})"]


def timing_table(found: list[dict[str, Any]]) -> str:
    head = ["D", "K", "", "ours, ms"]
    for peer in (DIFFUSERS, LUCIDRAINS):
        head += [f"{peer}, ms", "ratio (quartiles)"]
    rows = []
    for row in found:
        timing = row["timing"]
        peers = [cell for peer in (DIFFUSERS, LUCIDRAINS) for cell in beside(timing, peer)]
        own, product = (1e3 * timing[who]["seconds"] for who in (OURS, PRODUCT))
        rows.append([row["D"], row["K"], row["job"], own, *peers, product])
    return table([*head, f"{PRODUCT}, ms"], rows)


def memory_table(growth: dict[str, dict[str, dict[int, float]]], counts: Sequence[int]) -> str:
    numbers = [images * SIDE**2 for images in counts]
    rows: list[list[object]] = [
        [f"codebook {rule}", who, *by_count.values()] for rule, of in growth.items() for who, by_count in of.items()
    ]
    rows.append(["a table of N × K numbers", "", *(number * SIZES[-1][1] * 4 / 2**20 for number in numbers)])
    return table(["a training step", "", *(f"N = {number:,}, MiB" for number in numbers)], rows)


def run(quick: bool) -> Report:
    rounds, counts = (1, (IMAGES,)) if quick else (15, (IMAGES, MANY_IMAGES))
    found = [row for size in (SIZES[:2] if quick else SIZES) for row in timed(*size, rounds)]
    growth = {
        rule: {who: {images: measured_apart(rule, who, images) for images in counts} for who in of}
        for rule, of in CONTENDERS.items()
        if rule == GRADIENT or not quick
    }
    ratios = [min(row["timing"][who]["ratio"] for who in row["timing"] if who not in (OURS, PRODUCT)) for row in found]
    same = min(share for row in found for share in row["agreement"].values())
    channels, codes = SIZES[-1]
    text = "\n\n".join(
        [
            (__doc__ or "").partition("\n\n")[2].strip(),
            timing_table(found),
            f"Speed-up over the faster peer of each row: {min(ratios):.2f} to {max(ratios):.2f}. In each row at least {same:.2%} "
            "of the peers' codes equal ours, and the others are ties.",
            f"Memory at D {channels}, K {codes:,}: the peak increase during the first such step of a new process that already "
            "holds the latents and the codebook.",
            memory_table(growth, counts),
        ]
    )
    figures = {"rows": found, "growth_mib": growth}
    return Report("quantizers", "Quantizers", text, figures, [DIFFUSERS, LUCIDRAINS])
