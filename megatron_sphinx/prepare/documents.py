"""Make conversations about pages from PDFs: reading texts, and finding them.

Source: the OCR data of SPHINX-X, arXiv:2402.05935, section 3.2. PyMuPDF gives the pages and the texts (see `pdf.py`);
here texts are checked for what cannot be read, and what a PDF splits is merged (see `lines.py`).
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sphinx.data.files import remove_partial, renamed, state_of
from megatron_sphinx.data.shuffle import key_of
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import files_in, printable
from megatron_sphinx.prepare.boxes import format_box
from megatron_sphinx.prepare.pdf import DocumentPage, DocumentSettings, import_pymupdf, read_pages
from megatron_sphinx.prepare.tasks import PROMPTS, ConversationJson, conversation
from megatron_sphinx.prepare.workers import Report, in_parallel, one_line, target_folder, write_json

READ_PAGE = "Read the texts of this page in order."
READ_REGION = "Read the text in the region {box}."
FIND_TEXT = 'Where is the text "{text}"? Give its bounding box.'


def dialog(image: str, page: DocumentPage, settings: DocumentSettings) -> ConversationJson:
    """Return a conversation about a page.

    It has 1 to `most_turns` questions; how many and which follows from the image's path. Their kinds are, each once
    before one comes again: all texts with boxes, all texts in order, the text in a region, the box of a text. A region
    or a text is asked for only where no other on the page reads the same.

    Args:
        image: path of the page's image, as the conversation has it.
        page: with its texts.
        settings: how pages become conversations.
    """
    boxes = [format_box(text.box, *page.image.size, settings.padding) for text in page.texts]
    boxed = [(text.text, box) for text, box in zip(page.texts, boxes, strict=True)]
    texts_like, boxes_like = Counter(text for text, _ in boxed), Counter(boxes)
    single = [(text, box) for text, box in boxed if texts_like[text] == boxes_like[box] == 1]
    kinds = [
        [(PROMPTS["ocr"], " ".join(text + box for text, box in boxed))],
        [(READ_PAGE, "\n".join(text for text, _ in boxed))],
        [(READ_REGION.format(box=box), text) for text, box in single],
        [(FIND_TEXT.format(text=text), box) for text, box in single],
    ]
    if single and sum(len(text) for text, _ in boxed) > settings.most_characters:
        kinds = kinds[2:]
    ranked = [
        (rank, key_of(image, number), turn)
        for number, kind in enumerate(kinds)
        for rank, turn in enumerate(sorted(kind, key=lambda turn: key_of(image, *turn)))
    ]
    turns = 1 + key_of(image, "turns") % settings.most_turns
    return conversation(image, [turn for _, _, turn in sorted(ranked)[:turns]])


def find_documents(sources: Sequence[Path], *, follow_links: bool = False) -> dict[str, Path]:
    """Find PDFs, and name them: one in a folder by its path there, a file by its own name, both without the ending.

    Args:
        sources: PDFs, and folders that hold some.
        follow_links: whether links in these folders may lead out of them.

    Raises:
        DataError: a source is missing, there is no PDF, two have the same name, or one has a name that no folder can
            have; or a link leads out of a folder, and links are not followed.
    """
    documents: dict[str, Path] = {}
    for source in sources:
        if not source.exists():
            raise DataError(f"{source}: no such file or folder; check its path")
        for path in files_in(source, ("pdf",), follow_links=follow_links) if source.is_dir() else [source]:
            name = path.relative_to(source if source.is_dir() else source.parent).with_suffix("").as_posix()
            if {".", ".."} & set(name.split("/")):  # such as the names of ..pdf and ...pdf
                raise DataError(f"{path}: its images would lie in a folder {name!r}; rename it")
            if name in documents:
                raise DataError(f"{path}: has the name of {documents[name]}; rename it, or give the folder of both")
            documents[name] = path
    if not documents:
        raise DataError(f"{', '.join(map(str, sources[:3]))}: no PDF in there; give files, or folders that hold some")
    return documents


def write_documents(
    documents: dict[str, Path], target: Path, settings: DocumentSettings, *, workers: int = 1, show: bool = False
) -> Report:
    """Write the images of pages and a conversation about each.

    `target` gets `images/<document>/<page>.png`, `conversations.jsonl`, and `quarantine.jsonl` with document, page and
    reason of what is left out. What is done is kept in `.parts` until all is: killed, this goes on where it was.

    Args:
        documents: PDFs by their names.
        target: folder.
        settings: how they become conversations.
        workers: processes at a time.
        show: whether to show progress.

    Returns:
        How many pages were taken, and how many not, by reason.

    Raises:
        ConfigError: PyMuPDF is not installed.
        DataError: a document is missing, or no page is left.
    """
    import_pymupdf()  # where it is missing, that is said before any work is done
    with target_folder(target):
        parts = target / ".parts"
        parts.mkdir(exist_ok=True)
        (target / "conversations.jsonl").unlink(missing_ok=True)
        for folder in (target, parts):
            remove_partial(folder)
        work = partial(_write_document, target=target, settings=settings)
        done = list(in_parallel(work, list(documents.items()), workers=workers, unit_name="document", show=show))
        report = _join(done, target)
        shutil.rmtree(parts)
    return report


def _join(done: Sequence[Path], target: Path) -> Report:
    """Join what was made of each document; raise DataError where no page is left."""
    report = Report()
    with renamed(target / "conversations.jsonl") as whole, whole.open("w") as conversations:
        with renamed(target / "quarantine.jsonl") as left_out, left_out.open("w") as quarantine:
            for file in done:
                part = json.loads(file.read_text())
                conversations.writelines(json.dumps(line) + "\n" for line in part["conversations"])
                quarantine.writelines(json.dumps(line) + "\n" for line in part["quarantine"])
                report.taken += len(part["conversations"])
                report.inputs += part["pages"]
                report.reject(part["quarantine"])
        if not report.taken:
            raise DataError(f"{target}: no page can be used{report.why()}; see quarantine.jsonl")
    return report


def part_name(name: str, state: tuple[int, str], settings: DocumentSettings) -> str:
    """Name what is made of a document; the name differs where what is made would.

    Args:
        name: of the document.
        state: size and version of its file.
        settings: how it becomes conversations.
    """
    values = ", ".join(f"{key}={value!r}" for key, value in vars(settings).items())
    return hashlib.sha256(f"({name!r}, {state!r}, DocumentSettings({values}))".encode()).hexdigest()[:24]


def _write_document(document: tuple[str, Path], *, target: Path, settings: DocumentSettings) -> Path:
    """Write the images of a document and a file with its conversations, if that is not there yet."""
    name, path = document
    try:
        state = state_of(str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its path") from error
    part = target / ".parts" / f"{part_name(name, state, settings)}.json"
    if part.is_file():
        return part
    folder = target / "images" / name
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("*.png"):
        earlier.unlink()
    conversations: list[ConversationJson] = []
    quarantine: list[dict[str, Any]] = []

    def leave_out(page: int | None, reason: str, pages: int = 1) -> None:
        entry = {"document": printable(str(path)), "page": page, "reason": one_line(reason)}
        quarantine.append(entry | ({"documents": pages} if pages != 1 else {}))

    for page in read_pages(path, settings, leave_out):
        image = folder / f"{page.number:05d}.png"
        page.image.save(image)
        conversations.append(dialog(str(image.relative_to(target)), page, settings))
        if page.refused or page.hidden:
            reason = f"kept: without {page.refused} texts of bad Unicode and {page.hidden} lines that are not all shown"
            leave_out(page.number, reason, 0)
    pages = len(conversations) + sum(entry.get("documents", 1) for entry in quarantine)
    write_json(part, {"conversations": conversations, "quarantine": quarantine, "pages": pages})
    return part
