"""What official files are refused for: one line that names the file, the place, the field and the remedy."""

import base64
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from official_layouts import LAYOUTS, write

from megatron_sphinx.data.images import decode
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.evaluation.benchmarks.registry import named, names
from megatron_sphinx.evaluation.questions import questions_of
from megatron_sphinx.evaluation.readers import rows
from megatron_sphinx.evaluation.samples import Protocol
from megatron_sphinx.serving.questions import Asking
from megatron_sphinx.unpickling import plain_pickle

Change = Callable[[Any], Any]


def refusal(name: str, data: Path) -> str:
    """The one line that a benchmark is refused with."""
    with pytest.raises(DataError) as caught:
        list(named(name).samples(data))
    line = str(caught.value)
    assert "\n" not in line
    return line


def changed(name: str, data: Path, file: str, change: Change) -> str:
    """The refusal of a benchmark one of whose files of JSON was changed."""
    folder = named(name).folder_in(data)
    LAYOUTS[name](folder, Random(1))
    path = folder / file
    is_lines = path.suffix == ".jsonl" or name.startswith("pope")
    content = [json.loads(line) for line in path.read_text().splitlines()] if is_lines else json.loads(path.read_text())
    content = change(content)
    path.write_text("".join(json.dumps(row) + "\n" for row in content) if is_lines else json.dumps(content))
    line = refusal(name, data)
    assert str(folder) in line
    return line


def without(*keys: Any) -> Change:
    """A change that removes what some keys, one in the other, lead to."""

    def change(content: Any) -> Any:
        inner = content
        for key in keys[:-1]:
            inner = inner[key] if key != "first" else next(iter(inner.values()))
        del inner[keys[-1]]
        return content

    return change


def with_value(value: Any, *keys: Any) -> Change:
    """A change that puts a value where some keys lead to."""

    def change(content: Any) -> Any:
        inner = content
        for key in keys[:-1]:
            inner = inner[key] if key != "first" else next(iter(inner.values()))
        inner[keys[-1]] = value
        return content

    return change


def twice(*keys: Any) -> Change:
    """A change that repeats the first row of a list."""

    def change(content: Any) -> Any:
        found = content
        for key in keys:
            found = found[key]
        found.append(found[0])
        return content

    return change


VQA_QUESTIONS, VQA_ANSWERS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"


