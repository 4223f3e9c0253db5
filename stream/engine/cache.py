"""The users of a lane that are kept decoded: those whose newest record is not yet written, and those seen lately.

A user who comes again costs no read and no decoding. What is kept beyond the steps in flight is bounded in bytes; who
has not been seen for the longest goes first.
"""
from collections.abc import Iterable

from stream.core.user import User

OBJECT_BYTES = 700      # of a user without events: the object, its three buffers, its place here


class UserCache:
    """Users by id, the one that was used last at the end.

    bytes_max   what the users that are not in flight may take together, by estimate
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._users: dict[str, User] = {}
        self._sizes: dict[str, int] = {}

    def __contains__(self, user_id: str) -> bool:
        return user_id in self._users

    def __len__(self) -> int:
        return len(self._users)

    def find(self, user_ids: Iterable[str]) -> dict[str, User | None]:
        """The users, in this order; None for each that is not kept."""
        users = self._users
        return {user_id: users.get(user_id) for user_id in user_ids}

    def keep(self, user: User, record_bytes: int) -> None:
        """Keep the user, whose record has that length, as the one that was used last."""
        user_id, size = user.user_id, record_bytes + OBJECT_BYTES
        self._bytes += size - self._sizes.pop(user_id, 0)
        self._users.pop(user_id, None)
        self._users[user_id], self._sizes[user_id] = user, size

    def trim(self, step: int) -> None:
        """Let go of the users beyond the bound that are written: those of steps up to `step`."""
        if self._bytes <= self._bytes_max:
            return
        gone = []
        for user_id, user in self._users.items():
            if self._bytes <= self._bytes_max or user.step > step:
                break       # whoever comes later was used later
            gone.append(user_id)
            self._bytes -= self._sizes.pop(user_id)
        for user_id in gone:
            del self._users[user_id]
