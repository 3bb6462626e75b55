"""Quantizers compared with those of diffusers and vector-quantize-pytorch.

The latents have D channels at 16×16 positions of 16 images (N = 4,096 vectors), with K codes. All numbers are normally
distributed, in float32, without autocast. The forward pass finds the nearest codes and their vectors, without gradients. A
training step is a forward pass in training mode and a backward pass, from a fixed gradient at the output and from the loss
‖sg[z] − e‖² + ‖z − sg[e]‖². A codebook of moving averages replaces the first term by its update, which is part of the step. All
use the straight-through gradient and the same decay. Unused codes are not restarted: diffusers has no restart, so it is switched
off in ours and in vector-quantize-pytorch. The optimizer is left out for all. Before the timing starts, each contender must
choose the same codes as ours, apart from ties within rounding.

The bare matmul is N × D by D × K alone, in our chunks, and stores nothing. A ratio is the peer's time over ours.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from frame import OURS, Report, compare_times, markdown_table, time_interleaved
from torch import Tensor, nn

from stage1_tokenizer.quantizers import QUANTIZERS, AnyQuantizerConfig
from stage1_tokenizer.quantizers.protocol import as_vectors
from stage1_tokenizer.quantizers.vector_quantizer import CHUNK_ELEMENTS
from training_harness.configuration import build_section
from training_harness.processes import accelerated_device

DIFFUSERS, LUCIDRAINS, MATMUL = "diffusers", "vector-quantize-pytorch", "bare matmul"
GRADIENT, AVERAGES = "by gradient", "of moving averages"
SIZES = ((256, 1_024), (8, 16_384), (256, 16_384))  # D, K
SIDE, IMAGES, LARGE_BATCH = 16, 16, 64
DECAY = 0.95
LARGEST_TIE = 2e-6  # share of ‖z‖² + ‖e‖² below which float32 does not distinguish squared distances


class Contender(NamedTuple):
    """A quantizer behind one interface."""

    module: nn.Module
    search: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Maps latents (B, D, h, w) to indices (B, h, w) and their codes (B, D, h, w)."""
    learn: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    """Maps latents to indices, codes with the straight-through gradient, and the loss."""