@pytest.mark.parametrize(
    ("name", "file", "change", "fault"),
    [
        ("vqav2_val", VQA_QUESTIONS, without("questions", 1, "question"), "item 2: no question: 'None' is no text"),
        ("vqav2_val", VQA_QUESTIONS, without("questions"), "questions is no list or object"),
        ("vqav2_val", VQA_QUESTIONS, twice("questions"), "is there twice"),
        ("vqav2_val", VQA_QUESTIONS, with_value("x", "questions", 0, "image_id"), "cannot be made of it"),
        ("vqav2_val", VQA_ANSWERS, twice("annotations"), "or is there twice"),
        ("vqav2_val", VQA_ANSWERS, without("annotations", 0), "lacks answers of 1 questions"),
        ("vqav2_val", VQA_ANSWERS, with_value("yes", "annotations", 0, "answers"), "no answers: 'yes' is no list"),
        ("vqav2_testdev", "v2_OpenEnded_mscoco_test-dev2015_questions.json", twice("questions"), "have the id"),
        ("gqa", "testdev_balanced_questions.json", without("first", "imageId"), "no imageId"),
        ("gqa", "testdev_balanced_questions.json", with_value("../../x", "first", "imageId"), "path out of the folder"),
        ("gqa", "testdev_balanced_questions.json", with_value("\ud800", "first", "question"), "is not Unicode"),
        ("gqa", "testdev_balanced_questions.json", with_value(" ", "first", "question"), "no question"),
        ("gqa", "testdev_balanced_questions.json", lambda _: {}, "its files hold no question"),
        ("gqa", "testdev_balanced_questions.json", lambda _: [1], "item 1: '1' is no object"),
        ("gqa", "testdev_balanced_questions.json", lambda _: 7, "is no list or object"),
        ("vsr", "data/splits/zeroshot/test.jsonl", with_value(2, 0, "label"), "no label: 2 is none of 0, 1"),
        ("textvqa", "TextVQA_Rosetta_OCR_v0.2_val.json", without("data", 0), "is not in TextVQA_Rosetta_OCR"),
        ("ocrvqa", "dataset.json", with_value(4, "first", "split"), "no split: 4 is none of 1, 2, 3"),
        ("ocrvqa", "dataset.json", with_value("a", "first", "split"), "no split: 'a' is no whole number"),
        ("deepform", "ureader_json/test_DeepForm.jsonl", with_value([], 0, "image"), "0 pictures instead of one"),
        ("deepform", "ureader_json/test_DeepForm.jsonl", without(0, "conversations", 0), "2 parts instead of picture"),
        ("deepform", "ureader_json/test_DeepForm.jsonl", with_value(" ", 0, "conversations", 1, "value"), "is empty"),
        ("scienceqa", "pid_splits.json", with_value(["8"], "test"), "lacks 8, which pid_splits.json has in test"),
        ("scienceqa", "pid_splits.json", without("test"), "no test: 'None' is no list"),
        ("scienceqa", "pid_splits.json", lambda _: [], "its object: '[]' is no object"),
        ("seed", "SEED-Bench.json", with_value("Z", "questions", 0, "answer"), "the letter of none of 4 options"),
        ("seed", "SEED-Bench.json", with_value("", "questions", 0, "choice_b"), "an option is missing"),
        ("seed", "SEED-Bench.json", with_value("sound", "questions", 0, "data_type"), "neither image nor video"),
        ("seed", "SEED-Bench.json", with_value(3, "question_type"), "no question_type: '3' is no object"),
        ("q_bench", "llvisionqa_dev.json", with_value("x", 0, "correct_ans"), "'x' is none of its options"),
        ("q_bench", "llvisionqa_dev.json", with_value(["a"] * 27, 0, "candidates"), "too many options"),
        ("pope", "coco_pope_popular.json", without(1, "label"), "line 2: no label"),
        ("pope", "coco_pope_popular.json", with_value("maybe", 1, "label"), "line 2: no label: 'maybe' is none of yes"),
        ("pope", "coco_pope_random.json", with_value(None, 0, "image"), "line 1: no image: 'None' is no text"),
        ("pope", "coco_pope_random.json", with_value("", 0, "image"), "line 1: no path: '' names no file"),
        ("pope", "coco_pope_random.json", with_value(None, 0, "question_id"), "no question_id: 'None' is no text"),
        ("pope", "coco_pope_random.json", with_value(["a.jpg"], 0, "image"), "no image: \"['a.jpg']\" is no text"),
        ("hallusionbench", "HallusionBench.json", with_value(True, 0, "set_id"), "no set_id: 'True' is no text"),
        ("hallusionbench", "HallusionBench.json", with_value("2", 0, "gt_answer"), "'2' is none of 0, 1"),
        ("mathvista", "testmini.json", without("first", "query"), "'1': no query"),
        ("mathverse", "testmini.json", with_value(None, 0, "question_for_eval"), "no question_for_eval: 'None'"),
        ("llava_bench", "context.jsonl", with_value("2.jpg", 0, "image"), "image 001.jpg is not in context.jsonl"),
        ("llava_bench", "answers_gpt4.jsonl", without(0), "question_id 0 is not in answers_gpt4.jsonl"),
        ("llava_bench", "rule.json", without("llava_bench_conv"), "no conv"),
        ("nocaps", "nocaps_val_4500_captions.json", with_value(1, "annotations", 0, "image_id"), "is none of images"),
        ("nocaps", "nocaps_val_4500_captions.json", with_value([], "annotations"), "the picture has no caption"),
        ("refcoco_val", "instances.json", with_value([1, 2, 0, 4], "annotations", 0, "bbox"), "no bbox"),
        ("refcoco_val", "instances.json", with_value([1, 2, 10**400, 4], "annotations", 0, "bbox"), "no bbox"),
        ("refcoco_val", "instances.json", without("annotations", 0), "is not in instances.json"),
        ("refcoco_val", "instances.json", without("images", 0), "is not in instances.json"),
        ("video_bench", "Eval_QA/MSVD_QA_new.json", with_value([], "first", "choices"), "no choices: '[]' is no"),
        ("mvbench", "json/state_change.json", with_value("x", 0, "answer"), "'x' is none of its options"),
        ("mvbench", "json/episodic_reasoning.json", with_value(-1, 0, "start"), "no start: '-1' is no time in seconds"),
    ],
)  # fmt: skip
def test_another_layout_is_named_with_its_field(name, file, change, fault, tmp_path):
    assert fault in changed(name, tmp_path, file, change)


