"""Several processes sample the same images as one process."""

from pathlib import Path

import pytest
import torch
from small_runs import set_launch_environment, start_processes, wait_for_exit
from tiny_models import seeded, tiny_pipeline

from pipelines.across_processes import sample_across_processes
from pipelines.latent_generation import to_uint8

LABELS = (0, 2, 1, 1, 0, 2, 0)  # an odd number; batches end at other images than with one process


def sample(count: int) -> torch.Tensor:
    return sample_across_processes(tiny_pipeline(), torch.tensor(LABELS[:count]), seeded(3), batch_size=2)


def sample_in_process(rank: int, processes: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    set_launch_environment(rank, processes, port)
    torch.save({count: sample(count) for count in (1, 2, 7)}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def images_by_process(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("together")
    assert wait_for_exit(start_processes(sample_in_process, 2, folder)) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_two_processes_sample_the_images_of_one_process_and_both_have_all_of_them(
    images_by_process: list[dict[int, torch.Tensor]], count: int
) -> None:
    expected = to_uint8(tiny_pipeline().sample_pixels(torch.tensor(LABELS[:count]), seeded(3)))
    assert torch.equal(sample(count), expected)
    for images in images_by_process:
        assert torch.equal(images[count], expected)
    assert count == 1 or not torch.equal(expected[0], expected[1]), "all images are equal, so any order would pass"
