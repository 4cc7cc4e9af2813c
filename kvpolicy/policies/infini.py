"""Infini-attention: segments that end are written into a linear-attention memory."""

from dataclasses import field
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpolicy.errors import PolicyError
from kvpolicy.memory.policy import PARAMETER_SUFFIX, MemoryPolicy
from kvpolicy.occupancy import Occupancy

if TYPE_CHECKING:
    from torch import Tensor

    from kvpolicy.memory.linear import LinearMemory, Recalled
    from kvpolicy.memory.state import Attended, Memory, Passage, Question, Setting, Shape


NAMED_GATES = ("closed", "calibrated")
"""Words for gates; others name a file."""


class Infini(MemoryPolicy):
    """Attend within segments; what ended lives on in a matrix per KV head (Infini-attention).

    After `segment` tokens all of them are stored, keys before rotation, and their slots freed
    (Munkhdalai et al. 2024, section 3.1). ``update=linear``: M <- M + sigma(K)^T V, equation 8;
    ``delta``: V minus what the memory answers already, equation 9; z <- z + sum sigma(K) under
    both, so that storing a known binding again halves what is recalled under `delta`. The memory
    is read before the update, sigma(q) M / (sigma(q) z), and mixed with attention inside the
    segment: g A_mem + (1 - g) A_local, g = sigmoid(beta) per query head (equation 10).

    `gate` has to be trained for that. ``closed`` is g = 0: attention within segments, no
    memory. A number is one g for all heads. A path names a safetensors file with a tensor
    ``beta`` [layers, query heads]. ``calibrated`` trains nothing: both parts are merged by
    log-sum-exp, the memory's log-mass estimated as a log(sigma(q) z) + c per query head, fitted
    while segments are stored, when their true log-mass for the newest query is still known.

    Deviations: an empty memory contributes nothing, instead of 0 / 0 or of a zero that
    (1 - g) scales. One matrix per KV head serves its query heads, because their keys and values
    are the same.

    Attributes:
        segment: Tokens of a segment.
        update: linear or delta.
        gate: closed, a number in 0.0..1.0, calibrated, or a file of trained gates.
    """

    name: ClassVar[str] = "infini"
    paper: ClassVar[str] = "Munkhdalai et al. 2024, arXiv 2404.07143"
    smallest_budget: ClassVar[int] = 0

    segment: int
    update: Literal["linear", "delta"] = "linear"
    gate: str | float = "closed"
    budget: int = field(init=False, default=0)
    interval: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """All slots of a segment are freed at its end."""
        if isinstance(self.segment, int):
            object.__setattr__(self, "interval", self.segment)
        if type(self.gate) is int:
            object.__setattr__(self, "gate", float(self.gate))
        super().__post_init__()

    def validate(self) -> None:
        """Refuse segments that are none and gates beyond open."""
        if self.segment < 1:
            raise PolicyError(f"infini: segment must be at least 1, got {self.segment}")
        if isinstance(self.gate, str):
            is_known = self.gate in NAMED_GATES or self.gate.endswith(PARAMETER_SUFFIX)
        else:
            is_known = 0.0 <= self.gate <= 1.0
        if not is_known:
            raise PolicyError(
                f"infini: gate must be {', '.join(NAMED_GATES)}, a number in 0.0..1.0, or a file "
                f"of trained gates that ends in {PARAMETER_SUFFIX}, got {self.gate!r}"
            )
        if self.protect:
            raise PolicyError("infini: it frees whole segments; drop protect")
        super().validate()

    @property
    def occupancy(self) -> Occupancy:
        """Nothing of an ended segment stays."""
        return Occupancy(retained=0, interval=self.segment)

    @property
    def has_memory(self) -> bool:
        """A closed gate never reads, so that nothing is stored."""
        return self.gate != "closed" and self.gate != 0.0

    @property
    def parameter_file(self) -> str | None:
        """Trained gates."""
        gate = self.gate
        return gate if isinstance(gate, str) and gate not in NAMED_GATES else None

    def memory_floats(self, head_dim: int, group: int) -> int:
        """Matrix, normaliser and the calibration's five statistics of each query head."""
        return (head_dim + 1) * head_dim + 5 * group if self.has_memory else 0

    def new_memory(self, shape: "Shape", setting: "Setting") -> "LinearMemory":
        """Make an empty matrix."""
        from kvpolicy.memory.linear import LinearMemory

        self.gates(setting, shape.kv_heads, shape.group)
        return LinearMemory.empty(shape)

    def absorb(self, memory: "Memory", passage: "Passage") -> "LinearMemory":
        """Store the segment that ends."""
        from dataclasses import replace

        from kvpolicy.memory import linear

        assert isinstance(memory, linear.LinearMemory), "made by new_memory"
        keys = passage.keys
        after = linear.store(memory, keys, passage.values, delta=self.update == "delta")
        if not self.is_calibrated:
            return after
        asked = linear.features(passage.raw_query)
        mass = (asked @ linear.features(keys).sum(dim=2)[..., None])[..., 0]
        log_mass = passage.logits(passage.rotated_keys).logsumexp(dim=-1)
        return replace(after, fits=linear.observe_mass(memory.fits, mass, log_mass))

    def attend(self, memory: "Memory", question: "Question") -> "Attended":
        """Attend inside the segment, recall from the memory, mix."""
        from kvpolicy.memory.linear import LinearMemory, recall
        from kvpolicy.memory.reading import attend_tokens

        assert isinstance(memory, LinearMemory), "made by new_memory"
        local = attend_tokens(question)
        queries = question.setting.rotary.shift(question.q, -question.positions)
        recalled = recall(memory, queries.unflatten(1, local.lse.shape[1:3]))
        share = self.share(memory, recalled, question.setting, local.lse)
        output = self.mix(local.output, recalled, share)
        return local._replace(output=output)

    @property
    def is_calibrated(self) -> bool:
        """Whether the local part's log-sum-exp decides how much is recalled."""
        return self.gate == "calibrated"

    def share(
        self,
        memory: "LinearMemory",
        recalled: "Recalled",
        setting: "Setting",
        lse: "Tensor | None",
    ) -> "Tensor":
        """Weight of what was recalled, zero where the memory is empty; [B, H_kv, G, Q].

        Args:
            memory: That recalled.
            recalled: Its answer.
            setting: The layer.
            lse: [B, H_kv, G, Q] of the logits inside the segment, for `is_calibrated`.
        """
        from kvpolicy.memory.linear import calibrated_log_mass

        if self.is_calibrated:
            assert lse is not None, "hosts give it where is_calibrated"
            return (calibrated_log_mass(memory.fits, recalled.mass) - lse).sigmoid()
        kv_heads, group = recalled.mass.shape[1:3]
        gates = self.gates(setting, kv_heads, group).to(recalled.mass.device)
        return gates.view(kv_heads, -1, 1) * (recalled.mass > 0)

    def mix(self, local: "Tensor", recalled: "Recalled", share: "Tensor") -> "Tensor":
        """Mix outputs [B, H, Q, D] with what was recalled; exactly the local ones at share 0."""
        share = share.flatten(1, 2)[..., None]
        mixed = share * recalled.output.flatten(1, 2) + (1 - share) * local
        return mixed.where(share > 0, local)

    def gates(self, setting: "Setting", kv_heads: int, group: int) -> "Tensor":
        """Gate of each query head of a layer that is here, [H] float32.

        Raises:
            PolicyError: The file of trained gates does not fit the model.
        """
        import torch

        from kvpolicy.memory.parameters import load_parameters

        layer, here = setting.layer, kv_heads * group
        if not isinstance(self.gate, str) or self.is_calibrated:
            return torch.full((here,), 0.0 if isinstance(self.gate, str) else self.gate)
        beta, heads = load_parameters(self.gate).get("beta"), here * setting.ranks
        if beta is None or beta.dim() != 2 or layer >= len(beta) or beta.shape[1] != heads:
            got = "none" if beta is None else tuple(beta.shape)
            raise PolicyError(
                f"infini: {self.gate} must hold gates 'beta' [layers, {heads}] with layer "
                f"{layer}, got {got}; train them on this model"
            )
        first = setting.first_kv_head * group if setting.ranks > 1 else 0
        return beta[layer, first : first + here].sigmoid()
