"""The ends of prompts that benchmarks share; the texts themselves are those of the training data's tasks."""

from megatron_sphinx.prepare.tasks import PROMPTS

SHORT = PROMPTS["vqa"].removeprefix("{question}")
LETTER = PROMPTS["choice"].removeprefix("{question}\n{options}")
LETTER_SLIP = LETTER.replace("option's", 'option"s')  # eval_mm/annotations of SPHINX: ScienceQA and MMMU
OCR_TOKENS = PROMPTS["text_vqa"].removeprefix("{question}").removesuffix(SHORT)
LETTER_IN_CHINESE = "\n请直接回答选项字母。"  # LLaVA-1.5 for MMBench-CN

# The prompts of CMMMU by the type of a question; source: the appendix of arXiv:2401.11944.
CMMMU_TASKS = {
    "选择": "请回答以下多项选择题，并选出正确选项。这些题目可能包括单选和多选题型。"
    "如果所提供的信息不足以确定一个明确的答案，那么请根据可用的数据和你的判断来选择最可能正确的选项。",
    "判断": "请回答以下判断题，并根据题目描述和所给的信息来判断问题中陈述的对错。如果信息不完整或不足以作出绝对判断，"
    "请运用你的逻辑推理和现有信息来做出最可能的判断。",
    "填空": "请回答以下填空题，并根据题目的要求和所提供的信息来给出最恰当的答案。如果信息不足以确切回答，"
    "那么请依据现有的数据和你的推理能力来填写最合理的答案。",
}
CMMMU_OPTIONS = "选项：\n{lines}\n"
CMMMU_PROMPT = "{task}\n\n问题：{question}\n{choices}正确答案：\n"
