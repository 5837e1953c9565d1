"""Two groups, one reservation: outputs of encoders beside the blocks that grow. See test_scheduler_workloads, too."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError, RequestTooLong
from cluster.hashing import chain_root, encoder_hashes
from cluster.request import RequestKey, SamplingParams
from tests.support.engine_builders import EngineDouble, encoder_input, expected_tokens
from workers.engine.block_manager import BlockCounts, BlockManager, GroupCapacity
from workers.engine.block_tables import BlockTables
from workers.engine.capacity import default_fixed_fraction, num_blocks_per_group
from workers.engine.sequence import EncoderInput, Sequence, SequenceStatus

INPUTS = [(5,) * 3, (6,) * 8, (7,) * 17, (8,) * 13]  # 1, 2, 5 and 4 blocks


def engine(
    *, num_blocks: int = 12, num_fixed_blocks: int = 8, max_encoder_tokens: int = 20, projected: bool = False
) -> EngineDouble:
    return EngineDouble(
        num_blocks,
        4,
        max_model_len=40,
        extra_groups=(GroupCapacity("cross", num_fixed_blocks, 4, is_fixed=True, is_projected=projected),),
        max_encoder_tokens=max_encoder_tokens,
    )


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def held(double: EngineDouble, group: int) -> int:
    counts = double.blocks.counts(group)
    return counts.filling + counts.ready


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_refusals_of_either_group_at_any_step(data: st.DataObject) -> None:
    """Somebody else takes blocks of one group or the other, for a step at a time, so that every reservation is refused
    somewhere: nobody holds half of what it asked for, nothing leaks, and every stream is whole in the end."""
    double = engine(projected=data.draw(st.booleans()))
    cases: list[tuple[Sequence, list[int]]] = []
    aborted: set[int] = set()
    for _ in range(data.draw(st.integers(4, 25))):
        for _ in range(data.draw(st.integers(0, 2))):
            prompt = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
            params = greedy(data.draw(st.integers(1, 9)))
            seq = double.sequence(prompt, encoder_tokens=data.draw(st.sampled_from(INPUTS)), params=params)
            double.scheduler.add(seq)
            cases.append((seq, expected_tokens(prompt, params, 40)))
        available = [double.blocks.num_available(group) for group in (0, 1)]
        taken = double.blocks.reserve([data.draw(st.integers(0, count)) for count in available])
        assert taken is not None
        double.step()
        for group, blocks in enumerate(taken):
            double.blocks.release(group, blocks)
        double.scheduler.check_integrity()
        for seq, _ in cases:
            if seq.status is SequenceStatus.RUNNING:
                assert all(seq.block_tables), "one group without the other"
            elif seq.block_tables:
                assert seq.status is SequenceStatus.WAITING and not seq.block_tables[0], "decoder blocks without a row"
        if cases and data.draw(st.integers(0, 4)) == 0:
            seq, _ = data.draw(st.sampled_from(cases))
            if not seq.is_finished:
                aborted.add(seq.id)
                double.scheduler.abort(seq)
    double.run()
    for seq, expected in cases:
        assert seq.id in aborted or double.emitted[seq.id] == expected
    double.check_empty()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_outputs_that_are_read_elsewhere_or_for_somebody_else(data: st.DataObject) -> None:
    """Some come from another worker, some are read here, some are wanted by another worker alone, and any may be lost,
    late or aborted: nobody holds decoder blocks before its output is here, and nothing leaks."""
    double = engine(num_blocks=14, projected=data.draw(st.booleans()))
    parked: dict[int, Sequence] = {}  # to be fetched
    flying: dict[int, Sequence] = {}
    wanted: list[Sequence] = []
    asked: list[Sequence] = []
    answered: list[Sequence] = []
    expected: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(6, 30))):
        tokens = data.draw(st.sampled_from(INPUTS))
        if data.draw(st.booleans()):
            asked.append(double.sequence([], encoder_tokens=tokens, only_encodes=True))
            double.scheduler.add(asked[-1])
        if data.draw(st.booleans()):
            params = greedy(data.draw(st.integers(1, 6)))
            seq = double.sequence(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=9)), encoder_tokens=tokens)
            seq.params = params
            expected[seq.id] = expected_tokens(seq.tokens, params, 40)
            wanted.append(seq)
            if data.draw(st.booleans()):
                double.scheduler.add(seq)
            else:
                parked[seq.id] = seq
        for seq in list(parked.values()):
            if not double.scheduler.lacks_output(seq):
                double.scheduler.add(parked.pop(seq.id))
            elif (reservation := double.scheduler.reserve_output(seq)) is not None:
                assert seq.encoder_input is not None and reservation.destination[0] == ()
                assert len(reservation.destination[1]) == -(-len(seq.encoder_input.tokens) // 4)
                flying[seq.id] = parked.pop(seq.id)
        for seq in list(flying.values()):
            match data.draw(st.sampled_from(["waits", "arrives", "is lost", "is aborted"])):
                case "arrives":
                    double.rank.outputs |= dict.fromkeys(seq.block_tables[1], double.rank.inputs[seq.id])
                    double.scheduler.output_done(seq, is_here=True)
                    parked[seq.id] = flying.pop(seq.id)
                case "is lost":
                    double.scheduler.output_done(seq, is_here=False)
                    assert seq.block_tables == []
                    parked[seq.id] = flying.pop(seq.id)
                case "is aborted":
                    double.scheduler.abort(flying.pop(seq.id))
                    wanted.remove(seq)
        _, outcome = double.step()
        for seq in outcome.encoded:
            group, blocks = seq.output_blocks()
            assert group == 1 and {double.rank.outputs[block] for block in blocks} == {double.rank.inputs[seq.id]}
        answered += outcome.encoded
        double.scheduler.check_integrity()
        for seq in wanted:
            assert seq.status in (SequenceStatus.RUNNING, SequenceStatus.FINISHED) or not any(seq.block_tables[:1])
    for seq in (*parked.values(), *flying.values()):
        if seq.id in flying:
            double.scheduler.output_done(seq, is_here=False)
        double.scheduler.add(seq)
    for outcome in double.run():
        answered += outcome.encoded
    assert sorted(seq.id for seq in answered) == [seq.id for seq in asked]
    assert all(double.emitted[seq.id] == expected[seq.id] for seq in wanted)
    double.check_empty()


def test_outputs_on_their_way_leave_the_reserve_alone_and_come_once() -> None:
    double = engine(num_fixed_blocks=8)  # a quarter is reserved
    first, equal, second, third = (
        double.sequence([1], encoder_tokens=tokens) for tokens in (INPUTS[3], INPUTS[3], INPUTS[1], INPUTS[0])
    )
    reservation = double.scheduler.reserve_output(first)
    assert reservation is not None and len(reservation.raises) == 4
    assert double.scheduler.reserve_output(equal) is None, "the same output is on its way"
    assert double.scheduler.reserve_output(second) is not None
    assert double.scheduler.reserve_output(third) is None, "six of eight blocks are taken"
    with pytest.raises(RequestTooLong, match=r"7 blocks of group cross, over the 6 blocks that prefill_reserve=0\.25"):
        double.scheduler.reserve_output(double.sequence([1], encoder_tokens=(5,) * 25))
    double.scheduler.output_done(first, is_here=True)
    assert not double.scheduler.lacks_output(equal)
    for seq in (first, equal, second, third):
        double.scheduler.abort(seq)
    double.check_empty()


def test_a_chain_has_one_root() -> None:
    """The encoder input's, which covers a salt: with another one beside it, tenants would share what they may not."""
    tokens = INPUTS[0]
    salted = EncoderInput(tokens, chain_root(b"engine tests", salt="s", encoder_tokens=tokens))
    key, params = RequestKey("r", 1), greedy(2)
    assert Sequence(1, key, [1], 1, params, arrival=1, encoder_input=salted).chain_root == salted.root
    with pytest.raises(AssertionError, match="two roots of one chain"):
        Sequence(1, key, [1], 1, params, arrival=1, encoder_input=salted, chain_root=chain_root(b"x", salt="s"))


