"""A strategy of a third package: data parallel that averages each gradient by itself, after backward."""

from contextlib import contextmanager

import torch.distributed as dist

from accel_parallel import SingleStrategy
from accel_state.errors import ConfigError


class AllReduceStrategy(SingleStrategy):
    name = "all_reduce"
    axes = frozenset({"dp_replicate"})  # of the mesh, those along which it can divide the world
    average_size = property(lambda self: dist.get_world_size())

    def sum_over_data(self, value):
        total = value.clone()
        dist.all_reduce(total)
        return total

    def prepare(self, bundle):
        self.fresh, self.quiet = set(), set()
        self.trained = getattr(self, "trained", {})  # of every model that was prepared
        for model in bundle.models:
            for tensor in [*model.parameters(), *model.buffers()]:
                dist.broadcast(tensor.detach(), src=0)
            self.trained[model] = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in self.trained[model]:
                parameter.register_post_accumulate_grad_hook(self.fresh.add)
        return super().prepare(bundle)

    def backward(self, loss, **kwargs):
        loss.backward(**kwargs)
        for model, parameters in self.trained.items():
            for parameter in parameters:
                if parameter in self.fresh and model not in self.quiet:
                    dist.all_reduce(parameter.grad)  # what was averaged before is alike on all ranks, and stays so
                    parameter.grad /= self.average_size
        self.fresh.clear()

    @contextmanager
    def no_sync(self, model):
        self.quiet.add(model)
        yield
        self.quiet.discard(model)

    def join(self, models, *, settle=None):
        raise ConfigError("`all_reduce` has nobody to stand in for a rank without a batch. Train with even batches.")
