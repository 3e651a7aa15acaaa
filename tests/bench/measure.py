"""Times of work on a set of weights, each beside its error against fp64, and the table of them."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import formula
import torch

Work = Callable[[], object]
Terms = Sequence[tuple[float, Mapping[str, formula.Change]]]
"""(strength, what it does by weight) of every adapter."""
SAMPLES = 6


class Weights:
    """The weights that are merged into, as they were, and the few that are compared with fp64."""

    def __init__(self, live: Mapping[str, torch.Tensor]):
        self.live = dict(live)
        self.pristine = {name: weight.clone() for name, weight in self.live.items()}
        names = list(self.live)[:: max(1, len(self.live) // SAMPLES)]
        self.samples = {name: self.pristine[name].cpu() for name in names}

    def reset(self) -> None:
        for name, weight in self.live.items():
            weight.copy_(self.pristine[name])

    def restored(self) -> bool:
        """Bit for bit, all of them. Bytes, as a number may equal another one's: -0.0."""
        return all(torch.equal(_bytes(w), _bytes(self.pristine[name])) for name, w in self.live.items())

    def copying(self) -> Work:
        """One copy of all bytes from one place to another: what a merge cannot be faster than."""
        flat = torch.cat([_bytes(w) for w in self.live.values()])
        target = torch.empty_like(flat)
        return lambda: target.copy_(flat)

    def error(self, terms: Terms, merged: Mapping[str, torch.Tensor] | None = None) -> float:
        """Norm of the distance from the fp64 formula, over that of its correct rounding: 1 is perfect.

        In fp32 the sums' own rounding counts too. Stochastic rounding gives 1.41: the mean square of its distance is
        1/6 of a step's, that of the nearest 1/12.
        """
        live = self.live if merged is None else merged
        with ThreadPoolExecutor() as pool:
            pairs = pool.map(lambda name: self._distances(name, live[name].cpu(), terms), self.samples)
            got, perfect = (sum(column) for column in zip(*pairs, strict=True))
        return (got / perfect) ** 0.5

    def _distances(self, name: str, merged: torch.Tensor, terms: Terms) -> tuple[float, float]:
        base = self.samples[name]
        want = base.double()
        for strength, changes in terms:
            want = want + torch.from_numpy(changes[name].added(base, strength))
        # By way of float: torch has no other from double to 8 bits.
        perfect = want.float().to(base.dtype)
        return tuple((w.double() - want).square().sum().item() for w in (merged, perfect))


def _bytes(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(-1).view(torch.uint8)


@dataclass
class Row:
    what: str
    ms: float
    gpu_ms: float | None = None
    """By CUDA events, without what the host needs before the first launch."""
    copies: float | None = None
    """`ms` as a multiple of the copy's."""
    gpu_copies: float | None = None
    at_most: float | None = None
    """What the number that `limited` names may be."""
    limited: str = "copies"
    error: float | str | None = None
    table: str = ""

    @property
    def missed(self) -> bool:
        return self.at_most is not None and getattr(self, self.limited) > self.at_most


@dataclass
class Ratio:
    """Of two rows."""

    what: str
    ratio: float
    at_most: float

    @property
    def missed(self) -> bool:
        return self.ratio > self.at_most


@dataclass
class Table:
    """The rows so far, what could not be measured, and how to time."""

    cuda: bool
    repeat: int
    only: str = ""
    rows: list[Row] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    copies: dict[str, Row] = field(default_factory=dict)

    def wants(self, *whats: str) -> bool:
        """Whether any row of these names was asked for."""
        return any(self.only.lower() in what.lower() for what in whats)

    def skip(self, what: str, reason: object) -> None:
        """Keeps the others, also from a fault: a run on a GPU is not quickly had again."""
        kind = f"{type(reason).__name__}: " if isinstance(reason, Exception) else ""
        self.absent.append(f"{what}: {kind}{' '.join(str(reason).split())[:300]}")
        print(self.absent[-1], file=sys.stderr)

    def add(self, row: Row, copy: str | None = "copy") -> Row:
        """Puts the row into the table, beside the copy of this name."""
        limit = self.copies.get(copy)
        if limit:
            row.copies = row.ms / limit.ms
            row.gpu_copies = row.gpu_ms / limit.gpu_ms if row.gpu_ms and limit.gpu_ms else None
        if self.wants(row.what):
            self.rows.append(row)
        print(f"{row.what}: {row.ms:.2f}", file=sys.stderr)
        return row

    def add_copy(self, name: str, what: str, work: Work) -> None:
        """A copy that other rows are multiples of; measured whether it is asked for or not."""
        self.copies[name] = row = Row(what, self.wall(work), self.on_gpu(work))
        row.copies = row.gpu_copies = 1.0
        self.rows.append(row)

    def wall(self, work: Work, before: Work | None = None) -> float:
        """Median of the host's times in ms, from the call until the device is done; the first run does not count."""
        times = []
        for _ in range(self.repeat + 1):
            if before:
                before()
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times[1:])

    def on_gpu(self, work: Work, host_ms: float = 0.0) -> float | None:
        """Median of the device's own times in ms.

        The device sleeps for longer than the host needs to enqueue all, so that no gap between launches counts.
        """
        if not self.cuda:
            return None
        times = []
        for _ in range(self.repeat):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # About 2 GHz; what takes longer than that waits for the device anyway.
            torch.cuda._sleep(int(2e6 * min(2 + 1.5 * host_ms, 100)))
            start.record()
            work()
            end.record()
            self.wait()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def __str__(self) -> str:
        """In the form of Markdown."""
        heads = ["what", "ms", *(["GPU ms"] if self.cuda else []), "x copy", *(["GPU x copy"] if self.cuda else [])]
        heads += ["at most", "error, x perfect rounding"]
        lines = []
        for table in dict.fromkeys(row.table for row in self.rows):
            lines += ["", f"| {' | '.join([table or heads[0], *heads[1:]])} |", "|---" * len(heads) + "|"]
            lines += [self._line(row) for row in self.rows if row.table == table]
        if self.ratios:
            lines += ["", "| ratio | | at most |", "|---|---|---|"]
            lines += [f"| {r.what} | {r.ratio:.3f} | {r.at_most:g}{' **missed**' * r.missed} |" for r in self.ratios]
        return "\n".join([*lines, "", *(f"not measured: {line}" for line in self.absent)])

    def _line(self, row: Row) -> str:
        limit = "" if row.at_most is None else f"{row.at_most:g}{' ms' if row.limited == 'ms' else ''}"
        error = row.error if isinstance(row.error, str) else _digits(row.error)
        cells = [row.what, _digits(row.ms), _digits(row.copies), limit + " **missed**" * row.missed, error]
        if self.cuda:
            cells[2:3] = [_digits(row.gpu_ms), _digits(row.copies), _digits(row.gpu_copies)]
        return f"| {' | '.join(cells)} |"

    def json(self) -> str:
        """One line per row."""
        lines = [json.dumps(asdict(row) | {"missed": row.missed}) for row in [*self.rows, *self.ratios]]
        return "\n".join(lines + [json.dumps({"not measured": line}) for line in self.absent])


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
