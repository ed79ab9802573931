"""From a budget to a plan, its file, and what it says about other runs."""

import json
import math
from dataclasses import replace

import pytest

from llmtrain.errors import ConfigError, DataError
from llmtrain.files import plain
from llmtrain.model.size import flops_per_token, num_params
from llmtrain.planner.config import (
    BudgetConfig,
    ChoiceConfig,
    DataWishConfig,
    InferenceConfig,
    ModelWishConfig,
)
from llmtrain.planner.cost.cluster import find_cluster
from llmtrain.planner.forecast import forecast_run
from llmtrain.planner.make import batch_multiple, make_plan, padded_vocab, rounded_rows
from llmtrain.planner.plan import read_plan, write_plan
from llmtrain.planner.report import experiment_yaml, notes, plan_text


def planned(budget=None, *, nodes=2, name="trial", cluster=None, **changes):
    sections = {
        "model": ModelWishConfig(vocab_size=32_000),
        "data": DataWishConfig(seq_len=2048),
        "inference": InferenceConfig(),
        "choice": ChoiceConfig(),
    }
    return make_plan(
        name=name,
        budget=budget or BudgetConfig(gpu_hours="1k"),
        cluster=cluster or find_cluster("h100_sxm_8x", num_nodes=nodes),
        **{**sections, **changes},
    )


@pytest.fixture(scope="module")
def whole():
    return planned()


def test_gpu_hours_are_spent_with_restarts_counted(whole):
    plan = whole.plan
    assert plan.forecast.gpu_hours.mid == pytest.approx(1000, rel=0.02)  # whole steps
    assert plan.forecast.total_s.mid == pytest.approx(1000 / 16 * 3600, rel=0.02)
    assert plan.forecast.train_s.mid == pytest.approx(plan.forecast.total_s.mid * plan.cluster.goodput)
    assert "1,000 GPU-hours = 62.5 h on 16 GPUs, of which 90% count (goodput)" in plan.budget_text


def test_days_and_dollars_are_hours():
    by_hours = planned(BudgetConfig(gpu_hours="768")).plan
    by_days = planned(BudgetConfig(days="2")).plan
    assert by_days.choice == by_hours.choice
    assert planned(BudgetConfig(days="48h")).plan.choice == by_hours.choice
    priced = find_cluster("h100_sxm_8x", num_nodes=2, price_usd_per_gpu_hour=2.5, price_date="2026-11")
    by_usd = planned(BudgetConfig(usd="1920"), cluster=priced).plan
    assert by_usd.choice == by_hours.choice
    assert by_usd.forecast.usd is not None
    assert by_usd.forecast.usd.mid == pytest.approx(1920, rel=0.02)
    assert "$1,920 at $2.5 a GPU-hour (given, 2026-11)" in by_usd.budget_text


def test_dollars_without_a_price_are_refused():
    with pytest.raises(
        ConfigError, match=r"budget\.usd=50k needs a price; give cluster\.price_usd_per_gpu_hour"
    ):
        planned(BudgetConfig(usd="50k"))


@pytest.mark.parametrize("flops", ["1e19", "1e21", "1e23"])
@pytest.mark.parametrize("seq_len", [512, 8192])
def test_the_plan_spends_its_flops_with_attention_and_head_counted(flops, seq_len):
    plan = planned(BudgetConfig(flops=flops), data=DataWishConfig(seq_len=seq_len), nodes=16).plan
    spent = plan.choice.total_tokens * flops_per_token(plan.choice.model, seq_len, convention="palm")
    assert spent == pytest.approx(float(flops), rel=0.02)  # whole steps
    assert plan.budget_flops == pytest.approx(spent)


def test_besiroglus_budget_gives_a_model_near_72b():
    plan = planned(BudgetConfig(flops="5.76e23"), nodes=64).plan
    assert num_params(plan.choice.model) == pytest.approx(72.5e9, rel=0.05)


