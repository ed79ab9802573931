"""Batch, learning rate and warm-up: published formulas, and what happens outside the runs behind them."""

import pytest

from llmtrain.errors import ConfigError
from llmtrain.planner import recipe
from llmtrain.planner.recipe import choose_recipe, critical_batch, deepseek, schedule_lengths, step_law


def recipe_for(**changes):
    sizes = {
        "num_params": 300_000_000,
        "num_non_embedding_params": 250_000_000,
        "num_tokens": 6e9,
        "flops": 1e19,
        "seq_len": 2048,
        "num_ranks": 8,
    }
    return choose_recipe(**(sizes | changes))


def test_step_law_at_one_billion_and_one_hundred_billion_tokens():
    rates = step_law(num_non_embedding_params=1e9, num_tokens=1e11)
    # 1.79 * 10^(9 * -0.713 + 11 * 0.307) and 0.58 * 10^(11 * 0.571), by hand
    assert rates.peak_lr == pytest.approx(1.79 * 10**-3.04)
    assert rates.batch_tokens == pytest.approx(0.58 * 10**6.281)


def test_deepseek_at_1e20_flops():
    rates = deepseek(flops=1e20)
    assert rates.peak_lr == pytest.approx(0.3118 * 10**-2.5)
    assert rates.batch_tokens == pytest.approx(0.2920 * 10**6.542)


def test_inside_its_runs_the_step_law_decides():
    chosen = recipe_for()
    assert chosen.step_law_decades_outside == 0
    assert chosen.peak_lr == pytest.approx(chosen.step_law.peak_lr, rel=0.005)  # three digits are kept


def test_outside_its_runs_the_lower_of_both_rates_is_taken():
    chosen = recipe_for(num_params=3_000_000, num_non_embedding_params=1_000_000, num_tokens=5e7, flops=1e15)
    assert chosen.step_law_decades_outside > 1
    assert chosen.peak_lr == pytest.approx(chosen.deepseek.peak_lr, rel=0.005)
    assert chosen.deepseek.peak_lr < chosen.step_law.peak_lr
    assert "DeepSeek" in chosen.peak_lr_reason


def test_no_rate_above_the_sweep_is_proposed():
    chosen = recipe_for(num_params=3000, num_non_embedding_params=1000, num_tokens=1e5, flops=1e9)
    assert chosen.peak_lr == pytest.approx(recipe.LARGEST_SWEPT_LR, rel=0.005)
    assert chosen.peak_lr_reason.startswith("upper end of the Step Law's sweep")


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 24, 100])
@pytest.mark.parametrize("seq_len", [16, 512, 2048, 131_072])
def test_batch_divides_among_all_ranks_and_micro_batches(num_ranks, seq_len):
    chosen = recipe_for(num_ranks=num_ranks, seq_len=seq_len)
    assert chosen.global_batch_rows % (num_ranks * chosen.micro_batch_rows) == 0
    assert chosen.micro_batch_rows * seq_len <= recipe.MICRO_BATCH_TOKENS or chosen.micro_batch_rows == 1


def test_tokens_are_whole_steps_near_the_wish():
    chosen = recipe_for()
    assert chosen.total_tokens == chosen.num_steps * chosen.global_batch_rows * 2048
    assert chosen.total_tokens == pytest.approx(6e9, rel=0.01)


def test_batch_is_the_step_laws_to_half_a_multiple():
    chosen = recipe_for()
    assert chosen.global_batch_rows * 2048 == pytest.approx(chosen.step_law.batch_tokens, abs=8 * 2048 / 2)


@pytest.mark.parametrize(("num_tokens", "share"), [(6e9, 0.05), (1e9, 0.1)])
def test_warmup_is_one_token_a_parameter_and_at_most_a_tenth(num_tokens, share):
    chosen = recipe_for(num_tokens=num_tokens)
    assert chosen.warmup_tokens / chosen.total_tokens == pytest.approx(share, rel=0.01)


def test_the_three_formulas_of_the_critical_batch_agree_where_their_runs_meet():
    """Rows of 512 tokens at 151M parameters on 3.07B tokens; 621.341 N^0.087 is their fit at that D."""
    found = critical_batch(num_params=151e6, num_tokens=3.07e9)
    assert found.tokens / 512 == pytest.approx(997, abs=1)
    assert found.by_params / 512 == pytest.approx(985, abs=1)
    assert round(621.341 * 151**0.087) == 961
    assert found.decades_outside == 0


def test_the_critical_batch_costs_a_fifth_more_tokens_and_a_small_one_almost_nothing():
    found = critical_batch(num_params=3e8, num_tokens=6e9)
    assert found.extra_tokens(found.tokens) == pytest.approx(0.2)
    assert found.extra_tokens(found.tokens / 100) == pytest.approx(0.002)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize(("total", "warmup"), [(10_000, 500), (10_000, 9_800), (7, 0)])
def test_a_schedules_parts_add_up_to_the_run(kind, total, warmup):
    found = schedule_lengths(kind, total_tokens=total, warmup_tokens=warmup)
    parts = (found.warmup_tokens, found.stable_tokens, found.decay_tokens)
    assert sum(parts) == total
    assert min(parts) >= 0
    assert found.kind == kind


def test_a_cosine_falls_from_the_warmup_to_the_end_and_wsd_for_a_tenth():
    cosine, wsd = (schedule_lengths(k, total_tokens=10_000, warmup_tokens=500) for k in ("cosine", "wsd"))
    assert (cosine.stable_tokens, cosine.decay_tokens) == (0, 9_500)
    assert (wsd.stable_tokens, wsd.decay_tokens) == (8_500, 1_000)


def test_an_unknown_schedule_and_a_warmup_past_the_run_are_refused():
    with pytest.raises(ConfigError, match=r"unknown schedule 'wds'; did you mean 'wsd'\? Known: cosine, wsd"):
        schedule_lengths("wds", total_tokens=10, warmup_tokens=1)
    with pytest.raises(ConfigError, match="warm-up of 11 tokens in a run of 10"):
        schedule_lengths("wsd", total_tokens=10, warmup_tokens=11)


def test_a_recipe_holds_both_schedules_and_the_critical_batch_of_its_own_tokens():
    chosen = recipe_for()
    for lengths in (chosen.cosine, chosen.wsd):
        parts = lengths.warmup_tokens + lengths.stable_tokens + lengths.decay_tokens
        assert parts == chosen.total_tokens
    alone = critical_batch(num_params=300_000_000, num_tokens=chosen.total_tokens)
    assert chosen.critical_batch == alone
