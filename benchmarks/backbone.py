"""Characters as personal vocabularies over EfficientNet-Lite0 (ImageNet): features of photos for handwritten characters.

A user has ten characters of one alphabet of Omniglot under labels of their own, five drawings of each to learn from. The
alphabets of the test users are in no other part. The features of the frozen encoder (112 pixels) are compared with a small
network that is trained on the pixels from nothing. Everything is own data: an .npz of images and `--encoder`.

    python -m benchmarks.backbone

Needs omniglot_28.npz and the packages of `benchmarks/pretrained.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pretrained import without_place
from benchmarks.runner import RAW, Plan, Variant, by_label, finish, goal, parser, run_all, table
from quickbloom.common.datasets.base import generator, read_npz, resolve_data_dir
from quickbloom.common.system.whole_files import replacing

USERS, CHARACTERS = {"train": 60, "validation": 10, "test": 30}, 10
"""Users of each part, and characters of each."""
DRAWINGS = 10
"""Of each character: five to learn from, five to train and test on."""
FILE = "omniglot_28.npz"
ENCODER = "own.encoder=benchmarks.pretrained:EfficientNetLite0"


def vocabularies(seed: int = 0) -> dict[str, Any]:
    """Return rows of drawings: image uint8 [rows, 28, 28], with the columns task, label and split."""
    byte = np.dtype(np.uint8)
    data = read_npz(resolve_data_dir("") / FILE, {"images": (byte, (-1, -1, 28, 28)), "alphabet": (byte, (-1,))})
    alphabets = sorted(set(data["alphabet"].tolist()))
    order = generator(seed, "backbone").permutation(len(alphabets))
    ends = np.cumsum([0, *(round(len(alphabets) * share) for share in (0.6, 0.1))]).tolist()
    parts = dict(zip(USERS, (order[ends[0] : ends[1]], order[ends[1] : ends[2]], order[ends[2] :]), strict=True))
    found: dict[str, list[Any]] = {"image": [], "task": [], "label": [], "split": []}
    for split, users in USERS.items():
        for user in range(users):
            rng = generator(seed, "backbone", split, user)
            alphabet = alphabets[int(rng.choice(parts[split]))]
            characters = np.flatnonzero(data["alphabet"] == alphabet)
            for place, character in enumerate(rng.permutation(characters)[:CHARACTERS]):
                drawings = data["images"][character, :DRAWINGS]
                found["image"] += list(drawings)
                for column, value in (("task", f"{split}-{user:02}"), ("label", f"c{place}"), ("split", split)):
                    found[column] += [value] * len(drawings)
    return {name: np.array(values) for name, values in found.items()}


def prepared(seed: int = 0) -> Path:
    """Return the .npz of `vocabularies`, written at the first call."""
    path = RAW / f"backbone-{seed}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **vocabularies(seed))
    return path


def plan() -> Plan:
    """Return the runs."""
    data = (f"own.path={prepared()}", "own.split-column=split", "own.target-column=label", "own.features=image", "own.shots=5")
    return Plan(
        name="backbone",
        claim="a frozen encoder of photos tells a user's own characters apart from five drawings of each",
        dataset="own",
        rounds=100,
        variants=(
            Variant("frozen, centred", "protonet", (ENCODER, "outer-lr=1e-9"), rounds=1),
            Variant("residual", "protonet", (ENCODER, "outer-lr=0.0003", "residual.rank=64", "keep=best")),
            Variant("ridge, residual", "ridge", (ENCODER, "model=residual", "residual.rank=64", "zero-head=true", "keep=best")),
            Variant("conv4 from nothing", "protonet", ("model=conv4", "conv4.filters=32", "chunk-size=4")),
        ),
        settings=(*data, "tasks-per-round=10", "evaluate-every=10", "adapt-steps=1", "outer-decay=true"),
        nodes=1,
        in_process=True,
    )


def main() -> None:
    chosen = parser("characters as personal vocabularies over a frozen encoder of photos", "backbone", seeds=(0,)).parse_args()
    result = run_all(plan(), chosen.seeds, fresh=chosen.fresh, jobs=chosen.jobs)
    gain = by_label(result, "residual")["mean"]["after"] - by_label(result, "frozen, centred")["mean"]["after"]
    goal(result, "the residual map is never worse than the frozen encoder", gain, met=gain >= 0)
    finish(without_place(result, prepared()), table(result))


if __name__ == "__main__":
    main()
