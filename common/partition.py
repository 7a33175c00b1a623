"""How one table of examples is spread over simulated users: the settings `partition`, `users` and their like, read once.

What each scheme means is said in docs/partitions.md. `common/flower/partitioners.py` draws them, with flwr-datasets.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from quickbloom.common.errors import ConfigError

Kind = Literal["dirichlet", "pathological", "shards", "size", "iid", "natural"]
CURVES = ("linear", "square", "exponential")
"""How the number of examples grows from user to user."""
EXAMPLES = (
    "dirichlet:0.1, dirichlet:0.1:unbalanced, pathological:2, shards, shards:3, size:linear, size:square, size:exponential, "
    "size:100,200,300, iid or natural:COLUMN"
)
LEAST = 3
"""Fewest examples of a user: one each for support, query and test."""
_BY_CLASS = ("dirichlet", "pathological", "shards")
_SHORT = {"exp": "exponential"}


@dataclass(frozen=True)
class Scheme:
    """A scheme as `partition` names it. `number`: alpha, classes, or shards; `sizes`: examples of each user, if they are given.

    `curve`: one of `CURVES`; `column`: of natural users; `balanced`: whoever has the mean number of examples gets no more.
    """

    kind: Kind
    number: float = 0.0
    curve: str = ""
    sizes: tuple[int, ...] = ()
    column: str = ""
    balanced: bool = True

    @property
    def by_class(self) -> bool:
        """Whether the class of an example has a say in who gets it."""
        return self.kind in _BY_CLASS


@dataclass(frozen=True)
class Partition:
    """A scheme, how many users it makes, and which parts of their examples these train and test on.

    `users`: 0 where the data say how many. `seed`: of the partition, apart from that of the run. `least`: fewest examples
    of a user that `dirichlet` draws again for. `test_share`: share of a user's examples that is test; of the others
    `support_share` is support, and the rest query.
    """

    text: str
    users: int
    seed: int = 0
    least: int = 10
    test_share: float = 0.25
    support_share: float = 0.5

    @cached_property
    def scheme(self) -> Scheme:
        """`text`, read. Raises ConfigError."""
        return read_scheme(self.text)

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of support, query and test; their sum is 1."""
        rest = 1 - self.test_share
        return rest * self.support_share, rest * (1 - self.support_share), self.test_share

    def checked(self) -> "Partition":
        """Return this partition. Raises ConfigError for an unknown scheme, and for a number of users that it cannot make."""
        scheme = self.scheme
        if scheme.kind == "natural":
            if self.users:
                raise ConfigError(
                    f'`users` must be 0 with `partition = "{self.text}"`, whose users are the values of the column, got '
                    f"{self.users}: leave it out"
                )
        elif scheme.sizes:
            if self.users not in (0, len(scheme.sizes)):
                raise ConfigError(
                    f"`users` must be {len(scheme.sizes)}, as many as `partition` names sizes, got {self.users}: leave it out"
                )
        elif self.users < 2:
            raise ConfigError(
                f'`users` must be at least 2 with `partition = "{self.text}"`, got {self.users}: say how many users share the '
                "examples, such as `--users 100`"
            )
        return self

    @property
    def number(self) -> int:
        """How many users there are; 0: the data say it."""
        return len(self.scheme.sizes) or self.users

    def in_words(self) -> str:
        """Return one line, such as "dirichlet:0.1 over 20 users, partition-seed 0"."""
        over = f" over {self.number} users" if self.number else ""
        return f"{self.text}{over}" + ("" if self.scheme.kind == "natural" else f", partition-seed {self.seed}")


def read_scheme(text: str) -> Scheme:
    """Return the scheme that `partition` names. Raises ConfigError. Example: `read_scheme("dirichlet:0.1").number` is 0.1."""
    kind, colon, value = text.strip().partition(":")
    if kind == "iid" and not colon:
        return Scheme("iid")
    if kind == "natural" and value.strip():
        return Scheme("natural", column=value.strip())
    if kind == "dirichlet" and colon:
        alpha, second, how = value.partition(":")
        if second and how != "unbalanced":
            raise ConfigError(f"`partition` may end in :unbalanced after the number of dirichlet, got {text!r}")
        return Scheme("dirichlet", _above_zero(text, alpha), balanced=not second)
    if kind == "pathological" and colon:
        return Scheme("pathological", _whole(text, value, "classes of each user"))
    if kind == "shards":
        return Scheme("shards", _whole(text, value, "shards of each user") if colon else 2)
    if kind == "size" and colon:
        return _of_sizes(text, value)
    raise ConfigError(f"`partition` must be {EXAMPLES}, got {text!r}: docs/partitions.md says what each means")


def _of_sizes(text: str, value: str) -> Scheme:
    curve = _SHORT.get(value, value)
    if curve in CURVES:
        return Scheme("size", curve=curve)
    sizes = tuple(
        int(_whole(text, part, "examples of each user, with commas, or linear, square or exponential"))
        for part in value.split(",")
    )
    if len(sizes) < 2:
        raise ConfigError(
            f"`partition` must name a size for each of two users or more, or linear, square or exponential, got {text!r}"
        )
    return Scheme("size", sizes=sizes)


def _above_zero(text: str, value: str) -> float:
    try:
        alpha = float(value)
    except ValueError:
        alpha = 0.0
    if not 0 < alpha < float("inf"):
        raise ConfigError(f'the number of `partition = "dirichlet:NUMBER"` must be above 0, such as 0.1, got {text!r}')
    return alpha


def _whole(text: str, value: str, what: str) -> float:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"`partition` must name the {what} as a whole number from 1, got {text!r}")
    return number
