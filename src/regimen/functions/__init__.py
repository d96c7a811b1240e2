"""Formulas that two or more folders share: pure functions, tensors in, tensors out."""

from regimen.functions.aggregate import aggregate_weights, masked_mean
from regimen.functions.categorical import row_uniform, sample_tokens, support_size, token_logprob
from regimen.functions.divergences import gaussian_kl, kl_estimate
from regimen.functions.flow import (
    flow_sde_coefficients,
    flow_sde_step,
    gaussian_logprob,
    interpolate,
    shifted_sigmas,
    velocity_target,
)
from regimen.functions.images import closeness, nearest_distance
from regimen.functions.pass_rate import pass_rate
from regimen.functions.trajectories import min_ade, min_fde, straight_on
from regimen.functions.transport import cosine_cost, euclidean_cost, sinkhorn, transport_rewards

__all__ = [
    "aggregate_weights",
    "closeness",
    "cosine_cost",
    "euclidean_cost",
    "flow_sde_coefficients",
    "flow_sde_step",
    "gaussian_kl",
    "gaussian_logprob",
    "interpolate",
    "kl_estimate",
    "masked_mean",
    "min_ade",
    "min_fde",
    "nearest_distance",
    "pass_rate",
    "row_uniform",
    "sample_tokens",
    "shifted_sigmas",
    "sinkhorn",
    "straight_on",
    "support_size",
    "token_logprob",
    "transport_rewards",
    "velocity_target",
]
