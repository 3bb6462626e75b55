"""Between FSDP2's shards and whole tensors: what is saved and averaged is whole, so it fits any number of processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def gather_tensors(value: Any) -> Any:
    """The value with every shard in it gathered on the CPU; each process must ask for it."""
    if isinstance(value, DTensor):
        by_rows = Shard(0) in value.placements  # a norm is not: it is summed
        return (gather_shards(value.to_local(), value) if by_rows else value.full_tensor()).cpu()
    if isinstance(value, dict):
        return {name: gather_tensors(inner) for name, inner in value.items()}
    return [gather_tensors(inner) for inner in value] if isinstance(value, list) else value


def gather_shards(shard: Tensor, like: DTensor) -> Tensor:
    """The whole of a tensor from each process's shard of it, laid out by rows as `like` is; each process must ask for it.

    `DTensor.full_tensor` does so by a functional collective, which over gloo (torch 2.14) could end the process.
    """
    dim = like.placements.index(Shard(0))
    processes = like.device_mesh.size(dim)
    rows = -(-like.shape[0] // processes)
    padded = shard.new_zeros(rows, *like.shape[1:], device=like.device)
    padded[: len(shard)] = shard
    result = padded.new_empty(rows * processes, *like.shape[1:])
    dist.all_gather(list(result.split(rows)), padded, group=like.device_mesh.get_group(dim))
    return result[: like.shape[0]]


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, laid out as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard, or the whole of what is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_state(thing: Any, state: dict[str, Any]) -> None:
    """`thing.load_state_dict(state)`, of a module or an optimiser that may be sharded, or of anything else."""
    if isinstance(thing, nn.Module):
        held = thing.state_dict()
        state = {name: shard_like(value, held[name]) if name in held else value for name, value in state.items()}
    elif isinstance(thing, torch.optim.Optimizer):
        parameters = [p for group in thing.param_groups for p in group["params"]]
        state = state | {
            "state": {
                i: {
                    name: shard_like(value, parameters[i])
                    if isinstance(value, Tensor) and value.shape == parameters[i].shape
                    else value
                    for name, value in held.items()
                }
                for i, held in state["state"].items()
            }
        }
    thing.load_state_dict(state)
