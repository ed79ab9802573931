"""Block lists of addresses: what is read, what is compared, what is blocked."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from llmtrain.data.content.config import UrlsConfig
from llmtrain.data.content.urls import BlockList, split_url
from llmtrain.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("url", "host", "path"),
    [
        ("https://www.Example.COM/a/b/?q=1#top", "example.com", "a/b"),
        ("http://user:word@example.com:8080/x", "example.com", "x"),
        ("//example.com", "example.com", ""),
        ("example.com./a%20b/%7Ejane", "example.com", "a b/~jane"),
        ("https://bücher.example/", "xn--bcher-kva.example", ""),
        ("https://xn--bcher-kva.example/", "xn--bcher-kva.example", ""),
        ("http://www.com/", "www.com", ""),
        ("http://[2001:db8::1]:80/a", "[2001:db8::1]:80", "a"),
        ("http://" + "ü" * 70 + ".example/", "ü" * 70 + ".example", ""),
        ("", "", ""),
    ],
)
def test_addresses_are_compared_in_one_form(url: str, host: str, path: str) -> None:
    assert split_url(url) == (host, path)


@pytest.fixture
def ut1(tmp_path: Path) -> Path:
    """Two categories in the layout of the University of Toulouse's lists."""
    for category, domains, urls in (
        ("adult", "bad.example\n# a comment\n\nWWW.worse.example\n192.0.2.7\n", "mixed.example/bad/\n"),
        ("gambling", "bücher.example\nco.example/ignored/path\n", "http://blog.example/~casino?x=1\n"),
    ):
        (tmp_path / category).mkdir()
        (tmp_path / category / "domains").write_text(domains, encoding="utf-8")
        (tmp_path / category / "urls").write_text(urls, encoding="utf-8")
        (tmp_path / category / "usage").write_text("not a list", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://bad.example", "domain bad.example"),
        ("https://a.b.bad.example/x", "domain bad.example"),
        ("https://worse.example/", "domain worse.example"),
        ("http://192.0.2.7/x", "domain 192.0.2.7"),
        ("http://xn--bcher-kva.example/", "domain xn--bcher-kva.example"),
        ("http://co.example/other", "domain co.example"),
        ("http://mixed.example/bad", "prefix mixed.example/bad"),
        ("http://www.mixed.example/bad/thing?q", "prefix mixed.example/bad"),
        ("http://blog.example/%7Ecasino/1", "prefix blog.example/~casino"),
    ],
)
def test_listed_addresses_are_blocked(ut1: Path, url: str, reason: str) -> None:
    blocked = BlockList.load(UrlsConfig(block=[str(ut1)]))
    assert blocked.reason(url) == reason
    assert blocked.blocked([url]).tolist() == [True]


@pytest.mark.parametrize(
    "url",
    [
        "http://notbad.example/",
        "http://bad.example.org/",
        "http://example/",
        "http://mixed.example/badly",
        "http://mixed.example/",
        "http://good.example/?next=bad.example",
        "",
        None,
    ],
)
def test_other_addresses_are_not(ut1: Path, url: str | None) -> None:
    assert not BlockList.load(UrlsConfig(block=[str(ut1)])).blocked([url])[0]


def test_plain_and_packed_lists_hold_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("one.example\r\ntwo.example/a\r\n", encoding="utf-8")
    (tmp_path / "more.gz").write_bytes(gzip.compress(b"three.example\n"))
    blocked = BlockList.load(UrlsConfig(block=[str(tmp_path)]))
    urls = ["http://one.example/b", "http://two.example/a/b", "http://two.example/b", "http://three.example"]
    assert blocked.blocked(urls).tolist() == [True, True, False, True]
    assert (blocked.domains, blocked.prefixes) == ({"one.example", "three.example"}, {"two.example/a"})


def test_words_match_whole_and_substrings_anywhere(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("Casino\nпоиск\n", encoding="utf-8")
    (tmp_path / "strings").write_text("poker-\nfree.stuff\n", encoding="utf-8")
    blocked = BlockList.load(
        UrlsConfig(words=[str(tmp_path / "words")], substrings=[str(tmp_path / "strings")])
    )
    assert blocked.reason("http://a.example/best_CASINO-2") == "word casino"
    assert blocked.reason("http://a.example/%D0%BF%D0%BE%D0%B8%D1%81%D0%BA") == "word поиск"
    assert blocked.reason("http://a.example/casinos") is None
    assert blocked.reason("http://videopoker-x.example/") == "substring poker-"
    assert blocked.reason("http://a.example/freeXstuff") is None
    assert blocked.reason("http://a.example/Free.Stuff") == "substring free.stuff"


def test_many_domains_cost_no_more_than_few() -> None:
    blocked = BlockList({f"site{number}.example" for number in range(100_000)}, set(), set(), [])
    assert blocked.blocked(["http://a.site99999.example/x", "http://site100000.example/"]).tolist() == [
        True,
        False,
    ]


def test_lists_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read /none/domains: No such file"):
        BlockList.load(UrlsConfig(block=["/none/domains"]))
    with pytest.raises(DataError, match=r"content\.urls\.block: the folder .* holds no files"):
        BlockList.load(UrlsConfig(block=[str(tmp_path)]))
    (tmp_path / "empty").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"content\.urls\.substrings=.* hold no entry"):
        BlockList.load(UrlsConfig(substrings=[str(tmp_path / "empty")]))
    (tmp_path / "words").write_text("two words\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"content\.urls\.words=.*: 'two words' is not one word"):
        BlockList.load(UrlsConfig(words=[str(tmp_path / "words")]))
