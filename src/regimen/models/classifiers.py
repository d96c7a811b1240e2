"""scikit-learn classifiers as functions of image tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ImageClassifier:
    """A scikit-learn classifier, fitted on images `[N, ...]` and labels `[N]`, that answers with tensors."""

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator

    def fit(self, images: Tensor, labels: Tensor) -> ImageClassifier:
        """Fit the estimator; returns itself."""
        self.estimator.fit(images.flatten(1).cpu().numpy(), labels.cpu().numpy())
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Class probabilities `[B, K]`; `ValueError` if the estimator has none (use `predict`)."""
        if not hasattr(self.estimator, "predict_proba"):
            kind = type(self.estimator).__name__
            raise ValueError(f"ImageClassifier: {kind} gives no probabilities; use predict, or another estimator")
        probabilities = self.estimator.predict_proba(images.flatten(1).cpu().numpy())
        return torch.from_numpy(probabilities).to(images.device, torch.float32)

    def predict(self, images: Tensor) -> Tensor:
        """Most likely classes, int64 `[B]`."""
        return torch.from_numpy(self.estimator.predict(images.flatten(1).cpu().numpy())).to(images.device)
