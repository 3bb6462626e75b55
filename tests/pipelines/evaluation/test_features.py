"""Feature extractors equal the networks of the reference libraries, and pooled pixels equal means computed directly."""

import io
import os
import pickle
import urllib.error
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from small_parts import error_message
from tiny_models import seeded
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3 as library
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from pipelines.evaluation import features
from pipelines.evaluation.features import (
    POOLED_PIXELS,
    FeatureExtractor,
    classifier_features,
    efficientnet_features,
    feature_extractor,
    hash_weights,
    inception_features,
    pool_pixels,
)
from pipelines.evaluation.frechet import frechet_distance
from pipelines.evaluation.reference_classifier import ReferenceClassifier, ReferenceClassifierConfig
from training_harness.errors import UserError


def random_images(count: int, seed: int = 0, channels: int = 3, size: int = 20) -> Tensor:
    """Create different images: noise on a random level for each channel."""
    level = torch.randint(200, (count, channels, 1, 1), generator=seeded(100 + seed))
    noise = torch.randint(56, (count, channels, size, size), generator=seeded(seed))
    return (level + noise).to(torch.uint8)


def assert_near(actual: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    """Check equality relative to the largest entry: the order of sums depends on the batch size."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * expected.abs().max().item())


# -- pixels and the reference classifier -------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 16), (3, 13)])
def test_pooled_pixels_are_the_means_of_64_cells(channels: int, size: int):
    images = random_images(2, 0, channels, size).numpy()
    bounds = [(i * size // 8, -(-(i + 1) * size // 8)) for i in range(8)]
    cells = [
        [images[:, c, top:bottom, left:right].mean((1, 2)) / 255 for top, bottom in bounds for left, right in bounds]
        for c in range(channels)
    ]
    expected = np.concatenate([np.stack(row, 1) for row in cells], 1)
    output = pool_pixels(torch.from_numpy(images))
    assert list(output.to_dict()) == ["features"]
    assert output.features.shape == (2, channels * 64)
    assert np.allclose(output.features.numpy(), expected, atol=1e-6)


def test_the_features_of_the_classifier_include_its_logits():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ReferenceClassifierConfig(
            image_height=8, image_width=8, widths=(4, 6), id2label={0: "cat", 1: "dog", 2: "7"}
        )
        classifier = ReferenceClassifier(config).eval()
    images = random_images(5, channels=1, size=8)
    extractor = classifier_features(classifier)
    output, expected = extractor.extract(images), classifier.classify_images(images)
    assert list(output.to_dict()) == ["features", "class_logits"]
    assert torch.equal(output.features, expected.features)
    assert output.class_logits is not None
    assert torch.equal(output.class_logits, expected.logits)
    assert extractor.weights == hash_weights(classifier)


def test_an_extractor_is_created_by_its_name_and_a_missing_classifier_is_an_error(tmp_path: Path):
    assert feature_extractor("pixels-8x8") is POOLED_PIXELS
    assert feature_extractor("efficientnet-lite0").name == "efficientnet-lite0"
    with pytest.raises(UserError, match="no classifier") as error:
        feature_extractor("classifier")
    error_message(error)


# -- EfficientNet -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def efficientnet() -> FeatureExtractor:
    return efficientnet_features()


def test_efficientnet_processes_each_image_independently(efficientnet: FeatureExtractor):
    images = random_images(3)
    output = efficientnet.extract(images)
    assert list(output.to_dict()) == ["features"]
    assert output.features.shape == (3, 1280)
    for i in range(3):
        assert_near(efficientnet.extract(images[i : i + 1]).features, output.features[i : i + 1])
    assert (output.features[0] - output.features[1]).abs().max() > 0.1 * output.features.abs().max()


def test_efficientnet_treats_grey_as_three_equal_channels_and_ignores_alpha(efficientnet: FeatureExtractor):
    grey, colour = random_images(1, channels=1), random_images(1, 1, channels=4)
    assert_near(efficientnet.extract(grey).features, efficientnet.extract(grey.repeat(1, 3, 1, 1)).features, 1e-6)
    assert_near(efficientnet.extract(colour).features, efficientnet.extract(colour[:, :3]).features, 1e-6)
    assert efficientnet.weights == efficientnet_features().weights


# -- Inception --------------------------------------------------------------------------------------------------------


class Inception(NamedTuple):
    weights: Path
    network: library.FeatureExtractorInceptionV3  # the library's network with these weights
    extractor: FeatureExtractor


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Inception:
    """Create the reference network with random weights, which need no download and keep activations near 1."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.BatchNorm2d | nn.Linear):
                nn.init.uniform_(module.bias, -0.2, 0.2)
    weights = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), weights)
    return Inception(weights, network, inception_features(weights=weights))


