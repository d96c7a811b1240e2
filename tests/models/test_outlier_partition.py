"""The neural twin of R-MTGB's partition: the same gradient, and outliers found."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from regimen.estimators import minority_score, theta_gradient
from regimen.models import OutlierPartition


def build(tasks: int, width: int = 2, outputs: int = 1) -> OutlierPartition:
    torch.manual_seed(0)
    return OutlierPartition(partial(nn.Linear, width, outputs), tasks)


def test_the_gradient_of_theta_is_that_of_the_boosted_partition() -> None:
    model, hidden, task = build(3, outputs=2).double(), torch.randn(12, 2).double(), torch.arange(12) % 3
    target = torch.randn(12, 2).double()
    outputs = model(hidden, task)
    (0.5 * (target - outputs).square().sum()).backward()
    parts = [head(hidden).detach().numpy() for head in (model.outlier, model.non_outlier)]
    residual = (target - outputs).detach().numpy()
    expected = theta_gradient(model.theta.detach().numpy(), residual, *parts, task.numpy())
    assert model.theta.grad is not None
    np.testing.assert_allclose(model.theta.grad.numpy(), expected)


def test_outputs_may_have_any_shape() -> None:
    model = OutlierPartition(lambda: nn.Unflatten(1, (2, 1)), 4)
    assert model(torch.randn(5, 2), torch.tensor([0, 1, 2, 3, 0])).shape == (5, 2, 1)


def test_scores_are_those_of_the_fewer() -> None:
    model = build(4)
    for theta in ([2.0, 3.0, -2.0, 1.0], [-2.0, -3.0, 2.0, -1.0], [1.0, 1.0, -1.0, -1.0]):
        model.theta.data = torch.tensor(theta)
        np.testing.assert_allclose(model.outlier_score, minority_score(np.array(theta)), rtol=1e-6)


def test_the_task_that_is_the_opposite_of_the_others_is_isolated_in_seconds() -> None:
    model, rng = build(5), torch.Generator().manual_seed(1)
    hidden, task = torch.randn(500, 2, generator=rng), torch.arange(500) % 5
    target = 2 * hidden[:, :1] * torch.where(task == 3, -1, 1)[:, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (model(hidden, task) - target).square().mean().backward()
        optimizer.step()
    assert (model.outlier_score > 0.5).tolist() == [False, False, False, True, False]
    assert (model(hidden, task) - target).square().mean() < 0.1


def test_no_task_is_an_error() -> None:
    with pytest.raises(ValueError, match="tasks is 0, expected at least 1"):
        build(0)