def build_ours(name: str, codebook: Tensor) -> Contender:
    options = {"name": name, "usage_decay": DECAY, "restart_threshold": 0}
    config = build_section(AnyQuantizerConfig, options, "model.quantizer")
    quantizer: Any = QUANTIZERS[name](config, *codebook.shape)
    quantizer.codebook.data.copy_(codebook)
    quantizer.usage.fill_(1)  # otherwise the first batch would replace every code
    if name == "ema":
        quantizer.sums.copy_(codebook)

    def search(latents: Tensor) -> tuple[Tensor, Tensor]:
        indices = quantizer.quantize(latents)
        return indices, quantizer.lookup(indices)

    def learn(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = quantizer(latents)
        return output.indices, output.quantized, torch.stack([*output.losses.values()]).sum()

    return Contender(quantizer.to(codebook.device), search, learn)


def build_diffusers(codebook: Tensor) -> Contender:
    from diffusers.models.autoencoders.vq_model import VectorQuantizer

    quantizer = VectorQuantizer(*codebook.shape, beta=1.0, legacy=False, sane_index_shape=True)
    quantizer.embedding.weight.data.copy_(codebook)

    def learn(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, loss, (_, _, indices) = quantizer(latents)
        return indices, codes, loss

    return Contender(quantizer.to(codebook.device), lambda latents: learn(latents)[:2], learn)


def build_lucidrains(learnable: bool, codebook: Tensor) -> Contender:
    from vector_quantize_pytorch import VectorQuantize

    size, channels = codebook.shape
    rule: dict[str, Any] = {"ema_update": not learnable, "learnable_codebook": learnable, "decay": DECAY}
    rest: dict[str, Any] = {"commitment_weight": 1.0, "rotation_trick": False, "accept_image_fmap": True}
    quantizer = VectorQuantize(channels, size, **rule, **rest)
    for buffer in (quantizer._codebook.embed, quantizer._codebook.embed_avg):
        buffer.data.copy_(codebook)

    def learn(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, indices, loss = quantizer(latents)
        # With a learnable codebook the loss has ‖z − e‖² once: half of our value, but the gradients of both terms.
        return indices, codes, loss

    return Contender(quantizer.to(codebook.device), lambda latents: learn(latents)[:2], learn)


CONTENDERS: dict[str, dict[str, Callable[[Tensor], Contender]]] = {
    GRADIENT: {
        OURS: partial(build_ours, "vq"),
        DIFFUSERS: build_diffusers,
        LUCIDRAINS: partial(build_lucidrains, True),
    },
    AVERAGES: {OURS: partial(build_ours, "ema"), LUCIDRAINS: partial(build_lucidrains, False)},
}


def draw_vectors(channels: int, codes: int, images: int, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Draw latents (B, D, h, w) and a codebook (K, D) from N(0, I)."""
    generator, device = torch.Generator().manual_seed(0), accelerated_device()
    latents = torch.randn(images, channels, side, side, generator=generator)
    return latents.to(device), torch.randn(codes, channels, generator=generator).to(device)


def build_search(contender: Contender, latents: Tensor) -> Callable[[], Tensor]:
    """Return a function that runs a forward pass and returns the indices."""
    contender.module.eval()

    def run_once() -> Tensor:
        with torch.no_grad():
            return contender.search(latents)[0]

    return run_once


def build_training_step(contender: Contender, latents: Tensor) -> Callable[[], Tensor]:
    """Return a function that runs a training step and returns the indices."""
    contender.module.train()
    leaf, output_gradient = latents.clone().requires_grad_(), latents / latents.numel()

    def run_once() -> Tensor:
        indices, codes, loss = contender.learn(leaf)
        torch.autograd.backward((codes, loss), (output_gradient, None))
        leaf.grad = None
        contender.module.zero_grad()
        return indices

    return run_once


def build_matmul(latents: Tensor, codebook: Tensor) -> Callable[[], None]:
    """Return a function that multiplies the latents by the codebook in chunks."""
    chunks = as_vectors(latents).split(max(1, CHUNK_ELEMENTS // len(codebook)))

    def run_once() -> None:
        for chunk in chunks:
            torch.mm(chunk, codebook.T)

    return run_once


JOBS: dict[str, tuple[str, Callable[[Contender, Tensor], Callable[[], Tensor]]]] = {
    "forward": (GRADIENT, build_search),  # the same for a codebook of moving averages
    f"step, codebook {GRADIENT}": (GRADIENT, build_training_step),
    f"step, codebook {AVERAGES}": (AVERAGES, build_training_step),
}


def check_agreement(indices: Mapping[str, Tensor], latents: Tensor, codebook: Tensor) -> dict[str, float]:
    """Return the share of positions at which each contender chose the same code as ours.

    Raises:
        SystemExit: a contender chose another code that is no tie.
    """
    vectors, codes = as_vectors(latents).double(), codebook.double()

    def distances(chosen: Tensor) -> Tensor:
        return (vectors - codes[chosen.flatten()]).square().sum(1)

    our_indices, shares = indices[OURS], {}
    size = vectors.square().sum(1) + codes[our_indices.flatten()].square().sum(1)
    for name, chosen in indices.items():
        difference = float(((distances(chosen) - distances(our_indices)).abs() / size).max())
        if difference > LARGEST_TIE:
            raise SystemExit(
                f"{name} and {OURS} chose codes with squared distances that differ by {difference:.0e} of ‖z‖² + ‖e‖²; "
                f"expected at most {LARGEST_TIE:.0e} on the same codebook"
            )
        shares[name] = float((chosen == our_indices).double().mean())
    return shares


def time_quantizers(channels: int, codes: int, rounds: int) -> list[dict[str, Any]]:
    """Time all jobs for D = `channels` and K = `codes`."""
    latents, codebook = draw_vectors(channels, codes, IMAGES)
    rows = []
    for job, (rule, build_work) in JOBS.items():
        work_by_name = {name: build_work(build(codebook), latents) for name, build in CONTENDERS[rule].items()}
        shares = check_agreement({name: work() for name, work in work_by_name.items()}, latents, codebook)
        seconds = time_interleaved({**work_by_name, MATMUL: build_matmul(latents, codebook)}, rounds, warm_up=0)
        rows.append({"D": channels, "K": codes, "job": job, "agreement": shares, "timing": compare_times(seconds)})
    return rows


def read_resident_mib(field: str) -> float:
    """Read VmRSS, the present resident set size, or VmHWM, the largest so far; see proc(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def measure_growth_mib(work: Callable[[], object]) -> float:
    """Measure the peak increase of memory during `work`: resident set size, or allocated memory on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with suppress(PermissionError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = read_resident_mib("VmRSS")
    work()
    return read_resident_mib("VmHWM") - before


def measure_step_growth_mib(rule: str, name: str, images: int) -> float:
    """Measure the first large training step of this process."""
    (latents, codebook), build = draw_vectors(*SIZES[-1], images), CONTENDERS[rule][name]
    # A small step first: it starts the threads and loads the code.
    build_training_step(build(codebook[:64]), latents[:1])()
    return measure_growth_mib(build_training_step(build(codebook), latents))


def measure_in_new_process(rule: str, name: str, images: int) -> float:
    """Run `measure_step_growth_mib` in a new process, which has no freed memory to use again."""
    code = f"from quantizers import measure_step_growth_mib; print('growth', measure_step_growth_mib({rule!r}, {name!r}, {images}))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    if process.returncode:
        raise SystemExit(process.stderr)
    return float(process.stdout.split("growth")[1])


def format_peer(timing: dict[str, dict[str, Any]], peer: str) -> list[object]:
    """Format milliseconds and ratio of a peer, or empty cells when it does not take part."""
    if peer not in timing:
        return [None, None]
    low, high = timing[peer]["quartiles"]
    return [1e3 * timing[peer]["seconds"], f"{timing[peer]['ratio']:.2f} ({low:.2f} … {high:.2f})"]


def format_timing(results: list[dict[str, Any]]) -> str:
    head = ["D", "K", "", "ours, ms"]
    for peer in (DIFFUSERS, LUCIDRAINS):
        head += [f"{peer}, ms", "ratio (quartiles)"]
    rows = []
    for row in results:
        timing = row["timing"]
        peers = [cell for peer in (DIFFUSERS, LUCIDRAINS) for cell in format_peer(timing, peer)]
        our_milliseconds, matmul_milliseconds = (1e3 * timing[name]["seconds"] for name in (OURS, MATMUL))
        rows.append([row["D"], row["K"], row["job"], our_milliseconds, *peers, matmul_milliseconds])
    return markdown_table([*head, f"{MATMUL}, ms"], rows)


def format_memory(growth: dict[str, dict[str, dict[int, float]]], counts: Sequence[int]) -> str:
    vectors = [images * SIDE**2 for images in counts]
    rows: list[list[object]] = [
        [f"codebook {rule}", name, *by_count.values()]
        for rule, growth_by_name in growth.items()
        for name, by_count in growth_by_name.items()
    ]
    rows.append(["a table of N × K numbers", "", *(count * SIZES[-1][1] * 4 / 2**20 for count in vectors)])
    return markdown_table(["a training step", "", *(f"N = {count:,}, MiB" for count in vectors)], rows)


def run(quick: bool) -> Report:
    rounds, counts = (1, (IMAGES,)) if quick else (15, (IMAGES, LARGE_BATCH))
    rows = [row for size in (SIZES[:2] if quick else SIZES) for row in time_quantizers(*size, rounds)]
    growth = {
        rule: {name: {images: measure_in_new_process(rule, name, images) for images in counts} for name in builders}
        for rule, builders in CONTENDERS.items()
        if rule == GRADIENT or not quick
    }
    ratios = [min(row["timing"][name]["ratio"] for name in row["timing"] if name not in (OURS, MATMUL)) for row in rows]
    equal_share = min(share for row in rows for share in row["agreement"].values())
    channels, codes = SIZES[-1]
    text = "\n\n".join(
        [
            (__doc__ or "").partition("\n\n")[2].strip(),
            format_timing(rows),
            f"Speed-up over the faster peer of each row: {min(ratios):.2f} to {max(ratios):.2f}. In each row at least "
            f"{equal_share:.2%} of the peers' codes equal ours, and the others are ties.",
            f"Memory at D {channels}, K {codes:,}: the peak increase during the first such step of a new process that already "
            "holds the latents and the codebook.",
            format_memory(growth, counts),
        ]
    )
    results = {"rows": rows, "growth_mib": growth}
    return Report("quantizers", "Quantizers", text, results, [DIFFUSERS, LUCIDRAINS])
