"""The processes of a layout, and their process groups."""

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate import ParallelismConfig
from torch.distributed.device_mesh import init_device_mesh

from .layout import Layout

if TYPE_CHECKING:
    from accelerate import Accelerator


class Mesh:
    """This process's place in a layout: `data_rank`, `stage`, `tensor_rank`, and a group for each dimension.

    `ends` is the group of a pipeline's first and last stage, which share tied embeddings; None on the stages between.
    """

    def __init__(self, layout: Layout, device: Any) -> None:
        self.layout, self.device = layout, device
        shape = (layout.data, layout.pipeline, layout.tensor)
        self.devices = init_device_mesh(device.type, shape, mesh_dim_names=("data", "pipeline", "tensor"))
        place: Any = self.devices.get_coordinate()
        self.data_rank, self.stage, self.tensor_rank = map(int, place)
        self.data, self.pipeline, self.tensor = (
            self.devices[name].get_group() for name in ("data", "pipeline", "tensor")
        )
        self.ends: Any = None
        for ranks in self.devices.mesh[:, [0, -1]].movedim(1, -1).flatten(0, 1).tolist():
            group = dist.new_group(ranks) if ranks[0] != ranks[1] else None  # every process makes every group
            if dist.get_rank() in ranks:
                self.ends = group

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.layout.pipeline - 1

    def stage_of(self, layer: int, layers: int) -> int:
        """The stage that holds a layer, as layers are divided evenly in order."""
        return next(s for s in range(self.layout.pipeline) if layer < layers * (s + 1) // self.layout.pipeline)


class SplitParallelism(ParallelismConfig):  # type: ignore[misc]
    """Tells accelerate that the processes of one copy get the same batch, whose tokens are counted once.

    Its "tp" is our tensor x pipeline, its "dp_shard" our data. It shards nothing, since the trainer never asks it to.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(tp_size=layout.tensor * layout.pipeline, dp_shard_size=layout.data)

    def _validate_accelerator(self, accelerator: "Accelerator") -> None:
        """accelerate 1.15 refuses CPU processes, although what is used of it here works on any device."""
        if accelerator.device.type != "cpu" or self.total_size != accelerator.num_processes:
            super()._validate_accelerator(accelerator)
