"""Agreement among nodes with their own files: one schema, from what each node finds in its file.

The kinds of columns, the classes and the target must be equal. A column that is empty on one node
has the kind it has on the others, and the categories of a column are those of all nodes together.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from quickbloom.common.datasets.own.columns import EMPTY, NUMBER, Schema, keys_of_each


def agree(found: Sequence[tuple[Schema, int]], limit: int) -> Schema:
    """Return the schema for all nodes: that of most tasks, with the categories of all nodes that share it.

    `found`: schemas with their numbers of tasks. `limit`: most categories per column; those of most
    nodes come first.
    """
    kinds = _kinds(found)
    votes: Counter[str] = Counter()
    for schema, tasks in found:
        votes[core(_filled(schema, kinds))] += tasks
    most = max(votes, key=lambda text: (votes[text], text))
    agreed = [_filled(schema, kinds) for schema, _ in found if core(_filled(schema, kinds)) == most]
    limit = keys_of_each(limit, len(agreed[0].vocabularies))
    merged = {name: _union([schema.vocabularies.get(name, []) for schema in agreed], limit) for name in agreed[0].vocabularies}
    features = {name: kind or NUMBER for name, kind in agreed[0].features.items()}
    # No node may bring scales with its file: they come from all of them, later.
    return replace(agreed[0], vocabularies=merged, features=features, scales={}, target_scale=[])


def core(schema: Schema) -> str:
    """Return as JSON the part of a schema that must be equal on all nodes: everything but categories and scales."""
    return replace(schema, vocabularies={}, scales={}, target_scale=[]).to_json()


def fits(schema: Schema, agreed: Schema) -> bool:
    """Return whether a node that found `schema` can take part under the schema `agreed`."""
    return core(_filled(schema, agreed.features)) == core(agreed)


def _kinds(found: Iterable[tuple[Schema, int]]) -> dict[str, str]:
    """Return the kind of every column by a vote of tasks, from the nodes on which it is not empty."""
    votes: dict[str, Counter[str]] = {}
    for schema, tasks in found:
        for name, kind in schema.features.items():
            if kind != EMPTY:
                votes.setdefault(name, Counter())[kind] += max(tasks, 1)
    return {name: max(counts, key=lambda kind: (counts[kind], kind)) for name, counts in votes.items()}


def _filled(schema: Schema, kinds: Mapping[str, str]) -> Schema:
    """Return the schema with the kinds of its empty columns, which then have no categories."""
    features = {name: kind or kinds.get(name, NUMBER) for name, kind in schema.features.items()}
    texts = {name: schema.vocabularies.get(name, []) for name, kind in features.items() if kind == "text"}
    return replace(schema, features=features, vocabularies=texts)


def _union(vocabularies: Sequence[Sequence[str]], limit: int) -> list[str]:
    nodes = Counter(key for keys in vocabularies for key in set(keys))
    return sorted(sorted(nodes, key=lambda key: (-nodes[key], key))[:limit])
