"""DiT, Peebles & Xie 2023, "Scalable Diffusion Models with Transformers" (arXiv:2212.09748), adaLN-Zero."""
import torch
from torch import nn

from difuse.models.layers import DiTBlock, FinalLayer, LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_2d
from difuse_kernels import unpatchify

SIZES = {  # the paper's table 1
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
NAMES = {f"DiT-{size}/{patch}": {**table, "patch_size": patch} for size, table in SIZES.items() for patch in (2, 4, 8)}
IMAGENET_256 = {"input_size": 32, "in_channels": 4, "num_classes": 1000}  # latents of 256 x 256 images


class DiT(nn.Module):
    """Diffusion transformer on square images or latents, conditioned on time and class.

    Args: input_size (side of the image, a multiple of patch_size), patch_size, in_channels, hidden_size (with
    hidden_size / num_heads a multiple of 8 up to 256), depth, num_heads, mlp_ratio,
    class_dropout_prob (label dropout for classifier-free guidance), num_classes, learn_sigma (twice the channels out).
    `config` holds them all, ready for JSON. Raises ValueError for sizes that do not fit together.
    """

    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio=4.0,
                 class_dropout_prob=0.1, *, num_classes, learn_sigma=False):
        super().__init__()
        self.config = {
            "input_size": input_size, "patch_size": patch_size, "in_channels": in_channels,
            "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio,
            "class_dropout_prob": class_dropout_prob, "num_classes": num_classes, "learn_sigma": learn_sigma,
        }
        _check_config(self.config)
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes = num_classes  # also the null class
        grid = input_size // patch_size
        self.grid = (grid, grid)

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.register_buffer("pos_embed", sincos_2d(grid, hidden_size)[None])  # [1,S,D]
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels * (2 if learn_sigma else 1))
        self.initialize_weights()

    @classmethod
    def from_name(cls, name, **overrides):
        """A model of the paper's table, "DiT-S/2" to "DiT-XL/8", for ImageNet-256 latents; overrides win.

        Raises ValueError for an unknown name, TypeError for an unknown override.
        """
        if name not in NAMES:
            raise ValueError(f"DiT.from_name: {name!r} is unknown; expected one of {', '.join(NAMES)}")
        return cls(**{**IMAGENET_256, **NAMES[name], **overrides})

    def initialize_weights(self):
        """As in the paper: every block starts as the identity and the model's output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def load_facebookresearch(self, state_dict):
        """Load a state_dict of facebookresearch/DiT: the same names, its patch convolution [D,C,p,p] flattened."""
        weight = "x_embedder.proj.weight"
        self.load_state_dict({**state_dict, weight: state_dict[weight].flatten(1)})

    def forward(self, x, t, y):
        """x [B,C,H,W], t [B] (integer or float), y [B] int64 in [0,num_classes] -> [B,C,H,W], 2C with learn_sigma.

        Computes in the dtype of the weights, or of torch.autocast. In train() labels are dropped with probability
        class_dropout_prob, drawn from torch's default generator; y == num_classes is the null class.
        Raises ValueError for a wrong shape or a label out of range (looked for on CPU only), TypeError for a dtype.
        """
        self._check_inputs(x, t, y)
        x = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed  # [B,S,D]
        c = self.t_embedder(t) + self.y_embedder(y)  # [B,D]
        branch = gate = None
        for block in self.blocks:
            x, branch, gate = block(x, branch, gate, c)  # [B,S,D], [B,S,D], [B,D]
        tokens = self.final_layer(x, branch, gate, c)  # [B,S,p*p*C']
        return unpatchify(tokens, self.patch_size, self.grid, order="pqc")  # [B,C',H,W]

    def _check_inputs(self, x, t, y):
        image = (self.in_channels, self.input_size, self.input_size)
        if x.dim() != 4 or x.shape[1:] != image:
            raise ValueError(f"DiT: x has shape {tuple(x.shape)}; expected [B,{','.join(map(str, image))}]. "
                             "Resize the images, or build the model with another input_size or in_channels")
        if not x.is_floating_point():
            raise TypeError(f"DiT: x has dtype {x.dtype}; expected a floating dtype. Scale the images to [-1,1] first")
        for name, value in (("t", t), ("y", y)):
            if value.shape != x.shape[:1]:
                raise ValueError(f"DiT: {name} has shape {tuple(value.shape)}; expected {tuple(x.shape[:1])}, "
                                 "one value per sample of x")
        if t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"DiT: t has dtype {t.dtype}; expected an integer or floating dtype")
        if y.dtype != torch.int64:
            raise TypeError(f"DiT: y has dtype {y.dtype}; expected torch.int64. Convert it with .long()")
        # reading values would break a compiled graph, and make a GPU wait
        if y.device.type == "cpu" and not torch.compiler.is_compiling() and y.numel():
            low, high = y.min().item(), y.max().item()
            if low < 0 or high > self.num_classes:
                raise ValueError(f"DiT: y holds labels from {low} to {high}; expected 0 to {self.num_classes - 1}, "
                                 f"or {self.num_classes} for the null class")


def _check_config(config):
    for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"DiT: {name} is {config[name]!r}; expected an integer >= 1")
    if config["input_size"] % config["patch_size"]:
        raise ValueError(f"DiT: input_size {config['input_size']} is not a multiple of patch_size "
                         f"{config['patch_size']}")
    head_dim, rest = divmod(config["hidden_size"], config["num_heads"])
    if rest or head_dim % 8 or head_dim > 256:
        raise ValueError(f"DiT: hidden_size {config['hidden_size']} over {config['num_heads']} heads is a head_dim of "
                         f"{config['hidden_size'] / config['num_heads']:g}; expected a multiple of 8 up to 256")
    if not 0 <= config["class_dropout_prob"] <= 1:
        raise ValueError(f"DiT: class_dropout_prob is {config['class_dropout_prob']}; expected 0 to 1")
