"""Valid files, spoilt: what readers are fuzzed with."""

import random

_HARD = (b"[" * 500, b"nan", b"-1", b"9" * 20, b"null", b"*a", b"&a ", b"<<: ", b"\t", b"\xff", b"\x00", b"{}", b"[]",
         b"!!binary ", b'"', b"'", b": ", b"- ", b"\n", b"1e400", b"true", b"\xed\xa0\x80", b"? ")  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A file of which something is overwritten, left out, repeated, turned around, or becomes what is hard to read."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        begin = rng.randrange(len(data) + 1)
        end = min(len(data), begin + rng.choice([0, 1, 4, 20, 200]))
        part, hard = bytes(data[begin:end]), rng.choice(_HARD)
        data[begin:end] = rng.choice([b"", part * 2, hard, hard * 40, part[::-1], rng.randbytes(len(part))])
    return bytes(data)
