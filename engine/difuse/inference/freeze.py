"""`difuse.freeze(model)`: a copy of a model that only computes images, and has everything ready for that.

    frozen = difuse.freeze(model.eval())       # difuse's DiT, or any model that difuse.accelerate knows
    images = difuse.sample(frozen, labels, ...)
    pipe.transformer = difuse.freeze(pipe.transformer)

The copy runs our kernels as `accelerate` would have it. Its products are oneDNN's, on weights that were packed once,
the GELU of an MLP in the same pass as its first product; its modulations are computed before a loop whose times and
labels are known.
"""
import copy
import weakref
from collections import Counter

import torch
from torch import nn

from difuse.inference.packed import Known, Modulation, PackedLinear
from difuse.integrations.accelerate import accelerate
from difuse.integrations.registry import adapter_of
from difuse.models import DiT

_ROWS = 16  # of conditionings that are embedded at a time: the images beside them take memory
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def freeze(model, precision="fp32"):
    """A `Frozen` copy of `model`, called like it, for inference on a CPU. The model stays as it is.

    model: difuse's DiT, or a model with blocks that `difuse.accelerate` knows, in eval mode. precision: "fp32".
    The copy's weights are as of now: `frozen.refresh()` reads them again. Raises TypeError for what is no module,
    ValueError for a model in train mode, not on the CPU, with hooks or LoRA layers on it, without a block that
    accelerate knows, or for another precision.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: got {type(model).__name__}; expected a module, e.g. pipe.transformer")
    if isinstance(model, Frozen):
        raise ValueError("freeze: the model is frozen already")
    if precision != "fp32":
        raise ValueError(f"freeze: precision is {precision!r}; expected 'fp32', the only one so far")
    if model.training:
        raise ValueError("freeze: the model is in train mode; call model.eval() first")
    _check_modules(model)
    packable = _packable(model)
    # memo: the copy refers to these weights until they are packed, and never holds a second plain copy of them
    frozen = copy.deepcopy(model, {id(linear.weight): linear.weight for linear in packable.values()})
    if not isinstance(model, DiT):
        accelerate(frozen)
    packed = {path: PackedLinear(linear) for path, linear in packable.items()}
    for path, linear in packed.items():
        frozen.set_submodule(path, linear)
    _fuse_gelus(frozen)
    known = Known()
    for path, module in list(frozen.named_modules()):
        if path.rpartition(".")[2] == "adaLN_modulation":
            frozen.set_submodule(path, Modulation(module[1], known))
    return Frozen(frozen.float().requires_grad_(False), weakref.ref(model), packed, known)


class Frozen(nn.Module):
    """What `freeze` returns. Attributes that it has not are the copy's (config, num_classes, dtype, ...).

    Calls run without gradients and autocast. It cannot be trained, moved, converted, copied, pickled or saved.
    """

    def __init__(self, model, source, packed, known):
        super().__init__()
        self.model = model
        self._source, self._packed, self._known = source, packed, known
        self._modulations = [module for module in model.modules() if isinstance(module, Modulation)]
        self._hoisted = None
        super().train(False)

    @torch.no_grad()
    def forward(self, *args, **kwargs):
        """The model's own forward."""
        with torch.autocast("cpu", enabled=False):
            return self.model(*args, **kwargs)

    @torch.no_grad()
    def hoist(self, x, timesteps, labels):
        """Compute the modulations of every timestep [T] with every label [U] now, each weight read once.

        Calls whose timesteps and labels are among them look them up, others compute theirs. x [1,C,H,W]: any one
        sample. `difuse.sample` and the samplers do this by themselves. Keeps T * U rows of modulations, until other
        ones are asked for. A model whose modulations are not of DiT's kind is left as it is.
        """
        if not self._modulations:
            return
        labels = labels.unique()
        if self._hoisted and all(map(torch.equal, self._hoisted, (timesteps, labels))):
            return
        self._forget()
        t, y = timesteps.repeat_interleave(len(labels)), labels.repeat(len(timesteps))  # [T*U]
        self._known.conditionings = torch.cat([  # [T*U,D]
            self._conditioning(x, *pair) for pair in zip(t.split(_ROWS), y.split(_ROWS), strict=True)])
        for modulation in self._modulations:
            modulation.hoist()
        self._hoisted = timesteps.clone(), labels

    def refresh(self):
        """Read the weights of the model that this was made from again; RuntimeError if that model is gone."""
        source = self._source()
        if source is None:
            raise RuntimeError("Frozen: the model that it was made from is gone; freeze the model anew")
        self._forget()
        for path, linear in self._packed.items():
            linear.pack(source.get_submodule(path))
        theirs = {**dict(source.named_parameters(remove_duplicate=False)),
                  **dict(source.named_buffers(remove_duplicate=False))}
        with torch.no_grad():
            for name, tensor in self._others():
                tensor.copy_(theirs[name.replace("adaLN_modulation.linear.", "adaLN_modulation.1.")])

    def memory(self):
        """Bytes by kind: "packed" weights, the "other" ones, and what `hoist` keeps in "hoisted"."""
        tables = [self._known.conditionings, *(modulation.table for modulation in self._modulations)]
        kinds = {"packed": [t for linear in set(self._packed.values()) for t in (linear.weight, linear.bias)],
                 "other": [tensor for _, tensor in self._others()], "hoisted": tables}
        return {kind: sum(t.numel() * t.element_size() for t in tensors if t is not None)
                for kind, tensors in kinds.items()}

    def _others(self):
        """(name, tensor) of everything that is not packed."""
        packed = {id(linear.bias) for linear in self._packed.values()}
        return [(name, tensor) for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())
                if id(tensor) not in packed]

    def _conditioning(self, x, t, y):
        """What the model's first modulation is given for timesteps t [n] and labels y [n]."""
        def grab(_, arguments):
            raise _Grabbed(arguments[0])

        hook = self._modulations[0].register_forward_pre_hook(grab)
        try:
            self(x.expand(len(t), *x.shape[1:]), t, y)
        except _Grabbed as grabbed:
            return grabbed.args[0]
        finally:
            hook.remove()
        raise RuntimeError("Frozen: the model ran without one of its modulations; hoisting is not for it")

    def _forget(self):
        self._known.conditionings = self._hoisted = None
        for modulation in self._modulations:
            modulation.hoist()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self._modules:
                raise
            return getattr(self.model, name)

    def train(self, mode=True):
        """Only `train(False)`, which it is in already."""
        if mode:
            raise RuntimeError("Frozen: it holds packed weights, which cannot be trained; train the model it was made "
                               "from, then call refresh()")
        return self

    def _apply(self, fn, recurse=True):
        probe = fn(torch.zeros(1))
        if probe.dtype != torch.float32 or probe.device.type != "cpu":
            raise RuntimeError(f"Frozen: it stays float32 on the CPU and cannot go to {probe.dtype} on {probe.device}; "
                               "convert the model it was made from and freeze that")
        return self

    def state_dict(self, *args, **kwargs):
        """Raises RuntimeError: its weights are in no format that can be loaded."""
        raise RuntimeError("Frozen: its weights are packed for this machine; save the model it was made from")

    def __reduce_ex__(self, protocol):
        raise TypeError("Frozen: its weights are packed for this machine; copy or pickle the model it was made from "
                        "and freeze that")


