"""Texts are texts: what stands on the command line is read by the type of its key, and prompt files by what they hold."""

from __future__ import annotations

import json

import pytest
import yaml

from steerfm.cli.config import (
    BenchConfig,
    EvaluateConfig,
    FinetuneConfig,
    SampleConfig,
    SteerConfig,
    TrainConfig,
)
from steerfm.cli.loading import dump, load, make
from steerfm.cli.parts import build_reward
from steerfm.cli.prompts import read_prompts, read_texts
from steerfm.values import ConfigError

TEXTS = [
    "family: man, woman", "a dog #1", "no", "ON", "y", "12:30", "1e3", "007", "0x1F", "1_000", "- a dog", "#1 medal",
    "[red] heart", "heart [red]", "[", "]", "{a}", "{a: b}", "it's: $x", "${oc.env:HOME}", "${name}", "${", "", " two  spaces ",
    "null", "~", "!tag", "&a", "*a", "? a", "%x", "@x", "`x`", "| a", "> a", '"quoted"', "'quoted'", 'say "hi"', "back\\slash",
    "\\n", "a=b", "a,b", "caf\u00e9 \u2764\ufe0f", "a\u2028b", "two\nlines", "\ta", "true", "False", "1", "-1", "1.0", ".5",
    "nan", ".inf", "2001-12-14", "<<", "=", "---", "...", "auto",
]  # fmt: skip


# --- the command line ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("schema", [SampleConfig, SteerConfig, FinetuneConfig, EvaluateConfig])
def test_a_prompt_on_the_command_line_is_never_parsed(schema, text):
    assert load(schema, None, [f"prompt={text}"]).prompt == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back_from_its_yaml(text, tmp_path):
    """Also where another reader of yaml takes it."""
    c = load(SteerConfig, None, [f"prompt={text}", f"label={text}", "reward=clip", f"reward.negative={text}"])
    (tmp_path / "run.yaml").write_text(dump(c), encoding="utf-8")
    assert load(SteerConfig, str(tmp_path / "run.yaml")) == c
    assert yaml.safe_load(dump(c))["prompt"] == text


@pytest.mark.parametrize("text", TEXTS)
def test_arguments_that_are_declared_as_text_are_never_parsed(text):
    c = load(SteerConfig, None, ["reward=clip", f"reward.prompt={text}", f"reward.negative={text}", "reward.weight=.5"])
    assert c.reward == {"name": "clip", "prompt": text, "negative": text, "weight": 0.5}
    c = load(FinetuneConfig, None, ["judge=emoji_judge", f"judge.prompt={text}", "reward=ocr", f"reward.text={text}"])
    assert (c.judge, c.reward) == ({"name": "emoji_judge", "prompt": text}, {"name": "ocr", "text": text})
    c = load(BenchConfig, None, [f"problems.a.prompt={text}", "problems.a.reward=clip", f"problems.a.reward.prompt={text}"])
    assert c.problems == {"a": {"prompt": text, "reward": {"name": "clip", "prompt": text}}}


@pytest.mark.parametrize("text", [text for text in TEXTS if text != "null"])
def test_labels_and_paths_are_texts(text):
    c = load(SteerConfig, None, [f"label={text}", f"out=runs/{text}", f"model={text}"])
    assert (c.label, c.out, c.model) == (text, f"runs/{text}", text)
    assert load(FinetuneConfig, None, [f"label={text}"]).label == text
    assert load(TrainConfig, None, [f"text={text}", f"init={text}"]).text == text


def test_null_takes_a_label_or_a_path_away_and_is_a_word_in_a_prompt():
    c = load(SteerConfig, None, ["label=Bag", "label=null", "out=a", "out=null", "prompt=null", "judge=null"])
    assert (c.label, c.out, c.prompt, c.judge) == (None, None, "null", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a, b]", ["a", "b"]),
        ("[red heart,pizza ]", ["red heart", "pizza"]),
        ("[no, 12:30, 007, a: b, it's, #1]", ["no", "12:30", "007", "a: b", "it's", "#1"]),
        ('["a, b", c]', ["a, b", "c"]),
        ("['a, b', \"c\"]", ["a, b", "c"]),
        ('["\\"a\\"", "b\\u00e9"]', ['"a"', "b\u00e9"]),
        ('["[red]"]', ["[red]"]),
        ("[[red] heart, b]", ["[red] heart", "b"]),
        ("[red]", ["red"]),
        ("[${HOME}, null]", ["${HOME}", "null"]),
    ],
)
def test_a_list_of_prompts(text, expected):
    assert load(SteerConfig, None, [f"prompt={text}"]).prompt == expected
    assert load(FinetuneConfig, None, [f"label={text}"]).label == expected


