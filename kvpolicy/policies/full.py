"""Full cache: keeps every token."""

from typing import ClassVar

from kvpolicy.policy import CachePolicy


class Full(CachePolicy):
    """Keep everything: the baseline that every other policy is measured against."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762"