class _Grabbed(Exception):  # noqa: N818  the way out of a forward, no error
    pass


def _check_modules(model):
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if devices != {"cpu"}:
        raise ValueError(f"freeze: the model is on {', '.join(sorted(devices)) or 'no device'}; expected the CPU. On a "
                         "GPU difuse.sample(..., graphs=difuse.Graphs()) replays its steps")
    for path, module in model.named_modules():
        path = path or "the model"
        if type(module).__module__.split(".")[0] == "peft":
            raise ValueError(f"freeze: {path} is a {type(module).__name__} of peft; merge it into its layer first, "
                             "e.g. with model.fuse_lora() or merge_and_unload(), and unload it")
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise ValueError(f"freeze: {path} has hooks, which a frozen model would not call; remove them first")
        forward = vars(module).get("forward")
        if forward is not None and adapter_of(forward) is None:
            raise ValueError(f"freeze: the forward of {path} was replaced by somebody; take that back first")


def _packable(model):
    """{path: nn.Linear} of the products over tokens: not those of modulations, nor those that share their weight."""
    linears = {path: module for path, module in model.named_modules(remove_duplicate=False)
               if type(module) is nn.Linear and "adaLN_modulation" not in path.split(".")}
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    return {path: linear for path, linear in linears.items() if owners[id(linear.weight)] == 1}


def _fuse_gelus(model):
    """Let the product before a GELU compute it in the same pass."""
    for path, module in list(model.named_modules()):
        name = f"{type(module).__module__}.{type(module).__name__}"
        if name == "diffusers.models.activations.GELU":
            module.proj.activation = "gelu", module.approximate
            model.set_submodule(path, module.proj)
        elif name == "diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock":
            _fuse(module, "proj_mlp", "act_mlp")
        elif {"fc1", "act", "fc2"} <= module._modules.keys() and type(module.act) is nn.GELU:
            _fuse_if_equal(module)


def _fuse(module, product, act):
    module._modules[product].activation = "gelu", module._modules[act].approximate
    module._modules[act] = nn.Identity()


def _fuse_if_equal(mlp):
    """Fuse the GELU of somebody's MLP, unless it does more with fc1 than to activate it."""
    fc1, act = mlp.fc1, mlp.act
    if not isinstance(fc1, PackedLinear) or fc1.out_features != mlp.fc2.in_features:  # or a GELU of one half, a gate
        return
    x = torch.randn(2, 5, fc1.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = mlp(x)
        _fuse(mlp, "fc1", "act")
        if not torch.allclose(mlp(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()):
            fc1.activation, mlp.act = ("none", ""), act
