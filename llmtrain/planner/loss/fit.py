"""Fit L(N, D) = E + A/N^alpha + B/D^beta to training runs, and resample the runs to see how far the fit is
known.

The objective is Hoffmann et al. 2022 (arXiv:2203.15556, section 3.3, equation 3): the sum over runs of the
Huber loss of log L(N, D) - log(loss). The search is by variable projection: on a grid of (alpha, beta) the
other three coefficients solve a non-negative least-squares problem, so that the search has two dimensions and
needs no start; the best point of the grid is then polished by damped Newton steps on the objective itself, in
log A, log B, log E, alpha and beta. All resamples of a bootstrap are fitted at once, as one array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HUBER_DELTA = 1e-3
"""Hoffmann et al. 2022, section 3.3. On losses with far more noise than 0.1% it is nearly the absolute
error."""
PRIOR_WIDTH = 0.04
"""Standard deviation of a prior on alpha and on beta. Assumed: the exponents of published fits on text lie
between 0.25 and 0.37 (docs/planner_laws.md)."""
EXPONENT_BOUNDS = (0.01, 3.0)
LEAST_LOG = -14.0
"""Lower end of log A, log B and log E: a coefficient that the runs want at 0. A and B are those of N and D in
units of the runs' geometric means."""
GRID = np.geomspace(0.05, 1.6, 14)
"""Of alpha and of beta."""
RIDGE = 1e-13
MAX_STEPS = 400
PATIENCE = 12
"""Steps in a row with less gain than TOLERANCE, relative, after which a fit has converged."""
TOLERANCE = 1e-11
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

    def loss(self, num_params: np.ndarray | float, num_tokens: np.ndarray | float) -> np.ndarray:
        """Nats per token, for sizes that broadcast with the coefficients."""
        params_term = self.params_scale * np.asarray(num_params, dtype=float) ** -self.params_exponent
        tokens_term = self.tokens_scale * np.asarray(num_tokens, dtype=float) ** -self.tokens_exponent
        found: np.ndarray = self.entropy + params_term + tokens_term
        return found


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is assumed about the exponents."""

    name: str
    is_tied: bool = False
    """alpha = beta."""
    exponent_prior: float | None = None
    """Mean of a normal prior, PRIOR_WIDTH wide, on alpha and on beta."""


FREE = Variant(name="free")
TIED = Variant(name="tied", is_tied=True)
VARIANTS = (
    FREE,
    TIED,
    Variant(name="prior_0.30", exponent_prior=0.30),
    Variant(name="prior_0.34", exponent_prior=0.34),
)
"""0.30 and 0.34: near MiniCPM's (arXiv:2404.06395) and Gadre's (arXiv:2403.08540) exponents, and near
Hoffmann's and Besiroglu's (arXiv:2404.10102)."""


def fit(
    num_params: np.ndarray,
    num_tokens: np.ndarray,
    loss: np.ndarray,
    *,
    variant: Variant = FREE,
    huber_delta: float = HUBER_DELTA,
    noise: float = 0.0,
) -> ParametricFit:
    """Return the best coefficients for runs given as 1-D arrays; `loss` in nats per token.

    Args:
        huber_delta: residuals of log loss beyond it count linearly; infinity is least squares.
        noise: standard deviation of log loss, against which a variant's prior is weighed.
    """
    weights = np.ones((1, loss.size))
    found = _minimise(
        num_params, num_tokens, loss, weights, variant=variant, huber_delta=huber_delta, noise=noise
    )
    return _as_fit(found[0])


def bootstrap(
    num_params: np.ndarray,
    num_tokens: np.ndarray,
    loss: np.ndarray,
    *,
    num_resamples: int,
    generator: np.random.Generator,
    variant: Variant = FREE,
    huber_delta: float = HUBER_DELTA,
    noise: float = 0.0,
) -> ParametricFit:
    """Fit `num_resamples` draws, with replacement, of as many runs as there are. Arrays have shape
    (num_resamples,)."""
    picks = generator.integers(0, loss.size, size=(num_resamples, loss.size))
    weights = np.zeros((num_resamples, loss.size))
    np.add.at(weights, (np.arange(num_resamples)[:, None], picks), 1.0)
    found = _minimise(
        num_params, num_tokens, loss, weights, variant=variant, huber_delta=huber_delta, noise=noise
    )
    return _as_fit(found.T)


def non_negative_least_squares(
    products: np.ndarray, targets: np.ndarray, total: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return x >= 0 that minimises |X x - y|^2, and the minimum, for many problems in three unknowns.

    Every set of unknowns that may be positive is tried: seven small systems, exactly solved, and none.

    Args:
        products: X'X, shape (..., 3, 3).
        targets: X'y, shape (..., 3).
        total: y'y, shape (...).
    """
    least = np.broadcast_to(total, targets.shape[:-1])
    best = np.zeros(targets.shape)
    for positive in ([0, 1, 2], [0, 1], [0, 2], [1, 2], [0], [1], [2]):
        part = products[..., positive, :][..., positive]
        right = targets[..., positive]
        trace = np.einsum("...ii->...", part)
        ridge = RIDGE * trace[..., None, None] * np.eye(len(positive))
        found = np.linalg.solve(part + ridge, right[..., None])[..., 0]
        cost = np.where((found >= 0).all(axis=-1), total - (found * right).sum(axis=-1), np.inf)
        better = cost < least
        least = np.where(better, cost, least)
        whole = np.zeros(targets.shape)
        whole[..., positive] = found
        best = np.where(better[..., None], whole, best)
    return best, least


