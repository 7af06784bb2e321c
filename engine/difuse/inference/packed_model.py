"""A frozen model on a CPU: its forward on packed products, hoists, and what it does about memory."""
import ctypes
import sys

import torch

from difuse.inference.frozen import Frozen
from difuse.inference.hoist import Hoisted
from difuse.models import DiT


class Packed(Frozen):
    """A `Frozen` on a CPU, which cannot be saved either: its weights are packed."""

    def __init__(self, model, source, packed, modulations, workspaces):
        super().__init__(model, source, (torch.float32, torch.device("cpu")))
        self._packed, self._modulations, self._workspaces, self._alone = packed, modulations, workspaces, False

    @torch.no_grad()
    def forward(self, *args, **kwargs):
        """The model's own forward."""
        if not self._alone and self._source() is None:  # the model was let go, perhaps to save memory
            self._alone = True
            _return_freed_memory()
        with torch.autocast("cpu", enabled=False):
            return self.model(*args, **kwargs)

    @torch.inference_mode(False)
    @torch.no_grad()
    def hoist(self, times, labels):
        """This model for calls with t out of `times` [T] and y out of `labels` [L], its modulations computed already.

        It is called like this one, until this one is refreshed, and takes T * L times the modulations of a sample:
        0.8 MB for DiT-XL. `difuse.sample` does it by itself. Raises ValueError for a model that is not one of times
        and labels (DiT, SiT, diffusers' DiTTransformer2DModel), for other shapes or labels than it knows, and for so
        many pairs that they would take more memory than the weights that they spare.
        """
        times, labels = torch.as_tensor(times), torch.as_tensor(labels)
        if not self._modulations.products:
            raise ValueError(f"hoist: {type(self.model).__name__} is not known to be a model of times and labels "
                             "alone; call it as it is")
        for name, values in (("times", times), ("labels", labels)):
            if values.dim() != 1 or not len(values):
                raise ValueError(f"hoist: {name} have shape {tuple(values.shape)}; expected [n] with n >= 1")
        if len(times) * len(labels) > self._modulations.most_pairs(self.model):
            raise ValueError(f"hoist: {len(times)} times and {len(labels)} labels would take more memory than the "
                             f"weights that they spare; expected at most {self._modulations.most_pairs(self.model)} "
                             "pairs")
        with torch.autocast("cpu", enabled=False):
            return Hoisted(self, self._modulations, times, labels)

    def for_trajectory(self, times, labels):
        """What samplers call: of difuse's DiT `hoist(times, labels)`, if its tables are not too large."""
        if (type(self.model).forward is DiT.forward and labels.min() >= 0 and labels.max() <= self.model.num_classes
                and len(times) * len(labels) <= self._modulations.most_pairs(self.model)):
            return self.hoist(times, labels)
        return self  # which names what is wrong with a label

    def memory(self):
        """Bytes by kind: "packed" weights and biases, the "other" ones, this thread's "buffers" of activations."""
        packed = [tensor for product in set(self._packed.values()) for tensor in product.tensors()]
        return {kind: sum(t.numel() * t.element_size() for t in tensors) for kind, tensors in (
            ("packed", packed), ("other", [tensor for _, tensor in self._others()]))} | {
                "buffers": self._workspaces.here.nbytes()}

    def _read(self, source):
        for path, product in self._packed.items():
            product.pack(source.get_submodule(path))
        theirs = dict((*source.named_parameters(remove_duplicate=False),
                       *source.named_buffers(remove_duplicate=False)))
        for name, tensor in self._others():
            tensor.copy_(theirs[name])

    def _others(self):
        """(name, tensor) of everything that is not packed."""
        biases = {id(product.bias) for product in self._packed.values()}
        return [(name, tensor) for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())
                if id(tensor) not in biases]


def keep_freed_memory():
    """Let the C library keep the memory of one product's result for the next one, as far as it can.

    glibc gives freed memory back to the system, and fetching it page by page again took an eighth of the forward of a
    DiT-S/2, unless a block of 32 MB was freed before: from that it learns to keep up to twice as much.
    """
    torch.empty((32 << 20) - 8192, dtype=torch.uint8, device="cpu")


def _return_freed_memory():
    """Let glibc give the system what is free: weights of less than 32 MB each it would keep for good."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
