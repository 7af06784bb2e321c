"""Keys and values of cross-attention, computed once per prompt instead of once per step of a trajectory.

    with difuse.cache_conditioning(pipe.transformer):
        pipe(prompt)
"""
import threading
import weakref

import torch
from torch import nn

from difuse.integrations.parts import must_not_wait, watched
from difuse.integrations.registry import adapter_of
from difuse_kernels.dispatch import forced_backend

_KEPT = 4  # conditionings; classifier-free guidance in calls of their own needs 2
_PROBES = 64  # elements of each weight that are compared by value
_running = threading.local()  # .caches: those whose model is in its forward here, innermost last


def cache_conditioning(model):
    """Keep the keys and values that accelerated cross-attentions of `model` compute. Returns a `ConditioningCache`.

    model: a module whose blocks `difuse.accelerate` has replaced; its cross-attentions then project every conditioning
    (prompt, image tokens) once. Ends with the `with` statement, or with restore() where it was called without one.
    Results are bit-equal: kept tensors are used while the conditioning has equal values, under the same autocast and
    backend, and weights, adapters (LoRA) and their scaling are the same; with gradients, under torch.compile, with
    dropout or with hooks on the projections everything is computed as ever. Weights are compared by address and
    version, and by 64 values each at the start of every forward, for edits through `.data`, which versions do not see;
    after an edit through `.data` of a few elements call clear().

    Memory: at most 4 conditionings, the least recently used goes first; each takes 2*B*T*D elements in every
    cross-attention of T tokens (Wan 1.3B, B = 1, 512 tokens, bfloat16: 94 MB for all 30 blocks). A deepcopy or pickle
    of the model carries none of it.

    Raises TypeError if model is no module, ValueError if nothing in it is accelerated, or if it is sharded (FSDP).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"cache_conditioning: got {type(model).__name__}; expected a module, e.g. pipe.transformer")
    if not any(adapter_of(vars(module).get("forward")) for module in model.modules()):
        raise ValueError(f"cache_conditioning: nothing in {type(model).__name__} is accelerated; call "
                         "difuse.accelerate(model) first")
    if any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel")
           for module in model.modules() for cls in type(module).__mro__):
        raise ValueError(f"cache_conditioning: {type(model).__name__} is sharded; its weights are gathered anew in "
                         "every forward, and changes of them cannot be seen. Sample from an unsharded copy")
    return ConditioningCache(model)


def end_caches(model):
    """Restore every cache that `cache_conditioning` put on `model` or on a module in it."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(cache := getattr(hook, "__self__", None), ConditioningCache):
                cache.restore()


def cached(attn, encoder_hidden_states, compute):
    """compute(), the keys and values of encoder_hidden_states [B,T,D] in `attn`, or what it returned for equal ones."""
    if torch.compiler.is_compiling() or not getattr(_running, "caches", None) or not _repeatable(encoder_hidden_states):
        return compute()
    return _running.caches[-1]._find(attn, encoder_hidden_states, compute)