@pytest.mark.parametrize("taken", [(3, 0), (0, 1), (3, 1)])
def test_a_reservation_takes_all_groups_or_none(taken: tuple[int, int]) -> None:
    """Two hits in each group, then one group is short, then the other, then both: as if nothing had been asked."""
    blocks = BlockManager([GroupCapacity("self", 5, 4), GroupCapacity("cross", 3, 4, is_fixed=True)])
    tables = BlockTables(blocks, b"root" * 4)
    double = engine()
    warm = double.sequence(list(range(1, 9)), encoder_tokens=INPUTS[1])
    assert tables.occupy_output(warm)
    tables.fill_output(warm)
    assert tables.occupy(warm, 0, spare=[0, 0], for_transfer=False)
    tables.fill(warm, 8)
    tables.drop(warm)
    other = blocks.reserve(taken)
    assert other is not None
    before = [blocks.counts(0), blocks.counts(1)]
    assert before[0].cached == before[1].cached == 2
    # Its prompt needs one block more than the three that are left; its encoder's output is all there.
    seq = double.sequence([*range(1, 9), *range(20, 33)], encoder_tokens=INPUTS[1])
    assert tables.occupy(seq, 5, spare=[0, 0], for_transfer=False) is False
    # Another one's output is not: two blocks where one is left.
    fresh = double.sequence([1], encoder_tokens=(9,) * (4 * (4 - taken[1])))
    assert tables.occupy(fresh, 0, spare=[0, 0], for_transfer=False) is False
    assert tables.occupy_output(fresh) is False
    assert [blocks.counts(0), blocks.counts(1)] == before
    assert seq.block_tables == fresh.block_tables == []
    blocks.check_integrity()