def _as_fit(theta: np.ndarray) -> ParametricFit:
    log_a, log_b, log_e, alpha, beta = theta
    return ParametricFit(
        entropy=np.exp(log_e),
        params_scale=np.exp(log_a),
        tokens_scale=np.exp(log_b),
        params_exponent=alpha,
        tokens_exponent=beta,
    )


def _minimise(
    num_params: np.ndarray,
    num_tokens: np.ndarray,
    loss: np.ndarray,
    weights: np.ndarray,
    *,
    variant: Variant,
    huber_delta: float,
    noise: float,
) -> np.ndarray:
    """Return log A, log B, log E, alpha, beta of shape (resamples, 5); `weights` has shape (resamples,
    runs)."""
    log_n, log_d = np.log(num_params), np.log(num_tokens)
    middle_n, middle_d = log_n.mean(), log_d.mean()
    log_n, log_d = log_n - middle_n, log_d - middle_d  # else A and alpha move together over many decades
    start = _grid_start(log_n, log_d, loss, weights, variant=variant, noise=noise)
    problem = _Problem(
        log_n=log_n,
        log_d=log_d,
        log_loss=np.log(loss),
        huber_delta=huber_delta,
        prior=variant.exponent_prior,
        prior_weight=0.0 if variant.exponent_prior is None else (noise / PRIOR_WIDTH) ** 2,
        basis=_TIED_BASIS if variant.is_tied else np.eye(5),
    )
    theta = _polish(problem, start, weights)
    theta[:, 0] += theta[:, 3] * middle_n
    theta[:, 1] += theta[:, 4] * middle_d
    return theta


_TIED_BASIS = np.vstack([np.eye(4), np.eye(4)[3]])
"""From four coefficients to five: beta is alpha."""


