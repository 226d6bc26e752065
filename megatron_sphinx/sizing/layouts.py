"""`plan --nodes N --gpus-per-node G --gpu KIND`: the layouts of a job, from a configuration to what is printed."""

import json
from dataclasses import replace

from megatron_sphinx.config import Config
from megatron_sphinx.data.sources import make_planner, open_sources
from megatron_sphinx.errors import DataError
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.sizing import hardware, search
from megatron_sphinx.sizing.automatic import Settled, settle
from megatron_sphinx.sizing.search import Candidate, PlanError, RefusedLayouts, SizingRequest
from megatron_sphinx.sizing.sizes import encoder_cost
from megatron_sphinx.sizing.work import Work


def work_of(config: Config) -> tuple[Work, str]:
    """Return the rows of the first step, and how they are known: planned where the data is there, else expected."""
    try:
        sources = open_sources(config.data, config.model)
    except DataError as error:
        return Work.expected(config), f"expected: the data is not there ({error})"
    data = replace(config.data, micro_batch_rows=1)  # the rows are the same however many are computed at once
    planner = make_planner(
        data, sources, config.model, config.vision, replicas=1, seed=config.run.seed,
        multiple=config.parallel.token_multiple,
    )  # fmt: skip
    return Work.of_plan(planner.step(0), planner.lengths), "planned: step 0 of the data"


def settled(config: Config, layout: ParallelLayout, kind: str) -> Settled:
    """Take what a run on ranks of a kind of hardware would take where a value is auto; see automatic.settle."""
    return settle(config, layout, work_of(config)[0], hardware.load(kind), encoder_cost(config.vision))


def request_of(config: Config, *, nodes: int, ranks_per_node: int, kind: str) -> tuple[SizingRequest, str]:
    """Return what is to be laid out, and how the rows of its steps are known.

    Args:
        config: the run.
        nodes: how many nodes the job has.
        ranks_per_node: GPUs of each node.
        kind: a name of hardware.yaml, or the path of a file of the same keys.
    """
    work, origin = work_of(config)
    machine = hardware.load(kind)
    encoders = encoder_cost(config.vision)
    request = SizingRequest(
        config=config, nodes=nodes, ranks_per_node=ranks_per_node, hardware=machine, work=work, encoders=encoders
    )
    return request, origin


def plan(config: Config, *, nodes: int, ranks_per_node: int, kind: str, is_json: bool, is_as_configured: bool) -> str:
    """Lay out a run: the best layouts, or the configured one, as a table or as JSON.

    Args:
        config: the run.
        nodes: how many nodes the job has.
        ranks_per_node: GPUs of each node.
        kind: a name of hardware.yaml, or the path of a file of the same keys.
        is_json: whether JSON is asked for; else a table.
        is_as_configured: whether only the configured layout is asked for.

    Raises:
        PlanError: no layout can be run, or the configured one cannot.
    """
    request, origin = request_of(config, nodes=nodes, ranks_per_node=ranks_per_node, kind=kind)
    candidates: list[Candidate]
    if is_as_configured:
        candidates, refusals = [search.evaluate(request, config)], RefusedLayouts()
    else:
        candidates, refusals = search.search(request)
    if not candidates:
        reason = max(refusals.counts, key=lambda name: refusals.counts[name])
        raise PlanError(
            f"--nodes={nodes}: none of the {sum(refusals.counts.values())} layouts of {request.world} ranks can be "
            f"run, most for this reason: {refusals.examples[reason]}"
        )
    if is_json:
        return json.dumps(search.report(request, candidates, refusals) | {"work_origin": origin}, indent=1)
    work = request.work
    head = (
        f"{request.world} ranks, {kind}: {request.hardware.usable_bytes / 1e9:.0f} usable GB each; {work.rows} rows of "
        f"{work.positions:,.0f} positions and {work.views:.1f} views a step ({origin})"
    )
    vision = candidates[0].config.vision
    views = f"vision.batch_views={vision.batch_views} vision.precision={vision.precision}"
    best = f"the first one: {' '.join(candidates[0].overrides)} {views}"
    return "\n".join([head, search.table(request, candidates, refusals), best])
