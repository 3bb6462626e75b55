"""Decoding compared with transformers' `generate`: 256 codes of a small decoder, without guidance.

6 layers × 384, 6 heads, SwiGLU of 1,024, K = 1,024; a class prefix and 256 codes, sampled at temperature 1. Ours samples with
its prior. transformers samples with a `LlamaForCausalLM` of the same size, with its dynamic and its static cache. Ours
normalizes queries and keys, Llama does not. The bound is the time to read the weights once in each step at this machine's memory
bandwidth. int8 is ours with 8-bit weights; the benchmark `prior_likelihood` has its cost in bits per code.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from frame import OURS, Report, compare_times, markdown_table, plot_bars, time_interleaved
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from where_time_goes import measure_machine_speed

from pipelines.latent_generation import image_generators
from stage2_prior.autoregressive.config import AutoregressivePriorConfig
from stage2_prior.autoregressive.decoding import decode
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.autoregressive.sampling import SamplingOptions

CODES, SIDE, CLASSES = 1024, 16, 10
SIZES = {"hidden_size": 384, "intermediate_size": 1024}
BATCHES = (1, 8, 32)
INT8, DYNAMIC, STATIC = f"{OURS}, int8", "transformers, dynamic cache", "transformers, static cache"


def build_our_prior(**fields: Any) -> AutoregressivePrior:
    sizes: dict[str, Any] = {"codebook_size": CODES, "height": SIDE, "width": SIDE, "num_classes": CLASSES}
    return AutoregressivePrior(AutoregressivePriorConfig(**sizes, **SIZES, num_layers=6, num_heads=6, **fields)).eval()


def build_llama(**fields: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"vocab_size": CODES + CLASSES + 1, "num_hidden_layers": 6, "num_attention_heads": 6}
    return LlamaForCausalLM(LlamaConfig(**sizes, **SIZES, **fields)).eval()


def contenders(ours: AutoregressivePrior, theirs: LlamaForCausalLM, batch: int, tokens: int) -> dict[str, Any]:
    """Return a function per contender that samples `tokens` codes for each of `batch` images."""
    labels = torch.arange(batch) % CLASSES
    generators = image_generators(torch.Generator().manual_seed(0), batch)

    def decode_with_ours(**options: Any) -> object:
        return decode(ours, labels, SamplingOptions(**options), generators)

    def generate(cache: str) -> object:
        config = GenerationConfig(
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=CODES + CLASSES,
            cache_implementation=cache,
            disable_compile=True,
        )
        return theirs.generate((CODES + labels)[:, None], generation_config=config)

    ours_by_name = {OURS: decode_with_ours, INT8: lambda: decode_with_ours(weights="int8")}
    return ours_by_name | {DYNAMIC: lambda: generate("dynamic"), STATIC: lambda: generate("static")}


@torch.no_grad()
def run(quick: bool) -> Report:
    torch.manual_seed(0)
    rounds, batches = (2, (1,)) if quick else (5, BATCHES)
    ours, theirs, tokens = build_our_prior(), build_llama(), SIDE**2
    memory = measure_machine_speed(3).memory
    weights = sum(p.nbytes for name, p in ours.named_parameters() if "embedding" not in name)
    rows, results = [], {}
    for batch in batches:
        times = compare_times(time_interleaved(contenders(ours, theirs, batch, tokens), rounds))
        bound = memory / weights * batch
        results[batch] = {"bound": bound} | times
        for name, row in times.items():
            rate = batch * tokens / row["seconds"]
            low, high = row["quartiles"]
            rows.append([batch, name, rate, row["ratio"], f"{low:.2f} … {high:.2f}", f"{rate / bound:.0%}"])
    head = ["images at once", "", "codes/s", "time, ours = 1", "quartiles", "of the bound"]
    summary = f"Weights read at each step: {weights / 2**20:.0f} MiB; memory reads {memory / 1e9:.1f} GB/s."
    return Report(
        name="decoding",
        title="Decoding: codes per second",
        text="\n\n".join([(__doc__ or "").partition("\n\n")[2].strip(), summary, markdown_table(head, rows)]),
        results={"memory": memory, "weights": weights, "batches": results},
        peers=("transformers",),
        chart=lambda path: plot_chart(results, path),
    )


def plot_chart(results: Mapping[Any, Any], path: Path) -> None:
    groups = {
        f"{batch} at once": {
            name: int(batch) * SIDE**2 / row["seconds"] for name, row in times.items() if name != "bound"
        }
        for batch, times in results.items()
    }
    plot_bars(groups, "codes per second", path)
