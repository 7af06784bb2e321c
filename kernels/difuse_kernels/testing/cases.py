"""Every named case of every op. Tests run the small ones, benchmarks the ones marked `speed`."""
from difuse_kernels.testing import (
    adaln_cases,
    attention_cases,
    gated_activation_cases,
    gelu_tanh_cases,
    gram_cases,
    group_norm_act_cases,
    patchify_cases,
    qk_norm_rope_cases,
    sampler_step_cases,
)

CASES = [*adaln_cases.CASES, *attention_cases.CASES, *gated_activation_cases.CASES, *gelu_tanh_cases.CASES,
         *gram_cases.CASES, *group_norm_act_cases.CASES, *patchify_cases.CASES, *sampler_step_cases.CASES,
         *qk_norm_rope_cases.CASES]


def cases(op=None, speed=False):
    """The cases of one op, or of all; the small ones, or the ones to be timed."""
    return [case for case in CASES if case.speed == speed and op in (None, case.op)]
