"""The roll call: before training, every node reports its tasks and the form of their examples.

From the answers the server knows the node of every task, builds the model, and splits the tasks
into training, validation and test. A federation that cannot work is refused here, with one
sentence.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from logging import INFO

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.base import DataSpec, TaskInfo, left_out_in_words
from quickbloom.common.datasets.own import OwnOptions
from quickbloom.common.datasets.own.agreement import agree, core, fits
from quickbloom.common.datasets.own.columns import Schema
from quickbloom.common.errors import ConfigError, DataError, as_told
from quickbloom.common.flower.names import log
from quickbloom.common.wire.messages import WireError
from quickbloom.common.wire.refusal import Misfit
from quickbloom.common.wire.roll_call import (
    CONSTANTS,
    ROLL_CALL,
    ConstantsReply,
    RollCallReply,
    roll_call_request,
    tell_agreed,
)
from quickbloom.server_app.events.channel import Events, Warn
from quickbloom.server_app.events.kinds import Refused, RollCalled
from quickbloom.server_app.federation.splits import Before, split_tasks
from quickbloom.server_app.messaging.admission import difference, hosted_twice, other_constants
from quickbloom.server_app.messaging.answers import answers
from quickbloom.server_app.messaging.failures import UNFINISHED, is_gone
from quickbloom.server_app.messaging.population import Population
from quickbloom.server_app.messaging.refusing import misfit_of, tell_refused

_PAUSE = 1.0
"""Seconds after which absent nodes are asked again."""
_MOST_COMBINATIONS = 20
"""Largest number of combinations of releases in an event: a federation has few, a liar could send any number."""


def call_roll(
    grid: Grid,
    config: RunConfig,
    agreed: str = "",
    events: Events | None = None,
    constants_of: Callable[[DataSpec], str] = lambda spec: "",
    before: Before | None = None,
) -> Population:
    """Wait for `min-nodes` nodes, ask all connected ones, and split their tasks. Raises ConfigError if that cannot work.

    `agreed`: the schema of a continued run, which the nodes are given; "": they agree on one. `constants_of`: returns the
    hash of what the model for such data has besides what is trained, "" for nothing; a node with something else is refused.
    `before`: the tasks of a continued run, which stay where they were; nodes with others join as during a run.
    """
    events = events or Events()
    answers, refused = _ask_until_enough(grid, config, agreed)
    hearing = {node_id for node_id, answer in answers.items() if answer.hears}
    tell = partial(tell_refused, grid, hearing=hearing, within=config.node_deadline)
    if not agreed:
        answers, reasons, agreed = _let_agree(grid, config, answers)
        refused |= reasons
    spec, odd = _majority(answers)
    refused |= odd
    answers = {node_id: answer for node_id, answer in answers.items() if node_id not in odd}
    constants = constants_of(spec) if spec is not None else ""
    if constants:
        others = _other_constants(grid, list(answers), config.node_deadline, agreed, constants)
        refused |= others
        answers = {node_id: answer for node_id, answer in answers.items() if node_id not in others}
    for node_id, reason in refused.items():
        events.warn(f"Node {node_id} does not take part: {reason}")
        events.tell(Refused(node_id, misfit_of(reason)))
    _name_left_out(events.warn, {name: why for answer in answers.values() for name, why in answer.left_out.items()})
    too_few = spec is None or len(answers) < config.min_nodes
    tell(refused, last=too_few)
    if spec is None or too_few:
        raise ConfigError(_too_few(config, len(answers), refused))
    homes: dict[str, int] = {}
    tasks: dict[str, TaskInfo] = {}
    arrived: dict[int, RollCallReply] = {}
    for node_id, answer in sorted(answers.items(), key=lambda item: [task.task_id for task in item[1].tasks]):
        for task in answer.tasks:
            if before and before.is_new(task.task_id):
                arrived[node_id] = answer
                continue
            if task.task_id in homes:
                twice = hosted_twice(task.task_id, config.dataset)
                tell({homes[task.task_id]: twice, node_id: twice}, last=True)
                raise ConfigError(twice)
            homes[task.task_id], tasks[task.task_id] = node_id, task
    splits = before.split(tasks, config, events.warn) if before else split_tasks(list(tasks.values()), config, events.warn)
    log(INFO, "%s nodes host %s tasks: %s", len(answers), len(tasks), {name: len(ids) for name, ids in splits.items()})
    events.tell(RollCalled(len(answers), {name: len(ids) for name, ids in splits.items()}, _software(answers.values())))
    keepers = {node_id for node_id, answer in answers.items() if answer.keeps and answer.tasks}
    joined = set(before.joined & tasks.keys()) if before else set()
    known = set(answers) - arrived.keys()
    return Population(
        spec, homes, splits, tasks, refused, known, keepers, agreed, constants=constants, arrived=arrived, joined=joined
    )


def _software(answers: Iterable[RollCallReply]) -> dict[str, int]:
    """How many nodes run each combination of releases. A federation that mixes them is not reproduced to the last digit."""
    combined = (", ".join(f"{name} {answer.versions[name]}" for name in sorted(answer.versions)) for answer in answers)
    return dict(Counter(combined).most_common(_MOST_COMBINATIONS))


def _let_agree(
    grid: Grid, config: RunConfig, answers: dict[int, RollCallReply]
) -> tuple[dict[int, RollCallReply], dict[int, str], str]:
    """Return (answers, reasons of nodes that do not fit, the schema to give), once the nodes' own files have one schema.

    Files with other categories give other inputs, so their nodes are asked again, with the
    categories of all.
    """
    own = config.table(config.dataset)
    if not isinstance(own, OwnOptions) or len({answer.spec.schema for answer in answers.values()}) < 2:
        return answers, {}, ""
    found, reasons = _schemas(answers)
    if not found:
        return {}, reasons, ""
    agreed = agree([(schema, len(answers[node_id].tasks)) for node_id, schema in found.items()], own.vocabulary_limit)
    reasons |= {node_id: _other_columns(schema, agreed) for node_id, schema in found.items() if not fits(schema, agreed)}
    fitting = [node_id for node_id in answers if node_id not in reasons]
    again, missing = ask(grid, fitting, config.node_deadline, agreed.to_json())
    return again, reasons | missing, agreed.to_json()


def _schemas(answers: Mapping[int, RollCallReply]) -> tuple[dict[int, Schema], dict[int, str]]:
    """Return the schemas by node, and why other nodes have none."""
    found: dict[int, Schema] = {}
    reasons: dict[int, str] = {}
    for node_id, answer in answers.items():
        try:
            found[node_id] = Schema.from_json(answer.spec.schema)
        except DataError as error:
            reasons[node_id] = as_told(str(error))
    return found, reasons


def _ask_until_enough(grid: Grid, config: RunConfig, agreed: str) -> tuple[dict[int, RollCallReply], dict[int, str]]:
    """Return the result of `ask` for all connected nodes, once `min-nodes` of them answered or `node-deadline` is over.

    A restarted SuperLink lists nodes that are still reconnecting, and calls them gone: these are
    asked again, as are nodes that have connected since.
    """
    answers: dict[int, RollCallReply] = {}
    refused: dict[int, str] = {}
    node_ids = _wait_for_nodes(grid, config)
    deadline = time.monotonic() + config.node_deadline
    while True:
        asked = [node_id for node_id in node_ids if node_id not in answers and is_gone(refused.get(node_id, UNFINISHED))]
        more, reasons = ask(grid, asked, config.node_deadline, agreed)
        answers |= more
        refused = {node_id: why for node_id, why in (refused | reasons).items() if node_id not in answers}
        gone = any(map(is_gone, refused.values()))
        if len(answers) >= config.min_nodes or not gone or time.monotonic() + _PAUSE > deadline:
            return answers, refused
        time.sleep(_PAUSE)
        node_ids = list(grid.get_node_ids())


def _other_constants(grid: Grid, node_ids: Sequence[int], deadline: float, agreed: str, expected: str) -> dict[int, str]:
    """Return by node why it cannot train the model whose constants have the hash `expected`."""
    messages = []
    for node_id in node_ids:
        records = RecordDict({})
        tell_agreed(records, agreed)
        messages.append(Message(records, node_id, CONSTANTS))

    def read(_: int, records: RecordDict) -> str:
        return ConstantsReply.from_records(records).digest

    told, reasons = answers(grid, messages, deadline, read, "with the hash of its model's constants")
    differences = {node_id: other_constants(digest, expected) for node_id, digest in told.items()}
    every = {node_id: reasons.get(node_id) or differences.get(node_id, "") for node_id in node_ids}
    return {node_id: reason for node_id, reason in every.items() if reason}


def ask(
    grid: Grid, node_ids: Sequence[int], deadline: float, agreed: str = ""
) -> tuple[dict[int, RollCallReply], dict[int, str]]:
    """Send the roll call to `node_ids`, and return (answers, reasons of nodes without a valid one), both by node id."""

    def read(_: int, records: RecordDict) -> RollCallReply:
        try:
            return RollCallReply.from_records(records)
        except WireError as error:
            raise WireError(f"its answer to the roll call is of no use: {error}") from None

    messages = [Message(roll_call_request(agreed), node_id, ROLL_CALL) for node_id in node_ids]
    return answers(grid, messages, deadline, read, "the roll call")


def _name_left_out(warn: Warn, left_out: Mapping[str, str]) -> None:
    """Name the tasks that were left out, in one line: nodes that share a file report the same."""
    if left_out:
        warn(left_out_in_words(left_out))


def _wait_for_nodes(grid: Grid, config: RunConfig) -> list[int]:
    """Return all connected nodes once there are enough."""
    started = time.monotonic()
    while len(node_ids := list(grid.get_node_ids())) < config.min_nodes:
        if time.monotonic() - started > config.node_deadline:
            raise ConfigError(_too_few(config, len(node_ids), {}))
        time.sleep(0.2)
    return node_ids


def _too_few(config: RunConfig, num_nodes: int, refused: dict[int, str]) -> str:
    sentence = (
        f"`min-nodes` is {config.min_nodes}, but {num_nodes} usable node{'s' * (num_nodes != 1)} answered within "
        f"`node-deadline` ({config.node_deadline:g} s): start more nodes, or lower `min-nodes`"
    )
    if refused:
        reasons = Counter(refused.values()).most_common()
        sentence += "; refused: " + "; ".join(f"{count} x {reason}" for reason, count in reasons)
    return sentence


def _majority(answers: dict[int, RollCallReply]) -> tuple[DataSpec | None, dict[int, str]]:
    """Return the form of data of most tasks, and why nodes of another form are refused.

    A node without tasks has no say.
    """
    votes: Counter[DataSpec] = Counter()
    for answer in answers.values():
        votes[answer.spec] += len(answer.tasks)
    if not votes:
        return None, {}
    spec = max(votes, key=lambda spec: (votes[spec], spec.input_shape, spec.outputs, spec.kind, spec.tokens, spec.schema))
    return spec, {node_id: difference(answer.spec, spec) for node_id, answer in answers.items() if answer.spec != spec}


def _other_columns(odd: Schema, agreed: Schema) -> Misfit:
    """Return why a node with these columns or classes is refused, and how to mend it."""
    if odd.encoder and agreed.encoder and odd.encoder != agreed.encoder:
        hashes = odd.encoder["digest"], agreed.encoder["digest"]
        reason = as_told(
            f"its encoder or tokenizer has the SHA-256 {hashes[0]}, the other nodes' {hashes[1]}: all need the same files of "
            "weights, tokenizer and configuration, and the same `own.encoder-pooling`",
            600,
        )
        return Misfit("encoder", reason)
    kinds = [name for name, kind in agreed.features.items() if odd.features.get(name, kind) not in ("", kind)]
    if kinds and "text" in (odd.features[kinds[0]], agreed.features[kinds[0]]):
        mend = f"set `own.categorical={kinds[0]}`"
    elif kinds:
        mend = f"write `{kinds[0]}` alike, or leave it out with `own.features`"
    elif bool(odd.classes) != bool(agreed.classes):
        mend = "set `own.kind` to classification or regression"
    else:
        mend = "set `own.classes` and `own.features`, or rename columns"
    columns = f"its columns or classes are {as_told(core(odd), 500)}, the other nodes' {as_told(core(agreed), 500)}"
    return Misfit("columns", f"{columns}: {mend}")
