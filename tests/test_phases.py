"""The start of a run: a list of phases that the ranks of both roles take together, whatever is in it."""

import json
import os
import re

import pytest

from megatron_sphinx.__main__ import main
from megatron_sphinx.errors import DataError
from megatron_sphinx.run import phases
from megatron_sphinx.run.encoder_rank import EncoderRank
from megatron_sphinx.run.language_rank import LanguageRank
from megatron_sphinx.run.phases import START, Role


def wave(role: Role) -> str:
    """A phase in which every rank tells who it is."""
    seat = role.context.groups.seat
    return f"{seat.role} {seat.rank}"


def begin(role: Role) -> bool:
    """Take the start, and print what was told in the phase that was added."""
    is_on = phases.start(role)
    print(f"told: {json.dumps(role.told.get('wave'))}")  # noqa: T201
    return is_on


@pytest.fixture
def train_with(start_ranks, tiny, tmp_path):
    """`train_with(place, *classes)` trains on a language and an encoder rank with one more phase, which these have."""

    def train(place: int, *classes: type, phase=wave):
        config = tiny.write(tmp_path / "run.yaml", {"parallel.encoder": 1})

        def work() -> int:
            from megatron_sphinx.run import train as launcher

            launcher.start = begin
            phases.START = (*START[:place], wave, *START[place:])
            for known in classes:
                known.wave = phase
            return main(["train", str(config)])

        return start_ranks(2, work)

    return train


@pytest.mark.parametrize("place", [0, 5, 9, len(START)])
def test_both_roles_take_a_phase_that_is_added_anywhere(train_with, place):
    ranks = train_with(place, LanguageRank, EncoderRank)
    assert ranks.wait() == [0, 0], ranks.text()
    for rank in range(2):
        assert 'told: ["language 0", "encoder 1"]' in ranks.text(rank)


def test_a_role_without_a_phase_of_its_own_takes_the_default(train_with):
    def work_of_language_only(role: Role) -> str | None:
        return wave(role) if isinstance(role, LanguageRank) else None

    ranks = train_with(7, Role, phase=work_of_language_only)
    assert ranks.wait() == [0, 0], ranks.text()
    for rank in range(2):
        assert 'told: ["language 0", null]' in ranks.text(rank)


def test_a_role_that_lacks_a_phase_is_refused_before_anyone_waits_for_it(train_with):
    ranks = train_with(7, LanguageRank)
    assert ranks.wait(60) == [1, 1], ranks.text()
    said = "TypeError: EncoderRank lacks ['wave'] of the phases of a start; give Role a default"
    assert said in ranks.text(1)
    assert "[language rank 0] leaves: encoder rank 1 ended the job (EncoderRank lacks ['wave']" in ranks.text(0)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_phase_that_fails_on_one_rank_ends_the_start_on_all_with_one_line(train_with, failing):
    def fail(_role: Role) -> None:
        if os.environ["RANK"] == str(failing):
            raise DataError("data.text=x: is not what it was")

    ranks = train_with(6, LanguageRank, EncoderRank, phase=fail)
    assert ranks.wait() == [2, 2], ranks.text()
    said = re.findall(r"^megatron-sphinx train: .*$", ranks.text(), re.MULTILINE)
    assert said == ["megatron-sphinx train: data.text=x: is not what it was"]


def test_every_phase_is_one_that_all_roles_inherit():
    for phase in START:
        assert getattr(Role, phase.__name__) is phase
    assert START.index(Role.choose_state) < START.index(Role.load_state) < START.index(Role.clear_the_way)
