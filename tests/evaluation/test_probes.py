import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from orchestrate.config.run import PROBES
from orchestrate.evaluation.probe import Features
from orchestrate.evaluation.probes.knn import Knn
from orchestrate.evaluation.probes.linear import Linear
from ssl_methods import plugins


def blobs(num_samples: int, seed: int, *, num_classes: int = 5, dim: int = 8, spread: float = 1.5) -> Features:
    """Gaussian classes that overlap, so that no score is 0 or 1."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    return Features(centres[labels] + spread * torch.randn(num_samples, dim, generator=generator), labels)


TRAIN, VAL = blobs(400, 0), blobs(1500, 1)  # more queries than one chunk holds


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_equals_scikit_learn_with_the_same_weights(k: int) -> None:
    def unit(features: Features) -> np.ndarray:
        return torch.nn.functional.normalize(features.values, dim=1).double().numpy()

    peer = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    peer.fit(unit(TRAIN), TRAIN.labels.numpy())
    expected = peer.score(unit(VAL), VAL.labels.numpy())
    assert Knn(k=k).score(TRAIN, VAL)["top1"] == pytest.approx(expected, abs=1e-12)


def test_knn_with_fewer_samples_than_neighbours_lets_all_vote() -> None:
    few = Features(TRAIN.values[:3], TRAIN.labels[:3])
    assert Knn(k=20).score(few, VAL) == Knn(k=3).score(few, VAL)


def test_knn_does_not_depend_on_the_scale_of_features() -> None:
    scaled = [Features(1000 * features.values, features.labels) for features in (TRAIN, VAL)]
    assert Knn().score(*scaled) == Knn().score(TRAIN, VAL)


def test_linear_probe_comes_near_the_optimum_of_scikit_learn() -> None:
    mean, deviation = TRAIN.values.mean(0), TRAIN.values.std(0)
    peer = LogisticRegression(C=np.inf, max_iter=1000)
    peer.fit(((TRAIN.values - mean) / deviation).numpy(), TRAIN.labels.numpy())
    expected = peer.score(((VAL.values - mean) / deviation).numpy(), VAL.labels.numpy())
    # SGD stops near the optimum; 1500 answers have a standard error of 0.012.
    assert Linear(epochs=100).score(TRAIN, VAL)["top1"] == pytest.approx(expected, abs=0.012)


def test_linear_probe_does_not_depend_on_scale_or_offset_of_features() -> None:
    moved = [Features(8.0 * features.values + 16.0, features.labels) for features in (TRAIN, VAL)]
    # Powers of two change no digits of the standardised features but those that the offset rounds away.
    assert Linear(epochs=5).score(*moved)["top1"] == pytest.approx(
        Linear(epochs=5).score(TRAIN, VAL)["top1"], abs=0.003
    )


def test_probes_do_not_touch_the_random_numbers_of_training() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for probe in (Knn(), Linear(epochs=2)):
        probe.score(TRAIN, VAL)
    assert torch.rand(1) == expected


@pytest.mark.parametrize("name", plugins.names(PROBES))
def test_key_names_every_parameter_that_changes_the_numbers(name: str) -> None:
    from orchestrate.config.section import plugin_section

    plugin = plugins.load(PROBES, name)
    for parameter, info in plugin_section(PROBES, name).model_fields.items():
        assert plugin(**{parameter: info.default * 2 + 1}).key != plugin().key, parameter
