"""The mean of an encoder's features over all training users: in a secure sum, and with noise under privacy."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import small_encoders
from dp_accounting.pld import pld_privacy_accountant
from flwr.app import ConfigRecord, Message, RecordDict
from hostile import ANYTHING
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from loopback import LoopbackGrid
from small_encoders import on_nodes, sentences

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.columns import Schema
from quickbloom.common.datasets.own.encoded import Encoded
from quickbloom.common.encoders import load_encoder
from quickbloom.common.errors import ConfigError, RunError
from quickbloom.common.randomness import generator
from quickbloom.common.wire.centring import MASKED_MEANS, MEANS
from quickbloom.common.wire.roll_call import MOMENTS
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.events.channel import Events
from quickbloom.server_app.federation import agreeing
from quickbloom.server_app.federation.agreeing import share_means
from quickbloom.server_app.federation.private import privacy as accounts
from quickbloom.server_app.federation.private.privacy import Ledger, TaskPrivacy, epsilon
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.runs import checkpoints

USERS = ("ABCD", "EFGH", "IJKL")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_encoder.cache_clear()


def settings_of(folder: Path, **more: Any) -> RunConfig:
    encoder = small_encoders.text_onnx(folder / "words.onnx")[0]
    flat = {"own.encoder": f"onnx:{encoder}", "rounds": 2, "algorithm": "protonet", **more}
    return small_encoders.run_config(folder, **{"encoder": flat.pop("own.encoder"), **flat})


def means_of(folder: Path) -> dict[str, list[float]]:
    facts = checkpoints.load(folder / "run").facts
    return Schema.from_json(facts["schema"]).scales


def by_hand(folder: Path, encoder: str, *, by_task: bool = False, leave_out: str = "") -> np.ndarray[Any, Any]:
    """The mean over the cells of the training tasks' support and query rows, or over the means of the tasks."""
    train = checkpoints.load(folder / "run").facts["splits"]["train"]
    every, of_tasks = [], []
    for users in set(USERS) - {leave_out}:
        own = Own(OwnOptions(path=str(folder / f"{users}.csv"), task_column="user", text="said", encoder=encoder), Path())
        column = own.inputs["said"]
        assert isinstance(column, Encoded)
        for task in set(users) & set(train):
            rows = np.concatenate(own.rows[task][:2])
            found = [column.features[code] for code in column.codes[rows] if code >= 0]
            every += found
            of_tasks.append(np.mean(found, axis=0))
    return np.asarray(np.mean(of_tasks if by_task else every, axis=0))


def kinds_of(grid: LoopbackGrid) -> set[str]:
    return {message.metadata.message_type for message in grid.requests}


def test_with_secure_sums_features_are_centred_by_a_sum_that_alone_is_seen(tmp_path: Path) -> None:
    config = settings_of(tmp_path, **{"secure-aggregation": True})
    grid = on_nodes(tmp_path, config, *USERS)
    run_federation(grid, config)
    scales = means_of(tmp_path)
    assert sorted(scales) == sorted(f"said[{place}]" for place in range(6))  # not that of the column of numbers
    expected = by_hand(tmp_path, str(config.flat()["own.encoder"]))
    np.testing.assert_allclose([scales[f"said[{place}]"][0] for place in range(6)], expected, atol=1e-7)
    assert MASKED_MEANS in kinds_of(grid)
    assert not kinds_of(grid) & {MEANS, MOMENTS}


def test_without_a_need_to_hide_it_the_mean_is_the_same(tmp_path: Path) -> None:
    config = settings_of(tmp_path, **{"own.scale": "features"})
    grid = on_nodes(tmp_path, config, *USERS)
    run_federation(grid, config)
    found = np.array([means_of(tmp_path)[f"said[{place}]"][0] for place in range(6)])
    np.testing.assert_allclose(found, by_hand(tmp_path, str(config.flat()["own.encoder"])), atol=1e-6)
    assert MEANS in kinds_of(grid)


def test_all_nodes_count_where_no_secure_sum_bounds_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreeing, "MOST_NODES", 1)
    config = settings_of(tmp_path, **{"own.scale": "features"})
    run_federation(on_nodes(tmp_path, config, *USERS), config)
    found = np.array([means_of(tmp_path)[f"said[{place}]"][0] for place in range(6)])
    np.testing.assert_allclose(found, by_hand(tmp_path, str(config.flat()["own.encoder"])), atol=1e-6)


def test_a_node_masks_its_sum_once_in_a_run(tmp_path: Path) -> None:
    config = settings_of(tmp_path, **{"secure-aggregation": True})
    grid = on_nodes(tmp_path, config, *USERS)
    run_federation(grid, config)
    with pytest.raises(RunError, match="has told the sum of its features in this run already"):
        run_federation(grid, config.model_copy(update={"output_dir": str(tmp_path / "again")}))


