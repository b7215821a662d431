from dataclasses import replace

import pytest
from unit.frame_builder import BLOCKS, GENERATION, RAM, ROM, VGA, Spec, random_stream

from ftd.assembly import SHARE_OF_BUFFERS, Frame, FrameAssembler, receive_limits
from ftd.errors import FrameError
from ftd.frame import PAGE_SIZE, Part, entry

LIMIT = 1 << 30


def assembler(limit: int = LIMIT) -> FrameAssembler:
    return FrameAssembler(GENERATION, limit=limit)


def synced(epoch: int = 4, limit: int = LIMIT) -> FrameAssembler:
    """An assembler whose sync was completed by the frame of `epoch`."""
    made = assembler(limit)
    assert isinstance(made.feed(Spec(epoch=epoch).whole().received()), Frame)
    return made


def middle(epoch: int, part: int) -> Spec:
    return Spec(epoch=epoch, part=part, complete=False, device=b"")


def test_live_parts_of_a_sync_are_handed_out_at_once_and_do_not_count_as_held() -> None:
    made = assembler(limit=1)
    for number in range(3):
        part = Spec(epoch=9, part=number).live().received()
        assert made.feed(part) is part
        assert part.verified
    assert made.syncing
    assert made.held_bytes == 0


def test_the_checkpoint_completes_the_sync_without_its_live_parts() -> None:
    made = assembler()
    made.feed(Spec(epoch=9, part=0).live().whole().received())
    assert made.feed(middle(9, 1).received()) is None
    frame = made.feed(Spec(epoch=9, part=2, device=b"end").received())
    assert isinstance(frame, Frame)
    assert [part.header.part for part in frame.parts] == [1, 2]
    assert (frame.generation, frame.epoch, bytes(frame.device)) == (GENERATION, 9, b"end")
    assert frame.nbytes == sum(part.nbytes for part in frame.parts)
    assert not made.syncing
    assert made.last_epoch == 9


def test_live_parts_after_the_sync_are_held_with_their_frame() -> None:
    made = synced(4)
    assert made.feed(Spec(epoch=5, part=0).live().received()) is None
    assert made.held_bytes > 0
    frame = made.feed(Spec(epoch=5, part=1).received())
    assert isinstance(frame, Frame)
    assert len(frame.parts) == 2
    assert made.held_bytes == 0


@pytest.mark.parametrize(
    ("before", "bad", "words"),
    [
        ([], Spec(epoch=4), "part 0 of epoch 4 follows the part that completed the epoch: expected epoch 5"),
        ([], Spec(epoch=4, part=1), "part 1 of epoch 4 follows the part that completed the epoch"),
        ([], Spec(epoch=3), "epoch is 3: expected 5"),
        ([], Spec(epoch=6), "epoch is 6: expected 5"),
        ([], Spec(epoch=5, part=1), "part is 1: expected 0"),
        ([middle(5, 0)], Spec(epoch=5, part=0), "part is 0: expected 1"),
        ([middle(5, 0)], Spec(epoch=5, part=2), "part is 2: expected 1"),
        ([middle(5, 0)], Spec(epoch=6, part=0), "epoch is 6: expected 5"),
        ([middle(5, 0)], Spec(epoch=6, part=1), "epoch is 6: expected 5"),
        ([middle(5, 0)], Spec(epoch=5, part=1).live(), r"kind is 1 \(live\): expected 2"),
        ([], Spec(epoch=5, generation=GENERATION + 1), "generation is 8: expected 7"),
        ([], Spec(epoch=5, generation=GENERATION - 1), "generation is 6: expected 7"),
        ([], Spec(epoch=5, device=b""), "size of device is 0: expected the device state"),
        ([], Spec(epoch=5, zeros=((0, 1), (0, 1))), "listed twice"),
    ],
)
def test_a_part_out_of_order_ends_the_session(before: list[Spec], bad: Spec, words: str) -> None:
    made = synced(4)
    released: list[int] = []
    for spec in before:
        made.feed(Part.from_wire(spec.wire(), on_release=lambda: released.append(0)))
    part = Part.from_wire(bad.wire(), on_release=lambda: released.append(1))
    with pytest.raises(FrameError, match=words):
        made.feed(part)
    assert released == [1] + [0] * len(before)
    with pytest.raises(FrameError, match="comes too late: expected a new sync after: "):
        made.feed(Spec(epoch=5).received())
    assert made.held_bytes == 0