class ConditioningCache:
    """What `cache_conditioning` returns. hits, misses: how often keys and values were found, and computed."""

    def __init__(self, model):
        self.hits = self.misses = self._next = 0
        self._lock, self._thread = threading.RLock(), threading.local()  # one model may run in several threads
        self.clear()
        self._hooks = () if model is None else (
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True))

    def __reduce__(self):
        return ConditioningCache, (None,)  # hooks of a copied model lead to an empty cache, which stays empty

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.restore()

    def restore(self):
        """Forget everything and keep nothing from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()
        self._end(None, None, None)
        self.clear()

    def clear(self):
        """Forget everything kept so far."""
        with self._lock:
            self._conditionings = {}  # number -> (settings, values), the least recently used first
            self._kept = weakref.WeakKeyDictionary()  # attention -> _Kept
            self._thread.same = []

    def _begin(self, _model, _args):
        if torch.compiler.is_compiling() or not self._hooks:
            return
        self._thread.same = []  # (tensor, its version, settings, number) met in this forward
        with self._lock:
            for attn, kept in list(self._kept.items()):
                if not kept.unchanged(attn):
                    del self._kept[attn]
        _running.caches = [*getattr(_running, "caches", ()), self]

    def _end(self, _model, _args, _output):
        if torch.compiler.is_compiling():
            return
        _running.caches = [cache for cache in getattr(_running, "caches", ()) if cache is not self]
        self._thread.same = []

    def _find(self, attn, encoder_hidden_states, compute):
        state = _state(attn)
        if state is None:
            return compute()
        with self._lock:
            number = self._number(encoder_hidden_states)
            kept = self._kept.get(attn)
            if kept is not None and kept.state == state and number in kept.results:
                self.hits += 1
                return kept.results[number]
            self.misses += 1
        result = compute()
        if not self._hooks or _state(attn) != state:  # the weights come and go with every call (offloading)
            return result
        with self._lock:
            kept = self._kept.get(attn)
            if kept is None or kept.state != state:
                kept = self._kept[attn] = _Kept(attn, state)
            if number in self._conditionings:  # another thread's conditionings may have pushed it out
                kept.results[number] = result
        return result

    def _number(self, values):
        """Of this conditioning, by value; by identity within a forward, where all blocks get the same tensor."""
        settings = (values.dtype, values.device, values.shape, torch.is_autocast_enabled(values.device.type),
                    torch.get_autocast_dtype(values.device.type), forced_backend())
        for tensor, version, its_settings, number in self._thread.same:
            if (number in self._conditionings and tensor is values and version is not None
                    and version == _version(values) and its_settings == settings):
                return number
        number = next((number for number, (its_settings, copy) in self._conditionings.items()
                       if its_settings == settings and torch.equal(copy, values)), self._next)
        if number == self._next:
            self._next += 1
            self._conditionings[number] = settings, values.clone()
            if len(self._conditionings) > _KEPT:
                self._forget(next(iter(self._conditionings)))
        else:
            self._conditionings[number] = self._conditionings.pop(number)  # the most recently used is the last
        self._thread.same.append((values, _version(values), settings, number))
        return number

    def _forget(self, number):
        del self._conditionings[number]
        self._thread.same = [entry for entry in self._thread.same if entry[-1] != number]
        for kept in self._kept.values():
            kept.results.pop(number, None)


class _Kept:
    """Of one attention: results by number of the conditioning, and what they were computed with."""

    def __init__(self, attn, state):
        self.state, self.results = state, {}
        self.weights = [weight.detach() for weight in _weights(attn)]  # alive, so that no other gets their address
        self.probes = [_probe(weight).clone() for weight in self.weights]

    def unchanged(self, attn):
        return (self.state == _state(attn) and all(
            torch.equal(probe, _probe(weight)) for probe, weight in zip(self.probes, _weights(attn), strict=True)))


def _repeatable(values):
    """Whether what is computed now may be used by a later call."""
    return (not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
            and torch.autograd.forward_ad._current_level < 0
            and not must_not_wait(values))


def _weights(attn):
    return [*attn.parameters(), *attn.buffers()]


def _probe(weight):
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _PROBES)]


def _version(tensor):
    return None if tensor.is_inference() else tensor._version


def _state(attn):
    """All that keys and values depend on but the conditioning, comparable; None where they must be computed."""
    found = []
    for module in attn.modules():
        if (isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
                or module is not attn and watched(module)):
            return None
        found.append((module, module.training))
        if not type(module).__module__.startswith("torch.nn."):  # an attention's options, an adapter's scaling
            found += [(name, _plain(value)) for name, value in vars(module).items() if name not in _OF_MODULES]
    for weight in _weights(attn):
        if weight.is_meta or weight.is_inference():  # not here now, or without a version
            return None
        found.append((weight.data_ptr(), weight._version, weight.dtype, weight.device, weight.shape, weight.stride()))
    return found


_OF_MODULES = frozenset(vars(nn.Module()))


def _plain(value):
    """value in a form that == compares: containers opened, objects by identity."""
    if isinstance(value, dict):
        return tuple((key, _plain(item)) for key, item in value.items())
    if isinstance(value, (list, tuple, set)):
        return tuple(map(_plain, value))
    comparable = isinstance(value, (int, float, str, type(None))) or type(value).__eq__ is object.__eq__
    return value if comparable else id(value)