def test_given_tokens_and_parameters_are_kept():
    plan = planned(BudgetConfig(tokens="30B"), model=ModelWishConfig(vocab_size=32_000, params="1.3B")).plan
    assert plan.choice.total_tokens == pytest.approx(30e9, rel=0.001)
    assert num_params(plan.choice.model) == pytest.approx(1.3e9, rel=0.05)


def test_the_layout_is_all_gpus_and_the_whole_batch(whole):
    choice = whole.plan.choice
    assert choice.layout.world_size == 16
    assert choice.total_tokens == choice.num_steps * choice.global_batch_tokens
    assert whole.plan.forecast.peak_bytes.high <= whole.plan.cluster.gpu.mem_bytes


def test_time_and_memory_by_part_add_up(whole):
    forecast = whole.plan.forecast
    assert sum(forecast.time_parts.values()) == pytest.approx(forecast.step_s.mid)
    assert max(forecast.memory_instants.values()) == pytest.approx(sum(forecast.memory_parts.values()))


def test_runners_up_are_slower_and_say_why(whole):
    assert whole.plan.runners_up
    for each in whole.plan.runners_up:
        assert each.step_s.mid >= whole.plan.forecast.step_s.mid
        assert each.why


def test_repeated_text_raises_the_loss():
    budget = BudgetConfig(flops="1e22")
    model = ModelWishConfig(vocab_size=32_000, params="3B")
    free = planned(budget, model=model, nodes=8).plan
    scarce = planned(budget, model=model, nodes=8, data=DataWishConfig(seq_len=2048, unique_tokens="10B"))
    assert scarce.plan.choice.total_tokens == free.choice.total_tokens
    assert scarce.plan.forecast.loss.mid > 1.02 * free.forecast.loss.mid
    assert any("epochs over 1e+10 unique tokens" in note for note in notes(scarce))


def test_no_layout_that_fits_is_an_error_that_says_what_would():
    with pytest.raises(
        ConfigError, match=r"legal layouts .* fits: the smallest takes up to .* cluster\.nodes="
    ):
        planned(BudgetConfig(tokens="1T"), nodes=1, model=ModelWishConfig(vocab_size=128_256, params="405B"))


def test_a_budget_below_one_batch_is_refused_with_what_to_change():
    with pytest.raises(ConfigError, match=r"buys \d+ tokens, less than half of one batch of .* raise the"):
        planned(BudgetConfig(flops="1e9"), nodes=1)


def test_a_plan_file_is_read_back_equal(whole, tmp_path):
    write_plan(tmp_path / "trial.plan.json", whole.plan)
    assert plain(read_plan(tmp_path / "trial.plan.json")) == plain(whole.plan)
    assert read_plan(tmp_path / "trial.plan.json").choice == whole.plan.choice


def test_a_missing_plan_says_which_command_writes_one(tmp_path):
    with pytest.raises(DataError, match=r"no plan at .*absent\.json; `llmtrain plan` writes one"):
        read_plan(tmp_path / "absent.json")


def test_a_plan_that_is_not_json_is_an_error(tmp_path):
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(DataError, match=r"p\.json is not a plan: .*; write it anew"):
        read_plan(tmp_path / "p.json")


@pytest.mark.parametrize("content", ['{"format_version": 99}', '{"format_version": 1}', "[]", "{}"])
def test_a_plan_of_another_version_is_an_error(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(DataError, match=r"format_version=(99|1|None) and this llmtrain reads 2"):
        read_plan(tmp_path / "p.json")


@pytest.mark.parametrize("missing", ["law", "choice", "cluster", "forecast", "runners_up"])
def test_a_plan_that_lacks_a_part_is_an_error(whole, tmp_path, missing):
    write_plan(tmp_path / "p.json", whole.plan)
    content = json.loads((tmp_path / "p.json").read_text())
    del content[missing]
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"does not hold a whole plan: .*{missing}"):
        read_plan(tmp_path / "p.json")


def test_a_plan_foretells_itself(whole):
    plan = whole.plan
    again = forecast_run(plan, plan.choice.model, plan.choice.layout, total_tokens=plan.choice.total_tokens)
    assert again == plan.forecast


