"""Small files of benchmarks in the layouts of their authors, with what a reader must make of them."""

import base64
import csv
import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from megatron_sphinx.evaluation.metrics.yes_no import COGNITION, PERCEPTION
from megatron_sphinx.evaluation.prompts import CMMMU_TASKS
from megatron_sphinx.evaluation.readers.video import PARTS_OF_VIDEO_BENCH, PLACES_OF_MVBENCH
from megatron_sphinx.prepare.classes import image_net_names

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
Expected = dict[str, Any]  # attributes of a sample by their names; `prompt` is what the paper's protocol asks
_SIGNS = ["猫", "ü", "🙂", "{x}", '"', "a\u0301", "%s", "\\", "'", "Ω", "{}", "é", "<b>"]


def some_text(rng: Random) -> str:
    """A few words with odd signs in them."""
    return " ".join(rng.choice(_SIGNS) + str(rng.randrange(1000)) for _ in range(rng.randint(2, 5)))


def some_texts(rng: Random, count: int) -> list[str]:
    """Different texts."""
    return [f"{number} {some_text(rng)}" for number in range(count)]


def some_ids(rng: Random, count: int) -> list[int]:
    return rng.sample(range(10**9), count)


def picture(rng: Random) -> bytes:
    """A small PNG."""
    out = io.BytesIO()
    Image.new("RGB", (rng.randint(2, 9), rng.randint(2, 9)), tuple(rng.randbytes(3))).save(out, "PNG")
    return out.getvalue()


