"""The users of a lane that are kept decoded: those whose newest record is not yet written, and those seen lately.

A user who comes again costs no read and no decoding. Two generations stand in for an exact order of use: who is used
moves to the younger one, and once that is full, the older one goes and the younger takes its place. That costs one
write to a table per user and step.
"""
from collections.abc import Iterable
from typing import Any

from stream.core.user import Change, User, keep

OBJECT_BYTES = 700      # of a user without events: the object, its three buffers, its place here


class UserCache:
    """Users by id.

    bytes_max   what the users that are not in flight may take together, by estimate
    """

    def __init__(self, bytes_max: int) -> None:
        self._generation_bytes_max = bytes_max // 2
        self._young: dict[str, User] = {}
        self._old: dict[str, User] = {}
        self._young_bytes = 0

    def find(self, user_ids: Iterable[str]) -> dict[str, Any]:
        """The users, in this order; None for each that is not kept."""
        young, old = self._young, self._old
        return {user_id: young.get(user_id) or old.get(user_id) for user_id in user_ids}

    def keep(self, users: list[User], changes: list[Change]) -> None:
        """Keep these users, of whom `changes` will be written."""
        self._young_bytes += keep(self._young, users, changes, OBJECT_BYTES)

    def trim(self, step: int) -> None:
        """Let go of users beyond the bound whose newest record is written: that of a step up to `step`."""
        if self._young_bytes > self._generation_bytes_max:
            in_flight = {user_id: user for generation in (self._old, self._young)
                         for user_id, user in generation.items() if user.step > step}
            mean_bytes = self._young_bytes // len(self._young)
            self._old, self._young, self._young_bytes = self._young, in_flight, len(in_flight) * mean_bytes
