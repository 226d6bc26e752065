"""Convert a checkpoint: SOURCE's format is recognised, TARGET's is given.

    megatron-sphinx convert meta-llama/Llama-2-7b-hf weights/llama2_7b --to megatron
    megatron-sphinx convert SPHINX-v2-1k start --to megatron --verify
    megatron-sphinx convert runs/stage2 exported --to accessory --tensor-parallel 2 --encoders start/encoders
    megatron-sphinx convert runs/moe pruned --to hf --keep-experts look/kept_usage_6.json

Formats: hf (Llama, Mixtral; projections and tags in sphinx.safetensors), internlm2, meta (also Mistral's Mixtral),
accessory (LLaMA2-Accessory, all SPHINX types), megatron (ours; begin a run with it: model.weights=TARGET), torch_dist
(Megatron-LM's). The last two hold whole tensors, which any tensor, pipeline and expert layout loads: only meta and
accessory are divided, by --tensor-parallel.
Frozen experts lie in TARGET/encoders, a file each, where the format has no place for them; training takes these
(vision.experts.0.weights=TARGET/encoders/clip.safetensors). Streams tensor by tensor, builds no model; stopped, it
goes on where it was.
"""

import argparse
from pathlib import Path

from megatron_sphinx.checkpoint.formats.registry import names
from megatron_sphinx.cli.command import add_ignore, add_sha256, place

DTYPES = ("fp32", "bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add = parser.add_argument
    add("source", type=place, metavar="SOURCE", help="folder of a checkpoint, or a run folder")
    add("target", type=place, metavar="TARGET", help="folder to make")
    add("--to", required=True, choices=names(), dest="form", help="the format of TARGET")
    add("--tensor-parallel", type=int, default=1, help="ranks of meta and accessory, a file each")
    add("--sparse", action="store_true", help="of accessory: a slice of each expert on each rank")
    add("--dtype", choices=DTYPES, help="default: the source's; megatron always holds fp32")
    add("--shard-size", type=float, default=5.0, help="of hf: the most that a file holds, in GB")
    add("--diff", type=place, help="folder of LLaMA2-Accessory's -diff files, to be added to SOURCE")
    add("--views", type=int, default=1, choices=(1, 5, 10), help="of accessory: tells its llama_type")
    add("--preset", type=Path, help="the shape of a torch_dist SOURCE: a preset's name, or a run's YAML")
    add(
        "--experts", default="", help="of a released model's visual experts keep these: clip_convnext_xxl,dinov2_vitg14"
    )
    add("--encoders", type=place, help="folder of frozen experts for TARGET, as --to makes one; default: SOURCE's own")
    add("--keep-experts", metavar="KEPT", help="of a mixture's experts keep these: a file of experts, or 0,2,5")
    add_ignore(parser)
    add_sha256(parser)
    add("--verify", action="store_true", help="check SOURCE's checksums; read everything back and compare it")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx.checkpoint.convert import convert
    from megatron_sphinx.checkpoint.formats.format import WriteOptions
    from megatron_sphinx.config import load
    from megatron_sphinx.model.expert_choice import KeptExperts
    from megatron_sphinx.tensors.dtypes import BFLOAT16, FLOAT16, FLOAT32

    dtype = dict(zip(DTYPES, (FLOAT32, BFLOAT16, FLOAT16), strict=True))[args.dtype] if args.dtype else None
    options = WriteOptions(args.tensor_parallel, dtype, int(args.shard_size * 1e9), is_sparse=args.sparse)
    done = convert(
        args.source, args.target, args.form, options,
        shape=load(args.preset).model if args.preset else None, diff=args.diff, views=args.views,
        experts=[*filter(None, args.experts.split(","))], encoders=args.encoders,
        kept=KeptExperts.of(args.keep_experts) if args.keep_experts is not None else None, ignored=args.ignore,
        algorithm=args.algorithm, verify=args.verify, show=True,
    )  # fmt: skip
    for note in done.notes:
        print(note)
    for name, difference in done.differing:
        print(f"{name}: differs between the ranks of SOURCE by up to {difference:.3g}; the first rank's is taken")
    print(f"{args.target}: {done.files} files, {done.tensors} tensors, {done.parameters:,} parameters")
    print(done.balance)
    return 0
