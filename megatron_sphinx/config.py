"""A run's configuration: a preset, YAML files, then key=value overrides, into checked dataclasses.

A section whose class is not here is a dataclass in the room that it configures. docs/configuration.md lists every key;
`config_reference.py` makes it from the docstrings of these classes.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml

from megatron_sphinx.config_names import meant
from megatron_sphinx.data.config import DataConfig, ValidationConfig
from megatron_sphinx.errors import ConfigError, shortened
from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig
from megatron_sphinx.parallel.layout import ParallelConfig
from megatron_sphinx.ranges import Range, check_ranges
from megatron_sphinx.stage.dealing import StageConfig
from megatron_sphinx.training.divergence import DivergenceConfig
from megatron_sphinx.training.optimizer import OptimizerConfig
from megatron_sphinx.training.profile import ProfileConfig
from megatron_sphinx.values import build, check_choice, merge, override, read_mapping

_MOST_STEPS, _MONTH = 99_999_999, 2_592_000
PRESETS = Path(str(resources.files("megatron_sphinx") / "presets"))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives, and what holds for all of it.

    Attributes:
        folder: the run folder, which all that the run writes goes to; a path relative to where the job is started. One
            job at a time writes it.
        seed: the number that every random choice of the run follows from: new weights and the order of the data.
        device: what ranks compute on: cpu; cuda, a GPU for each rank; or auto, cuda if each rank of the job has a GPU
            of its own, else cpu.
        timeout (seconds): how long a rank may get no further, or not be heard of, before it ends the job and is named;
            at least 3.
        storage_timeout (seconds): how long a rank may take to start up or to save a checkpoint before it ends the job
            and is named; at least run.timeout.
        print_interval (steps): how often a progress line is printed.
        straggler_interval (steps): how often each rank's speed is probed, by a matrix product of some milliseconds; 0
            for never.
        straggler_ratio: how many times the median rank's time a rank must have taken in each of its last three probes
            to be reported; above 1.
    """

    folder: str
    seed: Annotated[int, Range(least=0, most=10**18, why="random generators take no other seeds")] = 1
    device: str = "auto"
    timeout: Annotated[
        float, Range(least=3, most=_MONTH, why="ranks are heard of only so often; the most is 30 days")
    ] = 600.0
    storage_timeout: Annotated[float, Range(least=3, most=_MONTH, why="the most is 30 days")] = 1800.0
    print_interval: Annotated[int, Range(least=1, most=_MOST_STEPS, why="a line is printed every so many steps")] = 10
    straggler_interval: Annotated[int, Range(least=0, most=_MOST_STEPS, why="0 is for never")] = 100
    straggler_ratio: Annotated[float, Range(above=1, most=1000, why="a rank at 1 is as fast as the others")] = 1.3

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"run.device={self.device}: must be auto, cpu or cuda")
        check_ranges(self, "run.")
        if os.path.normpath(self.folder.strip() or ".") in (".", "/", "//"):
            raise ConfigError(
                f"run.folder={self.folder!r}: all that a run writes would lie among what is there; "
                f"name a folder of its own, e.g. runs/first"
            )
        if not self.storage_timeout >= self.timeout:
            raise ConfigError(
                f"run.storage_timeout={self.storage_timeout}: must be at least run.timeout={self.timeout}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What to train, how long and how precisely.

    Attributes:
        recipe: the training recipe whose values fill what neither the files nor the preset give: stage1, stage2 or
            one_stage, the files of presets/recipes/.
        steps (steps): length of the whole run in optimizer steps; 0 where training.epochs gives it.
        epochs (passes): length of the whole run in passes over the pairs or conversations, which are counted in steps
            when the data is opened; 0 where training.steps gives it.
        train: which weights are trained: all (language model, projections, tags), projections (with tags and skip
            token) or language. What is not trained stays as model.weights has it; the encoders always do.
        precision: the type of weights and activations: bf16 (fp32 master weights in the optimizer) or fp32.
        deterministic: whether GPUs compute by kernels that give equal bits each time, where torch has them: then a run
            that is repeated or goes on from a checkpoint has the bits of one in one go. Without it attention over
            documents of several hundred tokens may differ in the last bits. On CPUs bits are equal anyway.
        activation_checkpointing: what backward computes again instead of keeping it: none; selective, the feed-forward
            layers and experts; or full, whole layers from their inputs.
        checkpointed_layers (layers): how many layers of each pipeline stage are computed again with
            training.activation_checkpointing=full; null for all of them.
        profile: the steps that torch's profiler records.
    """

    recipe: str | None = None
    steps: Annotated[int, Range(least=0, most=_MOST_STEPS, why="checkpoints are named by steps of eight digits")] = 0
    epochs: Annotated[float, Range(least=0, most=1_000_000)] = 0.0
    train: str = "all"
    precision: str = "bf16"
    deterministic: bool = False
    activation_checkpointing: str = "none"
    checkpointed_layers: Annotated[int | None, Range(least=1, most=10_000, why="null is for all")] = None
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        check_ranges(self, "training.")
        check_choice("training.train", self.train, ("all", "projections", "language"))
        if self.precision == "fp8":
            raise ConfigError(
                "training.precision=fp8: needs model.kernels=transformer_engine, and is not supported yet even there; "
                "use bf16"
            )
        check_choice("training.precision", self.precision, ("bf16", "fp32"))
        check_choice("training.activation_checkpointing", self.activation_checkpointing, ("none", "selective", "full"))
        if self.checkpointed_layers is not None and self.activation_checkpointing != "full":
            raise ConfigError(
                f"training.checkpointed_layers={self.checkpointed_layers}: is for "
                f"training.activation_checkpointing=full only; set that, or leave this out"
            )
        if not self.steps and not self.epochs:
            raise ConfigError("training.steps=0: training.epochs is 0 too; a run needs one of them")
        if self.steps and self.epochs:
            raise ConfigError(f"training.steps={self.steps}: training.epochs={self.epochs} too; set the other one to 0")
        if self.steps:
            self.profile.check_steps(self.steps)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the two streams weigh in the loss.

    Attributes:
        text_weight: weight of a text token in the mean over all target tokens of a step, beside the 1 of a token of a
            caption or an answer; at least 0.
    """

    text_weight: Annotated[float, Range(least=0, most=1000, why="0 trains on no text")] = 1.0

    def __post_init__(self) -> None:
        check_ranges(self, "loss.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a training state is kept.

    Attributes:
        interval (steps): how often a checkpoint is made; the last step always makes one.
        keep (checkpoints): how many of the newest stay, beside the one that the run goes on from; at least 1.
        resume: which checkpoint the run goes on from: auto (the newest intact one, or a fresh start), none, or the path
            of one. Where the run folder has later steps than that, they are moved aside.
    """

    interval: Annotated[int, Range(least=1, most=10**9, why="a checkpoint is made every so many steps")] = 1000
    keep: Annotated[int, Range(least=1, most=10**9, why="a run goes on from its newest one")] = 2
    resume: str = "auto"

    def __post_init__(self) -> None:
        check_ranges(self, "checkpoint.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of, a field for each section of the file; checks what no section can check alone.

    Attributes:
        run: where the run lives, what it computes on, and how long a rank may be silent.
        model: shape of the language model, and the weights that it begins with.
        vision: the frozen visual experts, and how a picture becomes views and tokens.
        data: the streams of samples and of text, and what a step takes of each.
        training: how long the run is, which weights it trains, and how precisely.
        optimizer: AdamW and the schedule of its learning rate.
        parallel: how the ranks of a job divide the model.
        stage: the encoder stage, which runs ahead of the language model.
        loss: how the two streams weigh in the loss.
        checkpoint: when a training state is saved, how many are kept, and which one a run goes on from.
        divergence: what happens to a step whose loss or gradient is not finite, or spikes.
        validation: held-out data, whose loss is computed now and then.
    """

    run: RunConfig
    model: LanguageConfig
    vision: VisionConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        overhead = 2 + self.vision.most_image_positions
        if self.data.sequence_length <= overhead:
            raise ConfigError(
                f"data.sequence_length={self.data.sequence_length}: an image takes {overhead} positions of a row "
                f"before its text; use more than {overhead}"
            )
        steps, warmup = self.training.steps, self.optimizer.warmup_steps
        if self.optimizer.learning_rate and steps and warmup is not None and warmup > steps:
            raise ConfigError(
                f"optimizer.warmup_steps={warmup}: training.steps={steps} end before it, so that the rate never "
                f"reaches optimizer.learning_rate; use fewer, or null for a twentieth of the steps"
            )
        if self.training.train == "projections":
            if self.parallel.pipeline > 1:
                raise ConfigError(
                    f"parallel.pipeline={self.parallel.pipeline}: with training.train=projections all but the first "
                    f"stage have nothing to train; use 1"
                )
            if not self.data.samples_per_step:
                raise ConfigError("training.train=projections: the run takes no pairs and no conversations; train all")
        self.validation.check_amounts(self.data)
        self._check_layout()

    def _check_layout(self) -> None:
        """Refuse sizes of the layout that do not divide the model."""
        model, sizes = self.model, self.parallel
        sizes.stage_layers(model.layers)
        if model.experts and sizes.tensor > 1 and not sizes.sequence:
            raise ConfigError(
                f"parallel.sequence=false: with model.experts={model.experts} the tensor ranks must share the "
                f"tokens; set parallel.sequence=true, or parallel.tensor=1"
            )
        if not model.experts:
            for name in ("expert", "expert_tensor"):
                if (ranks := getattr(sizes, name)) > 1:
                    raise ConfigError(f"parallel.{name}={ranks}: the model has no experts; use 1, or set model.experts")
        by_expert_ranks = [("expert", "experts"), ("expert_tensor", "ffn")] if model.experts else [("tensor", "ffn")]
        divided_by_tensor = [("tensor", name) for name in ("heads", "groups", "padded_vocabulary")]
        for axis, name in divided_by_tensor + by_expert_ranks:
            ranks, size = getattr(sizes, axis), getattr(model, name)
            if size % ranks:
                raise ConfigError(
                    f"parallel.{axis}={ranks}: must divide model.{name}={size}; use one of "
                    f"{[n for n in range(1, size + 1) if size % n == 0][:12]}"
                )

    def with_epochs_in_steps(self, samples: int) -> "Config":
        """Replace epochs, of training and of the warm-up, by the steps that they take with `samples` samples an epoch.

        What follows from the number of steps, and what is a share of another value, is a number then too.

        Raises:
            ConfigError: epochs are given, but nothing to count them by; or the warm-up is longer than the run.
        """
        training, optimizer, amount = self.training, self.optimizer, self.data.samples_per_step
        if not amount and (training.epochs or optimizer.warmup_epochs):
            key = "training.epochs" if training.epochs else "optimizer.warmup_epochs"
            raise ConfigError(f"{key}: the run takes no pairs and no conversations to count epochs by; give steps")
        steps = training.steps or max(1, round(training.epochs * samples / amount))
        if optimizer.warmup_epochs:
            warmup = (optimizer.warmup_steps or 0) + round(optimizer.warmup_epochs * samples / amount)
        else:
            warmup = optimizer.warmup_of(steps)
        return replace(
            self,
            training=replace(training, steps=steps, epochs=0.0),
            optimizer=replace(
                optimizer, warmup_steps=warmup, warmup_epochs=0.0, minimum_learning_rate=optimizer.least_rate
            ),
        )

    def to_yaml(self) -> str:
        """Write the configuration as YAML, every value spelled out; `load` reads it back."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply `key.path=value` overrides; values are YAML.

    A file may name others, beside it, that it changes: `base: other.yaml`, or a list, the last above the others. Below
    the file is its preset, and below that the recipe. The name of a preset may be given for a file: a run of it, with
    paths of data that are only an example.

    Raises:
        ConfigError: no such file, not a mapping, an unknown key or preset, a value of the wrong type or out of range.
    """
    values = values_of(path)
    for text in overrides:
        override(values, text)
    for section, key, folder in (("model", "preset", ""), ("training", "recipe", "recipes")):
        given = values.get(section)
        if isinstance(given, dict) and (chosen := given.get(key)) is not None:
            check_choice(f"{section}.{key}", str(chosen), presets(folder))
            values = merge(_read(PRESETS / folder / f"{chosen}.yaml"), values)
    if found := meant(Config, values):
        raise ConfigError(f"{shortened(found[0])}: unknown key; did you mean {found[1]}?")
    return build(Config, values)


def values_of(path: Path) -> dict[str, Any]:
    """Read what a file and those that it changes say, or an example of a preset; their values are not checked.

    Raises:
        ConfigError: no such file, or not a mapping.
    """
    name = str(path)
    return _example(name) if name in presets() and not path.exists() else _read(path)


def presets(folder: str = "") -> list[str]:
    """List the names of the presets, or of the files in one folder of them, in alphabetical order."""
    return sorted(path.stem for path in (PRESETS / folder).glob("*.yaml"))


def _example(preset: str) -> dict[str, Any]:
    """Make the values of a run of a preset, with paths that are only an example."""
    data = {"tokenizer": "weights/tokenizer.model"} | {
        name: f"data/{name}" for name in ("pairs", "conversations", "text")
    }
    return {"run": {"folder": f"runs/{preset}"}, "model": {"preset": preset}, "data": data}


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file over the files that its `base:` names; `above` are the files on the way to it."""
    values = read_mapping(
        path,
        str(path),
        otherwise="give the path of a YAML file, e.g. examples/demo.yaml",
        holds="a mapping of sections such as run: and model:",
    )
    bases = values.pop("base", [])
    if bases and path.resolve() in above:
        raise ConfigError(f"base={bases}: {path} is its own base; name another file")
    below: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        below = merge(below, _read(path.parent / str(base), (*above, path.resolve())))
    return merge(below, values)
