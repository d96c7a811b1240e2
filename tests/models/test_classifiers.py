"""scikit-learn classifiers as functions of image tensors."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor

from regimen.models.classifiers import ImageClassifier


def data(count: int = 60) -> tuple[Tensor, Tensor]:
    """Images that are bright above (0), below (1) or nowhere (2)."""
    labels = torch.arange(count) % 3
    images = 0.1 * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images[labels == 0, :, :2] += 1
    images[labels == 1, :, 2:] += 1
    return images, labels


def test_probabilities_and_classes_are_tensors() -> None:
    images, labels = data()
    classifier = ImageClassifier(LogisticRegression())
    assert classifier.fit(images, labels) is classifier
    chances = classifier(images)
    assert chances.shape == (60, 3)
    assert chances.dtype == torch.float32
    torch.testing.assert_close(chances.sum(1), torch.ones(60))
    found = classifier.predict(images)
    assert found.dtype == torch.int64
    assert torch.equal(found, labels)
    assert torch.equal(chances.argmax(1), found)


def test_images_of_any_layout_are_read_alike() -> None:
    images, labels = data()
    flat = ImageClassifier(LogisticRegression()).fit(images.flatten(1), labels)
    classifier = ImageClassifier(LogisticRegression()).fit(images, labels)
    turned = images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert torch.equal(classifier(turned), flat(images))
    assert torch.equal(classifier(images), flat(images))


def test_a_classifier_without_probabilities_says_so() -> None:
    images, labels = data()
    classifier = ImageClassifier(SVC()).fit(images, labels)
    assert torch.equal(classifier.predict(images), labels)
    with pytest.raises(ValueError, match="SVC gives no probabilities; use predict, or another estimator"):
        classifier(images)
