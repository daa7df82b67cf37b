"""CUDA graphs where there is no GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2cli.ahead import Graphs

aten = torch.ops.aten
LOOKS = {
    aten.is_nonzero,
    aten.item,
    aten._local_scalar_dense,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.lift_fresh,
    aten._pin_memory,
    aten.equal,
}


class Recorded(TorchDispatchMode):
    """What a CUDA graph is, on any device: the operations of some work are kept with the tensors they read and wrote, and a
    replay does them again in the same memory, without the program that gave them. Recording computes nothing, and a look at
    a value, or a new one from the host, is an error."""

    def __init__(self, work):
        super().__init__()
        self.operations, self.before = [], {}
        drawn = torch.get_rng_state()
        try:
            with self:
                work()
        finally:
            torch.set_rng_state(drawn)
            for storage, before in self.before.values():
                storage.copy_(before)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in LOOKS:
            raise RuntimeError("operation not permitted when stream is capturing")
        for number, argument in enumerate(operation._schema.arguments):
            if argument.alias_info and argument.alias_info.is_write:
                value = args[number] if number < len(args) else (kwargs or {}).get(argument.name)
                for storage in (tensor.untyped_storage() for tensor in tensors_of(value)):
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            for operation, args, kwargs, result in self.operations:
                again = operation(*args, **kwargs)
                for there, new in zip(tensors_of(result), tensors_of(again), strict=True):
                    if there.layout != torch.strided or there.data_ptr() != new.data_ptr():  # neither in place nor a view
                        there.copy_(new)


def tensors_of(result):
    return [one for one in (result if isinstance(result, tuple | list) else [result]) if isinstance(one, torch.Tensor)]


class HereToo(Graphs):
    """Graphs on a CPU."""

    def __init__(self, *what, **more):
        super().__init__(*what, **more)
        self.used = True

    def _record(self, work):
        return Recorded(work)
