from stream.core.user import User
from stream.engine.cache import OBJECT_BYTES, UserCache


def users(*steps: int) -> list[User]:
    made = []
    for number, step in enumerate(steps):
        user = User(f'u{number}')
        user.step = step
        made.append(user)
    return made


def kept(cache: UserCache, *numbers: int) -> list[bool]:
    return [user is not None for user in cache.find([f'u{number}' for number in numbers]).values()]


def test_users_are_found_in_the_order_of_the_question():
    cache = UserCache(10_000)
    both = users(1, 1)
    cache.keep(both, 600)
    assert cache.find(['u1', 'x', 'u0']) == {'u1': both[1], 'x': None, 'u0': both[0]}


def test_who_is_used_stays_and_who_is_not_goes():
    cache = UserCache(4 * (OBJECT_BYTES + 300))
    everybody = users(*[1] * 5)
    cache.keep(everybody[:3], 900)
    cache.trim(1)
    assert kept(cache, 0, 1, 2) == [True, True, True]
    cache.keep([everybody[0], *everybody[3:]], 900)
    cache.trim(1)
    assert kept(cache, 0, 1, 2, 3, 4) == [True, False, False, True, True]


def test_what_is_not_written_stays_whatever_the_bound():
    cache = UserCache(0)
    everybody = users(1, 2, 3)
    cache.keep(everybody, 900)
    for _ in range(3):
        cache.keep(users(1), 300)
        cache.trim(2)
    assert kept(cache, 1, 2) == [False, True]
    for _ in range(2):
        cache.keep(users(1), 300)
        cache.trim(3)
    assert kept(cache, 2) == [False]


def test_what_is_kept_is_bounded():
    cache = UserCache(100 * (OBJECT_BYTES + 300))
    for step in range(1, 50):
        fresh = [User(f'{step}-{number}') for number in range(20)]
        for user in fresh:
            user.step = step
        cache.keep(fresh, 300 * len(fresh))
        cache.trim(step)
        assert len(cache) <= 120
    assert len(cache) >= 50
