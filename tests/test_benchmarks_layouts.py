"""Every benchmark reads its official layout: samples field by field, prompts to the letter."""

import json
from pathlib import Path
from random import Random

import pytest
from official_layouts import LAYOUTS, SHORT, lettered, some_text, some_texts, textvqa, write

from megatron_sphinx.evaluation.benchmarks.registry import named, names
from megatron_sphinx.evaluation.readers import rows
from megatron_sphinx.evaluation.samples import Protocol, Sample


def asked(name: str, sample: Sample, protocol: Protocol = Protocol.PAPER) -> str:
    """What the benchmark asks about a sample."""
    prompts = named(name).prompts
    return prompts.get(protocol, prompts[Protocol.PAPER]).format(**sample.fields)


def check(name: str, data: Path, seed: int) -> list[Sample]:
    """Write the layout of a benchmark, read it, and compare what was read."""
    benchmark = named(name)
    folder = benchmark.folder_in(data)
    expected = LAYOUTS[name](folder, Random(seed))
    samples = list(benchmark.samples(data))
    assert [sample.id for sample in samples] == [each["id"] for each in expected]
    for sample, each in zip(samples, expected, strict=True):
        assert asked(name, sample) == each.pop("prompt")
        assert all(asked(name, sample, protocol) for protocol in Protocol)
        for attribute, value in each.items():
            found = getattr(sample, attribute)
            assert dict(found) == value if isinstance(value, dict) else found == value, f"{name}: {attribute}"
    return samples


def test_every_benchmark_has_a_layout_here():
    assert set(LAYOUTS) == set(names())


@pytest.mark.parametrize("name", names())
def test_the_official_layout_is_read(name, tmp_path):
    check(name, tmp_path, seed=len(name) * 1000 + sum(map(ord, name)))


@pytest.mark.parametrize("name", ["vqav2_val", "gqa", "mathvista", "refcoco_val", "docvqa_val", "q_bench", "seed"])
def test_large_files_are_streamed_to_the_same_samples(name, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "JSON_BYTES", 0)
    check(name, tmp_path, seed=7)


def test_pictures_that_questions_share_have_one_id(tmp_path):
    samples = check("mmbench_dev", tmp_path, seed=3)
    by_group = {sample.group: sample.picture_id for sample in samples}
    assert all(by_group[sample.group] == sample.picture_id for sample in samples)
    assert len(set(by_group.values())) == 2


def test_rotations_share_the_bytes_of_their_picture(tmp_path):
    samples = check("mmbench_dev", tmp_path, seed=4)
    assert samples[0].picture is samples[1].picture


def test_text_vqa_without_tokens_asks_without_them_and_says_so(tmp_path):
    folder = named("textvqa").folder_in(tmp_path)
    expected = textvqa(folder, Random(5), has_tokens=False)
    samples = list(named("textvqa").samples(tmp_path))
    assert [asked("textvqa", sample) for sample in samples] == [each["prompt"] for each in expected]
    assert {sample.categories["OCR tokens"] for sample in samples} == {"not given"}


def test_accessory_never_gives_the_tokens_of_text_vqa(tmp_path):
    for sample in check("textvqa", tmp_path, seed=6):
        assert asked("textvqa", sample, Protocol.ACCESSORY) == sample.fields["question"] + SHORT


@pytest.mark.parametrize("name", ["scienceqa", "mmmu"])
def test_the_slip_of_accessory_is_kept(name, tmp_path):
    sample = check(name, tmp_path, seed=8)[0]
    assert asked(name, sample, Protocol.ACCESSORY).endswith(
        '\nAnswer with the option"s letter from the given choices directly.'
    )


def test_accessory_glues_the_options_of_ai2d_to_the_question(tmp_path):
    sample = check("ai2d", tmp_path, seed=9)[0]
    glued = sample.fields["question"] + "\n".join(sample.choices) + SHORT
    assert asked("ai2d", sample, Protocol.ACCESSORY) == glued


def test_answers_to_science_qa_are_made_to_begin_as_in_the_released_code():
    prefix = named("scienceqa").answer_prefix
    assert prefix[Protocol.PAPER] == prefix[Protocol.ACCESSORY] == " The answer is"
    assert prefix[Protocol.OFFICIAL] == ""


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("mmbench_dev", "\nAnswer with the option's letter from the given choices directly."),
        ("mmbench_dev_cn", "\n请直接回答选项字母。"),
    ],
)
def test_mmbench_is_asked_officially_with_lines_of_options(name, end, tmp_path):
    for sample in check(name, tmp_path, seed=10):
        hint = sample.fields["hint"]
        asks = hint + sample.fields["question"] + "\n" + lettered(sample.choices) + end
        assert asked(name, sample, Protocol.OFFICIAL) == asks


@pytest.mark.parametrize("place", ["data/images", "data/trainval2017"])
def test_pictures_of_vsr_are_found_in_folders_of_its_repository(place, tmp_path):
    expected = LAYOUTS["vsr"](tmp_path / "vsr", Random(17))
    (tmp_path / "vsr/images").rmdir()
    (tmp_path / "vsr" / place).mkdir(parents=True)
    found = [sample.picture for sample in named("vsr").samples(tmp_path)]
    assert found == [tmp_path / "vsr" / place / each["picture"].name for each in expected]


