"""The baseline stack: diffusers' VQModel, then transformers' LlamaForCausalLM.

It is what a user would build without latentloom. It uses only the public interfaces of the two libraries and plain PyTorch, on
pixels in [-1, 1] that stay in memory. Each stage gets a number of seconds. Warm-up and cosine decay span these seconds, so a
short run is a complete run.

On CPUs that gain from it, matrix products use bfloat16 factors, as ours do. docs/LOG.md has the tuning in order with all
metrics; `Tuning` holds the best settings.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import VQModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

CODES, CLASSES = 512, 10
NULL = CODES + CLASSES  # the class token without a class, for guidance
WARMUP = 0.03


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Settings of both stages."""

    channels: tuple[int, ...] = (32, 64, 64)
    layers_per_block: int = 1
    attention: bool = False
    latent_channels: int = 16
    codebook_weight: float = 1.0
    tokenizer_rate: float = 4e-3
    tokenizer_batch: int = 32
    hidden_size: int = 192
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 512
    prior_rate: float = 2e-3
    prior_batch: int = 32
    class_dropout: float = 0.1
    ema_decay: float = 0.99
    tokenizer_share: float = 0.45


class Trained(NamedTuple):
    """A trained stage."""

    model: VQModel | LlamaForCausalLM
    steps: int
    images_per_second: float


def train_tokenizer(pixel_values: Tensor, seconds: float, tuning: Tuning, seed: int) -> Trained:
    """Train VQModel on (N, C, H, W) in [-1, 1] with mean squared error and the library's codebook loss."""
    torch.manual_seed(seed)
    levels, channels = len(tuning.channels), pixel_values.shape[1]
    model = VQModel(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuning.channels,
        layers_per_block=tuning.layers_per_block,
        latent_channels=tuning.latent_channels,
        num_vq_embeddings=CODES,
        norm_num_groups=16,
        mid_block_add_attention=tuning.attention,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=tuning.tokenizer_rate, betas=(0.9, 0.95), weight_decay=0.0)
    ema = EMAModel(model.parameters(), decay=tuning.ema_decay)
    begin, steps = time.perf_counter(), 0
    for rows in batches(len(pixel_values), tuning.tokenizer_batch, seed):
        progress = (time.perf_counter() - begin) / seconds
        if progress >= 1:
            break
        output = model(pixel_values[rows].contiguous(memory_format=torch.channels_last))
        loss = F.mse_loss(output.sample, pixel_values[rows]) + tuning.codebook_weight * output.commit_loss
        take_step(model, optimizer, loss, tuning.tokenizer_rate * learning_rate_factor(progress))
        ema.step(model.parameters())
        steps += 1
    elapsed = time.perf_counter() - begin
    ema.copy_to(model.parameters())
    return Trained(model.eval(), steps, steps * tuning.tokenizer_batch / elapsed)


def train_prior(tokens: Tensor, labels: Tensor, seconds: float, tuning: Tuning, seed: int) -> Trained:
    """Train Llama on sequences of a class token and (N, T) codes; for guidance the class is dropped in some sequences."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=NULL + 1,
        hidden_size=tuning.hidden_size,
        num_hidden_layers=tuning.layers,
        num_attention_heads=tuning.heads,
        intermediate_size=tuning.intermediate_size,
        max_position_embeddings=tokens.shape[1] + 1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",  # 80 ms per step, "sdpa" needs 140 with reduced matmul precision
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=tuning.prior_rate, betas=(0.9, 0.95), weight_decay=0.01)
    ema = EMAModel(model.parameters(), decay=tuning.ema_decay)
    begin, steps = time.perf_counter(), 0
    for rows in batches(len(tokens), tuning.prior_batch, seed):
        progress = (time.perf_counter() - begin) / seconds
        if progress >= 1:
            break
        classes = CODES + labels[rows]
        classes = classes.masked_fill(torch.rand(len(rows)) < tuning.class_dropout, NULL)
        sequence = torch.cat([classes[:, None], tokens[rows]], dim=1)
        logits = model(input_ids=sequence[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), sequence[:, 1:].flatten())
        take_step(model, optimizer, loss, tuning.prior_rate * learning_rate_factor(progress))
        ema.step(model.parameters())
        steps += 1
    elapsed = time.perf_counter() - begin
    ema.copy_to(model.parameters())
    return Trained(model.eval(), steps, steps * tuning.prior_batch / elapsed)


@torch.no_grad()
def encode(model: VQModel, pixel_values: Tensor, batch_size: int = 250) -> Tensor:
    """Encode (N, 1, H, W) in [-1, 1] as (N, h·w) codes."""
    latents = (model.encode(batch).latents for batch in pixel_values.split(batch_size))
    # the third output of the quantizer holds the indices of all positions in one row
    return torch.cat([model.quantize(z)[2][2].view(len(z), -1) for z in latents])


@torch.no_grad()
def decode(model: VQModel, tokens: Tensor, batch_size: int = 250) -> Tensor:
    """Decode (N, h·w) codes of a square grid as (N, 1, H, W) uint8."""
    side = math.isqrt(tokens.shape[1])
    images = []
    for batch in tokens.split(batch_size):
        shape = (len(batch), side, side, model.config.latent_channels)
        quantized = model.quantize.get_codebook_entry(batch.flatten(), shape)
        images.append(model.decode(quantized, force_not_quantize=True).sample)
    return (torch.cat(images) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, labels: Tensor, tokens: int, guidance_scale: float, batch_size: int = 100
) -> Tensor:
    """Sample codes (N, tokens) for class ids (N,) by `generate`, with its key-value cache and its guidance."""
    samples = []
    for classes in labels.split(batch_size):
        prompt = (CODES + classes)[:, None]
        config = GenerationConfig(
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            guidance_scale=guidance_scale if guidance_scale != 1 else None,
            suppress_tokens=list(range(CODES, NULL + 1)),
            pad_token_id=NULL,
        )
        null = torch.full_like(prompt, NULL)
        output = model.generate(prompt, generation_config=config, negative_prompt_ids=null)
        samples.append(output[:, 1:])
    return torch.cat(samples)


def take_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    """Run the backward pass, clip the gradients and update the weights."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def learning_rate_factor(progress: float) -> float:
    """Return the factor of the learning rate at `progress` in [0, 1]: linear warm-up, then cosine decay to zero."""
    return min(1.0, progress / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield positions of full batches without end, in a new random order in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // size * size].split(size)
