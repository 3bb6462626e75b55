"""Conversion between the shards of FSDP2 and full tensors.

Checkpoints store full tensors, so they fit any number of processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def gather_tensors(value: Any) -> Any:
    """Replace each sharded tensor in `value` with the full tensor on the CPU. All processes must call this.

    Args:
        value: A tensor, nested dictionaries and lists of tensors, or any other value.
    """
    if isinstance(value, DTensor):
        by_rows = Shard(0) in value.placements  # false for a norm, which is a partial sum
        return (gather_shards(value.to_local(), value) if by_rows else value.full_tensor()).cpu()
    if isinstance(value, dict):
        return {name: gather_tensors(inner) for name, inner in value.items()}
    return [gather_tensors(inner) for inner in value] if isinstance(value, list) else value


def gather_shards(shard: Tensor, like: DTensor) -> Tensor:
    """Gather the full tensor from the shards of all processes. All processes must call this.

    `DTensor.full_tensor` uses a functional collective, which can crash the process with gloo (torch 2.14).

    Args:
        shard: Rows of this process.
        like: A tensor sharded by rows in the same way.
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
    """Shard a full tensor, equal on all processes, in the same way as `like`."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local_shard(tensor: Tensor) -> Tensor:
    """Return the shard of this process, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_state(target: Any, state: dict[str, Any]) -> None:
    """Call `target.load_state_dict(state)`; modules and optimizers may be sharded, `state` has full tensors."""
    if isinstance(target, nn.Module):
        current = target.state_dict()
        state = {name: shard_like(value, current[name]) if name in current else value for name, value in state.items()}
    elif isinstance(target, torch.optim.Optimizer):
        parameters = [p for group in target.param_groups for p in group["params"]]
        state = state | {
            "state": {
                i: {
                    name: shard_like(value, parameters[i])
                    if isinstance(value, Tensor) and value.shape == parameters[i].shape
                    else value
                    for name, value in parameter_state.items()
                }
                for i, parameter_state in state["state"].items()
            }
        }
    target.load_state_dict(state)
