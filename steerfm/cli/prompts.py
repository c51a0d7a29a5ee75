"""Prompts from a file, by what it holds and not by its ending.

| form | example |
| --- | --- |
| a prompt a line | ``a red heart`` |
| csv with a column prompt, text or caption (parted by comma, semicolon or tab), or one column in a .csv | ``prompt,seed`` |
| JSON | ``["a", "b"]``, ``[{"prompt": "a"}]``, ``{"prompts": ["a", "b"]}`` |
| JSON lines | ``{"prompt": "a"}`` |

UTF-8, or UTF-16 and UTF-32 with a byte order mark; lines end with \\n, \\r\\n or \\r.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steerfm import shipped
from steerfm.values import ConfigError

COLUMNS = ("prompt", "text", "caption")
"""Names of the column of the prompts, in this order."""

ENDINGS = (".txt", ".csv", ".tsv", ".json", ".jsonl")
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
LINE = re.compile(r"\r\n|\n|\r")


def read_prompts(prompt: Any) -> list[str]:
    """Prompts from a text, a list of texts, or a file of them in any of the forms above. A text is a file where
    there is one of that name, or where it ends like one (.txt, .csv, .tsv, .json, .jsonl); one that is not there is looked for
    among those that ship, in configs/prompts. A list holds prompts only.

    Raises:
        ConfigError: naming the file and the line.
    """
    if prompt is None:
        return []
    if not isinstance(prompt, str | Path):
        for text in prompt:
            if not isinstance(text, str):
                raise ConfigError(f"prompt={text!r}: not a text")
        return list(prompt)
    named = str(prompt).lower().endswith(ENDINGS) or isinstance(prompt, Path)
    folder = shipped.folder("configs") / "prompts"
    if os.path.exists(prompt) and not os.path.isdir(prompt):  # False where it is no possible name of a file
        file = Path(prompt)
    elif named and (folder / Path(prompt).name).is_file() and Path(prompt).name == str(prompt):
        file = folder / prompt
    elif named or (os.path.isdir(prompt) and str(prompt).endswith(os.sep)):
        known = ", ".join(sorted(path.name for path in folder.glob("*")))
        raise ConfigError(f"prompt={prompt}: no such file; shipped: {known}; as a prompt: prompt='[{json.dumps(str(prompt))}]'")
    else:
        return [str(prompt)]
    if not file.is_file():
        raise ConfigError(f"prompt={prompt}: not a file that can be read twice")
    try:
        return read_texts(file)
    except ValueError as error:
        raise ConfigError(f"prompt={prompt}: {error}" if str(prompt) != str(file) else str(error)) from None


def read_texts(file: Path) -> list[str]:
    """The prompts that a file holds, in order; blank lines are none.

    Raises:
        ValueError: no prompts, something else than a text among them, or another code page: with file and line.
    """
    text = decode(file)
    found = _json(text, file)
    if found is None:
        found = _csv(text, file)
    if found is None:
        found = [line.strip() for line in LINE.split(text) if line.strip()]
    if not found:
        raise ValueError(f"{file}: the file has no prompts")
    return found


def decode(file: Path) -> str:
    """The text of a file, without its byte order mark.

    Raises:
        ValueError: no UTF-8, with the line.
    """
    raw = file.read_bytes()
    code = next((code for mark, code in MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(code)
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode(code, "replace")
        raise ValueError(f"{file}, line {_line(before)}: not UTF-8: save the file as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{file}, line {_line(text[: text.index(chr(0))])}: not a text file, or UTF-16 without its mark")
    return text


def _line(before: str) -> int:
    """Number of the line that starts or goes on after this text."""
    return 1 + len(LINE.findall(before))


def _prompt(value: Any, file: Path, line: int) -> str:
    """The prompt of a JSON value: a text, or a dictionary with one.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, dict):
        value = value.get("prompt", value)
    if not isinstance(value, str) or not _printable(value):
        shown = json.dumps(value)
        raise ValueError(f'{file}, line {line}: not {{"prompt": "..."}} but {shown if len(shown) < 60 else shown[:57] + "..."}')
    return value


def _printable(text: str) -> bool:
    """Whether it can be written as UTF-8: half of a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


# --- JSON ------------------------------------------------------------------------------------------------------------
def _json(text: str, file: Path) -> list[str] | None:
    """Prompts of a JSON document or of JSON lines, None where it is neither."""
    named = file.suffix.lower() in (".json", ".jsonl")
    if not named and text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        lines = [(number, line) for number, line in enumerate(LINE.split(text), 1) if line.strip()]
        if not lines or not (file.suffix.lower() == ".jsonl" or _is_object(lines[0][1])):
            if not named or not lines:
                return [] if named else None
            raise ValueError(f"{file}, line {getattr(error, 'lineno', 1)}: not JSON: {error}") from None
        return [_prompt(_object(line, file, number), file, number) for number, line in lines]
    start = text.find("[")
    if isinstance(value, dict) and isinstance(value.get("prompts"), list):
        start, value = len(text) - len(re.split(r'"prompts"\s*:\s*', text, maxsplit=1)[1]), value["prompts"]
    if isinstance(value, list):
        return [_prompt(item, file, line) for item, line in _items(text, start)]
    return [_prompt(value, file, _line(text[: len(text) - len(text.lstrip())]))]


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _object(line: str, file: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise ValueError(f'{file}, line {number}: not {{"prompt": "..."}}') from None


def _items(text: str, start: int) -> Iterator[tuple[Any, int]]:
    """The items of the JSON list that starts at ``start``, each with its line."""
    read = json.JSONDecoder()
    place = _next(text, start + 1)
    while text[place] != "]":
        value, end = read.raw_decode(text, place)
        yield value, _line(text[:place])
        place = _next(text, end)


def _next(text: str, place: int) -> int:
    """The first place from this one on that is neither white space nor a comma."""
    while text[place] in " \t\r\n,":
        place += 1
    return place


# --- csv -------------------------------------------------------------------------------------------------------------
def _csv(text: str, file: Path) -> list[str] | None:
    """Prompts of a table, None where it is none: no column is called as in `COLUMNS`, and the ending says nothing."""
    first = next((line for line in LINE.split(text) if line.strip()), "")
    named = file.suffix.lower() in (".csv", ".tsv")
    for delimiter in (",", ";", "\t"):
        names = [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])]
        known = [name for name in COLUMNS if name in names]
        if known and (named or len(names) > 1):
            rows = _rows(text, file, delimiter)
            next(rows)
            return [_cell(row, names.index(known[0]), known[0], file, line) for row, line in rows]
    if not named:
        return None
    rows = list(_rows(text, file, ","))
    for row, line in rows:
        others = {mark: row[0].count(mark) for mark in ";\t"}
        parted = len(rows) > 1 and any(n and all(r[0].count(mark) == n for r, _ in rows) for mark, n in others.items())
        if len(row) > 1 or parted:
            raise ValueError(f"{file}, line {line}: several columns, and none of them is called prompt in the first line")
    return [row[0].strip() for row, _ in rows]


def _rows(text: str, file: Path, delimiter: str) -> Iterator[tuple[list[str], int]]:
    """The rows that are not blank, each with the line that it ends on."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield row, reader.line_num
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}") from None


def _cell(row: list[str], column: int, name: str, file: Path, line: int) -> str:
    if column >= len(row) or not row[column].strip():
        raise ValueError(f"{file}, line {line}: no {name} in this row")
    return row[column].strip()
