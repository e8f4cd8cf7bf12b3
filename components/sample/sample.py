"""The built-in sample: an interaction log of a bookshop that exists only here.

A latent-factor model. Categories and shelves have directions in a space of tastes. A book is given a category and one
of the category's shelves, and lies near both, at a distance of its own. A user is given an age and a region, likes a
few categories, some ages and regions some of them more than others, and lies near those. What is told of books and
users (category, tags, age, region) was given before where they lie, and says nothing of the distance of their own. A
user takes books without repeats, with probability proportional to

    popularity_item ^ POPULARITY_WEIGHT * exp(TASTE_WEIGHT * <user, item>),

where popularity is Zipf-like. So popularity alone predicts something, and tastes predict clearly more.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from lazydp.components.shared.errors import InputError
from lazydp.components.shared.files import atomic_directory, write_bytes
from lazydp.components.shared.progress import Progress

Array: TypeAlias = np.ndarray[Any, Any]

INTERACTIONS_FILE = "interactions.parquet"
USERS_FILE = "users.parquet"
ITEMS_FILE = "items.parquet"
SPEC_FILE = "spec.yaml"
CONFIG_FILE = "train.yaml"
_FILES = {INTERACTIONS_FILE, USERS_FILE, ITEMS_FILE, SPEC_FILE, CONFIG_FILE}

_LATENT = 12
_POPULARITY_WEIGHT = 1.0
_TASTE_WEIGHT = 8.0
_TASTES_OF_A_USER = 3
_SHELVES_OF_A_CATEGORY = 3
_BEGIN_MS = 1_704_067_200_000  # 2024-01-01
_YEAR_MS = 365 * 24 * 3600 * 1000
_DEVICES = ("phone", "tablet", "desktop")
_REGIONS = ("north", "east", "south", "west")
_ADJECTIVES = ["Silent", "Golden", "Hidden", "Last", "First", "Broken", "Distant", "Gentle", "Burning", "Frozen"]
_ADJECTIVES += ["Restless", "Lost", "Quiet", "Crimson", "Early", "Paper", "Hollow", "Patient", "Wandering", "Bright"]
_NOUNS = ["River", "House", "Garden", "Letter", "Winter", "Harbour", "Road", "Mirror", "Orchard", "Island", "Clock"]
_NOUNS += ["Window", "Lantern", "Field", "Bridge", "Song", "Door", "Mountain", "Shadow", "Table", "Station", "Map"]
_NOUNS += ["Feather", "Kitchen", "Stone"]


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """How large a sample to make; the defaults are the built-in one."""

    users: int = 2_000
    items: int = 3_000
    interactions: int = 200_000

    def __post_init__(self) -> None:
        if min(self.users, self.items, self.interactions) < 1:
            raise InputError("a sample needs at least one user, one item and one interaction")
        if self.interactions > self.users * self.items // 4:
            raise InputError(
                f"{self.interactions} interactions are too many for {self.users} users and {self.items} items, "
                f"as nobody takes an item twice: choose at most {self.users * self.items // 4}"
            )


@dataclass(frozen=True)
class _World:
    """What the draws depend on, and what is told of it.

    items: vectors [items, d], made from category, shelf and a part of their own. users: vectors [users, d], made from
    liked categories and a part of their own. log_popularity: [items]. category, shelf: [items], shelves numbered over
    all categories. age, region: [users].
    """

    items: Array
    users: Array
    log_popularity: Array
    category: Array
    shelf: Array
    age: Array
    region: Array


def sample_spec() -> str:
    """The sample's feature spec, YAML."""
    return _packaged(SPEC_FILE)


def _packaged(name: str) -> str:
    return files("lazydp.components.sample").joinpath(name).read_text(encoding="utf-8")


def categories() -> list[str]:
    """The categories, as the spec declares them."""
    features = yaml.safe_load(sample_spec())["features"]
    return next(list(f["vocabulary"]["values"]) for f in features if f["name"] == "category")


def make_sample(out: Path, *, seed: int = 1, size: SampleSize | None = None, replace: bool = False) -> None:
    """Write interactions.parquet, users.parquet, items.parquet, spec.yaml and train.yaml into the new folder `out`.

    The same seed and size give the same rows.

    Raises:
        InputError: `out` exists, is not empty and is no sample to `replace`, or the size makes no sense.
    """
    size = size or SampleSize()
    generator = np.random.default_rng(seed)
    world = _world(generator, size)
    if replace and out.is_dir() and (foreign := {file.name for file in out.iterdir()} - _FILES):
        raise InputError(
            f"{out} holds more than a sample ({min(foreign)}): choose another folder or remove it yourself"
        )
    with atomic_directory(out, replaces=SPEC_FILE if replace else None) as folder:
        pq.write_table(_items_table(generator, world), folder / ITEMS_FILE)
        pq.write_table(_users_table(world), folder / USERS_FILE)
        pq.write_table(_interactions_table(generator, world, size), folder / INTERACTIONS_FILE)
        write_bytes(folder / SPEC_FILE, sample_spec().encode())
        write_bytes(folder / CONFIG_FILE, _packaged(CONFIG_FILE).encode())