def test_the_epochs_of_a_sync_may_begin_anywhere_but_not_change() -> None:
    made = assembler()
    made.feed(Spec(epoch=1000).live().received())
    with pytest.raises(FrameError, match="epoch is 1001: expected 1000"):
        made.feed(Spec(epoch=1001, part=1).received())


def test_a_stream_that_goes_on_takes_the_next_epoch_and_no_other() -> None:
    """After a daemon was replaced: no sync, but live rounds that belong to the first frame, as always."""
    going_on = FrameAssembler(GENERATION, limit=1 << 20, after=41)
    assert not going_on.syncing
    assert going_on.feed(Spec(epoch=42, pages={(0, 1): 1}).live().received()) is None
    frame = going_on.feed(Spec(epoch=42, part=1, pages={(0, 2): 2}).received())
    assert isinstance(frame, Frame)
    assert (frame.epoch, len(frame.parts)) == (42, 2)
    for epoch in (41, 43):
        with pytest.raises(FrameError, match="epoch"):
            FrameAssembler(GENERATION, limit=1 << 20, after=41).feed(Spec(epoch=epoch).received())


def test_an_incomplete_frame_is_bounded_and_both_numbers_are_named() -> None:
    size = middle(5, 0).received().nbytes
    made = synced(4, limit=2 * size)
    made.feed(middle(5, 0).received())
    made.feed(middle(5, 1).received())
    with pytest.raises(
        FrameError, match=f"size of the frame is {3 * size} so far: expected at most {2 * size} bytes"
    ):
        made.feed(middle(5, 2).received())
    assert made.held_bytes == 0


def test_a_closed_assembler_releases_what_it_held() -> None:
    made = synced(4)
    part = middle(5, 0).received()
    made.feed(part)
    made.close()
    assert not part.verified
    with pytest.raises(FrameError, match="the session was closed"):
        made.feed(Spec(epoch=5).received())


def test_a_frame_releases_all_its_parts() -> None:
    made = synced(4)
    made.feed(middle(5, 0).received())
    frame = made.feed(Spec(epoch=5, part=1).received())
    assert isinstance(frame, Frame)
    frame.release()
    assert not any(part.verified for part in frame.parts)


def test_the_digests_and_the_block_table_of_a_frame_are_those_of_its_last_part() -> None:
    made = synced(4)
    made.feed(middle(5, 0).received())
    last = Spec(epoch=5, part=1, digests=tuple(range(32)))
    frame = made.feed(last.received())
    assert isinstance(frame, Frame)
    assert frame.digests.tolist() == list(range(32))
    assert frame.blocks == last.blocks


def test_a_sync_that_did_not_list_every_page_is_not_complete() -> None:
    some = Spec(epoch=9, zeros=tuple((0, number) for number in range(20)))
    for specs in ([Spec(epoch=9)], [some], [some.live(), Spec(epoch=9, part=1, zeros=((0, 23),))]):
        made = assembler()
        for spec in specs[:-1]:
            made.feed(spec.received())
        with pytest.raises(FrameError, match=r"sync to epoch 9: \d+ of 24 pages of block pc\.ram were"):
            made.feed(specs[-1].received())


def test_every_page_may_come_in_any_of_the_parts_of_a_sync() -> None:
    every = [(index, number) for index, block in enumerate(BLOCKS) for number in range(block.pages)]
    made = assembler()
    made.feed(Spec(epoch=9, zeros=tuple(every[::3])).live().received())
    made.feed(replace(middle(9, 1), pages=dict.fromkeys(every[1::3], 1)).received())
    assert isinstance(made.feed(Spec(epoch=9, part=2, zeros=tuple(every[2::3])).received()), Frame)


