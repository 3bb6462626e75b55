"""Images that several processes draw together are those that one draws."""

from pathlib import Path

import pytest
import torch
from small_runs import set_launch_environment, start_processes, wait_for_exit
from tiny_models import seeded, tiny_pipeline

from pipelines.across_processes import sample_across_processes
from pipelines.latent_generation import to_uint8

LABELS = (0, 2, 1, 1, 0, 2, 0)  # an odd number, and batches that end at other images than with one process


def draw(count: int) -> torch.Tensor:
    return sample_across_processes(tiny_pipeline(), torch.tensor(LABELS[:count]), seeded(3), batch_size=2)


def one_of_two(rank: int, processes: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    set_launch_environment(rank, processes, port)
    torch.save({count: draw(count) for count in (1, 2, 7)}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("together")
    assert wait_for_exit(start_processes(one_of_two, 2, folder)) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_two_processes_draw_the_images_of_one_and_both_have_all(
    drawn: list[dict[int, torch.Tensor]], count: int
) -> None:
    alone = to_uint8(tiny_pipeline().sample_pixels(torch.tensor(LABELS[:count]), seeded(3)))
    assert torch.equal(draw(count), alone)
    for together in drawn:
        assert torch.equal(together[count], alone)
    assert count == 1 or not torch.equal(alone[0], alone[1]), "all images look alike, so any order would pass"
