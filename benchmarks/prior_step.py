"""A stage-two training step compared with transformers' Llama of the same size.

6 layers × 384, 6 heads, SwiGLU of 1,024, K = 1,024, 256 codes after a class prefix, batches of 32: forward pass, loss,
backward pass, clipping and fused AdamW for both. Ours has the same arithmetic as Llama. Our recipes also use QK-norm, which
Llama lacks: it has a row of its own. Ours computes its loss in chunks of the head. Llama computes the cross-entropy of all
logits, with PyTorch's attention and with its own eager attention. Ours runs with the matmul precision of its training loop
(`training_harness.matmul_precision`), Llama with PyTorch's default. "our matmul precision" is Llama with our setting.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from decoding import CLASSES, CODES, SIDE, build_llama, build_our_prior
from frame import OURS, Report, compare_times, markdown_table, plot_bars, time_interleaved
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM
from where_time_goes import flop_by_kind, measure_machine_speed

from training_harness.allocator import keep_freed_memory
from training_harness.matmul_precision import reduced_matmul_precision
from training_harness.processes import accelerated_device

BATCH = 32


def build_training_steps(
    model: nn.Module, compute_loss: Callable[[], Tensor], steps: int, reduced_precision: bool
) -> Callable[[], None]:
    """Return a function that trains for `steps` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train() -> None:
        with reduced_matmul_precision(accelerated_device(), enabled=reduced_precision):
            for _ in range(steps):
                compute_loss().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return train


def run(quick: bool) -> Report:
    keep_freed_memory()
    torch.manual_seed(0)
    steps, rounds, warm_up = (1, 1, 0) if quick else (2, 5, 1)
    codes, labels = torch.randint(CODES, (BATCH, SIDE, SIDE)), torch.arange(BATCH) % CLASSES
    sequence = torch.cat([CODES + labels[:, None], codes.flatten(1)], dim=1)
    contenders: dict[str, Any] = {}
    for name, qk_norm in ((OURS, False), (f"{OURS}, QK-norm", True)):
        ours = build_our_prior(qk_norm=qk_norm).train()
        contenders[name] = build_training_steps(
            ours, lambda ours=ours: ours(codes, labels).total, steps, reduced_precision=True
        )
    for name, attention, reduced_precision in (
        ("transformers Llama, sdpa", "sdpa", False),
        ("transformers Llama, eager", "eager", False),
        ("transformers Llama, sdpa, our matmul precision", "sdpa", True),
    ):
        theirs = build_llama(attn_implementation=attention).train()

        def loss(theirs: LlamaForCausalLM = theirs) -> Tensor:
            logits = theirs(input_ids=sequence[:, :-1], use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1), sequence[:, 1:].flatten())

        contenders[name] = build_training_steps(theirs, loss, steps, reduced_precision)
    with FlopCounterMode(display=False) as counter:
        build_our_prior(qk_norm=False)(codes, labels).total.backward()
    flop = flop_by_kind(counter)["matmul"]
    with reduced_matmul_precision(accelerated_device(), enabled=True):
        speed = measure_machine_speed(3).matmul
    times = compare_times(time_interleaved(contenders, rounds, warm_up))
    rows = []
    for name, row in times.items():
        low, high = row["quartiles"]
        seconds = row["seconds"] / steps
        rows.append([name, 1e3 * seconds, BATCH * SIDE**2 / seconds, row["ratio"], f"{low:.2f} … {high:.2f}"])
    our_seconds = times[OURS]["seconds"] / steps
    share = flop / our_seconds / speed
    summary = (
        f"Ours reaches {flop / our_seconds / 1e9:,.0f} GFLOP/s in matrix products, {share:.0%} of this machine's speed in a large "
        "product."
    )
    return Report(
        name="prior_step",
        title="A stage-two training step",
        text="\n\n".join(
            [
                (__doc__ or "").partition("\n\n")[2].strip(),
                markdown_table(["", "ms per step", "codes/s", "time, ours = 1", "quartiles"], rows),
                summary,
            ]
        ),
        results={"flop": flop, "matmul": speed, "share": share, "contenders": times},
        peers=("transformers",),
        chart=lambda path: plot_chart(times, steps, path),
    )


def plot_chart(times: Mapping[str, Any], steps: int, path: Path) -> None:
    rates = {name: BATCH * SIDE**2 * steps / row["seconds"] for name, row in times.items()}
    plot_bars({f"batches of {BATCH}": rates}, "codes per second", path)
