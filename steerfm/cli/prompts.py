"""Read prompts from a file. The format is recognised by content, not only by suffix.

| form | example |
| --- | --- |
| one prompt per line | ``a red heart`` |
| csv with a column prompt, text or caption (comma, semicolon or tab), or a .csv with one column | ``prompt,seed`` |
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
"""Names of the column of prompts, in order of preference."""

ENDINGS = (".txt", ".csv", ".tsv", ".json", ".jsonl")
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
LINE = re.compile(r"\r\n|\n|\r")


def read_prompts(prompt: Any) -> list[str]:
    """Read prompts from a text, a list of texts, or a file in one of the formats above.

    A text is a file name if such a file exists, or if it ends in .txt, .csv, .tsv, .json or .jsonl. A file that does not exist
    is looked up among the shipped ones, in configs/prompts. A list holds prompts only, no files.

    Raises:
        ConfigError: the file cannot be read. The message names the file and the line.
    """
    if prompt is None:
        return []
    if not isinstance(prompt, str | Path):
        for text in prompt:
            if not isinstance(text, str):
                raise ConfigError(f"prompt={text!r}: not a text")
        return list(prompt)
    looks_like_file = str(prompt).lower().endswith(ENDINGS) or isinstance(prompt, Path)
    folder = shipped.folder("configs") / "prompts"
    if os.path.exists(prompt) and not os.path.isdir(prompt):  # False if it cannot be a file name
        file = Path(prompt)
    elif looks_like_file and (folder / Path(prompt).name).is_file() and Path(prompt).name == str(prompt):
        file = folder / prompt
    elif looks_like_file or (os.path.isdir(prompt) and str(prompt).endswith(os.sep)):
        names = ", ".join(sorted(path.name for path in folder.glob("*")))
        raise ConfigError(f"prompt={prompt}: no such file; shipped: {names}; as a prompt: prompt='[{json.dumps(str(prompt))}]'")
    else:
        return [str(prompt)]
    if not file.is_file():
        raise ConfigError(f"prompt={prompt}: not a regular file, and it is read more than once")
    try:
        return read_texts(file)
    except ValueError as error:
        raise ConfigError(f"prompt={prompt}: {error}" if str(prompt) != str(file) else str(error)) from None


def read_texts(file: Path) -> list[str]:
    """Return the prompts of a file, in order, without blank lines.

    Raises:
        ValueError: there are no prompts, one is not a text, or the encoding is another one. The message names file and line.
    """
    text = decode(file)
    prompts = _json(text, file)
    if prompts is None:
        prompts = _csv(text, file)
    if prompts is None:
        prompts = [line.strip() for line in LINE.split(text) if line.strip()]
    if not prompts:
        raise ValueError(f"{file}: the file has no prompts")
    return prompts


def decode(file: Path) -> str:
    """Return the text of a file, without its byte order mark.

    Raises:
        ValueError: the file is not UTF-8. The message names the line.
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
    """Return the line number at the end of this text."""
    return 1 + len(LINE.findall(before))


def _prompt(value: Any, file: Path, line: int) -> str:
    """Return the prompt of a JSON value, which is a text or an object with the key "prompt".

    Raises:
        ValueError: any other value.
    """
    if isinstance(value, dict):
        value = value.get("prompt", value)
    if not isinstance(value, str) or not _printable(value):
        text = json.dumps(value)
        raise ValueError(f'{file}, line {line}: not {{"prompt": "..."}} but {text if len(text) < 60 else text[:57] + "..."}')
    return value


def _printable(text: str) -> bool:
    """Whether a text can be written as UTF-8, which half of a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


# --- JSON ------------------------------------------------------------------------------------------------------------
def _json(text: str, file: Path) -> list[str] | None:
    """Return the prompts of a JSON document or of JSON lines; None if the text is neither."""
    by_suffix = file.suffix.lower() in (".json", ".jsonl")
    if not by_suffix and text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        lines = [(number, line) for number, line in enumerate(LINE.split(text), 1) if line.strip()]
        if not lines or not (file.suffix.lower() == ".jsonl" or _is_object(lines[0][1])):
            if not by_suffix or not lines:
                return [] if by_suffix else None
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
    """Yield the items of the JSON list that starts at ``start``, each with its line number."""
    decoder = json.JSONDecoder()
    place = _next(text, start + 1)
    while text[place] != "]":
        value, end = decoder.raw_decode(text, place)
        yield value, _line(text[:place])
        place = _next(text, end)


def _next(text: str, place: int) -> int:
    """Return the first position from ``place`` on that is neither white space nor a comma."""
    while text[place] in " \t\r\n,":
        place += 1
    return place


# --- csv -------------------------------------------------------------------------------------------------------------
def _csv(text: str, file: Path) -> list[str] | None:
    """Return the prompts of a table; None if no column has a name of `COLUMNS` and the suffix is not that of a table."""
    first = next((line for line in LINE.split(text) if line.strip()), "")
    by_suffix = file.suffix.lower() in (".csv", ".tsv")
    for delimiter in (",", ";", "\t"):
        names = [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])]
        present = [name for name in COLUMNS if name in names]
        if present and (by_suffix or len(names) > 1):
            rows = _rows(text, file, delimiter)
            next(rows)
            return [_cell(row, names.index(present[0]), present[0], file, line) for row, line in rows]
    if not by_suffix:
        return None
    rows = list(_rows(text, file, ","))
    for row, line in rows:
        others = {mark: row[0].count(mark) for mark in ";\t"}
        several = len(rows) > 1 and any(n and all(r[0].count(mark) == n for r, _ in rows) for mark, n in others.items())
        if len(row) > 1 or several:
            raise ValueError(f"{file}, line {line}: several columns, and the first line names none of them prompt")
    return [row[0].strip() for row, _ in rows]


def _rows(text: str, file: Path, delimiter: str) -> Iterator[tuple[list[str], int]]:
    """Yield the rows that are not blank, each with the number of its last line."""
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
