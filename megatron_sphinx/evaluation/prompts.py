"""The ends of prompts that benchmarks share; the texts themselves are those of the training data's tasks."""

from megatron_sphinx.prepare.tasks import PROMPTS

SHORT = PROMPTS["vqa"].removeprefix("{question}")
LETTER = PROMPTS["choice"].removeprefix("{question}\n{options}")
LETTER_SLIP = LETTER.replace("option's", 'option"s')  # eval_mm/annotations of SPHINX: ScienceQA and MMMU
OCR_TOKENS = PROMPTS["text_vqa"].removeprefix("{question}").removesuffix(SHORT)
LETTER_IN_CHINESE = "\n请直接回答选项字母。"  # LLaVA-1.5 for MMBench-CN
