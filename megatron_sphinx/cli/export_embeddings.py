"""Write prompts with their pictures as embeddings, for engines that know the language model alone.

    megatron-sphinx export-embeddings MODEL --input questions.jsonl --output prompts
    megatron-sphinx export-embeddings MODEL --input pictures/ --prompt 'Describe the image.' --output prompts

MODEL is a checkpoint or a run's folder, inputs are those of `generate`. OUTPUT/index.jsonl has a line for each row: its
columns with `file` and `positions`, or with `error`. A file holds `prompt_embeds` [positions, hidden], which another
engine takes in place of tokens, and `tokens`, ids with 0 where the picture stands. Of the language model one layer is
loaded; the engine has it all from `megatron-sphinx convert MODEL TARGET --to hf`.
"""

import argparse
from pathlib import Path

from megatron_sphinx.cli.command import check_model
from megatron_sphinx.generation.requests import default_new_tokens
from megatron_sphinx.ranges import Range, check_range

_NEW_TOKENS = Range(least=1, most=2**20)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="checkpoint, or a run's folder")
    add("--input", type=Path, nargs="+", required=True, metavar="PATH", help="files or folders")
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder to make")
    add("--prompt", default="", metavar="TEXT", help="asked where a row has no question")
    add("--images", type=Path, metavar="FOLDER", help="of the pictures; default: that of the input")
    add("--follow-links", action="store_true", help="also take pictures that links lead out of it to")
    add("--template", default="sphinx", metavar="NAME", help="of chats; default: sphinx, as in training")
    add("--config", type=Path, help="configuration or preset of a checkpoint that does not tell its visual experts")
    add("--tokenizer", type=Path, help="where it is neither beside the weights nor named by the configuration")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the embeddings; default: bf16")
    text = "that there must be room for; default: 512, or a quarter of the positions"
    add("--new-tokens", type=int, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    if args.new_tokens is not None:
        check_range(args.new_tokens, _NEW_TOKENS, "--new-tokens")
    check_model(args)
    from megatron_sphinx.serving.questions import Asking
    from megatron_sphinx.serving.rows import sources_of

    sources = sources_of(args.input, follow_links=args.follow_links)
    import torch

    from megatron_sphinx.run.evaluation import join_alone
    from megatron_sphinx.serving.export import PromptEmbedder, export_embeddings
    from megatron_sphinx.serving.source import ModelSource

    source = ModelSource.open(args.model, args.config, args.tokenizer)
    groups, platform = join_alone(args.device)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    embedder = PromptEmbedder(source, groups, platform, dtype, args.template)
    asking = Asking(prompt=args.prompt, images=args.images, follow_links=args.follow_links)
    new_tokens = args.new_tokens or default_new_tokens(source.positions)
    report = export_embeddings(embedder, sources, args.output, asking, new_tokens)
    print(f"{args.output}: {report.prompts} prompts, {report.errors} errors, {report.bytes:,} bytes")
    return 0
