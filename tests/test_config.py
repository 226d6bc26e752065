"""Configurations: what is read, and what is refused in one line."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_sphinx import config as configuration
from megatron_sphinx.__main__ import main
from megatron_sphinx.config import Config
from megatron_sphinx.data.config import DataSource
from megatron_sphinx.errors import ConfigError

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
DEMO = ROOT / "examples" / "demo.yaml"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_loads_and_survives_a_round_trip(path, tmp_path):
    config = configuration.load(path)
    again = tmp_path / "config.yaml"
    again.write_text(config.to_yaml())
    assert configuration.load(again) == config


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "megatron_sphinx" / "presets").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_preset_is_used_by_name(preset, tmp_path):
    file = tmp_path / "run.yaml"
    data = "{pairs: a, conversations: b, text: c, tokenizer: d}"
    file.write_text(f"run: {{folder: x}}\nmodel: {{preset: {preset.stem}}}\ndata: {data}")
    config = configuration.load(file, ["model.layers=3"])
    assert config.model.layers == 3
    assert config.model.preset == preset.stem
    by_name = configuration.load(Path(preset.stem), ["model.layers=3"])
    assert (by_name.model, by_name.vision, by_name.training) == (config.model, config.vision, config.training)


def test_overrides_reach_items_of_lists_and_numbers_may_be_written_as_text():
    config = configuration.load(
        DEMO, ["vision.experts.1.weights=x.pth", "optimizer.learning_rate=5e-5", "loss.text_weight=2"]
    )
    assert config.vision.experts[1].weights == "x.pth"
    assert config.optimizer.learning_rate == 5e-5
    assert config.loss.text_weight == 2.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tensr=2", r"parallel\.tensr: unknown key; did you mean parallel\.tensor\?"),
        ("paralel.tensor=2", r"paralel: unknown key; did you mean parallel\?"),
        ("data.zzz=2", r"data\.zzz: unknown key; known: data\.pairs, data\.conversations, data\.text"),
        ("training.steps=many", r"training\.steps=many: must be a whole number"),
        ("training.steps=true", r"training\.steps=True: must be a whole number"),
        ("training.steps=0", r"training\.steps=0: training\.epochs is 0 too; a run needs one of them"),
        ("training.steps=-1", r"training\.steps=-1: must be at least 0"),
        ("training.epochs=2", r"training\.steps=110: training\.epochs=2\.0 too; set the other one to 0"),
        ("training.train=encoders", r"training\.train=encoders: unknown value"),
        ("training.recipe=stage3", r"training\.recipe=stage3: unknown value; did you mean stage"),
        ("optimizer.learning_rate=fast", r"optimizer\.learning_rate=fast: must be a number"),
        ("optimizer.learning_rate=-1", r"optimizer\.learning_rate=-1\.0: must be at least 0"),
        ("data.isolate_documents=1", r"data\.isolate_documents=1: must be true or false"),
        ("run.folder=3", r"run\.folder=3: must be text"),
        ("vision.experts=3", r"vision\.experts=3: must be a list"),
        ("parallel=3", r"parallel=3: must be a section with keys of its own"),
        ("vision.experts.5.weights=x", r"vision\.experts\.5\.weights: 5 must be one of the 2 items, counted from 0"),
        ("run.folder.name=x", r"run\.folder\.name: folder is a single value, not a section"),
        ("training.precision=fp8", r"training\.precision=fp8: needs model\.kernels=transformer_engine, and is not"),
        ("training.precision=fp16", r"training\.precision=fp16: unknown value; did you mean bf16\?"),
        ("training.activation_checkpointing=ful", r"activation_checkpointing=ful: unknown value; did you mean full\?"),
        ("vision.experts.0.name=dinov2_vitg", r"dinov2_vitg: unknown expert; did you mean dinov2_vitg14\?"),
        ("vision.experts.0.name=dinov2_vitg14", r"vision\.grid=4: dinov2_vitg14 gives 16x16 patches"),
        ("vision.padding=left", r"vision\.padding=left: must be centre or corner"),
        ("vision.batch_views=0", r"vision\.batch_views=0: must be at least 1"),
        ("vision.experts=[{name: blip2_qformer, weights: random}]", r"vision\.experts: needs at least one expert"),
        ("model.heads=3", r"model\.heads=3: each head needs an even share of model\.hidden=128"),
        ("model.groups=3", r"model\.groups=3: must divide model\.heads=4"),
        ("model.layers=0", r"model\.layers=0: must be at least 1"),
        ("model.preset=sphinx_8b", r"model\.preset=sphinx_8b: unknown value; did you mean sphinx_"),
        ("parallel.tensor=8", r"parallel\.tensor=8: must divide model\.heads=4; use one of \[1, 2, 4\]"),
        ("data.sequence_length=20", r"data\.sequence_length=20: an image takes 21 positions of a row"),
        ("data.pairs=null", r"data\.pairs: not given, but data\.pairs_per_step=48"),
        ("data.pairs=[{path: a, weight: 2}, b]", r"data\.pairs: some of the sources have no weight; give one to"),
        ("data.text=[{path: a, weight: 0}]", r"data\.text\.0\.weight=0\.0: must be above 0"),
        ("data.text=[{path: a, weigth: 1}]", r"data\.text\.0\.weigth: unknown key; did you mean data\.text\.0"),
        ("data.text=3", r"data\.text=3: must be a list"),
        ("data.row_multiple=0", r"data\.row_multiple=0: must be at least 1"),
        ("data.pairs_per_step=-1", r"data\.pairs_per_step=-1: must be at least 0"),
        ("data.workers=0", r"data\.workers=0: must be at least 1"),
        ("data.max_bad_share=2", r"data\.max_bad_share=2\.0: must be between 0 and 1"),
        ("stage.lookahead=0", r"stage\.lookahead=0: must be at least 1"),
        ("checkpoint.keep=0", r"checkpoint\.keep=0: must be at least 1"),
        ("loss.text_weight=-1", r"loss\.text_weight=-1\.0: must be at least 0"),
        ("parallel.pipeline=5", r"parallel\.pipeline=5: leaves stages without a layer; use at most model\.layers=4"),
        ("parallel.expert=2", r"parallel\.expert=2: the model has no experts; use 1, or set model\.experts"),
        ("model.experts=-1", r"model\.experts=-1: must be at least 0"),
        ("model.z_loss_coefficient=-1", r"model\.z_loss_coefficient=-1\.0: must be at least 0"),
        ("training.checkpointed_layers=2", r"checkpointed_layers=2: is for training\.activation_checkpointing=full "
                                           r"only; set that, or leave this out"),
        ("training.steps", r"training\.steps: an override must read key\.path=value"),
        ("training.steps=[", r"training\.steps=\[: the value is not YAML"),
    ],
)  # fmt: skip
def test_what_is_refused(override, message):
    with pytest.raises(ConfigError, match=message) as raised:
        configuration.load(DEMO, [override])
    assert "\n" not in str(raised.value)


def test_a_stream_is_one_path_or_several_with_weights():
    one = configuration.load(DEMO, ["data.text=a"])
    assert one.data.text == (DataSource(path="a"),)
    several = configuration.load(
        DEMO, ["data.text=[a, {path: b}]", "data.pairs=[{path: c, weight: 2}, {path: d, weight: 1}]"]
    )
    assert several.data.text == (DataSource(path="a"), DataSource(path="b"))
    assert several.data.pairs == (DataSource(path="c", weight=2.0), DataSource(path="d", weight=1.0))
    assert configuration.build(Config, yaml.safe_load(several.to_yaml())) == several


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.expert=3"], r"parallel\.expert=3: must divide model\.experts=8; use one of \[1, 2, 4, 8\]"),
        (["parallel.expert_tensor=3"], r"parallel\.expert_tensor=3: must divide model\.ffn=352"),
        (["parallel.tensor=2"], r"parallel\.sequence=false: with model\.experts=8 the tensor ranks must share the "
                                r"tokens; set parallel\.sequence=true, or parallel\.tensor=1"),
        (["model.experts_per_token=1"], r"model\.experts_per_token=1: must be between 2 \(a softmax over .*\) and "
                                        r"model\.experts=8"),
        (["training.activation_checkpointing=full", "training.checkpointed_layers=0"],
         r"training\.checkpointed_layers=0: must be at least 1"),
    ],
)  # fmt: skip
def test_what_is_refused_with_experts(overrides, message):
    with pytest.raises(ConfigError, match=message):
        configuration.load(DEMO.with_name("demo_moe.yaml"), overrides)


def test_a_file_may_change_another(tmp_path):
    dense, mixtral = configuration.load(DEMO), configuration.load(DEMO.with_name("demo_moe.yaml"))
    assert (mixtral.model.experts, mixtral.model.hidden) == (8, dense.model.hidden)
    assert mixtral.data == dense.data
    file = tmp_path / "a.yaml"
    file.write_text("base: b.yaml")
    with pytest.raises(ConfigError, match=r"b\.yaml: No such file or directory; give the path of a YAML file"):
        configuration.load(file)
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(ConfigError, match=r"base=b\.yaml: .*a\.yaml is its own base; name another file"):
        configuration.load(file)


def test_neither_stream_and_two_qformers_are_refused():
    with pytest.raises(ConfigError, match=r"data\.pairs_per_step=0: data\.conversations_per_step and data\.text_"):
        configuration.load(DEMO, ["data.pairs_per_step=0", "data.text_tokens_per_step=0"])
    names = ("blip2_qformer", "blip2_qformer_small", "dinov2_small")
    experts = "[" + ", ".join(f"{{name: {name}, weights: random}}" for name in names) + "]"
    with pytest.raises(ConfigError, match="at most one Q-Former"):
        configuration.load(DEMO, [f"vision.experts={experts}"])
    with pytest.raises(ConfigError, match=r"vision\.experts: dinov2_small stands in the mixture twice"):
        configuration.load(DEMO, ["vision.experts.0={name: dinov2_small, weights: random}"])


def test_epochs_become_steps():
    config = configuration.load(Path("sphinx_tiny"))
    assert (config.training.epochs, config.optimizer.warmup_epochs) == (1.0, 0.01)
    counted = config.with_epochs_in_steps(15_300_000)  # samples of SPHINX-X, 256 a step
    assert (counted.training.steps, counted.optimizer.warmup_steps) == (59766, 598)
    assert (counted.training.epochs, counted.optimizer.warmup_epochs) == (0.0, 0.0)
    assert counted.with_epochs_in_steps(1) == counted
    assert config.with_epochs_in_steps(10).training.steps == 1
    text = ["data.pairs_per_step=0", "training.steps=0", "training.epochs=1"]
    with pytest.raises(ConfigError, match=r"training\.epochs: the run takes no pairs and no conversations to count"):
        configuration.load(DEMO, text).with_epochs_in_steps(0)
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_epochs: the run takes no pairs"):
        configuration.load(DEMO, ["data.pairs_per_step=0", "optimizer.warmup_epochs=1"]).with_epochs_in_steps(0)


def test_bases_are_laid_one_above_the_other(tmp_path):
    for name, text in {"a": "x: {p: 1, q: 1, r: 1}", "b": "x: {q: 2, r: 2}", "c": "base: [a.yaml, b.yaml]\nx: {r: 3}",
                       "d": "base: d.yaml"}.items():  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(text)
    assert configuration._read(tmp_path / "c.yaml") == {"x": {"p": 1, "q": 2, "r": 3}}
    with pytest.raises(ConfigError, match=r"base=d\.yaml: .*d\.yaml is its own base; name another file"):
        configuration.load(tmp_path / "d.yaml")


def test_a_key_left_out_is_named(tmp_path):
    values = yaml.safe_load(DEMO.read_text())
    del values["data"]["tokenizer"]
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer: not given; set it in the file or as data\.tokenizer=value"
    ):
        configuration.load(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- a", "must hold a mapping of sections"),
        (None, "No such file or directory; give the path"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        configuration.load(file)


def test_a_command_prints_the_configuration_as_a_run_would_take_it(capsys):
    path = ROOT / "examples" / "family_moe.yaml"
    assert main(["config", str(path), "run.seed=7"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert configuration.build(Config, printed) == configuration.load(path, ["run.seed=7"])
    assert printed["run"]["seed"] == 7


def test_the_command_says_one_line_and_exits_2(capsys):
    assert main(["train", str(DEMO), "parallel.tensr=2"]) == 2
    error = capsys.readouterr().err
    assert error == "megatron-sphinx train: parallel.tensr: unknown key; did you mean parallel.tensor?\n"


def test_overrides_may_stand_behind_options_but_unknown_words_may_not(capsys):
    assert main(["plan", str(DEMO), "--ranks", "3", "parallel.tensor=2", "parallel.encoder=1"]) == 0
    assert re.search("^layout +tensor 2 x data 1 . encoder 1$", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit):
        main(["plan", str(DEMO), "--rank", "3", "nonsense"])
