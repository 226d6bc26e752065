"""The Segment Anything Model by transformers, with weights that the user has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_sphinx.cascades.segmentation import Mask
from megatron_sphinx.errors import CheckpointError, ConfigError
from megatron_sphinx.parsing import ParseError, read_json
from megatron_sphinx.prepare.boxes import Box


class SegmentAnything:
    """Separates an object by a network that is prompted with its box; one mask a box, as the released demo has it.

    Args:
        folder: of weights and configuration as transformers keeps them, such as a copy of facebook/sam-vit-huge.
        device: that it computes on, cpu or cuda.

    Raises:
        CheckpointError: the folder holds no such model, or not all of its weights.
        ConfigError: transformers is not installed.

    Source: Kirillov et al., arXiv:2304.02643; accessory/demos/multi_turn_mm_box.py of LLaMA2-Accessory.
    """

    name = "SAM (transformers)"

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        check_sam(folder)
        try:
            from transformers import SamImageProcessor, SamModel, SamProcessor
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            raise ConfigError("transformers is not installed; pip install 'megatron-sphinx[cascades]'") from error
        disable_progress_bar()
        try:
            self._processor = SamProcessor(SamImageProcessor.from_pretrained(folder, local_files_only=True))
            model, told = SamModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"sam={folder}: does not load ({reason}); copy the whole folder again") from error
        if missing := sorted(told["missing_keys"]):
            raise CheckpointError(
                f"sam={folder}: {len(missing)} weights are missing, {missing[0]} first; copy the whole folder again"
            )
        self._model, self._device = model.to(device).eval(), device

    def masks(self, picture: Image.Image, boxes: Sequence[Box]) -> list[Mask]:
        """Return a mask for each box; see Segmenter."""
        import torch

        given: Any = self._processor(picture, input_boxes=[[list(box) for box in boxes]], return_tensors="pt")
        with torch.inference_mode():
            made = self._model(**given.to(self._device), multimask_output=False)
        (masks,) = self._processor.post_process_masks(
            made.pred_masks.cpu(), given["original_sizes"].cpu(), given["reshaped_input_sizes"].cpu()
        )
        return [np.asarray(mask[0], bool) for mask in masks]


def check_sam(folder: Path) -> None:
    """Refuse a folder that holds no SAM, before anything that takes long is imported.

    Raises:
        CheckpointError: it has no configuration of one.
    """
    try:
        content = read_json(folder / "config.json")
    except (OSError, ParseError) as error:
        raise CheckpointError(
            f"sam={folder}: has no config.json that can be read; give the folder of a SAM that transformers has saved"
        ) from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "sam":
        raise CheckpointError(f"sam={folder}: is a model of type {kind!r}; give the folder of one of type 'sam'")
