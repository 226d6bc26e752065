"""The life of an encoder rank: the phases of its start, then features for as long as there are steps."""

from megatron_sphinx.data.loader import numbered_rounds
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.run.banner import Holding, bytes_of
from megatron_sphinx.run.phases import Role
from megatron_sphinx.stage.channel import FeatureSender
from megatron_sphinx.stage.producer import produce


class EncoderRank(Role):
    """Holds the frozen encoders, and nothing of the language model.

    Attributes:
        encoders: what it encodes with.
    """

    encoders: FrozenEncoders

    def load_encoders(self) -> None:
        """Load what this rank is for."""
        self.encoders = self.context.encoders()

    def introduce(self) -> Holding:
        """Tell the bytes of its encoders; there is no language weight that it could hold."""
        return Holding(self.context.groups.seat.role, 0, bytes_of(self.encoders), self.encoders.sha256)

    def run(self) -> bool:
        """Encode all steps; how the run ends this rank hears from the language ranks."""
        context = self.context
        config, number = context.config, context.groups.seat.encoder
        assert number is not None
        produce(
            numbered_rounds(context.planner, self.first_step, config.training.steps),
            encoder=number,
            encoder_count=config.parallel.encoder,
            encoders=self.encoders,
            pixels=context.pixels(),
            sender=FeatureSender(context.groups, config.stage.lookahead),
            lookahead=config.stage.lookahead,
            progress=context.progress,
            observer=self.observer,
        )
        return True
