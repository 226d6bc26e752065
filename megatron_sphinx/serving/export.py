"""Prompts as embeddings, for engines that know the language model but not its pictures."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.device import Platform
from megatron_sphinx.errors import ConfigError, DataError, writing
from megatron_sphinx.generation.chat import make_chat
from megatron_sphinx.generation.pictures import picture_of, views_of_picture
from megatron_sphinx.generation.requests import Prompt
from megatron_sphinx.generation.templates import template_of
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.sphinx import place_views
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.run.provenance import require_trained_as
from megatron_sphinx.serving.answer_file import encoded
from megatron_sphinx.serving.questions import Asking, Question, questions_of
from megatron_sphinx.serving.ranks import build_model
from megatron_sphinx.serving.rows import Source
from megatron_sphinx.serving.source import ModelSource

INDEX, TENSOR = "index.jsonl", "prompt_embeds"


@dataclass(frozen=True)
class ExportReport:
    """What an export has done.

    Attributes:
        prompts: how many have embeddings now.
        errors: how many rows have none; the index says why.
        bytes: of the embeddings.
    """

    prompts: int
    errors: int
    bytes: int


class PromptEmbedder:
    """Makes the embeddings that the first layer of a SPHINX sees of a prompt; of its language model it loads one layer.

    Args:
        source: the model.
        groups: of this process alone.
        platform: what it computes on.
        dtype: of the embeddings.
        template: name of the chat template.

    Raises:
        ConfigError: there is no such template.
        SphinxError: the weights, the encoders or the tokenizer cannot be read.
    """

    def __init__(
        self, source: ModelSource, groups: ProcessGroups, platform: Platform, dtype: torch.dtype, template: str
    ) -> None:
        self._template, self._tokenizer = template_of(template), Tokenizer(source.tokenizer)
        self._positions, self._vision = source.positions, source.vision
        shallow = replace(source, language=replace(source.language, layers=1))
        self._model = build_model(shallow, groups, platform, dtype, source.positions)
        self._device = platform.device
        self._encoders = None
        if source.vision is not None:
            precision = platform.encoder_dtype(source.vision.precision)
            self._encoders = FrozenEncoders(source.vision, device=self._device, dtype=precision, seed=source.seed)
            if source.run is not None:
                digest = self._tokenizer.identity.sha256
                require_trained_as(source.checkpoint.folder, source.run, digest, self._encoders.sha256)

    def prompt(self, question: Question, asking: Asking, new_tokens: int) -> Prompt:
        """Make the tokens of a question, 0 where its picture stands.

        Args:
            question: what is asked.
            asking: how rows become questions.
            new_tokens: that there must be room for behind it.

        Raises:
            DataError: it cannot be asked, or not of this model.
        """
        content = question.content(asking)
        if content is not None and self._vision is None:
            raise DataError("image: this model has no projections of pictures; ask it without one")
        picture = None if content is None or self._vision is None else picture_of(content, self._vision)
        return make_chat(
            question.messages, picture, self._template, self._tokenizer,
            positions=self._positions, max_new_tokens=new_tokens,
        ).prompt  # fmt: skip

    @torch.inference_mode()
    def embed(self, prompt: Prompt) -> Tensor:
        """Return what stands for the tokens of a prompt, and for its picture among them: [positions, hidden]."""
        tokens = torch.tensor([prompt.tokens], device=self._device)
        embeddings: Tensor = self._model.language.embedding(input_ids=tokens, position_ids=None)[:, 0]
        if prompt.picture is None or self._encoders is None:
            return embeddings
        features = self._encoders(views_of_picture(prompt.picture, self._encoders.config)).to(self._device)
        blocks = self._model.embed_picture(features, prompt.picture.encoded)
        return place_views(embeddings, blocks, torch.arange(1, 1 + len(blocks), device=self._device))


def export_embeddings(
    embedder: PromptEmbedder, sources: Sequence[Source], target: Path, asking: Asking, new_tokens: int
) -> ExportReport:
    """Write the embeddings of prompts, a file each, and an index of them; the folder is there when all of it is.

    Args:
        embedder: of the model.
        sources: of the questions.
        target: folder to make.
        asking: how rows become questions.
        new_tokens: that there must be room for behind each prompt.

    Raises:
        ConfigError: the folder exists.
        DataError: an input cannot be read.
        FolderError: the folder cannot be written.
    """
    if os.path.lexists(target):
        raise ConfigError(f"--output={target}: exists; give another folder, or remove it")
    lines = list[dict[str, Any]]()
    with writing(target), _appearing(target) as partial:
        for number, question in enumerate(questions_of(sources, asking)):
            try:
                prompt = embedder.prompt(question, asking, new_tokens)
            except DataError as error:
                lines.append({**question.columns, "error": str(error)})
                continue
            name = f"{number:08d}.safetensors"
            tensors = {TENSOR: embedder.embed(prompt).cpu().contiguous(), "tokens": torch.tensor(prompt.tokens)}
            save_file(tensors, partial / name)
            lines.append({**question.columns, "file": name, "positions": len(prompt.tokens)})
        (partial / INDEX).write_bytes(b"".join(map(encoded, lines)))
        total = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    failed = sum("error" in line for line in lines)
    return ExportReport(len(lines) - failed, failed, total)


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Give a folder to write to, which becomes the target at the end, or goes away on an error."""
    partial = target.with_name(f".{target.name}.partial.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
