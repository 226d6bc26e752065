"""A run's configuration: a preset, YAML files, then key=value overrides, into checked dataclasses."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from megatron_sphinx.data.config import DataConfig
from megatron_sphinx.errors import ConfigError, nearest
from megatron_sphinx.model.architecture import LanguageConfig, VisionConfig
from megatron_sphinx.parallel.layout import ParallelConfig
from megatron_sphinx.stage.dealing import StageConfig
from megatron_sphinx.training.divergence import DivergenceConfig
from megatron_sphinx.training.optimizer import OptimizerConfig

T = TypeVar("T")  # a dataclass


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives, and what holds for all of it.

    Attributes:
        folder: what the run writes goes here.
        seed: every random choice of the run follows from it.
        device: cpu; cuda, a GPU for each rank; or auto, cuda if each rank of the job has a GPU of its own, else cpu.
        timeout: seconds after which a rank that gets no further, or is not heard of, ends the job and is named.
        storage_timeout: the same for starting up and for saving a checkpoint.
        print_interval: steps between two progress lines.
        straggler_interval: steps between two probes of each rank's speed, a matrix product of some milliseconds; 0 for
            none.
        straggler_ratio: how many times the median rank's time a rank must have taken in each of its last three probes
            to be reported.
    """

    folder: str
    seed: int = 1
    device: str = "auto"
    timeout: float = 600.0
    storage_timeout: float = 1800.0
    print_interval: int = 10
    straggler_interval: int = 100
    straggler_ratio: float = 1.3

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"run.device={self.device}: must be auto, cpu or cuda")
        if not self.timeout >= 3:
            raise ConfigError(f"run.timeout={self.timeout}: must be at least 3; ranks are heard of only so often")
        if not self.storage_timeout >= self.timeout:
            raise ConfigError(
                f"run.storage_timeout={self.storage_timeout}: must be at least run.timeout={self.timeout}"
            )
        if self.straggler_interval < 0:
            raise ConfigError(f"run.straggler_interval={self.straggler_interval}: must be at least 0")
        if not self.straggler_ratio > 1:
            raise ConfigError(f"run.straggler_ratio={self.straggler_ratio}: must be above 1")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What to train, how long and how precisely.

    Attributes:
        recipe: the file of presets/recipes/ that fills what is not given, below what the preset gives.
        steps: optimizer steps of the whole run; 0 where `epochs` says it.
        epochs: passes over the pairs or conversations; 0 where `steps` says it.
        train: all (language model, projections, tags), projections (with tags and skip token) or language. What is
            not trained stays as model.weights has it; the encoders always do.
        precision: bf16 (fp32 master weights in the optimizer) or fp32.
        activation_checkpointing: what backward computes again instead of keeping it: none; selective, the feed-forward
            layers and experts; or full, whole layers from their inputs.
        checkpointed_layers: of full: layers of each pipeline stage that are computed again; without it all.
    """

    recipe: str | None = None
    steps: int = 0
    epochs: float = 0.0
    train: str = "all"
    precision: str = "bf16"
    activation_checkpointing: str = "none"
    checkpointed_layers: int | None = None

    def __post_init__(self) -> None:
        _one_of("training.train", self.train, ("all", "projections", "language"))
        _one_of("training.precision", self.precision, ("bf16", "fp32"))
        _one_of("training.activation_checkpointing", self.activation_checkpointing, ("none", "selective", "full"))
        if self.checkpointed_layers is not None:
            if self.activation_checkpointing != "full":
                raise ConfigError(
                    f"training.checkpointed_layers={self.checkpointed_layers}: is for "
                    f"training.activation_checkpointing=full only; set that, or leave this out"
                )
            if self.checkpointed_layers < 1:
                raise ConfigError(f"training.checkpointed_layers={self.checkpointed_layers}: must be at least 1")
        for name in ("steps", "epochs"):
            if not (value := getattr(self, name)) >= 0:
                raise ConfigError(f"training.{name}={value}: must be at least 0")
        if not self.steps and not self.epochs:
            raise ConfigError("training.steps=0: training.epochs is 0 too; a run needs one of them")
        if self.steps and self.epochs:
            raise ConfigError(f"training.steps={self.steps}: training.epochs={self.epochs} too; set the other one to 0")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the two streams weigh in the loss.

    Attributes:
        text_weight: weight of a text token beside a caption token's 1.
    """

    text_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.text_weight >= 0:
            raise ConfigError(f"loss.text_weight={self.text_weight}: must be at least 0")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a training state is kept.

    Attributes:
        interval: steps between two checkpoints; the last step always makes one.
        keep: how many of the newest stay, beside the one that the run goes on from.
        resume: auto (the newest intact one, or a fresh start), none, or the path of one. Where the run folder has later
            steps than that, they are moved aside.
    """

    interval: int = 1000
    keep: int = 2
    resume: str = "auto"

    def __post_init__(self) -> None:
        for name in ("interval", "keep"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"checkpoint.{name}={value}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of; each part is described where it is used."""

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

    def __post_init__(self) -> None:
        overhead = 2 + self.vision.most_image_positions
        if self.data.sequence_length <= overhead:
            raise ConfigError(
                f"data.sequence_length={self.data.sequence_length}: an image takes {overhead} positions of a row "
                f"before its text; use more than {overhead}"
            )
        if self.training.train == "projections":
            if self.parallel.pipeline > 1:
                raise ConfigError(
                    f"parallel.pipeline={self.parallel.pipeline}: with training.train=projections all but the first "
                    f"stage have nothing to train; use 1"
                )
            if not self.data.samples_per_step:
                raise ConfigError("training.train=projections: the run takes no pairs and no conversations; train all")
        self._check_layout()

    def _check_layout(self) -> None:
        """Whether the model can be divided as asked for."""
        model, sizes = self.model, self.parallel
        sizes.stage_layers(model.layers)
        shared = {
            "tensor": {"heads": model.heads, "groups": model.groups, "padded_vocabulary": model.padded_vocabulary}
        }
        if model.experts:
            shared |= {"expert": {"experts": model.experts}, "expert_tensor": {"ffn": model.ffn}}
            if sizes.tensor > 1 and not sizes.sequence:
                raise ConfigError(
                    f"parallel.sequence=false: with model.experts={model.experts} the tensor ranks must share the "
                    f"tokens; set parallel.sequence=true, or parallel.tensor=1"
                )
        else:
            shared["tensor"]["ffn"] = model.ffn
            for name in ("expert", "expert_tensor"):
                if (size := getattr(sizes, name)) > 1:
                    raise ConfigError(f"parallel.{name}={size}: the model has no experts; use 1, or set model.experts")
        for axis, of_model in shared.items():
            for name, size in of_model.items():
                if size % (ranks := getattr(sizes, axis)):
                    raise ConfigError(
                        f"parallel.{axis}={ranks}: must divide model.{name}={size}; use one of "
                        f"{[n for n in range(1, size + 1) if size % n == 0][:12]}"
                    )

    def counted(self, samples: int) -> "Config":
        """The same with steps where epochs were given, of so many pairs or conversations.

        Raises:
            ConfigError: epochs are given, but nothing to count them by.
        """
        training, optimizer, amount = self.training, self.optimizer, self.data.samples_per_step
        if not amount and (training.epochs or optimizer.warmup_epochs):
            key = "training.epochs" if training.epochs else "optimizer.warmup_epochs"
            raise ConfigError(f"{key}: the run takes no pairs and no conversations to count epochs by; give steps")
        warmup = optimizer.warmup_steps
        if optimizer.warmup_epochs:
            warmup += round(optimizer.warmup_epochs * samples / amount)
        steps = training.steps or max(1, round(training.epochs * samples / amount))
        return replace(
            self,
            training=replace(training, steps=steps, epochs=0.0),
            optimizer=replace(optimizer, warmup_steps=warmup, warmup_epochs=0.0),
        )

    def to_yaml(self) -> str:
        """The configuration as YAML, every value spelled out; `load` reads it back."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{key}={value}: unknown value; {nearest(str(value), list(known))}")


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply `key.path=value` overrides; values are YAML.

    A file may name others, beside it, that it changes: `base: other.yaml`, or a list, the last above the others. Below
    the file is its preset, and below that the recipe. The name of a preset may be given for a file: a run of it, with
    paths of data that are only an example.

    Raises:
        ConfigError: no such file, not a mapping, an unknown key or preset, a value of the wrong type or out of range.
    """
    name = str(path)
    values = _example(name) if name in presets() and not path.exists() else _read(path)
    for override in overrides:
        _override(values, override)
    for section, key, folder in (("model", "preset", ""), ("training", "recipe", "recipes")):
        chosen = values.get(section)
        if isinstance(chosen, dict) and (found := chosen.get(key)) is not None:
            _one_of(f"{section}.{key}", str(found), presets(folder))
            values = _merge(_read(_PRESETS / folder / f"{found}.yaml"), values)
    return build(Config, values)


