"""attention in plain PyTorch: the specification. Computes in float32 at least, returns q's dtype; O(Sq * Sk) memory."""
import torch


def attention(q, k, v, kv_lengths, key_bias, scale):
    """softmax(scale * q k^T + key_bias) v over the visible keys; zeros where none is visible."""
    work = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    k, v = (t.to(work).repeat_interleave(group, dim=2) for t in (k, v))  # [B,Sk,H,Dh]
    hidden = None
    if kv_lengths is not None:
        hidden = torch.arange(k.shape[1], device=k.device) >= kv_lengths[:, None]  # [B,Sk]
        k, v = (t.masked_fill(hidden[:, :, None, None], 0) for t in (k, v))  # may hold nan, 0*nan = nan
    logits = torch.einsum("bihd,bjhd->bhij", q.to(work), k) * scale  # [B,H,Sq,Sk]
    if key_bias is not None:
        logits = logits + key_bias.to(work)[:, None, None, :]
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, None, None, :], -torch.inf)
    no_key = (logits == -torch.inf).all(-1, keepdim=True)  # [B,H,Sq,1]
    weights = torch.softmax(logits.masked_fill(no_key, 0), -1).masked_fill(no_key, 0)  # [B,H,Sq,Sk]
    return torch.einsum("bhij,bjhd->bihd", weights, v).to(q.dtype).contiguous()  # [B,Sq,H,Dh]


def attention_packed(qkv, kv_lengths, key_bias, scale):
    """The same on the three of qkv [B,S,3,H,Dh]."""
    return attention(*qkv.unbind(2), kv_lengths, key_bias, scale)
