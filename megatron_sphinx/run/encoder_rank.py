"""The life of an encoder rank: the phases of its start, then features for as long as there are steps."""

from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.run import assembly
from megatron_sphinx.run.banner import Holding, bytes_of
from megatron_sphinx.run.phases import Role


class EncoderRank(Role):
    """Holds the frozen encoders, and nothing of the language model.

    Attributes:
        encoders: what it encodes with.
    """

    encoders: FrozenEncoders

    def begin_encoders(self) -> None:
        """Begin to load what this rank is for."""
        self.loading = self.context.begin_encoders()

    def load_encoders(self) -> None:
        """Wait for what this rank is for."""
        self.encoders = self.loaded_encoders()

    def introduce(self) -> Holding:
        """Tell the bytes of its encoders; there is no language weight that it could hold."""
        return Holding(self.context.groups.seat.role, 0, bytes_of(self.encoders), self.encoders.sha256)

    def run(self) -> bool:
        """Encode all steps; how the run ends this rank hears from the language ranks."""
        steps = self.context.config.training.steps
        assembly.encode_steps(
            self.context, self.encoders, self.first_step, steps, self.observer,
            held_out=self.held_out, is_owed=self.is_validation_owed,
        )  # fmt: skip
        return True
