"""difuse_kernels: the hot paths of diffusion transformers, each with a contract, a reference and kernels.

    op                                              contract, reference, launchers       C++ kernels
    attention                                       attention/                           csrc/attention/
    norm_modulate, gate_residual,
    gate_residual_norm_modulate                     adaln/                               csrc/adaln/
    patchify, unpatchify                            patchify/                            csrc/patchify/
    sampler_step                                    sampler_step/                        csrc/sampler_step/

`<op>/<op>.py` is the contract, `<op>/<op>_reference.py` the specification in plain PyTorch, `<op>/<op>_cpu.py` the
launcher of the C++ kernel. `dispatch.py` chooses; `python -m difuse_kernels` prints what runs on this machine.
"""
from difuse_kernels.adaln.adaln import gate_residual, gate_residual_norm_modulate, norm_modulate
from difuse_kernels.attention.attention import attention
from difuse_kernels.dispatch import use_backend
from difuse_kernels.explaining import explain, explain_reset
from difuse_kernels.patchify.patchify import patchify, unpatchify
from difuse_kernels.sampler_step.sampler_step import sampler_step

__all__ = [
    "attention", "explain", "explain_reset", "gate_residual", "gate_residual_norm_modulate", "norm_modulate",
    "patchify", "sampler_step", "unpatchify", "use_backend",
]
