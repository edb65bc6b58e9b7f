"""The storage behind Xet uploads: files as lists of terms, each a run of chunks in a xorb.

A client cuts files into chunks of about 64 kB, sends the new chunks in xorbs (`put_xorb`), then a shard that says
which chunks make up which file (`put_shard`). To read, it asks for a file's terms and where their bytes are
(`reconstruction`) and puts the chunks together itself. The formats are those of https://huggingface.co/docs/xet.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

CHUNK_HEADER, RECORD = 8, 48  # bytes
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30  # flags of a file in a shard
END_OF_FILES = b"\xff" * 32


@dataclass(frozen=True)
class Chunk:
    start: int  # byte offsets in the xorb, header included
    end: int
    length: int  # bytes of content


@dataclass(frozen=True)
class Term:
    xorb: str
    first: int  # chunk indices, `last` excluded
    last: int
    length: int  # bytes of content


class XetStore:
    """Xorbs and the files made of them; the content of a whole file goes to `blobs` under its SHA-256.

    Attributes:
        hashes: the Xet hash of a file by its SHA-256.
    """

    def __init__(self, url: str, blobs: dict[str, bytes]) -> None:
        self.url, self.blobs = url, blobs
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, list[Term]] = {}
        self.hashes: dict[str, str] = {}

    def put_xorb(self, xorb: str, data: bytes) -> bool:
        new = xorb not in self.xorbs
        self.xorbs[xorb] = data
        return new

    def put_shard(self, shard: bytes) -> None:
        """A header, then per file: a record, its terms, their verification, its SHA-256; 48 bytes each."""
        at = RECORD
        while shard[at : at + 32] != END_OF_FILES:
            file, flags, count = hex_of(shard[at : at + 32]), *struct.unpack_from("<II", shard, at + 32)
            terms = []
            for place in range(at + RECORD, at + RECORD * (1 + count), RECORD):
                _, length, first, last = struct.unpack_from("<IIII", shard, place + 32)
                terms.append(Term(hex_of(shard[place : place + 32]), first, last, length))
            at += RECORD * (1 + count + (count if flags & WITH_VERIFICATION else 0))
            self.files[file] = terms
            if flags & WITH_METADATA:
                sha256 = hex_of(shard[at : at + 32])
                self.hashes[sha256] = file
                self.blobs[sha256] = b"".join(self.content(term) for term in terms)
                at += RECORD

    def chunks(self, xorb: str) -> list[Chunk]:
        """A chunk is a header (version, stored length, compression, content length) and its bytes."""
        data, chunks, at = self.xorbs[xorb], [], 0
        while at + CHUNK_HEADER <= len(data) and data[at] == 0:  # behind the chunks there may be a footer
            stored, compression = int.from_bytes(data[at + 1 : at + 4], "little"), data[at + 4]
            if compression:
                raise NotImplementedError("compressed chunks: set HF_XET_XORB_COMPRESSION_POLICY=none")
            end = at + CHUNK_HEADER + stored
            chunks.append(Chunk(at, end, int.from_bytes(data[at + 5 : at + 8], "little")))
            at = end
        return chunks

    def content(self, term: Term) -> bytes:
        data = self.xorbs[term.xorb]
        return b"".join(data[c.start + CHUNK_HEADER : c.end] for c in self.chunks(term.xorb)[term.first : term.last])

    def reconstruction(self, file: str, first_byte: int, last_byte: int) -> dict[str, Any] | None:
        """The chunks that hold a range of a file's bytes, and where they are; None behind the end of the file."""
        terms: list[dict[str, Any]] = []
        fetch: dict[str, list[dict[str, Any]]] = {}
        position, skipped = 0, 0
        for term in self.files[file]:
            chunks = self.chunks(term.xorb)
            wanted = []
            for index in range(term.first, term.last):
                start, position = position, position + chunks[index].length
                if start <= last_byte and position > first_byte:
                    wanted.append(index)
                    skipped = first_byte - start if not terms and len(wanted) == 1 else skipped
            if wanted:
                span = {"start": wanted[0], "end": wanted[-1] + 1}
                length = sum(chunks[index].length for index in wanted)
                bytes_of = {"start": chunks[wanted[0]].start, "end": chunks[wanted[-1]].end - 1}
                url = f"{self.url}/v1/xorbs/default/{term.xorb}"
                terms.append({"hash": term.xorb, "unpacked_length": length, "range": span})
                fetch.setdefault(term.xorb, []).append({"range": span, "url": url, "url_range": bytes_of})
        return {"offset_into_first_range": skipped, "terms": terms, "fetch_info": fetch} if terms else None


def hex_of(hash: bytes) -> str:
    """Xet writes a hash as four little-endian 64-bit numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hash))
