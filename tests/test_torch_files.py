"""Files as torch writes them, made and read without torch: torch must take ours, and we its."""

import io
import pickle
import random
import zipfile
from collections import OrderedDict
from hashlib import sha256
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_arrays import as_array, as_tensor, type_of

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.tensors.dtypes import BFLOAT16, FLOAT32, bytes_of
from megatron_sphinx.tensors.entries import MappedFiles
from megatron_sphinx.tensors.pickle_writer import dumps
from megatron_sphinx.tensors.read import is_intact, read_torch
from megatron_sphinx.tensors.write import SafetensorsFile, TorchFile

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.uint16,
    torch.float8_e4m3fn,
)  # fmt: skip


def drawn(rng: random.Random, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of random bytes, of 0 to 3 dimensions, sometimes empty."""
    shape = [rng.choice([0, 1, 2, 5, 7]) if rng.random() < 0.2 else rng.randint(1, 6) for _ in range(rng.randint(0, 3))]
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    content = np.frombuffer(rng.randbytes(prod(shape) * dtype.itemsize), type_of(dtype))
    return as_tensor(content.reshape(shape))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and bytes_of(as_array(one)) == bytes_of(as_array(other))
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("under", [None, "model"])
def test_torch_reads_what_is_written_without_it(tmp_path, seed, under):
    """In pieces, mapped and not; each tensor begins at a multiple of 64 bytes, as in its own files."""
    rng, path = random.Random(seed), tmp_path / "a.pth"
    tensors = {f"layer.{number}": drawn(rng, dtype) for number, dtype in enumerate(rng.sample(DTYPES, 5))}
    out = TorchFile(path, {name: (tuple(one.shape), type_of(one.dtype)) for name, one in tensors.items()}, under=under)
    names = list(tensors)
    rng.shuffle(names)
    for name in names:
        data = bytes_of(as_array(tensors[name]))
        cut = rng.randint(0, len(data))
        out.append(name, data[:cut])
        out.append(name, data[cut:])
    out.close()
    for is_mapped in (False, True):
        found = torch.load(path, weights_only=True, mmap=is_mapped)
        found = found[under] if under else found
        assert found.keys() == tensors.keys()
        assert all(same(found[name], value) for name, value in tensors.items())
    assert is_intact(path)
    ours, maps = read_torch(path), MappedFiles()
    assert all(same(as_tensor(maps.read(ours[name])), value) for name, value in tensors.items())
    assert all(entry.chunks[0].start % 64 == 0 for entry in ours.values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_writes_is_read_without_it(tmp_path, seed, protocol):
    """Tensors that are transposed, cut out of others, share memory, or are parameters of a module."""
    rng, path = random.Random(seed), tmp_path / "a.pth"
    tensors = {f"{number}": drawn(rng, dtype) for number, dtype in enumerate(DTYPES)}
    whole = torch.randn(6, 8)
    tensors |= {"whole": whole, "part": whole[2:, 1:7:2], "turned": whole.T, "parameter": torch.nn.Parameter(whole[1])}
    saved = OrderedDict(tensors)
    saved._metadata = OrderedDict(version=1)  # as state dicts of modules have it
    torch.save({"model": saved, "epoch": 3} if seed % 2 else saved, path, pickle_protocol=protocol)
    found, maps = read_torch(path), MappedFiles()
    assert found.keys() == tensors.keys()
    assert all(same(as_tensor(maps.read(entry)), tensors[name].detach()) for name, entry in found.items())


def test_a_file_beyond_four_gigabytes_has_places_of_64_bits(tmp_path):
    """Most of it is a hole, which takes no room on the disk."""
    path, small = tmp_path / "large.pth", torch.arange(5.0)
    size = 2**32 + 9
    out = TorchFile(path, {"large": ((size,), np.dtype(np.uint8)), "small": ((5,), FLOAT32)})
    out.put("small", as_array(small))
    out.close()
    assert path.stat().st_size > size
    found = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(found["small"], small)
    assert found["large"].shape == (size,)
    assert torch.equal(as_tensor(MappedFiles().read(read_torch(path)["small"])), small)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == size


def test_every_byte_is_seen_in_order_where_there_is_one_tensor(tmp_path):
    value, digest = torch.randn(300, 7), sha256()
    out = TorchFile(tmp_path / "a.distcp", {"a": ((300, 7), FLOAT32)}, is_bare=True)
    assert out.watch(digest.update)
    out.put("a", as_array(value[:100]))
    out.put("a", as_array(value[100:]))
    out.close()
    assert digest.hexdigest() == sha256((tmp_path / "a.distcp").read_bytes()).hexdigest()
    assert torch.equal(torch.load(tmp_path / "a.distcp", weights_only=True), value)
    contents = {"a": ((3,), FLOAT32), "b": ((3,), BFLOAT16)}
    assert not TorchFile(tmp_path / "b.pth", contents).watch(digest.update)
    assert not SafetensorsFile(tmp_path / "c.safetensors", contents).watch(digest.update)


def test_what_cannot_be_pickled_here_is_named():
    with pytest.raises(TypeError, match="float: cannot be written here; give plain values"):
        dumps({"a": 0.5})


@pytest.mark.parametrize("value", [None, True, False, 0, 255, 256, -1, -(2**31), 2**31, 2**80, "ü", (1, ()), [{}, [2]]])
def test_plain_values_come_back_as_they_were(value):
    assert pickle.loads(dumps({"key": value})) == {"key": value}


# what is refused


def archive_of(path: Path, **changes: bytes | None) -> None:
    """A file of torch.save with records replaced or left out."""
    saved = io.BytesIO()
    torch.save({"a": torch.ones(4)}, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            key = name.partition("/")[2].replace("/", "_").replace(".", "_")
            if changes.get(key, b"") is not None:
                target.writestr(name, changes.get(key, source.read(name)))


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as found:
        read_torch(path)
    assert "\n" not in str(found.value)


def test_an_archive_that_is_not_whole_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    archive_of(path)
    assert read_torch(path).keys() == {"a"}
    archive_of(path, data_pkl=None)
    refused(path, "cannot be read as a torch checkpoint .it has no data.pkl.; fetch it again")
    archive_of(path, data_0=None)
    refused(path, "it has no record data/0")
    archive_of(path, data_0=b"12345678")
    refused(path, "'?a'? lies behind the end of the file; fetch it again")
    archive_of(path, byteorder=b"big")
    refused(path, "its numbers are not little-endian")
    archive_of(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    refused(path, "it is a program of TorchScript")


def test_a_file_of_something_else_than_tensors_by_name_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save([torch.ones(4)], path)
    refused(path, "a.pth: holds no tensors by name; give a checkpoint of a model")
    torch.save({"model": {"a": torch.ones(4), "step": 3}}, path)
    refused(path, "a.pth: step is no tensor; give a checkpoint of a model")


def test_a_record_that_is_not_where_the_list_says_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    archive_of(path)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("archive/data/0").header_offset
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + b"XX" + whole[place + 2 :])
    refused(path, "its record data/0 is not where it is said to be")


def test_a_compressed_archive_is_refused(tmp_path):
    saved, path = io.BytesIO(), tmp_path / "a.pth"
    torch.save({"a": torch.ones(4)}, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    refused(path, r"its record data.pkl is compressed or encrypted")


def test_the_old_format_is_named(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    refused(path, "it is of the old format of torch.save, which cannot be read in parts: save it again")


def test_a_pickle_that_says_too_much_is_refused(tmp_path):
    """A tensor beyond its storage, and one whose storage is none."""
    path, pickled = tmp_path / "a.pth", io.BytesIO()
    torch.save({"a": torch.ones(4)}, pickled)
    with zipfile.ZipFile(pickled) as archive:
        content = archive.read("archive/data.pkl")
    shape, stride = b"K\x04\x85", b"K\x01\x85"
    assert content.count(shape) == 1
    archive_of(path, data_pkl=content.replace(shape, b"K\x05\x85"))
    refused(path, "5 elements from 0 on are out of bounds for a storage of 16 bytes")
    archive_of(path, data_pkl=content.replace(stride, b"K\x02\x85"))
    refused(path, "7 elements from 0 on are out of bounds for a storage of 16 bytes")
    archive_of(path, data_pkl=content.replace(b"X\x01\x00\x00\x000", b"K\x00"))
    refused(path, "is no place of a tensor")
    archive_of(path, data_pkl=content.replace(b"X\x07\x00\x00\x00storage", b"N"))
    assert read_torch(path).keys() == {"a"}, "the word itself says nothing"
