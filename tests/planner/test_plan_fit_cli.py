"""`llmtrain plan fit` on run folders, tables and wrong input."""

import json

import forked
import pytest
import yaml

from llmtrain.cli.plan_fit import PlanFitConfig, listed, read_own_runs, run
from llmtrain.errors import ConfigError, DataError
from llmtrain.model.config import ModelConfig
from llmtrain.model.size import num_non_embedding_params, num_params
from llmtrain.planner.loss import laws
from llmtrain.planner.loss.own_runs import OwnRun
from llmtrain.tracking.metrics import MetricsFile

SHAPES = {
    f"d{width}": {
        "family": "llama",
        "vocab_size": 512,
        "num_layers": 2,
        "d_model": width,
        "num_heads": 2,
        "num_kv_heads": 2,
        "ffn_width": 3 * width,
        "tie_embeddings": True,
    }
    for width in (64, 128, 256, 512)
}


def write_run(folder, shape, *, tokens, loss, done=1.0, ending="finished", last_eval=10):
    """A run of ten steps, as `llmtrain train` leaves it."""
    folder.mkdir(parents=True)
    config = {
        "run": {"name": folder.name, "plan": None},
        "data": {"folder": None, "seq_len": 1},
        "model": shape,
        "train": {"total_tokens": tokens, "global_batch_rows": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with MetricsFile(folder / "metrics.jsonl", attempt=1) as metrics:
        metrics.write("event", 0, what="start")
        for step in range(1, 11):
            metrics.write("step", step, loss=loss + 0.2, position=int(tokens * done * step / 10))
            if step in (5, last_eval):
                metrics.write("eval", step, eval_loss=loss if step == last_eval else loss + 1)
        metrics.write("event", 10, what=ending)


def true_loss(shape, tokens):
    form = laws.find_law("besiroglu2024").form
    return laws.parametric_loss(form, num_params(ModelConfig(**shape)), tokens)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """Twelve runs in the folder that a sweep leaves."""
    sweep = tmp_path_factory.mktemp("runs") / "ladder"
    for name, shape in SHAPES.items():
        for ratio in (10, 30, 90):
            tokens = ratio * num_params(ModelConfig(**shape))
            write_run(sweep / f"{name}_{ratio}x", shape, tokens=tokens, loss=true_loss(shape, tokens))
    return sweep


def test_the_folder_of_a_sweep_stands_for_its_runs(ladder):
    reading = read_own_runs(PlanFitConfig(runs=str(ladder)))
    assert len(reading.runs) == 12
    assert reading.left_out == []
    found = next(each for each in reading.runs if each.name == "d128_30x")
    size = num_params(ModelConfig(**SHAPES["d128"]))
    assert found == OwnRun(
        name="d128_30x", num_params=size, num_tokens=30 * size, loss=true_loss(SHAPES["d128"], 30 * size)
    )


def test_patterns_and_tables_go_together_and_embeddings_may_be_left_out(ladder, tmp_path):
    (tmp_path / "more.csv").write_text("N,D,loss\n1e8,2e9,3.5\n")
    cfg = PlanFitConfig(runs=[f"{ladder}/d64_*", str(tmp_path / "more.csv")], embeddings=False)
    reading = read_own_runs(cfg)
    assert [each.name for each in reading.runs] == ["d64_10x", "d64_30x", "d64_90x", "line 2"]
    assert reading.runs[0].num_params == num_non_embedding_params(ModelConfig(**SHAPES["d64"]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ending": "diverged"}, "diverged"),
        ({"done": 0.5, "ending": "stopped"}, "stopped at 500k of 1M tokens: a cut schedule is no point"),
        ({"last_eval": 7}, "no held-out loss of its end; `llmtrain evaluate` measures it"),
        ({"loss": float("nan")}, "no held-out loss of its end"),
        ({"shape": None}, "no model in its config.yaml"),
    ],
)
def test_a_run_that_says_nothing_about_its_end_is_left_out_with_the_reason(tmp_path, changes, reason):
    asked = {"shape": SHAPES["d64"], "tokens": 1_000_000, "loss": 4.0} | changes
    write_run(tmp_path / "bad", asked.pop("shape"), **asked)
    write_run(tmp_path / "good", SHAPES["d64"], tokens=1_000_000, loss=4.0)
    reading = read_own_runs(PlanFitConfig(runs=str(tmp_path)))
    assert [each.name for each in reading.runs] == ["good"]
    assert f"{tmp_path}/bad: {reason}" in reading.left_out[0]
    with pytest.raises(DataError, match="holds no run that is over; left out: "):
        read_own_runs(PlanFitConfig(runs=str(tmp_path / "bad")))


def test_too_few_runs_are_refused_with_those_that_were_left_out(tmp_path):
    write_run(tmp_path / "bad", SHAPES["d64"], tokens=1_000_000, loss=4.0, ending="diverged")
    write_run(tmp_path / "good", SHAPES["d64"], tokens=1_000_000, loss=4.0)
    with pytest.raises(DataError, match=r"1 runs, and a fit .* add runs\. Left out: .*/bad: diverged"):
        run(PlanFitConfig(runs=str(tmp_path)))


def test_evaluation_json_stands_in_for_an_evaluation_at_the_end(tmp_path):
    write_run(tmp_path / "run", SHAPES["d64"], tokens=1_000_000, loss=4.0, last_eval=7)
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"held_out_loss": 3.9}))
    assert read_own_runs(PlanFitConfig(runs=str(tmp_path))).runs[0].loss == 3.9


