"""--shard: a network whose parameters are divided among the processes (FSDP2). A block is whole while it works."""

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from harness.fields import refuse
from harness.parallel import world_size


def repeated_blocks(denoiser, key):
    """The blocks that a transformer repeats; without any the option `key` is refused."""
    kinds = getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None) or ()
    blocks = [module for module in denoiser.modules() if type(module).__name__ in kinds]
    if not blocks:
        refuse(key, True, f"diffusers does not say which blocks {type(denoiser).__name__} repeats; leave it out")
    return blocks


def shard_blocks(denoiser, device):
    """Divide a network's parameters, in float32, among the processes; it comes from the CPU block by block."""
    mesh, name = dist.init_device_mesh(device.type, (world_size(),)), type(denoiser).__name__
    # the root too is forgotten after its work: otherwise it would miss a snapshot that takes its parameters' place
    for module in (*repeated_blocks(denoiser, "shard"), denoiser):
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    type(denoiser).__name__ = name  # under which diffusers saves it
