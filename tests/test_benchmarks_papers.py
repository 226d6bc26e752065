"""The papers' numbers beside the benchmarks, and what servers of benchmarks are sent."""

import csv
import io
import json
from pathlib import Path
from random import Random

import pytest
from official_layouts import LAYOUTS

from megatron_sphinx import evaluation
from megatron_sphinx.evaluation.benchmarks.registry import named, names
from megatron_sphinx.evaluation.metrics.yes_no import COGNITION, PERCEPTION
from megatron_sphinx.evaluation.reference import page
from megatron_sphinx.evaluation.samples import Answered
from megatron_sphinx.parsing import read_yaml

TABLES = read_yaml(Path(evaluation.__file__).with_name("papers.yaml"))["tables"]
COLUMNS = {column for table in TABLES for row in table["models"].values() for column in row}
OF_NO_BENCHMARK_HERE = {
    "tiny_lvlm", "touchstone", "benchlmm", "infimm_eval", "aesbench_perception", "aesbench_empathy",
    "aesbench_assessment", "aesbench_interpretation", "cmmmu_test",
}  # fmt: skip


def numbers(model: str) -> dict[str, float]:
    """All that is given of a model."""
    return {column: value for table in TABLES for column, value in table["models"].get(model, {}).items()}


def test_every_table_says_where_it_is_from():
    assert all(table["source"] and table["models"] for table in TABLES)


def test_every_column_of_a_benchmark_is_in_the_papers():
    assert {named(name).table for name in names()} - {""} <= COLUMNS


def test_every_column_of_the_papers_has_a_benchmark_or_is_known_to_have_none():
    heads = {named(name).table for name in names()}
    assert {column.partition(" ")[0] for column in COLUMNS} - heads == OF_NO_BENCHMARK_HERE


@pytest.mark.parametrize(
    ("column", "split"), [("scienceqa", "scienceqa"), ("iconqa", "iconqa"), ("vsr", "vsr_all"), ("pope", "pope")]
)
def test_a_number_stands_beside_the_split_that_it_is_of_alone(column, split):
    assert [name for name in names() if named(name).table == column] == [split]


def test_no_number_is_given_twice():
    given = [(model, column) for table in TABLES for model, row in table["models"].items() for column in row]
    assert len(given) == len(set(given))


@pytest.mark.parametrize("column", sorted(COLUMNS))
def test_numbers_are_in_the_range_of_their_unit(column):
    most = {"mme": 2000, "mme cognition": 800, "visualmrc": 1000, "touchstone": 1000, "tiny_lvlm": 500}.get(column)
    most = most or (200 if column.startswith("mme ") else 100)
    assert all(0 <= row[column] <= most for table in TABLES for row in table["models"].values() if column in row)


def test_tasks_of_mme_add_up_to_its_sums():
    given = numbers("sphinx-1k")
    assert sum(given[f"mme {task}"] for task in PERCEPTION) == pytest.approx(given["mme"], abs=0.06)
    assert sum(given[f"mme {task}"] for task in COGNITION) == pytest.approx(given["mme cognition"], abs=0.06)


@pytest.mark.parametrize("model", ["sphinx-1k", "sphinx-plus"])
def test_parts_of_video_bench_have_the_mean_that_is_given(model):
    given = numbers(model)
    parts = {column.removeprefix("video_bench "): value for column, value in given.items() if "video_bench " in column}
    assert len(parts) == 13
    levels = [
        [value for part, value in parts.items() if part in level]
        for level in (
            {"ActivityNet", "MSVD", "MSRVTT", "TGIF", "Youcook2", "Ucfcrime", "MOT"},
            {"TVQA", "MV", "NBA"},
            {"Driving-exam", "Driving-decision-making", "SQA3D"},
        )
    ]
    mean = sum(sum(level) / len(level) for level in levels) / 3
    plain = sum(parts.values()) / 13
    assert given["video_bench"] == pytest.approx(mean, abs=0.06) or given["video_bench"] == pytest.approx(
        plain, abs=0.06
    )


def answered(name: str, tmp_path: Path) -> list[Answered]:
    """Samples of a benchmark, each with its own id and odd signs as the answer."""
    LAYOUTS[name](named(name).folder_in(tmp_path), Random(1))
    return [Answered(sample=sample, text=f' {sample.id}\t"ü"\n') for sample in named(name).samples(tmp_path)]


def sent(name: str, answers: list[Answered]) -> dict[str, str]:
    """The files for the benchmark's server."""
    submission = named(name).submission
    assert submission
    return dict(submission(answers))


@pytest.mark.parametrize(
    ("name", "id_name", "answer_name", "kind"),
    [
        ("vqav2_testdev", "question_id", "answer", int), ("okvqa", "question_id", "answer", int),
        ("vizwiz_test", "image", "answer", str), ("gqa", "questionId", "prediction", str),
        ("docvqa_test", "questionId", "answer", int), ("infovqa_test", "questionId", "answer", int),
        ("textvqa", "question_id", "answer", int), ("nocaps", "image_id", "caption", int),
    ],
)  # fmt: skip
def test_a_list_for_a_server_has_its_names_and_kinds(name, id_name, answer_name, kind, tmp_path):
    answers = answered(name, tmp_path)
    (content,) = sent(name, answers).values()
    expected = [{id_name: kind(one.sample.id), answer_name: one.text.strip()} for one in answers]
    assert json.loads(content) == expected


@pytest.mark.parametrize("name", ["mmmu", "mm_vet"])
def test_an_object_for_a_server_has_answers_by_ids(name, tmp_path):
    answers = answered(name, tmp_path)
    (content,) = sent(name, answers).values()
    assert json.loads(content) == {one.sample.id: one.text.strip() for one in answers}


def test_lines_for_the_server_of_seed(tmp_path):
    answers = answered("seed", tmp_path)
    (content,) = sent("seed", answers).values()
    found = [json.loads(line) for line in content.splitlines()]
    assert found == [{"question_id": one.sample.id, "prediction": one.text.strip()} for one in answers]


@pytest.mark.parametrize("name", ["mmbench_test", "ccbench"])
def test_a_table_for_a_server_keeps_all_but_pictures(name, tmp_path):
    answers = answered(name, tmp_path)
    (content,) = sent(name, answers).values()
    rows = list(csv.DictReader(io.StringIO(content, newline=""), delimiter="\t"))
    assert [row["index"] for row in rows] == [one.sample.id for one in answers]
    assert [row["prediction"] for row in rows] == [one.text.strip() for one in answers]
    assert [row["question"] for row in rows] == [one.sample.fields["question"] for one in answers]
    assert "image" not in rows[0]


def test_files_for_the_tool_of_mme(tmp_path):
    answers = answered("mme", tmp_path)
    files = sent("mme", answers)
    assert set(files) == {f"{task}.txt" for task in (*PERCEPTION, *COGNITION)}
    first = answers[0]
    cells = files["existence.txt"].splitlines()[0].split("\t")
    assert cells == ["0001.png", first.sample.fields["question"], "Yes", " ".join(first.text.split())]


def test_the_page_of_benchmarks_is_what_their_records_say():
    assert (Path(__file__).parents[1] / "docs/evaluation_files.md").read_text() == page(), (
        "run python -m megatron_sphinx.evaluation.reference > docs/evaluation_files.md"
    )
