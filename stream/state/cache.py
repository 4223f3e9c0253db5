"""A lane's cache of decoded users: users whose newest record is not yet written, and recently used users.

A cached user costs neither a read nor a decoding. Two generations approximate an exact order of use. A used user moves
to the young generation. When that is full, the old generation is dropped and the young one takes its place. So a step
costs one dictionary write per user.
"""
from collections.abc import Iterable
from typing import Any

from stream.core.user import Change, User, keep

OBJECT_BYTES = 700      # estimated memory of a user without events: the object, its three buffers and the cache entry


class UserCache:
    """Users by id.

    bytes_max   limit on the estimated memory of all users that are not in flight
    """

    def __init__(self, bytes_max: int) -> None:
        self._generation_bytes_max = bytes_max // 2
        self._young: dict[str, User] = {}
        self._old: dict[str, User] = {}
        self._young_bytes = 0

    def find(self, user_ids: Iterable[str]) -> dict[str, Any]:
        """The users, in this order; None for each user that is not cached."""
        young, old = self._young, self._old
        return {user_id: young.get(user_id) or old.get(user_id) for user_id in user_ids}

    def keep(self, users: list[User], changes: list[Change]) -> None:
        """Cache these users. `changes` are their changes that will be written."""
        self._young_bytes += keep(self._young, users, changes, OBJECT_BYTES)

    def trim(self, step: int) -> None:
        """Drop users beyond the limit. Every record up to step `step` is written; users of later steps stay."""
        if self._young_bytes > self._generation_bytes_max:
            in_flight = {user_id: user for generation in (self._old, self._young)
                         for user_id, user in generation.items() if user.step > step}
            mean_bytes = self._young_bytes // len(self._young)
            self._old, self._young, self._young_bytes = self._young, in_flight, len(in_flight) * mean_bytes
