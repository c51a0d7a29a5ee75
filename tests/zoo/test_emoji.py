"""The captioned emoji: what is in them, how they are split, and what an epoch holds."""

from __future__ import annotations

import pytest
import torch
from steerfm_zoo.emoji import pictures as emoji
from steerfm_zoo.emoji.data import EmojiData

from steerfm import cli
from steerfm.cli.prompts import read_prompts

needs_data = pytest.mark.data("emoji")


@pytest.fixture(scope="module")
def data() -> emoji.Emoji:
    return emoji.load()


@needs_data
def test_what_is_in_them(data):
    assert data.pictures.shape == (9516, 3, 32, 32) and data.pictures.dtype == torch.uint8
    assert len(data.names) == len(set(data.names)) == 1636 and all(name.strip() == name for name in data.names)
    assert len(data.keywords) == 1636 and len(data.keywords) == 1636
    assert torch.bincount(data.style).tolist() == [3216, 3216, 3084]
    assert data.tone.max() == 5 and int((data.tone == 0).sum()) == 4871
    corners = data.pictures[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].float().mean((1, 2))
    assert (corners > 200).float().mean() > 0.85  # on white
    heart = data.names.index("red heart")
    for row in (data.concept == heart).nonzero().flatten():
        r, g, b = data.pictures[row, :, 10:20, 10:20].float().mean((1, 2))
        assert r > 150 > max(g, b)


@needs_data
def test_the_split_is_by_concept(data):
    assert int(data.held_out.sum()) == emoji.HELD_OUT
    trained, held = ([data.concept[group].unique().item() for group in data.groups(side)] for side in (False, True))
    assert not set(trained) & set(held) and set(trained) | set(held) == set(range(1636))
    assert len(trained) + len(held) == 4871  # each concept once per style
    again = emoji.load()
    assert torch.equal(again.held_out, data.held_out)


@needs_data
def test_an_epoch_holds_every_concept_once_a_style_in_any_tone():
    module = EmojiData(batch_size=64, seed=3)
    module.setup()
    steps = len(module.groups) // 64
    batches = [module.batch(step) for step in range(2 * steps)]
    for epoch in (batches[:steps], batches[steps:]):
        concepts = torch.cat([batch[2] for batch in epoch])
        assert torch.bincount(concepts).max() <= 3 and len(concepts) == steps * 64
        assert not module.emoji.held_out[concepts].any()
    assert not torch.equal(batches[0][2], batches[steps][2])
    pictures, captions, concepts = module.batch(5)
    assert torch.equal(pictures, batches[5][0]) and captions == batches[5][1]  # a continued run sees the same
    assert pictures.shape == (64, 3, 32, 32) and pictures.min() >= 0 and pictures.max() <= 1


@needs_data
def test_captions_name_the_picture_or_its_keywords(data):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(data.concept), (2000,), generator=generator)
    captions = data.captions(rows, generator)
    named = [data.names[data.concept[row]] in caption for row, caption in zip(rows.tolist(), captions)]
    styled = [f"{emoji.STYLES[data.style[row]]} style" in caption for row, caption in zip(rows.tolist(), captions)]
    assert 0.75 < sum(named) / 2000 < 0.9 and 0.28 < sum(styled) / 2000 < 0.39
    for row, caption in zip(rows.tolist(), captions):
        name, words = data.names[data.concept[row]], data.keywords[data.concept[row]]
        assert caption.startswith(name) or caption.split(", ")[0] in words
    toned = int((data.tone == 5).nonzero()[0])
    assert data.caption(toned).endswith(", dark skin tone")


@needs_data
def test_the_prompts_that_ship_are_the_concepts_trained_on(data):
    named = {data.caption(int(group[0])) for group in data.groups(held_out=False)}
    assert sorted(read_prompts("emoji.txt")) == sorted(named)


@needs_data
def test_validation_is_the_held_out_concepts_style_by_style():
    module = EmojiData(batch_size=128)
    module.setup()
    batches = list(module.val_dataloader())
    concepts = torch.cat([batch[2] for batch in batches])
    assert module.emoji.held_out[concepts].all() and int((concepts.diff() < 0).sum()) == 2  # three rising runs
    assert batches[0][1][0] == module.emoji.names[batches[0][2][0]]


def test_missing_pictures_and_packs_say_what_to_do(tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="run 'steerfm data emoji'"):
        emoji.load(tmp_path)
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"npm is not installed.*'npm pack emoji-datasource-google@16.0.0' into"):
        emoji.prepare(tmp_path)
    with pytest.raises(ValueError, match="size=128"):
        emoji.prepare(tmp_path, size=128)
    assert cli.main(["data", "emojy"]) == 2
    assert "did you mean 'emoji'" in capsys.readouterr().err
