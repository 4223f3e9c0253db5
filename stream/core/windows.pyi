from typing import Any

import numpy as np

SOURCE_HASH: str
CONSTANTS: tuple[Any, ...]

def slots_and_counters(
    headers: np.ndarray, days: np.ndarray, rows: np.ndarray, as_of_ms: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...
def cut(
    starts: np.ndarray, rows_max: int, padding_slots_max: int,
) -> tuple[np.ndarray, list[tuple[int, int, int]]]: ...
def fill(
    categories: np.ndarray, numbers: np.ndarray, starts: np.ndarray, counters: np.ndarray, rows: np.ndarray,
    length: int, height: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...
