"""Block lists of addresses: domains, address prefixes, words and substrings. No list is shipped.

Reads the folder layout of the University of Toulouse's lists (UT1: a folder a category, with files named
`domains`, `urls` and sometimes `expressions`, the last not read), and plain lists, one entry a line, `#` for
comments. An address is looked up, not searched: once for each dot of its host and each slash of its path,
whatever the size of the lists. RefinedWeb (Penedo et al. 2023, arXiv:2306.01116, section G.1) filters on
domains and on words in addresses in this way.

Before they are compared, entries and addresses lose scheme, user, port, a leading `www.`, a dot at the
host's end, query and fragment; the host becomes lower case and punycode; percent-encoded letters of the path
are decoded.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from llmtrain.data.content.config import UrlsConfig
from llmtrain.data.content.files import open_text
from llmtrain.errors import ConfigError, DataError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|//")
_PORT = re.compile(r":\d*\Z")
_WORD = re.compile(r"[^\W_]+")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def _host(name: str) -> str:
    """A host as it is compared: lower case, punycode, without `www.` and a dot at its end."""
    name = name.lower().rstrip(".")
    if not name.isascii():
        with contextlib.suppress(UnicodeError):  # not a name that DNS could hold: compared as it is
            name = name.encode("idna").decode()
    return name.removeprefix("www.") if name.count(".") > 1 else name


def split_url(url: str) -> tuple[str, str]:
    """Host and path of an address in the form in which they are compared. The path has no slash at either
    end."""
    rest = url.strip()
    scheme = _SCHEME.match(rest)
    if scheme:
        rest = rest[scheme.end() :]
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, _, path = rest.partition("/")
    host = host.rpartition("@")[2]
    if not host.startswith("["):
        host = _PORT.sub("", host)
    return _host(host), unquote(path).strip("/")


class BlockList:
    """Which addresses are blocked."""

    def __init__(
        self, domains: set[str], prefixes: set[str], words: set[str], substrings: Iterable[str]
    ) -> None:
        self.domains, self.prefixes, self.words = domains, prefixes, words
        self.substrings = tuple(sorted(set(substrings)))
        self._substring = (
            re.compile("|".join(re.escape(one) for one in self.substrings)) if self.substrings else None
        )

    @classmethod
    def load(cls, cfg: UrlsConfig) -> BlockList:
        """Read the lists that `cfg` names.

        Raises:
            DataError: a list that is missing, damaged, or holds no entry.
        """
        domains: set[str] = set()
        prefixes: set[str] = set()
        for file in _list_files(cfg.block):
            for entry in _entries(file):
                host, path = split_url(entry)
                if not host:
                    continue
                if path and _bare_name(file) != "domains":
                    prefixes.add(f"{host}/{path}")
                else:
                    domains.add(host)
        words = {entry.casefold() for name in cfg.words for entry in _entries(Path(name))}
        for entry in words:
            if not _WORD.fullmatch(entry):
                raise ConfigError(
                    f"content.urls.words={cfg.words}: {entry!r} is not one word of letters and digits; "
                    "list it in a file of content.urls.substrings"
                )
        substrings = {entry.casefold() for name in cfg.substrings for entry in _entries(Path(name))}
        for setting, names, found in (
            ("block", cfg.block, len(domains) + len(prefixes)),
            ("words", cfg.words, len(words)),
            ("substrings", cfg.substrings, len(substrings)),
        ):
            if names and not found:
                raise DataError(
                    f"content.urls.{setting}={names} hold no entry; give files with one entry a line"
                )
        return cls(domains, prefixes, words, substrings)

    def reason(self, url: str) -> str | None:
        """The entry that blocks an address, or None."""
        host, path = split_url(url)
        if self.domains:
            at = 0
            while at >= 0:
                if host[at:] in self.domains:
                    return f"domain {host[at:]}"
                at = host.find(".", at) + 1 or -1
        if self.prefixes:
            parts = path.split("/")
            for num_parts in range(1, len(parts) + 1):
                prefix = f"{host}/{'/'.join(parts[:num_parts])}"
                if prefix in self.prefixes:
                    return f"prefix {prefix}"
        if self.words or self._substring:
            folded = f"{host}/{path}".casefold()
            for word in _WORD.findall(folded):
                if word in self.words:
                    return f"word {word}"
            found = self._substring.search(folded) if self._substring else None
            if found:
                return f"substring {found[0]}"
        return None

    def blocked(self, urls: Sequence[str | None]) -> npt.NDArray[np.bool_]:
        """Whether each address is blocked. A document without one is not."""
        return np.array([url is not None and self.reason(url) is not None for url in urls], dtype=np.bool_)


def _bare_name(path: Path) -> str:
    name = path.name
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return name


def _list_files(names: list[str]) -> Iterator[Path]:
    """The files named; of folders those called `domains` and `urls`, or all when none is."""
    for name in names:
        path = Path(name)
        if not path.is_dir():
            yield path
            continue
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        layout = [file for file in files if _bare_name(file) in ("domains", "urls")]
        if not files:
            raise DataError(f"content.urls.block: the folder {path} holds no files")
        yield from layout or files


def _entries(path: Path) -> Iterator[str]:
    for line in open_text(path):
        entry = line.strip()
        if entry and not entry.startswith("#"):
            yield entry