def test_a_plan_foretells_a_run_of_another_layout(whole):
    plan = whole.plan
    layout = replace(
        plan.choice.layout, recompute="full" if plan.choice.layout.recompute == "none" else "none"
    )
    other = forecast_run(plan, plan.choice.model, layout, total_tokens=plan.choice.total_tokens)
    assert other.step_s.mid != plan.forecast.step_s.mid
    assert other.loss == plan.forecast.loss


def test_a_run_of_other_ranks_is_not_foretold(whole):
    plan = whole.plan
    layout = replace(plan.choice.layout, dp=3 * plan.choice.layout.dp)
    with pytest.raises(ConfigError, match="the run has 48 ranks and the plan's cluster 16 GPUs; plan again"):
        forecast_run(plan, plan.choice.model, layout, total_tokens=1e9)


def test_a_tiny_plan_says_that_its_laws_are_stretched():
    found = planned(
        BudgetConfig(flops="3e13"),
        nodes=1,
        model=ModelWishConfig(),
        data=DataWishConfig(),
        choice=ChoiceConfig(),
    )
    told = " ".join(notes(found))
    assert "powers of ten past the runs it was fitted to" in told
    assert "the Step Law is stretched" in told
    assert "in the embedding of 8192 tokens" in told


def test_the_printed_plan_shows_every_law_and_keeps_to_its_width(whole):
    text = plan_text(whole)
    for law in (
        "besiroglu2024 *",
        "hoffmann2022_approach1",
        "llama3_2024_refit",
        "deepseek2024",
        "minicpm2024",
    ):
        assert law in text
    assert max(map(len, text.splitlines())) <= 110


def test_the_experiment_holds_the_layout(whole, tmp_path):
    text = experiment_yaml(whole.plan, plan_path=tmp_path / "p.json")
    layout = whole.plan.choice.layout
    for line in (f"  zero_stage: {layout.zero_stage}", f"  tp_size: {layout.tp}", "  world_size: 16"):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("rows", "world_size", "multiple"),
    [(512, 16, 128), (500, 16, 64), (512, 24, 96), (6, 24, 6), (100, 1, 16), (3, 8, 4)],
)
def test_a_batch_is_rounded_to_what_many_layouts_divide(rows, world_size, multiple):
    assert batch_multiple(rows, world_size=world_size) == multiple
    assert rows / 1.5 <= rounded_rows(rows, multiple) <= rows * 1.5


def test_vocabularies_are_padded_where_padding_is_small():
    assert [padded_vocab(size) for size in (512, 4095, 4096, 32_000, 50_257)] == [
        512,
        4095,
        4096,
        32_000,
        50_304,
    ]


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (
            BudgetConfig,
            {"flops": "1e21", "days": "3"},
            r"at most one of .*; got budget\.flops=1e21, budget\.days=3",
        ),
        (BudgetConfig, {"flops": "-1"}, r"budget\.flops=-1 must be a number of FLOPs above 0"),
        (BudgetConfig, {"flops": "nan"}, r"budget\.flops=nan"),
        (BudgetConfig, {"tokens": "7GB"}, r"budget\.tokens=7GB: 'GB' belongs to a size in bytes"),
        (BudgetConfig, {"days": "80GiB"}, r"budget\.days=80GiB: 'GiB' belongs to a size in bytes"),
        (ModelWishConfig, {"params": "0"}, r"model\.params=0 must be"),
        (ModelWishConfig, {"vocab_size": 1}, r"model\.vocab_size=1 must be at least 2"),
        (DataWishConfig, {"seq_len": 1}, r"data\.seq_len=1 must be from 2"),
        (
            DataWishConfig,
            {"unique_tokens": "1B", "folder": "d"},
            r"both say how much text there is; give one",
        ),
        (InferenceConfig, {"tokens": "-5"}, r"inference\.tokens=-5"),
        (ChoiceConfig, {"schedule": "cosin"}, r"unknown plan\.schedule 'cosin'; did you mean 'cosine'"),
        (ChoiceConfig, {"precision": "fp8"}, r"unknown plan\.precision 'fp8'"),
    ],
)
def test_wishes_that_cannot_be_are_refused(section, settings, message):
    with pytest.raises(ConfigError, match=message):
        section(**settings)


