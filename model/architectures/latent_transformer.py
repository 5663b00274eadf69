"""The decoder layers with torch where attention is latent (arXiv:2405.04434).

Of a token one latent vector c and one rotated vector are stored, for all heads. A head has the key
`K c`, then the rotated vector, and the value `V c`. Neither is ever computed. The product of a
query and the key is that of `K^T q` and c. The sum of weighted values is `V` times that of the
latent vectors. So attention has one key for all heads, whose first elements are its value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.architectures.arch import LatentSpec
from model.architectures.transformer import DecoderLayer, LatentWeights, Transformer
from model.ops import Ops

#: Of the norms within attention, which do not use `rms_norm_eps` in the models' own classes.
_EPS = 1e-6


class LatentTransformer(Transformer):
    """See `ServedDecoder`."""

    def qkv(self, layer: DecoderLayer, x: Tensor, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries `[tokens, heads, head_dim]`, keys `[tokens, 1, head_dim]`, and values.

        Values are a part of the keys. The elements to be rotated are the last ones.
        """
        arch, latent, weights = self.arch, self._latent, _weights(layer)
        tokens, heads, width, rank = len(x), arch.num_heads, arch.head_dim, latent.rank
        joint = layer.qkv(x)
        q, stored = joint[:, :-width], joint[:, -width:]
        if weights.q_up is not None:
            assert layer.q_norm is not None, "queries of a rank have a norm"
            q = weights.q_up(ops.rms_norm(q, layer.q_norm, _EPS, weights.q_up.in_dtype))
        q = q.view(tokens, heads, -1)
        queries, keys = q.new_empty(tokens, heads, width), q.new_empty(tokens, 1, width)
        plain, key_up = q[..., : latent.plain_dim], weights.kv_up[:, : latent.plain_dim]
        queries[..., :rank] = torch.einsum("thp,hpr->thr", plain, key_up)
        queries[..., rank:] = self._halves(q[..., latent.plain_dim :])
        assert layer.k_norm is not None, "latent vectors have a norm"
        keys[:, 0, :rank] = ops.rms_norm(stored[:, :rank], layer.k_norm, _EPS, q.dtype)
        keys[:, 0, rank:] = self._halves(stored[:, rank:])
        return queries, keys, keys[..., :rank]

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """See `Transformer`."""
        rank = self._latent.rank
        super().rotate(q[..., rank:], k[..., rank:], positions, cos_sin)

    def output(self, layer: DecoderLayer, attended: Tensor) -> Tensor:
        """Return it from sums of latent vectors, `[tokens, heads * rank]`."""
        sums = attended.view(len(attended), self.arch.num_heads, -1)
        value_up = _weights(layer).kv_up[:, self._latent.plain_dim :]
        return layer.o(torch.einsum("thr,hvr->thv", sums, value_up).flatten(1))

    @property
    def _latent(self) -> LatentSpec:
        latent = self.arch.latent
        assert latent is not None, "see build_transformer"
        return latent

    def _halves(self, x: Tensor) -> Tensor:
        """Move the first of each pair of neighbours before all the second ones."""
        if not self._latent.is_interleaved:
            return x
        return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)


def _weights(layer: DecoderLayer) -> LatentWeights:
    assert layer.latent is not None, "see load_layer"
    return layer.latent
