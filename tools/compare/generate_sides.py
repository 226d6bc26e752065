"""The sides of tools/compare/generate.py: our engine, transformers' generate, and vLLM where it imports."""

import io
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria

from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.device import Platform
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.generation.answering import Load
from megatron_sphinx.generation.engine import Language
from megatron_sphinx.generation.executor import LanguageRankExecutor
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.generation.pictures import picture_of
from megatron_sphinx.generation.requests import Chunk, Prompt, Sampling
from megatron_sphinx.generation.runner import ModelRunner
from megatron_sphinx.generation.service import Service
from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig, VisualExpertConfig
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.model.language import build_language, draw_weights
from megatron_sphinx.model.sphinx import SphinxModel
from megatron_sphinx.model.vision import VisualProjection
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.run.job import join
from megatron_sphinx.serving.ranks import build_model
from megatron_sphinx.serving.source import ModelSource

BLOCK = 16
GRID = 16  # of a picture: 259 positions with its class token and the tags at its ends


@dataclass(frozen=True)
class Request:
    """A request that has an answer of known length.

    Attributes:
        prompt: what is asked.
        count: tokens of the answer.
    """

    prompt: Prompt
    count: int


@dataclass
class Heard:
    """What came of requests that were asked at once.

    Attributes:
        seconds: since they were asked, for each token of each answer.
        tokens: of each answer.
        cache_bytes: keys and values that were kept at the fullest moment.
        hit_rate: share of the prompts' tokens that was in the prefix cache.
    """

    seconds: list[list[float]]
    tokens: list[list[int]]
    cache_bytes: int = 0
    hit_rate: float = 0.0


class Side(Protocol):
    """One of the sides that are compared."""

    def __call__(self, requests: Sequence[Request]) -> Heard:
        """Answer requests that come at once."""


class Mute:
    """Makes no text of tokens, since the peers make none either; a TextFeed that lets each token be heard at once."""

    def __init__(self, _stop: tuple[str, ...]) -> None:
        pass

    def feed(self, _token: int) -> tuple[str, bool]:
        """Show a text, so that the token is heard."""
        return ".", False

    def rest(self) -> str:
        """Show nothing that was held back."""
        return ""


@dataclass
class _Answer:
    """A listener that notes when tokens come, and how full the cache is before they are given back."""

    begin: float
    ended: "SimpleQueue[object]"
    load: Callable[[], Load]
    places: int = 0
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def __call__(self, chunk: Chunk | SphinxError) -> None:
        """Take a chunk."""
        if isinstance(chunk, SphinxError):
            self.ended.put(chunk)
            return
        self.seconds += [time.perf_counter() - self.begin] * len(chunk.tokens)
        self.tokens += chunk.tokens
        self.places = max(self.places, self.load().cached_places)
        if chunk.finish:
            self.ended.put(None)


class Ours:
    """Our engine around an executor.

    Args:
        executor: of the model.
        limits: of what it takes on at once.
        token_bytes: what a token takes in the cache.
    """

    def __init__(self, executor: LanguageRankExecutor, limits: Limits, token_bytes: int) -> None:
        self._service = Service(executor, Language((), Mute), limits)
        self._token_bytes = token_bytes

    def __call__(self, requests: Sequence[Request]) -> Heard:
        """Answer requests that come at once."""
        ended: SimpleQueue[object] = SimpleQueue()
        before = self._service.load()
        begin = time.perf_counter()
        answers = [_Answer(begin, ended, self._service.load) for _ in requests]
        for request, answer in zip(requests, answers, strict=True):
            sampling = Sampling(max_new_tokens=request.count, ignore_eos=True)
            self._service.submit(request.prompt, sampling, answer)
        for _ in requests:
            error = ended.get()
            if isinstance(error, Exception):
                raise error
        after = self._service.load()
        asked = after.prompt_tokens - before.prompt_tokens
        return Heard(
            [answer.seconds for answer in answers],
            [answer.tokens for answer in answers],
            max(answer.places for answer in answers) * self._token_bytes,
            (after.hit_tokens - before.hit_tokens) / asked,
        )

    def close(self) -> None:
        """End the engine's thread."""
        self._service.close()


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each step of transformers' generate has drawn its tokens; ends nothing."""

    def __init__(self) -> None:
        self.begin, self.seconds = time.perf_counter(), list[float]()

    def __call__(self, input_ids: torch.Tensor, _scores: object, **_: Any) -> torch.Tensor:
        """Note the time once the tokens are there."""
        input_ids[0, -1].item()
        self.seconds.append(time.perf_counter() - self.begin)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Transformers:
    """transformers' generate: prompts padded on their left, and as many steps as the longest answer takes.

    Args:
        model: what answers.
        options: of `generate` beside the lengths.
    """

    def __init__(self, model: LlamaForCausalLM, **options: Any) -> None:
        self._model, self._options = model, options

    def __call__(self, requests: Sequence[Request]) -> Heard:
        """Answer requests that come at once."""
        clock = _Clock()
        longest = max(len(request.prompt.tokens) for request in requests)
        steps = max(request.count for request in requests)
        ids = torch.zeros(len(requests), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt.tokens) :] = torch.tensor(request.prompt.tokens)
            mask[row, longest - len(request.prompt.tokens) :] = 1
        device, config = self._model.device, self._model.config
        with torch.inference_mode():
            out = self._model.generate(
                ids.to(device), attention_mask=mask.to(device), max_new_tokens=steps, do_sample=False,
                eos_token_id=None, pad_token_id=0, stopping_criteria=[clock], **self._options,
            )  # fmt: skip
        drawn = out[:, longest:].tolist()
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        token_bytes *= self._model.dtype.itemsize
        return Heard(
            [clock.seconds[: request.count] for request in requests],
            [tokens[: request.count] for tokens, request in zip(drawn, requests, strict=True)],
            len(requests) * (longest + steps) * token_bytes,
        )


