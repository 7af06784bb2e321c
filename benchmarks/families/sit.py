"""SiT: DiT's network under other names; the half of the output that would be the variance is dropped."""
from benchmarks.families import facebook_dit
from benchmarks.families.family import Family


class SiTBlock(facebook_dit.DiTBlock):
    pass


class SiT(facebook_dit.DiT):
    """x [B,C,H,W], t [B] in [0,1], y [B] -> velocity [B,C,H,W]."""

    block = SiTBlock

    def forward(self, x, t, y):
        x = super().forward(x, t, y)
        return x.chunk(2, dim=1)[0] if self.learn_sigma else x  # [B,C,H,W]


FAMILY = Family(
    name="sit", title="SiT", build=lambda: facebook_dit.build(SiT),
    inputs=lambda dtype: facebook_dit.inputs(dtype, scale=1.0), blocks=3,
    wide={"XL/2 block, 2 x 256 tokens": facebook_dit.wide(SiTBlock, 2, 256)},
    sample="x", time="t", times=(0.0, 1.0), lora=("qkv", "fc1"))
