"""`plan --nodes N --gpus-per-node G --gpu KIND`: the layouts of a job, from a configuration to what is printed."""

import json

from megatron_sphinx.config import Config
from megatron_sphinx.data.sources import make_planner, open_sources
from megatron_sphinx.errors import DataError
from megatron_sphinx.sizing import hardware, search
from megatron_sphinx.sizing.search import Candidate, PlanError, Refusals, SizingRequest
from megatron_sphinx.sizing.sizes import encoder_cost
from megatron_sphinx.sizing.work import Work


def work_of(config: Config) -> tuple[Work, str]:
    """The rows of the first step: planned where the data is there, else expected; and which of both."""
    try:
        sources = open_sources(config.data, config.model)
    except DataError as error:
        return Work.expected(config), f"expected: the data is not there ({error})"
    planner = make_planner(
        config.data, sources, config.model, config.vision, replicas=1, seed=config.run.seed,
        multiple=config.parallel.token_multiple,
    )  # fmt: skip
    return Work.of_plan(planner.step(0), planner.lengths), "planned: step 0 of the data"


def request_of(config: Config, *, nodes: int, ranks_per_node: int, kind: str) -> tuple[SizingRequest, str]:
    """What is to be planned, and where its work comes from."""
    work, origin = work_of(config)
    machine = hardware.load(kind)
    encoders = encoder_cost(config.vision)
    job = SizingRequest(
        config=config, nodes=nodes, ranks_per_node=ranks_per_node, hardware=machine, work=work, encoders=encoders
    )
    return job, origin


def plan(config: Config, *, nodes: int, ranks_per_node: int, kind: str, is_json: bool, is_as_configured: bool) -> str:
    """The best layouts, or the configured one, as a table or as JSON.

    Raises:
        PlanError: none can be run, or not the configured one.
    """
    job, origin = request_of(config, nodes=nodes, ranks_per_node=ranks_per_node, kind=kind)
    found: list[Candidate]
    if is_as_configured:
        found, refusals = [search.evaluate(job, config)], Refusals()
    else:
        found, refusals = search.search(job)
    if not found:
        reason = max(refusals.counts, key=lambda name: refusals.counts[name])
        raise PlanError(
            f"--nodes={nodes}: none of the {sum(refusals.counts.values())} layouts of {job.world} ranks can be run, "
            f"most for this reason: {refusals.examples[reason]}"
        )
    if is_json:
        return json.dumps(search.report(job, found, refusals) | {"work_origin": origin}, indent=1)
    work = job.work
    head = (
        f"{job.world} ranks, {kind}: {job.hardware.usable_bytes / 1e9:.0f} usable GB each; {work.rows} rows of "
        f"{work.positions:,.0f} positions and {work.views:.1f} views a step ({origin})"
    )
    best = f"the first one: {' '.join(found[0].overrides)}"
    return "\n".join([head, search.table(job, found, refusals), best])