def test_a_sequence_without_its_output_is_no_victim_and_holds_no_decoder_block() -> None:
    double = engine(num_blocks=4)
    running = double.sequence([1, 2, 3], encoder_tokens=INPUTS[0], params=greedy(13))
    double.scheduler.add(running)
    double.step()
    double.step()
    late = double.sequence([1] * 9, encoder_tokens=INPUTS[1], params=greedy(2))
    double.scheduler.add(late)
    double.run()
    assert running.num_preemptions == late.num_preemptions == 0
    double.check_empty()


def test_an_output_that_waits_gives_way_to_an_earlier_sequence() -> None:
    """Else a sequence whose own output was lost could wait for ever for one that waits for its room."""
    double = engine(num_blocks=4, num_fixed_blocks=6)
    running = double.sequence([1] * 11, encoder_tokens=INPUTS[0], params=greedy(5))
    double.scheduler.add(running)
    double.step()
    double.step()
    later = double.sequence([2] * 9, encoder_tokens=INPUTS[3], params=greedy(3))
    double.scheduler.add(later)
    double.step()
    double.step()
    assert later.status is SequenceStatus.WAITING and len(later.block_tables[1]) == 4
    earlier = double.sequence([3] * 9, priority=1, encoder_tokens=INPUTS[1], params=greedy(3))
    double.scheduler.add(earlier)
    double.step()
    assert later.block_tables == [] and len(earlier.block_tables[1]) == 2
    double.run()
    for seq in (running, later, earlier):
        assert double.emitted[seq.id] == expected_tokens(seq.tokens[: seq.num_prompt], seq.params, 40)
    assert double.rank.num_encoded == 4, "the later one's input was read again"
    double.check_empty()


def test_encoder_inputs_of_a_step_stay_within_their_budget() -> None:
    double = engine(num_fixed_blocks=30, max_encoder_tokens=20)
    for tokens in INPUTS:
        double.scheduler.add(double.sequence([1, 2], encoder_tokens=tokens, params=greedy(2)))
    sizes = []
    while double.scheduler.has_work:
        plan, _ = double.step()
        sizes.append([len(row.tokens) for row in plan.encodes])
    assert [size for size in sizes if size] == [[3, 8], [17], [13]]
    assert double.rank.num_encoded == 4


