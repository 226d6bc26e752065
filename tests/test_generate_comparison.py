"""tools/compare/generate.py: both sides give the same tokens, and the arithmetic of its table."""

import json
import runpy
import sys

import pytest
from conftest import TOOLS

sys.path.insert(0, str(TOOLS / "compare"))  # as Python does for a program that is started
TOOL = str(TOOLS / "compare" / "generate.py")
TINY = ["--layers", "2", "--hidden", "64", "--ffn", "96", "--heads", "4", "--groups", "2", "--vocabulary", "256",
        "--scale", "8", "--rounds", "1", "--questions", "3"]  # fmt: skip


def compare_all() -> int:
    sys.argv = ["generate.py", *TINY, "--precision", "fp32", "--peers", "transformers", "--only", "1", "32_ragged",
                "picture"]  # fmt: skip
    return runpy.run_path(TOOL)["main"]()


def test_it_says_how_fast_both_sides_are(run_ranks):
    *_, last = run_ranks(1, compare_all).text().splitlines()
    found = json.loads(last)
    assert {name: set(ratios) for name, ratios in found["ratios"].items()} == {
        "fp32 1": {"transformers"}, "fp32 32_ragged": {"transformers"}, "fp32 picture": {"uncached"},
    }  # fmt: skip
    ragged = found["rows"]["fp32 32_ragged"]["sides"]
    assert 0 < ragged["ours"]["cache_bytes"] < ragged["transformers"]["cache_bytes"], "padding is stored, too"
    picture = found["rows"]["fp32 picture"]["sides"]
    assert picture["uncached"]["hit_rate"] == 0 < 0.5 < picture["cached"]["hit_rate"] < 2 / 3


def test_speeds_are_those_of_the_tokens_that_were_asked_for():
    tool = runpy.run_path(TOOL)
    heard = tool["Heard"]([[1.0, 2.0, 3.0], [1.5, 4.0]], [[7, 8, 9], [7, 8]], 10, 0.5)
    assert tool["numbers"](heard) == {
        "seconds": 4.0, "tokens_per_second": 5 / 4, "decode_tokens_per_second": 3 / 2.5, "first_token_seconds": 1.25,
        "cache_bytes": 10, "hit_rate": 0.5,
    }  # fmt: skip
    slow = tool["Heard"]([[2.0, 8.0], [3.0]], [[7, 8], [9]])
    ratios = tool["row"]({"ours": [slow, heard], "peer": [heard, slow]}, "ours")["ratios"]
    assert ratios == {"peer": {"seconds": 2.0, "first_token_seconds": 2.0}}


def test_sides_with_other_tokens_are_not_compared():
    tool = runpy.run_path(TOOL)
    heard, other = (tool["Heard"]([[1.0]] * 2, [[7], [token]]) for token in (8, 9))
    tool["require_equal"]("1", heard, other, 0.5)
    with pytest.raises(SystemExit, match="50% of the first tokens are equal; the sides do not do the same work"):
        tool["require_equal"]("1", heard, other, 0.9)


def test_a_peer_that_fails_is_left_out(capsys):
    def fail(_number):
        raise RuntimeError("no compiler")

    heard = runpy.run_path(TOOL)["in_turn"]({"ours": lambda number: number, "peer": fail}, 2)
    assert heard == {"ours": [0, 1, 2]}
    assert "peer: left out, RuntimeError: no compiler" in "".join(capsys.readouterr())
