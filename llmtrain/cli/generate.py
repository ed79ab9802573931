"""`llmtrain generate checkpoint=runs/demo prompt="..."`: text from a checkpoint, printed as it is sampled."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from llmtrain.checkpoint.storage import place_of
from llmtrain.cli.compose import run_verb
from llmtrain.cli.restore import Precision, Restored, load_transformer
from llmtrain.data.tokenizer.tokenizer import Tokenizer
from llmtrain.errors import ConfigError
from llmtrain.inference.sampling import SamplingConfig, generate

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class GenerateRoot(SamplingConfig):
    checkpoint: str
    """A run folder (its newest whole checkpoint is taken), or one step's folder in its checkpoints/."""
    prompt: str = ""
    """Text to go on from. Without one the text starts from the tokenizer's BOS or else EOS."""
    num_samples: int = 1
    """Continuations of the prompt, each from a random stream of its own."""
    device: str | None = None
    """null: a GPU if there is one, else the CPU."""
    precision: Precision = Precision.fp32
    data_folder: str | None = None
    """Where the run's data folder lies now, for its tokenizer; null: where the run says."""
    save: bool = True
    """Whether the samples are added to samples.jsonl in the run folder, for the report."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1:
            raise ConfigError(f"num_samples={self.num_samples} must be at least 1")


def generate_text(cfg: GenerateRoot) -> None:
    """Print each sample as it grows, and say how fast it went."""
    loaded = load_transformer(
        place_of(cfg.checkpoint),
        data_folder=None if cfg.data_folder is None else Path(cfg.data_folder),
        device=cfg.device,
        precision=cfg.precision,
    )
    tokenizer = loaded.tokenizer
    prompt_ids = tokenizer.encode(cfg.prompt)
    if len(prompt_ids) == 0:
        log.warning("no prompt: the text starts from a token that the model was never trained to go on from")
    trained_len = loaded.state.get("config", {}).get("data", {}).get("seq_len")
    if trained_len is not None and len(prompt_ids) + cfg.max_new_tokens > trained_len:
        log.warning(
            "prompt and max_new_tokens are %d tokens, and the model was trained on rows of %d: "
            "expect worse text past those",
            len(prompt_ids) + cfg.max_new_tokens,
            trained_len,
        )
    if cfg.num_samples > 1 and cfg.temperature == 0:
        log.warning("temperature=0 always takes the same token: num_samples repeats one text")
    start_id = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    for number in range(cfg.num_samples):
        if cfg.num_samples > 1:
            print(f"--- sample {number + 1} of {cfg.num_samples}")
        print(cfg.prompt, end="", flush=True)
        begin, ids = time.perf_counter(), []
        new_ids = generate(
            loaded.model,
            prompt_ids.tolist(),
            cfg,
            eos_id=tokenizer.eos_id,
            start_id=start_id,
            stream_name=number,
        )
        for token, text in stream_text(tokenizer, prompt_ids.tolist(), new_ids):
            ids.append(token)
            print(text, end="", flush=True)
        spent_s = time.perf_counter() - begin
        print()
        log.info("%d tokens in %.2f s, %.0f tokens/s", len(ids), spent_s, len(ids) / spent_s)
        if cfg.save and loaded.run_folder is not None:
            _save_sample(cfg, loaded, tokenizer.decode([*prompt_ids.tolist(), *ids]))


def stream_text(
    tokenizer: Tokenizer, prompt_ids: list[int], new_ids: Iterable[int]
) -> Iterator[tuple[int, str]]:
    """Yield each new token with the text that is certain once it is there.

    A character may take several byte tokens, so text that ends in an unfinished one waits for the next token;
    the last token brings all that is left.
    """
    ids = list(prompt_ids)
    shown = len(tokenizer.decode(ids))
    waiting: int | None = None
    for token in new_ids:
        if waiting is not None:
            text = tokenizer.decode(ids)
            certain = text.rstrip("\N{REPLACEMENT CHARACTER}")
            yield waiting, certain[shown:]
            shown = max(shown, len(certain))
        ids.append(token)
        waiting = token
    if waiting is not None:
        yield waiting, tokenizer.decode(ids)[shown:]


def _save_sample(cfg: GenerateRoot, loaded: Restored, text: str) -> None:
    assert loaded.run_folder is not None, "only samples of a run are saved"
    record = {
        "prompt": cfg.prompt,
        "text": text.removeprefix(cfg.prompt),
        "step": loaded.step,
        **{each.name: getattr(cfg, each.name) for each in fields(SamplingConfig)},
        "time": time.time(),
    }
    path = loaded.run_folder / "samples.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        print(f"note: the sample was not added to {path}: {error.strerror}", file=sys.stderr)


def with_prompt_quoted(arguments: Sequence[str]) -> list[str]:
    """Quote the value of `prompt=`, so that commas, brackets and `${` in it are text and not Hydra's grammar.

    A value that already stands in quotes is left as it is.
    """
    return [_quote_prompt(argument) for argument in arguments]


def _quote_prompt(argument: str) -> str:
    name, equals, value = argument.partition("=")
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if name != "prompt" or not equals or is_quoted:
        return argument
    # Hydra undoes backslashes only in front of a quote, OmegaConf only in front of `${`.
    value = re.sub(r"(\\*)'", r"\1\1\'", value)
    value = re.sub(r"(\\+)$", r"\1\1", value)
    return f"prompt='{value.replace('${', chr(92) + '${')}'"


def main() -> None:
    sys.argv[1:] = with_prompt_quoted(sys.argv[1:])
    run_verb("generate", GenerateRoot, generate_text)
