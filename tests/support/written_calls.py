"""Calls of tools as a model would write them."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.tool_format import Slot, ToolFormat

Call = tuple[str, str]  # name, arguments


def written(tool_format: ToolFormat, calls: Sequence[Call], space: str = "\n") -> str:
    """As a model would."""

    def one(elements: Sequence[str | Slot], call: Call) -> str:
        by_slot = {Slot.NAME: call[0], Slot.ARGUMENTS: call[1], Slot.SPACE: space}
        return "".join(by_slot[each] if isinstance(each, Slot) else each for each in elements)

    separator = one(tool_format.separator, ("", ""))
    return tool_format.opening + separator.join(one(tool_format.call, call) for call in calls) + tool_format.closing
