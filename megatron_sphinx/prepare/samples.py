"""What a sample of an image and a caption is, put together from its files: those of a tar, or of a folder."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_sphinx.data import images
from megatron_sphinx.data.pairs import split_name
from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.shards import BLOCK, Member, ShardImage, image_of, members
from megatron_sphinx.prepare.texts import check_text

CAPTION_ENDINGS = ("txt", "caption", "json")  # where a sample has several, the first of these counts
MOST_CAPTION_BYTES = 8192  # a longer one is no caption of a picture
_MOST_JSON_BYTES = 2**24
_MOST_SHOWN = 80  # characters of what stands where a caption should


@dataclass(frozen=True)
class Sample:
    """An image with its caption, or what is told of one that cannot be used.

    Attributes:
        key: of the sample, without its endings; None of what is no sample, such as damage of a shard.
        image: None where there is a fault.
        caption: empty where there is a fault.
        fault: why the sample cannot be used; empty where it can.
    """

    key: str | None
    image: ShardImage | None = None
    caption: str = ""
    fault: str = ""


@dataclass
class Draft:
    """A sample of which some files have been seen, in any order.

    Attributes:
        key: of the sample.
        caption_key: of captions in the .json; None where they may be in other files, or are `caption` there.
        image: as it lies in its file; None while none was seen that can be used.
        captions: what the files of captions hold, by their endings; an error where that cannot be used.
        others: endings of files that are neither.
        faults: of the image, or of files whose content cannot be read.
        doubles: names of further images, and of further captions of one ending.
    """

    key: str
    caption_key: str | None = None
    image: ShardImage | None = None
    captions: dict[str, str | DataError] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    doubles: list[str] = field(default_factory=list)
    _has_image: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether there are an image and a caption, good or bad."""
        return self._has_image and bool(self.captions)

    def add(self, name: str, ending: str, offset: int, block: bytes, fault: str = "") -> bool:
        """Take a file of the sample; say whether it is its image or one of its captions.

        Args:
            name: of the file.
            ending: of the name, in small letters.
            offset: of its content in the file that it lies in.
            block: a header and its content.
            fault: why that cannot be read; empty where it can.
        """
        is_image = ending in images.ENDINGS
        if not is_image and ending not in CAPTION_ENDINGS:
            self.others.append(ending)
            return False
        if self._has_image if is_image else ending in self.captions:
            self.doubles.append(name.rpartition("/")[2])
            return False
        self._has_image |= is_image
        try:
            if is_image:
                self.image = None if fault else image_of(offset, block)
            else:
                self.captions[ending] = "" if fault else caption_of(ending, block[BLOCK:], self.caption_key)
        except DataError as error:
            fault = str(error)
        if fault and is_image:
            self.faults.append(fault)
        elif fault:
            self.captions[ending] = DataError(fault)
        return True

    def samples(self) -> Iterator[Sample]:
        """Yield the sample, and behind it what was there twice."""
        found = (self.captions.get(ending) for ending in CAPTION_ENDINGS)
        caption: str | DataError = next((caption for caption in found if caption), "")
        fault = self.faults[0] if self.faults else ""
        if not fault and self.image is None:
            kinds = ", ".join(dict.fromkeys(f".{ending}" if ending else "no ending" for ending in self.others))
            fault = f"no image: {kinds} is none of {', '.join(images.ENDINGS)}" if kinds else "no image"
        if not fault and isinstance(caption, DataError):
            fault = str(caption)
        if not fault and not caption:
            fault = "no caption"
        if fault or isinstance(caption, DataError):
            yield Sample(self.key, fault=fault)
        else:
            yield Sample(self.key, self.image, caption)
        if self.doubles:
            shown = ", ".join(self.doubles[:3])
            yield Sample(self.key, fault=f"duplicate key: {shown} comes after another file of that name and kind")


