"""Tables of runs: headings, units, W&B exports, and what is refused with its line."""

import pytest

from llmtrain.errors import DataError
from llmtrain.model.config import ModelConfig
from llmtrain.model.size import num_non_embedding_params, num_params
from llmtrain.planner.loss.own_runs import as_runs, read_table


def table(tmp_path, text, **names):
    path = tmp_path / "runs.csv"
    path.write_text(text, encoding="utf-8")
    return read_table(path, names=names)


def refused(tmp_path, text, **names):
    with pytest.raises(DataError) as caught:
        table(tmp_path, text, **names)
    return str(caught.value)


def test_a_table_with_n_d_and_loss_is_read(tmp_path):
    found = table(tmp_path, "# a source\nname,N,D,loss\nsmall,1e8,2e9,3.5\nlarge,1.5B,30B,2.75\n")
    assert [(run.name, run.num_params, run.num_tokens, run.loss) for run in found.runs] == [
        ("small", 1e8, 2e9, 3.5),
        ("large", 1.5e9, 3e10, 2.75),
    ]
    assert found.left_out == []


def test_units_may_stand_in_the_heading(tmp_path):
    found = table(tmp_path, "params (M),tokens (B),loss [bits]\n100,2,5\n")
    run = found.runs[0]
    assert (run.num_params, run.num_tokens) == (1e8, 2e9)
    assert run.loss == pytest.approx(5 * 0.6931471805599453)
    assert run.name == "line 2"


def test_tokens_follow_from_flops_where_only_those_are_given(tmp_path):
    found = table(tmp_path, "num_params,flops,loss\n1e9,1.2e20,2.9\n")
    assert found.runs[0].num_tokens == pytest.approx(2e10)


def test_columns_can_be_named(tmp_path):
    found = table(tmp_path, "size,seen,final\n1e8,2e9,3.5\n", params="size", tokens="seen", loss="final")
    assert found.runs[0].loss == 3.5


WANDB = """"Name","State","Runtime","model.vocab_size","model.num_layers","model.d_model","model.num_heads",\
"model.num_kv_heads","model.ffn_width","model.tie_embeddings","model.head_width","train.total_tokens",\
"train/loss","eval/eval_loss"
"tiny_1","finished","120","512","2","64","2","2","192","true","null","1000000","3.9","4.1"
"tiny_2","crashed","60","512","2","64","2","2","192","true","null","1000000","5.0","5.1"
"""


@pytest.mark.parametrize("embeddings", [True, False])
def test_a_wandb_export_of_our_own_runs_needs_no_n_and_leaves_crashed_runs_out(tmp_path, embeddings):
    path = tmp_path / "export.csv"
    path.write_text(WANDB)
    found = read_table(path, names={}, embeddings=embeddings)
    model = ModelConfig(
        vocab_size=512,
        num_layers=2,
        d_model=64,
        num_heads=2,
        num_kv_heads=2,
        ffn_width=192,
        tie_embeddings=True,
    )
    size = num_params(model) if embeddings else num_non_embedding_params(model)
    assert [(run.name, run.num_params, run.num_tokens, run.loss) for run in found.runs] == [
        ("tiny_1", size, 1e6, 4.1)
    ]
    assert found.left_out == ["tiny_2: state crashed"]


def test_training_loss_alone_is_no_loss(tmp_path):
    text = WANDB.replace(',"eval/eval_loss"', "").replace(',"4.1"', "").replace(',"5.1"', "")
    assert "has no column for loss; its columns are Name, State" in refused(tmp_path, text)


def test_what_a_table_lacks_or_holds_wrongly_is_said_with_its_line(tmp_path):
    assert "has no column for N and D; its columns are a, loss. Rename them, or name them" in refused(
        tmp_path, "a,loss\n1,2\n"
    )
    assert "line 3 (b): loss is nan; leave runs that diverged or did not end out" in refused(
        tmp_path, "name,N,D,loss\na,1e8,1e9,3\nb,1e8,1e9,nan\n"
    )
    assert "line 2 (no name): D is empty" in refused(tmp_path, "N,D,loss\n1e8,,3\n")
    assert "line 2: D=7GB: 'GB' belongs to a size in bytes" in refused(tmp_path, "N,D,loss\n1e8,7GB,3\n")
    assert "line 2: loss=-3 must be a loss in nats per token above 0" in refused(
        tmp_path, "N,D,loss\n1e8,1e9,-3\n"
    )
    assert "line 3 has 2 cells under 3 headings" in refused(tmp_path, "N,D,loss\n1e8,1e9,3\n1e8,1e9\n")
    assert "has no rows under a heading" in refused(tmp_path, "N,D,loss\n")
    assert "unknown column 'los'; did you mean 'loss'?" in refused(tmp_path, "N,D,loss\n1,2,3\n", loss="los")
    broken = WANDB.replace('"64","2"', '"64","3"')
    assert "line 2: the columns model.* are no shape: model.d_model=64 is not a multiple" in refused(
        tmp_path, broken
    )


def test_a_file_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "none.csv", names={})
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00N,D\n")
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "bytes.csv", names={})


def test_too_few_runs_are_no_fit(tmp_path):
    found = table(tmp_path, "N,D,loss\n1e8,2e9,3.5\n2e8,2e9,3.4\n")
    with pytest.raises(DataError, match="2 runs, and a fit of 5 coefficients needs at least 7; add runs"):
        as_runs(found.runs)
