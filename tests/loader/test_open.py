"""Several data folders behind one numbering, and the hash that a resume compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmtrain.data.config import Packing
from llmtrain.data.manifest import write_manifest
from llmtrain.errors import ConfigError, DataError
from llmtrain.loader.config import (
    LoaderConfig,
    LocalityConfig,
    ObjectiveConfig,
    ObjectiveKind,
    OnExhausted,
    SourceConfig,
    StageConfig,
    Verify,
)
from llmtrain.loader.dataset import Row, Rows
from llmtrain.loader.open import open_data, open_same

SEQ_LEN = 16
LENGTHS = {"web": [40, 3, 90, 17, 60, 5], "books": [200, 30], "code": [7] * 20}


@pytest.fixture
def corpora(make_corpus: Callable[..., Any]) -> dict[str, Any]:
    made = {}
    for number, (name, lengths) in enumerate(LENGTHS.items()):
        corpus = make_corpus(name, [lengths], seq_len=SEQ_LEN, seed=number)
        held_out = make_corpus(name, [[20, 20]], seq_len=SEQ_LEN, split="held_out", seed=number)
        shards = [*corpus.manifest.shards, *held_out.manifest.shards]
        manifest = replace(
            corpus.manifest, shards=shards, packs=[*corpus.manifest.packs, *held_out.manifest.packs]
        )
        write_manifest(corpus.folder, manifest)
        made[name] = replace(corpus, manifest=manifest)
    return made


def config(corpora: dict[str, Any], **changes: Any) -> LoaderConfig:
    values: dict[str, Any] = {
        "sources": {
            name: SourceConfig(folder=str(corpus.folder), weight=1.0) for name, corpus in corpora.items()
        },
        "seq_len": SEQ_LEN,
        "block_rows": 30,
    }
    return LoaderConfig(**(values | changes))


def test_global_rows_are_the_sources_rows_one_after_the_other(corpora: dict[str, Any]) -> None:
    data = open_data(config(corpora), seed=1)
    own = {name: Rows(c.folder, c.manifest, "train", SEQ_LEN) for name, c in corpora.items()}
    places = [(name, row) for name, rows in own.items() for row in range(rows.num_rows)]
    assert data.train.num_rows == len(places)
    assert data.train.num_target_tokens == sum(rows.num_target_tokens for rows in own.values())
    asked = np.random.default_rng(0).permutation(len(places))
    block = data.train.read_many(asked)
    for at, row in enumerate(asked.tolist()):
        name, number = places[row]
        assert data.train.place(row) == (name, number)
        one = own[name].read(number)
        for field in ("tokens", "targets", "positions", "segments"):
            assert (getattr(block, field)[at] == getattr(one, field)).all()
    with pytest.raises(DataError, match=rf"a mixture that has 0 to {len(places) - 1}"):
        data.train.read_many(np.array([len(places)]))


def test_equal_weights_give_equal_rows_of_unequal_sources(corpora: dict[str, Any]) -> None:
    data = open_data(config(corpora, max_epochs=99), seed=1)
    rows = data.order.rows_at(np.arange(300))
    names = [data.train.place(row)[0] for row in rows.tolist()]
    assert [names.count(name) for name in corpora] == [100] * 3


@pytest.mark.parametrize(
    "change",
    [
        {"sources": "weights"},
        {"sources": "fewer"},
        {"stages": [StageConfig(from_tokens=0, weights={"web": 1})]},
        {"on_exhausted": OnExhausted.redistribute},
        {"block_rows": 31},
        {"locality": LocalityConfig(group_rows=4, window_groups=2)},
        {"packing": Packing.best_fit},
    ],
)  # fmt: skip
def test_whatever_decides_a_row_is_in_the_hash(corpora: dict[str, Any], change: dict[str, Any]) -> None:
    base = config(corpora)
    if change.get("sources") == "weights":
        change = {"sources": base.sources | {"web": replace(base.sources["web"], weight=2.0)}}
    elif change.get("sources") == "fewer":
        change = {"sources": {name: base.sources[name] for name in ("web", "books")}}
    assert open_data(config(corpora, **change), seed=1).hash != open_data(base, seed=1).hash


def test_what_decides_no_row_is_not_in_the_hash(corpora: dict[str, Any]) -> None:
    base = open_data(config(corpora), seed=1)
    sources = {
        name: replace(source, weight=5.0, max_epochs=9.0) for name, source in config(corpora).sources.items()
    }
    unused = ObjectiveConfig(fim_rate=0.1, mask_rate=0.1)
    other = open_data(
        config(
            corpora, verify=Verify.touch, prefetch_steps=0, accept_changed=True, max_epochs=7.0,
            sources=sources, objective=unused,
        ),
        seed=2,
    )  # fmt: skip
    assert other.hash == base.hash, "the seed is compared by itself"
    assert (other.order.rows_at(np.arange(50)) != base.order.rows_at(np.arange(50))).any()


def test_one_source_is_one_folder(corpora: dict[str, Any]) -> None:
    folder = str(corpora["web"].folder)
    one = open_data(LoaderConfig(folder=folder, seq_len=SEQ_LEN, block_rows=5), seed=1)
    other = open_data(config({"web": corpora["web"]}), seed=1)
    assert one.hash == other.hash
    assert (one.order.rows_at(np.arange(99)) == other.order.rows_at(np.arange(99))).all()


def test_an_objective_needs_its_tokens_and_is_in_the_hash(corpora: dict[str, Any]) -> None:
    masked = ObjectiveConfig(kind=ObjectiveKind.masked_lm)
    with pytest.raises(ConfigError, match="needs the tokens mask"):
        open_data(config(corpora, objective=masked), seed=1)
    for corpus in corpora.values():
        special = replace(corpus.manifest.tokenizer, special_ids={"mask": 999})
        write_manifest(corpus.folder, replace(corpus.manifest, tokenizer=special))
    plain, seen = (open_data(config(corpora, **more), seed=1) for more in ({}, {"objective": masked}))
    assert plain.hash != seen.hash
    everything = np.arange(plain.train.num_rows)
    before, after = plain.train.read_many(everything), seen.train.read_many(everything)
    assert isinstance(after, Row)
    assert (after.tokens == 999).any()
    assert not (before.tokens == 999).any()
    held_out = seen.held_out.read_many(np.arange(seen.held_out.num_rows))
    assert not (held_out.tokens == 999).any(), "held-out rows stay causal"
    again = open_data(config(corpora, objective=masked), seed=2).train.read_many(everything)
    assert (again.tokens != after.tokens).any(), "another seed hides other tokens"


def test_two_levels_read_every_row_of_a_source_once_an_epoch(corpora: dict[str, Any]) -> None:
    only = {"web": corpora["web"]}
    data = open_data(config(only, locality=LocalityConfig(group_rows=3, window_groups=2)), seed=1)
    assert sorted(data.order.rows_at(np.arange(data.train.num_rows)).tolist()) == list(
        range(data.train.num_rows)
    )


def test_sources_of_different_tokenizers_are_refused(corpora: dict[str, Any]) -> None:
    corpus = corpora["code"]
    other = replace(corpus.manifest.tokenizer, fingerprint="e" * 64)
    write_manifest(corpus.folder, replace(corpus.manifest, tokenizer=other))
    with pytest.raises(DataError, match=r"was made with another tokenizer than .* tokenizer.path set to"):
        open_data(config(corpora), seed=1)


def test_a_rank_that_sees_other_files_than_rank_0_says_so(corpora: dict[str, Any]) -> None:
    cfg = config(corpora)
    expected = open_data(cfg, seed=1).hash
    assert open_same(cfg, seed=1, expected=expected).hash == expected
    with pytest.raises(DataError, match=f"has the hash {expected[:12]} here, and 000000000000 on rank 0"):
        open_same(cfg, seed=1, expected="0" * 64)


def test_weights_of_what_is_no_source_are_refused(corpora: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="unknown source of a mixture 'wiki'; known: books, code, web"):
        open_data(config(corpora, stages=[StageConfig(from_tokens=0, weights={"wiki": 1.0})]), seed=1)
