"""`train --check`: all that a start looks at, done by one process on a CPU; nothing is trained or written."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from megatron_sphinx.checkpoint.intact import SavedStep
from megatron_sphinx.config import Config
from megatron_sphinx.console import say
from megatron_sphinx.errors import ConfigError, FolderError
from megatron_sphinx.model.architecture import LEAST_BATCH_VIEWS
from megatron_sphinx.model.expert_files import load_expert
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.parallel.place import find_place
from megatron_sphinx.run import resume
from megatron_sphinx.run.job import join, open_run

_TIMEOUT = timedelta(hours=1)  # nobody is waited for


def check(config: Config, ranks: int | None = None) -> None:
    """Look at all that a start of the run looks at, and say what it would do.

    That is the layout, the run folder, the data with its indexes, what is held out too, the first step, the files of
    the visual experts, and the checkpoint or the weights to begin with. Whether another job writes the run folder is
    not looked at, nor GPUs.

    Args:
        config: of the run.
        ranks: of the job that is to come; as few as the layout takes unless given.

    Raises:
        SphinxError: what a start would end with.
    """
    layout = ParallelLayout(world=ranks or config.parallel.smallest_world, config=config.parallel)
    if find_place().world > 1:
        raise ConfigError("--check: is for one process, not for each rank of a job; start it without torchrun or srun")
    say(f"{layout} = {layout.world} ranks")
    _check_folder(Path(config.run.folder))
    alone = replace(  # rows and views at once do not matter for what is looked at
        config,
        parallel=ParallelConfig(),
        data=replace(config.data, micro_batch_rows=1),
        vision=replace(config.vision, batch_views=LEAST_BATCH_VIEWS),
    )
    platform = join("cpu", _TIMEOUT.total_seconds())
    groups = ProcessGroups.create(ParallelLayout(world=1, config=alone.parallel), platform.backend, _TIMEOUT, _TIMEOUT)
    context = open_run(alone, platform, groups)
    plan = context.planner.step(0)
    documents = {document for document, _, _ in plan.text}
    say(f"data: in order; step 0 takes {len(plan.samples)} samples, and text of {len(documents)} documents")
    if context.held_out:
        say(f"validation: {context.held_out}")
    digests = {}
    for item in config.vision.experts:
        _, digests[item.name] = load_expert(item, config.run.seed, config.vision.resize)
        say(f"visual expert {item.name}: {digests[item.name]}")
    chosen = resume.choose(context, resume.open_store(context, digests))
    if chosen is None:
        say("would begin with new weights")
    elif isinstance(chosen, SavedStep):
        say(f"would go on after step {chosen.manifest['step']} from {chosen.path}")
    else:
        say(f"would begin with the weights of {chosen.path}")
    say("checked: nothing stands in the way of the run; nothing was written")


def _check_folder(folder: Path) -> None:
    """Make sure that the run folder is one, or can be made.

    Raises:
        FolderError: it cannot be written.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise FolderError(f"run.folder={folder}: {existing} is a file; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise FolderError(
            f"run.folder={folder}: {existing} cannot be written; name another folder, or ask for the right"
        )