def read_shard(path: str, caption_key: str | None) -> Iterator[Sample]:
    """Yield the samples of a shard, whose files may be in any order, and what is damaged in it.

    The key of a sample is what stands before the first dot of its files' names, as WebDataset has it; where a name has
    several dots, and there is no such sample, before the last. Of joined tars each has keys of its own.

    Args:
        path: of the shard, or its URL.
        caption_key: of captions in the .json; None where they may be in other files, or are `caption` there.

    Raises:
        DataError: the disk or the network fails, so that nothing is known of the shard.
    """
    drafts: dict[str, Draft] = {}
    dotted: dict[str, Draft] = {}  # of names that have several dots
    damage: list[Sample] = []
    part = 0

    def leave_out(key: str | None, reason: str) -> None:
        if key is None:
            damage.append(Sample(None, fault=reason))
        else:
            drafts.setdefault(key, Draft(key, caption_key)).faults.insert(0, reason)

    def is_wanted(name: str) -> bool:
        return _last_ending(name) in (*images.ENDINGS, *CAPTION_ENDINGS)

    for member in members(path, leave_out, is_wanted):
        if member.part != part:
            yield from _finished(drafts, dotted)
            drafts, dotted, part = {}, {}, member.part
        _take(member, drafts, dotted, caption_key)
    yield from _finished(drafts, dotted)
    yield from damage


def _last_ending(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def _take(member: Member, drafts: dict[str, Draft], dotted: dict[str, Draft], caption_key: str | None) -> None:
    """Give a file of a tar to the sample that it belongs to."""
    key, ending = split_name(member.name)
    last = _last_ending(member.name)
    known = drafts
    if ending != last and last in (*images.ENDINGS, *CAPTION_ENDINGS):
        key, known = member.name[: -len(last) - 1], dotted
    else:
        last = ending
    draft = known.setdefault(key, Draft(key, caption_key))
    draft.add(member.name, last, member.offset, member.block, member.fault)


def _finished(drafts: dict[str, Draft], dotted: dict[str, Draft]) -> Iterator[Sample]:
    """Yield the samples of a tar; what has several dots in its name is a sample, or one more file of one."""
    for draft in drafts.values():
        yield from draft.samples()
    for key, draft in dotted.items():
        if draft.is_whole or split_name(key)[0] not in drafts:
            yield from draft.samples()


def caption_of(ending: str, content: bytes, caption_key: str | None = None) -> str:
    """Return the caption that a file holds; empty where it holds none.

    Args:
        ending: of the file's name.
        content: of the file.
        caption_key: of captions in .json files; None where they may be in other files, or are `caption` there.

    Raises:
        DataError: there is a caption that cannot be used.
    """
    if ending == "json":
        caption = _in_json(content, caption_key or "caption")
    elif caption_key is not None:
        return ""
    else:
        try:
            caption = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"caption is not UTF-8: {error.reason} at byte {error.start}") from error
    check_text(caption, "caption")
    if len(caption.encode()) > MOST_CAPTION_BYTES:
        raise DataError(f"caption too long: more than {MOST_CAPTION_BYTES} bytes")
    return caption.strip()


def _in_json(content: bytes, key: str) -> str:
    """Return the caption under a key of a JSON object; empty where there is none."""
    if len(content) > _MOST_JSON_BYTES:
        raise DataError(f"caption too long: a .json of more than {_MOST_JSON_BYTES} bytes")
    try:
        entry = json.loads(content)
    except RecursionError as error:
        raise DataError("caption is not JSON: it is nested too deep") from error
    except ValueError as error:
        raise DataError(f"caption is not JSON: {error}") from error
    caption = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(caption, list):
        if len(caption) > 1:
            raise DataError(f"several captions: {len(caption)} under {key} of the .json; write one")
        caption = caption[0] if caption else None
    if caption is not None and not isinstance(caption, str):
        raise DataError(f"caption is no text: {repr(caption)[:_MOST_SHOWN]}")
    return caption or ""