@pytest.mark.parametrize("name", names())
def test_what_is_missing_is_named_with_where_it_is_offered(name, tmp_path):
    line = refusal(name, tmp_path)
    needed = [file for file in named(name).files if file.is_needed]
    assert all(f"{file.path} ({file.where})" in line for file in needed)
    assert str(named(name).folder_in(tmp_path)) in line


def test_a_name_that_is_none_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="vqav2_vale: is no benchmark; did you mean vqav2_val"):
        named("vqav2_vale")


def spoiled_table(tmp_path: Path, change: Callable[[bytes], bytes]) -> str:
    """The refusal of a table of MMBench whose bytes were changed."""
    LAYOUTS["mmbench_dev"](tmp_path / "mmbench", Random(2))
    path = tmp_path / "mmbench/mmbench_dev_20230712.tsv"
    path.write_bytes(change(path.read_bytes()))
    return refusal("mmbench_dev", tmp_path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: text.replace(b"iVBOR", b"iV*OR", 1), "no image: it is no base64"),
        (lambda text: text.replace(b"iVBOR", b"VBOR", 1), "no image: it is no base64"),
        (lambda text: text.replace(b"index\t", b"number\t", 1), "no index: 'None' is no whole number"),
        (lambda text: text + b"12\t\n", "has not 11 cells as the first line has"),
        (lambda text: text.replace(b"\tocr\t", b"\t\xff\t", 1), "is not UTF-8"),
        (lambda text: text.decode().encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (lambda text: b"\x1f\x8b" + text, "is compressed; unpack it (gunzip)"),
        (lambda text: text + b'12\t"no end', "is no row of a table"),
        (lambda text: text[: text.index(b"\n") + 1], "its files hold no question"),
    ],
)
def test_a_spoiled_table_is_refused(change, fault, tmp_path):
    assert fault in spoiled_table(tmp_path, change)


def test_a_row_with_the_picture_of_no_row_before_it_is_refused(tmp_path):
    (tmp_path / "ccbench").mkdir()
    (tmp_path / "ccbench/CCBench.tsv").write_text("index\tquestion\tA\tB\tanswer\timage\n5\tq\tx\ty\tA\t77\n")
    assert "which is not before it" in refusal("ccbench", tmp_path)


def test_a_row_of_a_table_without_a_picture_cannot_be_asked_and_the_others_can(tmp_path):
    (tmp_path / "ccbench").mkdir()
    picture = base64.b64encode(b"BM").decode()
    cells = {5: picture, 6: "", 7: "", 8: "6"}
    rows = "".join(f"{index}\tq\tx\ty\tA\t{cell}\n" for index, cell in cells.items())
    (tmp_path / "ccbench/CCBench.tsv").write_text(f"index\tquestion\tA\tB\tanswer\timage\n{rows}")
    samples = list(named("ccbench").samples(tmp_path))
    assert [sample.picture for sample in samples] == [b"BM", b"", b"", b""]
    assert [sample.picture_id for sample in samples[1:]] == [f"no picture of {index}" for index in (6, 7, 6)]
    for question in list(questions_of(named("ccbench"), samples, Protocol.PAPER))[1:]:
        with pytest.raises(DataError, match="not an image: the file is empty"):
            decode(question.content(Asking()))


@pytest.mark.parametrize("limit", [0, 2**26])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"1": {"question": ', "not JSON"),
        (b'{"1": \xff}', "not UTF-8"),
        (b"\xff\xfe{", "is UTF-16"),
        (b"[[1]]", "is no object"),
        (b"7", "is no list or object"),
    ],
)
def test_what_is_not_json_is_refused_whatever_its_size(limit, content, fault, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "JSON_BYTES", limit)
    LAYOUTS["gqa"](tmp_path / "gqa", Random(3))
    (tmp_path / "gqa/testdev_balanced_questions.json").write_bytes(content)
    line = refusal("gqa", tmp_path)
    assert fault in line or (limit == 0 and "JSON" in line)


@pytest.mark.parametrize("limit", [0, 2**26])
def test_a_list_under_no_such_key_is_named(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "JSON_BYTES", limit)
    LAYOUTS["docvqa_val"](tmp_path / "docvqa", Random(3))
    write(tmp_path / "docvqa/val_v1.0.json", {"dataset_version": "2.0", "questions": []})
    assert "data is no list or object" in refusal("docvqa_val", tmp_path)


