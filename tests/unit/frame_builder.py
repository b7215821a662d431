"""Valid streams of parts, and what the shadow's memory has to be after each of their frames."""

from dataclasses import dataclass, field, replace

import numpy as np

from ftd.frame import PAGE_SIZE, Block, Kind, Part, encode_slot, encode_wire, entry
from ftd.journal import Request, encode

GENERATION = 7
RAM = Block("pc.ram", 24 * PAGE_SIZE, 24 * PAGE_SIZE, shared_file=True)
VGA = Block("0000:00:02.0/vga.vram", 6 * PAGE_SIZE, 8 * PAGE_SIZE)
ROM = Block("pc.bios", 2 * PAGE_SIZE, 2 * PAGE_SIZE, read_only=True)
BLOCKS = (RAM, VGA, ROM)


def page(value: int) -> np.ndarray:
    """A page that says what it is: the same number in each of its words."""
    return np.full(PAGE_SIZE // 8, value, dtype="<u8").view(np.uint8)


@dataclass(frozen=True)
class Spec:
    """A part in words: `pages` maps (block index, page number) to a value of `page`."""

    epoch: int = 1
    part: int = 0
    kind: Kind = Kind.CHECKPOINT
    complete: bool = True
    generation: int = GENERATION
    blocks: tuple[Block, ...] = BLOCKS
    pages: dict[tuple[int, int], int] = field(default_factory=dict)
    zeros: tuple[tuple[int, int], ...] = ()
    device: bytes = b"device state"
    digests: tuple[int, ...] = ()
    requests: tuple[Request, ...] = ()

    def live(self) -> "Spec":
        return replace(self, kind=Kind.LIVE, complete=False, device=b"")

    def whole(self) -> "Spec":
        """The same with all other pages of all blocks in `zeros`, as the first part of a sync lists them."""
        rest = (
            (index, number)
            for index, block in enumerate(self.blocks)
            for number in range(block.pages)
            if (index, number) not in self.pages
        )
        return replace(self, zeros=tuple(rest))

    def slot(self) -> memoryview:
        return encode_slot(
            generation=self.generation,
            epoch=self.epoch,
            kind=self.kind,
            complete=self.complete,
            part=self.part,
            blocks=self.blocks,
            pages=[entry(*where) for where in self.pages],
            data=np.array([page(value) for value in self.pages.values()], dtype=np.uint8).reshape(
                -1, PAGE_SIZE
            ),
            zeros=[entry(*where) for where in self.zeros],
            device=self.device,
            digests=np.array(self.digests, dtype="<u8"),
            requests=len(self.requests),
            journal=encode(self.requests),
        )

    def wire(self) -> bytes:
        return encode_wire(self.slot())

    def received(self) -> Part:
        return Part.from_wire(self.wire())


Memory = dict[str, bytes]


class Model:
    """The reference: what applying parts means, in the simplest way there is."""

    def __init__(self) -> None:
        self.memory = {block.name: bytearray(block.max_length) for block in BLOCKS}

    def apply(self, spec: Spec) -> None:
        for (block, number), value in spec.pages.items():
            self._put(spec.blocks[block].name, number, page(value).tobytes())
        for block, number in spec.zeros:
            self._put(spec.blocks[block].name, number, bytes(PAGE_SIZE))

    def _put(self, name: str, number: int, content: bytes) -> None:
        self.memory[name][number * PAGE_SIZE : (number + 1) * PAGE_SIZE] = content

    def snapshot(self) -> Memory:
        return {block.name: bytes(self.memory[block.name][: block.used_length]) for block in BLOCKS}


def random_stream(seed: int, frames: int = 3) -> tuple[list[Spec], dict[int, Memory]]:
    """Return the parts of a sync and some frames after it, and the memory after each epoch."""
    random = np.random.default_rng(seed)
    where = [(index, number) for index, block in enumerate(BLOCKS) for number in range(block.pages)]
    model = Model()
    specs: list[Spec] = []
    states: dict[int, Memory] = {}
    first = int(random.integers(1, 100))
    for epoch in range(first, first + frames):
        syncing = epoch == first
        parts = int(random.integers(2, 4)) if syncing else int(random.integers(1, 4))
        live = int(random.integers(1, parts)) if parts > 1 else 0
        for number in range(parts):
            chosen = [where[at] for at in random.permutation(len(where))]
            if not (syncing and number == 0):  # the first part of a sync lists every page
                chosen = chosen[: int(random.integers(1, 8))]
            cut = int(random.integers(0, len(chosen) + 1))
            spec = Spec(
                epoch=epoch,
                part=number,
                complete=number == parts - 1,
                pages={at: int(random.integers(1, 1 << 62)) for at in sorted(chosen[:cut])},
                zeros=tuple(sorted(chosen[cut:])),
                device=random.bytes(int(random.integers(1, 99))) if number == parts - 1 else b"",
            )
            spec = spec.live() if number < live else spec
            model.apply(spec)
            specs.append(spec)
        states[epoch] = model.snapshot()
    return specs, states
