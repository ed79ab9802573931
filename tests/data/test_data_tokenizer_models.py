"""Models of every make: ids are SentencePiece's own, looked up or not."""

from __future__ import annotations

import gzip
import io
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from llmtrain.bench._documents import SENTENCES, documents
from llmtrain.data.config import TokenizerConfig, TokenizerModel
from llmtrain.data.tokenizer.huggingface import HuggingFaceTokenizer
from llmtrain.data.tokenizer.load import load_tokenizer
from llmtrain.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from llmtrain.data.tokenizer.train import train_tokenizer
from llmtrain.data.tokenizer.words import WordEncoder, why_not_exact
from llmtrain.errors import ConfigError, DataError

CORPORA = Path(__file__).parents[3] / "shared" / "corpora"

STYLES: dict[str, dict[str, Any]] = {
    "llama2": {"normalization_rule_name": "identity", "byte_fallback": True, "split_digits": True},
    "nfkc": {"normalization_rule_name": "nmt_nfkc", "byte_fallback": True},
    "as_it_is": {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "byte_fallback": True},
    "prefix_only": {
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    },
    "suffix": {"treat_whitespace_as_suffix": True, "byte_fallback": True},
    "symbols": {"user_defined_symbols": ["<user>", "the "], "byte_fallback": True},
    "case": {"normalization_rule_name": "nfkc_cf", "byte_fallback": True},
    "no_split": {"split_by_whitespace": False, "split_by_unicode_script": False, "byte_fallback": True},
}
"""Options of models that others made."""


def trained(model_type: str = "bpe", vocab_size: int = 900, **options: Any) -> SentencePieceTokenizer:
    model = io.BytesIO()
    lines = [line for text in documents(400, seed=5) for line in text.replace("\0", " ").split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=model_type, vocab_size=vocab_size,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="module", params=[*STYLES, "ours", "ours with symbols"])
def model(request: pytest.FixtureRequest) -> SentencePieceTokenizer:
    if request.param in STYLES:
        return trained(**STYLES[request.param])
    symbols = ["<user>", "  the"] if "symbols" in request.param else []
    cfg = TokenizerConfig(vocab_size=900, user_symbols=symbols, fim=True, num_sentinels=3)
    return SentencePieceTokenizer(train_tokenizer(documents(400, seed=5), cfg))


def looked_up(encoder: WordEncoder, texts: list[str]) -> list[list[int]]:
    raw = [text.encode() for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in raw])]).astype(np.int64)
    ids, lengths = encoder.encode(np.frombuffer(b"".join(raw), dtype=np.uint8), offsets)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    found = [ids[a:b].tolist() for a, b in pairwise(ends)]
    assert all(each[-1] == encoder.tokenizer.eos_id for each in found)
    return [each[:-1] for each in found]


def test_words_of_every_bpe_model_are_exact(model: SentencePieceTokenizer) -> None:
    assert why_not_exact(model) is None
    texts = documents(600, seed=1)
    expected = model.processor.encode(texts)
    assert looked_up(WordEncoder(model), texts) == expected
    assert [ids.tolist() for ids in model.encode_batch(texts)] == expected


@given(
    st.lists(st.text(alphabet="the <user> \u2581\ufdd0\ufdd1A\uff21\ufb01\n\x00é", max_size=30), max_size=5)
)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_words_of_every_bpe_model_are_exact_on_any_text(
    model: SentencePieceTokenizer, texts: list[str]
) -> None:
    assert looked_up(WordEncoder(model), texts) == model.processor.encode(texts)


def test_decoding_gives_back_the_normalised_text(model: SentencePieceTokenizer) -> None:
    for text in documents(300, seed=2):
        assert model.decode(model.encode(text)) == model.normalise(text)


def test_20_000_documents_in_16_languages_have_sentencepieces_ids() -> None:
    cfg = TokenizerConfig(vocab_size=4000)
    model = SentencePieceTokenizer(train_tokenizer(documents(3000, seed=7), cfg))
    texts = documents(20_000, seed=0)
    assert len(SENTENCES) >= 10
    found = looked_up(WordEncoder(model), texts)
    expected = model.processor.encode(texts)
    assert sum(a != b for a, b in zip(found, expected, strict=True)) == 0
    assert [model.decode(ids) for ids in found[:2000]] == texts[:2000]


