"""The command line: what each command takes, that none imports much before it works, and doors of the tools."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOOLS

from megatron_sphinx.__main__ import main
from megatron_sphinx.cli.main import CASCADES, COMMANDS, PREPARE
from megatron_sphinx.cli.plan.plain import KINDS

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo.yaml"
HEAVY = {
    "torch", "megatron", "deepspeed", "transformers", "pyarrow", "timm", "matplotlib", "numpy", "PIL", "yaml", "fsspec",
    "sentencepiece", "tqdm",
}  # fmt: skip
HELPS = [
    [], *([name] for name in COMMANDS), ["prepare"], *(["prepare", name] for name in PREPARE),
    ["cascade"], *(["cascade", name] for name in CASCADES),
    ["prepare", "som", "mark"], ["prepare", "som", "merge"], *(["plan", kind] for kind in KINDS),
]  # fmt: skip
DOORS = {
    "prepare_pairs.py": "prepare pairs", "prepare_text.py": "prepare text", "prepare_ocr.py": "prepare ocr",
    "prepare_conversations.py": "prepare conversations", "build_conversations.py": "prepare tasks",
    "prepare_som.py": "prepare som", "convert_checkpoint.py": "convert", "interpolate_weights.py": "mix",
    "inspect_checkpoint.py": "inspect", "benchmark_report.py": "report", "packing.py": "packing", "views.py": "views",
}  # fmt: skip
OURS = {"simulate_plan.py", "mutate.py"}  # programs of which only this repository has a use
# Runs a program, then names what it has imported.
WATCHED = """
import json, runpy, sys
status = 0
try:
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    status = end.code
print(json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def watch(*words: object, env: dict[str, str] | None = None) -> tuple[int, str, str, set[str]]:
    """Run a program in a process of its own: its status, what it printed on both streams, and what it imported."""
    command = [sys.executable, "-c", WATCHED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT, env=env)
    *printed, last = done.stdout.splitlines()
    status, modules = json.loads(last)
    return status, "\n".join(printed), done.stderr, set(modules)


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_imports_nothing_that_takes_time(words):
    status, out, error, modules = watch("-m", "megatron_sphinx", *words, "--help")
    assert (status, error) == (0, "")
    assert out.startswith(f"usage: {' '.join(['megatron-sphinx', *words])} [-h]")
    assert not modules & HEAVY


@pytest.mark.parametrize("tool", DOORS)
def test_a_door_has_the_flags_of_its_command(tool, capsys):
    status, out, error, modules = watch(TOOLS / tool, "--help")
    assert (status, error) == (0, "")
    assert not modules & HEAVY
    assert out.startswith(f"usage: {tool} [-h]")
    with pytest.raises(SystemExit, match="0"):
        main([*DOORS[tool].split(), "--help"])
    of_command = capsys.readouterr().out
    flags = [set(re.findall(r"--[a-z-]+", text.partition("\noptions:")[2])) for text in (out, of_command)]
    assert flags[0] == flags[1]
    assert f"megatron-sphinx {DOORS[tool]}" in out


def test_every_tool_is_a_door_or_known_to_be_none():
    assert {path.name for path in TOOLS.glob("*.py")} == DOORS.keys() | OURS
    assert all(len((TOOLS / name).read_text().splitlines()) <= 13 for name in DOORS)


@pytest.mark.parametrize(
    "words", [["train"], ["measure"], ["plan"], ["plan", "sizes"], ["config"],
              ["config", "--get", "run.folder"], ["packing"], ["doctor"]], ids=" ".join,
)  # fmt: skip
def test_a_wrong_key_is_said_before_anything_is_imported(words):
    command, *rest = words
    status, out, error, modules = watch("-m", "megatron_sphinx", command, *rest, DEMO, "parallel.tensr=2")
    name = " ".join(words[:2]) if words[:2] == ["plan", "sizes"] else command
    assert (status, out) == (2, "")
    assert error == f"megatron-sphinx {name}: parallel.tensr: unknown key; did you mean parallel.tensor?\n"
    assert not modules & {"torch", "megatron", "deepspeed", "transformers", "pyarrow", "timm", "matplotlib"}


@pytest.mark.parametrize("words", [["train", str(DEMO)], ["prepare", "pairs", "a", "b", "--tokenizer", "c"], ["plan"],
                                   ["convert", "a", "b"], ["convert", "a", "b", "--to", "gguf"], ["doctor"]],
                         ids=" ".join)  # fmt: skip
def test_a_wrong_option_is_said_before_anything_is_imported(words):
    status, _, error, modules = watch("-m", "megatron_sphinx", *words, "--no-such-option")
    assert status == 2
    assert "error:" in error.splitlines()[-1]
    assert not modules & HEAVY


def test_words_that_no_command_takes_are_refused(capsys):
    refused = (["prepare", "tasks", "caption", "a", "b", "key=value"], ["plan", DEMO, "--ranks", "2", "no"], ["no"])
    for words in refused:
        with pytest.raises(SystemExit, match="2"):
            main([*map(str, words)])
        assert "usage: megatron-sphinx" in capsys.readouterr().err


def test_an_error_of_a_command_begins_with_its_whole_name(tmp_path, capsys, tiny):
    words = [str(tmp_path / "nowhere"), str(tmp_path / "x"), "--tokenizer", str(tiny.folder / "tokenizer.model")]
    assert main(["prepare", "pairs", *words]) == 2
    error = capsys.readouterr().err
    assert error == f"megatron-sphinx prepare pairs: {tmp_path / 'nowhere'}: no such file or folder\n"
    assert main(["convert", *words[:2], "--to", "hf"]) == 2
    assert capsys.readouterr().err.startswith(f"megatron-sphinx convert: {tmp_path / 'nowhere'}: no such folder; ")
    assert main(["plan", "published", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["gpus"]


def test_only_the_first_rank_of_a_job_says_what_every_rank_would(monkeypatch, capsys):
    for variable in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setenv(variable, "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        assert main(["train", str(DEMO), "parallel.tensr=2"]) == 2
        assert capsys.readouterr().err == ""
        assert main(["config", str(DEMO), "parallel.tensr=2"]) == 2
        assert capsys.readouterr().err == ""
        assert main(["convert", "nowhere", "target", "--to", "hf"]) == 2
        assert "nowhere" in capsys.readouterr().err, "which nobody starts on every rank"


def test_numbers_in_helps_are_those_of_the_code(capsys):
    from megatron_sphinx.checkpoint.formats.registry import names
    from megatron_sphinx.cli import convert
    from megatron_sphinx.cli.prepare import ocr, som
    from megatron_sphinx.prepare.drawing import MOST_MARKS
    from megatron_sphinx.prepare.pdf import DocumentSettings

    assert som.MOST_MARKS == MOST_MARKS
    assert list(ocr.SETTINGS) == list(DocumentSettings.__dataclass_fields__)
    assert all(re.search(rf"\b{name}\b", convert.__doc__) for name in names())


# plan


@pytest.fixture
def plan(capsys):
    """`plan(*words)` is what the command plan prints."""

    def run(*words: object) -> str:
        assert main(["plan", *map(str, words)]) == 0
        return capsys.readouterr().out

    return run


def test_kinds_of_plans_print_what_flags_print(plan, tiny, tmp_path):
    config = tiny.write(tmp_path / "c.yaml", {"parallel.encoder": 1})
    cluster = ("--nodes", 1, "--gpus-per-node", 2, "--gpu", "a100-80g")
    assert plan("sizes", config, "--ranks", 3) == plan(config, "--ranks", 3) != plan(config)
    assert json.loads(plan("sizes", config, "--json")) == json.loads(plan(config, "--json"))
    assert plan("step", config, "--step", 1) == plan(config, "--step", 1) != plan("step", config)
    assert plan("step", config) == plan(config, "--step", 0)
    assert plan("layouts", config, *cluster) == plan(config, *cluster)
    only = plan("layouts", config, "data.workers=1", *cluster, "--as-configured", "--json")
    assert json.loads(only) == json.loads(plan(config, *cluster, "--json", "--as-configured"))
    assert plan("published") == plan("--published")


def test_other_kinds_of_plans_are_reached_with_what_they_were_given(monkeypatch, tiny, tmp_path, plan):
    from megatron_sphinx.sizing import calibration, dry_run

    asked = []
    monkeypatch.setattr(
        dry_run, "report", lambda config, layout, kind: asked.append((config, layout.world, kind)) or {"a": 1}
    )
    monkeypatch.setattr(
        calibration, "calibrate", lambda config, *, ranks, target: asked.append((config, ranks, target))
    )
    path = tiny.write(tmp_path / "c.yaml")
    for words in (["dry-run", path, "--ranks", 2, "--json"], [path, "--dry-run", "--ranks", 2, "--json"],
                  [path, "--dry-run", "--nodes", 2, "--gpus-per-node", 1, "--json"]):  # fmt: skip
        assert json.loads(plan(*words)) == {"a": 1}
        assert asked.pop()[1:] == (2, "a100-80g")
        plan(*words, "--gpu", "h100-80g")
        assert asked.pop()[1:] == (2, "h100-80g")
    file = tmp_path / "machine.yaml"
    for words in (["calibrate", path, "--output", file, "--ranks", 2], [path, "--calibrate", file, "--ranks", 2]):
        plan(*words)
        assert asked.pop()[1:] == (2, file)


def test_a_configuration_that_is_called_like_a_kind_is_given_as_a_path(tiny, tmp_path, monkeypatch, plan, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny.write(tmp_path / "c.yaml")
    shutil.copy(config, tmp_path / "sizes")
    assert plan("./sizes") == plan(config) == plan("sizes", "sizes")
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "sizes"])
    assert "megatron-sphinx plan sizes: error: the following arguments are required: CONFIG" in capsys.readouterr().err
    assert main(["plan"]) == 2
    error = "megatron-sphinx plan: plan: give a configuration, e.g. examples/demo.yaml or a preset's name, or --pub"
    assert capsys.readouterr().err.startswith(error)


# config --get


def test_values_of_a_configuration_are_printed(capsys):
    keys = {
        "run.folder": "elsewhere", "run.seed": "1", "training.precision": "bf16", "loss.text_weight": "0.25",
        "data.isolate_documents": "true", "training.checkpointed_layers": "null", "vision.experts.1.weights": "random",
        "vision.experts.1": '{"name": "dinov2_small", "weights": "random"}', "stage": '{"lookahead": 4}',
    }  # fmt: skip
    words = [word for key in keys for word in ("--get", key)]
    assert main(["config", *words, str(DEMO), "run.folder=elsewhere"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert dict(zip(keys, printed, strict=True)) == {**keys, "stage": printed[-1]}
    assert json.loads(printed[-1])["lookahead"] == 4


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("run.foldr", "run.foldr: unknown key; did you mean run.folder?"),
        ("rum.folder", "rum: unknown key; did you mean run?"),
        ("run.folder.name", "run.folder.name: run.folder is a single value, not a section"),
        ("vision.experts.2", "vision.experts.2: unknown key; did you mean vision.experts."),
        ("", ": unknown key; known: run, model, "),
    ],
)
def test_keys_that_are_none_are_refused(key, message, capsys):
    assert main(["config", "--get", "run.folder", "--get", key, str(DEMO)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"megatron-sphinx config: {message}")
    assert error.count("\n") == 1


# completion

COMPLETE = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
"$(complete -p megatron-sphinx | sed -E 's/.*-F ([^ ]+).*/\\1/')"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (["pre"], {"prepare"}),
        (["prepare", ""], set(PREPARE)),
        (["cascade", ""], set(CASCADES)),
        (["prepare", "pairs", "--tok"], {"--tokenizer"}),
        (["prepare", "som", ""], {"mark", "merge"}),
        (["plan", ""], set(KINDS)),
        (["plan", "layouts", "--as"], {"--as-configured"}),
        (["prepare", "tasks", "cap"], {"caption"}),
    ],
)
def test_bash_completes_commands_and_options(words, known, capsys, tmp_path):
    pytest.importorskip("shtab", reason="shtab is not installed: pip install 'megatron-sphinx[completion]'")
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    command = ["bash", "-c", COMPLETE, "bash", script, "megatron-sphinx", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == known


def test_completion_without_its_library_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit, match="2"):
        main(["--print-completion", "zsh"])
    assert "shtab is not installed; pip install 'megatron-sphinx[completion]'" in capsys.readouterr().err
