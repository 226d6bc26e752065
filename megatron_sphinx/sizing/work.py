"""What an optimizer step has to compute: its rows, which are the same in every layout. Arithmetic only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sphinx.config import Config
from megatron_sphinx.data.packing import Row
from megatron_sphinx.data.plan import StepPlan
from megatron_sphinx.model.architecture import LanguageConfig

CAPTION_TOKENS, CONVERSATION_TOKENS = 20, 200  # assumed lengths where the data cannot be opened


@dataclass(frozen=True, kw_only=True)
class Work:
    """The rows of a step, which the planner makes of equal cost: how many, and how much is in one.

    Attributes:
        rows: how many rows the step has.
        positions: tokens and image positions of a row, on average.
        attended: pairs of positions of a row of which one sees the other, in each head, on average.
        targets: positions of a row whose loss is computed, on average.
        views: views of a row that are encoded, on average.
        documents: documents and samples of a row, which attention stays inside, on average.
        most_positions, most_targets, most_views: how many the row with most of them has.
    """

    rows: int
    positions: float
    attended: float
    targets: float
    views: float
    documents: float
    most_positions: float
    most_targets: float
    most_views: float

    def language_flops(self, model: LanguageConfig) -> float:
        """FLOPs of the language model for one row, forward and backward, by LanguageConfig.flops_of."""
        return model.flops_of(self.positions, self.attended, self.targets)

    @classmethod
    def of_plan(cls, plan: StepPlan, lengths: Callable[[Row], Sequence[int]]) -> "Work":
        """Return the work of a planned step.

        Args:
            plan: the step.
            lengths: gives the lengths of what attention stays inside in a row (Planner.lengths).
        """
        rows = plan.rows
        parts = [lengths(row) for row in rows]
        positions = [sum(part) for part in parts]
        targets = [sum(segment.targets for segment in row) for row in rows]
        views = [sum(len(segment.views) for segment in row) for row in rows]
        count = len(rows)
        return cls(
            rows=count,
            positions=sum(positions) / count,
            attended=sum(n * (n + 1) / 2 for part in parts for n in part) / count,
            targets=sum(targets) / count,
            views=sum(views) / count,
            documents=sum(map(len, parts)) / count,
            most_positions=max(positions),
            most_targets=max(targets),
            most_views=max(views),
        )

    @classmethod
    def expected(cls, config: Config) -> "Work":
        """Estimate the work of a step whose data is not there.

        Every view is encoded; captions have CAPTION_TOKENS tokens, conversations CONVERSATION_TOKENS, of which half are
        learned; text comes in documents as long as a row.
        """
        data, vision = config.data, config.vision
        is_pairs = not data.conversations_per_step
        tokens = CAPTION_TOKENS if is_pairs else CONVERSATION_TOKENS
        sample = min(2 + vision.most_image_positions + tokens, data.sequence_length)
        samples, size = data.samples_per_step, data.sequence_length
        total = samples * sample + data.text_tokens_per_step
        per_row = max(1, size // sample)
        needed = -(-samples // per_row) if samples else 0
        gap = needed * size - samples * sample  # positions that samples leave, and text fills
        rows = needed + -(-max(0, data.text_tokens_per_step - gap) // size)
        rows = -(-rows // data.row_multiple) * data.row_multiple
        attended = (samples * sample * (sample + 1) + data.text_tokens_per_step * (size + 1)) / 2
        targets = samples * ((tokens if is_pairs else tokens // 2) + 1) + data.text_tokens_per_step
        if not data.isolate_documents:
            attended = total * (total / rows + 1) / 2
        return cls(
            rows=rows,
            positions=total / rows,
            attended=attended / rows,
            targets=targets / rows,
            views=samples * vision.views / rows,
            documents=max(1.0, (samples + data.text_tokens_per_step / size) / rows),
            most_positions=size,
            most_targets=size if data.text_tokens_per_step else targets / rows,
            most_views=min(samples, per_row) * vision.views,
        )