def test_a_line_that_is_no_json_is_named(tmp_path):
    LAYOUTS["wtq"](tmp_path / "ureader", Random(3))
    path = tmp_path / "ureader/ureader_json/test_WikiTableQuestions.jsonl"
    path.write_text(path.read_text() + '{"image": \n')
    assert "line 4: not JSON" in refusal("wtq", tmp_path)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    LAYOUTS["wtq"](tmp_path / "ureader", Random(3))
    path = tmp_path / "ureader/ureader_json/test_WikiTableQuestions.jsonl"
    path.unlink()
    path.mkdir()
    assert "cannot be read (Is a directory)" in refusal("wtq", tmp_path)


@pytest.mark.parametrize(
    ("task", "content", "fault"),
    [
        ("scene/questions_answers_YN", "Is it?\tYes\n", "has 1 questions instead of two"),
        ("count", "Is it?\tYes\nIs it?\tMaybe\n", "line 2: is no question, a tab, and Yes or No"),
        ("count", "\xff", "is not UTF-8"),
    ],
)
def test_a_spoiled_text_of_mme_is_refused(task, content, fault, tmp_path):
    LAYOUTS["mme"](tmp_path / "mme", Random(4))
    (tmp_path / "mme/MME_Benchmark_release_version" / task / "0001.txt").write_bytes(content.encode("latin-1"))
    assert fault in refusal("mme", tmp_path)


def test_a_task_of_mme_that_is_missing_is_named(tmp_path):
    LAYOUTS["mme"](tmp_path / "mme", Random(4))
    (tmp_path / "mme/MME_Benchmark_release_version/OCR").rename(tmp_path / "elsewhere")
    assert "OCR: is missing; MME has a folder for each of" in refusal("mme", tmp_path)


def test_a_task_of_mme_without_questions_is_named(tmp_path):
    LAYOUTS["mme"](tmp_path / "mme", Random(4))
    for path in (tmp_path / "mme/MME_Benchmark_release_version/OCR").glob("*.txt"):
        path.unlink()
    assert "holds no questions (*.txt)" in refusal("mme", tmp_path)


def test_a_file_of_ai2d_that_is_missing_is_named(tmp_path):
    LAYOUTS["ai2d"](tmp_path / "ai2d", Random(5))
    (tmp_path / "ai2d/ai2d/questions/42.png.json").unlink()
    assert "42.png.json: cannot be read (No such file" in refusal("ai2d", tmp_path)


def test_ids_of_ai2d_that_are_no_text_are_refused(tmp_path):
    LAYOUTS["ai2d"](tmp_path / "ai2d", Random(5))
    (tmp_path / "ai2d/ai2d_test_ids.csv").write_bytes(b"\xff")
    assert "ai2d_test_ids.csv: cannot be read" in refusal("ai2d", tmp_path)


def test_an_object_that_is_not_json_is_refused(tmp_path):
    LAYOUTS["ai2d"](tmp_path / "ai2d", Random(5))
    (tmp_path / "ai2d/ai2d/questions/42.png.json").write_text("{")
    assert "42.png.json: not JSON" in refusal("ai2d", tmp_path)


class Called:
    def __reduce__(self):
        return (print, ("a file ran code",))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (pickle.dumps([Called()]), "it names builtins.print"),
        (pickle.dumps([{"split": "val"}])[:-4], "cannot be read as a pickle of plain values"),
        (pickle.dumps({"split": "val"}), "holds no list of references"),
        (pickle.dumps([1]), "item 1: '1' is no reference"),
        (pickle.dumps([{"split": "test"}]), "has no references of the split val; it has test"),
    ],
)
def test_spoiled_references_are_refused_and_nothing_runs(content, fault, tmp_path, capsys):
    folder = tmp_path / "refcoco"
    LAYOUTS["refcoco_val"](folder, Random(6))
    (folder / "refs(unc).p").write_bytes(content)
    assert fault in refusal("refcoco_val", tmp_path)
    assert "ran code" not in capsys.readouterr().out


def test_a_pickle_of_python_2_is_read(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsS'ann_id'\np4\nI12\nsa.")
    assert plain_pickle(path) == [{"sent": "café", "ann_id": 12}]


def test_references_need_their_file(tmp_path):
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: is missing"):
        list(named("refcoco_val").read(tmp_path))


def write_exam(name: str, tmp_path: Path, file: str, **fields: Any) -> None:
    """Write MMMU or CMMMU with one row whose fields were changed."""
    import pyarrow
    from pyarrow import parquet

    picture = {"bytes": base64.b64decode("iVBORw0KGgo="), "path": "1.png"}
    row: dict[str, Any] = {"id": "a", "question": "q", "image_1": picture, "answer": "A", "options": "['x', 'y']"}
    row |= {"question_type": "multiple-choice", "type": "选择", **{f"option{n}": "x" for n in range(1, 5)}} | fields
    (tmp_path / name / "Art").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / name / "Art" / file)