_PRESETS = Path(str(resources.files("megatron_sphinx") / "presets"))


def presets(folder: str = "") -> list[str]:
    """Names of the presets, or of what is in a folder of them."""
    return sorted(path.stem for path in (_PRESETS / folder).glob("*.yaml"))


def _example(preset: str) -> dict[str, Any]:
    data = {"tokenizer": "weights/tokenizer.model"} | {
        name: f"data/{name}" for name in ("pairs", "conversations", "text")
    }
    return {"run": {"folder": f"runs/{preset}"}, "model": {"preset": preset}, "data": data}


def read_mapping(path: Path, title: str, *, otherwise: str, holds: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: of the file.
        title: how messages begin.
        otherwise: what to do where there is no such file.
        holds: what it must hold.

    Raises:
        ConfigError: no such file, not YAML, not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{title}: {error.strerror}; {otherwise}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{title}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{title}: must hold {holds}")
    return values


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file over its bases."""
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
        below = _merge(below, _read(path.parent / str(base), (*above, path.resolve())))
    return _merge(below, values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping; lists and scalars are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key in place; a whole number in the path picks a list's item."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override}: an override must read key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override}: the value is not YAML") from error
    *parents, last = key.split(".")
    here: Any = values
    for name in parents:
        here = _item(here, name, key) if isinstance(here, list) else here.setdefault(name, {})
        if not isinstance(here, dict | list):
            raise ConfigError(f"{key}: {name} is a single value, not a section")
    if isinstance(here, list):
        _item(here, last, key)
        here[int(last)] = value
    else:
        here[last] = value


def _item(items: list[Any], name: str, key: str) -> Any:
    if not name.isdigit() or int(name) >= len(items):
        raise ConfigError(f"{key}: {name} must be one of the {len(items)} items, counted from 0")
    return items[int(name)]


def build(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build a tree of dataclasses from plain values.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a required key left out, a wrong type.
    """
    types = get_type_hints(cls)
    for key in values:
        if key not in types:
            raise ConfigError(f"{path}{key}: unknown key; {nearest(f'{path}{key}', [path + name for name in types])}")
    for item in fields(cls):  # type: ignore[arg-type]
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{path}{item.name}: not given; set it in the file or as {path}{item.name}=value")
    return cls(**{key: _value(types[key], value, f"{path}{key}") for key, value in values.items()})


def _value(kind: Any, value: Any, path: str) -> Any:
    """`value` as the type `kind`, or an error that names the key."""
    if is_dataclass(kind):
        if isinstance(value, str) and (from_text := getattr(kind, "from_text", None)):
            return from_text(value)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value}: must be a section with keys of its own")
        return build(kind, value, f"{path}.")  # type: ignore[arg-type]
    if isinstance(kind, UnionType):
        if value is None and NoneType in get_args(kind):
            return None
        kind = next(option for option in get_args(kind) if option is not NoneType)
    if get_origin(kind) is tuple:
        if hasattr(get_args(kind)[0], "from_text") and isinstance(value, str | Mapping | None):
            value = [] if value is None else [value]  # one alone
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{path}={value}: must be a list")
        return tuple(_value(get_args(kind)[0], item, f"{path}.{i}") for i, item in enumerate(value))
    return _scalar(kind, value, path)


def _scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float:
        try:  # YAML reads 5e-5 as text
            return float(value) if not isinstance(value, bool) else _wrong(kind, value, path)
        except (TypeError, ValueError):
            _wrong(kind, value, path)
    if type(value) is not kind:
        _wrong(kind, value, path)
    return value


def _wrong(kind: type, value: Any, path: str) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{path}={value}: must be {names[kind]}")
