"""The life of a language rank: the phases of its start, then the steps."""

import json

from megatron_sphinx.checkpoint.intact import SavedStep
from megatron_sphinx.checkpoint.store import CheckpointStore
from megatron_sphinx.checkpoint.weights import Weights
from megatron_sphinx.console import say
from megatron_sphinx.errors import writing
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.parallel.seeding import seed_rank
from megatron_sphinx.run import assembly, banner, resume
from megatron_sphinx.run.banner import Holding, bytes_of
from megatron_sphinx.run.phases import Role
from megatron_sphinx.run.provenance import keep_config
from megatron_sphinx.run.resume import StartingPoint
from megatron_sphinx.run.validator import Validator
from megatron_sphinx.training.divergence import Watch
from megatron_sphinx.training.engine import Engine
from megatron_sphinx.training.metrics import Reporter, is_validated


class LanguageRank(Role):
    """Holds a shard of the language model and trains it; encodes too where the job has no encoder ranks.

    Attributes:
        encoders: the frozen encoders, where this rank encodes.
        model: its shard.
        engine: the model under its optimizer.
        store: the run's checkpoints.
        chosen: what the run goes on from or begins with; None for a fresh start.
        starting_point: where the run begins.
        reporter: writes metrics, on the first rank.
    """

    encoders: FrozenEncoders | None = None
    model: SphinxModel
    engine: Engine
    store: CheckpointStore
    chosen: SavedStep | Weights | None = None
    starting_point: StartingPoint = StartingPoint()
    reporter: Reporter | None = None

    def begin_encoders(self) -> None:
        """Begin to load the encoders where no rank of the job has them for itself."""
        if not self.context.config.parallel.encoder:
            self.loading = self.context.begin_encoders()

    def load_encoders(self) -> None:
        """Wait for the encoders that this rank loads."""
        if self.loading is not None:
            self.encoders = self.loaded_encoders()

    def build_model(self) -> None:
        """Draw the weights of this rank's shard from the run's seed."""
        context = self.context
        seed_rank(context.config.run.seed, context.groups.seat)
        self.model = assembly.build_model(context.config, context.groups, context.platform)

    def introduce(self) -> Holding:
        """Tell the bytes of its shard; where the job has encoder ranks, it holds no encoder's weights."""
        encoder_bytes = bytes_of(self.encoders) if self.encoders else 0
        assert not (self.context.config.parallel.encoder and encoder_bytes), "a language rank holds encoders"
        digests = self.encoders.sha256 if self.encoders else {}
        return Holding(self.context.groups.seat.role, bytes_of(self.model), encoder_bytes, digests)

    def build_engine(self) -> None:
        """Put the shard under its optimizer."""
        self.engine = assembly.build_engine(self.context, self.model)

    def choose_state(self) -> None:
        """Open the run's checkpoints; find the one to go on from, or the weights to begin with."""
        self.store = resume.open_store(self.context, self.encoder_digests)
        self.chosen = resume.choose(self.context, self.store)

    def load_state(self) -> None:
        """Fill weights and optimizer from what was found."""
        self.starting_point = resume.load(self.context, self.store, self.engine, self.chosen)

    def clear_the_way(self) -> None:
        """Move later steps of the run folder out of the way, on the first rank."""
        if self.context.is_first_rank:
            for line in self.store.clear_the_way():
                say(line)

    def tell_first_step(self) -> int:
        """Tell the step that the run begins at."""
        return self.starting_point.step

    def tell_owed_validation(self) -> bool:
        """Look on the first rank for the validation behind the steps that are done."""
        step, held_out, context = self.first_step, self.held_out, self.context
        is_due = held_out is not None and context.is_first_rank and held_out.is_due(step)
        return is_due and not is_validated(context.folder / "metrics.jsonl", step - 1)

    def open_reports(self) -> None:
        """Write down on the first rank what is run, and open its metrics."""
        context = self.context
        if not context.is_first_rank:
            return
        with writing(context.folder):
            if earlier := keep_config(context.folder, context.config):
                say(f"the configuration of the run before this one is kept as {earlier}")
            (context.folder / "encoders.json").write_text(json.dumps(self.encoder_digests, indent=1))
            self.reporter = Reporter(
                context.folder,
                start=self.first_step,
                steps=context.config.training.steps,
                interval=context.config.run.print_interval,
                guard=context.hold.look if context.hold else lambda: None,
                validations_left=self.held_out.left if self.held_out else lambda _: 0,
            )

    def run(self) -> bool:
        """Take the steps; whether all of them are done."""
        context, start = self.context, self.starting_point
        held_out, is_owed = self.held_out, self.is_validation_owed
        features = assembly.build_features(context, self.encoders, start.step, held_out=held_out, is_owed=is_owed)
        watch = Watch(context.config.divergence, start.divergence)
        trainer = assembly.build_trainer(context, self.engine, features, watch)
        validator = None
        if held_out:
            answerer = assembly.build_answerer(context, self.model)
            validator = Validator(context, trainer, held_out, self.reporter, answerer, is_owed=is_owed)
        loop = assembly.build_loop(
            context, trainer, self.store, self.reporter, bad_pairs=start.bad_pairs, observer=self.observer,
            validator=validator,
        )  # fmt: skip
        how = "failed"
        try:
            is_done = loop.run(start.step, context.config.training.steps)
            how = "done" if is_done else f"stopped by {banner.why_stopped(context)}"
            return is_done
        finally:
            if self.reporter:
                self.reporter.close()
            banner.note_end(context, how, self.store, start.step, loop.done)
