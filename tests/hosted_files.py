"""Files, fine-tunings and batches of the stand-in for Groq (`hosted_service.py`)."""

from __future__ import annotations

import asyncio
import io
import json
import time
import zipfile
from typing import Any

import numpy as np
from hosted_state import BASE, Service, bad_body, completion, distorted, error, unknown
from safetensors.numpy import load
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

RANKS = (8, 16, 32, 64)


# -- files and fine-tunings ----------------------------------------------------------------------------------------------------------------


def add_file(service: Service, name: str, purpose: str, data: bytes) -> dict[str, Any]:
    made: dict[str, Any] = {
        "id": service.new_id("file"),
        "object": "file",
        "bytes": len(data),
        "created_at": int(time.time()),
        "filename": name,
    }
    made["purpose"] = purpose
    service.files[made["id"]] = made
    service.content[made["id"]] = data
    service.made[name] += 1
    return made


async def files(request: Request) -> Response:
    service: Service = request.app.state.service
    if request.method == "GET":
        purpose = request.query_params.get("purpose")
        rows = [f for f in service.files.values() if purpose in (None, f["purpose"])]
        after = request.query_params.get("after")
        ids = [f["id"] for f in rows]
        rows = rows[ids.index(after) + 1 :] if after in ids else rows
        return JSONResponse({"object": "list", "data": rows[:100], "has_more": len(rows) > 100})
    async with request.form(max_files=1, max_fields=8) as form:
        upload, purpose = form.get("file"), str(form.get("purpose"))
        if upload is None or isinstance(upload, str):
            return error(400, "file: is required")
        made = add_file(service, upload.filename or "", purpose, await upload.read())
    await asyncio.sleep(service.slow_creates_s)
    return JSONResponse(made)


async def one_file(request: Request) -> Response:
    service: Service = request.app.state.service
    found = service.files.get(request.path_params["id"])
    if found is None:
        return unknown("file")
    if request.url.path.endswith("/content"):
        return Response(service.content[found["id"]], media_type="application/octet-stream")
    if request.method == "DELETE":
        del service.files[found["id"]], service.content[found["id"]]
        return JSONResponse({"id": found["id"], "object": "file", "deleted": True})
    return JSONResponse(found)


