"""Laws of mixtures of experts and of low precision. They were fitted to other text, tokenizers and recipes
than the dense laws of `laws`, so their losses do not mix with those: use ratios between two answers of one
law.

N, D, L as in `laws`; E experts, P bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.units import format_count

DIFFERENT_DATA = "different data: compare its answers with each other only, not with a dense law's"


@dataclass(frozen=True, kw_only=True)
class ClarkLaw:
    """log L = a log N + b log E' + c log N log E' + d, E' the saturating expert count (Clark et al. 2022,
    arXiv:2202.01169, equations 7 and 8). N is the dense model that routing is added to, 15M to 1.3B."""

    router: str
    a: float
    b: float
    c: float
    d: float
    experts_start: float
    experts_max: float

    def saturating(self, num_experts: float) -> float:
        """E': 1/E' = 1 / (E - 1 + 1 / (1/E_start - 1/E_max)) + 1/E_max."""
        shifted = num_experts - 1 + 1 / (1 / self.experts_start - 1 / self.experts_max)
        return 1 / (1 / shifted + 1 / self.experts_max)

    def loss(self, num_params: float, num_experts: float) -> float:
        log_n, log_e = math.log10(num_params), math.log10(self.saturating(num_experts))
        return float(10 ** (self.a * log_n + self.b * log_e + self.c * log_n * log_e + self.d))

    def equivalent_params(self, num_params: float, num_experts: float) -> float:
        """The dense model (E = 1) of the same loss: equation 9's effective parameter count."""
        return self._dense_of(self.loss(num_params, num_experts))

    def _dense_of(self, loss: float) -> float:
        log_start = math.log10(self.saturating(1))
        return float(10 ** ((math.log10(loss) - self.d - self.b * log_start) / (self.a + self.c * log_start)))


CLARK = {
    law.router: law
    for law in (
        ClarkLaw(
            router="s_base", a=-0.082, b=-0.108, c=0.009, d=1.104, experts_start=1.847, experts_max=314.478
        ),
        ClarkLaw(
            router="rl_r", a=-0.083, b=-0.126, c=0.012, d=1.111, experts_start=1.88, experts_max=469.982
        ),
        ClarkLaw(
            router="hash", a=-0.087, b=-0.136, c=0.012, d=1.157, experts_start=4.175, experts_max=477.741
        ),
    )
}
"""Table 3."""


@dataclass(frozen=True, kw_only=True)
class KrajewskiLaw:
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta for 64 experts of granularity G on C4 (Krajewski et
    al. 2024, arXiv:2402.07871, table 1; RMSE 0.019). Granularity 1 is an expert as wide as the dense
    feed-forward layer. N is read as all parameters, the experts' too: with the dense part's N the law would
    put a mixture behind its own dense counterpart."""

    entropy: float
    params_scale: float
    params_exponent: float
    tokens_scale: float
    tokens_exponent: float
    granularity_scale: float = 0.0
    granularity_exponent: float = 0.0

    def loss(self, num_params: float, num_tokens: float, granularity: float = 1.0) -> float:
        if granularity <= 0:
            raise ConfigError(f"granularity={granularity:g} must be above 0")
        scale = self.granularity_scale / granularity**self.granularity_exponent + self.params_scale
        params_term = scale / num_params**self.params_exponent
        return float(self.entropy + params_term + self.tokens_scale / num_tokens**self.tokens_exponent)


KRAJEWSKI_MOE = KrajewskiLaw(
    entropy=0.47,
    params_scale=18.1,
    params_exponent=0.115,
    tokens_scale=30.8,
    tokens_exponent=0.147,
    granularity_scale=2.1,
    granularity_exponent=0.58,
)
KRAJEWSKI_DENSE = KrajewskiLaw(
    entropy=0.47, params_scale=16.3, params_exponent=0.126, tokens_scale=26.7, tokens_exponent=0.127
)
"""Beside it, on the same data."""

PRECISION_GAMMA = {"weights": 2.6745, "activations": 2.2102, "kv_cache": 0.9578}
"""Bits (Kumar et al. 2024, arXiv:2411.04330, section 4.3); models of 30M to 220M parameters, up to 26B
tokens, Dolma."""
LEAST_BITS = 3.0
"""Lowest precision of their training runs."""


def effective_params_at(
    num_params: float, *, weights: float = 16, activations: float = 16, kv_cache: float = 16
) -> float:
    """N_eff = N prod (1 - e^(-P / gamma)): what a model trained with so many bits is worth (Kumar et al.
    2024, equation 3). At 16 bits it is N to 0.3%."""
    worth = 1.0
    for part, bits in (("weights", weights), ("activations", activations), ("kv_cache", kv_cache)):
        if not LEAST_BITS <= bits <= 32:
            raise ConfigError(f"{part} of {bits:g} bits: the law was fitted from {LEAST_BITS:g} to 16 bits")
        worth *= -math.expm1(-bits / PRECISION_GAMMA[part])
    return num_params * worth


@dataclass(frozen=True, kw_only=True)
class OtherAnswer:
    """What a law of other data says beside a plan."""

    change: str
    answer: str
    """A ratio or a difference: the only things that carry over."""
    source: str


CLARK_PARAMS = (15e6, 1.3e9)
"""Dense models that routing was added to."""
KUMAR_PARAMS = (30e6, 220e6)


def other_answers(num_params: float, num_tokens: float) -> list[OtherAnswer]:
    """What mixtures of experts and low precision would do for a dense model of this size and these tokens."""
    clark, found = CLARK["s_base"], []
    for num_experts in (8, 64):
        worth = clark.equivalent_params(num_params, num_experts) / num_params
        beyond = _beyond(num_params, CLARK_PARAMS)
        found.append(
            OtherAnswer(
                change=f"{num_experts} experts in place of each feed-forward layer, one a token",
                answer=f"as good as a dense model of {worth:.2g} times the size{beyond}",
                source="Clark et al. 2022, arXiv:2202.01169, table 3, S-BASE",
            )
        )
    dense = KRAJEWSKI_DENSE.loss(num_params, num_tokens)
    for granularity in (1, 8):
        moved = KRAJEWSKI_MOE.loss(num_params, num_tokens, granularity) - dense
        found.append(
            OtherAnswer(
                change=f"the same parameters as 64 experts of granularity {granularity}",
                answer=f"{moved:+.3f} nats against a dense model of the same data",
                source="Krajewski et al. 2024, arXiv:2402.07871, table 1",
            )
        )
    for bits in (8.0, 4.0):
        worth = effective_params_at(num_params, weights=bits, activations=bits, kv_cache=bits) / num_params
        found.append(
            OtherAnswer(
                change=f"trained with {bits:g} bits in weights, activations and KV cache",
                answer=f"worth {worth:.0%} of its parameters{_beyond(num_params, KUMAR_PARAMS)}",
                source="Kumar et al. 2024, arXiv:2411.04330, section 4.3",
            )
        )
    return found


def _beyond(num_params: float, fitted: tuple[float, float]) -> str:
    low, high = fitted
    if low <= num_params <= high:
        return ""
    return f"; fitted from {format_count(low)} to {format_count(high)} parameters"


def find_clark(router: str) -> ClarkLaw:
    if router not in CLARK:
        raise ConfigError(unknown_name("router", router, CLARK))
    return CLARK[router]