def test_a_shape_of_another_program_is_refused_with_the_file(tmp_path):
    write_run(tmp_path / "run", SHAPES["d64"] | {"num_experts": 8}, tokens=1_000_000, loss=4.0)
    with pytest.raises(DataError, match=r"run/config\.yaml has no shape that this llmtrain knows"):
        read_own_runs(PlanFitConfig(runs=str(tmp_path)))


def test_paths_that_are_no_runs_are_refused(tmp_path):
    with pytest.raises(DataError, match="no nothing: runs takes run folders"):
        read_own_runs(PlanFitConfig(runs="nothing"))
    with pytest.raises(DataError, match=r"holds no run folder \(none with metrics.jsonl\)"):
        read_own_runs(PlanFitConfig(runs=str(tmp_path)))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="is neither a folder nor a CSV file"):
        read_own_runs(PlanFitConfig(runs=str(tmp_path / "a.txt")))


def test_settings_that_cannot_be_are_refused():
    for changes, message in (
        ({"runs": []}, r"runs=\[\] names nothing"),
        ({"num_resamples": 3}, "num_resamples=3 must be at least 10"),
        ({"drop_highest": -1}, "drop_highest=-1 must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            PlanFitConfig(**({"runs": ["x"]} | changes))


def test_one_value_is_a_list_of_one():
    assert listed("7B/4T") == ["7B/4T"]
    assert listed(["a", "b"]) == ["a", "b"]
    assert listed(None) == listed("") == listed([]) == []


def test_the_fit_of_a_sweep_finds_the_surface_its_runs_lie_on(ladder, tmp_path, capsys):
    out = tmp_path / "fit.json"
    run(PlanFitConfig(runs=str(ladder), at="1B/20B", budgets="1e20", num_resamples=20, out=str(out)))
    text = capsys.readouterr().out
    assert "FIT of 12 runs" in text
    found = json.loads(out.read_text())
    assert found["variants"]["free"]["alpha"]["mid"] == pytest.approx(0.3478, rel=0.01)
    assert found["variants"]["free"]["E"]["mid"] == pytest.approx(1.8172, rel=0.02)
    truth = laws.parametric_loss(laws.find_law("besiroglu2024").form, 1e9, 2e10)
    assert found["foretold"][0]["loss"]["low"] < truth < found["foretold"][0]["loss"]["high"]
    assert found["budgets"][0]["flops"] == 1e20


def fit_verb(*arguments, cwd):
    return forked.verb("plan", "fit", *arguments, cwd=cwd, timeout_s=120)


def test_the_verb_prints_the_fit_and_writes_its_json(ladder):
    done = fit_verb(
        f"runs={ladder}", "at=1B/20B", "num_resamples=10", "out=fit.json", "format=json", cwd=ladder
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((ladder / "fit.json").read_text())


def test_the_verb_ends_a_mistake_in_one_line(tmp_path):
    done = fit_verb("runs=none.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: no none.csv: runs takes run folders, folders of them, and CSV files\n"
