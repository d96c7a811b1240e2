"""What every built-in denoiser promises, tried on each of them."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.models import KontextDenoiser, MLPDenoiser

SHAPE, CONDITIONS, BATCH = (1, 8, 8), 5, 6


def build(kind: str) -> nn.Module:
    """A denoiser whose zero-initialised layers have been perturbed."""
    torch.manual_seed(0)
    model: nn.Module
    if kind == "mlp":
        model = MLPDenoiser(SHAPE, CONDITIONS, width=32, blocks=2)
    else:
        model = KontextDenoiser(SHAPE, CONDITIONS, dim=16, layers=2, heads=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(params=["mlp", "kontext"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sigma() -> Tensor:
    return torch.linspace(0.05, 1.0, BATCH)


@pytest.fixture
def context() -> dict[str, Tensor]:
    reference = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(2))
    has = torch.tensor([True, False, True, True, False, False])
    return {"condition": torch.arange(BATCH), "reference": reference, "has_reference": has}


def test_velocity_has_the_shape_and_dtype_of_x(model, x, sigma, context):
    assert model(x, sigma, context).shape == x.shape
    assert model(x, sigma, context).dtype == torch.float32
    half = model(x.bfloat16(), sigma, context)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), model(x, sigma, context), atol=0.2, rtol=0.1)


def test_a_model_in_bfloat16_runs(model, x, sigma, context):
    assert model.bfloat16()(x, sigma, context).isfinite().all()


@pytest.mark.parametrize("kind", [MLPDenoiser, KontextDenoiser])
def test_starts_at_zero_velocity(kind, x, sigma):
    velocity = kind(SHAPE, CONDITIONS)(x, sigma, {"condition": torch.zeros(BATCH, dtype=torch.long)})
    assert torch.equal(velocity, torch.zeros_like(x))


def test_other_shapes_than_square_single_channel_images():
    for model in (MLPDenoiser((3, 4, 6), 2), KontextDenoiser((3, 4, 6), 2, dim=8, heads=2)):
        x = torch.randn(2, 3, 4, 6)
        assert model(x, torch.rand(2), {"condition": torch.tensor([0, 2]), "reference": x}).shape == x.shape


def test_patches_come_back_where_they_were():
    model = KontextDenoiser((3, 4, 6), 1)
    image = torch.randn(2, 3, 4, 6)
    tokens = model.patches(image)
    torch.testing.assert_close(model.patches.inverse(tokens), image, rtol=0, atol=0)
    assert torch.equal(tokens[0, 1].view(3, 2, 2), image[0, :, :2, 2:4])


def test_gradient_reaches_every_parameter(model, x, sigma, context):
    model(x, sigma, context).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_output_depends_on_sigma_condition_and_x(model, x, sigma, context):
    base = model(x, sigma, context)
    assert (model(x, sigma * 0.9, context) - base).abs().amax() > 1e-3
    other = {**context, "condition": context["condition"].flip(0)}
    assert (model(x, sigma, other) - base).abs().amax() > 1e-3
    assert (model(x + 0.1, sigma, context) - base).abs().amax() > 1e-3


def test_no_reference_is_the_same_as_reference_none(model, x, sigma, context):
    omitted = {"condition": context["condition"]}
    assert torch.equal(model(x, sigma, omitted), model(x, sigma, {**omitted, "reference": None}))
    tensors = TensorDict({**omitted, "reference": None}, [BATCH])
    assert torch.equal(model(x, sigma, omitted), model(x, sigma, tensors))


def test_masked_reference_is_the_same_as_none(model, x, sigma, context):
    omitted = model(x, sigma, {"condition": context["condition"]})
    mixed, has = model(x, sigma, context), context["has_reference"]
    torch.testing.assert_close(mixed[~has], omitted[~has], atol=1e-6, rtol=0)
    assert (mixed[has] - omitted[has]).abs().flatten(1).amax(1).min() > 1e-3
    none = {**context, "has_reference": torch.zeros(BATCH, dtype=torch.bool)}
    torch.testing.assert_close(model(x, sigma, none), omitted, atol=1e-6, rtol=0)


def test_a_hidden_reference_may_hold_anything(model, x, sigma, context):
    has = context["has_reference"]
    hidden = context["reference"].clone()
    hidden[~has] = torch.nan
    torch.testing.assert_close(model(x, sigma, {**context, "reference": hidden}), model(x, sigma, context))


def test_reference_without_flag_means_every_row_has_one(model, x, sigma, context):
    every = {**context, "has_reference": torch.ones(BATCH, dtype=torch.bool)}
    bare = {key: every[key] for key in ("condition", "reference")}
    assert torch.equal(model(x, sigma, bare), model(x, sigma, every))


def test_changing_the_reference_changes_the_output(model, x, sigma, context):
    moved = {**context, "reference": context["reference"] + 0.5}
    change = (model(x, sigma, moved) - model(x, sigma, context)).abs().flatten(1).amax(1)
    assert torch.equal(change > 1e-3, context["has_reference"])


def test_rows_do_not_depend_on_each_other(model, x, sigma, context):
    batched = model(x, sigma, context)
    for i in range(BATCH):
        row = {key: value[i : i + 1] for key, value in context.items()}
        torch.testing.assert_close(model(x[i : i + 1], sigma[i : i + 1], row), batched[i : i + 1], atol=1e-5, rtol=0)
    order = torch.randperm(BATCH)
    shuffled = model(x[order], sigma[order], {key: value[order] for key, value in context.items()})
    torch.testing.assert_close(shuffled, batched[order], atol=1e-5, rtol=0)


def test_a_tensordict_is_as_good_as_a_dict(model, x, sigma, context):
    tensors = TensorDict(context, [BATCH]).lock_()
    assert torch.equal(model(x, sigma, tensors), model(x, sigma, context))
    null = model.unconditional(tensors)
    assert isinstance(null, TensorDict)
    assert torch.equal(model(x, sigma, null), model(x, sigma, model.unconditional(context)))
    assert torch.equal(tensors["condition"], torch.arange(BATCH))


def test_unconditional_keeps_the_reference_and_forgets_the_condition(model, x, sigma, context):
    null = model.unconditional(context)
    assert torch.equal(null["condition"], torch.full((BATCH,), CONDITIONS))
    assert null["reference"] is context["reference"]
    assert null["has_reference"] is context["has_reference"]
    other = {**context, "condition": context["condition"].flip(0)}
    assert torch.equal(model(x, sigma, null), model(x, sigma, model.unconditional(other)))


def test_errors_name_what_is_wrong(model, x, sigma, context):
    with pytest.raises(ValueError, match=r"\(6, 1, 4, 4\).*\(6, 1, 8, 8\)"):
        model(x, sigma, {**context, "reference": torch.zeros(BATCH, 1, 4, 4)})
    with pytest.raises(ValueError, match=r"x has size \(6, 1, 4, 4\).*\(1, 8, 8\)"):
        model(x[..., :4, :4], sigma, context)
    with pytest.raises(ValueError, match=r"condition spans \[0, 6\].*\[0, 5\]"):
        model(x, sigma, {**context, "condition": torch.tensor([0, 1, 2, 3, 4, 6])})
    with pytest.raises(ValueError, match=r"condition spans \[-1, 4\]"):
        model(x, sigma, {**context, "condition": torch.tensor([0, 1, 2, 3, 4, -1])})
    with pytest.raises(ValueError, match="needs 'condition'"):
        model(x, sigma, {})
    with pytest.raises(ValueError, match=r"has_reference has shape \(3,\)"):
        model(x, sigma, {**context, "has_reference": torch.ones(3, dtype=torch.bool)})


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="7x8 does not divide into patches of 2x2"):
        KontextDenoiser((1, 7, 8), 2)
    with pytest.raises(ValueError, match="dim 10 is not a multiple of heads 4"):
        KontextDenoiser((1, 8, 8), 2, dim=10)


@pytest.mark.parametrize("kind", ["mlp", "kontext"])
def test_learns_the_velocity_of_a_known_flow(kind):
    """Data is one point per class, copied from the reference for class 0: the velocity is (x - data) / sigma."""
    torch.manual_seed(0)
    shape = (1, 4, 4)
    model = MLPDenoiser(shape, 3, width=64) if kind == "mlp" else KontextDenoiser(shape, 3, dim=32, layers=2)
    points = torch.tensor([0.0, -1.0, 1.0]).view(3, 1, 1, 1).expand(3, *shape)
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(150):
        condition, reference = torch.randint(3, (64,)), torch.randn(64, 1, 1, 1).sign().expand(64, *shape)
        edit = condition == 0
        data = torch.where(edit.view(-1, 1, 1, 1), reference, points[condition])
        noise, sigma = torch.randn_like(data), torch.rand(64)
        x = data + sigma.view(-1, 1, 1, 1) * (noise - data)
        context = {"condition": condition, "reference": reference, "has_reference": edit}
        loss = (model(x, sigma, context) - (noise - data)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert sum(losses[-20:]) / 20 < 0.4
