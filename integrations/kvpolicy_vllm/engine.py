"""What one engine of this process shares between vLLM's scheduler, worker and sampler side."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from kvpolicy import CachePolicy, PolicyError, parse
from kvpolicy_vllm.book import Book
from kvpolicy_vllm.config import KEY, check_policy, configured_policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

logger = init_logger(__name__)

_engines: dict[str, "Engine"] = {}


@dataclass
class Engine:
    """One engine under a policy.

    Attributes:
        policy: The server's policy, which sizes every request's allotment.
        book: Accounts of its requests.
        rows: Policies that requests asked for, by row of the running batch.
        has_layers: Whether a layer has been built with this host's attention.
    """

    policy: CachePolicy
    book: Book = field(default_factory=Book)
    rows: dict[int, CachePolicy] = field(default_factory=dict)
    has_layers: bool = False

    @classmethod
    def start(cls, vllm_config: "VllmConfig") -> "Engine | None":
        """Begin the engine of a configuration; None when it runs stock vLLM."""
        policy = configured_policy(vllm_config)
        if policy is None:
            _engines.pop(vllm_config.instance_id, None)
            return None
        engine = _engines[vllm_config.instance_id] = cls(policy)
        return engine

    @staticmethod
    def of(key: str) -> "Engine":
        """The engine of a configuration's `instance_id`."""
        return _engines[key]

    def policy_of_row(self, row: int) -> CachePolicy:
        """Policy of a row of the running batch."""
        return self.rows.get(row, self.policy)

    def requested_policy(self, params: "SamplingParams") -> CachePolicy | None:
        """The policy a request asks for, if it fits the server's allotment.

        A request that does not fit was already refused where the request entered; one that
        got past that (another front end) runs under the server's policy, and its ledger says so.
        """
        spec = (params.extra_args or {}).get(KEY)
        if spec is None:
            return None
        try:
            policy = parse(spec)
            check_request(policy, self.policy)
        except PolicyError as error:
            logger.warning("kvpolicy: %s; the request runs under %s", error, self.policy)
            return None
        return policy


def check_request(policy: CachePolicy, server: CachePolicy) -> None:
    """Refuse a request's policy that needs more slots than the server allots.

    Raises:
        PolicyError: With both figures.
    """
    check_policy(policy)
    needed, allotted = policy.occupancy.capacity, server.occupancy.capacity
    if allotted is not None and (needed is None or needed > allotted):
        raise PolicyError(
            f"{policy} needs {'unboundedly many' if needed is None else needed} slots, "
            f"the server's {server} allots {allotted} (budget + interval); lower the budget"
        )
