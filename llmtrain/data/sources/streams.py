"""Bytes of a slice: read in order, hashed, and decompressed in bounded steps.

A file is what its name says (.gz, .zst, .bz2, .xz, else plain); one that holds something else is refused by
its first bytes. No step gives more than some MiB, whatever the input, and what grows beyond
corpus.max_expansion is given up.
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import zstandard

from llmtrain.data.sources.files import base_name, open_file
from llmtrain.data.sources.slices import BadInput, ChunkHasher, Digest, Slice

READ_BYTES = 1 << 20
COMPRESSED_READ_BYTES = 1 << 16
"""Small, because each member of a .gz (a record of a WARC) copies what is left of its block."""
STEP_BYTES = 1 << 20
"""The most that one step of gzip, bzip2 or xz gives."""
ZSTD_PIECE_BYTES = 1 << 10
"""What zstd gets at once: it has no bound on output, and 4 bytes may stand for a block of 128 KiB, so this
much gives 32 MiB at worst. Larger pieces are not faster (measured: 1,050 MB/s from 1 KiB on)."""
MAX_ZSTD_WINDOW = 1 << 31
"""The largest that zstd itself writes (`--ultra --long=31`); a frame says how much it needs."""
MAX_XZ_MEMORY = 256 << 20
"""Of the decoder; `xz -9` needs 65 MiB."""
EXPANSION_FLOOR_BYTES = 64 << 20
"""What any file may grow to, however small it is."""

PLAIN = "plain"
MAGIC = {
    ".gz": ("gzip", re.compile(rb"\x1f\x8b")),
    ".zst": ("zstd", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),  # or a skippable frame
    ".bz2": ("bzip2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")),
    ".xz": ("xz", re.compile(rb"\xfd7zXZ\x00")),
}
"""First bytes: RFC 1952; RFC 8878, sections 3.1.1 and 3.1.2; bzip2 (also of an empty stream); xz's
specification 1.2.1, section 2.1.1.1."""
MAGIC_BYTES = 10

_DECODER_ERRORS = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError, ValueError)
"""bz2 raises OSError and, for data behind its end, EOFError."""


def compression_of(path: str) -> str:
    """The suffix that says how a file is compressed, or PLAIN."""
    name = base_name(path).lower()
    return next((suffix for suffix in MAGIC if name.endswith(suffix)), PLAIN)


def compression_inside(first_bytes: bytes) -> str:
    """The suffix that fits to a file's first MAGIC_BYTES, or PLAIN."""
    return next((suffix for suffix, (_, magic) in MAGIC.items() if magic.match(first_bytes)), PLAIN)


class SliceBytes:
    """The raw bytes of a slice's file from `position` on, hashed on the way: `with SliceBytes(...) as raw`.
    When the block is left, what the hash still lacks is read.

    Raises:
        OSError: when opened or read, of a file on this machine.
    """

    def __init__(self, piece: Slice, digest: Digest, *, position: int = 0) -> None:
        self.path = piece.path
        self.compression = compression_of(piece.path)
        self.num_read = 0
        self._block_bytes = READ_BYTES if self.compression == PLAIN else COMPRESSED_READ_BYTES
        self._handle = open_file(piece.path, in_order=position == 0)
        if position:
            self._handle.seek(position)
        end = piece.end or 1 << 62  # a server that does not say the size
        self._hasher = ChunkHasher(digest, start=piece.start, end=end, position=position)

    def first_bytes(self) -> bytes:
        """What comes next, without going there: at least MAGIC_BYTES, if the file has them."""
        return self._handle.peek(MAGIC_BYTES)[:MAGIC_BYTES]

    def read(self) -> bytes:
        """The next block; empty at the end of the file."""
        block = self._handle.read(self._block_bytes)
        if block:
            self._hasher.update(block)
            self.num_read += len(block)
        else:
            self._hasher.finish()
        return block

    def __enter__(self) -> SliceBytes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None or issubclass(kind, BadInput):
                while self._hasher.wants_more and self.read():
                    pass
        finally:
            self._handle.close()


