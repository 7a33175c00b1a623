"""`quickbloom deploy renew`, and how it is told that a certificate ends, with a program in place of Docker."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from stand_in_docker import Engine
from typer.testing import CliRunner

from quickbloom.common.flower.states.later_release import known_changes
from quickbloom.server_app.cli.main import cli
from quickbloom.server_app.deployment import renewing
from quickbloom.server_app.deployment.certificates import check_certificate, hosts_of, load_certificate
from quickbloom.server_app.deployment.compose import Compose


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine(tmp_path)
    engine.use(monkeypatch)
    return engine


def deploy(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["deploy", *words])
    return done.exit_code, done.output + str(done.exception or "")


def date(days: int) -> str:
    return f"{datetime.now(UTC) + timedelta(days=days):%Y-%m-%d}"


@pytest.mark.parametrize(
    ("days", "said"),
    [
        (365, "The SuperLink's certificate is valid until {date}."),
        (31, "The SuperLink's certificate is valid until {date}."),
        (30, "The SuperLink's certificate ends at {date} "),
        (2, "The SuperLink's certificate ends at {date} "),
    ],
)
def test_status_tells_of_the_end_a_month_ahead(engine: Engine, days: int, said: str) -> None:
    engine.serve(min(known_changes()), days)
    last = deploy("status")[1].splitlines()[-1]
    assert last.startswith(said.format(date=date(days))), last
    assert ("`quickbloom deploy renew` makes a new one" in last) == (days <= 30)


def test_status_of_a_superlink_that_does_not_answer_says_so(engine: Engine) -> None:
    code, said = deploy("status")
    assert code == 0
    assert "Runs can be started; 1 node" in said
    assert said.splitlines()[-1].startswith("When its certificate ends cannot be told:")
    assert said.splitlines()[-1].endswith("failed with exit code 1, and said: connection refused")


def test_a_new_certificate_of_the_same_ca_is_shown_without_a_restart(engine: Engine) -> None:
    engine.serve(min(known_changes()), 2)
    before = load_certificate(Path("shown")).serial_number
    code, said = deploy("renew")
    assert code == 0, said
    assert engine.done() == ["compose run secrets quickbloom secrets /vault/secrets", "compose run secrets"]
    assert load_certificate(Path("shown")).serial_number != before
    folder = engine.volumes / "vault" / "secrets"
    assert check_certificate(Path("shown"), folder / "cli" / "ca.crt", folder / "superlink" / "server.key") == ""
    assert said.splitlines()[-1] == f"The SuperLink shows it, without a restart: it is valid until {date(365)}."


def test_a_superlink_that_does_not_take_it_up_is_restarted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.serve(min(known_changes()), 2)
    engine.world(stubborn=True)
    monkeypatch.setattr(renewing, "_PATIENCE", 0.3)
    said = list(renewing.renew(Compose(Path()), pause=0.1))
    assert engine.done()[-1] == "compose restart superlink"
    assert said[-1].startswith("The SuperLink was restarted for it, which runs outlive: it is valid until")


def test_other_names_can_be_asked_for_and_are_checked_first(engine: Engine) -> None:
    engine.serve(min(known_changes()), 2)
    code, said = deploy("renew", "--host", "fl.example.org")
    assert code == 0, said
    assert hosts_of(load_certificate(Path("shown"))) == ["fl.example.org", "localhost", "127.0.0.1"]
    done = engine.done()
    assert "`--host` must be a DNS name" in deploy("renew", "--host", "fl.example.org:9092")[1]
    assert engine.done() == done
