"""The ranks that something is planned for, as arguments say them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_sphinx.cli.command import add_configuration

if TYPE_CHECKING:
    from megatron_sphinx.config import Config
    from megatron_sphinx.parallel.layout import ParallelLayout


_KIND = "a100-80g"  # what a plan is for unless it is told


@dataclass(frozen=True)
class Plan:
    """What is planned, and for how many ranks.

    Attributes:
        config: the configuration.
        nodes: of the cluster.
        ranks_per_node: GPUs, or ranks, of each node.
        ranks: of the job.
        kind: of the GPUs.
    """

    config: Config
    nodes: int
    ranks_per_node: int
    ranks: int
    kind: str

    @property
    def layout(self) -> ParallelLayout:
        """The configured layout on these ranks.

        Raises:
            ConfigError: the ranks cannot be divided so.
        """
        from megatron_sphinx.parallel.layout import ParallelLayout

        return ParallelLayout(world=self.ranks, config=self.config.parallel)


def add_cluster(parser: argparse.ArgumentParser, *, is_optional: bool = False) -> None:
    """Let a parser take a configuration and the number of ranks."""
    add_configuration(parser, is_optional=is_optional)
    parser.add_argument("--ranks", type=int, help="ranks of the job; default: one replica")
    parser.add_argument("--nodes", type=int, help="nodes of a cluster")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs, or ranks, of each node")


def add_gpu(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the kind of GPU, whose memory also decides where a value of the configuration is auto."""
    parser.add_argument("--gpu", help=f"a100-80g, h100-80g, ... of sizing/hardware.yaml, or a file; default: {_KIND}")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Let a parser take whether JSON is printed instead of a table."""
    parser.add_argument("--json", action="store_true", help="as JSON")


def read(args: argparse.Namespace) -> Plan:
    """Read the configuration and count the ranks.

    Raises:
        ConfigError: the configuration cannot be used.
    """
    from megatron_sphinx import config as configuration

    config = configuration.load(args.config, args.overrides)
    nodes = args.nodes or 1
    per_node = args.gpus_per_node or args.ranks or config.parallel.smallest_world
    return Plan(config, nodes, per_node, ranks=args.ranks or nodes * per_node, kind=getattr(args, "gpu", None) or _KIND)


def show(facts: Any, table: Callable[[Any], str], *, is_json: bool) -> int:
    """Print facts as JSON, or as the table that is made of them; the exit status."""
    print(json.dumps(facts, indent=1) if is_json else table(facts))
    return 0
