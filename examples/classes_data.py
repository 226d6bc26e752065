"""Make the data of recognition as text from Fashion-MNIST, which a Debian package carries: ten kinds of clothes.

    examples/classes_data.py [FOLDER]

Writes into FOLDER (data/classes): train/ and test/classes/ (a folder of pictures for each class), conversations/ (the
training pictures, asked for their class), tokenizer.model (trained on what is asked and answered), and
efficientnet_lite0.pth (real ImageNet weights). Does nothing where that is all there. Needs apt-get and dpkg-deb, and
31 MB of downloads; needs no root, and touches nothing of the system.
"""

import argparse
import gzip
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from debian_data import unpack
from demo_data import imagenet_weights
from PIL import Image
from vqa_data import train_tokenizer

from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.prepare import tasks
from megatron_sphinx.prepare.classes import read_classes
from megatron_sphinx.prepare.conversations import index_conversations

PACKAGE = "dataset-fashion-mnist"
FILES = "usr/share/datasets/fashion-mnist"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
SIDE = 28  # pixels of a picture
TRAIN, TEST = 7500, 1000
VOCABULARY = 384  # 256 bytes, and the words of the conversations


def clothes(folder: Path, part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first pictures of Fashion-MNIST and the numbers of their classes.

    Args:
        folder: where the package is unpacked.
        part: `train`, which has 60,000 pictures, or `t10k`, which has 10,000.
        count: how many to return.

    Returns:
        Pictures, uint8 [count, 28, 28], light on black; and numbers of CLASSES, uint8 [count].

    Source: the form of files that yann.lecun.com/exdb/mnist describes: 16 bytes, then pixels; 8 bytes, then labels.
    """
    place = folder / FILES
    pixels = gzip.decompress((place / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((place / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    pictures = np.frombuffer(pixels, np.uint8).reshape(-1, SIDE, SIDE)
    return pictures[:count], np.frombuffer(labels, np.uint8)[:count]


def jpeg(picture: np.ndarray) -> bytes:
    """Return the file of a picture, dark on white as shops show their goods.

    Args:
        picture: uint8 [28, 28], light on black.
    """
    content = io.BytesIO()
    Image.fromarray(255 - picture).save(content, "jpeg", quality=95)
    return content.getvalue()


def write_classes(pictures: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write pictures into a folder for each class.

    Args:
        pictures: uint8 [count, 28, 28].
        labels: numbers of CLASSES, [count].
        folder: that the folders of classes are made in.
    """
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        (folder / CLASSES[label] / f"{number:05d}.jpg").write_bytes(jpeg(picture))


def write(package: Path, folder: Path, train: int, test: int) -> str:
    """Write everything into a folder; return one line that says what was made."""
    write_classes(*clothes(package, "train", train), folder / "train")
    write_classes(*clothes(package, "t10k", test), folder / "test" / "classes")
    torch.save(imagenet_weights(), folder / "efficientnet_lite0.pth")
    records = [{"image": one.path, "class": one.name} for one in read_classes(folder / "train")]
    dialogs = [tasks.classify(record, "centre") for record in records]
    (folder / "dialogs.json").write_text(json.dumps(dialogs))
    (folder / "tokenizer.model").write_bytes(train_tokenizer(dialogs[:: max(1, len(dialogs) // 500)], VOCABULARY))
    tokenizer = Tokenizer(folder / "tokenizer.model")
    made = index_conversations([folder / "dialogs.json"], folder / "conversations", tokenizer, images=folder / "train")
    return f"{made.taken} pictures of {len(CLASSES)} classes to train on, {test} held out"


def main() -> int:
    """Make the data; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/classes"))
    parser.add_argument("--package", type=Path, help="where the package is unpacked; without it, it is downloaded")
    parser.add_argument("--train", type=int, default=TRAIN, help="pictures to train on")
    parser.add_argument("--test", type=int, default=TEST, help="pictures to test on")
    args = parser.parse_args()
    done = args.folder / "prepared.txt"
    if not done.is_file():
        try:
            with tempfile.TemporaryDirectory() as name:
                if args.package is None:
                    unpack((PACKAGE,), Path(name))
                made = write(args.package or Path(name), args.folder, args.train, args.test)
        except SphinxError as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return error.exit_status
        done.write_text(made + "\n")
    print(f"{args.folder}: {done.read_text()}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
