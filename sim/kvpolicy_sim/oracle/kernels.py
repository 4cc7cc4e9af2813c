"""The loops of the oracle, compiled by numba at their first call.

Axes: E evictions; T tokens, of which losses may leave out the newest, since they never leave.
"""

from typing import NamedTuple

import numpy as np

from kvpolicy.compiler import numba
from kvpolicy_sim.oracle.problem import Losses

# Nothing here is ever NaN; reassociation lets sums run in vector registers.
_FAST = {"nnan", "nsz", "contract", "reassoc"}

_FAR = 1e300
_CLOSED = -1.0


class Matching(NamedTuple):
    """Which eviction has which tokens, and what proves that this is best so far.

    A step from eviction e to token s costs losses[e, s] - price[e] - discount[s]: never less
    than zero, and zero if e has s. Tokens that nobody has are not discounted.

    Attributes:
        owner: [T], the eviction that has a token, -1 for none.
        owned: Eviction e has the tokens owned[begins[e] : ends[e]].
        begins: [E].
        ends: [E].
        price: [E].
        discount: [T], zero or less.
    """

    owner: np.ndarray
    owned: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    price: np.ndarray
    discount: np.ndarray


class Paths(NamedTuple):
    """Shortest paths from an eviction, over tokens that other evictions have.

    Attributes:
        distance: [T], of tokens from the start; closed if the eviction that has one was reached.
        reached: [E], evictions in the order of their distances, the start first.
        length: [E], distances of these.
        given: [E], the token over which each of these was reached.
    """

    distance: np.ndarray
    reached: np.ndarray
    length: np.ndarray
    given: np.ndarray


@numba.njit(nogil=True, cache=True, error_model="numpy")
def assign(losses: Losses, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Assign tokens to evictions at the least total loss, by shortest augmenting paths.

    Evictions are served in order, one token at a time. Each gets it at the end of a shortest
    path: it takes a token from another eviction, which takes one from a third, and so on, until
    one takes a token that nobody has.

    Args:
        losses: Of every pair of an eviction and a token.
        counts: [E], tokens that must leave at each eviction.

    Returns:
        [T] the eviction that has each token, -1 for none; and [E] prices, at which `relaxed_loss`
        is the total loss, which proves that it is the least.
    """
    num_evictions, num_tokens = len(losses.due), losses.due[-1]
    begins = np.zeros(num_evictions, np.int64)
    for e in range(1, num_evictions):
        begins[e] = begins[e - 1] + counts[e - 1]
    matching = Matching(
        owner=np.full(num_tokens, -1, np.int64),
        owned=np.empty(begins[-1] + counts[-1], np.int64),
        begins=begins,
        ends=begins.copy(),
        price=np.zeros(num_evictions),
        discount=np.zeros(num_tokens),
    )
    paths = Paths(
        distance=np.empty(num_tokens),
        reached=np.empty(num_evictions, np.int64),
        length=np.empty(num_evictions),
        given=np.empty(num_evictions, np.int64),
    )
    for e in range(num_evictions):
        for _ in range(counts[e]):
            token, num_reached = _search(losses, matching, paths, e)
            length = paths.distance[token]
            _augment(losses, matching, paths, token, num_reached)
            _reprice(losses, matching, paths, length, num_reached)
    return matching.owner, matching.price


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _search(losses: Losses, matching: Matching, paths: Paths, start: int) -> tuple[int, int]:
    """Find the nearest token that nobody has, by Dijkstra's algorithm.

    Returns:
        The token, and the number of evictions reached.
    """
    distance = paths.distance[: losses.due[start]]
    distance[:] = _FAR
    paths.reached[0], paths.length[0] = start, 0.0
    last = 0
    while True:
        e = paths.reached[last]
        for i in range(matching.begins[e], matching.ends[e]):
            distance[matching.owned[i]] = _CLOSED
        row = losses.values[losses.starts[e] : losses.starts[e] + losses.due[e]]
        _relax(distance, row, matching.discount, paths.length[last] - matching.price[e])
        token = _nearest(distance)
        last += 1
        if matching.owner[token] < 0:
            return token, last
        paths.reached[last], paths.length[last] = matching.owner[token], distance[token]
        paths.given[last] = token


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _relax(distance: np.ndarray, row: np.ndarray, discount: np.ndarray, base: float) -> None:
    """Shorten distances to what they are through one more eviction; rounding stays above zero."""
    for s in range(len(row)):
        distance[s] = min(distance[s], max(base + row[s] - discount[s], 0.0))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _nearest(distance: np.ndarray) -> int:
    """The token with the least distance that is not closed; the first of several.

    Read as unsigned integers, floats compare as they do by value, but negative ones come last;
    and a minimum of integers, unlike one of floats, runs in vector registers.
    """
    bits = distance.view(np.uint64)
    least = bits[0]
    for s in range(len(bits)):
        least = min(least, bits[s])
    nearest = 0
    while bits[nearest] != least:
        nearest += 1
    return nearest


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _augment(losses: Losses, matching: Matching, paths: Paths, token: int, end: int) -> None:
    """Go back along the path to a token: each eviction takes one and gives the one before."""
    while end > 0:
        at, least = 0, np.inf
        for i in range(end):
            e = paths.reached[i]
            if token < losses.due[e]:
                step = losses.values[losses.starts[e] + token] - matching.price[e]
                if paths.length[i] + step < least:
                    at, least = i, paths.length[i] + step
        taker = paths.reached[at]
        matching.owner[token] = taker
        if at == 0:
            matching.owned[matching.ends[taker]] = token
            matching.ends[taker] += 1
        else:
            for i in range(matching.begins[taker], matching.ends[taker]):
                if matching.owned[i] == paths.given[at]:
                    matching.owned[i] = token
            token = paths.given[at]
        end = at


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _reprice(
    losses: Losses, matching: Matching, paths: Paths, length: float, num_reached: int
) -> None:
    """Let steps within the matching cost nothing again, and no step less."""
    for i in range(num_reached):
        e = paths.reached[i]
        matching.price[e] += length - paths.length[i]
        for j in range(matching.begins[e], matching.ends[e]):
            s = matching.owned[j]
            matching.discount[s] = losses.values[losses.starts[e] + s] - matching.price[e]


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def relaxed_loss(losses: Losses, counts: np.ndarray, price: np.ndarray) -> tuple[float, np.ndarray]:
    """Least total loss if every token may choose its eviction and gets the price of it.

    Args:
        losses: Of every pair of an eviction and a token.
        counts: [E], tokens that must leave at each eviction.
        price: [E], anything.

    Returns:
        The loss, less prices paid, plus the prices of all that must leave: never more than the
        least loss of an assignment. And [E], tokens that must leave less those that chose to.
    """
    least = np.zeros(losses.due[-1])
    choice = np.full(losses.due[-1], -1, np.int64)
    for e in range(len(losses.due)):
        row = losses.values[losses.starts[e] : losses.starts[e] + losses.due[e]]
        for s in range(len(row)):
            net = row[s] - price[e]
            is_less = net < least[s]
            least[s] = net if is_less else least[s]
            choice[s] = e if is_less else choice[s]
    total = 0.0
    missing = np.empty(len(price))
    for e in range(len(price)):
        total += counts[e] * price[e]
        missing[e] = counts[e]
    for s in range(len(choice)):
        total += least[s]
        if choice[s] >= 0:
            missing[choice[s]] -= 1
    return total, missing