def bad_package(data: bytes) -> str | None:
    """The rules of the LoRA page: two files, float16, one of four ranks."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sorted(archive.namelist()) != ["adapter_config.json", "adapter_model.safetensors"]:
                return "the archive must have exactly two files"
            config = json.loads(archive.read("adapter_config.json"))
            tensors = load(archive.read("adapter_model.safetensors"))
    except (zipfile.BadZipFile, ValueError) as wrong:
        return f"not an adapter: {wrong}"
    if config.get("r") not in RANKS or not isinstance(config.get("lora_alpha"), int | float):
        return f"r must be one of {RANKS} and lora_alpha a number"
    ranks = {t.shape[0] if ".lora_A." in name else t.shape[1] for name, t in tensors.items()}
    if {t.dtype for t in tensors.values()} != {np.dtype(np.float16)} or ranks != {config["r"]}:
        return "tensors must be float16 and of rank r"
    return None


async def tunings(request: Request) -> Response:
    service: Service = request.app.state.service
    if not service.hosting:
        return error(403, "This organization does not have access to fine tuning.", code="permission_denied")
    if request.method == "GET":
        return JSONResponse({"object": "list", "data": [t["data"] | {"id": t["id"]} for t in service.tunings.values()]})
    body = await request.json()
    data = service.content.get(body.get("input_file_id", ""))
    if data is None:
        return error(400, "input_file_id: no such file")
    if wrong := bad_package(data):
        return error(400, wrong)
    if body.get("base_model") != BASE or body.get("type") != "lora":
        return error(400, f"base_model must be {BASE}")
    made_id = service.new_id("ft")
    model = f"ft:{BASE}:org_x/{body['name']}-{made_id}"
    data_part = body | {"fine_tuned_model": model, "created_at": int(time.time())}
    service.tunings[made_id] = {"id": made_id, "object": "fine_tuning", "data": data_part}
    service.made[body["name"]] += 1
    await asyncio.sleep(service.slow_creates_s)
    return JSONResponse(service.tunings[made_id])


async def one_tuning(request: Request) -> Response:
    service: Service = request.app.state.service
    found = service.tunings.get(request.path_params["id"])
    if found is None:
        return unknown("fine tuning")
    if request.method == "DELETE":
        del service.tunings[found["id"]]
        return JSONResponse({"id": found["id"], "object": "fine_tuning", "deleted": True})
    return JSONResponse(found)


# -- batches -------------------------------------------------------------------------------------------------------------------------------


async def batches(request: Request) -> Response:
    service: Service = request.app.state.service
    if request.method == "GET":
        rows = list(service.batches.values())
        start = int(request.query_params.get("cursor") or 0)
        more = start + 20 < len(rows)
        page = [progress(service, row) for row in rows[start : start + 20]]
        return JSONResponse({"object": "list", "data": page, "paging": {"next_cursor": str(start + 20) if more else None}})
    body = await request.json()
    if body.get("endpoint") != "/v1/chat/completions" or body.get("input_file_id") not in service.files:
        return error(400, "endpoint or input_file_id is wrong")
    made: dict[str, Any] = {
        "id": service.new_id("batch"),
        "object": "batch",
        "endpoint": body["endpoint"],
        "input_file_id": body["input_file_id"],
        "completion_window": body["completion_window"],
        "status": "validating",
        "created_at": int(time.time()),
        "metadata": body.get("metadata"),
        "errors": None,
        "output_file_id": None,
        "error_file_id": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
    }
    made["_at"] = time.monotonic()
    service.batches[made["id"]] = made
    await asyncio.sleep(service.slow_creates_s)
    return JSONResponse(shown(made))


def shown(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if not name.startswith("_")}


def progress(service: Service, batch: dict[str, Any]) -> dict[str, Any]:
    """As far as it is by now."""
    passed = time.monotonic() - batch["_at"]
    if batch["status"] in ("completed", "failed", "expired", "cancelled"):
        return shown(batch)
    if batch["status"] == "cancelling":
        batch["status"] = "cancelled"
    elif service.refuse_batch:
        errors = [{"code": "invalid_line", "line": 1, "message": "a line is not valid"}]
        batch |= {"status": "failed", "errors": errors if service.errors_as_array else {"object": "list", "data": errors}}
    elif passed < service.batch_s / 2:
        batch["status"] = "validating"
    elif passed < service.batch_s:
        batch["status"] = "in_progress"
    else:
        run_lines(service, batch)
    return shown(batch)


def run_lines(service: Service, batch: dict[str, Any]) -> None:
    """Each line once; output in no order, what failed in a file of its own."""
    lines = [json.loads(line) for line in service.content[batch["input_file_id"]].splitlines() if line.strip()]
    good: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    for n, line in enumerate(lines):
        text = str(line["body"]["messages"][-1]["content"])
        if 0 <= service.expire_after <= n:
            expired = {"code": "batch_expired", "message": "This request could not be executed before the completion window expired."}
            bad.append({"id": service.new_id("batch_req"), "custom_id": line["custom_id"], "response": None, "error": expired})
            continue
        service.paid[line["custom_id"]] += 1
        wrong = bad_body(service, line["body"])
        if wrong is None and any(word in text for word in service.fail_lines):
            wrong = error(400, "Failed to generate JSON. …", code="json_validate_failed", failed_generation='{"half": ')
        status = wrong.status_code if wrong else 200
        answer = json.loads(bytes(wrong.body)) if wrong else distorted(service, completion(service, line["body"]))
        row = {"id": service.new_id("batch_req"), "custom_id": line["custom_id"], "error": None}
        row["response"] = {"status_code": status, "request_id": service.new_id("req"), "body": answer}
        (bad if wrong else good).append(row)
    service.random.shuffle(good)
    for name, rows in (("output_file_id", good), ("error_file_id", bad)):
        if rows:
            data = "\n".join(map(json.dumps, rows)).encode()
            batch[name] = add_file(service, f"{batch['id']}_{name}.jsonl", "batch_output", data)["id"]
    batch["status"] = "expired" if service.expire_after >= 0 else "completed"
    batch["request_counts"] = {"total": len(lines), "completed": len(good), "failed": len(bad)}


async def one_batch(request: Request) -> Response:
    service: Service = request.app.state.service
    found = service.batches.get(request.path_params["id"])
    if found is None:
        return unknown("batch")
    if request.url.path.endswith("/cancel"):
        if found["status"] in ("validating", "in_progress"):
            found["status"] = "cancelling"
        return JSONResponse(shown(found))
    return JSONResponse(progress(service, found))
