"""Provisioning against the stand-in: what is packed, adopted, refused, looked at again; and what the tenant is told of it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from api_support import Api, answers_while_writes_wait, job
from api_support import serving as serving_api
from hosted_service import BASE, KEY, Running
from hosted_support import LLAMA, settings_of, tiny_adapter
from safetensors.numpy import load

from lorayard import hosted_cli
from lorayard.adapters import AdapterRegistry
from lorayard.adapters.hosting import Publication, Publications
from lorayard.adapters.packaging import pack
from lorayard.adapters.peft import read_adapter
from lorayard.adapters.store import ArtifactStore
from lorayard.errors import AdapterRejected, Conflict
from lorayard.hosted import BASES
from lorayard.jobs import lane_of
from lorayard.ledger.policies import Policies, Policy
from lorayard.ledger.registry import WorkerInfo, WorkerRegistry, open_ledger
from lorayard.settings import Settings
from lorayard_workers.groq import adapters
from lorayard_workers.groq.adapters import Provisioner
from lorayard_workers.groq.client import ServiceClient
from lorayard_workers.groq.worker import Hosting, announce_base, serve_groq

NAMES = (LLAMA,)


def test_a_pool_without_local_workers_takes_adapters_for_the_hosted_base(store: redis.Redis) -> None:
    """Also one that had a local worker with another model once, as after the demo."""
    settings = Settings(hosted_model=BASE, local_worker=False)
    ledger, registry = open_ledger(store, settings), WorkerRegistry(store)
    registry.announce_base("main", {"names": ["demo"]})
    registry.beat(WorkerInfo(name="w", pool="main", kind="llama", incarnation="i", host="h", pid=1, ready=True))
    announce_base(settings, ledger)
    assert registry.base("main") == {"names": ["demo"]}, "a local worker that lives knows better"
    for worker in registry.workers("main"):
        registry.strike_off(worker)
    announce_base(Settings(hosted_model=BASE), ledger)
    assert registry.base("main") == {"names": ["demo"]}, "one may come back"
    announce_base(settings, ledger)
    found = registry.base("main")
    assert found is not None
    assert LLAMA in found["names"]


# -- the package ---------------------------------------------------------------------------------------------------------------------------


def unpacked(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == ["adapter_config.json", "adapter_model.safetensors"]
        return json.loads(archive.read("adapter_config.json")), load(archive.read("adapter_model.safetensors"))


def delta(tensors: dict[str, Any], scale: float) -> Any:
    (a,), (b,) = ([t.astype(np.float64) for name, t in tensors.items() if side in name] for side in ("lora_A", "lora_B"))
    return scale * b @ a


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 3}}], ids=["plain", "rslora", "pattern"])
def test_the_package_computes_what_peft_does_with_plain_alpha_over_rank(options: dict[str, Any]) -> None:
    adapter = read_adapter(tiny_adapter(**options))
    config, tensors = unpacked(pack(adapter, NAMES))
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
    assert not config.get("use_rslora")
    assert not config.get("alpha_pattern")
    (module,) = adapter.modules
    expected = module.scale * module.b.float32().astype(np.float64) @ module.a.float32()
    np.testing.assert_allclose(delta(tensors, config["lora_alpha"] / config["r"]), expected, rtol=1e-2, atol=0.1)
    assert pack(adapter, NAMES) == pack(read_adapter(tiny_adapter(**options)), NAMES), "the same bytes each time"


def test_modules_of_different_scales_have_one_in_the_package() -> None:
    adapter = read_adapter(tiny_adapter(modules=("v_proj", "k_proj"), alpha_pattern={"k_proj": 3}))
    config, tensors = unpacked(pack(adapter, NAMES))
    assert len({module.scale for module in adapter.modules}) == 2
    for module in adapter.modules:
        mine = {name: tensor for name, tensor in tensors.items() if module.kind in name}
        expected = module.scale * module.b.float32().astype(np.float64) @ module.a.float32()
        np.testing.assert_allclose(delta(mine, config["lora_alpha"] / config["r"]), expected, rtol=1e-2, atol=0.1)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"rank": 12}, "adapter_rank", "rank 12"),
        ({"base": "meta-llama/Llama-3.2-1B"}, "adapter_base_mismatch", "must be exactly"),
    ],
)
def test_what_the_service_could_not_serve_is_not_even_packed(options: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(AdapterRejected, match=says) as told:
        pack(read_adapter(tiny_adapter(**options)), NAMES)
    assert told.value.code == code


def test_numbers_beyond_float16_are_refused() -> None:
    adapter = read_adapter(tiny_adapter(lora_alpha=16.0))
    (module,) = adapter.modules
    big = module.b.float32() * np.float32(1e6)
    tensor = type(module.b)("F32", module.b.shape, memoryview(big.tobytes()))
    broken = type(adapter)(config=adapter.config, modules=(type(module)(0, "v_proj", module.scale, module.a, tensor),))
    with pytest.raises(AdapterRejected, match="float16"):
        pack(broken, NAMES)


# -- bringing it there ---------------------------------------------------------------------------------------------------------------------


class Desk:
    """A provisioner with a store of its own."""

    def __init__(self, folder: Path, client: redis.Redis, service: Running) -> None:
        self.settings = settings_of(service, state_dir=folder)
        self.store = ArtifactStore.open(self.settings)
        self.publications = Publications(client, "default", BASE)
        self.client = ServiceClient(self.settings)
        self.policies = Policies(client)
        self.provisioner = Provisioner(self.settings, self.publications, self.policies, self.client, self.store.get)
        self.service = service.service

    def add(self, **options: Any) -> str:
        return self.store.put(read_adapter(tiny_adapter(**options)))

    def settle(self, digest: str) -> Publication | None:
        self.provisioner.sweep()
        return self.publications.get(digest)

    def published(self, **options: Any) -> Publication:
        digest = self.add(**options)
        self.publications.ask(digest, "acme/tone")
        found = self.settle(digest)
        assert found is not None
        return found


@pytest.fixture
def desk(tmp_path: Path, store: redis.Redis, service: Running) -> Iterator[Desk]:
    one = Desk(tmp_path, store, service)
    for tenant in ("acme", "zeta"):
        one.policies.set(tenant, Policy(hosted=True))
    with one.client:
        yield one


def test_an_adapter_asked_for_twice_is_there_once(desk: Desk) -> None:
    found = desk.published()
    assert found.state == "ready"
    assert found.model.startswith(f"ft:{BASE}:")
    assert desk.published().model == found.model
    assert set(desk.service.made.values()) == {1}
    assert (len(desk.service.files), len(desk.service.tunings)) == (1, 1)


def test_what_lies_there_already_is_adopted_and_copies_are_removed(desk: Desk) -> None:
    """Two workers took each other for dead: each has made everything, and one of them a file cut short."""
    digest = desk.add()
    data = pack(desk.store.get(digest), NAMES)
    client = desk.client
    ids = [str(client.upload(f"ly-{digest}.zip", data, "fine_tuning")["id"]) for _ in range(2)]
    first, _ = (client.tune(f"ly-{digest}", file_id, BASE) for file_id in ids)
    client.upload(f"ly-{digest}.zip", data[:1000], "fine_tuning")
    client.upload("somebody-else.zip", data, "fine_tuning")
    desk.publications.ask(digest, "acme/tone")
    found = desk.settle(digest)
    assert found is not None
    assert (found.state, found.model) == ("ready", first["fine_tuned_model"])
    assert [*desk.service.tunings] == [found.tuning_id]
    assert sorted(f["filename"] for f in desk.service.files.values()) == [f"ly-{digest}.zip", "somebody-else.zip"]


def test_a_file_that_lies_there_is_registered_and_one_cut_short_is_removed(desk: Desk) -> None:
    """Somebody was interrupted while he brought it there, and the next between file and registration."""
    digest = desk.add()
    data, name = pack(desk.store.get(digest), NAMES), f"ly-{digest}.zip"
    desk.client.upload(name, data[:1000], "fine_tuning")
    whole = desk.client.upload(name, data, "fine_tuning")
    desk.publications.ask(digest, "acme/tone")
    found = desk.settle(digest)
    assert found is not None
    assert (found.state, found.file_id) == ("ready", whole["id"])
    assert [*desk.service.files] == [whole["id"]]
    assert desk.service.made[name] == 2, "nothing was uploaded again"


@pytest.mark.parametrize(
    ("options", "code"), [({"rank": 12}, "adapter_rank"), ({"base": "meta-llama/Llama-3.2-1B"}, "adapter_base_mismatch")]
)
def test_what_cannot_be_served_is_refused_and_nothing_sent(desk: Desk, options: dict[str, Any], code: str) -> None:
    found = desk.published(**options)
    assert (found.state, found.code) == ("refused", code)
    assert not desk.service.files


def test_no_access_is_told_plainly(desk: Desk) -> None:
    desk.service.hosting = False
    found = desk.published()
    assert (found.state, found.code) == ("refused", "hosted_no_access")
    assert "ask the service for LoRA access" in found.error
    assert not desk.service.files


def test_a_rejected_file_does_not_stay_there(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hosted_files.RANKS", (16,))
    found = desk.published()
    assert (found.state, found.code) == ("refused", "adapter_refused_by_host")
    assert "r must be one of" in found.error
    assert not desk.service.files
    monkeypatch.undo()
    desk.publications.ask(found.digest, "acme/tone")
    again = desk.settle(found.digest)
    assert again is not None
    assert again.state == "ready", "asked for again, it is tried again"


def test_what_was_deleted_there_by_hand_is_brought_there_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    found = desk.published()
    desk.service.tunings.clear()
    desk.service.files.clear()
    monkeypatch.setattr(adapters, "CHECK_S", -1.0)
    again = desk.settle(found.digest)
    assert again is not None
    assert again.state == "ready"
    assert again.model != found.model
    assert again.model in {t["data"]["fine_tuned_model"] for t in desk.service.tunings.values()}


def test_an_adapter_under_two_names_stays_until_both_are_gone(desk: Desk) -> None:
    digest = desk.published().digest
    desk.publications.ask(digest, "zeta/voice")
    desk.settle(digest)
    desk.publications.unask(digest, "acme/tone")
    assert desk.settle(digest) is not None
    desk.publications.unask(digest, "zeta/voice")
    assert desk.settle(digest) is None
    assert (desk.service.files, desk.service.tunings) == ({}, {})


def test_what_a_tenant_has_there_goes_when_its_leave_does(desk: Desk) -> None:
    """And nothing leaves that was asked for before: an adapter is data."""
    shared, ready, waits = (desk.add(seed=n) for n in range(3))
    for digest, title in ((shared, "acme/tone"), (shared, "*/tone"), (ready, "acme/tone"), (ready, "zeta/voice")):
        desk.publications.ask(digest, title)
    desk.publications.mark("acme", "tone")
    desk.provisioner.sweep()
    desk.publications.ask(waits, "acme/other")
    desk.policies.set("acme", Policy())
    for _ in range(2):
        desk.provisioner.sweep()
    assert {one.digest: (one.state, one.titles) for one in desk.publications.all().values()} == {
        shared: ("ready", ["*/tone"]),
        ready: ("ready", ["zeta/voice"]),
    }
    assert not desk.publications.marked("acme", "tone")
    assert desk.service.made[f"ly-{waits}.zip"] == 0
    desk.policies.set("zeta", Policy(daily_usd=1.0))
    for _ in range(2):
        desk.provisioner.sweep()
    assert [*desk.publications.all()] == [shared]
    assert [row["filename"] for row in desk.service.files.values()] == [f"ly-{shared}.zip"]


def test_leave_that_goes_between_wish_and_upload_is_looked_at(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, real = desk.add(), desk.publications.lock

    def lock(digest: str, hold_s: float) -> Any:
        desk.policies.set("acme", Policy())
        return real(digest, hold_s)

    monkeypatch.setattr(desk.publications, "lock", lock)
    desk.publications.ask(digest, "acme/tone")
    assert desk.settle(digest) is not None
    assert not desk.service.made
    assert desk.settle(digest) is None


def test_a_model_given_by_its_id_is_only_looked_for(desk: Desk) -> None:
    digest = desk.add()
    desk.publications.ask(digest, "acme/tone", model="tone-lora")
    found = desk.settle(digest)
    assert found is not None
    assert (found.state, found.code) == ("refused", "hosted_model_missing")
    desk.publications.ask(digest, "acme/tone", model=BASE)
    found = desk.settle(digest)
    assert found is not None
    assert (found.state, found.model) == ("ready", BASE)
    assert not desk.service.files


def test_what_was_brought_there_is_not_left_behind_for_a_model_given_by_its_id(desk: Desk) -> None:
    found = desk.published()
    for _ in range(2):
        with pytest.raises(Conflict, match="unpublish"):
            desk.publications.ask(found.digest, "acme/tone", model=BASE)
        assert desk.publications.unask(found.digest, "acme/tone"), "it is still to be removed"
    assert desk.settle(found.digest) is None
    assert not desk.service.files
    assert desk.publications.ask(found.digest, "acme/tone", model=BASE).given


def test_a_forgotten_model_is_looked_at_again(desk: Desk) -> None:
    found = desk.published()
    Hosting(BASE, desk.publications).doubt(found.digest)
    doubted = desk.publications.get(found.digest)
    assert doubted is not None
    assert doubted.state == "wanted"


@pytest.mark.parametrize(
    ("wrong", "says"), [({"hosted_key": "wrong"}, "refuses the key"), ({"hosted_url": "moved"}, "redirects .* to https://login.example/")]
)
def test_what_no_call_could_get_past_is_told_at_the_start(
    store: redis.Redis, redis_url: str, tmp_path: Path, service: Running, wrong: dict[str, str], says: str
) -> None:
    from lorayard.celery_app import make_app
    from lorayard.errors import SetupError
    from lorayard.ledger.registry import open_ledger

    wrong = {name: f"{service.root}/moved/v1" if name == "hosted_url" else value for name, value in wrong.items()}
    settings = settings_of(service, state_dir=tmp_path, **wrong)
    with pytest.raises(SetupError, match=says):
        serve_groq(settings, open_ledger(store, settings), make_app(redis_url))


# -- over HTTP -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def api(tmp_path: Path, store: redis.Redis, redis_url: str, service: Running) -> Iterator[Api]:
    import msgspec

    known = {"hosted_model": BASE, "hosted_url": service.url, "hosted_key": KEY, "hosted_prices": {BASE: (0.05, 0.08)}}
    with serving_api(redis_url, tmp_path, **known) as running:
        running.new_keys()
        WorkerRegistry(store).announce_base(running.settings.pool, msgspec.to_builtins(BASES[BASE]))
        yield running


def add(api: Api, name: str = "tone", *, who: str = "acme", **options: Any) -> None:
    files = {"file": ("a.zip", tiny_adapter(**options), "application/zip")}
    assert api.call("POST", "/v1/adapters", who, data={"name": name}, files=files).status_code == 201


def error(reply: Any) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def test_a_tenant_publishes_its_adapter_and_routes_jobs_there(api: Api, store: redis.Redis, service: Running) -> None:
    add(api)
    path = "/v1/adapters/tone/publication"
    assert error(api.call("PUT", path, json={"to": "groq"})) == (403, "hosted_not_allowed")
    assert error(api.call("POST", "/v1/jobs", json=job(route="groq"))) == (403, "hosted_not_allowed")
    Policies(store).set("acme", Policy(hosted=True))
    assert error(api.call("POST", "/v1/jobs", json=job(route="groq", adapter="tone"))) == (400, "adapter_not_hosted")
    assert error(api.call("PUT", path, json={"to": "mars"})) == (400, "invalid_request")
    assert api.call("PUT", path, json={"to": "groq"}).json()["state"] == "wanted"
    desk = Desk(api.settings.state_dir, store, service)
    desk.provisioner.sweep()
    assert api.call("GET", path).json()["state"] == "ready"
    (row,) = api.post(job(route="groq", adapter="tone"))
    document = api.ledger.show("acme", [row["id"]])[0]
    assert document is not None
    assert (document["route"], document["adapter"], len(document["adapter_digest"])) == ("groq", "tone", 32)
    add(api, seed=2)
    desk.provisioner.sweep()
    assert len(service.service.tunings) == 2, "new content of a published name follows by itself"
    assert api.call("GET", "/v1/hosted").json()["policy"]["hosted"]
    assert api.call("DELETE", path).json()["deleted"]
    desk.provisioner.sweep()
    assert not service.service.tunings
    with desk.client:
        pass


def test_only_the_operator_says_which_model_stands_for_an_adapter(api: Api, store: redis.Redis, service: Running) -> None:
    """Content is one for all who have it: whoever said so would say it for everybody."""
    path, given = "/v1/adapters/tone/publication", {"to": "groq", "model": "tone-lora"}
    for who in ("acme", "globex"):
        Policies(store).set(who, Policy(hosted=True))
        add(api, who=who)
    assert api.call("PUT", path, json={"to": "groq"}).json()["titles"] == ["acme/tone"]
    desk = Desk(api.settings.state_dir, store, service)
    with desk.client:
        desk.provisioner.sweep()
        ready = api.call("GET", path).json()
        assert (ready["state"], ready["model"][:3]) == ("ready", "ft:")
        assert error(api.call("PUT", path, "globex", json=given)) == (403, "operator_only")
        assert error(api.call("PUT", f"{path}?tenant=acme", "globex", json={"to": "groq"})) == (403, "operator_only")
        for tenant in ("acme", "globex"):
            assert error(api.call("PUT", f"{path}?tenant={tenant}", "root", json=given)) == (409, "published_otherwise")
        assert api.call("GET", path).json() == ready, "nothing is forgotten"
        assert api.call("PUT", path, "globex", json={"to": "groq"}).json()["titles"] == ["globex/tone"]
        assert api.call("GET", path).json()["titles"] == ["acme/tone"]
        assert api.call("GET", f"{path}?tenant=acme", "root").json()["titles"] == ["acme/tone", "globex/tone"]
        for tenant in ("acme", "globex"):
            assert api.call("DELETE", f"{path}?tenant={tenant}", "root").json()["deleted"]
        desk.provisioner.sweep()
        assert (service.service.files, service.service.tunings) == ({}, {})
        wanted = api.call("PUT", f"{path}?tenant=globex", "root", json=given).json()
        assert (wanted["state"], wanted["model"], wanted["titles"]) == ("wanted", "tone-lora", ["globex/tone"])
        desk.provisioner.sweep()
        refused = api.call("GET", path, "globex").json()
        assert (refused["state"], refused["code"]) == ("refused", "hosted_model_missing")
        assert BASE not in refused["error"], "what else the account has is nobody's business"
        assert api.call("PUT", f"{path}?tenant=globex", "root", json=given | {"model": BASE}).json()["model"] == BASE
        assert api.call("PUT", path, json={"to": "groq"}).json()["model"] == BASE, "who publishes it too changes nothing"
        desk.provisioner.sweep()
        assert api.call("GET", path, "globex").json()["state"] == "ready"
        assert not service.service.files


def test_new_content_of_a_published_name_stays_when_leave_was_withdrawn(api: Api, store: redis.Redis) -> None:
    path = "/v1/adapters/tone/publication"
    Policies(store).set("acme", Policy(hosted=True))
    add(api)
    assert api.call("PUT", path, json={"to": "groq"}).status_code == 202
    Policies(store).set("acme", Policy())
    add(api, seed=2)
    assert error(api.call("GET", path)) == (404, "not_published")
    Policies(store).set("acme", Policy(hosted=True))
    local = {
        "LORAYARD_REDIS_URL": str(api.settings.redis_url),
        "LORAYARD_HOSTED_MODEL": BASE,
        "LORAYARD_STATE_DIR": str(api.settings.state_dir),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in local.items():
            patch.setenv(name, value)
        hosted_cli.tenants_set("acme", may_leave=False)
    there = Publications(store, "default", BASE)
    assert [(one.state, one.titles) for one in there.all().values()] == [("unwanted", [])]
    assert not there.marked("acme", "tone")


def test_a_name_that_is_taken_away_goes_from_the_service_too(api: Api, store: redis.Redis, service: Running) -> None:
    path = "/v1/adapters/tone/publication"
    Policies(store).set("acme", Policy(hosted=True))
    desk = Desk(api.settings.state_dir, store, service)
    with desk.client:
        add(api)
        assert api.call("PUT", path, json={"to": "groq"}).status_code == 202
        desk.provisioner.sweep()
        assert len(service.service.tunings) == 1
        assert api.call("DELETE", "/v1/adapters/tone").json()["deleted"]
        desk.provisioner.sweep()
        assert (service.service.files, service.service.tunings) == ({}, {})
        add(api, seed=2)
        desk.provisioner.sweep()
        assert not service.service.files, "another adapter of that name was never published"
        assert api.call("DELETE", path).json()["deleted"] is False


def test_what_no_adapter_has_the_name_of_any_more_is_unpublished_by_it(api: Api, store: redis.Redis) -> None:
    path = "/v1/adapters/tone/publication"
    Policies(store).set("acme", Policy(hosted=True))
    registry, there = AdapterRegistry(store), Publications(store, "default", BASE)
    add(api)
    digest = api.call("PUT", path, json={"to": "groq"}).json()["digest"]
    registry.remove("acme", "tone")
    assert error(api.call("DELETE", path, "globex")) == (404, "adapter_not_found")
    assert api.call("DELETE", path).json()["deleted"]
    assert [one.state for one in there.all().values()] == ["unwanted"]
    assert error(api.call("DELETE", path)) == (404, "adapter_not_found")
    there.ask(digest, "*/tone")
    assert error(api.call("DELETE", path)) == (403, "operator_only")
    add(api)
    assert api.call("DELETE", path).json()["deleted"] is False, "an adapter of one's own hides what is everyone's"
    assert api.call("DELETE", path, "root").json()["deleted"]
    assert [one.state for one in there.all().values()] == ["unwanted"]


def test_publishing_keeps_nobody_else_waiting_for_the_store(api: Api, store: redis.Redis) -> None:
    Policies(store).set("acme", Policy(hosted=True))
    add(api)
    assert answers_while_writes_wait(api, "PUT", "/v1/adapters/tone/publication", {"to": "groq"})["state"] == "wanted"


def test_what_a_full_server_cannot_write_is_told_as_such(api: Api, store: redis.Redis) -> None:
    """Also by what is no call of the ledger."""
    Policies(store).set("acme", Policy(hosted=True))
    add(api)
    before = str(store.config_get("maxmemory")["maxmemory"])
    store.config_set("maxmemory", 1)
    try:
        reply = api.call("PUT", "/v1/adapters/tone/publication", json={"to": "groq"})
        assert error(reply) == (503, "ledger_full")
        assert int(reply.headers["retry-after"]) >= 1
    finally:
        store.config_set("maxmemory", before)


def test_jobs_of_an_adapter_that_was_refused_keep_to_local_workers(api: Api, store: redis.Redis, service: Running) -> None:
    Policies(store).set("acme", Policy(hosted=True))
    add(api, rank=12)
    assert api.call("PUT", "/v1/adapters/tone/publication", json={"to": "groq"}).status_code == 202
    desk = Desk(api.settings.state_dir, store, service)
    with desk.client:
        desk.provisioner.sweep()
    refused = api.call("POST", "/v1/jobs", json=job(route="groq", adapter="tone"))
    assert error(refused) == (400, "adapter_rank")
    assert "rank 12" in refused.json()["error"]["message"]
    assert "id" in api.post(job(route="auto", adapter="tone"))[0]
    assert [lane_of(g.digest) for g in api.ledger.snapshot().groups] == [""]


def test_lanes_keep_hosted_and_local_jobs_apart(api: Api, store: redis.Redis, service: Running) -> None:
    Policies(store).set("acme", Policy(hosted=True))
    week = 7 * 86400
    for fields in ({"route": "local"}, {"route": "groq"}, {"route": "auto"}, {"route": "groq", "deadline_s": week}):
        assert "id" in api.post(job(**fields))[0]
    body = job(route="auto")
    body["request"] |= {"reasoning_effort": "low"}
    assert "id" in api.post(body)[0]
    body = job(route="auto")
    body["request"] |= {"logit_bias": {"1": 5}}
    assert "id" in api.post(body)[0]
    groups = {g.digest: g.jobs for g in api.ledger.snapshot().groups}
    assert groups == {"base": 2, "base@groq": 2, "base@auto": 1, "base@batch": 1}
    body["route"] = "groq"
    assert api.post(body)[0]["error"]["code"] == "unsupported_parameter"
    api.ledger.pause("adapter:base")
    assert all(g.jobs == 0 for g in api.ledger.snapshot().groups), "a pause holds every lane"


def test_spent_money_is_told_at_submit(api: Api, store: redis.Redis) -> None:
    Policies(store).set("acme", Policy(hosted=True, daily_usd=0.0))
    assert error(api.call("POST", "/v1/jobs", json=job(route="groq"))) == (403, "budget_exhausted")
    told = api.post(job(route="groq"))[0]["error"]["message"]
    assert told == (
        "route 'groq': tenant acme's money of the day is spent ($0.00 for hosted calls): 'lorayard tenants set acme --daily-usd DOLLARS'"
        " gives more; left out, the job runs on local workers"
    )
    assert "id" in api.post(job(route="auto"))[0]
    assert [g.digest for g in api.ledger.snapshot().groups] == ["base"], "at home it costs nothing"


ODD: list[dict[str, Any]] = [
    {"temperature": 3},
    {"top_p": 1.5},
    {"stop": ["a", 1]},
    {"stop": list("abcde")},
    {"tools": [{"type": "function"}]},
    {"tools": "none"},
    {"response_format": {"type": "xml"}},
    {"response_format": {"type": "json_schema"}},
    {"seed": 1.5},
    {"user": 7},
    {"parallel_tool_calls": "yes"},
    {"service_tier": "gold"},
    {"reasoning_effort": 3},
    {"messages": [{"content": "nobody says it"}]},
]


@pytest.mark.parametrize("fields", ODD, ids=str)
def test_what_the_service_would_refuse_for_its_form_is_refused_at_submit(api: Api, store: redis.Redis, fields: dict[str, Any]) -> None:
    Policies(store).set("acme", Policy(hosted=True))
    body = job(route="groq")
    body["request"] |= fields
    (name,) = fields
    reply = api.call("POST", "/v1/jobs", json=body)
    assert error(reply) == (400, "invalid_request")
    assert reply.json()["error"]["param"] == name


def test_the_list_of_codes_can_be_asked_for(api: Api) -> None:
    rows = api.call("GET", "/v1/hosted/errors").json()["data"]
    assert {row["code"]: row["then"] for row in rows}["request_too_large"] == "failed"


@pytest.mark.parametrize("most", [10**20, 1e300, -1, 0, 1.5, "9", True])
def test_a_number_of_tokens_that_is_none_is_refused_at_submit(api: Api, store: redis.Redis, most: Any) -> None:
    Policies(store).set("acme", Policy(hosted=True))
    body = job(route="groq")
    body["request"]["max_tokens"] = most
    assert error(api.call("POST", "/v1/jobs", json=body)) == (400, "invalid_request")
