"""Make the data of the picture-talker from the pip package easy-vqa: shapes of one colour, and questions about them.

    examples/vqa_data.py [FOLDER]

Writes into FOLDER (data/vqa): conversations/ (of each training picture one dialog of all questions about it),
tokenizer.model (trained on the questions), efficientnet_lite0.pth (real ImageNet weights), and test/: the test
pictures, and questions.jsonl with what is asked about them. Does nothing where that is all there.
"""

import argparse
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from demo_data import imagenet_weights

from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.prepare import tasks
from megatron_sphinx.prepare.conversations import index_conversations
from megatron_sphinx.prepare.tasks import ConversationJson
from megatron_sphinx.prepare.template import parse

VOCABULARY = 512
ABSENT = 3  # questions about what is not in a picture, for each about what is
# shares of the training questions that are asked without the prompt for a short answer, as people ask
PLAIN_FIRST, PLAIN = 0.25, 0.9


def package_data() -> Path:
    """Return the folder of easy-vqa's pictures and questions: train/ and test/."""
    import easy_vqa

    return Path(easy_vqa.__file__).parent / "data"


def records(part: Path) -> Iterator[list[dict[str, str]]]:
    """Yield the records of all questions about a picture, picture by picture.

    Args:
        part: train/ or test/ of the package.

    Returns:
        Lists of {image, question, answer}, as `prepare tasks vqa` takes them; images are relative to images/ of the
        part.
    """
    asked: dict[int, list[dict[str, str]]] = {}
    for question, answer, number in json.loads((part / "questions.json").read_text()):
        record = {"image": f"{number}.png", "question": question, "answer": answer}
        asked.setdefault(number, []).append(record)
    yield from (asked[number] for number in sorted(asked))


def is_present(record: Mapping[str, str]) -> bool:
    """Whether what a yes-or-no question asks about is in the picture."""
    return (record["answer"] == "yes") != bool({"not", "no"} & set(record["question"].split()))


def dialog(questions: Sequence[dict[str, str]], rng: np.random.Generator) -> ConversationJson:
    """Make one conversation about a picture, in random order, for any question may come first in a test.

    Most yes-or-no questions ask about what is not there, so that a model would learn to say that for long; of those
    only as many are taken as ABSENT says. The prompt for a short answer stands behind the first question, and behind
    some of the others.
    """
    groups: dict[bool | None, list[dict[str, str]]] = {None: [], True: [], False: []}
    for number in rng.permutation(len(questions)):
        record = questions[number]
        groups[is_present(record) if record["answer"] in ("yes", "no") else None].append(record)
    taken = groups[None] + groups[True] + groups[False][: ABSENT * max(1, len(groups[True]))]
    turns = [tasks.vqa(taken[number], "centre") for number in rng.permutation(len(taken))]
    (whole,) = tasks.merge(turns, len(turns))
    for number, asked in enumerate(whole["conversations"][::2]):
        if rng.random() < (PLAIN if number else PLAIN_FIRST):
            asked["value"] = asked["value"].partition("\n")[0]
    return whole


def train_tokenizer(dialogs: Sequence[ConversationJson], vocabulary: int = VOCABULARY) -> bytes:
    """Train a sentencepiece model whose pieces are the words of the dialogs; bytes stand for all others."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(parse(each).text()[0] for each in dialogs[:500]),
        model_writer=model,
        vocab_size=vocabulary,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",  # the stop string begins with a line's end
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    return model.getvalue()


def write_test(part: Path, target: Path, pictures: int | None) -> int:
    """Copy the test pictures, and write questions.jsonl beside them: {image, question, answer}; count the questions."""
    asked = [record for of_picture in islice(records(part), pictures) for record in of_picture]
    (target / "images").mkdir(parents=True, exist_ok=True)
    for name in {record["image"] for record in asked}:
        shutil.copyfile(part / "images" / name, target / "images" / name)
    (target / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    return len(asked)


def main() -> int:
    """Make the data; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/vqa"))
    parser.add_argument("--package", type=Path, help="folder of train/ and test/; without it, that of easy-vqa")
    parser.add_argument("--pictures", type=int, help="how many of each part to take; without it, all")
    args = parser.parse_args()
    folder, source = args.folder, args.package or package_data()
    done = folder / "prepared.txt"
    if done.is_file():
        print(f"{folder}: {done.read_text()}", end="")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(imagenet_weights(), folder / "efficientnet_lite0.pth")
    rng = np.random.default_rng(1)
    dialogs = [dialog(of_picture, rng) for of_picture in islice(records(source / "train"), args.pictures)]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(dialogs))
    with tempfile.TemporaryDirectory() as name:
        asked = Path(name) / "dialogs.json"
        asked.write_text(json.dumps(dialogs))
        tokenizer = Tokenizer(folder / "tokenizer.model")
        made = index_conversations([asked], folder / "conversations", tokenizer, images=source / "train" / "images")
    questions = write_test(source / "test", folder / "test", args.pictures)
    done.write_text(f"{made.taken} dialogs, {questions} questions held out\n")
    print(f"{folder}: {done.read_text()}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
