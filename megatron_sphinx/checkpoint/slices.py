"""Slices of whole tensors, written and read by torch.distributed.checkpoint, and small objects beside them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_sphinx.checkpoint.weight_names import MASTER, weight_shapes
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.saved import DistributedMetadata, SavedWhole
from megatron_sphinx.unpickling import load_torch, metadata_of, only_tensors

if TYPE_CHECKING:  # tools read checkpoints without megatron-core, whose import takes seconds
    from megatron_sphinx.model.shards import Block


@dataclass(frozen=True)
class TensorSlice:
    """A box of a whole tensor that a rank keeps.

    Attributes:
        name: name of the whole tensor.
        whole: shape of the whole tensor.
        block: where the slice lies in it.
        values: the slice, of the block's shape.
    """

    name: str
    whole: tuple[int, ...]
    block: Block
    values: Tensor


class SavePlanner(DefaultSavePlanner):
    """Tells torch.distributed.checkpoint which slices, and which small objects by name, a rank writes.

    torch's own planner takes a state dict of tensors as torch.distributed shards them; our slices are boxes of
    tensors that no rank holds whole. So the plan is made here, of the classes that torch's planner makes its own of.
    """

    def __init__(self, slices: Iterable[TensorSlice], objects: dict[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.slices = {MetadataIndex(one.name, torch.Size(one.block.offset)): one for one in slices}
        self.objects = {MetadataIndex(name): value for name, value in objects.items()}

    def create_local_plan(self) -> SavePlan:
        """Tell torch what this rank writes."""
        items = [WriteItem(index=index, type=WriteItemType.BYTE_IO) for index in self.objects]
        for index, one in self.slices.items():
            data = TensorWriteData(
                chunk=_chunk(one),
                properties=TensorProperties.create_from_tensor(one.values),
                size=torch.Size(one.whole),
            )
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Give torch what it is about to write."""
        one = self.slices.get(index)
        return one.values if one is not None else self.objects[index]


class CheckedPlanner(DefaultLoadPlanner):
    """Reads small objects as data; torch's own planner would unpickle them without limits."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a small object."""
        self.state_dict[read_item.dest_index.fqn] = load_torch(value)


class LoadPlanner(CheckedPlanner):
    """Tells torch which slices are to be filled, and returns small objects by name.

    Args:
        slices: what is filled.
        objects: names of the small objects.
        source: how messages call the checkpoint.
    """

    def __init__(self, slices: Iterable[TensorSlice], objects: Iterable[str], source: str) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.slices = {MetadataIndex(one.name, torch.Size(one.block.offset)): one for one in slices}
        self.objects, self.source = list(objects), source

    def create_local_plan(self) -> LoadPlan:
        """Tell torch what this rank reads.

        Raises:
            CheckpointError: the checkpoint lacks a tensor, or has it in another shape.
        """
        assert self.metadata is not None
        by_name: dict[str, list[TensorSlice]] = {}
        for one in self.slices.values():
            by_name.setdefault(one.name, []).append(one)
        plan = super().create_local_plan() if self.objects else LoadPlan([])
        items = list(plan.items)
        for name, slices in by_name.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise self._lacking(name)
            if tuple(saved.size) != slices[0].whole:
                raise CheckpointError(
                    f"{self.source}: {name} has shape {list(saved.size)}, this run's has "
                    f"{list(slices[0].whole)}; use the configuration in its run folder"
                )
            items += create_read_items_for_chunk_list(name, saved, [_chunk(one) for one in slices])
        return LoadPlan(items)

    def _lacking(self, name: str) -> CheckpointError:
        """The error of a tensor that is not there: only the optimizer's state of it, or all of it."""
        assert self.metadata is not None
        weight = f"{MASTER}{name.partition('/')[2]}"
        if weight != name and weight in self.metadata.state_dict_metadata:
            return CheckpointError(
                f"{self.source}: holds no {name}, only weights; begin a run with them: give it as model.weights"
            )
        return CheckpointError(
            f"{self.source}: holds no {name}; it is of another model: "
            f"use the configuration in its run folder, or start in another run.folder"
        )

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Give torch the memory that a slice is read into."""
        return self.slices[index].values


class CheckedReader(FileSystemReader):
    """Reads a checkpoint by what this package has found in its `.metadata`; torch's own reader would unpickle that."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.metadata = torch_metadata(metadata_of(path))

    def read_metadata(self) -> Metadata:  # with **kwargs torch would try other files too
        """Give torch the metadata as it was checked."""
        return self.metadata


def torch_metadata(metadata: DistributedMetadata) -> Metadata:
    """Make torch's own object of what a checkpoint says of itself."""
    places = {}
    for one in metadata.places:
        offset = None if one.offset is None else torch.Size(one.offset)
        # private to torch, but the class that its readers take
        places[MetadataIndex(one.name, offset, one.index)] = _StorageInfo(one.file, one.start, one.length)
    tensors = {name: _torch_tensor(whole) for name, whole in metadata.tensors.items()}
    return Metadata(state_dict_metadata=dict(tensors), storage_data=places)


def _torch_tensor(whole: SavedWhole | None) -> TensorStorageMetadata | BytesStorageMetadata:
    if whole is None:
        return BytesStorageMetadata()
    chunks = [ChunkStorageMetadata(torch.Size(one.offset), torch.Size(one.shape)) for one in whole.boxes]
    properties = TensorProperties(dtype=getattr(torch, whole.dtype.name))
    return TensorStorageMetadata(properties, torch.Size(whole.shape), chunks)


def _chunk(one: TensorSlice) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(one.block.offset), sizes=torch.Size(one.block.shape))


def copied(one: TensorSlice) -> TensorSlice:
    """Copy a slice into memory of its own on the CPU."""
    values = one.values.detach()
    values = values.to("cpu") if values.is_cuda else values.clone()
    return TensorSlice(one.name, one.whole, one.block, values)


def cause_of(error: BaseException) -> BaseException:
    """Return the error that began a failure: the system's own, where torch has put another one on top of it."""
    if isinstance(error, CheckpointException):
        return cause_of(next(iter(error.failures.values()))[0])
    under: BaseException | None = error
    while under is not None and not isinstance(under, OSError):
        under = under.__cause__ or under.__context__
    return under or error


def reason_of(error: BaseException) -> str:
    """Return the text of the error that began a failure, in one line."""
    cause = cause_of(error)
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    text = " ".join(str(cause).split())
    if "inline_container" in text:  # torch's writer of zip files, which does not tell the system's error
        return "a file could not be written to its end, as where there is no room"
    return text[:200] or type(cause).__name__


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """Read whole fp32 tensors of a checkpoint by this process alone.

    Args:
        path: the checkpoint.
        shapes: the tensors by name, with their shapes; all weights unless given.

    Raises:
        CheckpointError: they cannot be read.
    """
    reader = CheckedReader(path)
    wanted = weight_shapes(path) if shapes is None else shapes
    whole = {name: torch.empty(shape) for name, shape in wanted.items()}
    with warnings.catch_warnings(), only_tensors():
        warnings.simplefilter("ignore", UserWarning)  # that other ranks are not asked
        try:
            load(whole, storage_reader=reader, planner=CheckedPlanner(), no_dist=True)
        except CheckpointException as error:
            raise CheckpointError(f"{path}: cannot be read ({reason_of(error)}); give an earlier one") from error
    return whole