def test_a_cleared_cache_and_a_disabled_one_read_again() -> None:
    for cached in (True, False):
        double = EngineDouble(
            12,
            4,
            extra_groups=(GroupCapacity("cross", 8, 4, is_fixed=True),),
            max_encoder_tokens=20,
            enable_prefix_cache=cached,
        )
        for _ in range(2):
            double.scheduler.add(double.sequence([1, 2], encoder_tokens=INPUTS[1], params=greedy(2)))
            double.run()
        assert double.rank.num_encoded == (1 if cached else 2)
        double.blocks.clear_cache()
        double.scheduler.add(double.sequence([1, 2], encoder_tokens=INPUTS[1], params=greedy(2)))
        double.run()
        assert double.rank.num_encoded == (2 if cached else 3)
        double.check_empty()


def test_events_tell_of_prefixes_and_of_outputs() -> None:
    double = engine()
    seq = double.sequence([1] * 5, encoder_tokens=INPUTS[2], params=greedy(2))
    double.scheduler.add(seq)
    double.run()
    events = double.blocks.drain_events()
    assert seq.encoder_input is not None
    assert [event.group for event in events] == [1] * 5 + [0]
    assert [event.hash for event in events[:5]] == encoder_hashes(seq.encoder_input.root, 5)
    assert all(double.blocks.is_registered(event.hash) for event in events)
    assert double.blocks.counts(1) == BlockCounts(3, 0, 0, 5, 0)


def test_equal_decoder_prompts_share_blocks_where_their_inputs_are_equal() -> None:
    double = engine(num_fixed_blocks=20)
    hits = []
    for tokens in (INPUTS[1], INPUTS[3], INPUTS[1]):
        seq = double.sequence([1] * 9, encoder_tokens=tokens, params=greedy(1))
        assert seq.chain_root == encoder_input(tokens).root
        double.scheduler.add(seq)
        double.run()
        hits.append(seq.prefix_hit_tokens)
    assert hits == [0, 0, 8]


def test_memory_is_shared_out_by_what_a_full_sequence_holds() -> None:
    fraction = default_fixed_fraction((300, 100))
    assert fraction == 0.25
    assert num_blocks_per_group(1000, (30, 20), (1 - fraction, fraction)) == [25, 12]
    with pytest.raises(ConfigError, match="50 bytes hold no block of 60 bytes; raise it"):
        num_blocks_per_group(100, (10, 60), (0.5, 0.5))


def test_a_fixed_extent_of_its_own_goes_before_outputs_that_wait_behind_it() -> None:
    """They hold the whole fixed group, and may not pass: their inputs are read again."""
    double = EngineDouble(
        5,
        enable_prefix_cache=False,
        prefill_reserve=0.0,
        extra_groups=(GroupCapacity("cross", 6, 4, is_fixed=True),),
        max_encoder_tokens=20,
    )
    scheduler = double.scheduler
    first = double.sequence([1], encoder_tokens=(7,) * 17)
    second = double.sequence([2], encoder_tokens=(5,) * 3)
    pulling = double.sequence(list(range(18)), extents=(None, 0), params=SamplingParams(max_tokens=1))
    assert scheduler.reserve_for_pull(pulling) is not None, "it takes what they need to decode"
    scheduler.add(first)
    scheduler.add(second)
    double.step()
    assert not double.blocks.can_reserve([0, 1])
    urgent = double.sequence([3], priority=1, extents=(None, 4))
    scheduler.add(urgent)
    scheduler.abort(pulling)
    double.run()
    for seq in (first, second, urgent):
        assert double.emitted[seq.id] == expected_tokens(seq.tokens[:1], seq.params, 64)
    assert double.rank.num_encoded == 3, "the last one's output made room"
    double.check_empty()
