"""Tables that fit their terminal and do not break inside words.

A wide table is wrapped between words, then split into tables that repeat the key columns, and at
last shown as lists. Only a word longer than a line is broken.
"""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

_GAP = 2


class FittedTable(Table):
    """Omits empty columns. Cells are plain text.

    Args:
        num_key_columns: leading columns that identify a row.
        plain: no lines between columns.
    """

    def __init__(self, title: str = "", *, num_key_columns: int = 1, plain: bool = False) -> None:
        super().__init__()
        self._heading = title
        self._num_key_columns = num_key_columns
        self._plain = plain

    def add_text_column(self, head: str, *, right: bool = False) -> None:
        """`right` is for numbers."""
        self.add_column(Text(head), justify="right" if right else "left", overflow="fold")

    def add_texts(self, *cells: str | Text) -> None:
        self.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._heading:
            yield Text(self._heading, style="table.title", overflow="fold")
        numbers = self._numbers_with_content()
        needs = [_needs(console, options, self.columns[number]) for number in numbers]
        num_keys = sum(number < self._num_key_columns for number in numbers)
        parts = self._parts([need.minimum for need in needs], num_keys, options.max_width)
        for part in parts:
            widths = _widths([needs[place] for place in part], options.max_width - self._overhead(len(part)))
            yield self._part([numbers[place] for place in part], widths)
        if not parts:
            yield from self._lists(numbers, options.max_width)
        if self.caption:
            yield Text(str(self.caption), style="table.caption")

    def _numbers_with_content(self) -> list[int]:
        filled = [
            number for number, column in enumerate(self.columns) if any(str(cell).strip() for cell in column.cells)
        ]
        return filled or list(range(len(self.columns)))

    def _overhead(self, num_columns: int) -> int:
        """Characters of a line outside cells."""
        return _GAP * num_columns if self._plain else 3 * num_columns + 1

    def _parts(self, minimums: Sequence[int], num_keys: int, width: int) -> list[list[int]]:
        """Columns of each table, keys first; empty if a key and another do not fit."""
        places = range(len(minimums))
        if sum(minimums) + self._overhead(len(minimums)) <= width:
            return [list(places)]
        num_keys = min(num_keys, len(minimums) - 1)
        keys, others = list(places[:num_keys]), places[num_keys:]
        parts: list[list[int]] = []
        for place in others:
            if not self._fits([*keys, place], minimums, width):
                return []
            # Fewer tables are easier to read than columns in their order.
            part = next((part for part in parts if self._fits([*part, place], minimums, width)), None)
            if part is None:
                parts.append([*keys, place])
            else:
                part.append(place)
        return parts

    def _fits(self, part: Sequence[int], minimums: Sequence[int], width: int) -> bool:
        return sum(minimums[place] for place in part) + self._overhead(len(part)) <= width

    def _part(self, numbers: Sequence[int], widths: Sequence[int]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0)) if self._plain else Table()
        for number, width in zip(numbers, widths, strict=True):
            column = self.columns[number]
            table.add_column(column.header, justify=column.justify, overflow=column.overflow, width=width)
        cells = [list(self.columns[number].cells) for number in numbers]
        for row, *texts in zip(self.rows, *cells, strict=True):
            table.add_row(*texts, style=row.style, end_section=row.end_section)
        return table

    def _lists(self, numbers: Sequence[int], width: int) -> RenderResult:
        """Folds words longer than the line."""
        heads = [self.columns[number].header for number in numbers]
        cells = [list(self.columns[number].cells) for number in numbers]
        head_width = min(max(len(str(head)) for head in heads), max(width // 2 - _GAP, 1))
        for texts in zip(*cells, strict=True):
            grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
            grid.add_column(width=head_width, style="table.header", overflow="fold")
            grid.add_column(width=max(width - head_width - 2 * _GAP, 1), overflow="fold")
            for head, text in zip(heads, texts, strict=True):
                grid.add_row(head, text)
            yield grid
            yield Text()


def _needs(console: Console, options: ConsoleOptions, column: Column) -> Measurement:
    """Width of the longest word, and of the longest line."""
    # Unbounded, because text cropped to the terminal's width would seem to fit.
    unbounded = options.update(max_width=100_000)
    texts: list[RenderableType] = [column.header, *column.cells]
    measured = [Measurement.get(console, unbounded, text) for text in texts]
    return Measurement(max(max(each.minimum for each in measured), 1), max(max(each.maximum for each in measured), 1))


def _widths(needs: Sequence[Measurement], room: int) -> list[int]:
    """Fits columns into `room`: each at its longest line, the widest narrowed first."""

    def under(bound: int) -> list[int]:
        return [max(need.minimum, min(need.maximum, bound)) for need in needs]

    bound = min(max(need.maximum for need in needs), max(room, 1))
    while bound > 1 and sum(under(bound)) > room:
        bound -= 1
    widths = under(bound)
    for place, need in enumerate(needs):  # what the last step left over
        widths[place] += min(max(need.maximum - widths[place], 0), room - sum(widths), 1)
    return widths