@pytest.mark.parametrize("key", ["prompt=[]", "prompt=[ ]", "prompt=[a,,b]", "prompt=[a,]", "label=[]"])
def test_an_empty_list_or_text_in_it_is_refused(key):
    with pytest.raises(ConfigError, match="empty list or text"):
        load(FinetuneConfig, None, [key])


@pytest.mark.parametrize(
    "content", ["prompt: no", "prompt: 12", "prompt: 1e3", "prompt: [a, yes]", "prompt: {a: b}", "label: on", "label: 1.5"]
)
def test_what_yaml_takes_for_something_else_is_not_guessed_at(content, tmp_path):
    (tmp_path / "run.yaml").write_text(content + "\n")
    with pytest.raises(ConfigError, match="not a text: write it in quotes"):
        load(SteerConfig, str(tmp_path / "run.yaml"))


def test_yaml_in_a_reward_is_not_guessed_at_either(tmp_path):
    (tmp_path / "run.yaml").write_text("reward: {name: clip, prompt: no}\n")
    with pytest.raises(ConfigError, match=r"reward\.prompt=false: not a text"):
        load(SteerConfig, str(tmp_path / "run.yaml"))
    (tmp_path / "run.yaml").write_text("reward: [{name: clip, weight: 2, prompt: 'no'}]\nlabel: 3\nprompt: 12:30\n")
    c = load(SteerConfig, str(tmp_path / "run.yaml"))
    assert (c.reward, c.label, c.prompt) == ([{"name": "clip", "weight": 2.0, "prompt": "no"}], "3", "12:30")


def test_own_functions_get_what_they_declare(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n\ndef mine(images, word: str, also='x', scale: float = 1.0, free=None):\n"
        "    mine.seen = (word, also, scale, free)\n    return images.mean((1, 2, 3))\n"
    )
    reward = f"reward={tmp_path / 'mine.py'}:mine"
    c = load(SteerConfig, None, [reward, "reward.word=100", "reward.also=no", "reward.scale=2", "reward.free=[1, a]"])
    assert list(c.reward.values())[1:] == ["100", "no", 2.0, [1, "a"]]
    assert type(c.reward["scale"]) is float and build_reward(c.reward).name == "mine"
    c = load(SteerConfig, None, [reward, "reward.word=x", "reward.free=007"])
    assert c.reward["free"] == "007"


def test_a_class_may_be_called_anything():
    for text in ("no", "007", "on"):
        assert load(SteerConfig, None, ["reward=classifier", f"reward.target={text}"]).reward["target"] == text
    assert load(SteerConfig, None, ["reward=classifier", "reward.target=3"]).reward["target"] == 3
    assert load(SteerConfig, None, ["reward=classifier", "reward.target=null"]).reward["target"] is None


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(SteerConfig, None, ["prompt=caf\udce9"])


# --- files -----------------------------------------------------------------------------------------------------------
PAIR = ["a dog, brown", "caf\u00e9"]
FORMS = {
    "lines": "a dog, brown\n\n  caf\u00e9  \n",
    "csv": 'prompt,seed\n"a dog, brown",1\ncaf\u00e9,2\n',
    "csv with semicolons": "seed;Prompt\n1;a dog, brown\n\n2;caf\u00e9\n",
    "csv with tabs": "seed\tcaption\n1\ta dog, brown\n2\tcaf\u00e9",
    "csv with text": 'id,text,note\n1,"a dog, brown",x\n2,caf\u00e9,\n',
    "json": json.dumps(PAIR),
    "json of objects": json.dumps([{"prompt": text, "seed": 1} for text in PAIR], indent=2),
    "json object": json.dumps({"other": [1, 2], "prompts": PAIR}, ensure_ascii=False, indent=1),
    "json lines": "\n".join(json.dumps({"prompt": text, "n": [1]}, ensure_ascii=False) for text in PAIR) + "\n\n",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["", ".txt", ".TXT", ".text"])
@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line", ["\n", "\r\n", "\r"])
def test_prompt_files_are_read_by_what_they_hold(tmp_path, form, ending, code, line):
    file = tmp_path / f"prompts{ending}"
    file.write_bytes(FORMS[form].replace("\n", line).encode(code))
    assert read_prompts(str(file)) == read_prompts(file) == PAIR


