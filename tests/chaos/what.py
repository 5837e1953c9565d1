"""What is done in a chaos run, and in what state it strikes."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Of the victim, as far as it is known when it is struck."""

    IDLE = "idle"  # nobody asks for anything
    PREFILL = "mid-prefill"  # a prompt is being computed there, or for it
    TRANSFER = "mid-transfer"  # blocks are on their way from it, or to it
    DECODE = "mid-decode"  # a stream that it serves, or began, has tokens
    ANY = "any"  # none of these was found in time


class What(StrEnum):
    KILL_PREFILL = "kill prefill"
    KILL_DECODE = "kill decode"
    KILL_INGRESS = "kill ingress"
    BLINK_PREFILL = "freeze prefill, shorter than heartbeats"
    BLINK_DECODE = "freeze decode, shorter than heartbeats"
    FREEZE_PREFILL = "freeze prefill, longer than heartbeats"
    FREEZE_DECODE = "freeze decode, longer than heartbeats"
    FREEZE_INGRESS = "freeze ingress, longer than heartbeats"
    BLINK_LINK = "cut link, shorter than heartbeats"
    CUT_LINK = "cut link, longer than heartbeats"
    HANG_PREFILL = "hang prefill"
    HANG_DECODE = "hang decode"
    STORM = "queue-full storm"


STATES = (State.IDLE, State.PREFILL, State.TRANSFER, State.DECODE)
NEEDS_TWO_HOSTS = frozenset({What.BLINK_LINK, What.CUT_LINK})
BLINKS = frozenset({What.BLINK_PREFILL, What.BLINK_DECODE, What.BLINK_LINK})
KILLS = frozenset({What.KILL_PREFILL, What.KILL_DECODE, What.KILL_INGRESS})
HANGS = frozenset({What.HANG_PREFILL, What.HANG_DECODE})
