"""The tokens of a sequence, counted for penalties: a row for each slot that needs one.

Knows nothing of penalties.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenCounts:
    """Counts by token, and lists of the counted tokens; no memory before the first slot.

    Both are on the device. `row_of_slot` has the number of a slot's row.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        #: float32 `[rows, vocab]`: how often each token was generated.
        self.generated = torch.zeros(0, vocab_size, device=device)
        #: bool `[rows, vocab]`: whether the prompt has the token.
        self.in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self.row_of_slot: dict[int, int] = {}
        self._free: list[int] = []
        #: `[rows, capacity]`: the prompt's distinct tokens, then the output, then arbitrary ids.
        self._tokens = torch.zeros(0, 1, dtype=torch.int64, device=device)
        #: By row the number of valid `_tokens`, on the host and on the device.
        self._lengths: list[int] = []
        self._device_lengths = torch.zeros(0, dtype=torch.int64, device=device)

    def take(self, slot: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Start a slot's row with these tokens, and give it one if it has none."""
        if slot not in self.row_of_slot:
            if not self._free:
                self._grow()
            self.row_of_slot[slot] = self._free.pop()
        row = self.row_of_slot[slot]
        tokens = torch.tensor([*dict.fromkeys(prompt), *output], dtype=torch.int64)
        num_prompt = len(tokens) - len(output)
        self._reserve(len(tokens))
        self._tokens[row, : len(tokens)] = tokens.to(self._device)
        self._lengths[row] = len(tokens)
        self._device_lengths[row] = len(tokens)
        # Counted on the host: on CUDA bincount is not deterministic.
        counts = torch.bincount(tokens[num_prompt:], minlength=self._vocab_size)
        self.generated[row] = counts.to(device=self._device, dtype=torch.float32)
        self.in_prompt[row] = False
        self.in_prompt[row, self._tokens[row, :num_prompt]] = True

    def drop(self, slot: int) -> None:
        """Free a slot's row, if it has one."""
        row = self.row_of_slot.pop(slot, None)
        if row is not None:
            self._free.append(row)

    def tokens_of(self, rows: list[int], index: Tensor) -> Tensor:
        """Return ids `[rows, n]`: every token of each row, with repetitions and others among them.

        `index` is `rows` on the device.
        """
        return self._tokens[index, : max(self._lengths[row] for row in rows)]

    def add(self, rows: list[int], index: Tensor, tokens: Tensor) -> None:
        """Count one more token in each of these distinct rows; `index` is `rows` on the device."""
        for row in rows:
            self._lengths[row] += 1
        self._reserve(max(self._lengths[row] for row in rows))
        self.generated[index, tokens] += 1
        self._tokens[index, self._device_lengths[index]] = tokens
        self._device_lengths[index] += 1

    def check(self) -> None:
        """Assert that each row is free or one slot's, and lists exactly the tokens it counts."""
        rows = sorted([*self.row_of_slot.values(), *self._free])
        assert rows == list(range(len(self.generated))), (
            f"of {len(self.generated)} rows {sorted(self._free)} are free, "
            f"{self.row_of_slot} are taken"
        )
        for slot, row in self.row_of_slot.items():
            listed = set(self._tokens[row, : self._lengths[row]].tolist())
            num_generated = self._lengths[row] - int(self.in_prompt[row].sum())
            assert int(self.generated[row].sum()) == num_generated, (
                f"slot {slot} lists {num_generated} generated tokens, counts {self.generated[row]}"
            )
            had = (self.in_prompt[row] | (self.generated[row] > 0)).nonzero().flatten()
            assert listed == set(had.tolist()), f"slot {slot} lists other tokens"

    def _grow(self) -> None:
        """Double the rows. Few slots use penalties, so rows are not allocated for all."""
        old = len(self.generated)
        more = max(1, old)
        self.generated, self.in_prompt, self._tokens, self._device_lengths = (
            torch.cat([held, held.new_zeros(more, *held.shape[1:])])
            for held in (self.generated, self.in_prompt, self._tokens, self._device_lengths)
        )
        self._lengths += [0] * more
        self._free.extend(reversed(range(old, old + more)))

    def _reserve(self, num_tokens: int) -> None:
        """Make the lists long enough by doubling them."""
        rows, old = self._tokens.shape
        if num_tokens > old:
            wider = self._tokens.new_zeros(rows, max(num_tokens, 2 * old))
            wider[:, :old] = self._tokens
            self._tokens = wider
