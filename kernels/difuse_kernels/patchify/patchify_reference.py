"""patchify and unpatchify in plain PyTorch: the specification. Any dtype; nothing is computed, elements only move."""
from math import prod


def _letters(patch):
    return "tpq"[-len(patch):]


def patchify(x, patch, order):
    """[B,C,(F,)H,W] -> [B,S,K]: grid cells in row-major order, the elements of each cell in `order`."""
    sizes = x.shape[2:]
    grid = [size // p for size, p in zip(sizes, patch, strict=True)]
    split = [n for pair in zip(grid, patch, strict=True) for n in pair]
    x = x.reshape(*x.shape[:2], *split)  # [B,C,(F/t,t,)H/p,p,W/q,q]
    axis = {"c": 1, **{letter: 3 + 2 * i for i, letter in enumerate(_letters(patch))}}
    cells = range(2, x.dim(), 2)
    x = x.permute(0, *cells, *(axis[letter] for letter in order))  # [B,(F/t,)H/p,W/q,*order]
    return x.reshape(x.shape[0], prod(grid), x.shape[1 + len(grid):].numel()).contiguous()  # [B,S,K]


def unpatchify(tokens, patch, grid, order):
    """[B,S,K] -> [B,C,(F,)H,W]: the inverse of `patchify`."""
    size = {"c": tokens.shape[2] // prod(patch), **dict(zip(_letters(patch), patch, strict=True))}
    x = tokens.reshape(tokens.shape[0], *grid, *(size[letter] for letter in order))  # [B,(F/t,)H/p,W/q,*order]
    first = 1 + len(grid)
    axes = [0, first + order.index("c")]
    for cell, letter in enumerate(_letters(patch), 1):
        axes += [cell, first + order.index(letter)]
    x = x.permute(axes)  # [B,C,(F/t,t,)H/p,p,W/q,q]
    return x.reshape(*x.shape[:2], *(g * p for g, p in zip(grid, patch, strict=True))).contiguous()  # [B,C,(F,)H,W]
