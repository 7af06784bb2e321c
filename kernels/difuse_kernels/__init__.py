"""difuse_kernels: the hot paths of diffusion transformers, each with a contract, a reference and kernels.

    op                                              contract, reference, launchers       C++ and CUDA C++ kernels
    attention                                       attention/                           csrc/attention/
    norm_modulate, gate_residual,
    gate_residual_norm_modulate,
    norm_modulate_dual                              adaln/                               csrc/adaln/
    dit_block                                       dit_block/                           csrc/dit_block/ (CPU)
    gated_activation                                gated_activation/                    csrc/gated_activation/
    gelu_tanh                                       gelu_tanh/                           csrc/gelu_tanh/ (CPU)
    gram                                            gram/                                csrc/gram/ (CPU)
    group_norm_act                                  group_norm_act/                      csrc/group_norm_act/ (CPU)
    packed_linear                                   linear/                              csrc/linear/ (CPU)
    patchify, unpatchify                            patchify/                            csrc/patchify/
    qk_norm_rope, qk_norm_rope_joint                qk_norm_rope/                        csrc/qk_norm_rope/
    sampler_step                                    sampler_step/                        csrc/sampler_step/

`<op>/<op>.py` is the contract, `<op>/<op>_reference.py` the specification in plain PyTorch, `<op>/<op>_native.py` the
launcher of the C++ kernels for CPUs and CUDA, `<op>/<op>_triton.py` the kernels in Triton. `dispatch.py` chooses;
`python -m difuse_kernels` prints what runs on this machine.
"""
from difuse_kernels.adaln.adaln import gate_residual, gate_residual_norm_modulate, norm_modulate
from difuse_kernels.adaln.norm_modulate_dual import norm_modulate_dual
from difuse_kernels.attention.attention import attention, attention_packed
from difuse_kernels.dispatch import use_backend
from difuse_kernels.dit_block.dit_block import Workspace, dit_block
from difuse_kernels.explaining import explain, explain_reset
from difuse_kernels.gated_activation.gated_activation import gated_activation
from difuse_kernels.gelu_tanh.gelu_tanh import gelu_tanh
from difuse_kernels.gram.gram import gram
from difuse_kernels.group_norm_act.group_norm_act import group_norm_act
from difuse_kernels.linear.linear import Codes, PackedWeight, pack_linear, packed_linear
from difuse_kernels.patchify.patchify import patchify, unpatchify
from difuse_kernels.qk_norm_rope.qk_norm_rope import Stream, qk_norm_rope, qk_norm_rope_joint
from difuse_kernels.sampler_step.sampler_step import sampler_step

__all__ = [
    "Codes", "PackedWeight", "Stream", "Workspace", "attention", "attention_packed", "dit_block", "explain",
    "explain_reset", "gate_residual", "gate_residual_norm_modulate", "gated_activation", "gelu_tanh", "gram",
    "group_norm_act", "norm_modulate", "norm_modulate_dual", "pack_linear", "packed_linear", "patchify", "qk_norm_rope",
    "qk_norm_rope_joint", "sampler_step", "unpatchify", "use_backend",
]
