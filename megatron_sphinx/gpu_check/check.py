"""The whole check: its jobs in the order of their weight, within the time that is given, and what comes of them."""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_sphinx.gpu_check import runs, steps
from megatron_sphinx.gpu_check.findings import Finding, Values, read
from megatron_sphinx.gpu_check.processes import Clock, TimeIsUpError
from megatron_sphinx.gpu_check.runs import WORST_STEP, Runs
from megatron_sphinx.gpu_check.scales import KINDS, Scale, is_judged
from megatron_sphinx.gpu_check.worker import Job

BOUNDS = {("mixed", 4): 0.50, ("mixed", 8): 0.55}  # share of the card's peak, by the rows of a micro-batch
RATIOS = {"captions": 1.5, "text": 1.2}  # our target tokens/s over the peer's
GRADIENT_SHARE = 0.08  # of a step
PREDICTION = 0.10  # relative, of seconds and of memory


@dataclass
class Check:
    """One call of the command.

    Attributes:
        scale: sizes.
        device: cpu or cuda.
        folder: where data and logs go.
        clock: how much time is left.
        found: what was found so far.
    """

    scale: Scale
    device: str
    folder: Path
    clock: Clock
    found: list[Finding]

    def run(self, sections: Sequence[str]) -> None:
        """Run some sections; what judges the package most comes first."""
        whole, has_profile = Runs(self.scale, self.device, self.folder, self.clock), "profile" in sections
        if "right" in sections:
            self.add("right", "parts", lambda: self.job("right", "kernels", "parts against explicit arithmetic"))
            self.add("right", "runs", lambda: runs.right(whole))
        if "fast" in sections:
            self.add("fast", "table", lambda: self.table(has_profile=has_profile))
            self.add("fast", "demo-like run", lambda: [runs.demo(whole)])
            self.add("fast", "parts", lambda: self.job("fast", "parts", "MoE experts and encoders"))
            self.add("fast", "start-up", lambda: [runs.startup(whole)])
        elif has_profile:
            profile = partial(self.job, "profile", "ours", "profile", has_rows=False, has_profile=True)
            self.add("profile", "profile", profile)

    def add(self, section: str, name: str, look: Callable[[], list[Finding]]) -> None:
        """Add what a part of the check finds; where it breaks, that is one finding more, and the others stay."""
        try:
            self.found += look()
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
            self.found.append(Finding(section=section, name=name, absent=fault, is_required=section == "right"))

    def job(self, section: str, name: str, title: str, **options: Any) -> list[Finding]:
        """Do a job in a process of its own; its findings, and one more where it has failed."""
        number = sum(1 for _ in self.folder.glob("job_*.json"))
        path, out = self.folder / f"job_{number}.json", self.folder / f"job_{number}.out.jsonl"
        job = Job(name=name, scale=self.scale.name, device=self.device, folder=str(self.folder / "data"),
                  out=str(out), options=options)  # fmt: skip
        path.write_text(json.dumps(asdict(job)))
        words = ["-m", "megatron_sphinx.gpu_check.worker", path]
        try:
            process = self.clock.start(words, self.folder / "logs" / f"job_{number}_{name}.txt", runs.ALONE)
            fault = self.clock.wait(process)
        except TimeIsUpError as error:
            fault = str(error)
        found = read(out)
        if fault:
            found.append(Finding(section=section, name=title, absent=fault, is_required=section == "right"))
        return found

    def table(self, *, has_profile: bool) -> list[Finding]:
        """Measure our steps and the peer's in turn, and lay them beside each other."""
        scale, found = self.scale, list[Finding]()
        has_peer = find_spec("transformers") is not None
        sizes: dict[str, list[list[int]]] = {
            "captions": [[size, 1] for size in scale.peer_pairs],
            "text": [[1, size] for size in scale.peer_rows],
        }
        for turn in range(scale.turns):
            is_last = turn == scale.turns - 1
            found += self.job("fast", "ours", f"our steps, turn {turn + 1}", has_rows=True,
                              has_profile=has_profile and is_last)  # fmt: skip
            if not has_peer:
                continue
            if turn == 0 and not is_last:
                for kind, pairs in sizes.items():
                    title = f"the peer's steps of {kind}, turn 1"
                    found += self.job("fast", "peer", title, sizes={kind: pairs}, warmup=1, steps=2)
            chosen = _best_sizes(found) if scale.turns > 1 else _only_sizes(scale)
            if is_last and chosen:
                title = "the peer's steps at its best micro-batches"
                found += self.job("fast", "peer", title, sizes=chosen, warmup=2, steps=scale.steps + 2)
        rows = table_of(found, is_judged=is_judged(scale, self.device))
        if not has_peer:
            why = "transformers is not installed: pip install 'megatron-sphinx[gpu]'"
            rows.append(Finding(section="fast", name="beside the peer", absent=why))
        return [*rows, *(finding for finding in found if finding.absent), *_profile_of(found)]


