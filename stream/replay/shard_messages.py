"""What the process that reads a recording and the processes that hold its users say to each other, as MessagePack.

    to a shard      Share     its share of the events of one run, and the clock of the run
                    Explain   which alerts of that run get reasons; the shard may then forget the others
                    Finish    nothing follows
    from a shard    Result    to a Share
                    Explained to an Explain
                    Sums      to Finish
                    Failed    at any time; nothing follows
"""
import msgspec

from stream.replay.account import Sums


class Share(msgspec.Struct, tag=True):
    """Events of one run whose users belong to one shard, in the order of the run.

    run       number of the run
    clock_ms  timers due by this time fire before the events
    values    the row of each event
    ranks     the place of each event among all events of the run
    offsets   of each event in its topic; empty if the rows name them
    """

    run: int
    clock_ms: int
    values: list[bytes] = []
    ranks: list[int] = []
    offsets: list[int] = []


class Explain(msgspec.Struct, tag=True):
    """The rows of a run whose alerts get reasons, as pairs of step and row."""

    run: int
    rows: list[tuple[int, int]] = []


class Finish(msgspec.Struct, tag=True):
    """The end."""


class Row(msgspec.Struct, array_like=True, gc=False):
    """One scored user of a step.

    at        where the row belongs within the step of the whole replay. After events, it is the rank of the user's
              first event in the run. After a timer, it is the timer's due time; if two are equal, the user id decides
    step, row which row of the shard it is
    decisions messages of decisions, without reasons
    scores    other messages
    urgency, variants  as in `stream.core.reasons.Claim`; urgency -1: asks for no reasons
    shard     which shard sent it; set by the reader
    """

    at: int
    user_id: str
    step: int
    row: int
    decisions: list[bytes] = []
    scores: list[bytes] = []
    urgency: int = -1
    variants: int = 0
    shard: int = -1


class Round(msgspec.Struct, array_like=True, gc=False):
    """The steps up to the one that folds events, and that step.

    fired    per sweep, the rows of users of the run, if they say something
    silent   the rows of all other users whose timers fired, in the order of each user's timers
    folded   rows after events, if they say something
    """

    fired: list[list[Row]] = []
    silent: list[Row] = []
    folded: list[Row] = []


class Result(msgspec.Struct, tag=True):
    """What a shard made of its share of a run."""

    run: int
    rounds: list[Round]


class Explained(msgspec.Struct, tag=True):
    """The decisions of the rows that `Explain` names, in that order, now with their reasons."""

    run: int
    decisions: list[list[bytes]]


class Failed(msgspec.Struct, tag=True):
    """An error stopped the shard.

    exit_code  of its class of `stream.errors`; 0: another error, whose traceback is the problem
    """

    exit_code: int
    problem: str
    do: str


Order = Share | Explain | Finish
Reply = Result | Explained | Sums | Failed

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
