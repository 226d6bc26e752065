"""Convert a checkpoint: SOURCE's format is recognised, TARGET's is given.

    tools/convert_checkpoint.py meta-llama/Llama-2-7b-hf weights/llama2_7b --to megatron
    tools/convert_checkpoint.py SPHINX-v2-1k start --to megatron --verify
    tools/convert_checkpoint.py runs/stage2 exported --to accessory --tensor-parallel 2 --encoders start/encoders

Formats: hf (Llama, Mixtral; projections and tags in sphinx.safetensors), internlm2, meta (also Mistral's Mixtral),
accessory (LLaMA2-Accessory, all SPHINX types), megatron (ours; begin a run with it: model.weights=TARGET), torch_dist
(Megatron-LM's). The last two hold whole tensors, which any tensor, pipeline and expert layout loads: only meta and
accessory are divided, by --tensor-parallel.
Frozen experts lie in TARGET/encoders, a file each, where the format has no place for them; training takes these
(vision.experts.0.weights=TARGET/encoders/clip.safetensors). Streams tensor by tensor,
builds no model; stopped, it goes on where it was.
"""

import argparse
import sys
from pathlib import Path

import torch

from megatron_sphinx.checkpoint.convert import convert
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.formats.registry import names
from megatron_sphinx.config import load
from megatron_sphinx.errors import SphinxError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> int:
    """Run the tool; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to make")
    parser.add_argument("--to", required=True, choices=names(), dest="form")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks of meta and accessory, a file each")
    parser.add_argument("--sparse", action="store_true", help="of accessory: a slice of each expert on each rank")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the source's; megatron always holds fp32")
    parser.add_argument("--shard-size", type=float, default=5.0, help="of hf: the most that a file holds, in GB")
    parser.add_argument("--diff", type=Path, help="folder of LLaMA2-Accessory's -diff files, to be added to SOURCE")
    parser.add_argument("--views", type=int, default=1, choices=(1, 5, 10), help="of accessory: tells its llama_type")
    parser.add_argument(
        "--preset", type=Path, help="the shape of a torch_dist SOURCE: a preset's name, or a run's YAML"
    )
    parser.add_argument(
        "--experts", default="", help="of a released model's visual experts keep these: clip_convnext_xxl,dinov2_vitg14"
    )
    parser.add_argument(
        "--encoders", type=Path, help="folder of frozen experts for TARGET, as --to makes one; default: SOURCE's own"
    )
    parser.add_argument(
        "--verify", action="store_true", help="check SOURCE's checksums; read everything back and compare it"
    )
    args = parser.parse_args()
    dtype = DTYPES[args.dtype] if args.dtype else None
    wanted = WriteOptions(args.tensor_parallel, dtype, int(args.shard_size * 1e9), is_sparse=args.sparse)
    try:
        shape = load(args.preset).model if args.preset else None
        options = {
            "shape": shape,
            "diff": args.diff,
            "views": args.views,
            "experts": [*filter(None, args.experts.split(","))],
            "encoders": args.encoders,
        }
        done = convert(args.source, args.target, args.form, wanted, **options, verify=args.verify, show=True)
    except SphinxError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    for name, most in done.differing:
        print(f"{name}: differs between the ranks of SOURCE by up to {most:.3g}; the first rank's is taken")
    print(f"{args.target}: {done.files} files, {done.tensors} tensors, {done.parameters:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
