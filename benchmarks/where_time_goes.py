"""Where the time goes in a stage-one step, a stage-two step, an encoded batch and a sampled token, of the quickstart's recipes.

The parts are timed inside the real loops, with a stopwatch around the functions. The time of a part excludes the parts inside
it. The bound is what the arithmetic would take if all of it ran as fast as large products and convolutions on this machine,
with factors rounded as in training (`training_harness.matmul_precision`). For a sampled token the bound is the time to read
the weights once. The time above the bound goes to activations, normalization, small products and Python.
"""

import dataclasses
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from frame import Report, recipe, synchronize, table
from torch.utils.flop_counter import FlopCounterMode

import stage1_tokenizer.train
from latentloom.data.embedded import FASHION_MNIST
from latentloom.jobs.stages import load_source, run_prior, run_tokenize, run_tokenizer
from latentloom.planning.tokenizer_inputs import tokenizer_inputs
from pipelines.latent_generation import LatentGenerationPipeline, image_generators
from stage1_tokenizer.codes.reader import CodeSplit
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.networks.decoder import Decoder
from stage1_tokenizer.networks.encoder import Encoder
from stage1_tokenizer.quantizers.vector_quantizer import VectorQuantizer
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.autoregressive import decoding
from stage2_prior.autoregressive.blocks import Attention
from stage2_prior.autoregressive.kv_cache import KVCache
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.autoregressive.stepping import PackedBlock, PackedStepper
from stage2_prior.layers.feed_forward import SwiGLU
from stage2_prior.training_config import AutoregressiveTraining
from training_harness.ema import EMA
from training_harness.matmul_precision import reduced_matmul_precision
from training_harness.muon import Muon
from training_harness.processes import accelerated_device
from training_harness.run import Run

TOKENIZER, PRIOR = "vqgan-f4", "ar-tiny"


class Speed(NamedTuple):
    """What this machine reaches: FLOP/s in products and in convolutions, bytes/s in reading."""

    product: float
    convolution: float
    memory: float


class Job(NamedTuple):
    name: str
    seconds: float  # a step
    parts: dict[str, float]  # seconds a step, their sum at most `seconds`
    flop: dict[str, float]  # a step, of products and of convolutions
    bound: float  # seconds a step


class Stopwatch:
    """Own seconds by part, of functions wrapped by `watch`."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = 0.0

    def _turn(self, then: Callable[[], None]) -> None:
        synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        then()
        self._since = time.perf_counter()

    def around(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            self._turn(lambda: self._running.append(part))
            try:
                return work(*arguments, **named)
            finally:
                self._turn(lambda: self._running.pop() and None)

        return timed

    @contextmanager
    def watch(self, watched: dict[tuple[Any, str], str]) -> Iterator[None]:
        patches = [
            mock.patch.object(owner, name, self.around(part, getattr(owner, name)))
            for (owner, name), part in watched.items()
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


STAGE_ONE = {
    (Encoder, "forward"): "encoder, forward",
    (Decoder, "forward"): "decoder, forward",
    (VectorQuantizer, "forward"): "nearest codes and codebook",
    (stage1_tokenizer.train, "reconstruction_terms"): "losses",
    (Accelerator, "backward"): "backward",
    (Run, "optimizer_step"): "gradient norm and checks",
    (Muon, "step"): "optimiser",
    (EMA, "update"): "weight average",
    (ImageLoader, "__getitem__"): "images",
}
STAGE_TWO = {
    (AutoregressivePrior, "forward"): "embedding, norms, head, loss",
    (Attention, "forward"): "attention, forward",
    (SwiGLU, "forward"): "feed-forward, forward",
    (Accelerator, "backward"): "backward",
    (Run, "optimizer_step"): "gradient norm and checks",
    (Muon, "step"): "optimiser",
    (EMA, "update"): "weight average",
    (CodeSplit, "indices"): "codes",
}
ENCODING = {
    (Encoder, "forward"): "encoder",
    (VectorQuantizer, "quantize"): "nearest codes",
}
SAMPLING = {
    (PackedStepper, "__init__"): "packing the weights",
    (PackedBlock, "__call__"): "blocks",
    (KVCache, "append_one"): "key-value cache",
    (decoding, "sample_position"): "head and draw",
}


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    work()
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def machine_speed(rounds: int) -> Speed:
    """Medians of a 2,048³ product, a 3×3 convolution of 128 channels on 32 maps of 28×28, and reading 256 MiB."""
    device = accelerated_device()
    a, b = torch.randn(2, 2048, 2048, device=device)
    product = 2 * 2048**3 / median_seconds(lambda: a @ b, rounds)
    images = torch.randn(32, 128, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(128, 128, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    flop = 2 * 32 * 28 * 28 * 128 * 128 * 9
    convolution = flop / median_seconds(lambda: F.conv2d(images, kernel, padding=1), rounds)
    numbers = torch.ones(64 << 20, device=device)
    return Speed(product, convolution, numbers.nbytes / median_seconds(lambda: numbers.sum(), rounds))


def counted(work: Callable[[], object]) -> dict[str, float]:
    """FLOP of one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return by_kind(counter)


