"""How long to pause between fetches, by how much they bring.

A fetch, and the beat that follows it, cost as much as scoring many windows. A broker answers as soon as it has one
record, so without a pause a quiet shop would cost one fetch and one beat for each event. During a pause, the records of
all partitions gather. A busy shop's fetches bring enough by themselves, and a backlog is read without any pause.
"""
BYTES_AIM = 2 << 10         # a fetch should bring this much, about eight events
BYTES_MANY = 64 << 10       # there is a backlog: no pause
PAUSE_S_MIN, PAUSE_S_MAX = 0.008, 0.03
STEP = 1.25                 # by how much one fetch changes the pause


class Pace:
    """Lengthens the pause while fetches bring little, and shortens it while they bring much.

    pause_s   the pause between an answer and the next request
    """

    def __init__(self) -> None:
        self.pause_s = PAUSE_S_MIN
        self._paused_s = PAUSE_S_MIN

    def fetched(self, size_bytes: int) -> None:
        """A fetch has brought records of this size."""
        if size_bytes >= BYTES_MANY:
            self.pause_s = 0.0
            return
        factor = STEP if size_bytes < BYTES_AIM else 1 / STEP
        self._paused_s = min(max(self._paused_s * factor, PAUSE_S_MIN), PAUSE_S_MAX)
        self.pause_s = self._paused_s