def blocks(raw: SliceBytes, *, is_start: bool, max_expansion: float) -> Iterator[bytes]:
    """The content in blocks of about READ_BYTES, decompressed.

    Args:
        is_start: whether `raw` begins with the first byte of the file.

    Raises:
        BadInput: the data is damaged, cut, not what its name says, or grows too much.
    """
    if raw.compression != PLAIN:
        yield from _decompressed(raw, max_expansion)
        return
    if is_start and (inside := compression_inside(raw.first_bytes())) != PLAIN:
        raise BadInput("corrupt_archive", f"it holds {MAGIC[inside][0]}, so its name should end in {inside}")
    while block := raw.read():
        yield block


def _decompressed(raw: SliceBytes, max_expansion: float) -> Iterator[bytes]:
    kind, magic = MAGIC[raw.compression]
    first = raw.first_bytes()
    if not magic.match(first):
        if not first:
            raise BadInput("truncated_archive", "an empty file")
        inside = MAGIC.get(compression_inside(first), ("something else",))[0]
        raise BadInput("corrupt_archive", f"its name says {kind}, its first bytes say {inside}")
    gathered: list[bytes] = []
    num_gathered = num_out = 0
    try:
        for out in _steps(raw):
            num_out += len(out)
            if num_out > max(EXPANSION_FLOOR_BYTES, max_expansion * raw.num_read):
                raise BadInput(
                    "zip_bomb",
                    f"{raw.num_read:,} bytes became {num_out:,}, more than {max_expansion:g} times as many; "
                    "raise corpus.max_expansion if that is right",
                )
            gathered.append(out)
            num_gathered += len(out)
            if num_gathered >= READ_BYTES:
                yield b"".join(gathered)
                gathered, num_gathered = [], 0
    except BadInput:
        if gathered:
            yield b"".join(gathered)
        raise
    if gathered:
        yield b"".join(gathered)


def _steps(raw: SliceBytes) -> Iterator[bytes]:
    """Outputs of bounded size, none of them empty."""
    new_decoder, run = _DECODERS[raw.compression]
    may_be_padding = raw.compression in (".gz", ".xz")
    decoder: Any = None
    num_members = 0
    block = raw.read()
    while block:
        if decoder is None:
            if num_members and may_be_padding:
                block = block.lstrip(b"\0")  # zeros behind a member, as gzip(1) and xz(1) skip them
            if block:
                decoder = new_decoder()
        if block:
            try:
                for out in run(decoder, block):
                    if out:
                        yield out
            except _DECODER_ERRORS as error:
                raise BadInput("corrupt_archive", str(error)) from error
            block = b""
            if decoder.eof:
                block = decoder.unused_data
                decoder = None
                num_members += 1
        block = block or raw.read()
    if decoder is not None:
        raise BadInput("truncated_archive", "the compressed data ends before its end mark")


def _run_gzip(decoder: Any, data: bytes) -> Iterator[bytes]:
    while True:
        out = decoder.decompress(data, STEP_BYTES)
        yield out
        data = decoder.unconsumed_tail
        if decoder.eof or (not data and len(out) < STEP_BYTES):
            return


def _run_blockwise(decoder: Any, data: bytes) -> Iterator[bytes]:
    """bz2 and lzma: what a full step leaves over stays in the decoder."""
    while True:
        yield decoder.decompress(data, STEP_BYTES)
        if decoder.eof or decoder.needs_input:
            return
        data = b""


class _ZstdDecoder:
    """zstandard's own, with the data behind a frame's end in one piece."""

    def __init__(self) -> None:
        self._inner = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompressobj()
        self.eof = False
        self.unused_data = b""

    def run(self, data: bytes) -> Iterator[bytes]:
        view = memoryview(data)
        for start in range(0, len(data), ZSTD_PIECE_BYTES):
            end = start + ZSTD_PIECE_BYTES
            yield self._inner.decompress(view[start:end])
            if self._inner.eof:
                self.eof = True
                self.unused_data = self._inner.unused_data + data[end:]
                return


_DECODERS: dict[str, tuple[Callable[[], Any], Callable[[Any, bytes], Iterator[bytes]]]] = {
    ".gz": (lambda: zlib.decompressobj(wbits=31), _run_gzip),
    ".zst": (_ZstdDecoder, _ZstdDecoder.run),
    ".bz2": (bz2.BZ2Decompressor, _run_blockwise),
    ".xz": (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY), _run_blockwise),
}