def test_a_node_that_lies_about_its_sum_does_not_count(tmp_path: Path) -> None:
    def lie(message: Message, answer: Any) -> Message:
        reply: Message = answer(message)
        if message.metadata.message_type == MEANS:
            said = reply.content["means"]
            assert isinstance(said, ConfigRecord)
            said["total"] = [1e3] * 6 + [5.0]  # more than five features of length 1
        return reply

    config = settings_of(tmp_path, **{"own.scale": "features"})
    grid = on_nodes(tmp_path, config, *USERS)
    grid._faults = {0: lie}
    run_federation(grid, config)
    found = np.array([means_of(tmp_path)[f"said[{place}]"][0] for place in range(6)])
    np.testing.assert_allclose(found, by_hand(tmp_path, str(config.flat()["own.encoder"]), leave_out=USERS[0]), atol=1e-6)


PRIVATE = {"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0, "privacy.noise-seed": 5, "privacy.centre-noise": 2.0}


@pytest.mark.parametrize("secure", [False, True])
def test_with_privacy_each_task_counts_alike_and_the_mean_has_the_noise_of_the_setting(tmp_path: Path, secure: bool) -> None:
    config = settings_of(tmp_path, **PRIVATE, **{"secure-aggregation": secure})
    summary = run_federation(on_nodes(tmp_path, config, *USERS), config)
    found = np.array([means_of(tmp_path)[f"said[{place}]"][0] for place in range(6)])
    plain = by_hand(tmp_path, str(config.flat()["own.encoder"]), by_task=True)
    train = len(checkpoints.load(tmp_path / "run").facts["splits"]["train"])
    noise = accounts.normal(6, generator(5, "centre").bytes)
    np.testing.assert_allclose(found, plain + 2.0 * noise / train, atol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "privacy.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"centre", "epsilon"}] + [{"step", "epsilon"}] * 2
    assert summary["privacy"]["steps"] == 2
    assert summary["privacy"]["epsilon"] == pytest.approx(lines[-1]["epsilon"])
    assert summary["privacy"]["centre_noise"] == 2.0


def test_the_account_of_both_is_close_to_the_exact_one() -> None:
    """Of Gaussian mechanisms without sampling the exact composition is one with 1/z^2 = sum of 1/z^2 (Dong, Roth, Su 2022)."""
    both = (3 * 4.0**-2 + 2.0**-2) ** -0.5
    exact = pld_privacy_accountant.PLDAccountant()
    exact.compose(dp_accounting.GaussianDpEvent(both))
    ours = epsilon(4.0, 1.0, 3, 1e-5, 2.0)
    assert exact.get_epsilon(1e-5) <= ours <= 1.1 * exact.get_epsilon(1e-5)
    assert epsilon(4.0, 1.0, 0, 1e-5, 2.0) > 0 == epsilon(4.0, 1.0, 0, 1e-5)


def test_the_budget_pays_for_the_mean_before_it_pays_for_rounds() -> None:
    options = parse_run_config(PRIVATE).privacy.model_copy(update={"epsilon": 6.0})
    with_mean, without = TaskPrivacy(options, 50, 5, centres=True), TaskPrivacy(options, 50, 5)
    steps = with_mean.steps_within_budget(1000)
    assert 0 < steps < without.steps_within_budget(1000)
    assert epsilon(1.0, 0.1, steps, 1e-5, 2.0) <= 6.0 < epsilon(1.0, 0.1, steps + 1, 1e-5, 2.0)


def test_the_line_of_the_mean_is_no_step(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.add_centre(2.0, 1.0)
    assert ledger.released() == 0
    ledger.add(1.5)
    assert ledger.released() == 1


def test_a_task_moves_the_sum_by_no_more_than_what_noise_is_made_for(tmp_path: Path) -> None:
    encoder = f"onnx:{small_encoders.text_onnx(tmp_path / 'words.onnx')[0]}"
    path = str(sentences(tmp_path / "A.csv", "ABC"))
    own = Own(OwnOptions(path=path, task_column="user", text="said", encoder=encoder, target_column="label"), Path())
    for left_out in "ABC":
        rest = [name for name in "ABC" if name != left_out]
        moved = own.feature_sum([*"ABC"], by_task=True)[0] - own.feature_sum(rest, by_task=True)[0]
        assert 0 < np.linalg.norm(moved) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0}, "unless `privacy.centre-noise` is above 0"),
        ({"aggregate": "median"}, "one node that lies would move the mean"),
        ({"secure-aggregation": True, "own.scale": "shared"}, 'must be "task", or "features" behind an encoder'),
        ({"privacy.centre-noise": 1.0}, "`privacy.centre-noise` does nothing without noise"),
    ],
)
def test_a_mean_that_would_tell_too_much_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_run_config({"dataset": "own", "own.path": "a.csv", "own.scale": "features", **changes})


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, "shared"),
        ({"secure-aggregation": True}, "features"),
        ({"secure-aggregation": True, "own.encoder": ""}, "task"),
        ({"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0}, "task"),
        ({"privacy.noise-multiplier": 1.0, "privacy.clip": 1.0, "privacy.centre-noise": 1.0}, "features"),
        ({"aggregate": "median"}, "task"),
    ],
)
def test_what_auto_means(changes: dict[str, Any], scale: str) -> None:
    flat = {"dataset": "own", "own.path": "a.csv", "own.encoder": "onnx:a.onnx", **changes}
    assert parse_run_config(flat).resolved().flat()["own.scale"] == scale