def _grid_start(
    log_n: np.ndarray,
    log_d: np.ndarray,
    loss: np.ndarray,
    weights: np.ndarray,
    *,
    variant: Variant,
    noise: float,
) -> np.ndarray:
    """The best point of GRID x GRID with its own best E, A, B, by the squares of L / loss - 1."""
    rows, columns = np.indices((len(GRID), len(GRID))).reshape(2, -1)
    if variant.is_tied:
        rows = columns = np.arange(len(GRID))
    alpha, beta = GRID[rows], GRID[columns]
    params_terms = np.exp(-np.outer(GRID, log_n)) / loss
    tokens_terms = np.exp(-np.outer(GRID, log_d)) / loss
    constant = np.broadcast_to(1 / loss, params_terms[rows].shape)
    design = np.stack([constant, params_terms[rows], tokens_terms[columns]])  # (3, points, runs)
    products = np.empty((len(weights), len(alpha), 3, 3))
    for i in range(3):
        for j in range(i, 3):
            products[..., i, j] = products[..., j, i] = weights @ (design[i] * design[j]).T
    targets = np.stack([weights @ column.T for column in design], axis=-1)
    found, cost = non_negative_least_squares(products, targets, weights.sum(axis=1)[:, None])
    if variant.exponent_prior is not None:
        missed = (alpha - variant.exponent_prior) ** 2 + (beta - variant.exponent_prior) ** 2
        cost = cost + (noise / PRIOR_WIDTH) ** 2 * missed
    best = np.argmin(cost, axis=1)
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log(found[np.arange(len(weights)), best]), LEAST_LOG)
    return np.stack([logs[:, 1], logs[:, 2], logs[:, 0], alpha[best], beta[best]], axis=1)


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """What all resamples share."""

    log_n: np.ndarray
    log_d: np.ndarray
    log_loss: np.ndarray
    huber_delta: float
    prior: float | None
    prior_weight: float
    basis: np.ndarray
    """(5, number of free coefficients)."""

    def predict(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log L, shape (resamples, runs), and each term's share of L, shape (3, resamples, runs)."""
        log_a, log_b, log_e, alpha, beta = (theta[:, i, None] for i in range(5))
        terms = np.stack(
            np.broadcast_arrays(log_a - alpha * self.log_n, log_b - beta * self.log_d, log_e + 0 * self.log_n)
        )
        peak = terms.max(axis=0)
        shares = np.exp(terms - peak)
        total = shares.sum(axis=0)
        return peak + np.log(total), shares / total

    def objective(self, theta: np.ndarray, residual: np.ndarray, weights: np.ndarray) -> np.ndarray:
        size = np.abs(residual)
        inside = np.minimum(size, self.huber_delta)
        value: np.ndarray = (weights * inside * (size - 0.5 * inside)).sum(axis=1)
        if self.prior is not None:
            value = value + 0.5 * self.prior_weight * ((theta[:, 3:] - self.prior) ** 2).sum(axis=1)
        return value

    def newton(
        self, theta: np.ndarray, residual: np.ndarray, shares: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return gradient and curvature in the free coefficients, the Huber loss as reweighted squares."""
        slopes = np.stack(
            [shares[0], shares[1], shares[2], -shares[0] * self.log_n, -shares[1] * self.log_d], axis=-1
        )
        slopes = slopes @ self.basis
        pull = weights * np.minimum(1.0, self.huber_delta / np.maximum(np.abs(residual), 1e-300))
        gradient = (slopes * (pull * residual)[..., None]).sum(axis=1)
        curvature = np.swapaxes(slopes * pull[..., None], 1, 2) @ slopes
        if self.prior is not None:
            toward = self.basis[3:]
            gradient = gradient + self.prior_weight * (theta[:, 3:] - self.prior) @ toward
            curvature = curvature + self.prior_weight * toward.T @ toward
        return gradient, curvature


def _polish(problem: _Problem, start: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Damped steps from `start`, each resample until it has converged."""
    result, still = start.copy(), np.arange(len(start))
    theta = start
    log_predicted, shares = problem.predict(theta)
    best = problem.objective(theta, log_predicted - problem.log_loss, weights)
    damping, stale = np.full(len(theta), INITIAL_DAMPING), np.zeros(len(theta), dtype=int)
    identity = np.eye(problem.basis.shape[1])
    for _ in range(MAX_STEPS):
        gradient, curvature = problem.newton(theta, log_predicted - problem.log_loss, shares, weights)
        diagonal = np.einsum("rii->ri", curvature)
        added = damping[:, None] * diagonal + 1e-14 * diagonal.max(axis=1, keepdims=True)
        step = np.linalg.solve(curvature + added[:, :, None] * identity, gradient[..., None])[..., 0]
        trial = theta - step @ problem.basis.T
        trial[:, :3] = np.maximum(trial[:, :3], LEAST_LOG)
        trial[:, 3:] = np.clip(trial[:, 3:], *EXPONENT_BOUNDS)
        trial_log_predicted, trial_shares = problem.predict(trial)
        value = problem.objective(trial, trial_log_predicted - problem.log_loss, weights)
        better = value < best
        stale = np.where(better & (best - value > TOLERANCE * best), 0, stale + 1)
        theta = np.where(better[:, None], trial, theta)
        log_predicted = np.where(better[:, None], trial_log_predicted, log_predicted)
        shares = np.where(better[None, :, None], trial_shares, shares)
        best = np.where(better, value, best)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e8)
        if (stale >= PATIENCE).any():
            result[still[stale >= PATIENCE]] = theta[stale >= PATIENCE]
            going = stale < PATIENCE
            if not going.any():
                return result
            still, theta, weights = still[going], theta[going], weights[going]
            log_predicted, shares, best = log_predicted[going], shares[:, going], best[going]
            damping, stale = damping[going], stale[going]
    result[still] = theta
    return result
