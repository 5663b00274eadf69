"""The decoder layers with torch where attention is latent (arXiv:2405.04434).

Of a token one latent vector c and one rotated vector, for all heads, are stored. A head's key is
`K c` with the rotated vector behind it, its value `V c`. Neither is ever computed. A query's product
with the key is that of `K^T q` with c, and the sum of weighted values is `V` times that of the
latent vectors. So attention has one key for all heads, whose first elements are its value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.architectures.arch import LatentSpec
from model.architectures.transformer import DecoderLayer, LatentWeights, Transformer
from model.attention.interface import AttentionBackend

#: Of the norms within attention, whatever `rms_norm_eps` is: so are the models' own classes.
_EPS = 1e-6


class LatentTransformer(Transformer):
    """See `ServedDecoder`."""

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """See `Decoder`."""
        rank = self._latent.rank

        def attend(index: int, layer: DecoderLayer, x: Tensor) -> Tensor:
            queries, keys = self._queries_and_keys(layer, x, positions)
            attended = attention.attend(index, queries, keys, keys[..., :rank])
            return layer.o(self._values(_weights(layer), attended))

        return self.run_layers(token_ids, self._ops, attend)

    @property
    def _latent(self) -> LatentSpec:
        latent = self.arch.latent
        assert latent is not None, "see build_transformer"
        return latent

    def _queries_and_keys(
        self, layer: DecoderLayer, x: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return queries `[tokens, heads, head_dim]` and keys `[tokens, 1, head_dim]`, rotated."""
        arch, latent, ops, weights = self.arch, self._latent, self._ops, _weights(layer)
        tokens, heads, width, rank = len(x), arch.num_heads, arch.head_dim, latent.rank
        joint = layer.qkv(x)
        q, stored = joint[:, :-width], joint[:, -width:]
        if weights.q_up is not None:
            assert layer.q_norm is not None, "queries of a rank have a norm"
            q = weights.q_up(ops.rms_norm(q, layer.q_norm, _EPS, weights.q_up.in_dtype))
        q = q.unflatten(1, (heads, -1))
        queries, keys = q.new_empty(tokens, heads, width), q.new_empty(tokens, 1, width)
        plain, key_up = q[..., : latent.plain_dim], weights.kv_up[:, : latent.plain_dim]
        queries[..., :rank] = torch.einsum("thp,hpr->thr", plain, key_up)
        queries[..., rank:] = self._halves(q[..., latent.plain_dim :])
        assert layer.k_norm is not None, "latent vectors have a norm"
        keys[:, 0, :rank] = ops.rms_norm(stored[:, :rank], layer.k_norm, _EPS, q.dtype)
        keys[:, 0, rank:] = self._halves(stored[:, rank:])
        ops.apply_rope(queries[..., rank:], keys[..., rank:], positions, self.cos_sin)
        return queries, keys

    def _halves(self, x: Tensor) -> Tensor:
        """Move the first of each pair of neighbours before all the second ones."""
        if not self._latent.is_interleaved:
            return x
        return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)

    def _values(self, weights: LatentWeights, attended: Tensor) -> Tensor:
        """Return `[tokens, heads * value_dim]` from sums of latent vectors."""
        sums = attended.unflatten(1, (self.arch.num_heads, -1))
        value_up = weights.kv_up[:, self._latent.plain_dim :]
        return torch.einsum("thr,hvr->thv", sums, value_up).flatten(1)


def _weights(layer: DecoderLayer) -> LatentWeights:
    assert layer.latent is not None, "see load_layer"
    return layer.latent