def write(path: Path, content: object) -> None:
    """Write JSON, or lines of it where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        assert isinstance(content, list)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def lettered(choices: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJ", choices, strict=False))


def _ten(rng: Random) -> list[str]:
    return [f"word{rng.randrange(1000)}", *(some_text(rng) for _ in range(9))]


def _vqa(folder: Path, rng: Random, questions: str, annotations: str, year: str) -> list[Expected]:
    (folder.parent / "coco" / year).mkdir(parents=True)
    expected = []
    asked: list[dict[str, Any]] = []
    answered: list[dict[str, Any]] = []
    for number in some_ids(rng, 3):
        image, question, answers = rng.randrange(10**6), some_text(rng), _ten(rng)
        asked.append({"image_id": image, "question": question, "question_id": number})
        answered.append({
            "image_id": image, "question_id": number, "question_type": "what is", "answer_type": "other",
            "multiple_choice_answer": answers[0],
            "answers": [{"answer": each, "answer_confidence": "yes", "answer_id": n} for n, each in enumerate(answers)],
        })  # fmt: skip
        expected.append({
            "id": str(number), "picture": folder / f"../coco/{year}/COCO_{year}_{image:012d}.jpg",
            "picture_id": str(image), "fields": {"question": question},
            "answers": tuple(answers) if annotations else (),
            "categories": {"answer_type": "other", "question_type": "what is"} if annotations else {},
            "record": {"question_id": number}, "prompt": question + SHORT,
        })  # fmt: skip
    write(folder / questions, {"info": {}, "license": {}, "questions": asked[::-1]})
    if annotations:
        write(folder / annotations, {"info": {}, "annotations": answered})
    return expected if annotations else expected[::-1]


def vqav2_val(folder: Path, rng: Random) -> list[Expected]:
    names = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
    return _vqa(folder, rng, *names, "val2014")


def vqav2_testdev(folder: Path, rng: Random) -> list[Expected]:
    return _vqa(folder, rng, "v2_OpenEnded_mscoco_test-dev2015_questions.json", "", "test2015")


def okvqa(folder: Path, rng: Random) -> list[Expected]:
    return _vqa(folder, rng, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014")


def _viz_wiz(folder: Path, rng: Random, split: str) -> list[Expected]:
    (folder / split).mkdir(parents=True)
    rows, expected = [], []
    for number in some_ids(rng, 3):
        image, question, answers = f"VizWiz_{split}_{number:08d}.jpg", some_text(rng), _ten(rng)
        row: dict[str, Any] = {"image": image, "question": question}
        if split == "val":
            told = [{"answer": each, "answer_confidence": "yes"} for each in answers]
            row |= {"answers": told, "answer_type": "other", "answerable": 1}
        rows.append(row)
        expected.append({
            "id": image, "picture": folder / split / image, "fields": {"question": question},
            "answers": tuple(answers) if split == "val" else (),
            "categories": {"answer type": "other"} if split == "val" else {},
            "prompt": question + " When the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
        })  # fmt: skip
    write(folder / f"{split}.json", rows)
    return expected


def vizwiz_val(folder: Path, rng: Random) -> list[Expected]:
    return _viz_wiz(folder, rng, "val")


def vizwiz_test(folder: Path, rng: Random) -> list[Expected]:
    return _viz_wiz(folder, rng, "test")


def gqa(folder: Path, rng: Random) -> list[Expected]:
    (folder / "images").mkdir(parents=True)
    rows, expected = {}, []
    for number in some_ids(rng, 3):
        image, question, answer = f"n{rng.randrange(10**6)}", some_text(rng), some_text(rng)
        rows[f"20{number}"] = {
            "question": question, "imageId": image, "answer": answer, "fullAnswer": "It is.", "isBalanced": True,
            "types": {"structural": "verify", "semantic": "rel", "detailed": "relVerify"},
        }  # fmt: skip
        expected.append({
            "id": f"20{number}", "picture": folder / "images" / f"{image}.jpg", "picture_id": f"{image}.jpg",
            "fields": {"question": question}, "answers": (answer,), "categories": {"structure": "verify"},
            "prompt": question + SHORT,
        })  # fmt: skip
    write(folder / "testdev_balanced_questions.json", rows)
    return expected


def _vsr(folder: Path, rng: Random, name: str) -> list[Expected]:
    (folder / "images").mkdir(parents=True)
    rows, expected = [], []
    for number, label in enumerate((0, 1, 1)):
        image, caption = f"{rng.randrange(10**9):012d}.jpg", some_text(rng)
        rows.append({"image": image, "image_link": "", "caption": caption, "label": label, "relation": "under"})
        expected.append({
            "id": str(number), "picture": folder / "images" / image, "answers": (("false", "true")[label],),
            "fields": {"caption": caption}, "categories": {"relation": "under"},
            "prompt": f'Is the following statement "{caption}" true or false?',
        })  # fmt: skip
    write(folder / name, rows)
    return expected


def vsr(folder: Path, rng: Random) -> list[Expected]:
    return _vsr(folder, rng, "data/splits/zeroshot/test.jsonl")


def vsr_random(folder: Path, rng: Random) -> list[Expected]:
    return _vsr(folder, rng, "splits/random/test.jsonl")


def vsr_all(folder: Path, rng: Random) -> list[Expected]:
    return _vsr(folder, rng, "all_vsr_validated_data.jsonl")


def textvqa(folder: Path, rng: Random, *, has_tokens: bool = True) -> list[Expected]:
    (folder / "train_images").mkdir(parents=True)
    rows, tokens, expected = [], [], []
    for number in some_ids(rng, 3):
        image, question, answers, read = (
            f"{number:016x}",
            some_text(rng),
            _ten(rng),
            some_texts(rng, rng.choice((0, 2))),
        )
        rows.append({
            "question_id": number, "image_id": image, "question": question, "answers": answers, "set_name": "val",
        })  # fmt: skip
        tokens.append({"image_id": image, "ocr_tokens": read, "ocr_info": []})
        reference = f"\nReference OCR token: {', '.join(read)}" if read and has_tokens else ""
        expected.append({
            "id": str(number), "picture": folder / "train_images" / f"{image}.jpg", "answers": tuple(answers),
            "fields": {"question": question, "reference": reference},
            "categories": {"OCR tokens": "given" if has_tokens else "not given"},
            "prompt": question + reference + SHORT,
        })  # fmt: skip
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_version": "0.5.1", "data": rows})
    if has_tokens:
        write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"dataset_name": "TextVQA", "data": tokens})
    return expected


def ocrvqa(folder: Path, rng: Random) -> list[Expected]:
    (folder / "images").mkdir(parents=True)
    covers, expected = {}, []
    for split, ending in ((1, "jpg"), (2, "png"), (3, "gif"), (2, "jpg")):
        key, questions, answers = f"{rng.randrange(10**9):010d}", some_texts(rng, 2), some_texts(rng, 2)
        covers[key] = {
            "imageURL": f"http://images.example/{key}x.{ending}", "questions": questions, "answers": answers,
            "title": "t", "authorName": "a", "genre": "Travel", "split": split,
        }  # fmt: skip
        for place in range(2) if split == 2 else ():
            expected.append({
                "id": f"{key}-{place}", "picture": folder / "images" / f"{key}.{ending}", "picture_id": key,
                "fields": {"question": questions[place]}, "answers": (answers[place],),
                "categories": {"genre": "Travel"}, "prompt": questions[place] + SHORT,
            })  # fmt: skip
    write(folder / "dataset.json", covers)
    return expected


def _documents(
    folder: Path, rng: Random, file: str, root: str, image: str, field: str, *, told: bool
) -> list[Expected]:
    (folder / root).mkdir(parents=True, exist_ok=True)
    rows, expected = [], []
    for number in some_ids(rng, 3):
        name, question, answers = image.format(number), some_text(rng), some_texts(rng, rng.randint(1, 3))
        row = {"questionId": number, "question": question, field: name, "docId": 1, "data_split": "val"}
        rows.append(row | {"answers": answers} if told else row)
        expected.append({
            "id": str(number), "picture": folder / root / name, "fields": {"question": question},
            "answers": tuple(answers) if told else (), "record": {"questionId": number}, "prompt": question + SHORT,
        })  # fmt: skip
    write(folder / file, {"dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": "val", "data": rows})
    return expected


def docvqa_val(folder: Path, rng: Random) -> list[Expected]:
    (folder / "documents").mkdir(parents=True)
    return _documents(folder, rng, "val_v1.0.json", "", "documents/x{}_1.png", "image", told=True)


def docvqa_test(folder: Path, rng: Random) -> list[Expected]:
    (folder / "test/documents").mkdir(parents=True)
    return _documents(folder, rng, "test/test_v1.0.json", "test", "documents/x{}_1.png", "image", told=False)


def infovqa_val(folder: Path, rng: Random) -> list[Expected]:
    file, root = "infographicsVQA_val_v1.0_withQT.json", "infographicsvqa_images"
    return _documents(folder, rng, file, root, "{}.jpeg", "image_local_name", told=True)


def infovqa_test(folder: Path, rng: Random) -> list[Expected]:
    file, root = "infographicsVQA_test_v1.0.json", "images"
    return _documents(folder, rng, file, root, "{}.jpeg", "image_local_name", told=False)


def chartqa(folder: Path, rng: Random) -> list[Expected]:
    root = folder / "ChartQA Dataset/test"
    (root / "png").mkdir(parents=True)
    expected = []
    for part in ("human", "augmented"):
        rows = [{"imgname": f"{n}.png", "query": some_text(rng), "label": f"{rng.random():.2f}"} for n in range(2)]
        write(root / f"test_{part}.json", rows)
        expected += [{
            "id": f"{part}-{n}", "picture": root / "png" / row["imgname"], "fields": {"question": row["query"]},
            "answers": (row["label"],), "categories": {"split": part}, "prompt": row["query"] + SHORT,
        } for n, row in enumerate(rows)]  # fmt: skip
    return expected


def _ureader(name: str, end: str) -> Callable[[Path, Random], list[Expected]]:
    def layout(folder: Path, rng: Random) -> list[Expected]:
        (folder / "ureader_images").mkdir(parents=True)
        rows, expected = [], []
        for number in range(3):
            image, question, answer = f"./DUE_Benchmark/{name}/pngs/{number}.png", some_text(rng), some_text(rng)
            told = [("user", "<image>"), ("user", question), ("assistant", answer)]
            turns = [{"from": who, "value": value} for who, value in told]
            rows.append({"image": [image], "prompt": "", "text": "", "conversations": turns, "task_type": "qa_sft"})
            expected.append({
                "id": str(number), "picture": folder / f"ureader_images/DUE_Benchmark/{name}/pngs/{number}.png",
                "fields": {"question": question}, "answers": (answer,), "prompt": question + end,
            })  # fmt: skip
        write(folder / f"ureader_json/test_{name}.jsonl", rows)
        return expected

    return layout


def scienceqa(folder: Path, rng: Random, *, is_all: bool = False) -> list[Expected]:
    (folder / "test").mkdir(parents=True)
    problems, expected, splits = {}, [], {"train": ["7777"], "val": [], "test": []}
    problems["7777"] = {"question": "q", "choices": ["a"], "answer": 0, "hint": "", "image": None, "split": "train"}
    for number, image in zip(some_ids(rng, 4), ("image.png", None, "image.png", None), strict=True):
        key, choices, answer = str(number), some_texts(rng, 3), rng.randrange(3)
        hint, question = rng.choice(("", some_text(rng))), some_text(rng)
        parts = {"subject": "natural science", "topic": "physics", "category": "Magnets", "grade": "grade7"}
        problems[key] = parts | {
            "question": question, "choices": choices, "answer": answer, "hint": hint, "image": image, "split": "test",
        }  # fmt: skip
        splits["test"].append(key)
        if image or is_all:
            expected.append({
                "id": key, "picture": folder / "test" / key / "image.png" if image else None,
                "fields": {"question": question, "hint": hint, "options": lettered(choices)},
                "answers": ("ABC"[answer],), "choices": tuple(choices), "categories": parts,
                "prompt": f"Context:\n{hint}\nQuestion:\n{question}\nChoices:\n{lettered(choices)}" + LETTER,
            })  # fmt: skip
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", splits)
    return expected


def scienceqa_all(folder: Path, rng: Random) -> list[Expected]:
    return scienceqa(folder, rng, is_all=True)


def _icons(folder: Path, rng: Random, kind: str) -> list[Expected]:
    root = folder / "iconqa_data"
    (root / "iconqa/test" / kind).mkdir(parents=True)
    problems, expected = {}, []
    for number, each in zip(some_ids(rng, 6), ("choose_img", "choose_txt", "fill_in_blank") * 2, strict=True):
        key, question, choices = str(number), some_text(rng), some_texts(rng, 4)
        row: dict[str, Any] = {"question": question, "ques_type": each, "grade": "grade1", "split": "test"}
        row |= {"answer": "12"} if each == "fill_in_blank" else {"answer": 2, "choices": choices}
        problems[key] = row
        if each == kind:
            has_options = kind == "choose_txt"
            expected.append({
                "id": key, "picture": root / f"iconqa/test/{kind}/{key}/image.png",
                "answers": ("C" if has_options else "12",), "choices": tuple(choices) if has_options else (),
                "fields": {"question": question, "options": lettered(choices) if has_options else ""},
                "prompt": question + (f"\n{lettered(choices)}{LETTER}" if has_options else SHORT),
            })  # fmt: skip
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", {"train": [], "val": [], "test": list(problems)})
    return expected


def iconqa(folder: Path, rng: Random) -> list[Expected]:
    return _icons(folder, rng, "choose_txt")


def iconqa_blank(folder: Path, rng: Random) -> list[Expected]:
    return _icons(folder, rng, "fill_in_blank")


def ai2d(folder: Path, rng: Random) -> list[Expected]:
    (folder / "ai2d/images").mkdir(parents=True)
    expected = []
    for name in (11, 42, 7):
        questions = {}
        for place in range(2):
            question, choices, right = f"{place}{some_text(rng)}", some_texts(rng, 4), rng.randrange(4)
            questions[question] = {
                "abcLabel": False, "answerTexts": choices, "correctAnswer": right, "questionId": f"{name}.png-{place}",
            }  # fmt: skip
            if name != 7:
                expected.append({
                    "id": f"{name}.png-{place}", "picture": folder / f"ai2d/images/{name}.png",
                    "picture_id": f"{name}.png", "answers": (choices[right],), "choices": tuple(choices),
                    "fields": {"question": question, "choices": "\n".join(choices)},
                    "prompt": question + "\n" + "\n".join(choices) + SHORT,
                })  # fmt: skip
        write(folder / f"ai2d/questions/{name}.png.json", {"imageName": f"{name}.png", "questions": questions})
    (folder / "ai2d_test_ids.csv").write_text("11\r\n42\r\n")
    return expected


def _table(folder: Path, rng: Random, file: str, *, told: bool, rotations: int = 2) -> list[Expected]:
    folder.mkdir(parents=True, exist_ok=True)
    rows, expected = [], []
    for index in sorted(rng.sample(range(10**6), 2)):
        content, question, hint = picture(rng), f'{some_text(rng)}\nline\t"two"', rng.choice(("", some_text(rng)))
        choices, right = some_texts(rng, 3), rng.randrange(3)
        for rotation in range(rotations):
            turned, answer = choices[rotation:] + choices[:rotation], "ABC"[(right - rotation) % 3]
            row = {"index": index + rotation * 10**6, "question": question, "hint": hint}
            row |= (
                dict(zip("ABCD", [*turned, ""], strict=True)) | {"answer": answer}
                if told
                else dict(zip("ABCD", [*turned, ""], strict=True))
            )
            row |= {"category": "ocr", "l2-category": "finegrained"}
            rows.append(row | {"image": base64.b64encode(content).decode() if rotation == 0 else str(index)})
            asked = f"{hint}\n{question}" if hint else question
            expected.append({
                "id": str(row["index"]), "picture": content, "group": str(index), "choices": tuple(turned),
                "answers": (answer,) if told else (), "categories": {"category": "ocr", "l2-category": "finegrained"},
                "fields": {"question": question, "hint": f"{hint}\n" if hint else "", "options": lettered(turned)},
                "prompt": f"{asked}\nThere are several options: {lettered(turned)}",
            })  # fmt: skip
    with (folder / file).open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return expected


def mmbench_dev(folder: Path, rng: Random) -> list[Expected]:
    return _table(folder, rng, "mmbench_dev_20230712.tsv", told=True)


def mmbench_test(folder: Path, rng: Random) -> list[Expected]:
    return _table(folder, rng, "MMBench_TEST_EN.tsv", told=False)


def mmbench_dev_cn(folder: Path, rng: Random) -> list[Expected]:
    return _table(folder, rng, "mmbench_dev_cn_20231003.tsv", told=True)


def mmbench_test_cn(folder: Path, rng: Random) -> list[Expected]:
    return _table(folder, rng, "mmbench_test_cn_20231003.tsv", told=False)


def ccbench(folder: Path, rng: Random) -> list[Expected]:
    return _table(folder, rng, "CCBench.tsv", told=True, rotations=1)


def seed(folder: Path, rng: Random) -> list[Expected]:
    (folder / "SEED-Bench-image").mkdir(parents=True)
    rows, expected = [], []
    for number, medium in enumerate(("image", "video", "image")):
        choices, question, image = some_texts(rng, 4), some_text(rng), f"{rng.randrange(10**6)}_{number}"
        options = {f"choice_{letter}": choice for letter, choice in zip("abcd", choices, strict=True)}
        rows.append(options | {
            "question_id": str(number), "question": question, "answer": "B", "data_id": image, "data_type": medium,
            "question_type_id": 2,
        })  # fmt: skip
        if medium == "image":
            expected.append({
                "id": str(number), "picture": folder / "SEED-Bench-image" / image, "answers": ("B",),
                "choices": tuple(choices), "fields": {"question": question, "options": lettered(choices)},
                "categories": {"question type": "Instance Identity"},
                "prompt": f"{question}\n{lettered(choices)}{LETTER}",
            })  # fmt: skip
    write(folder / "SEED-Bench.json", {"question_type": {"Scene": 1, "Instance Identity": 2}, "questions": rows})
    return expected


def q_bench(folder: Path, rng: Random) -> list[Expected]:
    (folder / "images_llvisionqa").mkdir(parents=True)
    rows, expected = [], []
    for number in range(3):
        choices, question, right = some_texts(rng, 3), some_text(rng), rng.randrange(3)
        rows.append({
            "img_path": f"{number}.JPG", "question": question, "candidates": choices, "correct_ans": choices[right],
            "type": 1, "concern": 0,
        })  # fmt: skip
        expected.append({
            "id": str(number), "picture": folder / f"images_llvisionqa/{number}.JPG", "answers": ("ABC"[right],),
            "choices": tuple(choices), "categories": {"type": "1", "concern": "0"},
            "fields": {"question": question, "options": lettered(choices)},
            "prompt": f"Question:\n{question}\nChoices:\n{lettered(choices)}",
        })  # fmt: skip
    write(folder / "llvisionqa_dev.json", rows)
    return expected


def mmvp(folder: Path, rng: Random) -> list[Expected]:
    (folder / "MMVP Images").mkdir(parents=True)
    lines, expected = [["Index", "Question", "Options", "Correct Answer"]], []
    for index in range(1, 5):
        question, choices, right = some_text(rng), some_texts(rng, 2), rng.randrange(2)
        told = f"(a) {choices[0]} (b) {choices[1]}"
        lines.append([str(index), question, told, "(a)" if right == 0 else "(b)"])
        expected.append({
            "id": str(index), "picture": folder / f"MMVP Images/{index}.jpg", "answers": ("AB"[right],),
            "choices": tuple(choices), "group": str((index + 1) // 2),
            "fields": {"question": question, "in_brackets": told, "options": lettered(choices)},
            "prompt": f"{question}\n{lettered(choices)}{LETTER}",
        })  # fmt: skip
    with (folder / "Questions.csv").open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows(lines)
    return expected


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def mmmu(folder: Path, rng: Random) -> list[Expected]:
    rows, expected = [], []
    for number in range(3):
        content, choices, question = [picture(rng), picture(rng)], some_texts(rng, 4), some_text(rng)
        is_open, has_two = number == 1, number == 2
        answer = "['1.5', 'one and a half']" if is_open else "C"
        rows.append({
            "id": f"validation_Art_{number}", "question": f"<image 1> {question}", "answer": answer,
            "options": "[]" if is_open else str(choices), "explanation": "",
            "image_1": {"bytes": content[0], "path": "a.png"},
            "image_2": {"bytes": content[1], "path": "b.png"} if has_two else None,
            "img_type": "['Painting']", "topic_difficulty": "Easy", "subfield": "x",
            "question_type": "open" if is_open else "multiple-choice",
        })  # fmt: skip
        listed = "" if is_open else f"Choices:\n{lettered(choices)}"
        expected.append({
            "id": f"validation_Art_{number}", "picture": content[0],
            "answers": ("1.5", "one and a half") if is_open else ("C",), "choices": () if is_open else tuple(choices),
            "categories": {
                "subject": "Art", "kind": rows[-1]["question_type"], "pictures": "several" if has_two else "one",
            },
            "prompt": f"Question:\n{question}\n{listed}" + (SHORT.lstrip("\n") if is_open else LETTER),
        })  # fmt: skip
    _parquet(folder / "Art/validation-00000-of-00001.parquet", rows)
    return expected


def cmmmu(folder: Path, rng: Random) -> list[Expected]:
    rows, expected = [], []
    for number, (kind, answer) in enumerate((("选择", "B"), ("判断", "对"), ("填空", "七"))):
        content, choices, question = picture(rng), some_texts(rng, 4), some_text(rng)
        options = choices if kind == "选择" else [""] * 4
        rows.append({
            "id": number, "type": kind, "question": f'<img="1.png"> {question}', "answer": answer,
            **{f"option{place}": option for place, option in enumerate(options, 1)},
            "image_1": {"bytes": content, "path": "1.png"}, "image_2": None,
        })  # fmt: skip
        begin = {"选择": "请回答以下多项选择题，", "判断": "请回答以下判断题，", "填空": "请回答以下填空题，"}[kind]
        begin = next(text for text in CMMMU_TASKS.values() if text.startswith(begin))
        lines = "".join(f"({letter}) {choice}\n" for letter, choice in zip("ABCD", choices, strict=True))
        listed = f"选项：\n{lines}\n" if kind == "选择" else ""
        expected.append({
            "id": str(number), "picture": content, "answers": (answer,),
            "choices": tuple(choices) if kind == "选择" else (),
            "categories": {"subject": "art", "kind": kind, "pictures": "one"},
            "prompt": f"{begin}\n\n问题：{question}\n{listed}正确答案：\n",
        })  # fmt: skip
    _parquet(folder / "art/val-00000-of-00001.parquet", rows)
    return expected


def _pope(*splits: str) -> Callable[[Path, Random], list[Expected]]:
    def layout(folder: Path, rng: Random) -> list[Expected]:
        (folder / "val2014").mkdir(parents=True)
        expected = []
        for split in splits:
            rows = [
                {
                    "question_id": n,
                    "image": f"COCO_val2014_{n}.jpg",
                    "text": some_text(rng),
                    "label": ("no", "yes")[n % 2],
                }
                for n in range(1, 4)
            ]
            path = folder / f"coco_pope_{split}.json"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            expected += [{
                "id": f"{split}-{row['question_id']}", "picture": folder / "val2014" / str(row["image"]),
                "fields": {"question": row["text"]}, "answers": (row["label"],), "categories": {"split": split},
                "prompt": f"{row['text']}{SHORT}",
            } for row in rows]  # fmt: skip
        return expected

    return layout


def mme(folder: Path, rng: Random) -> list[Expected]:
    expected = []
    for task in (*PERCEPTION, *COGNITION):
        place = folder / "MME_Benchmark_release_version" / task
        is_split = task in ("artwork", "celebrity", "landmark", "posters", "scene")
        images, texts = (place / "images", place / "questions_answers_YN") if is_split else (place, place)
        for each in (images, texts):
            each.mkdir(parents=True, exist_ok=True)
        for name, ending in (("0001", ".png"), ("b 2", ".jpg")):
            (images / f"{name}{ending}").touch()
            questions = [f"{some_text(rng)} Please answer yes or no." for _ in range(2)]
            (texts / f"{name}.txt").write_bytes(f"{questions[0]}\tYes\r\n{questions[1]}\tNo\r\n".encode())
            expected += [{
                "id": f"{task}/{name}{ending}/{number}", "picture": images / f"{name}{ending}",
                "fields": {"question": question}, "answers": (answer,), "categories": {"task": task},
                "group": f"{task}/{name}{ending}", "prompt": question + SHORT,
            } for number, question, answer in zip((1, 2), questions, ("Yes", "No"), strict=True)]  # fmt: skip
    return expected


def hallusionbench(folder: Path, rng: Random) -> list[Expected]:
    (folder / "hallusion_bench").mkdir(parents=True)
    rows, expected = [], []
    for seen, figure, name in (("0", "0", None), ("1", "1", "VS/chart/0_1.png"), ("2", "2", "VS/chart/0_2.png")):
        question = some_text(rng)
        parts = {
            "category": "VS", "subcategory": "chart", "set_id": "0", "figure_id": figure, "question_id": "3",
            "visual_input": seen,
        }  # fmt: skip
        file = name and rng.choice(("./", "./hallusion_bench/", "hallusion_bench/")) + name  # versions differ
        rows.append(parts | {"question": question, "gt_answer": "1", "gt_answer_details": "", "filename": file})
        expected.append({
            "id": f"VS/chart/0/{figure}/3", "answers": ("yes",), "record": parts,
            "picture": folder / "hallusion_bench" / name if name else None, "fields": {"question": question},
            "categories": {"category": "VS", "subcategory": "chart", "difficulty": "easy" if figure == "0" else "hard"},
            "prompt": question + SHORT, "group": "VS/chart/0",
        })  # fmt: skip
    write(folder / "HallusionBench.json", rows)
    return expected


def mathvista(folder: Path, rng: Random) -> list[Expected]:
    (folder / "images").mkdir(parents=True)
    rows, expected = {}, []
    for number in range(1, 3):
        choices, query = (some_texts(rng, 3), None)[number - 1], some_text(rng)
        kept = {"question_type": "multi_choice", "answer_type": "text", "precision": None}
        if not choices:
            kept = {"question_type": "free_form", "answer_type": "float", "precision": 1.0}
        answer = choices[1] if choices else "1.2"
        rows[str(number)] = kept | {
            "question": "q", "image": f"images/{number}.jpg", "choices": choices, "unit": None, "answer": answer,
            "pid": str(number), "query": query, "metadata": {"task": "math word problem", "context": "table"},
        }  # fmt: skip
        expected.append({
            "id": str(number), "picture": folder / f"images/{number}.jpg", "answers": (answer,),
            "choices": tuple(choices or ()), "record": kept | {"unit": None},
            "categories": {"task": "math word problem", "context": "table"}, "prompt": query,
        })  # fmt: skip
    write(folder / "testmini.json", rows)
    return expected


def mathverse(folder: Path, rng: Random) -> list[Expected]:
    (folder / "images").mkdir(parents=True)
    rows, expected = [], []
    for number, kind in enumerate(("multi-choice", "free-form"), 1):
        query, image = some_text(rng), f"images_version_1-4/image_{number}.png"
        rows.append({
            "sample_index": str(number), "problem_index": "1", "problem_version": "Text Lite", "question": "",
            "image": image, "answer": "B", "question_type": kind, "query_wo": query, "query_cot": "c",
            "question_for_eval": "Find x.\nChoices:\nA:40°\nB:60.5°", "metadata": {"subject": "Plane Geometry"},
        })  # fmt: skip
        expected.append({
            "id": str(number), "picture": folder / "images" / image, "answers": ("B",),
            "choices": ("40°", "60.5°") if kind == "multi-choice" else (),
            "categories": {"version": "Text Lite", "subject": "Plane Geometry"}, "prompt": query,
        })  # fmt: skip
    write(folder / "testmini.json", rows)
    return expected


def llava_bench(folder: Path, rng: Random) -> list[Expected]:
    (folder / "images").mkdir(parents=True)
    questions, answers, expected = [], [], []
    rule = {"role": "Assistant", "prompt": "Rate."}
    for number in range(2):
        text, answer = some_text(rng), some_text(rng)
        questions.append({"question_id": number, "image": "001.jpg", "text": text, "category": "conv"})
        answers.append({"question_id": number, "text": answer, "answer_id": "x", "model_id": "gpt4"})
        expected.append({
            "id": str(number), "picture": folder / "images/001.jpg", "fields": {"question": text}, "answers": (answer,),
            "categories": {"category": "conv"}, "record": {"caption": "A hill.", "rule": rule, "question": text},
            "prompt": text,
        })  # fmt: skip
    write(folder / "questions.jsonl", questions)
    write(folder / "answers_gpt4.jsonl", answers)
    write(folder / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A hill."}])
    write(folder / "rule.json", {"coding": {"role": "Assistant", "prompt": "?"}, "llava_bench_conv": rule})
    return expected


def mm_vet(folder: Path, rng: Random) -> list[Expected]:
    (folder / "images").mkdir(parents=True)
    rows, expected = {}, []
    for number in range(2):
        question = some_text(rng)
        rows[f"v1_{number}"] = {
            "imagename": f"v1_{number}.png", "question": question, "answer": "-1 <AND> -5", "imagesource": "u",
            "capability": ["ocr", "math"][: number + 1],
        }  # fmt: skip
        expected.append({
            "id": f"v1_{number}", "picture": folder / f"images/v1_{number}.png", "fields": {"question": question},
            "answers": ("-1 <AND> -5",), "categories": {"capability": ("ocr", "ocr,math")[number]}, "prompt": question,
        })  # fmt: skip
    write(folder / "mm-vet.json", rows)
    return expected


CAPTION = "Provide a one-sentence caption for the provided image."


def flickr30k(folder: Path, rng: Random) -> list[Expected]:
    (folder / "flickr30k-images").mkdir(parents=True)
    rows, expected = [], []
    for number, split in enumerate(("train", "test", "test")):
        told = some_texts(rng, 5)
        rows.append({
            "filename": f"{number}.jpg", "split": split, "imgid": number,
            "sentences": [{"raw": text, "tokens": text.split(), "sentid": n} for n, text in enumerate(told)],
        })  # fmt: skip
        if split == "test":
            expected.append({
                "id": f"{number}.jpg", "picture": folder / f"flickr30k-images/{number}.jpg", "answers": tuple(told),
                "prompt": CAPTION,
            })  # fmt: skip
    write(folder / "dataset_flickr30k.json", {"images": rows, "dataset": "flickr30k"})
    return expected


def nocaps(folder: Path, rng: Random) -> list[Expected]:
    (folder / "validation").mkdir(parents=True)
    images, annotations, expected = [], [], []
    for number, domain in zip(some_ids(rng, 2), ("in-domain", "out-domain"), strict=True):
        told = some_texts(rng, 3)
        images.append({"id": number, "file_name": f"{number:016x}.jpg", "domain": domain, "width": 4, "height": 4})
        annotations += [{"image_id": number, "id": n, "caption": text} for n, text in enumerate(told)]
        expected.append({
            "id": str(number), "picture": folder / f"validation/{number:016x}.jpg", "answers": tuple(told),
            "categories": {"domain": domain}, "record": {"image_id": number}, "prompt": CAPTION,
        })  # fmt: skip
    write(
        folder / "nocaps_val_4500_captions.json", {"licenses": [], "images": images, "annotations": annotations[::-1]}
    )
    for each in expected:
        each["answers"] = each["answers"][::-1]
    return expected


def imagenet(folder: Path, rng: Random) -> list[Expected]:
    expected = []
    for synset, name in (("n01440764", "tench"), ("n01443537", "goldfish")):
        place = folder / "val" / synset
        place.mkdir(parents=True)
        image = f"ILSVRC2012_val_{rng.randrange(10**7):08d}"
        (place / f"{image}.JPEG").touch()
        expected.append({
            "id": image, "picture": place / f"{image}.JPEG", "answers": (f"This is a {name}", name),
            "categories": {"class": name}, "record": {"synset": synset}, "prompt": "Classify the image.",
            "choices": tuple(image_net_names().values()),
        })  # fmt: skip
    return expected


def classes(folder: Path, rng: Random) -> list[Expected]:
    expected = []
    for place, name in (("ankle_boot", "ankle boot"), ("bag", "bag")):
        (folder / place / "more").mkdir(parents=True)
        for path in (f"{place}/more/{some_ids(rng, 1)[0]}.png", f"{place}/x.JPG"):
            (folder / path).touch()
            expected.append({
                "id": path, "picture": folder / path, "answers": (f"This is a {name}", name),
                "categories": {"class": name}, "choices": ("ankle boot", "bag"), "prompt": "Classify the image.",
            })  # fmt: skip
    return expected


def _refer(split: str, file: str) -> Callable[[Path, Random], list[Expected]]:
    def layout(folder: Path, rng: Random) -> list[Expected]:
        (folder / "train2014").mkdir(parents=True)
        references, images, annotations, expected = [], [], [], []
        for number, part in enumerate((split, "train", split)):
            image, annotation, said = *some_ids(rng, 2), some_texts(rng, 2)
            name, box = f"COCO_train2014_{image:012d}.jpg", [rng.randrange(50) / 4 for _ in range(2)] + [7.25, 3.5]
            sentences = [
                {"sent": text, "raw": text, "tokens": [], "sent_id": 2 * number + n} for n, text in enumerate(said)
            ]
            references.append({
                "ref_id": number, "ann_id": annotation, "image_id": image, "category_id": 1, "split": part,
                "file_name": f"x_{annotation}.jpg", "sent_ids": [0, 1], "sentences": sentences,
            })  # fmt: skip
            images.append({"id": image, "file_name": name, "width": 60, "height": 60})
            annotations.append({"id": annotation, "image_id": image, "category_id": 1, "bbox": box, "area": 1.0})
            expected += [{
                "id": str(each["sent_id"]), "picture": folder / "train2014" / name, "picture_id": str(image),
                "fields": {"phrase": each["sent"]}, "box": (box[0], box[1], box[0] + 7.25, box[1] + 3.5),
                "prompt": "Please provide the bounding box coordinate of the region this sentence describes: "
                f"{each['sent']}.",
            } for each in sentences if part == split]  # fmt: skip
        (folder / file).write_bytes(pickle.dumps(references, protocol=rng.choice((0, 2, 4))))
        write(folder / "instances.json", {"images": images, "annotations": annotations, "categories": []})
        return expected

    return layout


def _screens(device: str) -> Callable[[Path, Random], list[Expected]]:
    def layout(folder: Path, rng: Random) -> list[Expected]:
        (folder / "screenspot_imgs").mkdir(parents=True)
        rows, expected = [], []
        for number in range(2):
            told = some_text(rng)
            rows.append({
                "img_filename": f"{number}.png", "bbox": [10, 20, 30, 5], "instruction": told, "data_type": "icon",
                "data_source": "ios",
            })  # fmt: skip
            expected.append({
                "id": f"{device}-{number}", "picture": folder / f"screenspot_imgs/{number}.png",
                "fields": {"phrase": told}, "box": (10.0, 20.0, 40.0, 25.0),
                "categories": {"kind": "icon", "source": "ios"},
                "prompt": f"Please provide the bounding box coordinate of the region this sentence describes: {told}.",
            })  # fmt: skip
        write(folder / f"screenspot_{device}.json", rows)
        return expected

    return layout


def _frames(place: Path, count: int) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (place / f"{number:05d}.jpg").touch()
    return place / f"{count // 2:05d}.jpg"


def video_bench(folder: Path, rng: Random) -> list[Expected]:
    expected, apart = [], {}
    for place, part in enumerate(PARTS_OF_VIDEO_BENCH):
        choices, question, name = some_texts(rng, 2 + place % 5), some_text(rng), f"Eval_video/{part}/v{place}"
        row: dict[str, Any] = {
            "vid_path": name, "video_id": f"v{place}", "question": question,
            "choices": {letter: f" {choice}" for letter, choice in zip("ABCDEF", choices, strict=False)},
        }  # fmt: skip
        if place % 2:
            row["answer"] = "B"
        else:
            apart[part] = {f"q{place}": {"answer": "B"}}
        write(folder / f"Eval_QA/{part}_QA_new.json", {f"q{place}": row})
        expected.append({
            "id": f"{part}/q{place}", "picture": _frames(folder / name, rng.randint(1, 9)), "answers": ("B",),
            "choices": tuple(choices), "categories": {"part": part},
            "prompt": f"{question}\n{lettered(choices)}{LETTER}",
        })  # fmt: skip
    write(folder / "ANSWER.json", apart)
    return expected


def mvbench(folder: Path, rng: Random) -> list[Expected]:
    expected = []
    for task, place in PLACES_OF_MVBENCH.items():
        choices, question = some_texts(rng, 4), some_text(rng)
        middle = _frames(folder / "video" / place / f"{task}.mp4", 30)
        row: dict[str, Any] = {
            "video": f"{task}.mp4",
            "question": question,
            "candidates": choices,
            "answer": choices[3],
        }
        if task == "episodic_reasoning":
            row |= {"start": 2.0, "end": 4.0, "fps": 3}
            middle = middle.with_name("00009.jpg")
        write(folder / f"json/{task}.json", [row])
        expected.append({
            "id": f"{task}/0", "picture": middle, "answers": ("D",), "choices": tuple(choices),
            "categories": {"task": task}, "prompt": f"{question}\n{lettered(choices)}{LETTER}",
        })  # fmt: skip
    return expected


LAYOUTS: dict[str, Callable[[Path, Random], list[Expected]]] = {
    **{layout.__name__: layout for layout in (
        vqav2_val, vqav2_testdev, okvqa, vizwiz_val, vizwiz_test, gqa, vsr, vsr_random, vsr_all, textvqa, ocrvqa,
        docvqa_val, docvqa_test, infovqa_val, infovqa_test, chartqa, scienceqa, scienceqa_all, iconqa, iconqa_blank,
        ai2d, mmbench_dev, mmbench_test, mmbench_dev_cn, mmbench_test_cn, ccbench, seed, q_bench, mmvp, mmmu, cmmmu,
        mme,
        hallusionbench, mathvista, mathverse, llava_bench, mm_vet, flickr30k, nocaps, imagenet, classes, video_bench,
        mvbench,
    )},
    "deepform": _ureader("DeepForm", ""), "klc": _ureader("KleisterCharity", ""),
    "wtq": _ureader("WikiTableQuestions", SHORT), "tabfact": _ureader("TabFact", SHORT),
    "visualmrc": _ureader("VisualMRC", ""),
    "pope": _pope("random", "popular", "adversarial"),
    **{f"pope_{split}": _pope(split) for split in ("random", "popular", "adversarial")},
    **{f"{family}_{split}": _refer(split, "refs(unc).p")
       for family in ("refcoco", "refcoco+") for split in ("val", "testA", "testB")},
    **{f"refcocog_{split}": _refer(split, "refs(umd).p") for split in ("val", "test")},
    **{f"screenspot_{device}": _screens(device) for device in ("mobile", "desktop", "web")},
}  # fmt: skip
