"""kvpolicy with xformers: retained slots as attention biases, and kernels that attend to them.

PolicyCache(model, "h2o:budget=256", kernel=kvpolicy_xformers.attend)   # in transformers
PolicyAttention("h2o:budget=256")(q, k, v)                              # in a loop of your own
"""

from kvpolicy_xformers.attention import attend, attend_packed
from kvpolicy_xformers.bias import block_bias, paged_bias, slot_bias
from kvpolicy_xformers.loop import PolicyAttention

__all__ = [
    "PolicyAttention",
    "attend",
    "attend_packed",
    "block_bias",
    "paged_bias",
    "slot_bias",
]
