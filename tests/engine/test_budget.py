import asyncio

from stream.engine.budget import Budget


def test_what_fits_enters_at_once_and_others_in_the_order_of_asking():
    async def run() -> None:
        budget, let_in = Budget(10), []

        async def ask(name: str, size: int) -> None:
            await budget.enter(size)
            let_in.append(name)

        tasks = []
        for name, size in (('a', 6), ('b', 4), ('c', 9), ('d', 1)):
            tasks.append(asyncio.create_task(ask(name, size)))
            await asyncio.sleep(0)
        assert let_in == ['a', 'b']     # d would fit, but c has been waiting longer
        budget.leave(6)
        await asyncio.sleep(0)
        assert let_in == ['a', 'b']
        budget.leave(4)
        await asyncio.gather(*tasks)
        assert let_in == ['a', 'b', 'c', 'd']
    asyncio.run(run())


def test_something_is_let_in_whatever_its_size():
    async def run() -> None:
        budget = Budget(10)
        await budget.enter(50)
        waiting = asyncio.create_task(budget.enter(1))
        await asyncio.sleep(0)
        assert not waiting.done()
        budget.leave(50)
        await waiting
    asyncio.run(run())


def test_who_is_cancelled_holds_nobody_up():
    async def run() -> None:
        budget = Budget(10)
        await budget.enter(10)
        gone, let_in, next_one = [asyncio.create_task(budget.enter(size)) for size in (10, 10, 10)]
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        budget.leave(10)
        let_in.cancel()                 # cancelled after it was let in but before it ran again
        await asyncio.wait([gone, let_in])
        assert let_in.cancelled() and gone.cancelled()
        await asyncio.wait_for(next_one, 5)
    asyncio.run(run())
