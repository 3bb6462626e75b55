"""Bits per held-out code of a prior on the quickstart's codes, compared with transformers' Llama of the same size.

Ours is `ar-tiny`, trained as in the quickstart. Llama has the same size and the settings that were tuned for the comparison of
whole stacks. It is trained for as many seconds, with a learning rate that decays over them. Both average their weights. The bits
are measured on the codes of validation images, given the class and all earlier codes. Only codes count in Llama's vocabulary.
The last row is ours with 8-bit weights, one position at a time, as in decoding.
"""

import dataclasses
import math
import time

import baseline_stack
import torch
import torch.nn.functional as F
from frame import OURS, Report, markdown_table
from quickstart_codes import train_codes, train_prior
from torch import Tensor
from transformers import LlamaForCausalLM

from pipelines.evaluation.likelihood import negative_log_likelihood
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.codes.reader import CodeCache, CodeSplit
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.autoregressive.stepping import build_stepper
from training_harness.matmul_precision import reduced_matmul_precision

BATCH = 250


def read_all(split: CodeSplit) -> tuple[Tensor, Tensor]:
    """Return the indices (N, h, w) and the labels (N,) of all images of a split."""
    positions = torch.arange(len(split)).numpy()
    return split.indices(positions), split.labels(positions)


@torch.no_grad()
def measure_llama_bits(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> float:
    """Return the mean bits per code of Llama."""
    nats = []
    for part, classes in zip(tokens.split(BATCH), labels.split(BATCH), strict=True):
        sequence = torch.cat([baseline_stack.CODES + classes[:, None], part], dim=1)
        logits = model(input_ids=sequence[:, :-1], use_cache=False).logits[..., : baseline_stack.CODES]
        nats.append(F.cross_entropy(logits.flatten(0, 1), part.flatten(), reduction="none"))
    return torch.cat(nats).mean().item() / math.log(2)


@torch.no_grad()
def measure_stepped_bits(prior: AutoregressivePrior, codes: Tensor, labels: Tensor, eight_bits: bool) -> float:
    """Return the mean bits per code of our prior as it decodes: one position at a time, with its caches."""
    nats = []
    for part, classes in zip(codes.split(BATCH), labels.split(BATCH), strict=True):
        tokens, caches = prior.codes_to_tokens(part), prior.new_caches(len(part))
        stepper = build_stepper(prior, caches, None, len(part), eight_bits)
        vectors = torch.cat([prior.class_embedding(classes)[:, None], prior.embed_codes(tokens[:, :-1, None])], 1)
        logits = [stepper.logits(stepper.step(x[:, None]), 0) for x in vectors.unbind(1)]
        nats.append(F.cross_entropy(torch.stack(logits, 1).flatten(0, 1), tokens.flatten(), reduction="none"))
    return torch.cat(nats).mean().item() / math.log(2)


def run(quick: bool) -> Report:
    share, count, seed = (0.05, 200, 0) if quick else (1.0, None, 0)
    folder = train_codes(share, seed)
    codes = CodeCache(folder)
    begin = time.perf_counter()
    pipeline = LatentGenerationPipeline.from_pretrained(train_prior(folder, "ar-tiny", share, seed))
    seconds = time.perf_counter() - begin
    prior, (held_out, labels) = pipeline.prior.eval(), (x[:count] for x in read_all(codes.validation))
    model, (train_tokens, classes) = prior.config.model, read_all(codes.train)
    tuning = dataclasses.replace(
        baseline_stack.Tuning(),
        hidden_size=model.hidden_size,
        layers=model.num_layers,
        heads=model.num_heads,
        intermediate_size=model.intermediate_size,
    )
    with reduced_matmul_precision(torch.device("cpu"), enabled=True):
        llama = baseline_stack.train_prior(train_tokens.flatten(1), classes, seconds, tuning, seed)
    bits = {
        OURS: negative_log_likelihood(prior, held_out, labels).mean().item(),
        "transformers Llama": measure_llama_bits(llama.model, held_out.flatten(1), labels),
        f"{OURS}, one position at a time": measure_stepped_bits(prior, held_out, labels, eight_bits=False),
        f"{OURS}, int8": measure_stepped_bits(prior, held_out, labels, eight_bits=True),
    }
    uniform = math.log2(prior.config.codebook_size)
    rows = [[name, f"{value:.4f}", f"{value / uniform:.1%}"] for name, value in bits.items()]
    parameters = {OURS: prior, "transformers Llama": llama.model}
    sizes = ", ".join(f"{sum(p.numel() for p in m.parameters()):,} ({name})" for name, m in parameters.items())
    setting = (
        f"{seconds:.0f} seconds each, {len(held_out):,} validation images, seed {seed}; parameters: {sizes}. A uniform guess costs "
        f"{uniform:.0f} bits."
    )
    return Report(
        name="prior_likelihood",
        title="Bits per code at equal training time",
        text="\n\n".join(
            [
                (__doc__ or "").partition("\n\n")[2].strip(),
                setting,
                markdown_table(["", "bits per code", "share of a uniform guess"], rows),
            ]
        ),
        results={"seed": seed, "seconds": seconds, "num_images": len(held_out), "bits_per_token": bits},
        peers=("transformers",),
    )
