"""Values of secrets in what a process stores: masked on the way in, the same on the first pass and on every replay."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from workers import shown, steps, work

from tako_runtime import Step, log, signal_sync, workflow
from tako_runtime.codec import carry, encode, payload_text
from tako_runtime.errors import InvalidValue, NotCarried, TooLarge
from tako_runtime.failure import LONGEST, describe, read
from tako_runtime.masking import guarded, masked, masked_json, named_in
from tako_runtime.store import Home
from tako_runtime.store.base import KeptSignals
from tako_runtime.store.commit import StoreThread
from tako_runtime.workflow import Workflow

KEY, PIN = "sk_live_51Hx", "12345678"
MASK = "[secret STRIPE_KEY]"

pytestmark = pytest.mark.usefixtures("clean_registry")


@pytest.fixture
def events() -> Iterator[list[dict[str, Any]]]:
    """With two secrets in this process: all that is announced."""
    heard: list[dict[str, Any]] = []
    with guarded({"STRIPE_KEY": KEY, "PIN": PIN}), log.sink(heard.append):
        yield heard


def places(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(event["place"], event["name"]) for event in events if event["event"] == "secret.masked"]


@dataclass
class Account:
    number: int
    owner: str = ""


def finished(opened: StoreThread, run_id: str) -> dict[str, Any]:
    run = shown(opened, run_id)
    assert run["finished_at"], run
    return run


# --- the same, both times --------------------------------------------------------------------------------------------


def test_a_step_gives_the_masked_value_on_its_first_pass_already(
    opened: StoreThread, home: Home, events: list[dict[str, Any]]
) -> None:
    passes: list[Any] = []

    @workflow("charges")
    async def handler(step: Step) -> Any:
        passes.append(await step.run("charge", lambda: {"auth": f"Bearer {KEY}", "n": 1}))
        await step.sleep("1h")
        return passes[-1]

    run_id = handler.enqueue_sync()
    work(opened, home)
    work(opened, home, later="2h")
    assert passes == [{"auth": f"Bearer {MASK}", "n": 1}] * 2
    assert finished(opened, run_id)["result"] == passes[0]
    assert places(events) == [("step 'charge' in 'charges'", "STRIPE_KEY")], "what is masked is no second find"


def test_a_handler_catches_the_masked_error_of_a_step_on_its_first_pass_already(
    opened: StoreThread, home: Home, events: list[dict[str, Any]]
) -> None:
    passes: list[tuple[str, Any]] = []

    def charge() -> None:
        error = ValueError(f"refused: {KEY}")
        error.request = {"key": KEY}  # type: ignore[attr-defined]
        raise error

    @workflow("refused")
    async def handler(step: Step) -> None:
        try:
            await step.run("charge", charge)
        except ValueError as error:
            passes.append((str(error), vars(error)))
        await step.sleep("1h")

    handler.enqueue_sync()
    work(opened, home)
    work(opened, home, later="2h")
    assert passes == [(f"refused: {MASK}", {"request": {"key": MASK}})] * 2


def test_a_value_whose_type_has_no_room_for_the_mask_ends_the_run_and_names_the_secret(
    opened: StoreThread, home: Home, events: list[dict[str, Any]]
) -> None:
    def account() -> Account:
        return Account(int(PIN))

    @workflow("account", retries=3)
    async def handler(step: Step) -> None:
        await step.run("account", account)

    run_id = handler.enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id)
    assert (run["status"], run["attempt"]) == ("dead", 1), "no retry can mend it"
    assert run["error"]["type"] == "NotCarried"
    assert "Expected `int`, got `str` - at `$.number`" in run["error"]["message"]
    assert "the value of secret PIN is in it, and is not stored" in run["error"]["message"]
    assert steps(run) == {"account": "failed"}


def test_bytes_that_a_secret_is_in_are_refused_rather_than_cut(events: list[dict[str, Any]]) -> None:
    with pytest.raises(NotCarried, match="secret STRIPE_KEY"):
        carry(b"key: " + KEY.encode(), bytes, "step 'x'")


def test_a_payload_that_the_mask_does_not_fit_is_refused_and_nothing_is_stored(
    opened: StoreThread, events: list[dict[str, Any]]
) -> None:
    @workflow("takes-account")
    async def handler(payload: Account, step: Step) -> None: ...

    with pytest.raises(NotCarried, match="the value of secret PIN is in it") as caught:
        handler.enqueue_sync(Account(int(PIN)))
    assert 'secrets["PIN"]' in caught.value.hint
    assert PIN not in f"{caught.value} {caught.value.hint}"
    assert payload_text(Account(1, KEY), Account, "takes-account") == f'{{"number":1,"owner":"{MASK}"}}'


def test_the_size_limit_holds_for_what_is_stored(events: list[dict[str, Any]]) -> None:
    assert encode(KEY * 10, "it", limit=300) == '"' + MASK * 10 + '"'
    with pytest.raises(TooLarge):
        encode(KEY * 10, "it", limit=190)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_long_message_is_masked_before_its_middle_is_left_out(events: list[dict[str, Any]]) -> None:
    """Cut first, half a value would stay on each side."""
    half = LONGEST // 2
    kept = describe(ValueError("x" * (half - 6) + KEY + "y" * LONGEST))
    assert "sk_liv" not in kept.text()
    assert MASK[:6] in kept.message


def test_what_rebuilds_an_exception_is_masked_too(events: list[dict[str, Any]]) -> None:
    error = ValueError("refused", {"key": [KEY]})
    error.key = KEY  # type: ignore[attr-defined]
    kept = read(describe(error, "the error of step 'x'").text())
    assert kept.args == ["refused", {"key": [MASK]}]
    assert kept.state == {"key": MASK}
    assert KEY not in kept.text()
    assert places(events) == [("the error of step 'x'", "STRIPE_KEY")]


def test_a_payload_that_does_not_fit_tells_no_value_of_a_secret(
    opened: StoreThread, home: Home, events: list[dict[str, Any]]
) -> None:
    """pydantic's errors may have been written by the user's own validators."""
    pydantic = pytest.importorskip("pydantic")

    def refuse(value: str) -> str:
        raise ValueError(f"{value} is not {KEY}")

    validated = pydantic.create_model(
        "Validated", key=(str, ...), __validators__={"no": pydantic.field_validator("key")(refuse)}
    )

    async def takes(payload, step):  # type: ignore[no-untyped-def]
        ...

    takes.__annotations__["payload"] = validated
    flow: Workflow[..., Any] = workflow("validated")(takes)
    flow.payload_type, checked = dict, flow.payload_type
    run_id = flow.enqueue_sync({"key": "x"})
    flow.payload_type = checked
    work(opened, home)
    run = finished(opened, run_id)
    assert run["status"] == "dead"
    assert f"x is not {MASK}" in run["error"]["message"]


# --- names, which cannot be masked -----------------------------------------------------------------------------------


def test_a_name_with_a_secret_in_it_is_refused_and_not_shown(
    opened: StoreThread, home: Home, events: list[dict[str, Any]]
) -> None:
    @workflow("names")
    async def handler(step: Step) -> None:
        await step.run(f"charge {KEY}", lambda: 1)

    refused = []
    for call in (lambda: handler.enqueue_sync(unique_key=f"k:{KEY}"), lambda: signal_sync(f"approval:{KEY}")):
        with pytest.raises(InvalidValue, match="has the value of secret STRIPE_KEY in it") as caught:
            call()
        refused.append(f"{caught.value} {caught.value.hint}")
    run_id = handler.enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id)
    assert (run["status"], run["error"]["type"], run["attempt"]) == ("dead", "StepMisuse", 1)
    assert steps(run) == {}
    assert KEY not in f"{refused} {run}"


# --- which secrets, and none ------------------------------------------------------------------------------------------


def test_what_was_masked_before_a_change_is_masked_after_it() -> None:
    with guarded({"KEY": "first-value"}):
        with guarded({"KEY": "second-value"}):
            assert masked("first-value second-value", "here") == "[secret KEY] [secret KEY]"
        assert masked("first-value second-value", "here") == "[secret KEY] second-value"
    assert masked("first-value", "here") == "first-value"


def test_without_secrets_every_text_is_the_same_object(opened: StoreThread) -> None:
    with guarded({}):
        text, data = "x" * 100, b"y" * 100
        assert masked(text, "here") is text
        assert masked_json(data, "here") is data
        assert named_in(text) is None
        assert log._mask is None
        signal_sync("news", MASK)
    [kept] = opened.do_sync(KeptSignals(now=0))
    assert kept.payload == f'"{MASK}"'.encode()


def test_events_are_masked_but_for_what_they_are(events: list[dict[str, Any]]) -> None:
    with guarded({"WORD": "output", "LEVEL": "default"}):
        log.emit("output", stream="stdout", text=f"the output of {KEY}", n=12345678)
    event = next(event for event in events if event["event"] == "output")
    assert event["text"] == f"the [secret WORD] of {MASK}"
    assert (event["n"], event["stream"]) == (12345678, "stdout")
    assert {place for place, _ in places(events)} == {"a log line"}