def test_what_a_block_gained_during_a_sync_must_be_sent_too() -> None:
    large = (RAM, replace(VGA, used_length=8 * PAGE_SIZE), ROM)
    for pages, complete in (({(1, 6): 1, (1, 7): 2}, True), ({(1, 6): 1}, False)):
        made = assembler()
        made.feed(Spec(epoch=9).live().whole().received())
        last = Spec(epoch=9, part=1, blocks=large, pages=pages).received()
        if complete:
            assert isinstance(made.feed(last), Frame)
            continue
        with pytest.raises(FrameError, match=r" 1 of 8 pages of block 0000:00:02\.0/vga\.vram were"):
            made.feed(last)


def test_the_memory_of_a_guest_is_bounded() -> None:
    made = FrameAssembler(GENERATION, limit=LIMIT, memory_limit=31 * PAGE_SIZE)
    with pytest.raises(FrameError, match="memory is 131072 bytes: expected at most 126976"):
        made.feed(Spec().whole().received())


@pytest.mark.parametrize("memory_mib", [1, 64, 1024, 1 << 18])
@pytest.mark.parametrize("in_flight_mib", [4, 256])
def test_a_frame_of_all_of_memory_fits_into_the_receive_buffers(memory_mib: int, in_flight_mib: int) -> None:
    """With digests, device state, a slot that was sent early, and room for the next part.

    What such a frame took is not kept for the next one.
    """
    most, kept = receive_limits(memory_mib << 20, in_flight_mib << 20)
    slot, journal = 4 << 20, 256 << 20
    whole = (memory_mib << 20) + (memory_mib << 8) * 16 + (8 << 20) + slot + journal
    part, of = SHARE_OF_BUFFERS
    assert whole <= most * part // of
    assert kept == (in_flight_mib + 512) << 20
    assert slot <= most - most * part // of


@pytest.mark.parametrize("seed", range(10))
def test_any_interruption_of_a_stream_completes_no_frame_but_those_before_it(seed: int) -> None:
    specs, states = random_stream(seed)
    for cut in range(len(specs)):
        made = assembler()
        done = [made.feed(spec.received()) for spec in specs[:cut]]
        epochs = [item.epoch for item in done if isinstance(item, Frame)]
        assert epochs == [spec.epoch for spec in specs[:cut] if spec.complete]
        if cut == 0:
            continue
        # the same part once more, from every point of the stream
        with pytest.raises(FrameError):
            made.feed(specs[cut - 1].received())
    assert states


def test_without_the_check_of_the_order_a_repeated_part_gets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check under test is what refuses it, and nothing else on the way."""
    monkeypatch.setattr(FrameAssembler, "_check_order", lambda self, part: None)
    made = synced(4)
    repeated = replace(middle(5, 0))
    assert made.feed(repeated.received()) is None
    assert made.feed(repeated.received()) is None


def test_pages_sent_early_are_dropped_with_a_frame_that_is_given_up() -> None:
    """The session ends in the middle of an epoch: nothing of it was handed out, and all buffers come back."""
    made = synced(4)
    released: list[int] = []
    for number in range(3):
        spec = Spec(epoch=5, part=number, pages={(0, number): 1}).live()
        assert made.feed(Part.from_wire(spec.wire(), on_release=lambda: released.append(1))) is None
    assert made.held_bytes > 3 * PAGE_SIZE
    made.close()
    assert (len(released), made.held_bytes, made.last_epoch) == (3, 0, 4)


def test_pages_sent_early_count_towards_the_bound_of_their_frame() -> None:
    early = Spec(epoch=5, pages={(0, 1): 1}).live()
    size = early.received().nbytes
    made = synced(4, limit=2 * size)
    made.feed(early.received())
    made.feed(replace(early, part=1).received())
    with pytest.raises(
        FrameError, match=f"size of the frame is {3 * size} so far: expected at most {2 * size}"
    ):
        made.feed(replace(early, part=2).received())
    assert made.held_bytes == 0


def test_a_page_sent_early_and_again_is_in_its_frame_twice_the_later_one_last() -> None:
    made = synced(4)
    made.feed(Spec(epoch=5, part=0, pages={(0, 1): 1, (0, 2): 2}).live().received())
    frame = made.feed(Spec(epoch=5, part=1, pages={(0, 1): 3}).received())
    assert isinstance(frame, Frame)
    assert [part.pages.tolist() for part in frame.parts] == [[entry(0, 1), entry(0, 2)], [entry(0, 1)]]
