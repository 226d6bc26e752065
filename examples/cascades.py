"""Make the pictures of docs/cascades.md: a photograph of coffee is segmented, inpainted and densely captioned.

    python examples/cascades.py runs/cascades --plot docs/cascades.png
    python examples/cascades.py runs/cascades --model runs/sphinx

The photograph comes with scikit-image. Without --model the answers are a script: boxes and captions that a person
wrote for this photograph, in the form in which SPHINX answers. The demo's models have seen digits and shapes only, so
they find no spoon. What is computed from the answers is not scripted, and every result names who answered.
"""

import argparse
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from megatron_sphinx.__main__ import main as megatron_sphinx
from megatron_sphinx.prepare.boxes import format_box
from megatron_sphinx.prepare.tasks import PROMPTS

PHOTOGRAPH, PASSED = "coffee.png", "motorcycle_left.png"
SIZE = (450, 300)  # of the photograph, made smaller
BOXES = {"cup": (130, 13, 308, 232), "saucer": (57, 50, 361, 292), "spoon": (236, 48, 319, 246)}  # in pixels of it
TAKEN_OUT = "spoon"
CAPTIONS = {
    "cup": ("a white cup of coffee", "A cup of espresso.", "A cup with a red outside and a white rim holds espresso."),
    "saucer": ("a red saucer under the cup", "A red saucer.", "A glossy red saucer on a table, with a cup upon it."),
    "spoon": ("a spoon beside the cup", "A metal spoon.", "A shiny metal spoon leans at a cup, its bowl downward."),
}
QUESTION = "What does the camera pass?"
FRAMES, STEP, FRAME = 12, 40, (300, 300)  # of a film: its frames, how far each moves on, their size, in pixels
PART, LABEL = (300, 200), 18  # size of each part of the plot, and of the label under it, in pixels
COLOURS = 96  # of the plot, which makes its file small


def script() -> dict[str, str | list[str]]:
    """Return prompts and answers about the photograph, boxes as fractions of its square."""
    boxes = {name: format_box(box, *SIZE, "centre") for name, box in BOXES.items()}
    captions = [captions[1] for captions in CAPTIONS.values()]
    return {
        PROMPTS["caption"]: ["A cup of coffee on a wooden table.", *captions],
        PROMPTS["detailed_caption"]: [captions[2] for captions in CAPTIONS.values()],
        PROMPTS["detect"]: " ".join(f"{name}{box}" for name, box in boxes.items()),
        **{PROMPTS["locate"].format(phrase=f"the {name}"): box for name, box in boxes.items()},
        **{PROMPTS["describe"].format(box=box): CAPTIONS[name][0] for name, box in boxes.items()},
        QUESTION: "It passes a red motorcycle.",
    }


def run_all(folder: Path, answerer: list[str]) -> None:
    """Run every cascade on the photograph; the results go to folders of their names.

    Args:
        folder: for all results.
        answerer: the option that says who is asked.
    """
    photograph = ["--picture", str(folder / PHOTOGRAPH), *answerer]
    for words in (
        ["segment", *photograph],
        ["inpaint", *photograph, "--expression", f"the {TAKEN_OUT}"],
        ["describe", *photograph],
        ["video", "--video", str(folder / "film"), "--frames", "4", "--question", QUESTION, *answerer],
    ):
        status = megatron_sphinx(["cascade", *words, "--output", str(folder / words[0])])
        if status:
            sys.exit(status)


def write_sources(folder: Path) -> None:
    """Write the photograph, and a film as a folder of frames: a camera that moves along another photograph."""
    Image.open(package() / PHOTOGRAPH).convert("RGB").resize(SIZE).save(folder / PHOTOGRAPH)
    (folder / "film").mkdir()
    passed = Image.open(package() / PASSED).convert("RGB")
    for number in range(FRAMES):
        left = STEP * number
        frame = passed.crop((left, 0, left + FRAME[0], FRAME[1]))
        frame.save(folder / "film" / f"{number:02d}.png")


def package() -> Path:
    """Return the folder of pictures that scikit-image brings."""
    found = find_spec("skimage")
    if found is None or found.origin is None:
        sys.exit("scikit-image is not installed; pip install 'megatron-sphinx[cascades]'")
    return Path(found.origin).parent / "data"


def plot(folder: Path, target: Path) -> None:
    """Write one picture of all results, each with its name below."""
    parts = {
        "boxes of the script": "describe/regions.png",
        "masks by GrabCut": "segment/masks.png",
        "highlighted": "segment/highlighted.png",
        f"hole of the {TAKEN_OUT}": "inpaint/mask.png",
        f"without the {TAKEN_OUT}": "inpaint/inpainted.png",
        "four frames as one picture": "video/frames.png",
    }
    width, height = PART[0], PART[1] + LABEL
    sheet = Image.new("RGB", (3 * width, 2 * height), "white")
    for number, (name, file) in enumerate(parts.items()):
        x, y = number % 3 * width, number // 3 * height
        sheet.paste(ImageOps.pad(Image.open(folder / file), PART, color="white"), (x, y))
        ImageDraw.Draw(sheet).text((x + width / 2, y + PART[1] + LABEL / 2), name, "black", anchor="mm")
    sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    """Make all results anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for the results; those of before are removed")
    parser.add_argument("--model", help="checkpoint or run that is asked; default: the script")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="one picture of all results")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in ("film", "segment", "inpaint", "describe", "video"):
        shutil.rmtree(args.folder / name, ignore_errors=True)
    write_sources(args.folder)
    answers = args.folder / "answers.json"
    answers.write_text(json.dumps(script(), indent=1))
    run_all(args.folder, ["--model", args.model] if args.model else ["--answers", str(answers)])
    if args.plot:
        plot(args.folder, args.plot)


if __name__ == "__main__":
    main()
