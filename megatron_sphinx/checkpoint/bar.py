"""The progress bar of the offline programs that stream checkpoints."""

from typing import Any

from tqdm import tqdm


def progress_bar(title: str, size: int, show: bool) -> Any:
    """Make a bar that counts bytes, invisible unless it is to be shown.

    Args:
        title: what is being done.
        size: bytes in all.
        show: whether it is visible.
    """
    return tqdm(
        desc=title, total=size, unit="B", unit_scale=True, disable=not show, dynamic_ncols=True, mininterval=1.0
    )
