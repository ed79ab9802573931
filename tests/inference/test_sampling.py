"""The cache changes nothing, seeds decide everything, and each cut keeps the tokens it should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llmtrain.errors import ConfigError
from llmtrain.inference import sampling
from llmtrain.inference.sampling import SamplingConfig, choose, generate, next_logits
from llmtrain.model.attention import KVCache
from llmtrain.model.config import Family, ModelConfig
from llmtrain.model.init import build_transformer
from llmtrain.model.transformer import Transformer

EOS = 2
CFG = ModelConfig(
    vocab_size=80, num_layers=3, d_model=48, num_heads=4, num_kv_heads=2, ffn_width=64, init_std=0.15
)
PROMPT = [5, 9, 33, 71, 12, 12, 40]


GPT2 = replace(CFG, family=Family.gpt2, max_positions=200)


@pytest.fixture(scope="module", params=[CFG, GPT2], ids=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return build_transformer(request.param, seed=0).eval()


def test_no_token_is_asked_for_that_has_no_position() -> None:
    model = build_transformer(GPT2, seed=0).eval()
    assert len(list(generate(model, PROMPT, SamplingConfig(max_new_tokens=193), eos_id=-1))) == 193
    with pytest.raises(ConfigError, match=r"7 tokens of prompt and max_new_tokens=194 are more than"):
        next(generate(model, PROMPT, SamplingConfig(max_new_tokens=194), eos_id=-1))


def cache_for(max_len: int) -> KVCache:
    return KVCache(CFG, batch_size=1, max_len=max_len, device=torch.device("cpu"), dtype=torch.float32)


def logits_without_cache(model: Transformer, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), torch.arange(len(ids))[None])[0]


@pytest.mark.parametrize("pieces", [[60], [1] * 60, [7, 1, 1, 20, 2, 29], [59, 1]], ids=str)
def test_logits_with_a_cache_equal_those_without(model: Transformer, pieces: list[int]) -> None:
    ids = np.random.default_rng(0).integers(0, 80, 60)
    expected = logits_without_cache(model, ids.tolist())
    cache, start = cache_for(60), 0
    with torch.no_grad():
        for length in pieces:
            part = torch.from_numpy(ids[start : start + length])[None]
            logits = model(part, torch.arange(start, start + length)[None], cache=cache)[0]
            torch.testing.assert_close(logits, expected[start : start + length], atol=1e-5, rtol=1e-5)
            start += length
            assert cache.length == start


def test_a_long_prompt_is_read_in_parts_with_the_same_logits(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(0).integers(0, 80, 50).tolist()
    whole = next_logits(model, ids, cache_for(50))
    monkeypatch.setattr(sampling, "PREFILL_AT_ONCE", 16)
    np.testing.assert_allclose(next_logits(model, ids, cache_for(50)), whole, atol=1e-5, rtol=1e-5)


def test_greedy_tokens_are_those_of_a_model_without_cache(model: Transformer) -> None:
    ids = list(PROMPT)
    for _ in range(40):
        ids.append(int(logits_without_cache(model, ids)[-1].argmax()))
    greedy = SamplingConfig(max_new_tokens=40, temperature=0)
    assert list(generate(model, PROMPT, greedy, eos_id=-1)) == ids[len(PROMPT) :]


def test_a_seed_and_a_stream_decide_the_tokens(model: Transformer) -> None:
    def tokens(seed: int, stream: int = 0) -> list[int]:
        cfg = SamplingConfig(max_new_tokens=30, temperature=1.5, seed=seed)
        return list(generate(model, PROMPT, cfg, eos_id=-1, stream_name=stream))

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(1, stream=1) != tokens(1, stream=0)


def test_eos_ends_the_text_and_is_not_part_of_it(model: Transformer) -> None:
    cfg = SamplingConfig(max_new_tokens=40, temperature=1.5, seed=3)
    whole = list(generate(model, PROMPT, cfg, eos_id=-1))
    stop = whole[10]
    assert list(generate(model, PROMPT, cfg, eos_id=stop)) == whole[: whole.index(stop)]


def test_an_empty_prompt_starts_from_the_start_token_or_eos(model: Transformer) -> None:
    cfg = SamplingConfig(max_new_tokens=8, temperature=0)
    assert list(generate(model, [], cfg, eos_id=EOS)) == list(generate(model, [EOS], cfg, eos_id=EOS))
    assert list(generate(model, [], cfg, eos_id=EOS, start_id=7)) == list(
        generate(model, [7], cfg, eos_id=EOS)
    )


def frequencies(logits: np.ndarray, cfg: SamplingConfig, num: int = 4000) -> np.ndarray:
    random = np.random.default_rng(0)
    drawn = [choose(logits, cfg, random) for _ in range(num)]
    return np.bincount(drawn, minlength=len(logits)) / num


def test_drawn_tokens_follow_the_tempered_softmax() -> None:
    logits = np.array([0.0, 2.0, -1.0, 1.0])
    for temperature in (0.5, 1.0, 2.0):
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        found = frequencies(logits, SamplingConfig(temperature=temperature))
        assert found == pytest.approx(expected, abs=0.03)  # 4 standard deviations of 4,000 draws


def test_top_k_keeps_the_k_most_probable_and_cuts_ties_by_id() -> None:
    found = frequencies(np.array([1.0, 3.0, 1.0, 2.0, 1.0]), SamplingConfig(temperature=1.0, top_k=3))
    assert found.nonzero()[0].tolist() == [0, 1, 3]
    assert choose(np.array([1.0, 3.0, 2.0]), SamplingConfig(top_k=1), np.random.default_rng(0)) == 1


def test_top_p_keeps_the_fewest_tokens_that_reach_p() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    for top_p, kept in (
        (0.01, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.75, [1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ):
        found = frequencies(logits, SamplingConfig(temperature=1.0, top_p=top_p), num=400)
        assert found.nonzero()[0].tolist() == kept, top_p


def test_a_cold_sample_is_the_most_probable_token_without_overflow() -> None:
    logits = np.array([1000.0, 999.0, -1000.0])
    assert choose(logits, SamplingConfig(temperature=1e-8), np.random.default_rng(0)) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0.1 must be 0 \(greedy\) or above"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1; 1 switches it off"),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1"),
        ({"top_k": 0}, "top_k=0 must be at least 1; null switches it off"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**settings)


@pytest.mark.parametrize("token", [80, -1])
def test_a_prompt_of_another_tokenizer_is_refused_before_the_first_token(
    model: Transformer, token: int
) -> None:
    with pytest.raises(ConfigError, match=f"prompt token {token} is outside the model's vocabulary of 80"):
        generate(model, [3, token], SamplingConfig(), eos_id=EOS)