@pytest.mark.parametrize(
    ("ending", "form"),
    [(".csv", "csv"), (".csv", "csv with semicolons"), (".CSV", "csv with text"), (".tsv", "csv with tabs"), (".json", "json"),
     (".json", "json object"), (".json", "json lines"), (".jsonl", "json lines"), (".jsonl", "json"),
     (".JSON", "json of objects")],
)  # fmt: skip
def test_and_with_their_own_endings(tmp_path, ending, form):
    (tmp_path / f"prompts{ending}").write_text(FORMS[form], encoding="utf-8")
    assert read_prompts(str(tmp_path / f"prompts{ending}")) == PAIR


@pytest.mark.parametrize(
    ("ending", "content", "expected"),
    [
        (".csv", "prompt\na\nb\n", ["a", "b"]),
        (".csv", 'a\n"b, c"\n', ["a", "b, c"]),
        (".csv", '"prompt"\n"two\nlines"\n', ["two\nlines"]),
        (".txt", '"a"\n[red] heart\n{b}\n#1\nno\n', ['"a"', "[red] heart", "{b}", "#1", "no"]),
        (".txt", "[red] heart\nb\n", ["[red] heart", "b"]),
        (".txt", "prompt\n", ["prompt"]),
        (".txt", "a\u2028b\u0085c\n", ["a\u2028b\u0085c"]),
        (".jsonl", '{"prompt": "a\u2028b"}\n"c"\n', ["a\u2028b", "c"]),
        (".jsonl", '{"prompt": ""}', [""]),
        (".json", '{"prompt": "a"}', ["a"]),
        (".json", '"a"', ["a"]),
    ],
)
def test_other_forms(tmp_path, ending, content, expected):
    file = tmp_path / f"prompts{ending}"
    file.write_bytes(content.encode())
    assert read_texts(file) == expected


@pytest.mark.parametrize(
    ("ending", "content", "fix"),
    [
        (".txt", "a\ncaf\u00e9\n".encode("latin-1"), "line 2: not UTF-8"),
        ("", "a\r\nb\r\n\u00e9\r\n".encode("latin-1"), "line 3: not UTF-8"),
        (".txt", "a\nb\n".encode("utf-16-le"), "line 1: not a text file"),
        (".txt", b"\x89PNG\r\n\x1a\n\x00\x00", "line 1: not UTF-8"),
        (".jsonl", b'{"prompt": null}\n', "line 1: not"),
        (".jsonl", b'{"prompt": "a"}\n\n{"prompt": 3}\n', "line 3: not"),
        (".jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2: not"),
        (".jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', "line 2: not"),
        (".jsonl", b'{"prompt": ["a", "b"]}\n', "line 1: not"),
        (".json", b'["a",\n null]\n', "line 2: not"),
        (".json", b'["a",\n "b",\n 3]\n', "line 3: not"),
        (".json", b'{"prompts": [\n "a",\n ["b"]]}\n', "line 3: not"),
        (".json", b'["a",\n "b"\n "c"]', "line 3: not JSON"),
        (".json", b'["\\ud800"]', "line 1: not"),
        ("", b'["a",\n null]\n', "line 2: not"),
        (".csv", b"prompt,seed\na,1\n,2\n", "line 3: no prompt"),
        (".csv", b"seed,prompt\n1,a\n2\n", "line 3: no prompt"),
        (".csv", b"name,seed\na,1\n", "line 1: several columns"),
        (".csv", b"a;1\nb;2\n", "line 1: several columns"),
        (".csv", b'prompt,n\n"a,1\n', "line"),
        (".txt", b"", "no prompts"),
        ("", b"\n \n", "no prompts"),
        (".json", b"[]", "no prompts"),
        (".json", b"", "no prompts"),
        (".csv", b"prompt,seed\n", "no prompts"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_refused_with_the_line(tmp_path, monkeypatch, ending, content, fix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"prompts{ending}").write_bytes(content)
    with pytest.raises(ConfigError, match=fix) as error:
        read_prompts(f"prompts{ending}")
    assert f"prompts{ending}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.txt", "my prompts.csv", "a/b.json", "x.JSONL"])
def test_a_missing_file_is_never_a_prompt(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        read_prompts(name)
    assert read_prompts([name]) == [name]


def test_texts_that_look_a_little_like_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").mkdir()
    for text in ("dog", "and/or", "a" * 5000, "nul\0l", "."):
        assert read_prompts(text) == [text]
    assert read_prompts(["emoji.txt"]) == ["emoji.txt"] and len(read_prompts("emoji.txt")) == 1436


def test_bench_takes_the_same_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = make(SteerConfig, {"model": "fashion", "prompt": ["a", "b"], "reward": "clip"}, "problems.x.")
    assert told.prompt == ["a", "b"]
    with pytest.raises(ConfigError, match=r"problems\.x\.prompt=false: not a text"):
        make(SteerConfig, {"prompt": False}, "problems.x.")
