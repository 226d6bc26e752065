"""Pieces of whole tensors, written and read by torch.distributed.checkpoint, and small objects beside them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
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

from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.unpickling import load_torch, metadata_of, only_tensors

if TYPE_CHECKING:  # tools read checkpoints without megatron-core, whose import takes seconds
    from megatron_sphinx.model.shards import Block

WEIGHTS = "master/"  # begins the names of the whole fp32 weights


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor that a rank keeps.

    Attributes:
        name: of the whole tensor.
        whole: its shape.
        block: where the piece lies in it.
        values: the piece, of the block's shape.
    """

    name: str
    whole: tuple[int, ...]
    block: Block
    values: Tensor


class SavePlanner(DefaultSavePlanner):
    """Writes pieces, and small objects by name."""

    def __init__(self, pieces: Iterable[Piece], objects: dict[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {MetadataIndex(piece.name, torch.Size(piece.block.offset)): piece for piece in pieces}
        self.objects = {MetadataIndex(name): value for name, value in objects.items()}

    def create_local_plan(self) -> SavePlan:
        """Tell torch what this rank writes."""
        items = [WriteItem(index=index, type=WriteItemType.BYTE_IO) for index in self.objects]
        for index, piece in self.pieces.items():
            data = TensorWriteData(
                chunk=_chunk(piece),
                properties=TensorProperties.create_from_tensor(piece.values),
                size=torch.Size(piece.whole),
            )
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Give torch what it is about to write."""
        found = self.pieces.get(index)
        return found.values if found is not None else self.objects[index]


class CheckedPlanner(DefaultLoadPlanner):
    """Reads small objects as data; torch's own planner would unpickle them without limits."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a small object."""
        self.state_dict[read_item.dest_index.fqn] = load_torch(value)


class LoadPlanner(CheckedPlanner):
    """Fills pieces, and returns small objects by name."""

    def __init__(self, pieces: Iterable[Piece], wanted: Iterable[str], source: str) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {MetadataIndex(piece.name, torch.Size(piece.block.offset)): piece for piece in pieces}
        self.wanted, self.source = list(wanted), source

    def create_local_plan(self) -> LoadPlan:
        """Tell torch what this rank reads.

        Raises:
            CheckpointError: the checkpoint lacks a tensor, or has it in another shape.
        """
        assert self.metadata is not None
        by_name: dict[str, list[Piece]] = {}
        for piece in self.pieces.values():
            by_name.setdefault(piece.name, []).append(piece)
        plan = super().create_local_plan() if self.wanted else LoadPlan([])
        items = list(plan.items)
        for name, pieces in by_name.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                weight = f"{WEIGHTS}{name.partition('/')[2]}"
                if weight != name and weight in self.metadata.state_dict_metadata:
                    raise CheckpointError(
                        f"{self.source}: holds no {name}, only weights; begin a run with them: give it as model.weights"
                    )
                raise CheckpointError(
                    f"{self.source}: holds no {name}; it is of another model: "
                    f"use the configuration in its run folder, or start in another run.folder"
                )
            if tuple(saved.size) != pieces[0].whole:
                raise CheckpointError(
                    f"{self.source}: {name} has shape {list(saved.size)}, this run's has "
                    f"{list(pieces[0].whole)}; use the configuration in its run folder"
                )
            items += create_read_items_for_chunk_list(name, saved, [_chunk(piece) for piece in pieces])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Give torch the memory that a part is read into."""
        return self.pieces[index].values


class CheckedReader(FileSystemReader):
    """Reads a checkpoint by what this package has found in its `.metadata`; torch's own reader would unpickle that."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.metadata = metadata_of(path)

    def read_metadata(self) -> Metadata:  # with **kwargs torch would try other files too
        """Give torch the metadata as it was checked."""
        return self.metadata


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(piece.block.offset), sizes=torch.Size(piece.block.shape))


def copied(piece: Piece) -> Piece:
    """The piece in memory of its own on the CPU."""
    values = piece.values.detach()
    values = values.to("cpu") if values.is_cuda else values.clone()
    return Piece(piece.name, piece.whole, piece.block, values)


def reason_of(error: BaseException) -> str:
    """The text of the error that began it, in one line."""
    if isinstance(error, CheckpointException):
        return reason_of(next(iter(error.failures.values()))[0])
    return " ".join(str(error).split())[:200] or type(error).__name__


def weight_shapes(path: Path) -> dict[str, torch.Size]:
    """The shapes of a checkpoint's whole fp32 weights, by the names that it has for them."""
    return _shapes(metadata_of(path))


def read_tensors(path: Path, shapes: dict[str, torch.Size] | None = None) -> dict[str, Tensor]:
    """Whole fp32 tensors of a checkpoint, read by this process alone; of no shapes, its weights.

    Raises:
        CheckpointError: they cannot be read.
    """
    reader = CheckedReader(path)
    wanted = _shapes(reader.metadata) if shapes is None else shapes
    whole = {name: torch.empty(shape) for name, shape in wanted.items()}
    with warnings.catch_warnings(), only_tensors():
        warnings.simplefilter("ignore", UserWarning)  # that other ranks are not asked
        try:
            load(whole, storage_reader=reader, planner=CheckedPlanner(), no_dist=True)
        except CheckpointException as error:
            raise CheckpointError(f"{path}: cannot be read ({reason_of(error)}); give an earlier one") from error
    return whole


def _shapes(metadata: Metadata) -> dict[str, torch.Size]:
    return {
        name: about.size
        for name, about in metadata.state_dict_metadata.items()
        if name.startswith(WEIGHTS) and isinstance(about, TensorStorageMetadata)
    }
