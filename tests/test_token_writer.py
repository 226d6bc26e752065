"""Token files as they are written: what megatron-core writes, byte by byte, or nothing at all."""

from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_sphinx.data.text import content_of
from megatron_sphinx.data.tokenizer import TokenizerIdentity
from megatron_sphinx.prepare.token_writer import TokenWriter


def tokenizer_of(vocabulary):
    return SimpleNamespace(identity=TokenizerIdentity(vocabulary, "ab"))


@pytest.mark.parametrize("vocabulary", [300, 65_499, 65_500, 151_936])
@pytest.mark.parametrize("documents", [0, 1, 50])
def test_both_files_are_those_of_megatron(tmp_path, vocabulary, documents):
    rng = np.random.default_rng(documents)
    tokenizer = tokenizer_of(vocabulary)
    texts = [rng.integers(0, vocabulary, rng.integers(0, 200)) for _ in range(documents)]
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=tokenizer.identity.token_type.type)
    with TokenWriter(tmp_path / "ours", tokenizer) as writer:
        for number, text in enumerate(texts):
            writer.add(text.tolist() if number % 2 else text.astype(np.int32))
            theirs.add_document(text, [len(text)])
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    assert writer.content() == (content_of(tmp_path / "theirs") if documents else None)


def test_after_an_error_nothing_is_there(tmp_path):
    (tmp_path / "t.bin").write_bytes(b"of before")
    with pytest.raises(OverflowError), TokenWriter(tmp_path / "t", tokenizer_of(300)) as writer:
        writer.add([1, 2**70])
    assert [path.name for path in tmp_path.iterdir()] == ["t.bin"]
    assert (tmp_path / "t.bin").read_bytes() == b"of before"
