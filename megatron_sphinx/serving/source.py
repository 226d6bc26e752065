"""What is to be loaded: a run folder, or a checkpoint of any format with what it does not tell itself."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_sphinx import config as configuration
from megatron_sphinx.checkpoint.formats.format import SourceCheckpoint
from megatron_sphinx.checkpoint.identity import require_same
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.checkpoint.slices import TensorSlice
from megatron_sphinx.checkpoint.steps import newest_of
from megatron_sphinx.checkpoint.weight_names import MASTER
from megatron_sphinx.checkpoint.weights import fill
from megatron_sphinx.config import Config
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.data.tokenizer_files import SENTENCEPIECE, tokenizers_in
from megatron_sphinx.errors import CheckpointError
from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig
from megatron_sphinx.model.shards import shards_of
from megatron_sphinx.parallel.groups import ProcessGroups

_POSITIONS = 4096  # of a language model that nothing is known of


@dataclass(frozen=True)
class ModelSource:
    """A model as it lies in files.

    Attributes:
        name: what users call it.
        checkpoint: its weights.
        language: shape of its language model.
        vision: its visual experts, and how a picture is shown to them; None for a model without projections.
        tokenizer: where its tokenizer is.
        positions: tokens of the longest sequence that it is for.
        precision: what it was trained in, bf16 or fp32; None where nothing tells.
        seed: of visual experts with random weights.
        run: what a run that trained it was told; None for another checkpoint.
    """

    name: str
    checkpoint: SourceCheckpoint
    language: LanguageConfig
    vision: VisionConfig | None
    tokenizer: Path
    positions: int
    precision: str | None
    seed: int
    run: Config | None

    @classmethod
    def open(cls, path: Path, config: Path | None, tokenizer: Path | None) -> "ModelSource":
        """Find out what a path holds, without reading its weights.

        Args:
            path: a run folder, one of its checkpoints, or a checkpoint in any other format.
            config: a configuration or the name of a preset, for a checkpoint that does not tell how pictures are shown;
                None for a run's own.
            tokenizer: its tokenizer; None for the one that the configuration names, or that lies beside the weights.

        Raises:
            CheckpointError: there is no checkpoint, or it does not tell enough.
            ConfigError: the configuration is wrong.
            DataError: the tokenizer is not the model's.
        """
        found = _config_of(path) if config is None else config
        run = configuration.load(found, ["parallel={}"]) if found is not None else None
        checkpoint = open_checkpoint(path, run.model if run else None)
        holds = checkpoint.model
        if run is not None:
            way_out = "give the configuration of this checkpoint"
            require_same(f"{path}", {"model": holds.language.shape}, {"model": run.model.shape}, way_out)
        elif holds.channels:
            raise CheckpointError(
                f"{path}: has projections of pictures, but does not tell of which visual experts; give the "
                f"configuration or the preset that it was trained with as --config"
            )
        language = run.model if run else holds.language
        tokenizer = tokenizer or _tokenizer_of(path, checkpoint, run)
        Tokenizer(tokenizer).check_vocabulary(str(tokenizer), language.vocabulary)
        return cls(
            name=path.resolve().name,
            checkpoint=checkpoint,
            language=language,
            vision=run.vision if run and holds.channels else None,
            tokenizer=tokenizer,
            positions=run.data.sequence_length if run else _positions_of(checkpoint),
            precision=run.training.precision if run else None,
            seed=run.run.seed if run else 0,
            run=run if config is None else None,
        )

    def fill(self, model: nn.Module, groups: ProcessGroups) -> None:
        """Copy into each weight of a rank's model its part of the whole.

        Raises:
            CheckpointError: a tensor is missing, or cannot be read.
        """
        fill(self.checkpoint, _slices(model, self.language, groups))

    def for_generation(self) -> LanguageConfig:
        """The shape with kernels that a cache can be built in: transformer-engine's layers attend by themselves."""
        is_fused = self.language.kernels == "transformer_engine"
        return replace(self.language, kernels="auto") if is_fused else self.language


def _config_of(path: Path) -> Path | None:
    """Return the configuration of the run that a checkpoint is of; None for another checkpoint."""
    try:
        checkpoint = newest_of(path)
    except CheckpointError:
        return None
    candidates = (path / "config.yaml", checkpoint.parent.parent / "config.yaml")
    return next((found for found in candidates if found.is_file()), None)


def _tokenizer_of(path: Path, checkpoint: SourceCheckpoint, run: Config | None) -> Path:
    """Return the tokenizer that the configuration names, else that beside the weights."""
    named = [] if run is None else [Path(run.data.tokenizer)]
    for candidate in (*named, *tokenizers_in(checkpoint.folder)):
        if candidate.is_file() or tokenizers_in(candidate):
            return candidate
    missing = named[0] if named else checkpoint.folder / SENTENCEPIECE
    raise CheckpointError(f"{path}: {missing} is missing; give the model's tokenizer as --tokenizer")


def _positions_of(checkpoint: SourceCheckpoint) -> int:
    known = checkpoint.kept.get("max_position_embeddings")
    return known if isinstance(known, int) and known > 0 else _POSITIONS


def _slices(model: nn.Module, config: LanguageConfig, groups: ProcessGroups) -> Iterator[TensorSlice]:
    """Give the parts of whole weights that a model has, each weight taken over before the next one's are given."""
    shards = shards_of(model, config, groups)
    for name, weight in model.named_parameters():
        shard, values = shards[name], weight.detach()
        is_direct = values.dtype is torch.float32 and values.device.type == "cpu" and values.is_contiguous()
        flat: Tensor = values.view(-1) if is_direct else torch.empty(weight.numel())
        for block, begin in shard.boxes(0, weight.numel()):
            part = flat[begin : begin + torch.Size(block.shape).numel()].view(block.shape)
            yield TensorSlice(f"{MASTER}{shard.name}", shard.whole, block, part)
        if not is_direct:
            values.copy_(flat.view_as(values))
