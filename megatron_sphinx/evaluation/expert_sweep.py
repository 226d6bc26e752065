"""A model evaluated with other numbers of active MoE experts, and with some pruned.

Source: SPHINX-X, arXiv:2402.05935, appendix A.1.1 and A.1.3, figures 6 and 7.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.evaluation.benchmark import Benchmark
from megatron_sphinx.evaluation.expert_data import DataSet
from megatron_sphinx.evaluation.expert_look import Look
from megatron_sphinx.evaluation.expert_pruning import Pruning, least_error, most_used, random_experts
from megatron_sphinx.evaluation.results import read_results
from megatron_sphinx.evaluation.run import Wanted, agree, answer_benchmark
from megatron_sphinx.evaluation.samples import Judged, Protocol
from megatron_sphinx.evaluation.scores import scores_of
from megatron_sphinx.generation.expert_orders import Restrict
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.generation.requests import Sampling
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.model.expert_choice import ExpertChoice, KeptExperts
from megatron_sphinx.serving.model import Model


@dataclass(frozen=True)
class Pruned:
    """Experts that were chosen to be kept.

    Attributes:
        method: by what.
        keep: how many of each layer.
        seed: of a random choice; None for another one.
        kept: the experts.
    """

    method: Pruning
    keep: int
    seed: int | None
    kept: KeptExperts

    @property
    def name(self) -> str:
        """What files and tables call it."""
        return f"{self.method.value}_{self.keep}" + ("" if self.seed is None else f"_seed{self.seed}")


@dataclass(frozen=True)
class Point:
    """A choice of experts, and what the model reaches with it.

    Attributes:
        active: experts of each token.
        pruned: which were kept; None for all.
        figures: by the titles of tasks.
    """

    active: int
    pruned: Pruned | None
    figures: Mapping[str, float]

    @property
    def name(self) -> str:
        """What files and tables call it."""
        return f"active_{self.active}" if self.pruned is None else self.pruned.name


def sweep(model: Model, pruned: Sequence[Pruned], evaluate: Callable[[str], Mapping[str, float]]) -> list[Point]:
    """Evaluate a model with 1 to all of its experts active, and with pruned ones; it ends as it was trained.

    Args:
        model: the model.
        pruned: what is kept, each in turn.
        evaluate: evaluates the model as it is then, given the name of the choice; figures by the titles of tasks.
    """
    shape: LanguageConfig = model.language
    found = []
    wanted: list[tuple[int, Pruned | None]] = [(active, None) for active in range(1, shape.experts + 1)]
    wanted += [(min(shape.experts_per_token, one.keep), one) for one in pruned]
    for active, one in wanted:
        model.order_experts(Restrict(ExpertChoice(active, None if one is None else one.kept)))
        name = Point(active, one, {}).name
        found.append(Point(active, one, evaluate(name)))
    model.order_experts(Restrict(ExpertChoice()))
    return found


def choose_experts(
    shape: LanguageConfig, found: Look, methods: Sequence[Pruning], keeps: Sequence[int], seeds: int
) -> list[Pruned]:
    """Choose experts to keep by each method, in each number.

    Args:
        shape: of the model.
        found: what was seen of its experts, their errors for RECONSTRUCTION.
        methods: by what they are chosen.
        keeps: how many each layer keeps.
        seeds: how often RANDOM chooses.
    """
    chosen = []
    used = sum(one.of_kinds(one.kinds).sum(0) for one in found.counts)
    for keep in keeps:
        for method in methods:
            if method is Pruning.RANDOM:
                for seed in range(seeds):
                    kept = random_experts(shape.layers, shape.experts, keep, seed)
                    chosen.append(Pruned(method, keep, seed, kept))
            elif method is Pruning.USAGE:
                chosen.append(Pruned(method, keep, None, most_used(np.asarray(used), keep)))
            else:
                chosen.append(Pruned(method, keep, None, least_error(found.errors, keep)))
    return chosen


def check_benchmarks(data: Sequence[DataSet]) -> None:
    """Refuse data sets that give no figure.

    Raises:
        ConfigError: one is no benchmark, or one that another model judges.
    """
    for one in data:
        if one.benchmark is None:
            raise ConfigError(f"--sweep: {one.name} is no benchmark, so it has no score; give BENCHMARK=DIR")
        if one.benchmark.is_judged:
            raise ConfigError(f"--sweep: {one.name} is judged by another model; give benchmarks that are not")


def evaluate_benchmarks(
    model: Model, path: Path, data: Sequence[DataSet], folder: Path, limit: int | None
) -> Callable[[str], Mapping[str, float]]:
    """Return what evaluates a model on benchmarks, each choice of experts in a folder of its own; killed, it goes on.

    Args:
        model: the model.
        path: what it was loaded from.
        data: the benchmarks.
        folder: for the answers.
        limit: questions of each benchmark; None for all.
    """

    def evaluate(name: str) -> dict[str, float]:
        figures = {}
        for one in data:
            assert one.benchmark is not None, "a data set that gives no figure"
            wanted = Wanted(one.path, Protocol.PAPER, Sampling(), limit)
            told = agree(folder / name, model, path, wanted)
            flight = Limits.sequences * model.replicas
            answer_benchmark(model, told, one.benchmark, wanted, folder / name, in_flight=flight)
            figures[one.benchmark.title] = _figure(one.benchmark, folder / name, one.path)
        return figures

    return evaluate


def _figure(benchmark: Benchmark, folder: Path, data: Path) -> float:
    """Return the headline figure of the answers in a folder; nan where none could be asked."""
    results = read_results(folder, benchmark, data)
    verdicts = benchmark.metric.judge(results.answered, results.protocol)
    judged = [Judged(one, verdict) for one, verdict in zip(results.answered, verdicts, strict=True)]
    figures = scores_of(judged, benchmark.metric.figures).figures
    name = benchmark.figure or next(iter(figures), "")
    return figures[name].value if name in figures else float("nan")
