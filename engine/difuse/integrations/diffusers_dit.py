"""DiT in diffusers: DiTTransformer2DModel. Its blocks: diffusers_basic_block.py.

Every block owns a copy of one embedder of timestep and label (norm1.emb), and a forward runs each of them, the first
one twice. Here the first embedding serves all blocks whose copies are proved equal, which gives the same bits.
"""
import weakref

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from difuse.integrations.diffusers_parts import Embedded
from difuse.integrations.parts import must_not_wait, plain_norm, rows, watched
from difuse.integrations.registry import register
from difuse_kernels import norm_modulate, unpatchify

_PROBES = 8  # elements of every weight that are compared in every forward
_proved = weakref.WeakKeyDictionary()  # model -> the state of its embedders when their weights were found equal


def _unhooked(module):
    """Whether a call of the module is its forward, the class's own or ours, and nothing else."""
    return not watched(module)


def _shares(block, embedder):
    """Whether this block takes an `Embedded`: accelerated, and nobody watches what its embedder's modules do or get."""
    return (_unhooked(block) and "forward" in vars(block) and _unhooked(block.norm1) and "forward" in vars(block.norm1)
            and all(_unhooked(module) and not module.training for module in embedder))


def _options(embedder):
    """Everything but weights that embeddings depend on; None where a module is not torch's or diffusers' own."""
    if not all(type(module).__module__.startswith(("torch.", "diffusers.")) for module in embedder):
        return None
    return [(type(module), [value for value in vars(module).values() if isinstance(value, (bool, int, float, str))])
            for module in embedder]


def _equal(model, embedders):
    """Whether these embedders, each the list of its modules, are copies of one.

    All elements are compared once, and again when an address or a version of a weight has changed. An edit through
    `.data`, of an EMA's swap for instance, changes neither: so in every forward a few elements of every weight,
    evenly spread, are compared by value, which sees a copy that was edited as a whole, but not one edited in a few
    elements. That takes a fiftieth of the time of 28 embedders (width 1152, B = 2, on a busy CPU: 3.3 of 175 ms).
    """
    options = [_options(embedder) for embedder in embedders]
    weights = [[weight for module in embedder for weight in (*module._parameters.values(), *module._buffers.values())
                if weight is not None] for embedder in embedders]
    shapes = [[(weight.shape, weight.dtype, weight.device) for weight in copy] for copy in weights]
    if (options[0] is None or options.count(options[0]) < len(options) or shapes.count(shapes[0]) < len(shapes)
            or any(type(weight.data) is not torch.Tensor or weight.is_meta or weight.is_inference()
                   or not weight.is_contiguous() for copy in weights for weight in copy)):
        return False
    probes = torch.cat([weight.detach().view(-1)[:: weight.numel() // _PROBES | 1]
                        for copy in weights for weight in copy]).view(len(weights), -1)
    if not torch.equal(probes[1:], probes[:1].expand(len(weights) - 1, -1)):
        return False
    state = shapes, [(weight.data_ptr(), weight._version) for copy in weights for weight in copy]
    if _proved.get(model) != state:
        _proved.pop(model, None)
        if not all(torch.equal(*pair) for copy in weights[1:] for pair in zip(copy, weights[0], strict=True)):
            return False
        _proved[model] = state
    return True


def _sharing(model, x):
    """The blocks that share one embedding in this forward, perhaps none.

    None with gradients, which belong to every copy; in train mode, where each copy drops labels of its own; where
    values cannot be compared: torch.compile, torch.func, capture of a CUDA graph.
    """
    if (torch.is_grad_enabled() or model.training or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
            or must_not_wait(x)):
        return []
    embedders = {block: list(block.norm1.emb.modules()) for block in model.transformer_blocks}
    embedders = {block: modules for block, modules in embedders.items() if _shares(block, modules)}
    return list(embedders) if len(embedders) > 1 and _equal(model, list(embedders.values())) else []


@register("diffusers.models.transformers.dit_transformer_2d.DiTTransformer2DModel", kind="part",
          refuses=lambda model: plain_norm(model, "norm_out"), ops=("norm_modulate", "unpatchify"))
def dit_transformer(self, hidden_states, timestep=None, class_labels=None, cross_attention_kwargs=None,
                    return_dict=True):
    """Image [B,C,H,W], timestep [B], class_labels [B] -> [B,C',H,W]."""
    if watched(self.norm_out):
        return type(self).forward(self, hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict)
    blocks = self.transformer_blocks
    x = self.pos_embed(hidden_states)  # [B,S,D]
    sharing, embedded = _sharing(self, x), None
    if sharing:
        embedded = Embedded(timestep, sharing[0].norm1.emb(timestep, class_labels, hidden_dtype=x.dtype), x.dtype)
    for block in blocks:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            x = self._gradient_checkpointing_func(block, x, None, None, None, timestep, cross_attention_kwargs,
                                                  class_labels)
        else:
            x = block(x, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
                      timestep=embedded if block in sharing else timestep,
                      cross_attention_kwargs=cross_attention_kwargs, class_labels=class_labels)
    if blocks[0] in sharing and embedded.dtype == x.dtype:
        conditioning = embedded.embedding  # [B,D]
    else:
        conditioning = blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)  # [B,D]
    shift, scale = rows(self.proj_out_1(F.silu(conditioning)), x).chunk(2, dim=1)  # each [B,D]
    tokens = self.proj_out_2(norm_modulate(x.contiguous(), scale, shift, eps=self.norm_out.eps))  # [B,S,p*p*C']
    side = int(tokens.shape[1] ** 0.5)  # images are square here
    output = unpatchify(tokens, self.patch_size, (side, side), order="pqc")  # [B,C',H,W]
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)
