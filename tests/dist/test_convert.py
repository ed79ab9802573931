"""`llmtrain checkpoint convert`: DeepSpeed and DCP themselves read what we write, and we what they write."""

from __future__ import annotations

import errno
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from numpy.typing import NDArray
from ranks import run_ranks

from llmtrain import files
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.storage import place_of
from llmtrain.checkpoint.write import write_checkpoint
from llmtrain.cli.checkpoint_convert import ConvertConfig, run
from llmtrain.convert.convert import STATE_NAME, Format, export, import_
from llmtrain.errors import CheckpointError, ConfigError, LaunchError
from llmtrain.files import FolderLock
from llmtrain.model.config import ModelConfig
from llmtrain.model.transformer import Transformer

WORKER = Path(__file__).with_name("convert_worker.py")
MODEL = ModelConfig(vocab_size=96, num_layers=4, d_model=32, num_heads=4, num_kv_heads=2, ffn_width=80)
"""engine_worker's."""
KINDS = ("weight", "exp_avg", "exp_avg_sq")
FORMATS = [Format.torch_dcp, Format.deepspeed_universal]
STATE = {"num_optimizer_steps": 5, "tokens": 4096, "eval_loss": 2.5, "model": files.plain(MODEL)}

Values = dict[str, NDArray[Any]]
"""By `kind/name`."""


def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(weight.shape) for name, weight in Transformer(MODEL).named_parameters()}


@pytest.fixture
def values() -> Values:
    random = np.random.default_rng(3)
    return {
        f"{kind}/{name}": np.square(random.standard_normal(shape)).astype(np.float32)
        for kind in KINDS
        for name, shape in shapes().items()
    }


@pytest.fixture
def source(tmp_path: Path, values: Values) -> Path:
    """Step 6, 5 of which updated the weights."""
    halves: list[list[Piece]] = [[], []]
    for key, value in values.items():
        kind, _, name = key.partition("/")
        middle = value.size // 3
        for half, (first, last) in zip(halves, ((0, middle), (middle, value.size)), strict=True):
            half.append(Piece(kind, name, value.shape, first, value.reshape(-1)[first:last]))
    folder = tmp_path / "run" / "checkpoints"
    return write_checkpoint(folder, step=6, files=halves, state=STATE, config=SaveConfig())


def contents(path: str | Path) -> Values:
    reader = CheckpointReader(Path(path))
    reader.verify()
    return {
        f"{kind}/{name}": reader.read(kind, name) for kind in reader.kinds for name in reader.shapes(kind)
    }


def assert_equal(found: Any, expected: Values) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        assert found[key].tobytes() == value.tobytes(), key


def write_note(folder: Path, note: dict[str, Any]) -> None:
    """As llmtrain_state.json of a checkpoint that llmtrain wrote."""
    rest = {key: value for key, value in note.items() if key != "sha256"}
    files.write_json(folder / STATE_NAME, rest | {"sha256": files.hash_json(rest)})


def weights_of(values: Any) -> Values:
    return {key: values[key] for key in values if key.startswith("weight/")}


@pytest.mark.parametrize("to", FORMATS)
def test_there_and_back_is_the_same_checkpoint(
    source: Path, tmp_path: Path, values: Values, to: Format, capsys: pytest.CaptureFixture[str]
) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    run(ConvertConfig(path=str(source), out=str(out), to=to))
    told = capsys.readouterr().out
    assert told.startswith(f"{out}: step 6, {len(values)} tensors of exp_avg, exp_avg_sq, weight")
    assert "names and orientation are llmtrain's (wo and w_down: [in, out])" in told
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"
    assert not list(out.glob(".lock"))
    run(ConvertConfig(path=str(out), out=str(back), source_format=to, num_files=3))
    reader = CheckpointReader(back / "step-00000006")
    assert_equal(contents(reader.path), values)
    assert len(reader.files()) == 3
    made_by = reader.state.pop("made_by")
    assert reader.state == STATE
    assert made_by["command"] == f"checkpoint convert source_format={to.name}"
    assert made_by["before"]["sources"][0]["manifest_sha256"] == CheckpointReader(source).manifest_hash


# -- DCP


