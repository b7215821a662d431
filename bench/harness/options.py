"""Kinds of command-line arguments that several programs take."""

from collections.abc import Sequence
from typing import Any


def numbers(least: int, most: int) -> Any:
    """A list of whole numbers within bounds, separated by commas."""

    def parse(text: str) -> list[int]:
        found = [int(word) for word in text.split(",")]
        if not all(least <= number <= most for number in found):
            raise ValueError
        return found

    # argparse names it when a value is refused.
    parse.__name__ = f"list of numbers from {least} to {most}, separated by commas"
    return parse


def words(known: Sequence[str]) -> Any:
    """A list of known words, separated by commas."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(known):
            raise ValueError
        return list(dict.fromkeys(found))

    parse.__name__ = f"list of {', '.join(known)}, separated by commas"
    return parse
