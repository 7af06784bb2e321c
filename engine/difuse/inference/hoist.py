"""What depends on times and labels alone, computed once for a whole trajectory: every modulation of adaLN.

    hoisted = frozen.hoist(times, labels)  # all that the trajectory will ask for
    hoisted(x, t, y)  # frozen(x, t, y), and no adaLN weight is read

A step on a few rows reads each of these weights, a third of a DiT's, to multiply it with those rows; here each is read
once, in one product for all rows of all steps. Results differ by the rounding of a product of another size.
"""
import functools
import inspect
import threading

import torch
from torch import nn

from difuse.inference.around import Around
from difuse.inference.packed import PackedProduct
from difuse.models import DiT

_DIFFUSERS_DIT = "diffusers.models.transformers.dit_transformer_2d.DiTTransformer2DModel"
_SAME = 1e-4  # relative: far above the rounding of c, far below another c
_running = threading.local()  # .rows: {product: (silu(c) [B,D], its result [B,N])} during the forward of a `Hoisted`


class Modulations:
    """Of a model of times and labels: `products` {path: function of t [U], y [U] that gives its c [U,D]}.

    They multiply silu(c). arguments: the names of t and y in the model's forward. Known are difuse's DiT,
    facebookresearch's DiT and SiT, and diffusers' DiT; another model has no products.
    """

    def __init__(self, model):
        self.products, self.arguments = {}, ("t", "y")
        if f"{type(model).__module__}.{type(model).__name__}" == _DIFFUSERS_DIT:
            self.arguments = "timestep", "class_labels"
            for i, block in enumerate(model.transformer_blocks):  # each may have an embedder of its own
                self.products[f"transformer_blocks.{i}.norm1.linear"] = functools.partial(
                    block.norm1.emb, hidden_dtype=torch.float32)
            self.products["proj_out_1"] = self.products["transformer_blocks.0.norm1.linear"]
        elif {"t_embedder", "y_embedder", "blocks", "final_layer"} <= model._modules.keys():
            options = () if isinstance(model, DiT) else (False,)  # facebookresearch's asks whether to drop labels

            def embedded(t, y):
                return model.t_embedder(t) + model.y_embedder(y, *options)  # [U,D]

            parts = {f"blocks.{i}": block for i, block in enumerate(model.blocks)} | {"final_layer": model.final_layer}
            if all(_is_modulation(getattr(part, "adaLN_modulation", None)) for part in parts.values()):
                self.products = {f"{path}.adaLN_modulation.1": embedded for path in parts}

    def most_pairs(self, model):
        """How many pairs of t and y take no more memory than these weights: as many as c has channels."""
        return min((model.get_submodule(path).in_features for path in self.products), default=0)

    def given(self, model, args, kwargs):
        """t [B] and y [B] of a call of the model."""
        arguments = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        missing = [name for name in self.arguments if not isinstance(arguments.get(name), torch.Tensor)]
        if missing:
            raise ValueError(f"Hoisted: the call has no tensor {' and no '.join(missing)}; call the frozen model "
                             "itself")
        return [arguments[name] for name in self.arguments]


def _is_modulation(module):
    return (isinstance(module, nn.Sequential) and len(module) == 2 and type(module[0]) is nn.SiLU
            and isinstance(module[1], (nn.Linear, PackedProduct)))


def make_hoistable(model):
    """Let the modulations of a frozen model's own copy be looked up. Returns them."""
    modulations = Modulations(model)
    for path in modulations.products:
        product = model.get_submodule(path)
        product.forward = functools.partial(_looked_up, product)
    return modulations


def _looked_up(product, given):
    """What is kept for silu(c) [B,D], if that is what is given: a descendant of a model may make another c."""
    kept = (getattr(_running, "rows", None) or {}).get(product)
    if kept is None:
        return type(product).forward(product, given)  # [B,N]
    known, result = kept
    if len(given) and (given - known).abs().max() > _SAME * known.abs().max():
        raise RuntimeError("Hoisted: the model's modulations depend on more than t and y, or otherwise than those of "
                           "DiT do; call the frozen model itself")
    return result


class Hoisted(Around):
    """`frozen` for the pairs of `times` and `labels`: what `Frozen.hoist` returns. It never changes."""

    def __init__(self, frozen, modulations, times, labels):
        super().__init__()
        self.model = frozen
        self._modulations, self._refreshed = modulations, frozen.refreshed
        self._times, self._labels = times.float(), labels.clone()  # embeddings take times in float32
        t, y = times.repeat_interleave(len(labels)), labels.repeat(len(times))  # [U], [U]
        self._tables, rows = {}, {}  # {product: (silu(c), its result)}, {what computes c: silu(c)}
        for path, embedded in modulations.products.items():
            if embedded not in rows:
                try:
                    rows[embedded] = nn.functional.silu(embedded(t, y))  # [U,D]
                except IndexError as error:
                    raise ValueError(f"hoist: the model has no embedding of one of the labels {labels.tolist()}; "
                                     f"{error}") from error
            product = frozen.model.get_submodule(path)
            self._tables[product] = rows[embedded], product(rows[embedded])  # [U,D], [U,N]
        super().train(False)

    def forward(self, *args, **kwargs):
        """The model's own. Raises ValueError for other times and labels, RuntimeError after a refresh."""
        if self._refreshed != self.model.refreshed:
            raise RuntimeError("Hoisted: the frozen model was refreshed since; hoist anew")
        t, y = self._modulations.given(self.model.model, args, kwargs)
        index = _find("time", self._times, t.float()) * len(self._labels) + _find("label", self._labels, y)  # [B]
        outer = getattr(_running, "rows", None)
        _running.rows = {product: (c[index], table[index]) for product, (c, table) in self._tables.items()}
        try:
            return self.model(*args, **kwargs)
        finally:
            _running.rows = outer

    def memory(self):
        """Bytes by kind, the frozen model's and the "hoisted" tables."""
        tensors = {id(tensor): tensor for pair in self._tables.values() for tensor in pair}
        return self.model.memory() | {"hoisted": sum(tensor.nbytes for tensor in tensors.values())}


def _find(kind, known, given):
    """The index [B] of every given value in `known`; the model itself refuses other shapes than [B]."""
    given = given.reshape(-1)
    equal = given[:, None] == known  # [B,n]
    if not equal.any(1).all():
        missing = given[~equal.any(1)][0].item()
        raise ValueError(f"Hoisted: {kind} {missing:g} is none of the {len(known)} that were hoisted; name all "
                         "that the trajectory will ask for")
    return equal.int().argmax(1)
