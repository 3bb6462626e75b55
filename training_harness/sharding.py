"""Between FSDP2's shards and whole tensors: what is saved and averaged is whole, so it fits any number of processes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Any) -> Any:
    """The value with every shard in it gathered on the CPU; each process must ask for it."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {name: whole(inner) for name, inner in value.items()}
    return [whole(inner) for inner in value] if isinstance(value, list) else value


def sharded_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, laid out as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This process's shard, or the whole of what is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_state(thing: Any, state: dict[str, Any]) -> None:
    """`thing.load_state_dict(state)`, of a module or an optimiser that may be sharded, or of anything else."""
    if isinstance(thing, nn.Module):
        held = thing.state_dict()
        state = {name: sharded_as(value, held[name]) if name in held else value for name, value in state.items()}
    elif isinstance(thing, torch.optim.Optimizer):
        parameters = [p for group in thing.param_groups for p in group["params"]]
        state = state | {
            "state": {
                i: {
                    name: sharded_as(value, parameters[i])
                    if isinstance(value, Tensor) and value.shape == parameters[i].shape
                    else value
                    for name, value in held.items()
                }
                for i, held in state["state"].items()
            }
        }
    thing.load_state_dict(state)
