"""A frozen model on a GPU: its forward recorded as a CUDA graph for every shape it is called with, and replayed."""
import threading
from collections import OrderedDict

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from difuse.inference import graphs
from difuse.inference.frozen import Frozen
from difuse.integrations.parts import must_not_wait
from difuse_kernels.dispatch import forced_backend

KEPT = 4  # recorded calls: a pipeline's model is called with one or two shapes


class Recorded(Frozen):
    """A `Frozen` that reads the model's own weights where they lie: training them in place is seen at once.

    A call is recorded anew for other shapes, dtypes, plain arguments or `use_backend`, where weights have moved and an
    attribute was set; at most 4 are kept, the one used longest ago makes room. So give times as tensors, and give a
    `difuse.Engine`, whose calls have any number of rows, the model itself. Each holds the memory of a forward. After
    other changes, such as precision switches of torch, call `clear()`. Results are copies. Threads take turns; use it
    from one stream at a time. Within somebody's own recording it is the model. RuntimeError where the model waits for
    the device.
    """

    def __init__(self, model, source):
        weight = next(model.parameters())
        super().__init__(model, source, (weight.dtype, weight.device))
        self._calls, self._lock = OrderedDict(), threading.Lock()

    @torch.no_grad()
    def forward(self, *args, **kwargs):
        """The model's own forward."""
        _dtype, device = self._expected
        leaves, tree = tree_flatten((args, kwargs))
        leaves = [leaf.to(device) if isinstance(leaf, torch.Tensor) and leaf.dim() == 0 else leaf for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        plain = [None if isinstance(leaf, torch.Tensor) else (type(leaf), leaf) for leaf in leaves]
        if graphs.recording() or (tensors and must_not_wait(tensors[0])):
            with torch.autocast(device.type, enabled=False):
                return self.model(*args, **kwargs)
        for tensor in tensors:
            if tensor.device != device:
                raise ValueError(f"Frozen: an input of shape {tuple(tensor.shape)} is on {tensor.device}; expected "
                                 f"{device}, where the model is: what is recorded cannot fetch it")
        weights = [(weight.data_ptr(), weight.dtype, weight.stride()) for weight in (
            *self.model.parameters(), *self.model.buffers())]
        key = (str(tree), *plain, *((tensor.shape, tensor.dtype) for tensor in tensors), *weights, forced_backend())
        with self._lock:
            call = self._calls.pop(key, None)
            if call is None:
                while len(self._calls) >= KEPT:  # first, so that its memory can be used
                    self._calls.popitem(last=False)
                call = _Call(self.model, leaves, tree, device)
            self._calls[key] = call  # the newest, at the end
            return call(tensors)

    def memory(self):
        """Bytes by kind: "shared" weights, which are the model's, and "inputs" and "results" of recorded calls."""
        def size(tensors):
            return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

        calls = list(self._calls.values())
        return {"shared": size((*self.model.parameters(), *self.model.buffers())),
                "inputs": size(tensor for call in calls for tensor in call.inputs),
                "results": size(tensor for call in calls for tensor in tree_flatten(call.result)[0]
                                if isinstance(tensor, torch.Tensor))}

    def clear(self):
        """Forget every recorded call and give its memory back."""
        with self._lock:
            self._calls.clear()

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if not name.startswith("_") and "_calls" in vars(self):
            self.clear()

    def _read(self, source):
        """Weights that were replaced, not changed, are looked up again."""
        for path, module in source.named_modules():
            mine = self.model.get_submodule(path)
            mine._parameters.update(module._parameters)
            mine._buffers.update(module._buffers)
        self.clear()


class _Call:
    """One recorded call, over buffers that stay where they are."""

    def __init__(self, model, leaves, tree, device):
        self.result = None
        with torch.inference_mode(False):  # buffers that may be written in any mode
            leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        args, kwargs = tree_unflatten(leaves, tree)

        def run():
            with torch.autocast(device.type, enabled=False):
                self.result = model(*args, **kwargs)

        self._replay = graphs.record(run, device)

    def __call__(self, tensors):
        for buffer, given in zip(self.inputs, tensors, strict=True):
            buffer.copy_(given, non_blocking=True)
        self._replay()
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, self.result)
