"""What the frozen models of CPUs and of GPUs have in common."""
import torch

from difuse.inference.around import Around


class Frozen(Around):
    """What `freeze` returns. Other attributes than its methods are the copy's (config, num_classes, dtype, ...).

    Calls run without gradients and autocast. It cannot be trained, moved, converted, copied or pickled, and is no
    instance of the model's class.

    model: the copy; source: a weak reference to the model it is of; expected: the dtype and device that it stays in. A
    subclass has `_read(source)`, which takes over the weights of the source, and `memory()`, bytes by kind.
    """

    def __init__(self, model, source, expected):
        super().__init__()
        self.model, self._source, self._expected, self._refreshed = model, source, expected, 0
        self._structure = structure(source())
        model.register_load_state_dict_pre_hook(_refuse_weights)  # here, before a part of them is loaded
        super().train(False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self):
        """Read the weights of the model that this was made from again. Keep that model if you want to.

        Raises RuntimeError, before anything is read, if it is gone or is no longer built as it was then.
        """
        source = self._source()
        if source is None:
            raise RuntimeError("Frozen: the model that it was made from is gone; freeze the model anew")
        if structure(source) != self._structure:
            raise RuntimeError("Frozen: the model that it was made from has other modules, shapes or dtypes by now; "
                               "freeze it anew")
        self._refreshed += 1  # first: what was made of the old weights is of no use from now on
        self._read(source)

    @property
    def refreshed(self):
        """How many times `refresh` was called."""
        return self._refreshed

    def __setattr__(self, name, value):
        if name in ("model", "training", "forward") or name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self.model, name, value)

    def train(self, mode=True):
        """Only `train(False)`, which it is in already."""
        if mode:
            raise RuntimeError("Frozen: it cannot be trained; train the model it was made from, then call refresh()")
        return self

    def requires_grad_(self, requires_grad=True):
        """Only `requires_grad_(False)`, which changes nothing: it has no gradients."""
        if requires_grad:
            raise RuntimeError("Frozen: it has no gradients; train the model it was made from, then call refresh()")
        return self

    def _apply(self, fn, recurse=True):
        dtype, device = self._expected
        probe = fn(torch.zeros(1, dtype=dtype, device=device))
        if probe.dtype != dtype or probe.device != device:
            raise RuntimeError(f"Frozen: it stays {dtype} on {device} and cannot go to {probe.dtype} on "
                               f"{probe.device}; convert the model it was made from and freeze that")
        return self

    def __reduce_ex__(self, protocol):
        raise TypeError("Frozen: it is made for this machine; copy or pickle the model it was made from and freeze "
                        "that")


def _refuse_weights(*_):
    raise RuntimeError("Frozen: it loads no weights; load them into the model it was made from, then refresh()")


def structure(model):
    """All that a copy takes over but the values of weights: comparable."""
    return ([(path, type(module)) for path, module in model.named_modules()],
            [(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in (
                *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))])
