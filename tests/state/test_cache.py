from stream.core.user import Change, User
from stream.state.cache import OBJECT_BYTES, UserCache


def users(*steps: int) -> list[User]:
    made = []
    for number, step in enumerate(steps):
        user = User(f'u{number}')
        user.step = step
        made.append(user)
    return made


def keep(cache: UserCache, some: list[User], record_bytes: int = 300) -> None:
    cache.keep(some, [Change(user.user_id.encode(), bytes(record_bytes), 0, 0) for user in some])


def kept(cache: UserCache, *numbers: int) -> list[bool]:
    return [user is not None for user in cache.find([f'u{number}' for number in numbers]).values()]


def test_users_are_found_in_the_order_of_the_question():
    cache = UserCache(10_000)
    both = users(1, 1)
    keep(cache, both)
    assert cache.find(['u1', 'x', 'u0']) == {'u1': both[1], 'x': None, 'u0': both[0]}


def test_who_is_used_stays_and_who_is_not_goes():
    cache = UserCache(4 * (OBJECT_BYTES + 300))
    everybody = users(*[1] * 5)
    keep(cache, everybody[:3])
    cache.trim(1)
    assert kept(cache, 0, 1, 2) == [True, True, True]
    keep(cache, [everybody[0], *everybody[3:]])
    cache.trim(1)
    assert kept(cache, 0, 1, 2, 3, 4) == [True, False, False, True, True]


def test_what_is_not_written_stays_whatever_the_bound():
    cache = UserCache(0)
    keep(cache, users(1, 2, 3))
    for _ in range(3):
        keep(cache, users(1))
        cache.trim(2)
    assert kept(cache, 1, 2) == [False, True]
    for _ in range(2):
        keep(cache, users(1))
        cache.trim(3)
    assert kept(cache, 2) == [False]


def test_what_is_kept_is_bounded():
    cache = UserCache(100 * (OBJECT_BYTES + 300))
    seen = []
    for step in range(1, 50):
        fresh = [User(f'{step}-{number}') for number in range(20)]
        for user in fresh:
            user.step = step
        seen += fresh
        keep(cache, fresh)
        cache.trim(step)
        assert sum(user is not None for user in cache.find([user.user_id for user in seen]).values()) <= 120
    assert sum(user is not None for user in cache.find([user.user_id for user in seen]).values()) >= 50


def test_users_who_grow_are_counted_as_they_are():
    cache = UserCache(20 * (OBJECT_BYTES + 300))
    everybody = users(*[1] * 10)
    for record_bytes in (100, 300, 4_000):
        keep(cache, everybody, record_bytes)
        cache.trim(1)
    keep(cache, [User('other')])
    cache.trim(1)
    keep(cache, [User(f'x{number}') for number in range(20)])
    cache.trim(1)
    assert not any(kept(cache, *range(10)))
