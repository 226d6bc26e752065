"""Check on one GPU that the package is right and fast; print a table, write JSON and a page.

    megatron-sphinx gpu-check [SECTION ...] [--out FILE.json] [--page PAGE.md]

SECTION is right (losses against the CPU's, resume, attention, features), fast (steps beside transformers with
DeepSpeed, experts, encoders, start-up) or profile (the heaviest kernels of a step); all three unless some are named.
Nothing is downloaded: data is made up, weights are drawn. Exits with 0, or with 1 where a bound of right is not kept.
"""

import argparse
import time
from pathlib import Path

from megatron_sphinx.errors import ConfigError
from megatron_sphinx.gpu_check.findings import is_passed
from megatron_sphinx.gpu_check.scales import SCALES, SECTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help="right, fast, profile; default: all")
    add("--out", type=Path, metavar="FILE.json", help="file for all that was found")
    add("--page", type=Path, metavar="PAGE.md", help="file for a page of it")
    add("--scale", choices=SCALES, default="full", help="small, to see that it runs, also on a CPU; default: full")
    add("--minutes", type=float, default=6.0, help="what is not done by then is left out; default: 6")
    add("--folder", type=Path, help="keeps data and logs; default: a temporary folder")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    if unknown := [section for section in args.sections if section not in SECTIONS]:
        raise ConfigError(f"gpu-check {unknown[0]}: no such section; name some of {', '.join(SECTIONS)}, or none")
    if not args.minutes > 0:
        raise ConfigError(f"--minutes={args.minutes}: must be more than 0")
    from megatron_sphinx.gpu_check import report
    from megatron_sphinx.gpu_check.check import check
    from megatron_sphinx.parallel import devices

    sight = devices.look("auto", is_alone=False)  # another process asks CUDA: this one must not hold it
    if not sight.gpus and args.scale == "full":
        why = sight.failure or sight.reason or "none was found"
        raise ConfigError(f"--scale=full: needs a GPU ({why}); run it where there is one, or give --scale small")
    device, begin = "cuda" if sight.gpus else "cpu", time.monotonic()
    sections = args.sections or SECTIONS
    found = check(SCALES[args.scale], device, sections, minutes=args.minutes, folder=args.folder)
    told = report.report_of(found, scale=args.scale, device=device, seconds=time.monotonic() - begin)
    print(report.table(found))
    if args.out:
        report.write(args.out, report.as_json(told), "--out")
    if args.page:
        report.write(args.page, report.page(told, found), "--page")
    return 0 if is_passed(found) else 1
