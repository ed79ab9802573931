"""From a budget to a plan, its file, and its predictions of other runs."""

import json
import math

import pytest

from llmtrain.errors import ConfigError, DataError
from llmtrain.model.config import ModelConfig
from llmtrain.model.size import flops_per_token, num_params
from llmtrain.planner.config import BudgetConfig, HardwareConfig, RowsConfig, VocabularyConfig
from llmtrain.planner.plan import make_plan, predict, read_plan, write_plan
from llmtrain.planner.report import experiment_yaml, notes, plan_text


def device(**changes):
    settings = {
        "name": "h100_sxm",
        "peak_tflops": 989.5,
        "utilization_low": 0.25,
        "utilization_mid": 0.4,
        "utilization_high": 0.5,
        "utilization_source": "a table",
    }
    return HardwareConfig(**(settings | changes))


def planned(budget=None, *, law="besiroglu2024", vocab_size=32_000, seq_len=2048, name="trial", **changes):
    return make_plan(
        name=name,
        law=law,
        budget=budget or BudgetConfig(device_hours=1000.0),
        hardware=device(**changes),
        vocab_size=vocab_size,
        seq_len=seq_len,
    )


def test_device_hours_buy_peak_times_utilization():
    plan = planned().plan
    assert plan.budget_flops == pytest.approx(1000 * 3600 * 989.5e12 * 0.4)
    assert "1000 device-hours x 3600 s x 989.5 TFLOP/s x 0.4 utilization" in plan.budget_text


def test_wall_hours_count_once_per_device_and_device_hours_do_not():
    by_wall = planned(BudgetConfig(wall_hours=125.0), num_devices=8).plan
    by_device = planned(BudgetConfig(device_hours=1000.0), num_devices=8).plan
    assert by_wall.budget_flops == pytest.approx(by_device.budget_flops)
    assert by_device.prediction.total_s.mid == pytest.approx(125 * 3600, rel=0.01)  # whole steps


def test_given_flops_are_the_budget():
    assert planned(BudgetConfig(flops=1e21)).plan.budget_flops == 1e21


@pytest.mark.parametrize("flops", [1e14, 1e17, 1e20, 1e23])
@pytest.mark.parametrize("seq_len", [512, 8192])
def test_the_plan_spends_its_budget_in_real_flops(flops, seq_len):
    choice = planned(BudgetConfig(flops=flops), seq_len=seq_len).plan.choice
    spent = choice.total_tokens * flops_per_token(choice.model, seq_len, convention="palm")
    assert spent == pytest.approx(flops, rel=0.02)  # whole steps


def test_the_run_takes_the_device_hours_it_was_planned_for():
    prediction = planned().plan.prediction
    assert prediction.total_s.mid == pytest.approx(1000 * 3600, rel=0.01)  # whole steps
    assert prediction.total_s.low < prediction.total_s.mid < prediction.total_s.high


def test_besiroglus_budget_gives_a_model_near_72b():
    choice = planned(BudgetConfig(flops=5.76e23)).plan.choice
    assert num_params(choice.model) == pytest.approx(72.5e9, rel=0.03)


def test_a_budget_below_one_batch_is_refused_with_what_to_change():
    with pytest.raises(
        ConfigError, match=r"buys \d+ tokens, less than half of one batch of 8 rows .* raise the"
    ):
        planned(BudgetConfig(flops=1e9))


def test_a_plan_file_is_read_back_equal(tmp_path):
    plan = planned().plan
    write_plan(tmp_path / "trial.plan.json", plan)
    assert read_plan(tmp_path / "trial.plan.json") == plan


def test_a_missing_plan_says_which_command_writes_one(tmp_path):
    with pytest.raises(DataError, match=r"no plan at .*absent\.json; `llmtrain plan` writes one"):
        read_plan(tmp_path / "absent.json")


def test_a_plan_that_is_not_json_is_an_error(tmp_path):
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(DataError, match=r"p\.json is not a plan: .*; write it anew"):
        read_plan(tmp_path / "p.json")


@pytest.mark.parametrize("content", ['{"format_version": 99}', "[]", "{}"])
def test_a_plan_of_another_version_is_an_error(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(DataError, match=r"format_version=(99|None) and this llmtrain reads 1"):
        read_plan(tmp_path / "p.json")


@pytest.mark.parametrize("missing", ["law", "choice", "hardware", "prediction"])
def test_a_plan_that_lacks_a_part_is_an_error(tmp_path, missing):
    write_plan(tmp_path / "p.json", planned().plan)
    content = json.loads((tmp_path / "p.json").read_text())
    del content[missing]
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"does not hold a whole plan: .*{missing}"):
        read_plan(tmp_path / "p.json")