class Vllm:
    """vLLM, all requests at once; it tells no times of single tokens here, so the first ones' are left out.

    Args:
        folder: of the model.
        dtype: fp32 or bf16.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        from vllm import LLM

        name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
        self._model = LLM(str(folder), dtype=name, skip_tokenizer_init=True, enable_prefix_caching=False)

    def __call__(self, requests: Sequence[Request]) -> Heard:
        """Answer requests that come at once."""
        from vllm import SamplingParams, TokensPrompt

        begin = time.perf_counter()
        out = self._model.generate(
            [TokensPrompt(prompt_token_ids=list(request.prompt.tokens)) for request in requests],
            [
                SamplingParams(temperature=0, max_tokens=request.count, ignore_eos=True, detokenize=False)
                for request in requests
            ],
            use_tqdm=False,
        )
        end = time.perf_counter() - begin
        tokens = [list(one.outputs[0].token_ids) for one in out]
        return Heard([[end] * len(answer) for answer in tokens], tokens)


def make_llama(folder: Path, shape: Namespace) -> None:
    """Save a LLaMA of this shape with random weights as transformers saves it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=shape.layers, hidden_size=shape.hidden, intermediate_size=shape.ffn,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups, vocab_size=shape.vocabulary,
        initializer_range=0.05,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def compiled() -> dict[str, Any]:
    """Make transformers' generate take its static cache and compile the model, on the CPU, too."""
    config = CompileConfig()
    config._compile_all_devices = True  # there is no public way, and without it the CPU's row would not be compiled
    return {"cache_implementation": "static", "compile_config": config}


def open_transformers(folder: Path, dtype: torch.dtype, platform: Platform) -> LlamaForCausalLM:
    """Load a model as the peer does."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(platform.device).eval()


def start(device: str) -> tuple[Platform, ProcessGroups]:
    """Make this process a job of one rank."""
    platform, forever = join(device, 60), timedelta(days=1)
    layout = ParallelLayout(world=1, config=ParallelConfig())
    return platform, ProcessGroups.create(layout, platform.backend, forever, forever)


def ours_of(
    folder: Path, dtype: torch.dtype, groups: ProcessGroups, platform: Platform, *, places: int, positions: int
) -> Ours:
    """Load a model as ours; nothing is taken from prompts that came before."""
    checkpoint = open_checkpoint(folder, None)
    source = ModelSource(
        name=folder.name, checkpoint=checkpoint, language=checkpoint.model.language, vision=None, tokenizer=folder,
        positions=positions, precision=None, seed=0, run=None,
    )  # fmt: skip
    model = build_model(source, groups, platform, dtype, positions)
    return _engine(model, groups, None, places, positions, source.language.vocabulary, has_prefix_cache=False)


def sphinx(
    shape: LanguageConfig, dtype: torch.dtype, groups: ProcessGroups, platform: Platform, *, places: int, **limits: Any
) -> tuple[Ours, VisionConfig]:
    """Make a small SPHINX with random weights, with the prefix cache or without."""
    vision = VisionConfig(experts=(VisualExpertConfig(name="dinov2_small", weights="random"),), grid=GRID)
    projection = VisualProjection(vision, shape.hidden, dtype=dtype, device=platform.device)
    model = SphinxModel(build_language(shape, groups, dtype=dtype, sequence_length=2048), projection, groups)
    draw_weights(model, shape, groups, seed=1)
    encoders = FrozenEncoders(vision, device=platform.device, dtype=platform.encoder_dtype(vision.precision), seed=1)
    return _engine(model, groups, encoders, places, 2048, shape.vocabulary, **limits), vision


def _engine(
    model: SphinxModel,
    groups: ProcessGroups,
    encoders: FrozenEncoders | None,
    places: int,
    positions: int,
    vocabulary: int,
    **limits: Any,
) -> Ours:
    """Put the engine around a model that has its weights."""
    runner = ModelRunner(model.eval().requires_grad_(False), places=places, vocabulary=vocabulary)
    executor = LanguageRankExecutor(runner, groups, encoders, places=places, block=BLOCK, positions=positions)
    return Ours(executor, Limits(**limits), runner.cache_bytes // (places + 1))


def questions(vision: VisionConfig, number: int, count: int, vocabulary: int) -> list[Request]:
    """Ask a few short questions about a picture of noise, which differs by its number."""
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (224, 224, 3), dtype=np.uint8)).save(file, "png")
    picture = picture_of(file.getvalue(), vision)
    draw = partial(rng.integers, 1, vocabulary)
    system = draw(32).tolist()  # SPHINX's system prompt has about as many tokens
    return [
        Request(Prompt((1, *[0] * picture.positions, *system, *draw(12).tolist()), picture), 4) for _ in range(count)
    ]
