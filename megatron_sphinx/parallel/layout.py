"""How the ranks of a job are divided. Arithmetic only: imports no torch, so a login node can check a plan."""

from dataclasses import dataclass, fields

from megatron_sphinx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The `parallel:` keys; data parallelism takes what they leave.

    Attributes:
        tensor: ranks that share every weight matrix of the language model.
        pipeline: stages its layers are cut into.
        encoder: ranks that hold the frozen encoders and nothing else; 0 puts the encoders on the language ranks.
    """

    tensor: int = 1
    pipeline: int = 1
    encoder: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name == "encoder" else 1
            if (size := getattr(self, field.name)) < least:
                raise ConfigError(f"parallel.{field.name}={size}: must be at least {least}")
        if self.pipeline > 1:
            raise ConfigError(f"parallel.pipeline={self.pipeline}: the language model is one stage here; use 1")


@dataclass(frozen=True)
class Seat:
    """Where one rank sits.

    Attributes:
        rank: number in the world.
        encoder: number among the encoder ranks, None on a language rank.
        tensor: place in its tensor-parallel group (0 on an encoder rank).
        data: number of its data-parallel replica (0 on an encoder rank).
    """

    rank: int
    encoder: int | None
    tensor: int
    data: int

    @property
    def role(self) -> str:
        """What this rank is for, in one word."""
        return "language" if self.encoder is None else "encoder"


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """A world of ranks: language ranks first (tensor fastest, then data, then pipeline), encoder ranks last.

    Attributes:
        world: ranks in the job.
        config: the sizes asked for.

    Raises:
        ConfigError: the sizes do not fit the world.
    """

    world: int
    config: ParallelConfig

    def __post_init__(self) -> None:
        encoder, model = self.config.encoder, self.config.tensor * self.config.pipeline
        if encoder >= self.world:
            raise ConfigError(
                f"parallel.encoder={encoder}: leaves no language rank of the {self.world} in the job; "
                f"use 0 to {self.world - 1}, or start more ranks"
            )
        if self.language % model:
            sizes = [n for n in range(1, self.language + 1) if self.language % (n * self.config.pipeline) == 0]
            raise ConfigError(
                f"parallel.tensor={self.config.tensor}: must divide the {self.language} language ranks "
                f"({self.world} in the job, {encoder} of them encoders); use one of {sizes}, or another number of ranks"
            )

    @property
    def language(self) -> int:
        """Ranks that hold the language model."""
        return self.world - self.config.encoder

    @property
    def data(self) -> int:
        """Replicas of the language model; each sees other samples."""
        return self.language // (self.config.tensor * self.config.pipeline)

    def seat(self, rank: int) -> Seat:
        """Where `rank` sits."""
        if rank >= self.language:
            return Seat(rank, rank - self.language, 0, 0)
        return Seat(rank, None, rank % self.config.tensor, rank // self.config.tensor % self.data)

    def rank_of(self, *, data: int, tensor: int) -> int:
        """The first-stage language rank at these places."""
        return data * self.config.tensor + tensor

    def encoder_rank(self, encoder: int) -> int:
        """The rank of the encoder with this number."""
        return self.language + encoder

    def __str__(self) -> str:
        return f"tensor {self.config.tensor} x data {self.data} + encoder {self.config.encoder}"
