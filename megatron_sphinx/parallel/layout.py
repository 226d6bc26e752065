"""How the ranks of a job are divided. Arithmetic only: imports no torch, so a login node can check a plan."""

from dataclasses import dataclass
from math import lcm
from typing import Annotated

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.ranges import Range, check_ranges

_RANKS = Range(least=1, most=1_000_000, why="1 is for no division")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The `parallel:` keys; data parallelism takes what they leave.

    Attributes:
        tensor (ranks): number of ranks that share every weight matrix of the language model.
        pipeline (stages): number of stages that the layers of the language model are cut into.
        pipeline_layers (layers): list of the decoder layers of each stage; null for as even as they go, the first
            stages taking more.
        sequence: whether tensor ranks also share the tokens between the matrices (norms, residuals, routers); needed
            where a model with experts is on several tensor ranks.
        expert (ranks): number of ranks of a pipeline stage that share the experts of a layer.
        expert_tensor (ranks): number of ranks that share every matrix of an expert.
        encoder (ranks): number of ranks that hold the frozen encoders and nothing else; 0 puts the encoders on the
            language ranks.
    """

    tensor: Annotated[int, _RANKS] = 1
    pipeline: Annotated[int, _RANKS] = 1
    pipeline_layers: Annotated[tuple[int, ...] | None, Range(least=0, most=10_000)] = None
    sequence: bool = False
    expert: Annotated[int, _RANKS] = 1
    expert_tensor: Annotated[int, _RANKS] = 1
    encoder: Annotated[int, Range(least=0, most=1_000_000, why="0 is for encoders on the language ranks")] = 0

    def __post_init__(self) -> None:
        check_ranges(self, "parallel.")
        if self.sequence and self.tensor == 1:
            raise ConfigError(
                "parallel.sequence=true: the tokens are shared by tensor ranks; set parallel.tensor above 1"
            )
        if self.pipeline_layers is not None and len(self.pipeline_layers) != self.pipeline:
            raise ConfigError(
                f"parallel.pipeline_layers={list(self.pipeline_layers)}: must name the layers of each of the "
                f"{self.pipeline} stages of parallel.pipeline"
            )

    @property
    def smallest_world(self) -> int:
        """The fewest ranks that these sizes fit."""
        return self.pipeline * lcm(self.tensor, self.expert * self.expert_tensor) + self.encoder

    @property
    def token_multiple(self) -> int:
        """A number that divides the positions of every micro-batch: tensor ranks that share them have as many each."""
        return self.tensor if self.sequence else 1

    def stage_layers(self, layers: int) -> tuple[int, ...]:
        """Divide a model's decoder layers among the pipeline stages: how many each one holds.

        Raises:
            ConfigError: a stage would hold none, or the stages hold more or fewer than there are.
        """
        if self.pipeline_layers is not None:
            if sum(self.pipeline_layers) != layers or min(self.pipeline_layers) < 1:
                raise ConfigError(
                    f"parallel.pipeline_layers={list(self.pipeline_layers)}: must be at least 1 each and "
                    f"model.layers={layers} together"
                )
            return self.pipeline_layers
        if self.pipeline > layers:
            raise ConfigError(
                f"parallel.pipeline={self.pipeline}: leaves stages without a layer; use at most model.layers={layers}"
            )
        even, more = divmod(layers, self.pipeline)
        return tuple(even + (stage < more) for stage in range(self.pipeline))


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A rank's coordinates in the layout. On an encoder rank all but `rank` and `encoder` are 0.

    Attributes:
        rank: number of the rank in the world.
        encoder: number among the encoder ranks, None on a language rank.
        tensor: number in its tensor-parallel group.
        data: number of its data-parallel replica.
        pipeline: number of its pipeline stage.
        expert: number among the ranks that share the MoE experts.
        expert_tensor: number among the ranks that share each MoE expert's matrices.
        expert_data: number among the copies of its MoE experts.
    """

    rank: int
    encoder: int | None = None
    tensor: int = 0
    data: int = 0
    pipeline: int = 0
    expert: int = 0
    expert_tensor: int = 0
    expert_data: int = 0

    @property
    def role(self) -> str:
        """What this rank is for: language or encoder."""
        return "language" if self.encoder is None else "encoder"


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """A world of ranks: language ranks first (tensor fastest, then data, then pipeline), encoder ranks last.

    The MoE experts divide the ranks of a stage anew: expert-tensor fastest, then expert, then expert-data.

    Attributes:
        world: ranks in the job.
        config: the sizes of the axes that the user asks for.

    Raises:
        ConfigError: the sizes do not fit the world.
    """

    world: int
    config: ParallelConfig

    def __post_init__(self) -> None:
        sizes, encoder = self.config, self.config.encoder
        if encoder >= self.world:
            raise ConfigError(
                f"parallel.encoder={encoder}: leaves no language rank of the {self.world} in the job; "
                f"use 0 to {self.world - 1}, or start more ranks"
            )
        job_ranks = f"({self.world} in the job, {encoder} of them encoders)"
        if self.language % sizes.pipeline:
            raise ConfigError(
                f"parallel.pipeline={sizes.pipeline}: must divide the {self.language} language ranks {job_ranks}; "
                f"use one of {divisors(self.language)}, or another number of ranks"
            )
        if self.stage % sizes.tensor:
            raise ConfigError(
                f"parallel.tensor={sizes.tensor}: must divide the {self.stage} language ranks of a pipeline stage "
                f"{job_ranks}; use one of {divisors(self.stage)}, or another number of ranks"
            )
        if self.stage % (sizes.expert * sizes.expert_tensor):
            raise ConfigError(
                f"parallel.expert={sizes.expert}: times parallel.expert_tensor={sizes.expert_tensor} must divide the "
                f"{self.stage} language ranks of a pipeline stage {job_ranks}; use for both together one of "
                f"{divisors(self.stage)}, or another number of ranks"
            )

    @property
    def language(self) -> int:
        """How many ranks hold the language model."""
        return self.world - self.config.encoder

    @property
    def stage(self) -> int:
        """How many language ranks one pipeline stage has."""
        return self.language // self.config.pipeline

    @property
    def data(self) -> int:
        """How many replicas of the language model there are; each sees other samples."""
        return self.stage // self.config.tensor

    @property
    def expert_data(self) -> int:
        """How many copies of each MoE expert there are."""
        return self.stage // (self.config.expert * self.config.expert_tensor)

    def seat(self, rank: int) -> Seat:
        """Return the coordinates of a rank in this layout."""
        if rank >= self.language:
            return Seat(rank=rank, encoder=rank - self.language)
        sizes, rank_of_stage = self.config, rank % self.stage
        return Seat(
            rank=rank,
            tensor=rank_of_stage % sizes.tensor,
            data=rank_of_stage // sizes.tensor,
            pipeline=rank // self.stage,
            expert=rank_of_stage // sizes.expert_tensor % sizes.expert,
            expert_tensor=rank_of_stage % sizes.expert_tensor,
            expert_data=rank_of_stage // (sizes.expert_tensor * sizes.expert),
        )

    def rank_of(self, *, data: int, tensor: int, pipeline: int = 0) -> int:
        """Return the language rank with these coordinates."""
        return (pipeline * self.data + data) * self.config.tensor + tensor

    def encoder_rank(self, encoder: int) -> int:
        """Return the number in the world of an encoder rank, given its number among the encoder ranks."""
        return self.language + encoder

    def __str__(self) -> str:
        sizes = self.config
        parts = [f"tensor {sizes.tensor}" + (" (sequence)" if sizes.sequence else "")]
        parts += [f"pipeline {sizes.pipeline}"] if sizes.pipeline > 1 else []
        parts += [f"data {self.data}"]
        experts = {"expert": sizes.expert, "expert_tensor": sizes.expert_tensor}
        inside = ", ".join(f"{name} {size}" for name, size in experts.items() if size > 1)
        return " x ".join(parts) + (f" [{inside}]" if inside else "") + f" + encoder {sizes.encoder}"


def divisors(number: int) -> list[int]:
    """List the whole numbers that divide `number`, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]