@pytest.mark.slow
@pytest.mark.skipif(not CORPORA.is_dir(), reason="the corpora of real text are not there")
def test_real_text_in_500_languages_has_sentencepieces_ids() -> None:
    texts = []
    for name in ("udhr_languages", "peps", "shakespeare", "rust_book"):
        with gzip.open(CORPORA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as handle:
            texts += [json.loads(line)["text"] for line in handle]
    texts += gzip.decompress((CORPORA / "wagahai_ja.txt.gz").read_bytes()).decode().split("\n")
    for vocab_size in (2000, 16_000):
        sample = texts[::5]
        model = SentencePieceTokenizer(train_tokenizer(sample, TokenizerConfig(vocab_size=vocab_size)))
        expected = model.processor.encode(texts)
        assert sum(a != b for a, b in zip(looked_up(WordEncoder(model), texts), expected, strict=True)) == 0
        assert all(model.decode(ids) == text for ids, text in zip(expected, texts, strict=True))


def test_models_that_words_are_not_exact_for_say_why() -> None:
    assert "Unigram" in str(why_not_exact(trained("unigram", vocab_size=600)))
    assert "no byte fallback" in str(why_not_exact(trained(vocab_size=600)))
    proto = sentencepiece_model_pb2.ModelProto()
    proto.CopyFrom(trained(byte_fallback=True).proto)
    proto.pieces[300].type = proto.SentencePiece.UNUSED
    unused = SentencePieceTokenizer(proto.SerializeToString())
    assert "1 of its pieces are marked as unused" in str(why_not_exact(unused))
    spaces = trained(byte_fallback=True).proto
    spaces.normalizer_spec.escape_whitespaces = False
    assert "escape_whitespaces=false" in str(
        why_not_exact(SentencePieceTokenizer(spaces.SerializeToString()))
    )


def test_a_unigram_model_gives_sentencepieces_ids_and_the_very_text() -> None:
    cfg = TokenizerConfig(vocab_size=900, model_type=TokenizerModel.unigram)
    model = SentencePieceTokenizer(train_tokenizer(documents(300, seed=3), cfg))
    assert model.kind == "sentencepiece_unigram"
    texts = documents(300, seed=4)
    assert [ids.tolist() for ids in model.encode_batch(texts)] == model.processor.encode(texts)
    assert [model.decode(ids) for ids in model.encode_batch(texts)] == texts


def test_the_trained_normaliser_is_known_by_its_bytes() -> None:
    """If it changes with SentencePiece, encoding is as right as before, and slower."""
    model = SentencePieceTokenizer(train_tokenizer(documents(300, seed=3), TokenizerConfig(vocab_size=900)))
    assert model.escapes, ESCAPE_HINT
    assert model.is_plain


ESCAPE_HINT = "put the new sha256 of normalizer_spec.precompiled_charsmap into ESCAPE_CHARSMAP_SHA256"


def test_a_model_holds_no_path_of_where_it_was_trained() -> None:
    content = train_tokenizer(documents(300, seed=3), TokenizerConfig(vocab_size=900))
    assert b".tsv" not in content


def test_special_ids_are_as_they_were_asked_for() -> None:
    cfg = TokenizerConfig(
        vocab_size=900, unk_id=3, eos_id=0, bos_id=1, pad_id=2, fim=True, mask=True, num_sentinels=2,
        user_symbols=["<|im_start|>"],
    )  # fmt: skip
    model = SentencePieceTokenizer(train_tokenizer(documents(300, seed=3), cfg))
    assert (model.unk_id, model.eos_id, model.bos_id, model.pad_id) == (3, 0, 1, 2)
    assert sorted(model.special_ids) == [
        "fim_middle",
        "fim_prefix",
        "fim_suffix",
        "mask",
        "sentinel_0",
        "sentinel_1",
    ]
    assert [model.processor.id_to_piece(id_) for id_ in model.special_ids.values()] == [
        "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<mask>", "<extra_id_0>", "<extra_id_1>"
    ]  # fmt: skip
    text = "a<|im_start|>b <fim_prefix> <mask>"
    ids = model.encode(text).tolist()
    assert ids.count(model.processor.piece_to_id("<|im_start|>")) == 1
    assert not set(ids) & set(model.special_ids.values())
    assert model.decode(ids) == text


def test_a_long_line_is_learned_from() -> None:
    """SentencePiece's own bound would skip it, and a word at its end with it."""
    drawn = random.Random(0)
    filler = "".join(drawn.choices("abcdefghij ", k=3_000_000))
    line = f"{filler} {'quixotry ' * 3000}"
    cfg = TokenizerConfig(vocab_size=400)
    model = SentencePieceTokenizer(train_tokenizer([line], cfg))
    assert len(model.encode(" quixotry")) == 1


def test_ids_that_do_not_come_first_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unk_id=0, eos_id=2, bos_id=None and pad_id=None must be 0 to 1"):
        TokenizerConfig(eos_id=2)
    with pytest.raises(ConfigError, match=r"vocab_size=270 must be at least 272: 271 pieces are fixed"):
        TokenizerConfig(vocab_size=270, num_sentinels=13)
    with pytest.raises(ConfigError, match=r"user_symbols=\['a', 'a'\] must be different and not empty"):
        TokenizerConfig(user_symbols=["a", "a"])
    with pytest.raises(ConfigError, match=r"source_weights=\{'a': 0.0\} must be positive, or 0"):
        TokenizerConfig(source_weights={"a": 0.0})
    with pytest.raises(ConfigError, match=r"given_eos_id=3 is for a model of tokenizer.path"):
        TokenizerConfig(given_eos_id=3)
    with pytest.raises(ConfigError, match=r"num_sentinels=-1 at least 0"):
        TokenizerConfig(num_sentinels=-1)


def test_an_end_is_asked_for_where_a_model_has_none(tmp_path: Path) -> None:
    proto = trained(byte_fallback=True).proto
    proto.trainer_spec.eos_id = -1
    for piece in proto.pieces:
        if piece.piece == "</s>":
            piece.piece = "<end>"
    path = tmp_path / "some.model"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(DataError, match=r"has no piece that ends a document .* as tokenizer.given_eos_id"):
        load_tokenizer(path)
    assert load_tokenizer(path, eos_id=2).eos_id == 2
    path.write_bytes(trained(byte_fallback=True).proto.SerializeToString())
    with pytest.raises(DataError, match="ends documents with id 2, and 5 was given; leave that out"):
        load_tokenizer(path, eos_id=5)


def test_models_of_words_are_refused() -> None:
    with pytest.raises(DataError, match="has model_type 3; known are"):
        trained("word", vocab_size=100)


# Hugging Face.


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE as GPT-2's, with special tokens, written by the library itself."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(documents(300, seed=3), trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    return folder


def test_a_tokenizer_json_is_behind_the_same_interface(byte_level: Path) -> None:
    model = load_tokenizer(byte_level)
    assert isinstance(model, HuggingFaceTokenizer)
    assert (model.kind, model.vocab_size, model.eos_id, model.bos_id) == ("huggingface", 600, 0, None)
    assert model.special_ids == {"fim_prefix": 1, "fim_middle": 2, "fim_suffix": 3}
    plain = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    for text in documents(200, seed=8):
        ids = model.encode(text)
        assert ids.tolist() == plain.encode(text, add_special_tokens=False).ids
        assert model.decode(ids) == text
        assert b"".join(model.pieces(ids)) == text.encode()


def test_special_tokens_in_a_text_stay_text(byte_level: Path) -> None:
    model = load_tokenizer(byte_level)
    text = "a<|endoftext|>b<|fim_prefix|>"
    ids = model.encode(text)
    assert not set(ids.tolist()) & {0, 1, 2, 3}
    assert model.decode(ids) == text
    assert model.pieces(np.array([0])) == [b""]
    assert str(why_not_exact(model)) == "it is a huggingface tokenizer"


def test_a_tokenizer_json_that_does_not_say_its_end_is_refused(byte_level: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes((byte_level / "tokenizer.json").read_bytes())
    with pytest.raises(
        DataError, match=r"does not say which token ends a document: put tokenizer_config.json"
    ):
        load_tokenizer(path)
    assert load_tokenizer(path, eos_id=0).eos_id == 0
    path.write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer(path)
