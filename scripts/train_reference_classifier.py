"""Trains the judge on all 60,000 training images of Fashion-MNIST and tests it on the 10,000 others.

    python scripts/train_reference_classifier.py                           # needs the Debian package dataset-fashion-mnist

SGD with Nesterov momentum on one cycle of the learning rate; images are flipped at random and shifted by up to two
pixels. The judge is small so that its figures come fast. It never meets a generated image in training.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from make_embedded_data import CLASS_NAMES, DEBIAN_FOLDER, read_split
from torch import Tensor
from torch.nn import functional as F

from pipelines.evaluation.linear_probe import class_agreement
from pipelines.evaluation.reference_classifier import ReferenceClassifier, ReferenceClassifierConfig
from training_harness.files import atomic_folder

CLASSIFIER_FOLDER = Path(__file__).parents[1] / "latentloom" / "data" / "fashion-mnist-classifier"
SEED = 0
EPOCHS = 10
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 0.2
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
MAX_SHIFT = 2

README = """\
# The reference classifier of the embedded Fashion-MNIST set

A convolutional classifier ({parameters:,} parameters) of 28×28 grey images, classes in the original order. It gives the
class agreement of generated images; their Fréchet distance (which is not FID) and recall are measured in its {width}
penultimate activations. It is trained on real images alone and takes no part in training a generator. Of the embedded
set it has seen the training images, not the test images.

- Data: all 60,000 training images of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747; MIT licence).
- Recipe (`scripts/train_reference_classifier.py`): {epochs} epochs of batches of {batch_size}; SGD with Nesterov momentum
  {momentum}, weight decay {weight_decay}, learning rate in one cycle up to {learning_rate}; random horizontal flips and
  shifts of up to {max_shift} pixels; seed {seed}; float32.
- **Accuracy on the 10,000 test images: {accuracy:.2%}**; torch {torch_version}.
"""


def load_split(source: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) uint8 and class ids (N,) int64 of the original "train" or "test" split."""
    images, labels = read_split(source, split)
    return torch.from_numpy(images.copy()).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 1, H, W) uint8, each image flipped with probability ½ and moved by up to MAX_SHIFT pixels; black moves in."""
    count, _, height, width = images.shape
    flipped = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, [MAX_SHIFT] * 4)[:, 0]  # (B, H + 4, W + 4)
    offsets = torch.randint(2 * MAX_SHIFT + 1, (2, count, 1), generator=generator)
    rows = (offsets[0] + torch.arange(height))[:, :, None]  # (B, H, 1)
    columns = (offsets[1] + torch.arange(width))[:, None, :]  # (B, 1, W)
    return padded[torch.arange(count)[:, None, None], rows, columns].unsqueeze(1)


def batches(images: Tensor, labels: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, whole batches only: augmented pixels (B, 1, H, W) in [0, 1] and class ids (B,)."""
    order = torch.randperm(len(images), generator=generator)
    for chosen in order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
        yield augment(images[chosen], generator).float() / 255, labels[chosen]


def train(classifier: ReferenceClassifier, images: Tensor, labels: Tensor, epochs: int) -> None:
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.SGD(
        classifier.parameters(), lr=PEAK_LEARNING_RATE, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    steps_an_epoch = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, epochs * steps_an_epoch, cycle_momentum=False
    )
    classifier.train()
    for epoch in range(epochs):
        total = torch.zeros(())
        start = time.perf_counter()
        for pixels, targets in batches(images, labels, generator):
            loss = F.cross_entropy(classifier(pixels).logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        print(
            f"epoch {epoch + 1}/{epochs}: loss {total / steps_an_epoch:.4f}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    classifier.eval()


def save(classifier: ReferenceClassifier, accuracy: float, epochs: int, folder: Path) -> None:
    readme = README.format(
        parameters=classifier.num_parameters(),
        width=classifier.config.widths[-1],
        epochs=epochs,
        batch_size=BATCH_SIZE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        learning_rate=PEAK_LEARNING_RATE,
        max_shift=MAX_SHIFT,
        seed=SEED,
        accuracy=accuracy,
        torch_version=torch.__version__.split("+")[0],
    )
    with atomic_folder(folder) as beside:
        classifier.save_pretrained(beside)
        (beside / "README.md").write_text(readme, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the judge of the embedded Fashion-MNIST set.")
    parser.add_argument("--source", type=Path, default=DEBIAN_FOLDER, help="folder with the four *.gz files")
    parser.add_argument("--output", type=Path, default=CLASSIFIER_FOLDER)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)  # the initial weights; everything later draws from its own generator
    classifier = ReferenceClassifier(ReferenceClassifierConfig(id2label=dict(enumerate(CLASS_NAMES))))
    classifier.trunk.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU
    train(classifier, *load_split(arguments.source, "train"), arguments.epochs)
    images, labels = load_split(arguments.source, "test")
    accuracy = class_agreement(classifier.classify_images(images).logits, labels)
    classifier.trunk.to(memory_format=torch.contiguous_format)
    save(classifier, accuracy, arguments.epochs, arguments.output)
    print(f"{arguments.output}: {accuracy:.2%} of {len(images):,} test images named right")


if __name__ == "__main__":
    main()
