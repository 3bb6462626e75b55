"""Where the time goes in a stage-one step, a stage-two step, an encoded batch and a sampled token of the quickstart's recipes.

The parts are timed inside the real loops, with a stopwatch around the functions. The time of a part excludes the parts inside
it. The bound is the time of the arithmetic if all of it ran as fast as large matrix products and convolutions on this machine,
with the matmul precision of training (`training_harness.matmul_precision`). For a sampled token the bound is the time to read
the weights once. The time above the bound goes to activations, normalization, small matrix products and Python.
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
from frame import Report, load_recipe, markdown_table, synchronize
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
    """Speed of this machine: FLOP/s of matrix products and of convolutions, bytes/s of reading memory."""

    matmul: float
    convolution: float
    memory: float


class TimedJob(NamedTuple):
    """Time and arithmetic of one step of a job."""

    name: str
    seconds: float
    """Seconds per step."""
    parts: dict[str, float]
    """Seconds per step of each part; their sum is at most `seconds`."""
    flop: dict[str, float]
    """FLOP per step of matrix products and of convolutions."""
    bound: float
    """Seconds per step at the speed of this machine."""


class Stopwatch:
    """Seconds by part of the functions that `watch` wraps, without the parts inside them."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = 0.0

    def _switch(self, change: Callable[[], None]) -> None:
        """Add the elapsed seconds to the running part, then change the stack of running parts."""
        synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        change()
        self._since = time.perf_counter()

    def wrap(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return `work` with its time counted for `part`."""

        def timed_work(*arguments: Any, **keywords: Any) -> Any:
            self._switch(lambda: self._running.append(part))
            try:
                return work(*arguments, **keywords)
            finally:
                self._switch(lambda: self._running.pop() and None)

        return timed_work

    @contextmanager
    def watch(self, part_names: dict[tuple[Any, str], str]) -> Iterator[None]:
        """Time the functions that `part_names` maps to parts, within the block."""
        patches = [
            mock.patch.object(owner, name, self.wrap(part, getattr(owner, name)))
            for (owner, name), part in part_names.items()
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
    (Muon, "step"): "optimizer",
    (EMA, "update"): "weight average",
    (ImageLoader, "__getitem__"): "images",
}
STAGE_TWO = {
    (AutoregressivePrior, "forward"): "embedding, norms, head, loss",
    (Attention, "forward"): "attention, forward",
    (SwiGLU, "forward"): "feed-forward, forward",
    (Accelerator, "backward"): "backward",
    (Run, "optimizer_step"): "gradient norm and checks",
    (Muon, "step"): "optimizer",
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
    (decoding, "sample_position"): "head and sampling",
}


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of `rounds` calls after one call that is not timed."""
    work()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def measure_machine_speed(rounds: int) -> Speed:
    """Measure a 2,048³ matrix product, a 3×3 convolution of 128 channels on 32 maps of 28×28, and reading 256 MiB."""
    device = accelerated_device()
    a, b = torch.randn(2, 2048, 2048, device=device)
    matmul = 2 * 2048**3 / median_seconds(lambda: a @ b, rounds)
    images = torch.randn(32, 128, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(128, 128, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    flop = 2 * 32 * 28 * 28 * 128 * 128 * 9
    convolution = flop / median_seconds(lambda: F.conv2d(images, kernel, padding=1), rounds)
    numbers = torch.ones(64 << 20, device=device)
    return Speed(matmul, convolution, numbers.nbytes / median_seconds(lambda: numbers.sum(), rounds))


def count_flop(work: Callable[[], object]) -> dict[str, float]:
    """Count the FLOP of one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return flop_by_kind(counter)


def flop_by_kind(counter: FlopCounterMode) -> dict[str, float]:
    """Return the FLOP of matrix products and of convolutions, forward and backward."""
    totals: dict[str, float] = defaultdict(float)
    for operation, flop in counter.get_flop_counts()["Global"].items():
        totals["convolution" if "convolution" in str(operation) else "matmul"] += flop
    return dict(totals)


def time_bound(flop: dict[str, float], speed: Speed) -> float:
    """Return the seconds that the arithmetic takes at the speed of this machine."""
    return sum(amount / getattr(speed, kind) for kind, amount in flop.items())


def measure_training(
    name: str, part_names: dict[tuple[Any, str], str], train: Callable[[int], Any], steps: int, speed: Speed
) -> TimedJob:
    """Time the steps of a training loop and count their FLOP.

    The time from the end of one step to the end of the next is measured, so the first step and the export are left out.

    Args:
        train: trains, or resumes, up to a step.
    """
    watch, counter = Stopwatch(), FlopCounterMode(display=False)
    ends: list[tuple[float, Counter[str]]] = []
    log = Run.log

    def record_times(run: Run, *arguments: Any) -> None:
        log(run, *arguments)
        ends.append((time.perf_counter(), Counter(watch.seconds)))

    def count_step(run: Run, step: int, *arguments: Any) -> None:
        log(run, step, *arguments)
        if step == steps - 2:
            counter.__enter__()
        if step == steps - 1:
            counter.__exit__(None, None, None)

    with mock.patch.object(Run, "log", count_step):
        train(steps)
    with watch.watch(part_names), mock.patch.object(Run, "log", record_times):
        train(3 * steps)
    seconds = statistics.median(end - begin for (begin, _), (end, _) in pairwise(ends))
    part_seconds = ends[-1][1] - ends[0][1]
    flop = flop_by_kind(counter)
    return TimedJob(
        name,
        seconds,
        {part: total / (len(ends) - 1) for part, total in part_seconds.items()},
        flop,
        time_bound(flop, speed),
    )


def measure_repeated(
    name: str, part_names: dict[tuple[Any, str], str], work: Callable[[], object], steps: int, rounds: int
) -> TimedJob:
    """Time calls of `work`, which does `steps` steps."""
    seconds = median_seconds(work, rounds) / steps
    watch = Stopwatch()
    with watch.watch(part_names):
        for _ in range(rounds):
            work()
    parts = {part: watch.seconds[part] / rounds / steps for part in dict.fromkeys(part_names.values())}
    return TimedJob(name, seconds, parts, {}, 0.0)


def run(quick: bool) -> Report:
    steps, rounds = (5, 3) if quick else (30, 10)
    speed, source = measure_machine_speed(rounds), load_source(FASHION_MNIST)
    with reduced_matmul_precision(accelerated_device(), enabled=True):
        training_speed = measure_machine_speed(rounds)
    jobs = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def tokenizer(n: int) -> object:
            config = load_recipe(
                TokenizerTraining, "tokenizer", TOKENIZER, 1.0, 0, data=FASHION_MNIST, output=folder / "t"
            )
            return run_tokenizer(tokenizer_inputs(shorten(config, n), source))

        def prior(n: int) -> object:
            config = load_recipe(
                AutoregressiveTraining, "prior", PRIOR, 1.0, 0, codes=folder / "codes", output=folder / "p"
            )
            return run_prior(shorten(config, n))

        jobs.append(
            measure_training(f"stage-one step ({TOKENIZER}, batch 16)", STAGE_ONE, tokenizer, steps, training_speed)
        )
        run_tokenize(folder / "t", source, folder / "codes", "indices")
        jobs.append(measure_training(f"stage-two step ({PRIOR}, batch 32)", STAGE_TWO, prior, steps, training_speed))
        pipeline = LatentGenerationPipeline.from_pretrained(folder / "p").to(accelerated_device())
    pixels = torch.rand(128, 1, 28, 28, device=accelerated_device()) * 2 - 1
    with torch.inference_mode():
        flop = count_flop(lambda: pipeline.tokenizer.encode_indices(pixels))
        encoding = measure_repeated(
            "encoded batch (128 images)", ENCODING, lambda: pipeline.tokenizer.encode_indices(pixels), 1, rounds
        )
        jobs.append(encoding._replace(flop=flop, bound=time_bound(flop, speed)))
        for batch in (1, 100):
            jobs.append(measure_sampling(pipeline, batch, 1 if quick else 3, speed))
    return Report(
        name="where_time_goes",
        title="Where the time goes",
        text=describe_results(jobs, speed, training_speed),
        results={
            "speed": speed._asdict(),
            "training_speed": training_speed._asdict(),
            "jobs": [job._asdict() for job in jobs],
        },
    )


def measure_sampling(pipeline: LatentGenerationPipeline, batch: int, rounds: int, speed: Speed) -> TimedJob:
    """Time sampling without guidance; a step is one token for each of `batch` images."""
    spec, options = pipeline.tokenizer.latent_spec(), pipeline.sampling_options({"guidance_scale": 1.0})
    labels = torch.arange(batch, device=pipeline.device) % pipeline.prior.config.num_classes
    generators = image_generators(torch.Generator().manual_seed(0), batch)

    def work() -> None:
        pipeline.prior.sample(spec, labels, options, generators)

    total_flop = count_flop(work)
    job = measure_repeated(f"sampled token (batch {batch})", SAMPLING, work, spec.tokens, rounds)
    flop = {kind: amount / spec.tokens for kind, amount in total_flop.items()}
    weights = sum(p.nbytes for name, p in pipeline.prior.named_parameters() if "embedding" not in name)
    return job._replace(flop=flop, bound=max(time_bound(flop, speed), weights / speed.memory))


def shorten(config: Any, steps: int) -> Any:
    return dataclasses.replace(config, max_steps=steps, sample_every=10**9, checkpoint_every=10**9)


def describe_results(jobs: list[TimedJob], speed: Speed, training_speed: Speed) -> str:
    speeds = (
        f"This machine: {speed.matmul / 1e9:,.0f} GFLOP/s in float32 matrix products and {speed.convolution / 1e9:,.0f} in "
        f"convolutions, {training_speed.matmul / 1e9:,.0f} and {training_speed.convolution / 1e9:,.0f} with the matmul "
        f"precision of training; {speed.memory / 1e9:.1f} GB/s in reading memory."
    )
    overview = markdown_table(
        ["", "ms", "GFLOP in convolutions", "GFLOP in matrix products", "bound, ms", "bound / measured"],
        [
            [
                job.name,
                1e3 * job.seconds,
                job.flop.get("convolution", 0.0) / 1e9,
                job.flop.get("matmul", 0.0) / 1e9,
                1e3 * job.bound,
                f"{job.bound / job.seconds:.0%}",
            ]
            for job in jobs
        ],
    )
    details = [f"{job.name}: " + format_parts(job) for job in jobs]
    return "\n\n".join([(__doc__ or "").partition("\n\n")[2].strip(), speeds, overview, *details])


def format_parts(job: TimedJob) -> str:
    rest = job.seconds - sum(job.parts.values())
    parts = sorted([*job.parts.items(), ("the rest", max(rest, 0.0))], key=lambda pair: -pair[1])
    return (
        ", ".join(f"{part} {seconds / job.seconds:.0%}" for part, seconds in parts if seconds / job.seconds >= 0.005)
        + "."
    )