def _unit(vectors: Array) -> Array:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def _world(generator: np.random.Generator, size: SampleSize) -> _World:
    number = len(categories())
    directions = _unit(generator.normal(size=(number, _LATENT)))
    category = generator.choice(number, size=size.items, p=generator.dirichlet(np.full(number, 3.0)))
    shelf = category * _SHELVES_OF_A_CATEGORY + generator.integers(_SHELVES_OF_A_CATEGORY, size=size.items)
    aside = 0.13 * generator.normal(size=(number * _SHELVES_OF_A_CATEGORY, _LATENT))
    items = _unit(directions[category] + aside[shelf] + 0.18 * generator.normal(size=(size.items, _LATENT)))
    age = generator.normal(45, 16, size=size.users).clip(18, 90).astype(np.int64)
    region = generator.integers(len(_REGIONS), size=size.users)
    leaning = generator.normal(size=(len(_REGIONS), number))[region] + 2 * generator.normal(size=number) * (
        (age[:, np.newaxis] - 45) / 25
    )
    # The largest of leaning plus Gumbel noise are a draw without replacement (Kool et al. 2019).
    liked = (-leaning - generator.gumbel(size=(size.users, number))).argsort(axis=1)[:, :_TASTES_OF_A_USER]
    shares = generator.dirichlet(np.full(_TASTES_OF_A_USER, 1.2), size=size.users)
    users = _unit((shares[:, :, None] * directions[liked]).sum(1) + 0.1 * generator.normal(size=(size.users, _LATENT)))
    ranks = generator.permutation(size.items) + 1
    return _World(
        items=items,
        users=users,
        log_popularity=-np.log(ranks + 5.0),
        category=category,
        shelf=shelf,
        age=age,
        region=region,
    )


def _ids(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number:05d}" for number in range(1, count + 1)]


def _items_table(generator: np.random.Generator, world: _World) -> pa.Table:
    names = categories()
    number = len(world.items)
    adjective = generator.integers(len(_ADJECTIVES), size=number)
    nouns = generator.integers(len(_NOUNS), size=(number, 2))
    titles = [
        f"The {_ADJECTIVES[a]} {_NOUNS[first]}" + (f" and the {_NOUNS[second]}" if first != second else "")
        for a, (first, second) in zip(adjective, nouns, strict=True)
    ]
    # The shop tags a book with its shelf, with another shelf of its category, and with one that is a mistake.
    beside = world.category * _SHELVES_OF_A_CATEGORY + generator.integers(_SHELVES_OF_A_CATEGORY, size=number)
    mistaken = generator.integers(len(names) * _SHELVES_OF_A_CATEGORY, size=number)
    tagged = generator.permuted(np.stack([world.shelf, beside, mistaken], axis=1), axis=1)
    tags = [" ".join(f"shelf-{tag}" for tag in dict.fromkeys(row)) for row in tagged.tolist()]
    price = np.exp(generator.normal(2.7, 0.5, size=number)).clip(1, 100).round(2)
    return pa.table(
        {
            "item_id": _ids("b", number),
            "title": titles,
            "category": [names[code] for code in world.category],
            "tags": tags,
            "price": price,
        }
    )


def _users_table(world: _World) -> pa.Table:
    number = len(world.users)
    regions = [_REGIONS[code] for code in world.region]
    return pa.table({"user_id": _ids("u", number), "age": world.age, "region": regions})


def _activity(generator: np.random.Generator, size: SampleSize) -> Array:
    """How many items each user takes: long-tailed, at least one where that is possible, `interactions` in all."""
    weight = generator.lognormal(0.0, 0.8, size=size.users)
    most = max(1, size.items // 2)
    counts: Array = np.clip(size.interactions * weight / weight.sum(), 1, most).astype(np.int64)
    missing = size.interactions - int(counts.sum())
    while missing:
        # What clipping and rounding left over (or took too much) goes to users drawn at random.
        able = np.flatnonzero(counts < most) if missing > 0 else np.flatnonzero(counts > 0)
        chosen = generator.choice(able, size=min(abs(missing), len(able)), replace=False)
        counts[chosen] += np.sign(missing)
        missing = size.interactions - int(counts.sum())
    return np.asarray(counts)


def _interactions_table(generator: np.random.Generator, world: _World, size: SampleSize) -> pa.Table:
    counts = _activity(generator, size)
    taken = []
    with Progress("sample", total=size.users, unit="users") as progress:
        for user in range(size.users):
            score = _TASTE_WEIGHT * (world.items @ world.users[user]) + _POPULARITY_WEIGHT * world.log_popularity
            # As above, a draw without replacement.
            noisy = score + generator.gumbel(size=size.items)
            chosen = np.argsort(-noisy)[: counts[user]]
            taken.append(generator.permutation(chosen))
            progress.advance()
    who = np.repeat(np.arange(size.users), counts)
    time = np.concatenate([np.sort(generator.integers(0, _YEAR_MS, size=count)) for count in counts]) + _BEGIN_MS
    favourite = generator.integers(len(_DEVICES), size=size.users)[who]
    device = np.where(generator.random(len(who)) < 0.8, favourite, generator.integers(len(_DEVICES), size=len(who)))
    table = pa.table(
        {
            "user_id": pa.array(_ids("u", size.users)).take(pa.array(who)),
            "item_id": pa.array(_ids("b", size.items)).take(pa.array(np.concatenate(taken))),
            "timestamp": pa.array(time, pa.timestamp("ms")),
            "device": pa.array(_DEVICES).take(pa.array(device)),
        }
    )
    return table.take(pa.array(np.argsort(time, kind="stable")))