def by_kind(counter: FlopCounterMode) -> dict[str, float]:
    """FLOP of products and of convolutions, forward and backward."""
    found: dict[str, float] = defaultdict(float)
    for operation, flop in counter.get_flop_counts()["Global"].items():
        found["convolution" if "convolution" in str(operation) else "product"] += flop
    return dict(found)


def bound_of(flop: dict[str, float], speed: Speed) -> float:
    return sum(amount / getattr(speed, kind) for kind, amount in flop.items())


def training_job(
    name: str, watched: dict[tuple[Any, str], str], train: Callable[[int], Any], steps: int, speed: Speed
) -> Job:
    """`train(n)` goes on to step n. What is between two steps' ends counts, and neither the first step nor the export."""
    watch, counter = Stopwatch(), FlopCounterMode(display=False)
    ends: list[tuple[float, Counter[str]]] = []
    log = Run.log

    def note(run: Run, *arguments: Any) -> None:
        log(run, *arguments)
        ends.append((time.perf_counter(), Counter(watch.seconds)))

    def count(run: Run, step: int, *arguments: Any) -> None:
        log(run, step, *arguments)
        if step == steps - 2:
            counter.__enter__()
        if step == steps - 1:
            counter.__exit__(None, None, None)

    with mock.patch.object(Run, "log", count):
        train(steps)
    with watch.watch(watched), mock.patch.object(Run, "log", note):
        train(3 * steps)
    seconds = statistics.median(later - sooner for (sooner, _), (later, _) in pairwise(ends))
    spent = ends[-1][1] - ends[0][1]
    flop = by_kind(counter)
    return Job(name, seconds, {part: own / (len(ends) - 1) for part, own in spent.items()}, flop, bound_of(flop, speed))


def repeated_job(
    name: str, watched: dict[tuple[Any, str], str], work: Callable[[], object], steps: int, rounds: int
) -> Job:
    """`work` does `steps` of something."""
    seconds = median_seconds(work, rounds) / steps
    watch = Stopwatch()
    with watch.watch(watched):
        for _ in range(rounds):
            work()
    parts = {part: watch.seconds[part] / rounds / steps for part in dict.fromkeys(watched.values())}
    return Job(name, seconds, parts, {}, 0.0)


