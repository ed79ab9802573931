"""A tokenizer from its folder or its file."""

from __future__ import annotations

from pathlib import Path

from llmtrain.data.tokenizer.huggingface import JSON_NAME, HuggingFaceTokenizer
from llmtrain.data.tokenizer.sentencepiece_model import MODEL_NAME, SentencePieceTokenizer
from llmtrain.data.tokenizer.tokenizer import FACTS_NAME, Tokenizer
from llmtrain.errors import DataError
from llmtrain.files import read_json


def model_file(path: Path) -> Path:
    """The one file that is the model, in a folder or given as it is."""
    for name in (MODEL_NAME, JSON_NAME):
        if (path / name).is_file():
            return path / name
    if path.is_file():
        return path
    raise DataError(
        f"no tokenizer at {path}; run `llmtrain data` first, or give a {MODEL_NAME} of SentencePiece, a "
        f"{JSON_NAME}, or the folder of one"
    )


def load_tokenizer(path: Path, *, eos_id: int | None = None) -> Tokenizer:
    """Load a tokenizer, and compare it with its recorded fingerprint where there is one.

    Args:
        eos_id: the token that ends a document, for a model that does not say. One that `llmtrain data` wrote
            down in `facts.json` is used without it.
    """
    model = model_file(path)
    facts_path = model.with_name(FACTS_NAME)
    mend = f"delete {model.parent} and run `llmtrain data` again, or restore the file"
    recorded = None
    if facts_path.is_file():
        try:
            facts = read_json(facts_path)
            recorded, eos_id = facts["fingerprint"], facts.get("given_eos_id", eos_id)
        except (ValueError, KeyError) as error:
            raise DataError(f"{facts_path} is damaged ({error!r}); {mend}") from error
    kind = HuggingFaceTokenizer if model.suffix == ".json" else SentencePieceTokenizer
    tokenizer: Tokenizer = kind.load(model, eos_id=eos_id)
    if recorded is not None and recorded != tokenizer.fingerprint:
        raise DataError(
            f"{model} is damaged: its sha256 is {tokenizer.fingerprint}, {FACTS_NAME} says {recorded}; {mend}"
        )
    return tokenizer
