"""What has become of the tensors of a checkpoint, counted, so that none is dropped without a word."""

import re
from collections.abc import Iterable, Mapping

_NUMBER = re.compile(r"\d+")


def left_out_line(left_out: Mapping[str, str]) -> str:
    """Say which tensors are left out and why, those that differ by a number only in one word.

    Args:
        left_out: the reason by the tensor's name.
    """
    counts: dict[tuple[str, str], int] = {}
    for name, reason in left_out.items():
        pattern = (_NUMBER.sub("*", name), reason)
        counts[pattern] = counts.get(pattern, 0) + 1
    named = [f"{count} {name}" if count > 1 else name for (name, _), count in counts.items()]
    reasons = dict.fromkeys(reason for _, reason in counts)
    return "; ".join(
        f"{', '.join(text for text, (_, why) in zip(named, counts, strict=True) if why == reason)}: {reason}"
        for reason in reasons
    )


def balance(title: str, parts: Iterable[tuple[int, str]], left_out: Mapping[str, str]) -> str:
    """Say that all tensors of a checkpoint are accounted for.

    Args:
        title: whose tensors they are.
        parts: how many became what.
        left_out: those that became nothing: the reason by the tensor's name.
    """
    shown = [(count, what) for count, what in parts if count] + [(len(left_out), "left out")]
    total = sum(count for count, _ in shown)
    text = f"{title}: {total} tensors = {' + '.join(f'{count} {what}' for count, what in shown)}"
    return text + (f" ({left_out_line(left_out)})" if left_out else "")
