"""What kvpolicy raises.

KVPolicyError
├── PolicyError (also ValueError)   a spec, parameter or score that cannot be right
│   └── UnsupportedError            a policy that this model, feature or host cannot honour
├── LedgerError                     what was evicted differs from what the occupancy law demands
├── TraceError                      a trace file that is damaged or lacks what is asked of it
└── ContractError (AssertionError)  a policy breaks the contract that kvpolicy.testing checks
"""


class KVPolicyError(Exception):
    """Base of every error raised by kvpolicy."""


class PolicyError(KVPolicyError, ValueError):
    """A policy or spec is invalid; the message says what, got, expected and how to mend."""


class UnsupportedError(PolicyError):
    """A valid policy meets a model, engine feature or host that cannot honour it."""


class LedgerError(KVPolicyError):
    """The tokens evicted differ from the occupancy law's figure."""


class TraceError(KVPolicyError):
    """A trace is damaged or lacks what is asked of it; the message says what and where."""


class ContractError(KVPolicyError, AssertionError):
    """A policy breaks a promise that hosts and users rely on; the message reproduces it."""