@pytest.mark.parametrize("split", ["val", "test"])
def test_documents_are_found_as_they_are_distributed_now(split, tmp_path):
    folder = tmp_path / "docvqa"
    (folder / "spdocvqa_images").mkdir(parents=True)
    row = {"questionId": 1, "question": "q", "image": "documents/a_1.png", "answers": ["x"]}
    kind = "_withQT" if split == "val" else ""
    write(folder / f"spdocvqa_qas/{split}_v1.0{kind}.json", {"dataset_name": "docvqa", "data": [row]})
    (sample,) = named(f"docvqa_{split}").samples(tmp_path)
    assert sample.picture == folder / "spdocvqa_images/a_1.png"


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("Find x.\nChoices:\nA:40°\nB:x: y\nC. 1 \nD:No correct", ("40°", "x: y", "1", "No correct")),
        ("Choices:\nA:\nB:\nC:\nD:", ("A", "B", "C", "D")),  # they are in the picture
        ("Choices:\nA: \nB: 5", ("A", "5")),
        ("A: one of two lines that meet\nB: the other one\nChoices:\nA:1\nB:2\nP: x\nC:3", ("1", "2", "3")),
        ("Find x.", ("A", "B", "C", "D")),
        ("Choices:A:1 B:2", ("A", "B", "C", "D")),
    ],
)
def test_options_of_mathverse_are_lines_or_letters(text, choices, tmp_path):
    LAYOUTS["mathverse"](tmp_path / "mathverse", Random(16))
    path = tmp_path / "mathverse/testmini.json"
    content = json.loads(path.read_text())
    content[0]["question_for_eval"] = text
    path.write_text(json.dumps(content))
    assert next(iter(named("mathverse").samples(tmp_path))).choices == choices


def test_a_bom_and_other_line_ends_change_nothing(tmp_path):
    folder = named("pope_random").folder_in(tmp_path)
    LAYOUTS["pope_random"](folder, Random(11))
    before = list(named("pope_random").samples(tmp_path))
    path = folder / "coco_pope_random.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert list(named("pope_random").samples(tmp_path)) == before


@pytest.mark.parametrize("limit", [0, 2**20])
def test_a_bom_before_json_changes_nothing(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "JSON_BYTES", limit)
    LAYOUTS["gqa"](tmp_path / "gqa", Random(12))
    before = list(named("gqa").samples(tmp_path))
    path = tmp_path / "gqa/testdev_balanced_questions.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(named("gqa").samples(tmp_path)) == before


def test_a_table_with_a_bom_is_read(tmp_path):
    LAYOUTS["mmvp"](tmp_path / "mmvp", Random(13))
    before = list(named("mmvp").samples(tmp_path))
    path = tmp_path / "mmvp/Questions.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(named("mmvp").samples(tmp_path)) == before


def test_flickr_in_the_form_of_coco_is_read_like_nocaps(tmp_path):
    rng = Random(14)
    told = some_texts(rng, 2)
    folder = tmp_path / "flickr30k"
    (folder / "images").mkdir(parents=True)
    write(folder / "flickr30k_karpathy_test.json", {
        "images": [{"id": 5, "file_name": "a.jpg"}],
        "annotations": [{"id": n, "image_id": 5, "caption": text} for n, text in enumerate(told)],
    })  # fmt: skip
    (sample,) = named("flickr30k").samples(tmp_path)
    assert (sample.picture, sample.answers) == (folder / "images/a.jpg", tuple(told))


def test_image_net_is_read_with_the_labels_of_kaggle(tmp_path):
    folder = tmp_path / "imagenet"
    (folder / "ILSVRC/Data/CLS-LOC/val").mkdir(parents=True)
    (folder / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000007,n01440764 1 2 3 4 n01440764 5 6 7 8\n"
    )
    (sample,) = named("imagenet").samples(tmp_path)
    assert sample.picture == folder / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000007.JPEG"
    assert sample.answers[0] == "This is a tench"


def test_image_net_is_read_with_the_labels_of_the_devkit(tmp_path):
    import numpy
    from scipy.io import savemat

    folder = tmp_path / "imagenet"
    kit = folder / "ILSVRC2012_devkit_t12/data"
    for place in (folder / "val", kit):
        place.mkdir(parents=True)
    synsets = numpy.array([(2, "n01440764"), (1, "n01443537")], dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")])
    savemat(kit / "meta.mat", {"synsets": synsets})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n")
    found = [(sample.picture, sample.answers[1]) for sample in named("imagenet").samples(tmp_path)]
    assert found == [(folder / "val/ILSVRC2012_val_00000001.JPEG", "tench"),
                     (folder / "val/ILSVRC2012_val_00000002.JPEG", "goldfish")]  # fmt: skip


def test_a_question_with_braces_is_asked_as_it_is(tmp_path):
    (tmp_path / "pope/val2014").mkdir(parents=True)
    question = "{question} {0} " + some_text(Random(15))
    row = {"question_id": 1, "image": "a.jpg", "text": question, "label": "yes"}
    (tmp_path / "pope/coco_pope_random.json").write_text(f"{rows.quoted(row)}\n")
    (sample,) = named("pope_random").samples(tmp_path)
    assert asked("pope_random", sample) == question + SHORT
