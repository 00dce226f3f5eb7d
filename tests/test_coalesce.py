"""Jobs that want to be computed once: who computes, who waits, and that whatever becomes of the one, the others are not lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from api_support import Api, job, run, serving
from ledger_support import make_entry

from lorayard.ledger.audit import audit


@pytest.fixture(scope="module")
def server(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(redis_url, tmp_path_factory.mktemp("coalesce")) as api:
        yield api


@pytest.fixture
def api(server: Api, store: redis.Redis) -> Api:
    server.new_keys()
    return server


def same(text: str = "How many?", **fields: Any) -> dict[str, Any]:
    """A job of which one answer does for all."""
    made = job(text, coalesce=True, **fields)
    made["request"]["temperature"] = 0
    return made


def post(api: Api, *jobs: dict[str, Any], who: str = "acme") -> list[str]:
    rows = api.post(*jobs, who=who)
    assert all("id" in row for row in rows), rows
    return [str(row["id"]) for row in rows]


def document(api: Api, job_id: str, who: str = "acme") -> dict[str, Any]:
    found: dict[str, Any] = api.call("GET", f"/v1/jobs/{job_id}", who).json()
    return found


def statuses(api: Api, *ids: str) -> list[str]:
    return [document(api, i)["status"] for i in ids]


def test_it_is_computed_once_and_each_has_its_own_end(api: Api) -> None:
    first, second = post(api, same(metadata={"n": 1}), same(metadata={"n": 2}))
    (third,) = post(api, same(priority="high", idempotency_key="k3"))
    assert document(api, second)["coalesced_with"] == document(api, third)["coalesced_with"] == first
    assert "coalesced_with" not in document(api, first)
    assert api.ledger.counts()["queued"] == 1
    assert api.run("acme", 10) == [first], "there is one to be computed"
    documents = [document(api, i) for i in (first, second, third)]
    assert [d["status"] for d in documents] == ["succeeded"] * 3
    assert [d["id"] for d in documents] == [d["response"]["id"] for d in documents] == [first, second, third]
    assert len({d["response"]["choices"][0]["message"]["content"] for d in documents}) == 1
    assert [d["metadata"] for d in documents] == [{"n": 1}, {"n": 2}, None]
    assert [d["attempts"] for d in documents] == [1, 0, 0]
    assert [d.get("coalesced_with") for d in documents] == [None, first, first]
    assert set(documents[1]["latencies_ms"]) == {"total"}
    assert documents[1]["why"] == f"computed once, by {first}"
    assert f"Computed once, by {first}" in documents[1]["explanation"]
    counts = api.ledger.counts()
    assert (counts["enqueued"], counts["succeeded"], counts["coalesced"]) == (3, 3, 2)
    assert api.ledger.snapshot().served == {"acme": 3}, "nothing is charged for what was not computed"
    assert audit(api.ledger) == []


def test_what_was_computed_is_not_computed_again_while_its_result_is_kept(api: Api) -> None:
    (first,) = post(api, same())
    api.run("acme")
    (row,) = api.post(same(idempotency_key="again", deadline_s=60))
    assert row["status"] == "succeeded"
    copy = document(api, row["id"])
    assert (copy["coalesced_with"], copy["response"]["choices"]) == (first, document(api, first)["response"]["choices"])
    (again,) = api.post(same(idempotency_key="again", deadline_s=60))
    assert again == row
    kept: Any = api.ledger.client
    ttl = [kept.ttl(f"ly:{{main}}:job:acme/{i}") for i in (first, row["id"])]
    assert 0 < ttl[1] <= ttl[0], "a copy lives no longer than what it is a copy of"
    api.call("DELETE", f"/v1/jobs/{first}")
    assert list(kept.scan_iter("ly:{main}:once:*")) == [], "nothing holds its id"
    assert document(api, row["id"])["status"] == "succeeded"
    (fresh,) = api.post(same())
    assert fresh["status"] == "queued", "who deletes an answer has the next computed"
    assert audit(api.ledger) == []


def test_what_is_not_the_very_same_is_computed_by_itself(api: Api) -> None:
    other = same()
    other["request"] |= {"max_tokens": 5}
    plain = job()
    plain["request"]["temperature"] = 0
    later = same(not_before_s=600)
    ids = post(api, same(), same("And now?"), other, plain, later)
    post(api, same(), who="globex")
    assert not any("coalesced_with" in document(api, i) for i in ids)
    assert len(api.run("acme", 10)) == 4
    assert len(api.run("globex", 10)) == 1
    turned = same()
    turned["request"] = dict(reversed(turned["request"].items())) | {"temperature": 0.0, "user": "u7", "stop": None}
    assert api.post(turned)[0]["status"] == "succeeded", "the order of fields, or who asks, makes no difference"


@pytest.mark.parametrize("how", ["cancel", "delete", "fail", "die"])
def test_whatever_becomes_of_the_one_another_takes_its_place(api: Api, how: str) -> None:
    first, second, third = post(api, same(), same(), same(priority="high"))
    if how in ("cancel", "delete"):
        assert getattr(api.ledger, how)("acme", [first]) == [f"{how}led" if how == "cancel" else "deleted"]
    elif how == "fail":
        assert run(api.ledger, "acme", end="failed") == [first]
    else:
        for _ in range(api.settings.max_attempts):
            assert document(api, second)["coalesced_with"] == first, "they wait for as long as it is tried"
            assert run(api.ledger, "acme", end="retry") == [first]
    assert "coalesced_with" not in document(api, third), "the most due of them"
    assert document(api, second)["coalesced_with"] == third
    assert api.run("acme", 10) == [third]
    assert statuses(api, second, third) == ["succeeded"] * 2
    (row,) = api.post(same())
    assert row["status"] == "succeeded"
    assert audit(api.ledger) == []


def test_who_waits_can_be_cancelled_deleted_and_expire(api: Api) -> None:
    first, second, third, fourth = post(api, same(), same(), same(), same(deadline_s=0.05))
    assert api.ledger.cancel("acme", [second]) == ["cancelled"]
    assert api.ledger.delete("acme", [third]) == ["deleted"]
    while not api.ledger.reap().expired:
        pass
    assert statuses(api, first, second, fourth) == ["queued", "cancelled", "expired"]
    assert api.run("acme", 10) == [first]
    assert statuses(api, first, second, fourth) == ["succeeded", "cancelled", "expired"]
    assert audit(api.ledger) == []


def test_nobody_expires_while_what_it_waits_for_runs(api: Api) -> None:
    first, second = post(api, same(), same(deadline_s=0.05))
    api.run("acme", finish=False)
    time.sleep(0.1)  # by the server's own clock
    assert not api.ledger.reap().expired
    assert statuses(api, first, second) == ["running", "queued"]
    assert audit(api.ledger) == []


def test_the_one_is_as_urgent_as_the_most_urgent_that_waits_for_it(api: Api) -> None:
    first, other = post(api, same(priority="low"), job("another", priority="normal"))
    post(api, same(priority="high"))
    assert api.run("acme", 1) == [first]
    assert statuses(api, other) == ["queued"]


def test_it_comes_back_as_urgent_as_who_waits_for_it(api: Api) -> None:
    (first,) = post(api, same(priority="low"))
    post(api, same(priority="high"))
    assert run(api.ledger, "acme", end="later") == [first]
    (other,) = post(api, job("another", priority="normal"))
    assert api.run("acme", 1) == [first]
    assert statuses(api, other) == ["queued"]


def test_who_waits_counts_in_a_full_backlog(api: Api) -> None:
    entries = [make_entry(f"j{i}", once="a1") for i in range(2)] + [make_entry("j2")]
    assert [answer.status for answer in api.ledger.enqueue(entries[:2], max_queued=2)] == ["queued"] * 2
    assert [answer.status for answer in api.ledger.enqueue(entries[2:], max_queued=2)] == ["full"]


def test_what_would_differ_each_time_is_refused(api: Api) -> None:
    (row,) = api.post(job(coalesce=True))
    assert (row["error"]["param"], row["error"]["code"]) == ("coalesce", "invalid_request")
    seeded = job(coalesce=True)
    seeded["request"] |= {"seed": 7, "temperature": 0.8}
    post(api, seeded)


def test_a_place_that_is_lost_is_found_again(api: Api) -> None:
    first, second, third = post(api, same(), same(), same())
    kept: Any = api.ledger.client
    kept.delete(f"ly:{{main}}:job:acme/{first}")
    kept.zrem("ly:{main}:queue:base:acme", first)
    found = {finding.kind for finding in audit(api.ledger, repair=True)}
    assert "job_in_no_place" in found
    while audit(api.ledger, repair=True):
        kept.hset("ly:{main}:counts", "enqueued", 2)  # the one that was lost without a trace
        kept.hset("ly:{main}:counts", "queued", 2)
    assert sorted(api.run("acme", 10)) == sorted([second, third])
    assert statuses(api, second, third) == ["succeeded"] * 2
