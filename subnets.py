"""Subnets as values, and spaces of them: names, what is legal, drawing and changing; knows no torch.

A kind of subnet is a frozen dataclass whose fields are tuples of numbers, each described by an ``Axis``; its space is a
dataclass with the same fields, which holds the legal values of every position. ``Subnet`` and ``SubnetSpace`` choose by
stage; a family whose subnets are chosen otherwise (block by block, by heads) declares its own two beside its network.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, cast

MOST_POSITIONS = 10_000  # of one field; a name that asks for more is no name


class SupernetError(ValueError):
    """A network that cannot be made elastic, or supernet data that do not fit each other; says what and where."""


class IllegalSubnetError(SupernetError):
    """A subnet outside the supernet's space; the message lists what is legal."""


# -------------------------------------------------------------------------------------------------------------- values


@dataclass(frozen=True, slots=True)
class Axis:
    """One kind of choice: the letter that stands for it in names, its words in messages, and what its values may be.

    ``count`` tells from the depths how many values a subnet has; ``place`` is what each of them belongs to, nothing
    where there is only one. Values of a place "block" are those of the blocks that run, stage after stage.
    """

    letter: str
    noun: str
    rule: str
    legal: Callable[[object], bool]
    whole: bool = False
    place: str = "stage"
    count: Callable[[Sequence[int]], int] = len
    in_full: bool = False  # written value by value even where all are the same


def axis(letter: str, noun: str, rule: str, legal: Callable[[object], bool], **more: Any) -> Any:
    """A dataclass field with its Axis."""
    return field(metadata={"axis": Axis(letter, noun, rule, legal, **more)})


def is_whole(value: object, least: int, most: int) -> bool:
    """Whether it is an integer in this range."""
    return type(value) is int and least <= value <= most


def is_number(value: object, least: float, most: float) -> bool:
    """Whether it is a number in this range."""
    return type(value) in (int, float) and least <= cast(float, value) <= most


def axes_of(kind: type) -> dict[str, Axis]:
    """The axes of a kind of subnet, by field."""
    return {each.name: each.metadata["axis"] for each in fields(kind)}


@dataclass(frozen=True, slots=True)
class SubnetValue:
    """What every kind of subnet can do: be named, and be found by its name."""

    FORM: ClassVar[str]

    @property
    def name(self) -> str:
        """Canonical name: every axis' letter and values, written once where all are the same."""
        return "-".join(each.letter + _text(each, getattr(self, name)) for name, each in axes_of(type(self)).items())

    @classmethod
    def parse(cls, name: str) -> Self:
        """The subnet of a canonical name; raises IllegalSubnetError for any other text."""
        axes = axes_of(cls)
        match = re.fullmatch("-".join(each.letter + _pattern(each) for each in axes.values()), name)
        if match is None:
            raise IllegalSubnetError(f"'{name}' is no subnet name: expected the form {cls.FORM}")
        values: dict[str, tuple[Any, ...]] = {}
        for (key, each), text in zip(axes.items(), match.groups(), strict=True):
            found = tuple(map(int if each.whole else float, text.split("-")))
            count = len(found) if each.in_full or len(found) > 1 else each.count(values.get("depths", ()))
            if count > MOST_POSITIONS:
                raise IllegalSubnetError(f"'{name}' is no subnet name: {count} values of {each.letter}")
            values[key] = found if len(found) > 1 else found * count
        subnet = cls(**values)
        if subnet.name != name:
            raise IllegalSubnetError(f"'{name}' is not written canonically: expected '{subnet.name}'")
        return subnet


def _text(each: Axis, values: Sequence[float]) -> str:
    return "-".join(map(_number, values if each.in_full or len(set(values)) > 1 else values[:1]))


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _pattern(each: Axis) -> str:
    number = r"\d{1,9}" if each.whole else r"\d+(?:\.\d+)?"
    return f"({number}(?:-{number})*)"


DEPTHS = axis(
    "d", "depth", "whole numbers from 1", lambda value: type(value) is int and value >= 1, whole=True, in_full=True
)


@dataclass(frozen=True, slots=True)
class Subnet(SubnetValue):
    """One subnet as a value: how many blocks of each stage run, and which part of each stage's inner channels.

    ``expands`` are fractions of the full number of inner channels of a block, one per stage. Its name is such as
    ``d2-2-1-e0.5`` (one ratio for all stages) or ``d2-2-1-e0.5-1-0.25``.
    """

    FORM: ClassVar[str] = "d2-2-1-e0.5 or d2-2-1-e0.5-1-0.25"
    depths: tuple[int, ...] = DEPTHS
    expands: tuple[float, ...] = axis(
        "e", "expand ratio", "fractions above 0, up to 1", lambda value: is_number(value, 1e-4, 1)  # as names can hold
    )


# -------------------------------------------------------------------------------------------------------------- spaces


