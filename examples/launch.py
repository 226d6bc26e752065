"""Start a program on the demo's three ranks, or on the one or two GPUs of this machine, each with encoders of its own.

    examples/launch.py -m megatron_sphinx train examples/demo.yaml [key=value …]

Says which, and becomes torchrun. Where GPUs are hidden (CUDA_VISIBLE_DEVICES=), there are none.
"""

import os
import sys

RANKS = 3  # one for the encoders, two for the language model


def layout(gpus: int) -> tuple[int, list[str], str]:
    """How many ranks a machine with so many GPUs gets, the overrides that divide the model so, and both in words."""
    if gpus == 0 or gpus >= RANKS:
        return RANKS, [], f"{RANKS} ranks on {'CPUs' if gpus == 0 else 'GPUs'}: one for the encoders"
    if gpus == 1:  # experts have nobody to be shared with
        return 1, ["parallel.encoder=0", "parallel.expert=1"], "1 rank on 1 GPU, which encodes too"
    return gpus, ["parallel.encoder=0"], f"{gpus} ranks on {gpus} GPUs, which encode too"


def main() -> None:
    """Count the GPUs and start the ranks; does not return."""
    import torch

    ranks, overrides, said = layout(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    print(said, flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    os.execv(sys.executable, [*command, *sys.argv[1:], *overrides])


if __name__ == "__main__":
    main()
