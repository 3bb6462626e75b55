"""A stage-two training step against one of transformers' Llama of the same size.

6 layers × 384, 6 heads, SwiGLU of 1,024, K = 1,024, 256 codes after a class prefix, batches of 32: forward pass, loss,
backward pass, clipping and fused AdamW for both. Ours has the same arithmetic as Llama. The QK-norm of our recipes, which
Llama lacks, is a row of its own. Ours computes its loss in chunks of the head, Llama the cross-entropy of all logits, with
torch's attention and with its own eager attention. Ours runs with the matmul precision of its training loop
(`training_harness.matmul_precision`), Llama with torch's default; "products as ours" is Llama with our setting.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from decoding import CLASSES, CODES, SIDE, llama, our_prior
from frame import OURS, Report, bars, compared, interleaved, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM
from where_time_goes import by_kind, machine_speed

from training_harness.allocator import keep_freed_memory
from training_harness.matmul_precision import reduced_matmul_precision
from training_harness.processes import accelerated_device

BATCH = 32


def stepping(model: nn.Module, loss_of: Callable[[], Tensor], steps: int, rounded: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def take() -> None:
        with reduced_matmul_precision(accelerated_device(), enabled=rounded):
            for _ in range(steps):
                loss_of().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return take


def run(quick: bool) -> Report:
    keep_freed_memory()
    torch.manual_seed(0)
    steps, rounds, warm_up = (1, 1, 0) if quick else (2, 5, 1)
    codes, labels = torch.randint(CODES, (BATCH, SIDE, SIDE)), torch.arange(BATCH) % CLASSES
    sequence = torch.cat([CODES + labels[:, None], codes.flatten(1)], dim=1)
    takes: dict[str, Any] = {}
    for name, qk_norm in ((OURS, False), (f"{OURS}, queries and keys normed", True)):
        ours = our_prior(qk_norm=qk_norm).train()
        takes[name] = stepping(ours, lambda ours=ours: ours(codes, labels).total, steps, rounded=True)
    for name, attention, rounded in (
        ("transformers Llama, sdpa", "sdpa", False),
        ("transformers Llama, eager", "eager", False),
        ("transformers Llama, sdpa, products as ours", "sdpa", True),
    ):
        theirs = llama(attn_implementation=attention).train()

        def loss(theirs: LlamaForCausalLM = theirs) -> Tensor:
            logits = theirs(input_ids=sequence[:, :-1], use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1), sequence[:, 1:].flatten())

        takes[name] = stepping(theirs, loss, steps, rounded)
    with FlopCounterMode(display=False) as counter:
        our_prior(qk_norm=False)(codes, labels).total.backward()
    flop = by_kind(counter)["product"]
    with reduced_matmul_precision(accelerated_device(), enabled=True):
        speed = machine_speed(3).product
    found = compared(interleaved(takes, rounds, warm_up))
    rows = []
    for name, row in found.items():
        low, high = row["quartiles"]
        seconds = row["seconds"] / steps
        rows.append([name, 1e3 * seconds, BATCH * SIDE**2 / seconds, row["ratio"], f"{low:.2f} … {high:.2f}"])
    own = found[OURS]["seconds"] / steps
    share = flop / own / speed
    words = (
        f"Ours reaches {flop / own / 1e9:,.0f} GFLOP/s in matrix products, {share:.0%} of this machine's speed in a large "
        "product."
    )
    return Report(
        name="prior_step",
        title="A stage-two training step",
        text="\n\n".join(
            [
                (__doc__ or "").partition("\n\n")[2].strip(),
                table(["", "ms a step", "codes/s", "time, ours = 1", "quartiles"], rows),
                words,
            ]
        ),
        figures={"flop": flop, "product": speed, "share": share, "contenders": found},
        peers=("transformers",),
        chart=lambda path: draw(found, steps, path),
    )


def draw(found: Mapping[str, Any], steps: int, path: Path) -> None:
    rates = {name: BATCH * SIDE**2 * steps / row["seconds"] for name, row in found.items()}
    bars({f"batches of {BATCH}": rates}, "codes a second", path)