def _best_sizes(found: Sequence[Finding]) -> dict[str, list[list[int]]]:
    """Choose the peer's fastest micro-batch of each kind, and for mixed steps those of captions and text together."""
    best: dict[str, list[int]] = {}
    for kind in ("captions", "text"):
        rows = [finding.values for finding in found if finding.name.startswith(f"peer {kind} ") and not finding.absent]
        if rows:
            best[kind] = min(rows, key=lambda values: steps.middle([values])[0])["size"]
    if len(best) == 2:
        best["mixed"] = [best["captions"][0], best["text"][1]]
    return {kind: [size] for kind, size in best.items()}


def _only_sizes(scale: Scale) -> dict[str, list[list[int]]]:
    """Take the first of the peer's micro-batches for each kind, where there is no turn to choose one in."""
    return {kind: [[scale.peer_pairs[0], scale.peer_rows[0]]] for kind in KINDS}


def table_of(found: Sequence[Finding], *, is_judged: bool) -> list[Finding]:
    """Join the turns of each row into one finding, with speed, share of the peak and prediction; then the ratios."""
    rows, ours, theirs = list[Finding](), dict[str, float](), dict[str, float]()
    grouped: dict[str, list[Values]] = {}
    for finding in found:
        if finding.name.startswith(("ours ", "peer ")) and not finding.absent:
            grouped.setdefault(finding.name, []).append(finding.values)
    for turns in grouped.values():
        values, kind = turns[0], turns[0]["kind"]
        seconds, worst, count = steps.middle(turns)
        speed = values["targets"] / seconds
        if "size" in values:
            size = " + ".join(map(str, values["size"]))
            facts = {"seconds": seconds, "targets_a_second": speed, "steps": count,
                     "padded_positions": values["padded_positions"]}  # fmt: skip
            rows.append(Finding(section="fast", name=f"peer, {kind}, micro-batch {size}", values=facts))
            theirs[kind] = max(theirs.get(kind, 0.0), speed)
        else:
            rows += _our_rows(values, seconds, worst, count, is_judged=is_judged)
            ours[kind] = max(ours.get(kind, 0.0), speed)
    for kind in KINDS:
        if kind in ours and kind in theirs:
            ratio, bound = ours[kind] / theirs[kind], RATIOS.get(kind)
            values = {"ratio": ratio} | ({"bound": bound} if bound and is_judged else {})
            is_fast = ratio >= bound if bound and is_judged else None
            rows.append(Finding(section="fast", name=f"{kind}, over the best peer", values=values, is_right=is_fast))
    return rows


def _our_rows(values: Mapping[str, Any], seconds: float, worst: float, count: int, *, is_judged: bool) -> list[Finding]:
    """Make the rows of one kind of our steps: its speed, its prediction, its worst step."""
    kind, rows = values["kind"], values["micro_batch_rows"]
    name, share = f"ours, {kind}, {rows} rows a micro-batch", values["flops"] / seconds / values["peak_flops"]
    facts = {"seconds": seconds, "targets_a_second": values["targets"] / seconds, "peak_share": share, "steps": count,
             "worst_over_median": worst}  # fmt: skip
    bound = BOUNDS.get((kind, rows)) if is_judged else None
    found = [
        Finding(
            section="fast",
            name=name,
            values=facts | ({"bound": bound} if bound else {}),
            is_right=share >= bound and worst <= WORST_STEP if bound else None,
        )
    ]
    for quantity, measured in (("seconds", seconds), ("memory_bytes", values.get("memory_bytes"))):
        if measured and (predicted := values.get(f"predicted_{quantity}")):
            ratio = predicted / measured
            facts = {f"predicted_{quantity}": predicted, f"measured_{quantity}": measured, "ratio": ratio}
            found.append(
                Finding(
                    section="fast",
                    name=f"predicted {quantity.partition('_')[0]}, {kind}, {rows} rows",
                    values=facts | {"bound": PREDICTION},
                    is_right=abs(ratio - 1) <= PREDICTION,
                )
            )
    return found


def _profile_of(found: Sequence[Finding]) -> list[Finding]:
    """Take the findings of the profile, and judge the gradients' share."""
    judged = []
    for finding in found:
        if finding.section != "profile" or finding.absent:
            continue
        if (share := finding.values.get("gradient_share")) is not None:
            values = finding.values | {"bound": GRADIENT_SHARE}
            finding = Finding(section="profile", name=finding.name, values=values, is_right=share <= GRADIENT_SHARE)
        judged.append(finding)
    return judged


def check(
    scale: Scale, device: str, sections: Sequence[str], *, minutes: float, folder: Path | None = None
) -> list[Finding]:
    """Check the package on this machine.

    Args:
        scale: sizes.
        device: cpu or cuda.
        sections: which parts, of `SECTIONS`.
        minutes: how long it may take; what has not been done by then is left out, and said so.
        folder: where data and logs are kept; a temporary folder unless given.

    Returns:
        All findings, section by section.
    """
    clock = Clock(time.monotonic() + 60 * minutes)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
        place = folder or Path(temporary)
        (place / "data").mkdir(parents=True, exist_ok=True)
        work = Check(scale, device, place.resolve(), clock, [])
        work.run(sections)
        return work.found
