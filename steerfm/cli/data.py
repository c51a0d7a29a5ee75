"""`steerfm data`: prepare and check a data set."""

from __future__ import annotations

from steerfm.cli.console import console, make_table, progress
from steerfm.cli.loading import did_you_mean
from steerfm.values import ConfigError


def prepare_data(name: str, size: int, root: str | None) -> None:
    """Prepare and check a data set, and say what there is of it and under which licence."""
    from steerfm import emoji
    from steerfm.training import data

    if name not in data.DATA:
        raise ConfigError(f"unknown data {name!r}{did_you_mean(name, data.DATA)}; data: {', '.join(data.DATA)}")
    if name == "fashion":
        for split in ("train", "test"):
            pictures, labels = data.fashion_mnist(split, root, fetch=True)
            console.print(f"{split}: {len(pictures):,} pictures, {labels.bincount().tolist()} of each class")
        console.print(f"licence: {data.FashionMnist.licence}")
        return
    with progress("preparing", 1) as tick:
        found = emoji.prepare(root, size, tick)
    table = make_table("style", "pictures", "of them with a skin tone", "package", "licence of the pictures")
    for style, (package, _, licence) in emoji.PACKS.items():
        mine = found.style == emoji.STYLES.index(style)
        toned = int((found.tone[mine] > 0).sum())
        table.add_row(style, f"{int(mine.sum()):,}", f"{toned:,}", package, licence)
    console.print(table)
    held = int(found.held_out.sum())
    console.print(f"{len(found.names):,} concepts, {held} of them held out; captions: {emoji.WORDS} (MIT)")
    console.print(f"in {emoji.data_folder(root)}, with credits.json")
