"""Fit L(N, D) = E + A/N^alpha + B/D^beta to training runs, and resample the runs to see how far the fit is
known.

The objective is Hoffmann et al. 2022 (arXiv:2203.15556, section 3.3, equation 3): the sum over runs of the
Huber loss (delta 1e-3) of log L(N, D) - log(loss), with A, B and E as exponentials so that the prediction is
a log-sum-exp. It is minimised by iteratively reweighted Levenberg steps, for all resamples at once as one
array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HUBER_DELTA = 1e-3
"""Hoffmann et al. 2022, section 3.3."""
START = (np.log(482.0), np.log(2085.0), np.log(1.82), 0.348, 0.366)
"""log A, log B, log E, alpha, beta near which the search begins: Besiroglu et al. 2024, arXiv:2404.10102."""
MAX_STEPS = 300
INITIAL_DAMPING = 1e-3


@dataclass(frozen=True, kw_only=True)
class ParametricFit:
    """Coefficients as arrays of one shape: () for one fit, (num_resamples,) for a bootstrap."""

    entropy: np.ndarray
    """E, nats per token."""
    params_scale: np.ndarray
    """A."""
    tokens_scale: np.ndarray
    """B."""
    params_exponent: np.ndarray
    """alpha."""
    tokens_exponent: np.ndarray
    """beta."""


def fit(num_params: np.ndarray, num_tokens: np.ndarray, loss: np.ndarray) -> ParametricFit:
    """Return the best coefficients for runs given as 1-D arrays; `loss` in nats per token."""
    weights = np.ones((1, loss.size))
    found = _minimise(np.log(num_params), np.log(num_tokens), np.log(loss), weights)
    return _as_fit(found[0])


def bootstrap(
    num_params: np.ndarray,
    num_tokens: np.ndarray,
    loss: np.ndarray,
    *,
    num_resamples: int,
    generator: np.random.Generator,
) -> ParametricFit:
    """Fit `num_resamples` draws, with replacement, of as many runs as there are. Arrays have shape
    (num_resamples,)."""
    picks = generator.integers(0, loss.size, size=(num_resamples, loss.size))
    weights = np.zeros((num_resamples, loss.size))
    np.add.at(weights, (np.arange(num_resamples)[:, None], picks), 1.0)
    return _as_fit(_minimise(np.log(num_params), np.log(num_tokens), np.log(loss), weights).T)


def _as_fit(theta: np.ndarray) -> ParametricFit:
    log_a, log_b, log_e, alpha, beta = theta
    return ParametricFit(
        entropy=np.exp(log_e),
        params_scale=np.exp(log_a),
        tokens_scale=np.exp(log_b),
        params_exponent=alpha,
        tokens_exponent=beta,
    )


def _predict(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log L, shape (resamples, runs), and each term's share of L, shape (3, resamples, runs)."""
    log_a, log_b, log_e, alpha, beta = (theta[:, i, None] for i in range(5))
    terms = np.stack(np.broadcast_arrays(log_a - alpha * log_n, log_b - beta * log_d, log_e + 0 * log_n))
    peak = terms.max(axis=0)
    shares = np.exp(terms - peak)
    total = shares.sum(axis=0)
    return peak + np.log(total), shares / total


def _objective(residual: np.ndarray, weights: np.ndarray) -> np.ndarray:
    size = np.abs(residual)
    huber = np.where(size <= HUBER_DELTA, 0.5 * size**2, HUBER_DELTA * (size - 0.5 * HUBER_DELTA))
    total: np.ndarray = (weights * huber).sum(axis=1)
    return total


def _minimise(log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return coefficients of shape (resamples, 5); `weights` has shape (resamples, runs)."""
    theta = np.tile(np.array(START), (len(weights), 1))
    damping = np.full(len(weights), INITIAL_DAMPING)
    log_predicted, shares = _predict(theta, log_n, log_d)
    best = _objective(log_predicted - log_loss, weights)
    for _ in range(MAX_STEPS):
        residual = log_predicted - log_loss
        pull = weights * np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(residual), 1e-300))
        slopes = np.stack([shares[0], shares[1], shares[2], -shares[0] * log_n, -shares[1] * log_d], axis=-1)
        curvature = np.einsum("rni,rn,rnj->rij", slopes, pull, slopes)
        gradient = np.einsum("rni,rn,rn->ri", slopes, pull, residual)
        diagonal = np.einsum("rii->ri", curvature)
        damped = curvature + damping[:, None, None] * np.eye(5) * diagonal[:, :, None]
        trial = theta - np.linalg.solve(damped, gradient[..., None])[..., 0]
        trial_log_predicted, trial_shares = _predict(trial, log_n, log_d)
        value = _objective(trial_log_predicted - log_loss, weights)
        better = value < best
        theta = np.where(better[:, None], trial, theta)
        log_predicted = np.where(better[:, None], trial_log_predicted, log_predicted)
        shares = np.where(better[None, :, None], trial_shares, shares)
        best = np.where(better, value, best)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e6)
    return theta