def test_a_plan_predicts_a_run_of_another_shape():
    plan = planned().plan
    model = ModelConfig(
        vocab_size=8192,
        num_layers=4,
        d_model=256,
        num_heads=4,
        num_kv_heads=2,
        ffn_width=704,
        tie_embeddings=True,
    )
    found = predict(plan, model, seq_len=512, num_tokens=5_000_000, global_batch_tokens=4096, num_devices=2)
    rate = 2 * 989.5e12 / flops_per_token(model, 512, convention="palm")
    assert found.tokens_per_s.mid == pytest.approx(0.4 * rate)
    assert found.step_s.low == pytest.approx(4096 / (0.5 * rate))
    assert found.step_s.high == pytest.approx(4096 / (0.25 * rate))
    assert found.total_s.mid == pytest.approx(5_000_000 / (0.4 * rate))
    assert found.loss.low < found.loss.mid < found.loss.high <= math.log(8192)


def test_a_plan_predicts_itself():
    plan = planned(num_devices=8).plan
    again = predict(
        plan,
        plan.choice.model,
        seq_len=plan.choice.seq_len,
        num_tokens=plan.choice.total_tokens,
        global_batch_tokens=plan.choice.global_batch_tokens,
        num_devices=8,
    )
    assert again == plan.prediction


def test_a_tiny_plan_says_that_its_laws_are_stretched():
    told = " ".join(notes(planned(BudgetConfig(flops=3e13), vocab_size=8192, seq_len=512)))
    assert "besiroglu2024 is stretched 2.2 powers of ten past the runs it was fitted to" in told
    assert "the Step Law is stretched" in told
    assert "in the embedding of 8192 tokens" in told


def test_a_plan_inside_every_range_stays_quiet():
    told = " ".join(notes(planned(BudgetConfig(flops=1e20))))
    assert "stretched" not in told
    assert "assumed" not in told


def test_a_model_that_overflows_one_device_is_told_to_split():
    told = " ".join(notes(planned(BudgetConfig(flops=1e23), mem_gib=74.5)))
    assert "GiB and a device has 74: it must be split over ranks (parallel.zero_stage)" in told


def test_assumed_utilization_is_called_assumed():
    found = planned(utilization_source="assumed, not measured")
    assert "assumed, not measured" in plan_text(found)
    assert any("utilization is at least partly assumed" in note for note in notes(found))


def test_the_printed_plan_shows_every_law_and_keeps_to_its_width():
    text = plan_text(planned())
    for law in ("besiroglu2024 *", "hoffmann2022_approach1", "llama3_2024_refit", "deepseek2024"):
        assert law in text
    assert '"20 tokens per parameter" is one of these rows' in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 110


def test_the_table_of_sizes_appears_only_where_the_law_may_speak():
    assert "OTHER SIZES FOR THE SAME BUDGET" in plan_text(planned(BudgetConfig(flops=1e20)))
    assert "OTHER SIZES" not in plan_text(planned(BudgetConfig(flops=1e15), vocab_size=8192, seq_len=512))


def test_a_rank_gets_its_share_of_a_device_that_ranks_share(tmp_path):
    text = experiment_yaml(planned(ranks_per_device=2).plan, plan_path=tmp_path / "p.json")
    assert "device_peak_tflops: 494.75" in text
    assert "this is one rank's share, 2 share a device" in text


def test_budget_needs_exactly_one_form():
    with pytest.raises(ConfigError, match=r"give exactly one of .*; got none of them"):
        BudgetConfig()
    with pytest.raises(ConfigError, match=r"got budget\.device_hours=1, budget\.flops=2"):
        BudgetConfig(device_hours=1, flops=2)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_budget_must_be_a_number_above_zero(value):
    with pytest.raises(ConfigError, match=r"budget\.flops=.* must be a number above 0"):
        BudgetConfig(flops=value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, r"hardware\.precision=fp16 must be one of fp32, bf16"),
        ({"peak_tflops": -1.0}, r"hardware\.peak_tflops=-1\.0 must be above 0, or null to measure"),
        ({"utilization_low": 0.6}, r"need 0 < hardware\.utilization_low <= .* got 0\.6, 0\.4 and 0\.5"),
        ({"utilization_high": 1.2}, r"utilization_high <= 1, got 0\.25, 0\.4 and 1\.2"),
        ({"num_devices": 0}, r"hardware\.num_devices=0 must be at least 1"),
        ({"ranks_per_device": 0}, r"hardware\.ranks_per_device=0 must be at least 1"),
    ],
)
def test_hardware_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        device(**changes)


def test_vocabulary_and_rows_have_least_sizes():
    with pytest.raises(ConfigError, match=r"model\.vocab_size=1 must be at least 2"):
        VocabularyConfig(vocab_size=1)
    with pytest.raises(ConfigError, match=r"data\.seq_len=1 must be at least 2"):
        RowsConfig(seq_len=1)