def test_quantities_parse_as_people_type_them():
    assert BudgetConfig(days="14").compute == ("days", 14 * 86400.0)
    assert BudgetConfig(days="14d").compute == ("days", 14 * 86400.0)
    assert BudgetConfig(gpu_hours="20k").compute == ("gpu_hours", 20_000.0)
    assert BudgetConfig(tokens="300B").num_tokens == 300e9
    assert ModelWishConfig(params="7B").num_params == 7e9
    assert math.isclose(InferenceConfig(tokens="2T").num_tokens, 2e12)


def test_budgets_in_hours_are_spent_even_where_two_shapes_take_turns():
    cluster = find_cluster("h100_sxm_8x", num_nodes=4)
    for hours in (150, 170, 190, 210, 240, 280, 330, 400):
        spent = planned(BudgetConfig(gpu_hours=str(hours)), cluster=cluster).plan.forecast.gpu_hours.mid
        assert spent == pytest.approx(hours, rel=0.03), f"budget.gpu_hours={hours}"


def test_the_loss_stays_below_that_of_a_model_that_learned_nothing():
    model = ModelWishConfig(vocab_size=512, params="1M")
    plan = planned(
        BudgetConfig(tokens="1B"), nodes=1, model=model, data=DataWishConfig(seq_len=512, unique_tokens="2M")
    ).plan
    loss = plan.forecast.loss
    assert loss.low <= loss.mid <= loss.high <= math.log(512) + 1e-9


def test_text_read_a_thousand_times_is_refused():
    with pytest.raises(ConfigError, match=r"readings of 1M unique ones, and past 44 nothing was measured"):
        planned(BudgetConfig(tokens="10B"), data=DataWishConfig(seq_len=2048, unique_tokens="1M"))


def test_a_wish_past_every_shape_is_refused():
    with pytest.raises(ConfigError, match=r"parameters are wished, and the largest shape there is has"):
        planned(BudgetConfig(tokens="1T"), model=ModelWishConfig(params="1000T", vocab_size=32_000))


def test_a_gpu_without_bf16_is_planned_in_fp16():
    plan = planned(BudgetConfig(flops="1e19"), cluster=find_cluster("v100_sxm_8x")).plan
    assert plan.precision == "fp16"


def test_a_small_wish_has_the_tokens_of_the_shape_that_it_gets():
    plan = planned(BudgetConfig(), nodes=1, model=ModelWishConfig(vocab_size=32_000, params="1M")).plan
    assert plan.choice.total_tokens > 10 * num_params(plan.choice.model)


def test_a_calibration_of_another_machine_is_refused(tmp_path):
    from llmtrain.planner.calibrate import Observation, calibrate, write_calibration  # noqa: PLC0415
    from llmtrain.planner.cost.architecture import find_model  # noqa: PLC0415
    from llmtrain.planner.cost.layout import Layout  # noqa: PLC0415

    here = find_cluster("this_machine", peak_tflops=0.2)
    layout = Layout(seq_len=256, micro_batch_rows=2, precision="fp32")
    seen = Observation(
        name="run",
        arch=find_model("gpt2_124m"),
        layout=layout,
        cluster=here,
        step_s=2.0,
        peak_bytes=3e9,
        is_resident=True,
    )
    path = tmp_path / "c.json"
    write_calibration(path, calibrate([seen]).calibration)
    choice = ChoiceConfig(calibration=str(path))
    with pytest.raises(
        ConfigError, match=r"is of runs in fp32 on this_machine, and the plan is in bf16 on h100"
    ):
        planned(BudgetConfig(flops="1e19"), choice=choice)
    with pytest.raises(ConfigError, match=r"is of llmtrain, and plan\.program=megatron"):
        planned(BudgetConfig(flops="1e19"), choice=ChoiceConfig(calibration=str(path), program="megatron"))
