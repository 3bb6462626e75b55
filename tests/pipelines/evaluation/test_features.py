"""What images are compared by, against the libraries whose networks they go through and against means computed directly."""

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
    hash_of,
    inception_features,
    pooled_pixels,
)
from pipelines.evaluation.frechet import frechet_distance
from pipelines.evaluation.reference_classifier import ReferenceClassifier, ReferenceClassifierConfig
from training_harness.errors import UserError


def pictures(count: int, seed: int = 0, channels: int = 3, size: int = 20) -> Tensor:
    """Noise on grounds of many levels, so that no two are alike."""
    ground = torch.randint(200, (count, channels, 1, 1), generator=seeded(100 + seed))
    noise = torch.randint(56, (count, channels, size, size), generator=seeded(seed))
    return (ground + noise).to(torch.uint8)


def assert_near(found: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    """Equal but for the order of sums, which batch sizes change; measured by the largest entry."""
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * expected.abs().max().item())


# -- pixels and the judge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 16), (3, 13)])
def test_pooled_pixels_have_the_mean_of_each_of_64_cells(channels: int, size: int):
    images = pictures(2, 0, channels, size).numpy()
    bounds = [(i * size // 8, -(-(i + 1) * size // 8)) for i in range(8)]
    cells = [
        [images[:, c, top:bottom, left:right].mean((1, 2)) / 255 for top, bottom in bounds for left, right in bounds]
        for c in range(channels)
    ]
    expected = np.concatenate([np.stack(row, 1) for row in cells], 1)
    found = pooled_pixels(torch.from_numpy(images))
    assert list(found.present()) == ["features"]
    assert found.features.shape == (2, channels * 64)
    assert np.allclose(found.features.numpy(), expected, atol=1e-6)


def test_the_judges_features_come_with_its_logits():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ReferenceClassifierConfig(
            image_height=8, image_width=8, widths=(4, 6), id2label={0: "cat", 1: "dog", 2: "7"}
        )
        classifier = ReferenceClassifier(config).eval()
    images = pictures(5, channels=1, size=8)
    extractor = classifier_features(classifier)
    found, expected = extractor.extract(images), classifier.classify_images(images)
    assert list(found.present()) == ["features", "class_logits"]
    assert torch.equal(found.features, expected.features)
    assert found.class_logits is not None
    assert torch.equal(found.class_logits, expected.logits)
    assert extractor.weights == hash_of(classifier)


def test_a_name_gives_the_extractor_of_that_name_and_no_judge_is_an_error(tmp_path: Path):
    assert feature_extractor("pixels-8x8") is POOLED_PIXELS
    assert feature_extractor("efficientnet-lite0").name == "efficientnet-lite0"
    with pytest.raises(UserError, match="no classifier") as error:
        feature_extractor("classifier")
    error_message(error)


# -- EfficientNet -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def efficientnet() -> FeatureExtractor:
    return efficientnet_features()


def test_efficientnet_sees_each_image_by_itself(efficientnet: FeatureExtractor):
    images = pictures(3)
    found = efficientnet.extract(images)
    assert list(found.present()) == ["features"]
    assert found.features.shape == (3, 1280)
    for i in range(3):
        assert_near(efficientnet.extract(images[i : i + 1]).features, found.features[i : i + 1])
    assert (found.features[0] - found.features[1]).abs().max() > 0.1 * found.features.abs().max()


def test_efficientnet_sees_grey_as_three_equal_channels_and_no_alpha(efficientnet: FeatureExtractor):
    grey, colour = pictures(1, channels=1), pictures(1, 1, channels=4)
    assert_near(efficientnet.extract(grey).features, efficientnet.extract(grey.repeat(1, 3, 1, 1)).features, 1e-6)
    assert_near(efficientnet.extract(colour).features, efficientnet.extract(colour[:, :3]).features, 1e-6)
    assert efficientnet.weights == efficientnet_features().weights


# -- Inception --------------------------------------------------------------------------------------------------------


class Inception(NamedTuple):
    weights: Path
    network: library.FeatureExtractorInceptionV3  # with those weights, as the library runs it
    extractor: FeatureExtractor


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Inception:
    """The reference network's shape with random weights, which need no download; scaled to keep activations near 1."""
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


def test_inceptions_features_and_logits_are_the_librarys(inception: Inception):
    mixed: list[Tensor] = []
    handle = inception.network.Mixed_6d.register_forward_hook(lambda *given: mixed.append(given[2]))
    images = pictures(2)
    features_, logits = inception.network(images)
    handle.remove()
    found = inception.extractor.extract(images)
    assert list(found.present()) == ["features", "imagenet_logits", "spatial"]
    assert found.imagenet_logits is not None
    assert found.spatial is not None
    assert torch.equal(found.features, features_)
    assert torch.equal(found.imagenet_logits, logits)
    assert (found.features.shape, found.imagenet_logits.shape) == ((2, 2048), (2, 1008))
    # Of the block's concatenated channels the first are those of its 1 × 1 branch; places come first, then channels.
    assert found.spatial.shape == (2, 17 * 17 * 7)
    assert torch.equal(found.spatial.view(2, 17, 17, 7), mixed[0][:, :7].permute(0, 2, 3, 1))
    for rows in (*found.present().values(),):
        assert not torch.allclose(rows[0], rows[1], rtol=0.01)
    again = inception.extractor.extract(images[1:])  # and of a second call, not of the first
    assert again.spatial is not None
    assert_near(again.spatial, found.spatial[1:])


def test_inception_sees_grey_as_three_equal_channels(inception: Inception):
    grey = pictures(1, channels=1)
    assert torch.equal(
        inception.extractor.extract(grey).features, inception.extractor.extract(grey.repeat(1, 3, 1, 1)).features
    )


def test_the_distance_of_inceptions_features_is_the_librarys_fid(inception: Inception):
    # Five images in three features: the library's eigenvalues of a singular product would be noise.
    a, b = (inception.extractor.extract(pictures(5, seed)).features[:, :3] for seed in (1, 2))
    statistics = (fid_features_to_statistics(part.double()) for part in (a, b))
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert expected > 0
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch) -> Path:
    """Where the weights are looked for when none are named; nothing lies there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints" / library.URL_INCEPTION_V3.rpartition("/")[2]


def test_inceptions_weights_are_fetched_once_and_checked_by_their_hash(
    inception: Inception, fetched: Path, monkeypatch
):
    calls = []

    def download(url: str, place: str, hash_prefix: str) -> None:
        calls.append((url, place, hash_prefix))
        Path(place).symlink_to(inception.weights)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert [inception_features().weights for _ in range(2)] == [inception.extractor.weights] * 2
    assert calls == [(library.URL_INCEPTION_V3, str(fetched), "6726825d")]


def test_missing_weights_are_one_line_that_names_their_place_and_their_source(fetched: Path, monkeypatch):
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError) as error:
        feature_extractor("inception")
    message = error_message(error)
    assert str(fetched) in message
    assert library.URL_INCEPTION_V3 in message
    assert not fetched.exists()


class Harmful:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.place),)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("form", [saved, partial(pickle.dumps, protocol=2)])
def test_code_in_a_weights_file_is_refused_and_not_run(form, tmp_path: Path):
    weights, made = tmp_path / "weights.pth", tmp_path / "made"
    weights.write_bytes(form({"fc.weight": Harmful(made)}))
    with pytest.raises(UserError) as error:
        inception_features(weights=weights)
    assert str(weights) in error_message(error)
    assert not made.exists()
    pickle.loads(pickle.dumps(Harmful(made)))  # or there was nothing to run
    assert made.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>not found</html>", saved({"fc.weight": torch.zeros(2)}), saved(torch.zeros(2))[:-30], saved([1])],
)
def test_a_file_that_holds_no_weights_of_inception_is_one_line_that_names_it(content: bytes, tmp_path: Path):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(content)
    with pytest.raises(UserError) as error:
        inception_features(weights=weights)
    assert str(weights) in error_message(error)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
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
def test_the_hash_changes_with_any_weight_or_buffer_and_with_nothing_else(name: str):
    network, same = small_network(), small_network().eval().requires_grad_(False)
    assert hash_of(network) == hash_of(same)
    assert len(hash_of(network)) == 16
    with torch.no_grad():
        same.state_dict()[name].view(-1)[1] += 1e-3
    assert hash_of(network) != hash_of(same)


def test_the_hash_does_not_confuse_layers_of_equal_shapes():
    one, other = nn.ModuleDict(), nn.ModuleDict()
    one["a"], other["b"] = (nn.Linear(2, 2) for _ in range(2))
    other["b"].load_state_dict(one["a"].state_dict())
    assert hash_of(one) != hash_of(other)


def test_inceptions_hash_is_that_of_its_weights(inception: Inception):
    assert inception.extractor.weights == hash_of(inception.network)