def test_dcp_loads_what_we_write_into_a_model_and_an_optimizer(
    source: Path, tmp_path: Path, values: Values
) -> None:
    export(source, tmp_path / "out", to=Format.torch_dcp)
    empty = {name: torch.zeros(shape) for name, shape in shapes().items()}
    state = {
        "model": empty,
        "optim": {
            "state": {
                name: {"step": torch.zeros(()), "exp_avg": weight.clone(), "exp_avg_sq": weight.clone()}
                for name, weight in empty.items()
            }
        },
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    found = {f"weight/{name}": weight.numpy() for name, weight in state["model"].items()}
    for name, held in state["optim"]["state"].items():
        assert held["step"] == 5
        found |= {f"{kind}/{name}": held[kind].numpy() for kind in KINDS[1:]}
    assert_equal(found, values)


def test_weights_that_fsdp_has_split_are_whole_again(source: Path, tmp_path: Path) -> None:
    folder, truth = tmp_path / "dcp", tmp_path / "truth.npz"
    run_ranks(WORKER, "save_dcp", str(folder), str(truth), num_ranks=2)
    with pytest.raises(
        ConfigError, match=f"has no {STATE_NAME}, so llmtrain did not write it; name a checkp"
    ):
        import_(folder, tmp_path / "out", source_format=Format.torch_dcp)
    made = import_(folder, tmp_path / "out", source_format=Format.torch_dcp, like=source.parents[1])
    assert_equal(contents(made.path), dict(np.load(truth)))
    state = CheckpointReader(Path(made.path)).state
    assert made.kinds == ["weight"]
    assert (state["tokens"], state["eval_loss"]) == (4096, None), "a loss of other weights"
    foreign, like = state["made_by"]["sources"]
    assert (foreign["format"], like["checkpoint"]) == ("torch_dcp", str(source))


def saved_dcp(folder: Path, state: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize(("dtype", "prefix"), [(torch.bfloat16, None), (torch.float16, "net.")])
def test_other_types_and_names_come_through(
    source: Path, tmp_path: Path, values: Values, dtype: torch.dtype, prefix: str | None
) -> None:
    weights = {
        f"{prefix or ''}{key.partition('/')[2]}": torch.from_numpy(value).to(dtype)
        for key, value in weights_of(values).items()
    }
    folder = saved_dcp(tmp_path / "dcp", weights | {"optim.lr": torch.zeros(3)})
    made = import_(folder, tmp_path / "out", source_format=Format.torch_dcp, like=source, prefix=prefix)
    for key, value in contents(made.path).items():
        exact = torch.from_numpy(values[key]).to(dtype)
        assert value.dtype == (np.float16 if dtype == torch.float16 else np.float32), "bf16 is widened"
        assert torch.equal(torch.from_numpy(value).to(dtype), exact), key


def test_tensors_that_are_not_the_models_are_named(source: Path, tmp_path: Path, values: Values) -> None:
    weights = {key.partition("/")[2]: torch.from_numpy(value) for key, value in weights_of(values).items()}
    name = (
        "blocks.0.attention.wq.weight" if "blocks.0.attention.wq.weight" in weights else next(iter(weights))
    )
    wrong = {each: weight for each, weight in weights.items() if each != name} | {"extra": torch.zeros(2)}
    folder = saved_dcp(tmp_path / "dcp", {"model": wrong})
    with pytest.raises(
        CheckpointError, match=f"does not fit the model: weight {name} is missing; weight extra"
    ):
        import_(folder, tmp_path / "out", source_format=Format.torch_dcp, like=source)
    folder = saved_dcp(tmp_path / "flat", {"model": weights | {name: weights[name].reshape(-1)}})
    if weights[name].ndim > 1:
        with pytest.raises(CheckpointError, match=rf"weight {name} has shape \[\d+\], the model needs \["):
            import_(folder, tmp_path / "out", source_format=Format.torch_dcp, like=source)
    odd = saved_dcp(tmp_path / "odd", {"model": weights | {name: weights[name].to(torch.complex64)}})
    with pytest.raises(CheckpointError, match=r"is of type torch.complex64, which a checkpoint of llmtrain"):
        import_(odd, tmp_path / "out", source_format=Format.torch_dcp, like=source)
    assert not (tmp_path / "out").exists()


class RunsCode:
    """As a pickle, it makes a folder where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_of_a_stranger_is_not_run(source: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    folder = saved_dcp(tmp_path / "dcp", {"model": {"w": torch.zeros(2)}})
    (folder / ".metadata").write_bytes(pickle.dumps(RunsCode(trap)))
    with pytest.raises(
        CheckpointError, match=r"names posix.mkdir, which DCP does not put there.*trust_pickle"
    ):
        import_(folder, tmp_path / "out", source_format=Format.torch_dcp, like=source)
    universal = tmp_path / "universal" / "zero" / "w"
    universal.mkdir(parents=True)
    torch.save({"param": torch.zeros(2), "more": RunsCode(trap)}, universal / "fp32.pt")
    settings: dict[str, Any] = {"source_format": Format.deepspeed_universal, "like": source}
    with pytest.raises(
        CheckpointError, match=r"fp32.pt holds more than numbers, and reading it could run code"
    ):
        import_(tmp_path / "universal", tmp_path / "out", **settings)
    assert not trap.exists()
    with pytest.raises(CheckpointError, match="does not fit the model"):
        import_(tmp_path / "universal", tmp_path / "out", **settings, trust_pickle=True)
    assert trap.exists(), "it was trusted"
    (folder / ".metadata").write_bytes(pickle.dumps({})[:-1])
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: "):
        import_(folder, tmp_path / "out", source_format=Format.torch_dcp, like=source)
    (folder / ".metadata").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"\.metadata holds a dict, not DCP's metadata"):
        import_(folder, tmp_path / "out", source_format=Format.torch_dcp, like=source)


# -- DeepSpeed


def load_in_deepspeed(folder: Path, out: Path, *how: str, num_ranks: int) -> dict[str, Any]:
    told, *_ = run_ranks(WORKER, "load_universal", str(folder), str(out), *how, num_ranks=num_ranks)
    assert told["global_steps"] == 6
    assert told["steps"] == [5.0], "updates, by which AdamW corrects its bias"
    assert set(told["lr"]) == {0.02}, "its own, not those of a file"
    assert told["clip"] == 0.7
    assert np.isfinite(told["loss"])
    found: dict[str, Any] = told
    return found


def test_deepspeed_at_zero_1_loads_what_we_write(source: Path, tmp_path: Path, values: Values) -> None:
    export(source, tmp_path / "out", to=Format.deepspeed_universal)
    told = load_in_deepspeed(tmp_path / "out", tmp_path / "found.npz", "1", "fp32", num_ranks=1)
    assert_equal(dict(np.load(tmp_path / "found.npz")), values)
    assert told["weight_decay"] == [0.1, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "num_ranks"),
    [("1", "fp32", 2), ("2", "fp32", 1), ("3", "fp32", 2), ("1", "bf16", 2)],
)
def test_deepspeed_at_other_stages_loads_what_we_write(
    source: Path, tmp_path: Path, values: Values, stage: str, precision: str, num_ranks: int
) -> None:
    export(source, tmp_path / "out", to=Format.deepspeed_universal)
    told = load_in_deepspeed(tmp_path / "out", tmp_path / "found.npz", stage, precision, num_ranks=num_ranks)
    assert_equal(dict(np.load(tmp_path / "found.npz")), values)
    assert told["weight_decay"] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("stage", "num_ranks"),
    [("1", 1), *(pytest.param(stage, 2, marks=pytest.mark.slow) for stage in ("1", "3"))],
)
def test_we_read_what_deepspeed_has_saved_and_made_universal(
    source: Path, tmp_path: Path, stage: str, num_ranks: int
) -> None:
    folder, truth = tmp_path / "deepspeed", tmp_path / "truth.npz"
    folder.mkdir()
    run_ranks(WORKER, "save_universal", str(folder), str(truth), stage, num_ranks=num_ranks)
    expected = dict(np.load(truth))
    settings: dict[str, Any] = {"source_format": Format.deepspeed_universal}
    made = import_(folder, tmp_path / "out", **settings, like=source)
    assert_equal(contents(made.path), weights_of(expected))
    export(source, tmp_path / "ours", to=Format.deepspeed_universal)
    note = files.read_json(tmp_path / "ours" / STATE_NAME)
    write_note(folder, note)
    with pytest.raises(
        CheckpointError, match=r"does not have the numbers that llmtrain wrote: it is damaged,"
    ):
        import_(folder, tmp_path / "all", **settings)
    for key, value in expected.items():
        kind, _, name = key.partition("/")
        note["tensors"][kind][name]["xxh3_128"] = xxhash.xxh3_128_hexdigest(value.tobytes())
    write_note(folder, note)  # as if it were ours: its optimizer comes, too
    made = import_(folder, tmp_path / "all", **settings, num_files=2)
    assert_equal(contents(made.path), expected)


# -- what goes wrong


@pytest.mark.parametrize("to", FORMATS)
def test_a_damaged_source_or_a_full_disk_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Format
) -> None:
    out = tmp_path / "out"
    content = (source / "rank-00001.safetensors").read_bytes()
    (source / "rank-00001.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors is damaged: exp_avg_sq "):
        export(source, out, to=to)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    (source / "rank-00001.safetensors").write_bytes(content)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            CheckpointError, match=r"could not write .*out: .*No space left on device; nothing"
        ):
            export(source, out, to=to)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    leftover = tmp_path / ".out.unfinished" / "zero"
    leftover.mkdir(parents=True)
    (leftover / "old").write_text("of a process that was killed")
    with FolderLock(leftover.parent), pytest.raises(LaunchError, match="is being written by pid"):
        export(source, out, to=to)
    assert (leftover / "old").exists(), "it was another one's"
    export(source, out, to=to)
    assert not list(out.rglob("old"))
    assert not leftover.exists()


def test_settings_that_cannot_be_are_refused(source: Path, tmp_path: Path) -> None:
    arguments = {"path": str(source), "out": str(tmp_path / "out")}
    for wrong in ({}, {"to": Format.torch_dcp, "source_format": Format.torch_dcp}):
        with pytest.raises(ConfigError, match="set to=torch_dcp or to=deepspeed_universal, or source_format"):
            ConvertConfig(**arguments, **wrong)
    with pytest.raises(ConfigError, match="trust_pickle=True has no effect with to=torch_dcp; leave it out"):
        ConvertConfig(**arguments, to=Format.torch_dcp, trust_pickle=True)
    with pytest.raises(
        ConfigError, match=r"out=s3://a/b: checkpoints of other programs are read and written"
    ):
        run(ConvertConfig(path=str(source), out="s3://a/b", to=Format.torch_dcp))
    for source_format, message in (
        (Format.torch_dcp, r"is no checkpoint of torch_dcp: \.metadata is not there"),
        (
            Format.deepspeed_universal,
            "is no universal checkpoint: neither latest_universal nor zero/ is there",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            import_(tmp_path, tmp_path / "out", source_format=source_format, like=source)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").write_text("")
    with pytest.raises(ConfigError, match=r"out=.*out is not empty; name a folder that is not there yet"):
        export(source, tmp_path / "out", to=Format.torch_dcp)
    export(source, tmp_path / "dcp", to=Format.torch_dcp)
    with pytest.raises(ConfigError, match=f"{STATE_NAME} says everything that like="):
        import_(tmp_path / "dcp", tmp_path / "back", source_format=Format.torch_dcp, like=source)
    note = files.read_json(tmp_path / "dcp" / STATE_NAME)
    write_note(tmp_path / "dcp", note | {"format_version": 9})
    with pytest.raises(
        CheckpointError, match="has format=llmtrain state format_version=9, and this llmtrain"
    ):
        import_(tmp_path / "dcp", tmp_path / "back", source_format=Format.torch_dcp)
    export(source, tmp_path / "universal", to=Format.deepspeed_universal)
    with pytest.raises(ConfigError, match=r"prefix='model.' is of torch_dcp"):
        import_(
            tmp_path / "universal",
            tmp_path / "back",
            source_format=Format.deepspeed_universal,
            prefix="model.",
        )
    assert place_of("x").name == "x"


def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    pieces = [Piece("weight", "../../x", (2,), 0, np.zeros(2, np.float32))]
    path = write_checkpoint(tmp_path / "run", step=1, files=[pieces], state={}, config=SaveConfig())
    with pytest.raises(CheckpointError, match=r"weight '../../x' cannot be the name of a folder"):
        export(path, tmp_path / "out", to=Format.deepspeed_universal)
    assert {each.name for each in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("to", FORMATS)
def test_damage_of_a_converted_checkpoint_is_found(source: Path, tmp_path: Path, to: Format) -> None:
    export(source, tmp_path / "out", to=to)
    numbers = [*(tmp_path / "out").rglob("*.distcp"), *(tmp_path / "out").rglob("exp_avg.pt")]
    largest = max(numbers, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"does not have the numbers that llmtrain wrote: it is damaged"
    ):
        import_(tmp_path / "out", tmp_path / "back", source_format=to)
    note = tmp_path / "out" / STATE_NAME
    note.write_text(note.read_text().replace('"tokens": 4096', '"tokens": 4097'))
    with pytest.raises(CheckpointError, match=r"has sha256 .* without its own, and says .*: it is damaged"):
        import_(tmp_path / "out", tmp_path / "back", source_format=to)
    note.write_text("{")
    with pytest.raises(CheckpointError, match=rf"{STATE_NAME} cannot be read: Expecting property name"):
        import_(tmp_path / "out", tmp_path / "back", source_format=to)


def test_a_file_that_is_cut_is_named(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", to=Format.deepspeed_universal)
    file = next((tmp_path / "out").rglob("fp32.pt"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"fp32.pt cannot be read"):
        import_(tmp_path / "out", tmp_path / "back", source_format=Format.deepspeed_universal)
    torch.save({"other": 1}, file)
    with pytest.raises(CheckpointError, match=r"fp32.pt holds a dict, not a tensor"):
        import_(tmp_path / "out", tmp_path / "back", source_format=Format.deepspeed_universal)
