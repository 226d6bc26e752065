"""Our models in other programs: what these hand over is asked, answers and boxes are as they take them."""

import io
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation.adapters.frames import in_picture
from megatron_sphinx.generation.requests import Finish, Generation
from megatron_sphinx.prepare.boxes import format_box
from megatron_sphinx.serving import model as models


class Loaded:
    """A model that answers with a script, and keeps what it was asked."""

    padding = "centre"

    def __init__(self, path, answer="[0.10,0.30,0.50,0.70] here", **options):
        self.path, self.options, self.answer, self.calls = path, options, answer, []

    def generate(self, asked, pictures, **sampling):
        self.calls.append((asked, pictures, sampling))
        return [Generation(self.answer, (5, 6), Finish.STOP, 40) for _ in asked]


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setattr(models, "load", Loaded)


def module(monkeypatch, name, **content):
    made = ModuleType(name)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)


@dataclass
class Instance:
    args: tuple


class Chat:
    """As `lmms_eval.protocol.ChatMessages`."""

    def __init__(self, messages):
        parts = [(one["role"], [SimpleNamespace(**part) for part in one["content"]]) for one in messages]
        self.messages = [SimpleNamespace(role=role, content=content) for role, content in parts]

    def extract_media(self):
        found = {kind: [part.url for one in self.messages for part in one.content if part.type == kind]
                 for kind in ("image", "video", "audio")}  # fmt: skip
        return found["image"], found["video"], found["audio"]


@pytest.fixture
def lmms_eval(monkeypatch, loaded):
    """Our module of lmms-eval, with as much of that as it uses."""
    name = "megatron_sphinx.evaluation.adapters.lmms_eval"

    class Base:
        def __init__(self):
            self.task_dict = {}

    for package in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        module(monkeypatch, package)
    counts = {"GenerationResult": lambda text, counts: (text, counts), "TokenCounts": lambda *counts: counts}
    module(monkeypatch, "lmms_eval.api.instance", Instance=Instance, **counts)
    module(monkeypatch, "lmms_eval.api.model", lmms=Base)
    module(monkeypatch, "lmms_eval.models.registry_v2", ModelManifest=SimpleNamespace)
    module(monkeypatch, "lmms_eval.protocol", ChatMessages=lambda messages: Chat(messages))
    monkeypatch.delitem(sys.modules, name, raising=False)
    import importlib

    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def request(number, sampling, picture=None, **more):
    return Instance(("", lambda doc: doc, sampling, number, "task", "test"))


def doc(text, *images, kind="image"):
    return [{"role": "user", "content": [*({"type": kind, "url": image} for image in images),
                                         {"type": "text", "text": text}]}]  # fmt: skip


