"""Digests of files: by which algorithm, read once behind another reader, and those of manifests made before."""

import hashlib
import random
import threading
from pathlib import Path

import pytest
import xxhash

from megatron_sphinx.checkpoint.digests import FollowingDigests, algorithm_of, digest_of, is_as_written, sha256_of


def test_known_digests(tmp_path):
    """Those of nothing are in the documents of the algorithms."""
    path = tmp_path / "file"
    path.touch()
    assert digest_of(path) == "xxh3_128:99aa06d3014798d86001c324468d497f"
    assert sha256_of(path) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("algorithm", ["xxh3_128", "sha256"])
def test_a_file_is_known_by_either(tmp_path, algorithm):
    content = random.randbytes(random.randrange(1, 2**20))
    path = tmp_path / "file"
    path.write_bytes(content)
    digest = digest_of(path, algorithm)
    named = f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}"
    assert digest == (named if algorithm == "xxh3_128" else hashlib.sha256(content).hexdigest())
    assert algorithm_of(digest) == algorithm
    assert is_as_written(path, digest)
    place = random.randrange(len(content))
    path.write_bytes(content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :])
    assert not is_as_written(path, digest)


def test_digests_that_follow_readers_are_those_of_the_whole_files(tmp_path):
    """Several threads are at ends of their own, some before where the digest is and one behind the file's end."""
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(random.randbytes(random.randrange(3 * 2**18)))
    (tmp_path / "other").write_bytes(b"not asked for")
    digests = FollowingDigests({paths[0]: ["xxh3_128"], paths[1]: ["sha256", "xxh3_128"]})

    def follow(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            path = rng.choice([*paths, tmp_path / "other"])
            digests.advance(path, rng.randrange(path.stat().st_size + 2))

    threads = [threading.Thread(target=follow, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests.finish(paths[0]) == {"xxh3_128": digest_of(paths[0])}
    assert digests.finish(paths[1]) == {"sha256": sha256_of(paths[1]), "xxh3_128": digest_of(paths[1])}


def test_what_was_read_is_not_read_again(tmp_path):
    """The bytes are taken as they were when the digest came by."""
    path: Path = tmp_path / "file"
    path.write_bytes(b"a" * 1000)
    wanted = f"xxh3_128:{xxhash.xxh3_128_hexdigest(b'a' * 600 + b'b' * 400)}"
    digests = FollowingDigests({path: ["xxh3_128"]})
    digests.advance(path, 600)
    path.write_bytes(b"b" * 1000)
    assert digests.finish(path) == {"xxh3_128": wanted}
