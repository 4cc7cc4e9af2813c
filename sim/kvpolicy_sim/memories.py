"""What a replay notes of memories: the attention that they get, and the bytes that they take.

Axes: B rows, H query heads, H_kv KV heads, G query heads per KV head, Q queries, S token slots.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpolicy.attention import AttentionLayer
from kvpolicy.memory.feedback import FeedbackMemory
from kvpolicy.memory.linear import LinearMemory, Recalled, features
from kvpolicy.memory.state import Attended, Memory
from kvpolicy.policies.infini import Infini


@dataclass(frozen=True)
class WatchedLayer(AttentionLayer):
    """A layer that remembers how much of its attention went to the memory."""

    _noted: list[Tensor] = field(default_factory=list, compare=False, repr=False)

    def attend(
        self,
        memory: Memory,
        q: Tensor,
        logits: Tensor,
        values: Tensor,
        positions: Tensor,
        evicted: Tensor,
    ) -> Attended:
        """Attend to tokens and memory, as any layer, and take note."""
        attended = super().attend(memory, q, logits, values, positions, evicted)
        self._noted.append(self._note(memory, q, positions, attended))
        return attended

    def drain_shares(self, token_lse: Tensor) -> Tensor:
        """Shares of the memory in the only row's attention since the last call; [H_kv, G, Q].

        Args:
            token_lse: [H_kv, G, Q] log-sum-exp of these queries over tokens alone.
        """
        noted = torch.cat(self._noted, dim=-1)[0]
        self._noted.clear()
        if isinstance(self.memory_policy, Infini):
            return noted
        return -(token_lse - noted).clamp(max=0).expm1()

    def _note(self, memory: Memory, q: Tensor, positions: Tensor, attended: Attended) -> Tensor:
        """What `drain_shares` reads: a gate, or the log-sum-exp over all; [B, H_kv, G, Q]."""
        policy = self.memory_policy
        if not (isinstance(policy, Infini) and isinstance(memory, LinearMemory)):
            return attended.lse
        raw = self.setting.rotary.shift(q.float(), -positions)
        asked = features(raw.unflatten(1, attended.lse.shape[1:3]))
        mass = (asked @ memory.normaliser[:, :, None, :, None])[..., 0]
        # A gate looks at masses alone, so that the outputs need not be recalled again.
        return policy.share(memory, Recalled(attended.output, mass), self.setting, attended.lse)


def bytes_beside_slots(memory: Memory, item_bytes: int) -> int:
    """Bytes of what a memory holds beside slots: float32 statistics, or rows of hidden states.

    Args:
        memory: Of one layer.
        item_bytes: Bytes of a number of the model's cache; a replay computes in float32.
    """
    match memory:
        case LinearMemory():
            return memory.num_bytes
        case FeedbackMemory():
            return memory.hidden.numel() * item_bytes
        case _:
            return 0
