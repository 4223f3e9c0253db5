from stream.core.user import User
from stream.engine.cache import OBJECT_BYTES, UserCache


def kept(*steps: int, bytes_max: int) -> UserCache:
    cache = UserCache(bytes_max)
    for number, step in enumerate(steps):
        user = User(f'u{number}')
        user.step = step
        cache.keep(user, 300)
    return cache


def test_users_are_found_in_the_order_of_the_question():
    cache = kept(1, 1, bytes_max=10_000)
    found = cache.find(['u1', 'x', 'u0'])
    assert list(found) == ['u1', 'x', 'u0']
    assert found['x'] is None
    assert found['u0'] is cache.find(['u0'])['u0']


def test_who_was_used_last_stays():
    cache = kept(1, 1, 1, bytes_max=2 * (OBJECT_BYTES + 300))
    first = cache.find(['u0'])['u0']
    assert first is not None
    cache.keep(first, 300)
    cache.trim(1)
    assert [user_id in cache for user_id in ('u0', 'u1', 'u2')] == [True, False, True]


def test_what_is_not_written_stays_whatever_the_bound():
    cache = kept(1, 2, 3, bytes_max=0)
    cache.trim(2)
    assert [user_id in cache for user_id in ('u0', 'u1', 'u2')] == [False, False, True]
    cache.trim(3)
    assert len(cache) == 0


def test_a_user_who_grows_counts_once():
    cache = kept(1, bytes_max=OBJECT_BYTES + 400)
    user = cache.find(['u0'])['u0']
    assert user is not None
    for size in (350, 400):
        cache.keep(user, size)
        cache.trim(1)
    assert len(cache) == 1
    cache.keep(user, 401)
    cache.trim(1)
    assert len(cache) == 0
