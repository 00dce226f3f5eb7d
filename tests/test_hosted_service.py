"""The stand-in itself, driven by Groq's own client: what our worker is tested against must at least be what that client understands."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import groq
import pytest
from hosted_service import BASE, KEY, Running, serving


@pytest.fixture
def service() -> Iterator[Running]:
    with serving() as running:
        yield running


def client_of(running: Running, key: str = KEY) -> groq.Groq:
    return groq.Groq(api_key=key, base_url=running.root, max_retries=0, timeout=5)


def ask(client: groq.Groq, text: str = "hello", **options: object) -> object:
    return client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": text}], **options)  # type: ignore[call-overload]


def test_it_answers_a_chat_with_usage_and_times(service: Running) -> None:
    with client_of(service) as client:
        answer = client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "hello"}], max_completion_tokens=8)
    assert answer.choices[0].message.content == f"{BASE} says: hello"
    assert answer.usage is not None
    assert answer.usage.queue_time is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4
    assert answer.x_groq is not None


@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        ("429", groq.RateLimitError),
        ("498", groq.APIStatusError),
        ("503", groq.InternalServerError),
        ("json", groq.BadRequestError),
        ("reset", groq.APIConnectionError),
        ("truncated", groq.APIConnectionError),
        ("timeout", groq.APITimeoutError),
    ],
)
def test_each_fault_is_what_the_client_knows_it_as(service: Running, fault: str, raised: type[Exception]) -> None:
    service.service.next_faults, service.service.hang_s = [fault], 3
    with client_of(service).with_options(timeout=1) as client, pytest.raises(raised) as told:
        ask(client)
    if isinstance(told.value, groq.APIStatusError):
        assert told.value.body["error"]["message"]  # type: ignore[index]
    with client_of(service) as client:
        assert ask(client)


def test_limits_are_kept_and_told(service: Running) -> None:
    service.service.rpm, service.service.tpm = 3, 10_000
    with client_of(service) as client:
        reply = client.chat.completions.with_raw_response.create(model=BASE, messages=[{"role": "user", "content": "x"}])
        assert reply.headers["x-ratelimit-limit-tokens"] == "10000"
        ask(client)
        ask(client)
        with pytest.raises(groq.RateLimitError, match=r"requests per minute \(RPM\): Limit 3, Used 3") as told:
            ask(client)
        assert 58 < float(told.value.response.headers["retry-after"]) <= 60
        with pytest.raises(groq.APIStatusError, match="Request too large"):
            ask(client, max_completion_tokens=20_000)


def test_wrong_requests_are_refused(service: Running) -> None:
    with client_of(service, "another") as client, pytest.raises(groq.AuthenticationError):
        ask(client)
    with client_of(service) as client:
        with pytest.raises(groq.BadRequestError, match="logit_bias"):
            ask(client, logit_bias={"1": 1})
        with pytest.raises(groq.NotFoundError, match="does not exist"):
            client.chat.completions.create(model="ft:nobody", messages=[{"role": "user", "content": "x"}])


def test_files_and_a_batch_with_a_line_that_fails(service: Running) -> None:
    service.service.fail_lines = ("two",)
    lines = [
        {
            "custom_id": f"r{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": BASE, "messages": [{"role": "user", "content": n}]},
        }
        for n in ("one", "two", "three")
    ]
    with client_of(service) as client:
        data = "\n".join(map(json.dumps, lines)).encode()
        file = client.files.create(file=("jobs.jsonl", data), purpose="batch")
        assert [f.filename for f in client.files.list().data] == ["jobs.jsonl"]
        batch = client.batches.create(
            completion_window="24h", endpoint="/v1/chat/completions", input_file_id=str(file.id), metadata={"lorayard": "b1"}
        )
        give_up = time.monotonic() + 10
        while (over := client.batches.retrieve(batch.id)).status != "completed":
            assert time.monotonic() < give_up
        good = [json.loads(line) for line in client.files.content(str(over.output_file_id)).read().splitlines()]
        bad = [json.loads(line) for line in client.files.content(str(over.error_file_id)).read().splitlines()]
        assert sorted(row["custom_id"] for row in good) == ["rone", "rthree"]
        assert [row["response"]["status_code"] for row in bad] == [400]
        assert client.batches.list().data[0].metadata == {"lorayard": "b1"}
        assert client.files.delete(str(file.id)).deleted


def test_fine_tunings_are_not_under_openai(service: Running) -> None:
    with client_of(service) as client:
        file = client.files.create(file=("a.zip", b"no zip"), purpose="fine_tuning")  # type: ignore[arg-type]
        body = {"input_file_id": file.id, "name": "tone-v1", "type": "lora", "base_model": BASE}
        with pytest.raises(groq.BadRequestError, match="not an adapter"):
            client.post("/v1/fine_tunings", body=body, cast_to=object)
        assert client.get("/v1/fine_tunings", cast_to=object) == {"object": "list", "data": []}
        service.service.hosting = False
        with pytest.raises(groq.PermissionDeniedError):
            client.get("/v1/fine_tunings", cast_to=object)