def test_inception_features_and_logits_equal_those_of_torch_fidelity(inception: Inception):
    block_outputs: list[Tensor] = []
    handle = inception.network.Mixed_6d.register_forward_hook(
        lambda module, inputs, output: block_outputs.append(output)
    )
    images = random_images(2)
    expected_features, expected_logits = inception.network(images)
    handle.remove()
    output = inception.extractor.extract(images)
    assert list(output.to_dict()) == ["features", "imagenet_logits", "spatial"]
    assert output.imagenet_logits is not None
    assert output.spatial is not None
    assert torch.equal(output.features, expected_features)
    assert torch.equal(output.imagenet_logits, expected_logits)
    assert (output.features.shape, output.imagenet_logits.shape) == ((2, 2048), (2, 1008))
    # The first channels of the block's output come from its 1 × 1 branch. Positions come first, then channels.
    assert output.spatial.shape == (2, 17 * 17 * 7)
    assert torch.equal(output.spatial.view(2, 17, 17, 7), block_outputs[0][:, :7].permute(0, 2, 3, 1))
    for rows in (*output.to_dict().values(),):
        assert not torch.allclose(rows[0], rows[1], rtol=0.01)
    second_output = inception.extractor.extract(images[1:])  # not the spatial activations of the first call
    assert second_output.spatial is not None
    assert_near(second_output.spatial, output.spatial[1:])


def test_inception_treats_grey_as_three_equal_channels(inception: Inception):
    grey = random_images(1, channels=1)
    assert torch.equal(
        inception.extractor.extract(grey).features, inception.extractor.extract(grey.repeat(1, 3, 1, 1)).features
    )


def test_the_distance_of_inception_features_equals_the_fid_of_torch_fidelity(inception: Inception):
    # Five images and three features: with a singular product, the library's eigenvalues would be noise.
    a, b = (inception.extractor.extract(random_images(5, seed)).features[:, :3] for seed in (1, 2))
    statistics = (fid_features_to_statistics(features.double()) for features in (a, b))
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert expected > 0
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def default_path(tmp_path: Path, monkeypatch) -> Path:
    """The default path of the weights, without a file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints" / library.URL_INCEPTION_V3.rpartition("/")[2]


def test_inception_weights_are_downloaded_once_and_checked_by_their_hash(
    inception: Inception, default_path: Path, monkeypatch
):
    calls = []

    def download(url: str, path: str, hash_prefix: str) -> None:
        calls.append((url, path, hash_prefix))
        Path(path).symlink_to(inception.weights)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert [inception_features().weights for _ in range(2)] == [inception.extractor.weights] * 2
    assert calls == [(library.URL_INCEPTION_V3, str(default_path), "6726825d")]


def test_missing_weights_are_a_one_line_error_with_path_and_url(default_path: Path, monkeypatch):
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError) as error:
        feature_extractor("inception")
    message = error_message(error)
    assert str(default_path) in message
    assert library.URL_INCEPTION_V3 in message
    assert not default_path.exists()


class Harmful:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def torch_saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("serialize", [torch_saved, partial(pickle.dumps, protocol=2)])
def test_code_in_a_weights_file_is_an_error_and_is_not_run(serialize, tmp_path: Path):
    weights, folder = tmp_path / "weights.pth", tmp_path / "made"
    weights.write_bytes(serialize({"fc.weight": Harmful(folder)}))
    with pytest.raises(UserError) as error:
        inception_features(weights=weights)
    assert str(weights) in error_message(error)
    assert not folder.exists()
    pickle.loads(pickle.dumps(Harmful(folder)))  # the object does run code if it is unpickled
    assert folder.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>not output</html>",
        torch_saved({"fc.weight": torch.zeros(2)}),
        torch_saved(torch.zeros(2))[:-30],
        torch_saved([1]),
    ],
)
def test_a_file_without_inception_weights_is_a_one_line_error_with_its_path(content: bytes, tmp_path: Path):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(content)
    with pytest.raises(UserError) as error:
        inception_features(weights=weights)
    assert str(weights) in error_message(error)


def test_without_torch_fidelity_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'run: pip install "latentloom\[eval\]"'):
        feature_extractor("inception")
    assert not features.has_efficientnet()


# -- the hash ---------------------------------------------------------------------------------------------------------


def small_network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3))


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.running_var"])
def test_the_hash_depends_only_on_weights_and_buffers(name: str):
    network, copy = small_network(), small_network().eval().requires_grad_(False)
    assert hash_weights(network) == hash_weights(copy)
    assert len(hash_weights(network)) == 16
    with torch.no_grad():
        copy.state_dict()[name].view(-1)[1] += 1e-3
    assert hash_weights(network) != hash_weights(copy)


def test_the_hash_depends_on_the_names_of_layers():
    first_network, second_network = nn.ModuleDict(), nn.ModuleDict()
    first_network["a"], second_network["b"] = (nn.Linear(2, 2) for _ in range(2))
    second_network["b"].load_state_dict(first_network["a"].state_dict())
    assert hash_weights(first_network) != hash_weights(second_network)


def test_the_hash_of_inception_is_the_hash_of_its_weights(inception: Inception):
    assert inception.extractor.weights == hash_weights(inception.network)
