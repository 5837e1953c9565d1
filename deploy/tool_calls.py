"""From the text of an answer, as it comes, to its content and its calls of tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import NamedTuple

from deploy.tool_format import Element, Slot, ToolFormat

_MAX_NAME_CHARS = 64


class Content(NamedTuple):
    text: str


class CallBegun(NamedTuple):
    """`call` counts from 0."""

    call: int
    id: str
    name: str


class CallArguments(NamedTuple):
    """A piece of the call's arguments; all of them together are one JSON object."""

    call: int
    text: str


Event = Content | CallBegun | CallArguments


class _Place(Enum):
    """TEXT → CALL → BETWEEN → CALL … → AFTER; PLAIN instead of all where no call can begin any more."""

    TEXT = auto()
    CALL = auto()
    BETWEEN = auto()
    AFTER = auto()
    PLAIN = auto()


class ToolCallParser:
    """`push` pieces of text in any cut, then `flush`: the events are the same but for where they are cut.

    What may be the beginning of a marker is held back. A call that is begun and turns out to be none is content;
    under the grammar of `tool_format.lark_of` there is none such.
    """

    def __init__(self, tool_format: ToolFormat, new_id: Callable[[], str]) -> None:
        self._format = tool_format
        self._new_id = new_id
        self._place = _Place.TEXT
        self._held = ""
        self._raw = ""  # read of a call whose name is not known yet
        self._todo: list[Element] = []
        self._json = _JsonObject()
        self._has_content = False
        self.num_calls = 0

    def push(self, text: str) -> list[Event]:
        self._held += text
        events: list[Event] = []
        while self._step(events):
            pass
        return _merged(events)

    def flush(self) -> list[Event]:
        """The end came. What a call lacks is lacking: only the client's limit of tokens cuts one short."""
        held, self._held = self._held, ""
        if self._place in (_Place.TEXT, _Place.PLAIN) and held:
            return [Content(held)]
        return []

    def _step(self, events: list[Event]) -> bool:
        """Whether something was read."""
        match self._place:
            case _Place.TEXT:
                return self._read_text(events)
            case _Place.CALL:
                return self._read_call(events)
            case _Place.BETWEEN:
                return self._read_between(events)
            case _Place.AFTER:
                self._held = self._held.lstrip()
                return self._give_up(events) if self._held else False
            case _Place.PLAIN:
                return self._show(len(self._held), events)

    def _read_text(self, events: list[Event]) -> bool:
        trigger = self._format.trigger
        if self._format.is_anywhere:
            at = self._held.find(trigger)
            if at < 0:
                return self._show(len(self._held) - _overlap(self._held, trigger), events)
            self._show(at, events)
        elif not self._held.startswith(trigger):
            if trigger.startswith(self._held):
                return False
            self._place = _Place.PLAIN
            return True
        opening = [self._format.opening] if self._format.opening else []
        self._begin([*opening, *self._format.call])
        return True

    def _begin(self, elements: Sequence[Element]) -> None:
        self._place, self._todo, self._json = _Place.CALL, list(elements), _JsonObject()

    def _read_call(self, events: list[Event]) -> bool:
        if not self._todo:
            self._place, self._raw = _Place.BETWEEN, ""
            return True
        match self._todo[0]:
            case Slot.SPACE:
                rest = self._held.lstrip()
                self._take(len(self._held) - len(rest))
                if not rest:
                    return False
            case Slot.NAME:
                mark = self._todo[1]
                assert isinstance(mark, str)
                at = self._held.find(mark)
                if at < 0:
                    is_long = len(self._held) > _MAX_NAME_CHARS + len(mark)
                    return self._give_up(events) if is_long else False
                events.append(CallBegun(self.num_calls, self._new_id(), self._held[:at]))
                self.num_calls += 1
                self._take(at)
            case Slot.ARGUMENTS:
                count = self._json.read(self._held)
                if count:
                    events.append(CallArguments(self.num_calls - 1, self._held[:count]))
                self._take(count)
                self._raw = ""
                if not self._json.is_complete:
                    return False
            case str(mark):
                if not self._held.startswith(mark):
                    return False if mark.startswith(self._held) else self._give_up(events)
                self._take(len(mark))
        del self._todo[0]
        return True

    def _read_between(self, events: list[Event]) -> bool:
        rest = self._held.lstrip()
        if not rest:
            return False
        closing = self._format.closing
        separator = [mark for mark in self._format.separator if isinstance(mark, str)]
        following = [*separator, *self._format.call]
        first = following[0]
        assert isinstance(first, str)
        if closing and rest.startswith(closing):
            self._held, self._place = rest[len(closing) :], _Place.AFTER
            return True
        if rest.startswith(first):
            self._held = rest
            self._begin([*self._format.separator, *self._format.call])
            return True
        if first.startswith(rest) or closing.startswith(rest):
            return False
        return self._give_up(events)

    def _take(self, count: int) -> None:
        self._raw += self._held[:count]
        self._held = self._held[count:]

    def _show(self, count: int, events: list[Event]) -> bool:
        if count:
            events.append(Content(self._held[:count]))
            self._held = self._held[count:]
        return False

    def _give_up(self, events: list[Event]) -> bool:
        self._held, self._raw, self._place = self._raw + self._held, "", _Place.PLAIN
        return True


class _JsonObject:
    """Finds the end of a JSON object that comes in pieces, whose syntax is somebody else's concern."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self.is_complete = False

    def read(self, text: str) -> int:
        """How many characters belong to it."""
        for count, letter in enumerate(text, 1):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif letter == "\\":
                    self._is_escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.is_complete = True
                    return count
        return len(text)


def _merged(events: Sequence[Event]) -> list[Event]:
    """Neighbours of one kind as one."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, Content) and isinstance(last, Content):
            merged[-1] = Content(last.text + event.text)
        else:
            merged.append(event)
    return merged


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
