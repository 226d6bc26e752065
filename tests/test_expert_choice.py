"""Fewer or more MoE experts than in training, and pruned ones: against transformers, by masks, by conversion."""

import copy
import json
import random
from dataclasses import replace

import pytest
import torch
from llamas import drawn_model, save, shape_of
from test_answers import drawn, prompts_of, saved

import megatron_sphinx
from megatron_sphinx.__main__ import main
from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.open import open_checkpoint
from megatron_sphinx.errors import CheckpointError, ConfigError
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.model.expert_choice import ExpertChoice, KeptExperts
from megatron_sphinx.model.experts import RowRouter

SHAPE = LanguageConfig(layers=2, hidden=16, ffn=24, heads=2, vocabulary=100, experts=4)
KEPT = ((0, 2, 3), (1, 2, 3))
TEXTS = [[5, 9, 30, 4], [17], [200, 7, 7]]


@pytest.fixture
def small(tiny, tmp_path):
    """A Mixtral of transformers with four experts in each of two layers, its folder, and prompts."""
    vocabulary = tiny.tokenizer.identity.vocabulary
    peer = drawn(7, vocabulary, experts=4, layers=2)
    return peer, saved(peer, tiny, tmp_path / "hf"), prompts_of(7, vocabulary, (2, 9, 26))


def scores_of(path, prompts, **options):
    with megatron_sphinx.load(path, cache_bytes=2**24, **options) as model:
        return [model.score(prompt, TEXTS) for prompt in prompts]


def peers_scores(peer, prompts):
    found = []
    for prompt in prompts:
        rows = []
        for text in TEXTS:
            with torch.no_grad():
                logprobs = peer(torch.tensor([[*prompt.tokens, *text]])).logits[0].double().log_softmax(-1)
            rows.append(logprobs[len(prompt.tokens) - 1 : -1].gather(1, torch.tensor(text)[:, None])[:, 0].tolist())
        found.append(rows)
    return found


def test_any_number_of_experts_computes_what_transformers_does(run_ranks, small):
    peer, path, prompts = small

    def check():
        seen = []
        for active in (1, 2, 3, 4):
            other = copy.deepcopy(peer)
            for layer in other.model.layers:
                for module in layer.modules():
                    if hasattr(module, "top_k"):
                        module.top_k = active
            found = scores_of(path, prompts, active_experts=active)
            for ours, theirs in zip(found, peers_scores(other, prompts), strict=True):
                for one, wanted in zip(ours, theirs, strict=True):
                    assert list(one) == pytest.approx(wanted, abs=1e-4)
            seen.append(found)
        assert all(one != other for number, one in enumerate(seen) for other in seen[:number])
        assert scores_of(path, prompts) == scores_of(path, prompts, keep_experts=range(4)) == seen[1]

    run_ranks(1, check)


def test_our_own_choice_is_megatron_cores_to_the_bit(run_ranks, small):
    _, path, prompts = small

    def check():
        plain = scores_of(path, prompts)
        init = RowRouter.restrict
        RowRouter.restrict = lambda self, _active, kept: init(self, 2, kept)
        assert scores_of(path, prompts) == plain

    run_ranks(1, check)


@pytest.mark.parametrize(
    "form", ["hf", "megatron", *(pytest.param(form, marks=pytest.mark.slow) for form in ("meta", "accessory"))]
)
def test_a_pruned_checkpoint_answers_as_the_masked_one_to_the_bit(run_ranks, tiny, small, tmp_path, form):
    _, path, prompts = small
    source = path
    if form != "hf":
        source = tmp_path / "source"
        convert(path, source, form, WriteOptions(is_sparse=form == "accessory"))
    pruned = tmp_path / "pruned"
    report = convert(source, pruned, form, WriteOptions(), kept=KeptExperts(KEPT), verify=True)
    assert report.tensors
    tokenizer = {"tokenizer": tiny.folder / "tokenizer.model"}

    def check():
        masked = scores_of(path, prompts, keep_experts=KEPT)
        assert masked != scores_of(path, prompts)
        assert scores_of(pruned, prompts, **tokenizer) == masked
        three = scores_of(path, prompts, keep_experts=KEPT, active_experts=4)
        assert scores_of(pruned, prompts, active_experts=3, **tokenizer) == three

    run_ranks(1, check)


