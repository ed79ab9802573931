"""From a run folder to figures and text: `llmtrain evaluate` and `llmtrain generate` on a small run."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import zstandard
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.write import ALONE, save_checkpoint
from llmtrain.cli.evaluate import EvaluateRoot, compressed_sizes, evaluate
from llmtrain.cli.generate import GenerateRoot, generate_text, stream_text, with_prompt_quoted
from llmtrain.cli.restore import Precision, load_transformer
from llmtrain.data.config import DataConfig, HeldOutConfig, PackConfig, TokenizerConfig
from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.manifest import read_manifest
from llmtrain.data.pipeline import run as run_data
from llmtrain.data.sources.config import CorpusConfig, Format
from llmtrain.data.tokenizer.load import load_tokenizer
from llmtrain.errors import CheckpointError, ConfigError, DataError
from llmtrain.files import plain
from llmtrain.model.config import ModelConfig
from llmtrain.model.init import build_transformer
from llmtrain.tracking.facts import record_start

SEQ_LEN = 64
VOCAB_SIZE = 320
WORDS = [
    "the",
    "model",
    "reads",
    "rows",
    "of",
    "tokens",
    "and",
    "learns",
    "which",
    "word",
    "follows",
    "another",
    "in",
    "plain",
    "text",
    "slowly",
]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    with open(folder / "texts.jsonl", "w", encoding="utf-8") as handle:
        for number in range(60):
            words = [*random.choice(WORDS, 60), f"número{number}", "naïve", "☃", str(number * 7919)]
            handle.write(json.dumps({"text": " ".join(random.permutation(words))}) + "\n")
    run_data(
        DataConfig(
            corpus=CorpusConfig(name="small", format=Format.jsonl, paths=[str(folder / "texts.jsonl")]),
            held_out=HeldOutConfig(fraction=0.3),
            tokenizer=TokenizerConfig(vocab_size=VOCAB_SIZE),
            pack=PackConfig(seq_lens=[SEQ_LEN]),
            engine=EngineConfig(kind=EngineKind.inline),
            out=str(folder / "out"),
        ),
        quiet=True,
    )
    return folder / "out"


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(data_folder: Path, tmp_path: Path) -> MakeRun:
    def make(*, steps: tuple[int, ...] = (4,), **state: Any) -> Path:
        """A run folder whose weights are initial ones, the seed being the step."""
        cfg = ModelConfig(
            vocab_size=VOCAB_SIZE, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, ffn_width=48
        )
        for step in steps:
            weights = build_transformer(cfg, seed=step).named_parameters()
            save_checkpoint(
                tmp_path / "run" / "checkpoints",
                step=step,
                pieces=[
                    Piece("weight", name, tuple(weight.shape), 0, weight.detach().flatten().numpy())
                    for name, weight in weights
                ],
                state={
                    "model": plain(cfg),
                    "data_folder": str(data_folder),
                    "tokenizer_fingerprint": read_manifest(data_folder).tokenizer.fingerprint,
                    "config": {"data": {"seq_len": SEQ_LEN, "packing": "concat"}},
                    **state,
                },
                ranks=ALONE,
                config=SaveConfig(keep_last=9),
            )
        return tmp_path / "run"

    return make


def test_a_run_folder_gives_its_newest_checkpoint_and_a_step_folder_that_step(make_run: MakeRun) -> None:
    run = make_run(steps=(4, 12))
    newest = load_transformer(run)
    assert (newest.step, newest.run_folder) == (12, run)
    older = load_transformer(run / "checkpoints" / "step-00000004")
    assert (older.step, older.run_folder) == (4, run)
    for loaded in (newest, older):
        expected = build_transformer(loaded.model.cfg, seed=loaded.step)
        for (name, ours), theirs in zip(loaded.model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    assert load_transformer(run, precision=Precision.bf16).model.embedding.weight.dtype == torch.bfloat16


def test_the_data_folder_is_found_from_where_the_run_was_started(
    make_run: MakeRun, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(data_folder=data_folder.name)
    with pytest.raises(
        DataError, match=r"data folder out is not at out; .* give its place as data_folder=FOLDER"
    ):
        load_transformer(run)
    monkeypatch.chdir(data_folder.parent)
    record_start(run, attempt=1)
    monkeypatch.chdir("/")
    assert load_transformer(run).data_folder == data_folder


def test_another_tokenizer_is_refused(make_run: MakeRun) -> None:
    run = make_run(tokenizer_fingerprint="0" * 64)
    with pytest.raises(
        DataError, match=r"was trained with the tokenizer of fingerprint 0{64}, and .* holds [0-9a-f]{64}"
    ):
        load_transformer(run)


def test_weights_of_another_shape_are_refused(make_run: MakeRun) -> None:
    run = make_run(
        model={
            "vocab_size": 320,
            "num_layers": 1,
            "d_model": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_width": 48,
        }
    )
    with pytest.raises(
        CheckpointError, match=r"does not fit the model: weight blocks\.1\..* is not part of this model"
    ):
        load_transformer(run)


def test_a_place_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere; give checkpoint=RUN_FOLDER"):
        load_transformer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no finished checkpoint in .*; has the run saved one yet?"):
        load_transformer(tmp_path)


def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over_in_a_run(make_run: MakeRun) -> None:
    run = make_run(steps=(4, 12))
    damaged = run / "checkpoints" / "step-00000012"
    content = bytearray((damaged / "rank-00000.safetensors").read_bytes())
    content[1000] ^= 1
    (damaged / "rank-00000.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is damaged"):
        load_transformer(damaged)
    assert load_transformer(run).step == 4


def test_a_device_that_is_not_there_is_named(make_run: MakeRun) -> None:
    with pytest.raises(
        ConfigError, match=r"device=abacus cannot be used: .*; set device=cpu or leave it out"
    ):
        load_transformer(make_run(), device="abacus")


def test_evaluate_pays_for_every_byte_and_compresses_the_same_bytes(
    make_run: MakeRun, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    evaluate(EvaluateRoot(checkpoint=str(run), micro_batch_rows=3))
    figures = json.loads((run / "evaluation.json").read_text())
    manifest = read_manifest(data_folder)
    with zstandard.open(data_folder / manifest.held_out_text, "rt", encoding="utf-8") as handle:
        texts = [json.loads(line)["text"] for line in handle]
    text = "".join(texts).encode()
    tokenizer = load_tokenizer(data_folder / manifest.tokenizer.path)
    assert figures["num_targets"] == sum(
        len(tokenizer.encode(each)) for each in texts
    )  # EOS is one, the first none
    assert figures["text_bytes"] == len(text)
    assert figures["held_out_loss"] == pytest.approx(
        math.log(VOCAB_SIZE), abs=0.1
    )  # an untrained model knows nothing
    bits = figures["held_out_loss"] * figures["num_targets"] / math.log(2) + len(texts) * math.log2(
        VOCAB_SIZE
    )
    assert figures["bits_per_byte"] == pytest.approx(bits / len(text))
    assert figures["gzip_bits_per_byte"] == pytest.approx(
        8 * len(gzip.compress(text, 9)) / len(text), rel=0.01
    )
    assert figures["xz_bits_per_byte"] == pytest.approx(
        8 * len(lzma.compress(text, preset=9)) / len(text), rel=0.01
    )
    printed = capsys.readouterr().out
    for word in ("perplexity", "bits per byte", "gzip -9", "xz -9", str(run / "evaluation.json")):
        assert word in printed.replace("\n", "")
    evaluate(EvaluateRoot(checkpoint=str(run), micro_batch_rows=8, out=str(run / "other.json")))
    other = json.loads((run / "other.json").read_text())
    assert other["held_out_loss"] == pytest.approx(figures["held_out_loss"], rel=1e-6)


def test_held_out_text_that_does_not_fit_the_shards_is_refused(
    make_run: MakeRun, data_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data_folder, copy)
    path = copy / read_manifest(copy).held_out_text
    run = make_run(data_folder=str(copy))
    path.write_bytes(zstandard.compress(b'{"id": "1", "text": "short"}\n'))
    with pytest.raises(DataError, match="holds 5 bytes of text, and the held-out shards encode"):
        evaluate(EvaluateRoot(checkpoint=str(run)))
    path.write_bytes(zstandard.compress(b'{"id": "1", "text": "short"}\n{"id"'))
    with pytest.raises(DataError, match=r"record 2: damaged: .*; run `llmtrain data` again"):
        compressed_sizes(path)


def test_generate_prints_what_it_saves(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    generate_text(
        GenerateRoot(checkpoint=str(run), prompt="the naïve ☃ ", max_new_tokens=30, num_samples=2, seed=1)
    )
    printed = capsys.readouterr().out
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["seed"] for sample in samples] == [1, 1]
    assert samples[0]["text"] != samples[1]["text"]
    assert printed == "".join(
        f"--- sample {number} of 2\nthe naïve ☃ {sample['text']}\n"
        for number, sample in enumerate(samples, start=1)
    )
    generate_text(GenerateRoot(checkpoint=str(run), prompt="the", max_new_tokens=3, save=False))
    assert len((run / "samples.jsonl").read_text().splitlines()) == 2


def test_generate_warns_where_text_will_be_poor(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    run = str(make_run())
    generate_text(GenerateRoot(checkpoint=run, max_new_tokens=70, temperature=0, num_samples=2, save=False))
    assert (
        "no prompt: the text starts from a token that the model was never trained to go on from"
        in caplog.text
    )
    assert "are 70 tokens, and the model was trained on rows of 64" in caplog.text
    assert "temperature=0 always takes the same token" in caplog.text


def test_a_character_of_several_tokens_is_printed_when_it_is_whole(data_folder: Path) -> None:
    tokenizer = load_tokenizer(data_folder / read_manifest(data_folder).tokenizer.path)
    prompt, rest = tokenizer.encode("the ").tolist(), tokenizer.encode("漢字 and 🜚").tolist()
    parts = list(stream_text(tokenizer, prompt, rest))
    assert [token for token, _ in parts] == rest
    assert "".join(text for _, text in parts) == "漢字 and 🜚"
    assert all("\N{REPLACEMENT CHARACTER}" not in text for _, text in parts)
    broken = list(stream_text(tokenizer, prompt, rest[:-1]))
    assert "".join(text for _, text in broken) == tokenizer.decode(prompt + rest[:-1])[4:]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Hello, world!",
        "def f(x={}, *y): [1]",
        'it\'s "so"',
        "back\\",
        "a\\'b",
        "${home} $x",
        "two\nlines",
        "a=b",
        " x ",
    ],
)
def test_any_prompt_reaches_the_model_as_it_was_typed(prompt: str) -> None:
    (argument,) = with_prompt_quoted([f"prompt={prompt}"])
    parsed = OverridesParser.create().parse_override(argument)
    value = parsed.value()
    assert OmegaConf.create({"prompt": value}).prompt == prompt


def test_other_arguments_and_quoted_prompts_are_left_alone() -> None:
    arguments = ["--cfg", "seed=1", "prompt", "prompt='a, b'", 'prompt="a"', "checkpoint=prompt=x"]
    assert with_prompt_quoted(arguments) == arguments


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_samples=0 must be at least 1"):
        GenerateRoot(checkpoint="x", num_samples=0)
    with pytest.raises(ConfigError, match="micro_batch_rows=0 must be at least 1"):
        EvaluateRoot(checkpoint="x", micro_batch_rows=0)


def test_the_command_prints_text_and_a_mistake_ends_in_one_line(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    generate = partial(
        forked.verb, *("generate", f"checkpoint={run}", "max_new_tokens=5"), cwd=tmp_path, server=forked.TORCH
    )
    done = generate("prompt=the, {model}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the, {model}")
    wrong = generate("top_p=2")
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "error: top_p=2.0 must be above 0 and at most 1; 1 switches it off"
