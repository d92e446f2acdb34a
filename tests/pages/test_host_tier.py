"""Cached prefixes in host memory: the scheduler's book and the copies, against a model of plain dictionaries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from benchmarks.scheduler_cost import fox_manager
from tests.pages.test_prefixes import RANKS, STREAMS, WIDTH, PrefixMachine, first_live
from vllm_fox.kernels.paged import TABLE_CHUNK
from vllm_fox.pages.geometry import host_blocks
from vllm_fox.pages.host_pages import HostPages
from vllm_fox.pages.host_tier import Copies, HostTier
from vllm_fox.pages.messages import Fetches, PageReport
from vllm_fox.pages.pool import PagePool
from vllm_fox.pages.prefixes import GONE

HOST_BLOCKS = 25
Page = tuple[tuple[int, ...], int]


class HostMachine(PrefixMachine):
    """The same requests, over a pool whose cached prefixes go to host memory for want of room and come back.

    Host memory is played by ``host``: which prefix each of its pages was copied from. A fetch's pages hold nothing
    until it arrives, which it does some steps after it has been sent for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tier = HostTier(self.pool, HOST_BLOCKS, num_columns=30)
        self.host: dict[tuple[int, int], Page] = {}
        self.sent: list[tuple[int, dict[tuple[int, int], Page]]] = []

    def under_way(self, rank: int) -> list[int]:
        ids = [fetch.ids[:, self.pool.columns[rank]] for fetch in self.tier._under_way]
        return [page for mine in ids for page in mine[mine != GONE].tolist()]

    def held(self, rank: int) -> list[int]:
        assert self.pool.prefixes is not None
        found, streams = super().held(rank), self.pool.columns[rank]
        for fetch in self.tier._under_way:
            ids = self.pool.prefixes._ids[fetch.found.columns][:, streams]
            found += ids[fetch.found.there[:, streams]].tolist()
        return found

    @rule(text=st.lists(st.integers(0, 1), min_size=7, max_size=9), again=st.booleans(), data=st.data())
    @precondition(lambda self: self.pool.has_free_slot and not self.promised)
    def visit(self, text: list[int], again: bool, data: st.DataObject) -> None:
        """A request from its prompt to its end: many of them leave no room for what came before."""
        running = set(self.texts)
        self.begin(text, again, data)
        for slot in set(self.texts) - running:
            self.step(True, True)
            done = self.texts.pop(slot)
            del self.first[slot]
            self.pool.close(slot, self.keys(done))
            self.ended.append(done[: 2 * TABLE_CHUNK])

    @rule(data=st.data())
    @precondition(lambda self: self.ended)
    def ask(self, data: st.DataObject) -> None:
        """A prompt goes on from an earlier text, or begins like it, of which host memory has more."""
        assert self.pool.prefixes is not None
        more = []
        texts = {ended[:end] for ended in self.ended for end in (len(ended), len(ended) - 1)}
        for text in sorted(texts - {()}):
            here = self.pool.prefixes.find(self.keys(text))
            found = self.tier.find(self.keys(text), here.pages if here else 0)
            if found is not None and not self.tier.is_under_way(found):
                more.append(found)
        if more:
            found = data.draw(st.sampled_from(more))
            woken = max(-(-pages // count) for pages, count in zip(found.pages, STREAMS))
            if woken <= self.room():
                self.tier.fetch(found)

    @rule(reported=st.booleans(), offered=st.sampled_from([True, True, True, False]))
    @precondition(lambda self: self.promised or self.tier._begun or self.tier._saves)
    def step(self, reported: bool, offered: bool) -> None:
        """What goes out is read before the step writes, and what comes back is read after that."""
        before = dict(self.written)
        super().step(reported, offered)
        out, back = self.tier.take_copies()
        for rank in range(RANKS):
            if out is not None:
                assert len(set(out.host[rank].tolist())) == len(out.host[rank])
                for page, place in zip(out.pages[rank].tolist(), out.host[rank].tolist()):
                    self.host[rank, place] = before[rank, page]
        if back is not None:
            coming: dict[tuple[int, int], Page] = {}
            for rank in range(RANKS):
                for page, place in zip(back.pages[rank].tolist(), back.host[rank].tolist()):
                    coming[rank, page] = self.host.get((rank, place), ((), -1))
                    self.written.pop((rank, page), None)
            self.sent.append((self.tier.last_fetch, coming))

    @rule(every=st.booleans())
    @precondition(lambda self: self.sent)
    def arrive(self, every: bool) -> None:
        """The next ones, or all."""
        arrived = self.sent if every else self.sent[:1]
        self.sent = self.sent[len(arrived) :]
        for _, coming in arrived:
            self.written |= coming
        number = arrived[-1][0]
        assert self.tier.arrive(number) and not self.tier.arrive(number)

    @rule(really=st.integers(1, 30))
    @precondition(lambda self: len(self.ended) > 3)
    def reset(self, really: int) -> None:
        super().reset(really)
        if really == 13:
            self.tier.clear()
            assert self.tier.find(self.keys(self.ended[-1]), 0) is None

    @invariant()
    def host_pages_are_free_or_held(self) -> None:
        book = self.tier._book
        for rank, streams in enumerate(self.pool.columns):
            held, free = self.tier.held_ids(rank).tolist(), self.tier.free_ids(rank).tolist()
            assert sorted([*held, *free]) == list(range(1, HOST_BLOCKS * STREAMS[rank] + 1))
            # Those that a fetch reads are held, and no others.
            busy = book._busy[:, streams]
            assert busy.sum() == sum(fetch.found.absent[:, streams].sum() for fetch in self.tier._under_way)
            assert book.idle[rank] == int(((book._ids[:, streams] != GONE) & (busy == 0)).sum())

    @invariant()
    def host_pages_hold_their_own_prefix(self) -> None:
        """All that are not on their way out."""
        waiting = {
            (rank, place)
            for _, host in self.tier._saves
            for rank, streams in enumerate(self.pool.columns)
            for place in host[:, streams].ravel().tolist()
        }
        book = self.tier._book
        for key, column in book._column.items():
            assert isinstance(key, tuple)
            assert (book._first[column] <= first_live(key)).all()
            for stream in range(WIDTH):
                rank = 0 if stream < STREAMS[0] else 1
                place = (rank, int(book._ids[column, stream]))
                if place[1] != GONE and place not in waiting:
                    assert self.host[place] == (key, stream)


HostMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50)
TestHostTier = HostMachine.TestCase


def pool_of(blocks: int, host: int) -> tuple[PagePool, HostTier]:
    """A pool of two streams of one rank, and its host memory."""
    pool = PagePool(
        num_blocks=1 + blocks, streams=(2,), num_slots=2, num_chunks=9, max_chunks=4, cached_columns=4 * blocks
    )
    return pool, HostTier(pool, host, 4 * host + 1)


def compute(pool: PagePool, text: str) -> None:
    """A request for each of whose pages there is a letter, from its prompt to its end."""
    assert pool.prefixes is not None
    keys, slot = prefixes(text), pool.open()
    if hit := pool.prefixes.find(keys[:-1]):
        pool.adopt(slot, hit)
    pool.reserve(slot, len(text) - (hit.pages if hit else 0))
    pool.hand_out()
    pool.offer({slot: keys[pool.offered(slot) :]})
    pool.close(slot, keys)


def prefixes(text: str) -> list[str]:
    return [text[:end] for end in range(1, len(text) + 1)]


def fetch(tier: HostTier, text: str) -> None:
    found = tier.find(prefixes(text), 0)
    assert found is not None and found.hit.pages == len(text)
    tier.fetch(found)
    tier.take_copies()
    assert tier.arrive(tier.last_fetch)


def test_only_what_host_memory_lacks_goes_out() -> None:
    """Of a conversation that has gone on, the new pages; of one that came back and went again, none."""
    pool, tier = pool_of(6, 12)
    compute(pool, "abcd")
    compute(pool, "uvwxyz")
    assert tier.saved_total == 2 * 4 and tier.find(prefixes("abcd"), 0) is not None
    assert tier.find(prefixes("abcd"), 4) is None
    fetch(tier, "abcd")
    assert tier.fetched_total == 2 * 4 and tier.saved_total == 2 * (4 + 6) and tier.hit_pages_total == 4
    compute(pool, "abcdef")
    compute(pool, "uvwxyz")
    assert tier.saved_total == 2 * (4 + 6 + 2) and tier.used_total == 2 * 12


def test_what_was_used_last_stays_in_host_memory() -> None:
    """A conversation that has gone on does not count as used: its later end does."""
    pool, tier = pool_of(4, 9)
    for text in ("abc", "klm", "uvw"):
        compute(pool, text)
    compute(pool, "wxyz")
    assert [tier.find(prefixes(text), 0) is not None for text in ("abc", "klm", "uvw")] == [True] * 3
    fetch(tier, "abc")
    compute(pool, "1234")  # "wxyz" went out when "abc" came back, and now "abc" again
    found = [tier.find(prefixes(text), 0) is not None for text in ("abc", "klm", "uvw", "wxyz")]
    assert found == [True, False, False, True]


def test_a_continued_prefix_is_the_first_to_go() -> None:
    pool, tier = pool_of(6, 9)
    compute(pool, "ab")
    compute(pool, "uvwxyz")
    fetch(tier, "ab")
    compute(pool, "abcd")  # the end after "ab" has gone on
    assert next(iter(tier._book._ends.values())).hit.pages == 2


def test_what_does_not_fit_stays_out() -> None:
    pool, tier = pool_of(6, 3)
    compute(pool, "abc")
    compute(pool, "uvwxyz")
    compute(pool, "klmnop")
    assert tier.find(prefixes("uvwxyz"), 0) is None and tier.find(prefixes("abc"), 0) is not None
    assert tier.used_total == 2 * 3


def test_somebody_else_has_computed_it_meanwhile() -> None:
    """Pages that arrive then are given back."""
    pool, tier = pool_of(9, 9)
    compute(pool, "abc")
    compute(pool, "qrstuvwxy")
    found = tier.find(prefixes("abc"), 0)
    assert found is not None
    tier.fetch(found)
    assert tier.is_under_way(found) and tier.is_fetching and pool.used_total == 2 * 3
    compute(pool, "abc")
    assert tier.arrive(1) and not tier.is_fetching and not tier.is_under_way(found)
    assert pool.used_total == 0 and pool.prefixes is not None
    assert len(pool.prefixes.held_ids(0)) + len(pool.free_ids(0)) == 2 * 9


def test_what_arrives_after_a_reset_is_not_found() -> None:
    pool, tier = pool_of(6, 9)
    compute(pool, "abc")
    compute(pool, "uvwxyz")
    found = tier.find(prefixes("abc"), 0)
    assert found is not None
    tier.fetch(found)
    pool.forget_prefixes()
    tier.clear()
    assert tier.arrive(1) and tier.find(prefixes("abc"), 0) is None
    assert pool.used_total == 0 and pool.prefixes is not None and pool.prefixes.find(prefixes("abc")) is None


def test_host_memory_is_shared_by_all_ranks() -> None:
    """In pages of all streams, of which there must be one."""
    spec = replace(fox_manager(2).kv_cache_spec, tensor_ranks=2, stage_layers=(2, 1))
    block = sum(spec.streams) * spec.page_format.page_bytes
    assert host_blocks(spec, 0) == 0 and host_blocks(spec, 7.5 * block / 2**30) == 7
    with pytest.raises(ValueError, match=r"fox.host_cache_gib is 0.001: a page of each of the model's 144 streams"):
        host_blocks(spec, 0.001)


# Copies, on a CPU.


def test_pages_come_back_as_they_went() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(0, 256, (20 * 64 + 5,), dtype=torch.uint8, generator=generator)
    pages, before = pool[: 20 * 64].view(20, 64), pool.clone()
    host = HostPages(pool, 64, 6)
    assert host.fetches().last() == 0
    out = np.array([3, 19, 7], dtype=np.int32)
    host.save(Copies([np.array([1]), out], [np.array([2]), np.array([6, 1, 4])]), 1)
    assert torch.equal(pool, before)
    pages[out] = 255
    host.fetch(Copies([np.array([1]), np.array([2, 5, 3])], [np.array([1]), np.array([4, 6, 1])]), 1, 8)
    was = before[: 20 * 64].view(20, 64)
    assert torch.equal(pages[[2, 5, 3]], was[[7, 3, 19]]) and host.fetches().last() == 8
    untouched = [page for page in range(20) if page not in (2, 3, 5, 7, 19)]
    assert torch.equal(pages[untouched], was[untouched])


class Ended:
    """An event of a GPU."""

    def __init__(self, ended: bool) -> None:
        self.ended = ended

    def query(self) -> bool:
        return self.ended


@pytest.mark.parametrize("pickled", [False, True])
def test_a_fetch_has_arrived_when_it_has_on_all_ranks(pickled: bool) -> None:
    """And when all before it have; it is looked at when the report is read."""
    late: Any = Ended(False)

    def report(rank: int, *events: Any) -> PageReport:
        fetches = Fetches(2, tuple(enumerate(events, 3)))
        return PageReport(0, np.empty(0), np.empty(0), rank, torch.empty(0, 1), None, fetches)

    first, second = report(0, Ended(True), Ended(True)), report(1, late, Ended(True))
    assert (first.fetched, second.fetched) == (4, 2)
    late.ended = True
    if pickled:
        state = second.__getstate__()
        late.ended = False
        second = PageReport.__new__(PageReport)
        second.__dict__.update(state)
    assert first.aggregate(second).fetched == 4