@pytest.mark.parametrize("form", ["hf", "meta", "accessory", "megatron", "torch_dist"])
@pytest.mark.parametrize("seed", range(2))
def test_every_format_prunes_alike(tmp_path, form, seed):
    """Whatever format experts are dropped from, what is left are slices of the whole model in transformers' names."""
    rng = random.Random(seed)
    model = drawn_model(rng, experts=6, layers=3)
    rows = [sorted(rng.sample(range(6), 4)) for _ in range(3)]
    shape, source = shape_of(model), save(model, tmp_path / "source")
    if form != "hf":
        convert(source, tmp_path / form, form, WriteOptions(is_sparse=bool(seed)))
        source = tmp_path / form
    kept = KeptExperts.of(rows)
    convert(source, tmp_path / "pruned", "hf", WriteOptions(), shape=shape, kept=kept, verify=True)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 2)
    opened, whole = (open_checkpoint(path).source for path in (tmp_path / "pruned", tmp_path / "source"))

    def read(one, name):
        key = next(key for key in one.entries if key[1] == name)
        return one.maps.read(one.entries[key])

    for layer, row in enumerate(rows):
        block = f"model.layers.{layer}.block_sparse_moe"
        assert (read(opened, f"{block}.gate.weight") == read(whole, f"{block}.gate.weight")[row]).all()
        for number, expert in enumerate(row):
            for matrix in ("w1", "w2", "w3"):
                own = read(opened, f"{block}.experts.{number}.{matrix}.weight")
                assert (own == read(whole, f"{block}.experts.{expert}.{matrix}.weight")).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1], [0, 1, 2]], "layer 0 keeps 2, layer 1 3; a checkpoint has as many in each: keep as many, or answer"),
        ([2], "keeps 1; a Mixtral has at least 2: keep more, or answer with --keep-experts"),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused(small, tmp_path, rows, message):
    with pytest.raises(CheckpointError, match=f"--keep-experts: {message}"):
        convert(small[1], tmp_path / "out", "hf", WriteOptions(), kept=KeptExperts.of(rows))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("0,2", ((0, 2),)), ("3", ((3,),)), ([2, 0], ((0, 2),)), ([[1], [0, 2]], ((1,), (0, 2))),
        (KeptExperts(((1,),)), ((1,),)),
    ],
)  # fmt: skip
def test_kept_experts_are_read_from_what_users_give(given, wanted, tmp_path):
    kept = KeptExperts.of(given)
    assert kept.layers == wanted
    (tmp_path / "kept.json").write_text(kept.as_json(method="usage"))
    assert KeptExperts.of(tmp_path / "kept.json") == KeptExperts.of(str(tmp_path / "kept.json")) == kept


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("none.json", r"keep_experts=none.json: cannot be read \(No such file or directory\); give numbers from 0 on"),
        ("bad.json", r"keep_experts=bad.json: not JSON: .*; give numbers from 0 on as 0,2,5, or a file \{"),
        ("empty.json", "keep_experts=empty.json: names no experts; give numbers"),
        ([], r"keep_experts=\[\]: names no experts"),
        ([0, 0], "names no experts"),
        ([[-1]], "names no experts"),
        ("a,b", "cannot be read"),
        (5, "keep_experts=5: names no experts"),
    ],
)
def test_kept_experts_that_cannot_be_read_are_refused(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.json").write_text('{"kept": {}}')
    with pytest.raises(ConfigError, match=message):
        KeptExperts.of(given)


@pytest.mark.parametrize(
    ("choice", "shape", "message"),
    [
        (ExpertChoice(5), SHAPE, "^active_experts=5: the model has 4 in each layer; give at most that$"),
        (ExpertChoice(1), replace(SHAPE, experts=0), "^active_experts=1: the model has no MoE experts; leave it out$"),
        (ExpertChoice(None, KeptExperts(((0, 4),))), SHAPE, "^keep_experts: expert 4: the model has 0 to 3; give"),
        (ExpertChoice(None, KeptExperts(((0,),))), replace(SHAPE, experts=0), "^keep_experts=0: the model has no MoE"),
        (
            ExpertChoice(None, KeptExperts(((0,),) * 3)), SHAPE,
            "^keep_experts: has lists for 3 layers, the model has 2; give one for each, or one for all$",
        ),
    ],
)  # fmt: skip
def test_experts_that_a_model_has_not_are_refused(choice, shape, message):
    with pytest.raises(ConfigError, match=message):
        choice.fitting(shape)


def test_numbers_of_experts_are_refused_before_a_model_is_loaded(tmp_path, capsys):
    with pytest.raises(ConfigError, match="active_experts=0: must be at least 1"):
        ExpertChoice(0)
    for words in (["generate", "--input", "x", "--output", "y"], ["chat"], ["serve"]):
        assert main([words[0], str(tmp_path), *words[1:], "--active-experts", "0"]) == 2
        assert f"megatron-sphinx {words[0]}: active_experts=0: must be at least 1" in capsys.readouterr().err
        assert main([words[0], str(tmp_path), *words[1:], "--keep-experts", "none.json"]) == 2
        assert "keep_experts=none.json: cannot be read" in capsys.readouterr().err
    evaluate = ["evaluate", "pope", "--data", str(tmp_path), "--output", str(tmp_path / "o"), "--model", str(tmp_path)]
    assert main([*evaluate, "--active-experts", "0"]) == 2
    assert "active_experts=0: must be at least 1" in capsys.readouterr().err
    target = ["convert", str(tmp_path), str(tmp_path / "o"), "--to", "hf", "--keep-experts", "none.json"]
    assert main(target) == 2
    assert "keep_experts=none.json: cannot be read" in capsys.readouterr().err


def test_a_choice_tells_answers_from_others(run_ranks, small):
    _, path, _ = small

    def check():
        with megatron_sphinx.load(path, cache_bytes=2**22) as model:
            plain = model.identity
        with megatron_sphinx.load(path, cache_bytes=2**22, active_experts=2, keep_experts="0,1,2,3") as model:
            assert model.identity == plain
        with megatron_sphinx.load(path, cache_bytes=2**22, active_experts=1, keep_experts=KEPT) as model:
            assert model.identity == {**plain, "active_experts": "1", "keep_experts": "0,2,3 1,2,3"}
        with pytest.raises(ConfigError, match="active_experts=9: the model has 4"):
            megatron_sphinx.load(path, active_experts=9)

    run_ranks(1, check)
