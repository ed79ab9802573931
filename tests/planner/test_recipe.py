"""Batch, learning rate and warm-up: published formulas, and what happens outside the runs behind them."""

import pytest

from llmtrain.planner import recipe
from llmtrain.planner.recipe import choose_recipe, deepseek, step_law


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