def run(quick: bool) -> Report:
    steps, rounds = (5, 3) if quick else (30, 10)
    speed, source = machine_speed(rounds), load_source(FASHION_MNIST)
    with reduced_matmul_precision(accelerated_device(), enabled=True):
        rounded = machine_speed(rounds)
    jobs = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def tokenizer(n: int) -> object:
            config = recipe(TokenizerTraining, "tokenizer", TOKENIZER, 1.0, 0, data=FASHION_MNIST, output=folder / "t")
            return run_tokenizer(tokenizer_inputs(replaced(config, n), source))

        def prior(n: int) -> object:
            config = recipe(AutoregressiveTraining, "prior", PRIOR, 1.0, 0, codes=folder / "codes", output=folder / "p")
            return run_prior(replaced(config, n))

        jobs.append(training_job(f"stage-one step ({TOKENIZER}, batch 16)", STAGE_ONE, tokenizer, steps, rounded))
        run_tokenize(folder / "t", source, folder / "codes", "indices")
        jobs.append(training_job(f"stage-two step ({PRIOR}, batch 32)", STAGE_TWO, prior, steps, rounded))
        pipeline = LatentGenerationPipeline.from_pretrained(folder / "p").to(accelerated_device())
    pixels = torch.rand(128, 1, 28, 28, device=accelerated_device()) * 2 - 1
    with torch.inference_mode():
        flop = counted(lambda: pipeline.tokenizer.encode_indices(pixels))
        encoding = repeated_job(
            "encoded batch (128 images)", ENCODING, lambda: pipeline.tokenizer.encode_indices(pixels), 1, rounds
        )
        jobs.append(encoding._replace(flop=flop, bound=bound_of(flop, speed)))
        for batch in (1, 100):
            jobs.append(sampling_job(pipeline, batch, 1 if quick else 3, speed))
    return Report(
        name="where_time_goes",
        title="Where the time goes",
        text=words(jobs, speed, rounded),
        figures={"speed": speed._asdict(), "rounded": rounded._asdict(), "jobs": [job._asdict() for job in jobs]},
    )


def sampling_job(pipeline: LatentGenerationPipeline, batch: int, rounds: int, speed: Speed) -> Job:
    """A token for each of `batch` images, without guidance."""
    spec, options = pipeline.tokenizer.latent_spec(), pipeline.sampling_options({"guidance_scale": 1.0})
    labels = torch.arange(batch, device=pipeline.device) % pipeline.prior.config.num_classes
    generators = image_generators(torch.Generator().manual_seed(0), batch)

    def work() -> None:
        pipeline.prior.sample(spec, labels, options, generators)

    total = counted(work)
    job = repeated_job(f"sampled token (batch {batch})", SAMPLING, work, spec.tokens, rounds)
    flop = {kind: amount / spec.tokens for kind, amount in total.items()}
    weights = sum(p.nbytes for name, p in pipeline.prior.named_parameters() if "embedding" not in name)
    return job._replace(flop=flop, bound=max(bound_of(flop, speed), weights / speed.memory))


def replaced(config: Any, steps: int) -> Any:
    return dataclasses.replace(config, max_steps=steps, sample_every=10**9, checkpoint_every=10**9)


def words(jobs: list[Job], speed: Speed, rounded: Speed) -> str:
    reach = (
        f"This machine: {speed.product / 1e9:,.0f} GFLOP/s in products of float32 and {speed.convolution / 1e9:,.0f} in "
        f"convolutions, {rounded.product / 1e9:,.0f} and {rounded.convolution / 1e9:,.0f} with factors rounded as in training; "
        f"{speed.memory / 1e9:.1f} GB/s in reading."
    )
    overview = table(
        ["", "ms", "GFLOP in convolutions", "GFLOP in products", "bound, ms", "bound / measured"],
        [
            [
                job.name,
                1e3 * job.seconds,
                job.flop.get("convolution", 0.0) / 1e9,
                job.flop.get("product", 0.0) / 1e9,
                1e3 * job.bound,
                f"{job.bound / job.seconds:.0%}",
            ]
            for job in jobs
        ],
    )
    details = [f"{job.name}: " + by_part(job) for job in jobs]
    return "\n\n".join([(__doc__ or "").partition("\n\n")[2].strip(), reach, overview, *details])


def by_part(job: Job) -> str:
    rest = job.seconds - sum(job.parts.values())
    parts = sorted([*job.parts.items(), ("the rest", max(rest, 0.0))], key=lambda pair: -pair[1])
    return (
        ", ".join(f"{part} {seconds / job.seconds:.0%}" for part, seconds in parts if seconds / job.seconds >= 0.005)
        + "."
    )
