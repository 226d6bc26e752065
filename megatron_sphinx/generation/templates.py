"""What stands around the messages of a chat: a table of templates, of which `sphinx` is the one of training."""

from dataclasses import dataclass, replace

from megatron_sphinx.data.template import STOP, SYSTEM
from megatron_sphinx.errors import ConfigError, nearest

BOS, EOS = "<s>", "</s>"  # in a template: these ids of whatever tokenizer, however it writes them


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """What stands before and behind each message; an answer follows a question, and a question an answer.

    Attributes:
        before_system: what stands before the system prompt.
        after_system: behind it.
        before_question: what stands before each question.
        after_question: behind it, up to where the model goes on.
        before_answer: what of an earlier answer stands there that is none of its text.
        after_answer: behind an earlier answer.
        default_system: the system prompt of a chat that gives none; None for no system prompt.
        stop: texts that end an answer, beside EOS.
        control: names of control tokens in the above; in messages they are text like any other.
        has_bos: whether a chat without a picture begins with BOS; one with a picture always does.
        is_system_in_question: whether the system prompt stands between the first question and what is before that.
        is_stripped: whether spaces around a message are left out.
    """

    before_system: str = ""
    after_system: str = ""
    before_question: str = ""
    after_question: str = ""
    before_answer: str = ""
    after_answer: str = ""
    default_system: str | None = None
    stop: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    has_bos: bool = True
    is_system_in_question: bool = False
    is_stripped: bool = True


_CHATML = ChatTemplate(
    before_system="<|im_start|>system\n",
    after_system="<|im_end|>\n",
    before_question="<|im_start|>user\n",
    after_question="<|im_end|>\n<|im_start|>assistant\n",
    after_answer="<|im_end|>\n",
    stop=("<|im_end|>",),
    control=("<|im_start|>", "<|im_end|>"),
    has_bos=False,
)
# Sources: the chat_template of SmolLM2-Instruct, Qwen2.5-Instruct, InternLM2-chat and TinyLlama-Chat-v1.0 (zephyr);
# Meta's llama/generation.py (llama2); FastChat's documentation of Vicuna's weights; the README of Stanford Alpaca.
TEMPLATES = {
    "sphinx": ChatTemplate(
        after_system=f"\n{STOP}",
        before_question=" Human: ",
        after_question=f"{STOP} Assistant:",
        before_answer=" ",
        after_answer=STOP,
        default_system=SYSTEM,
        stop=(STOP,),
    ),
    "plain": ChatTemplate(after_system="\n", after_answer="\n", is_stripped=False),
    "chatml": _CHATML,
    "smollm2": replace(
        _CHATML, default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    ),
    "qwen2": replace(
        _CHATML, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    ),
    "internlm2": replace(_CHATML, has_bos=True),
    "llama2": ChatTemplate(
        before_system="<<SYS>>\n",
        after_system="\n<</SYS>>\n\n",
        before_question="[INST] ",
        after_question=" [/INST]",
        before_answer=" ",
        after_answer=f" {EOS}{BOS}",
        is_system_in_question=True,
    ),
    "zephyr": ChatTemplate(
        before_system="<|system|>\n",
        after_system=f"{EOS}\n",
        before_question="<|user|>\n",
        after_question=f"{EOS}\n<|assistant|>\n",
        after_answer=f"{EOS}\n",
    ),
    "vicuna_v1_1": ChatTemplate(
        after_system=" ",
        before_question="USER: ",
        after_question=" ASSISTANT:",
        before_answer=" ",
        after_answer=EOS,
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "alpaca": ChatTemplate(
        after_system="\n\n",
        before_question="### Instruction:\n",
        after_question="\n\n### Response:",
        after_answer="\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        stop=("\n### Instruction:",),
    ),
}  # fmt: skip


def template_of(name: str) -> ChatTemplate:
    """Return the chat template of a name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"template={name}: unknown; {nearest(name, list(TEMPLATES))}")
    return TEMPLATES[name]