def test_lmms_eval_is_answered_in_its_order_and_frame(lmms_eval):
    made = lmms_eval.manifest()
    assert made.chat_class_path == "megatron_sphinx.evaluation.adapters.lmms_eval.Sphinx"
    sphinx = lmms_eval.Sphinx("runs/x", batch_size=4, device="cuda:0", tensor=2, max_batch_size=None)
    assert (sphinx.model.path, sphinx.model.options) == ("runs/x", {"device": "cuda", "tensor": 2})
    wide = Image.new("RGB", (200, 100), "red")
    sphinx.task_dict = {"task": {"test": [doc("a", wide), doc("b"), doc("c", wide)]}}
    greedy = {"max_new_tokens": 7, "do_sample": False, "temperature": 0, "top_p": None, "until": ["\n\n", ""]}
    drawn = {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "until": None}
    results = sphinx.generate_until([request(0, greedy), request(1, drawn), request(2, greedy)])
    first, second = sphinx.model.calls
    assert [[one.text for one in chat] for chat in first[0]] == [["a"], ["c"]]
    assert Image.open(io.BytesIO(first[1][0])).size == (200, 100)
    assert first[2] == {"stop": ("\n\n",), "max_new_tokens": 7}
    assert second[1:] == ([None], {"stop": (), "max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9})
    assert results[0] == ("[0.1000,0.1000,0.5000,0.9000] here", (40, 2))
    assert results[1][0] == sphinx.model.answer


def test_lmms_eval_is_told_what_is_not_answered(lmms_eval):
    sphinx = lmms_eval.Sphinx("x")
    image = Image.new("RGB", (8, 8))
    sphinx.task_dict = {"task": {"test": [doc("a", image, image), doc("a", "v.mp4", kind="video")]}}
    with pytest.raises(
        DataError, match="task: shows 2 pictures, 0 videos, 0 sounds at once; give tasks of one picture"
    ):
        sphinx.generate_until([request(0, {})])
    with pytest.raises(DataError, match="shows 0 pictures, 1 videos"):
        sphinx.generate_until([request(1, {})])
    with pytest.raises(DataError, match="num_beams=4: answers have one beam; leave it out"):
        lmms_eval.sampling_of({"num_beams": 4})
    with pytest.raises(DataError, match="1 requests for likelihoods: only answers are given; take tasks that generate"):
        sphinx.loglikelihood([request(0, {})])
    with pytest.raises(DataError, match="1 requests of several rounds: only one is answered; take tasks of one round"):
        sphinx.generate_until_multi_round([request(0, {})])


@pytest.mark.parametrize("padding", ["centre", "corner"])
@pytest.mark.parametrize("size", [(200, 100), (90, 300), (64, 64)])
def test_boxes_come_back_in_the_picture(padding, size):
    box = (0.2 * size[0], 0.4 * size[1], 0.7 * size[0], 0.9 * size[1])
    written = format_box(box, *size, padding)
    found = in_picture(f"a {written} and {written}; [no]", *size, padding)
    inside = [float(number) for number in found.split("[")[1].split("]")[0].split(",")]
    assert inside == pytest.approx([0.2, 0.4, 0.7, 0.9], abs=0.02)
    assert found.endswith("; [no]")
    assert found.count("[") == 3


@pytest.fixture
def vlmevalkit(monkeypatch, loaded):
    """Our module of VLMEvalKit, with as much of that as it uses."""
    name = "megatron_sphinx.evaluation.adapters.vlmevalkit"
    kinds = {"MMBench": "MCQ", "MME": "Y/N", "COCO": "Caption"}
    base = type("BaseModel", (), {"dump_image": lambda self, line, dataset: [f"{dataset}/{line['index']}.jpg"]})
    for package in ("vlmeval", "vlmeval.vlm"):
        module(monkeypatch, package)
    module(monkeypatch, "vlmeval.dataset", DATASET_TYPE=kinds.get)
    module(monkeypatch, "vlmeval.vlm.base", BaseModel=base)
    monkeypatch.delitem(sys.modules, name, raising=False)
    import importlib

    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_vlmevalkit_is_asked_as_the_papers_do(vlmevalkit):
    sphinx = vlmevalkit.Sphinx("runs/x", max_new_tokens=9, tensor=2)
    assert [sphinx.use_custom_prompt(name) for name in ("MMBench", "MME", "COCO", None)] == [True, True, False, False]
    line = {"index": 3, "question": "Which?", "hint": "Look.", "A": "one", "B": "two", "C": float("nan")}
    message = sphinx.build_prompt(line, "MMBench")
    letter = "Answer with the option's letter from the given choices directly."
    assert message == [{"type": "image", "value": "MMBench/3.jpg"},
                       {"type": "text", "value": f"Look.\nWhich?\nA. one\nB. two\n{letter}"}]  # fmt: skip
    short = "Answer the question using a single word or phrase."
    assert sphinx.build_prompt(line, "MME")[1]["value"] == f"Which?\n{short}"
    assert sphinx.generate_inner([*message, {"type": "text", "value": "more"}], "MMBench") == sphinx.model.answer
    assert sphinx.model.calls == [([f"{message[1]['value']}\nmore"], ["MMBench/3.jpg"], {"max_new_tokens": 9})]