@dataclass(frozen=True, slots=True)
class Space:
    """All legal subnets of one kind: every field holds, for each of its positions, the legal values, ascending."""

    KIND: ClassVar[type[Any]]

    def __post_init__(self) -> None:
        for name, each in self._axes.items():
            choices = self._choices(name)
            expected = len(choices) if name == "depths" else each.count(self._deepest)
            if len(choices) != expected or not choices:
                depths = f"{expected} {each.place or 'value'}s with depths but " if each.place else ""
                raise SupernetError(f"{depths}{len(choices)} {'' if each.place else 'lists '}with {each.noun}s")
            for position, values in enumerate(choices):
                if not values or not all(map(each.legal, values)) or list(values) != sorted(set(values)):
                    where = f"{each.place} {position}: " if each.place else ""
                    raise SupernetError(f"{where}{each.noun}s must be ascending {each.rule}, not {list(values)}")

    @property
    def _axes(self) -> dict[str, Axis]:
        return axes_of(self.KIND)

    def _choices(self, name: str) -> tuple[tuple[Any, ...], ...]:
        return cast("tuple[tuple[Any, ...], ...]", getattr(self, name))

    @property
    def _deepest(self) -> tuple[int, ...]:
        """The largest depths; none where subnets have no stages."""
        depths = getattr(self, "depths", ())
        return tuple(each[-1] for each in depths if each and type(each[-1]) is int)

    def _running(self, depths: Sequence[int]) -> list[int]:
        """The blocks that run at these depths, counted over all stages."""
        starts = itertools.accumulate(self._deepest, initial=0)
        return [start + number for start, depth in zip(starts, depths, strict=False) for number in range(depth)]

    def _legal(self, name: str, depths: Sequence[int]) -> Sequence[Sequence[Any]]:
        """The legal values of each position that a subnet of these depths has."""
        choices = self._choices(name)
        return [choices[block] for block in self._running(depths)] if self._axes[name].place == "block" else choices

    @property
    def size(self) -> int:
        """How many subnets there are; ``len`` fails where that is more than a machine integer."""
        blocks = [self._choices(name) for name, each in self._axes.items() if each.place == "block"]
        total, first = 1, 0
        for name, each in self._axes.items():
            if each.place != "block" and not (blocks and name == "depths"):
                total *= math.prod(map(len, self._choices(name)))
        for depths in self._choices("depths") if blocks else ():
            inside = [math.prod(len(each[first + number]) for each in blocks) for number in range(depths[-1])]
            total *= sum(math.prod(inside[:depth]) for depth in depths)
            first += depths[-1]
        return total

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        yield from self._complete({})

    def _complete(self, chosen: dict[str, tuple[Any, ...]]) -> Iterator[Any]:
        left = [name for name in self._axes if name not in chosen]
        if not left:
            yield self.KIND(**chosen)
            return
        for values in itertools.product(*self._legal(left[0], chosen.get("depths", ()))):
            yield from self._complete({**chosen, left[0]: values})

    def _end(self, index: int) -> Any:
        depths = tuple(each[index] for each in getattr(self, "depths", ()))
        return self.KIND(**{name: tuple(each[index] for each in self._legal(name, depths)) for name in self._axes})

    @property
    def largest(self) -> Any:
        """The subnet that uses everything."""
        return self._end(-1)

    @property
    def smallest(self) -> Any:
        """The subnet that uses the least of everything."""
        return self._end(0)

    def parse(self, name: str) -> Any:
        """The subnet of this name, which may still be outside the space; IllegalSubnetError if it is none."""
        return self.KIND.parse(name)

    def sample(self, rng: random.Random) -> Any:
        """A subnet drawn uniformly, one choice at a time."""
        drawn: dict[str, tuple[Any, ...]] = {}
        for name in self._axes:
            drawn[name] = tuple(rng.choice(each) for each in self._legal(name, drawn.get("depths", ())))
        return self.KIND(**drawn)

    def mutate(self, subnet: Any, rng: random.Random, probability: float) -> Any:
        """A copy in which each choice is redrawn with this probability (for evolutionary search).

        What a block has that did not run before is drawn anew.
        """
        changed: dict[str, tuple[Any, ...]] = {}
        for name, each in self._axes.items():
            values, choices = getattr(subnet, name), self._legal(name, changed.get("depths", ()))
            before: Sequence[Any] = values
            if each.place == "block":
                known = dict(zip(self._running(subnet.depths), values, strict=True))
                before = [known.get(block) for block in self._running(changed["depths"])]
            changed[name] = tuple(
                rng.choice(legal) if value is None or rng.random() < probability else value
                for value, legal in zip(before, choices, strict=True)
            )
        return self.KIND(**changed)

    def check(self, subnet: Any) -> None:
        """Raise IllegalSubnetError, listing what is legal, unless the subnet is in this space."""
        if type(subnet) is not self.KIND:
            raise IllegalSubnetError(f"{subnet!r:.80} is no subnet of this supernet: expected {self.KIND.__name__}")
        depths = getattr(subnet, "depths", ())
        for name, each in self._axes.items():
            values = getattr(subnet, name)
            expected = each.count(depths if each.place == "block" else self._deepest)
            if len(values) != expected:
                what = f"{expected} {each.place}s" if each.place == "stage" else f"{expected} {each.noun}s"
                raise IllegalSubnetError(f"{subnet.name}: this supernet has {what}")
            for position, (value, legal) in enumerate(zip(values, self._legal(name, depths), strict=True)):
                if value not in legal:
                    where = f" of {each.place} {position}" if each.place else ""
                    raise IllegalSubnetError(
                        f"{subnet.name}: {each.noun} {value:g}{where} is not in {list(legal)}"
                    )


@dataclass(frozen=True, slots=True)
class SubnetSpace(Space):
    """For each stage its legal depths and its legal expand ratios."""

    KIND: ClassVar[type[Any]] = Subnet
    depths: tuple[tuple[int, ...], ...]
    expands: tuple[tuple[float, ...], ...]