def test_a_run_that_goes_on_keeps_the_mean_and_its_cost(tmp_path: Path) -> None:
    config = settings_of(tmp_path, **PRIVATE, **{"output-dir": str(tmp_path / "run")})
    run_federation(on_nodes(tmp_path, config, *USERS), config)
    before = means_of(tmp_path)
    after_one = tmp_path / "run" / "checkpoints" / "round-000001.safetensors"
    flat = {**config.flat(), "resume-from": str(after_one), "output-dir": str(tmp_path / "on" / "run")}
    again = parse_run_config(flat).resolved()
    grid = on_nodes(tmp_path, again, *USERS)
    summary = run_federation(grid, again)
    assert MEANS not in kinds_of(grid)
    assert means_of(tmp_path / "on") == before
    account = summary["privacy"]
    assert account["steps"] == 3  # the second round was done twice
    expected = epsilon(1.0, account["sampling"], 3, account["delta"], 2.0)
    assert account["epsilon"] == pytest.approx(expected)


def test_whatever_a_node_answers_the_mean_is_that_of_the_others(tmp_path: Path) -> None:
    config = settings_of(tmp_path, **{"own.scale": "features"})
    grid = on_nodes(tmp_path, config, *USERS)
    population = call_roll(grid, config)
    totals = st.sampled_from([[0.1] * 7, [1e300] * 7, [-1.0] * 7, [0.0] * 6])
    plausible: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
        {"total": totals, "weight": st.floats() | st.floats(-3, 300)}
    )

    @example(RecordDict({"means": ConfigRecord({"total": [1e300] * 7, "weight": 0.0})}))  # whose squares overflow
    @given(ANYTHING | plausible.map(lambda fields: RecordDict({"means": ConfigRecord(fields)})))
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def check(records: RecordDict) -> None:
        grid._faults = {1: lambda message, answer: Message(records, reply_to=message)}
        mine = replace(population)
        share_means(grid, config, mine, Events())
        scales = Schema.from_json(mine.spec.schema).checked().scales
        assert np.linalg.norm([mean for mean, _ in scales.values()]) <= 1.001

    check()


def test_a_secure_sum_that_cannot_be_right_ends_the_run_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that masks more than it has: the sum tells it, though not of whom it is."""
    plain = Own.feature_sum

    def too_much(self: Own, task_ids: list[str], *, by_task: bool) -> tuple[Any, float]:
        total, weight = plain(self, task_ids, by_task=by_task)
        return 100 * total, weight

    monkeypatch.setattr(Own, "feature_sum", too_much)
    config = settings_of(tmp_path, **{"secure-aggregation": True})
    said = r'the features cannot be centred: .* cannot be right.*with `own\.scale = "task"`'
    with pytest.raises(RunError, match=said):
        run_federation(on_nodes(tmp_path, config, *USERS), config)


def test_several_columns_have_the_norm_of_all_together(tmp_path: Path) -> None:
    encoder = f"onnx:{small_encoders.text_onnx(tmp_path / 'words.onnx')[0]}"
    path = tmp_path / "two.csv"
    lines = ["user,said,heard,label"] + [f"{user},lamp on,lamp on,{row % 2}" for user in "AB" for row in range(8)]
    path.write_text("\n".join(lines) + "\n")
    options = OwnOptions(path=str(path), task_column="user", text="said,heard", encoder=encoder, target_column="label")
    own = Own(options, Path())
    total, weight = own.feature_sum(["A"], by_task=True)
    assert weight == 1.0
    # Each cell says the same, so the mean of each column has length 1, and both together the root of 2.
    assert np.linalg.norm(total) == pytest.approx(np.sqrt(2), abs=1e-6)
    assert np.linalg.norm(total[:6]) == pytest.approx(1, abs=1e-6)