def spoiled_exam(name: str, tmp_path: Path, file: str, **fields: Any) -> str:
    """The refusal of MMMU or CMMMU with one row whose fields were changed."""
    write_exam(name, tmp_path, file, **fields)
    return refusal(name, tmp_path)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"options": "x, y"}, "row 1: no options: 'x, y' is no list"),
        ({"options": "[x, y]"}, "no options"),
        ({"image_1": "a.png"}, "no image_1: it holds no picture"),
    ],
)
def test_a_spoiled_row_of_mmmu_is_refused(fields, fault, tmp_path):
    assert fault in spoiled_exam("mmmu", tmp_path, "validation-00000-of-00001.parquet", **fields)


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": "1.png"}, {"bytes": b"", "path": "1.png"}])
@pytest.mark.parametrize(
    ("name", "file"),
    [("mmmu", "validation-00000-of-00001.parquet"), ("cmmmu", "val-00000-of-00001.parquet")],
)
def test_a_row_of_an_exam_without_a_picture_cannot_be_asked(name, file, cell, tmp_path):
    write_exam(name, tmp_path, file, image_1=cell)
    (sample,) = named(name).samples(tmp_path)
    assert (sample.picture, sample.picture_id) == (b"", "no picture of a")
    with pytest.raises(DataError, match="not an image: the file is empty"):
        decode(sample.picture)


def test_a_kind_that_cmmmu_has_not_is_refused(tmp_path):
    line = spoiled_exam("cmmmu", tmp_path, "val-00000-of-00001.parquet", type="问答")
    assert "no type: 问答 is none of 选择, 判断, 填空" in line


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "mmmu/Art").mkdir(parents=True)
    (tmp_path / "mmmu/Art/validation-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    assert "is no parquet file" in refusal("mmmu", tmp_path)


def test_files_of_another_split_are_not_read_for_mmmu(tmp_path):
    with pytest.raises(DataError, match=r"no \*/validation-\*\.parquet, a folder for each subject"):
        list(named("mmmu").read(tmp_path))


def test_image_net_needs_labels(tmp_path):
    (tmp_path / "imagenet/val").mkdir(parents=True)
    assert "has neither folders of classes, nor LOC_val_solution.csv" in refusal("imagenet", tmp_path)


@pytest.mark.parametrize(
    ("labels", "meta", "fault"),
    [("7\n", None, "meta.mat: cannot be read"), ("7\n", "n01440764", "line 1: '7' is no class of meta.mat")],
)
def test_labels_of_the_devkit_that_fit_nothing_are_refused(labels, meta, fault, tmp_path):
    import numpy
    from scipy.io import savemat

    kit = tmp_path / "imagenet/ILSVRC2012_devkit_t12/data"
    for place in (kit, tmp_path / "imagenet/val"):
        place.mkdir(parents=True)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text(labels)
    if meta:
        table = numpy.array([(2, meta), (3, meta)], dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")])
        savemat(kit / "meta.mat", {"synsets": table})
    assert fault in refusal("imagenet", tmp_path)


def test_a_class_that_image_net_has_not_is_named(tmp_path):
    (tmp_path / "imagenet/val/n00000001").mkdir(parents=True)
    (tmp_path / "imagenet/val/n00000001/a.JPEG").touch()
    assert "its class n00000001 is none of ImageNet-1K" in refusal("imagenet", tmp_path)


def test_a_video_without_frames_costs_its_own_questions_only(tmp_path):
    """Whoever asks about it finds no picture there, as tests of frames say."""
    LAYOUTS["mvbench"](tmp_path / "mvbench", Random(7))
    empty = tmp_path / "mvbench/video/vlnqa/egocentric_navigation.mp4"
    for path in empty.iterdir():
        path.unlink()
    samples = list(named("mvbench").samples(tmp_path))
    assert empty in [sample.picture for sample in samples]
    assert len(samples) > 1


def test_the_registry_needs_neither_torch_nor_numpy():
    import subprocess

    code = (
        "import sys; from megatron_sphinx.evaluation.benchmarks.registry import names; names(); "
        "sys.exit(bool({'torch', 'numpy', 'pyarrow', 'av', 'timm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
