"""All settings of all roles, read from the environment (`LORAYARD_*`) once, at each process's entry point."""

from __future__ import annotations

import json
import socket
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lorayard.errors import SetupError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Names of pools, tenants, adapters and workers: they become parts of Redis keys, file names and queue names."""


Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """Frozen. Sizes are in the unit their name ends with; times in seconds (`_s`) or milliseconds (`_ms`)."""

    model_config = SettingsConfigDict(env_prefix="LORAYARD_", frozen=True, extra="ignore")

    # Where things are
    state_dir: Path = Path(".lorayard")
    redis_url: str | None = None  # None: the embedded server of state_dir
    broker_url: str | None = None  # None: the same server as the ledger
    artifacts_url: str | None = None  # None: a folder in state_dir; s3://, gs://, az:// through obstore
    fsync: Literal["always", "everysec"] = "always"  # of the embedded server
    maxmemory_mb: int | None = Field(
        None, ge=0
    )  # of the embedded server, MiB; None: half of what this machine or container has; 0: no limit

    # What is served
    pool: str = Field("main", pattern=NAME_PATTERN)
    model: Path | None = None  # None: the demo model
    model_names: Annotated[tuple[str, ...], NoDecode] = ()  # base names that adapters trained on the model may carry

    # HTTP
    api_host: str = "127.0.0.1"
    api_port: int = Field(8080, ge=1, le=65535)
    api_url: str | None = None  # what clients talk to; None: api_host and api_port of this machine
    api_key: str | None = None  # what clients send; None: the file state_dir/api_key
    flower_host: str = "127.0.0.1"
    flower_port: int = Field(5555, ge=1, le=65535)
    flower_basic_auth: str | None = None
    max_body_bytes: int = Field(200 * 1024 * 1024, ge=1024)
    max_jobs_per_request: int = Field(50_000, ge=1)
    max_job_bytes: int = Field(1024 * 1024, ge=256)
    max_adapter_bytes: int = Field(1024 * 1024 * 1024, ge=1024)  # of an adapter's weights

    # Ledger
    max_queued: int = Field(2_000_000, ge=1)
    max_memory: float = Field(0.85, gt=0, le=1)  # part of the server's maxmemory beyond which jobs are refused
    result_ttl_s: int = Field(7 * 24 * 3600, ge=1)
    max_attempts: int = Field(3, ge=1)
    lease_ms: int = Field(5_000, ge=200)
    delivery_ms: int = Field(5_000, ge=200)  # claimed and not taken after this: queued again, no attempt used
    wait_target_high_s: float = Field(10.0, gt=0)
    wait_target_normal_s: float = Field(120.0, gt=0)
    wait_target_low_s: float = Field(3_600.0, gt=0)
    celery_tenant: str = Field("default", pattern=NAME_PATTERN)  # whose jobs arrive as the Celery task lorayard.infer

    # Scheduler
    leader_ttl_ms: int = Field(3_000, ge=500)
    reserve_s: float = Field(45.0, ge=0)  # jobs go before those that only keep adapters busy from so long before they are due
    batch_s: float = Field(30.0, gt=0)  # what a batch is meant to take at most: it is not interrupted for anything
    batch_rows_per_width: float = Field(2.0, gt=0)  # jobs in a batch, as a multiple of the worker's decode width

    # Worker
    local_worker: bool = True  # whether `lorayard up` starts a llama worker; without one, jobs need a hosted service
    worker_name: str | None = Field(None, pattern=NAME_PATTERN)
    heartbeat_ms: int = Field(1_000, ge=50)
    hang_s: float = Field(60.0, gt=0)  # no decode step, load or result for so long while there is work: the child is killed

    # Hosted service: Groq, or any other host with an OpenAI-compatible API and a model id for each LoRA adapter
    hosted_model: str | None = None  # its id of the pool's base model; None: no job leaves this fleet
    hosted_url: str = "https://api.groq.com/openai/v1"
    hosted_api: Literal["groq", "openai"] = "groq"  # groq: its fields, files, fine-tunings and batches; openai: chat completions alone
    hosted_key: SecretStr | None = None  # None: GROQ_API_KEY
    hosted_org: str = Field("default", pattern=NAME_PATTERN)  # whose limits and money: shared by all workers that say the same name
    hosted_base_names: Annotated[tuple[str, ...], NoDecode] = ()  # what an adapter's base must be called; (): what is known of hosted_model
    hosted_rpm: int = Field(0, ge=0)  # requests a minute; 0, here and in the next three: learned from the service
    hosted_tpm: int = Field(0, ge=0)  # tokens a minute
    hosted_rpd: int = Field(0, ge=0)  # requests a day
    hosted_tpd: int = Field(0, ge=0)
    hosted_unlimited: bool = False  # no limit of the service is to be expected: a dedicated instance, a server of your own
    hosted_prices: Annotated[
        dict[str, tuple[Price, Price]], NoDecode
    ] = {}  # JSON: hosted base model -> dollars for a million tokens of prompts, and of answers
    hosted_daily_usd: float | None = Field(None, ge=0)  # of all tenants together
    hosted_monthly_usd: float | None = Field(None, ge=0)
    hosted_calls: int = Field(500, ge=1, le=5000)  # of one worker at once
    hosted_timeout_s: float = Field(120.0, gt=0)  # for the whole of an answer
    hosted_max_tokens: int = Field(1024, ge=1)  # of an answer whose job does not say
    hosted_idle_s: float = Field(300.0, gt=0)  # after so long without a call of an adapter its next counts as a cold start
    hosted_batches: bool = True  # jobs for which there is time go through the service's batch API, at half price
    hosted_batch_window_s: int = Field(24 * 3600, ge=3600)  # what that may take
    hosted_batch_jobs: int = Field(1000, ge=1, le=50_000)
    hosted_batch_gather_s: float = Field(60.0, ge=0)  # jobs wait so long for others to go in the same batch
    hosted_batch_poll_s: float = Field(30.0, gt=0)

    # llama.cpp
    n_ctx: int = Field(8_192, ge=256)  # KV cells of one context, shared by its sequences
    max_prompt_tokens: int | None = Field(None, ge=1)  # None: n_ctx, or what the model was trained for, whichever is less
    width: int | None = Field(None, ge=1, le=200)  # sequences decoded at once in a context; None: measured at start-up
    share_prefixes: bool = True  # compute what prompts of one tenant and adapter begin with once
    prefixes_kept: int = Field(16, ge=0, le=55)  # beginnings of prompts kept in a context while its adapter is hot; 256 less width and one
    prefix_share: float = Field(0.25, ge=0, le=0.9)  # part of a context's cells that they may hold
    contexts: int = Field(2, ge=1)
    adapters_loaded: int = Field(32, ge=1)  # in memory, ready to be computed with
    adapters_mb: int = Field(2_048, ge=1)  # MiB that they may take, in float32
    adapters_disk_mb: int | None = Field(None, ge=1)  # MiB that adapters' files on a worker's disk may take; None: no limit
    prefill_tokens: int = Field(512, ge=32)  # token budget of one decode call
    threads: int | None = Field(None, ge=1)  # None: all cores, or an equal part of them for each of several workers of `lorayard up`
    llama_workers: int | None = Field(None, ge=1, le=64)  # that `lorayard up` starts; None: what is fastest here (`fleet.usual_workers`)
    n_gpu_layers: int = Field(-1, ge=-1)  # all, where the build has a GPU backend
    main_gpu: int = Field(0, ge=0)  # the one that computes, where the split is "none"; CUDA_VISIBLE_DEVICES says which there are
    gpu_split: Literal["none", "layer", "row"] = "layer"  # over several GPUs: whole layers, or rows of each matrix
    gpu_shares: Annotated[tuple[float, ...], NoDecode] = ()  # what part of the weights each GPU gets, as "3,1"; default: by free memory
    flash_attn: Literal["auto", "on", "off"] = "auto"
    kv_type: Literal["f32", "f16", "q8_0", "q4_0"] = "f16"  # of the KV cache; the last two want flash attention
    repack: bool = True  # ggml's repacked CPU kernels (use_extra_bufts); switched off by the worker where they crash

    @field_validator("model_names", "hosted_base_names", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @field_validator("hosted_prices", mode="before")
    @classmethod
    def _read_prices(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        shape = 'write it as JSON, {"MODEL": [DOLLARS_IN, DOLLARS_OUT]}, for a million tokens'
        try:
            prices = json.loads(value or "{}")
        except ValueError:
            raise ValueError(shape) from None
        pairs = prices.values() if isinstance(prices, dict) else [None]
        if not all(isinstance(pair, list) and [type(usd) in (int, float) for usd in pair] == [True, True] for pair in pairs):
            raise ValueError(shape)
        return prices

    @field_validator("gpu_shares", mode="before")
    @classmethod
    def _split_shares(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @classmethod
    def load(cls) -> Settings:
        """Read the environment. Raises `SetupError` that names the variable at fault."""
        try:
            return cls()
        except ValidationError as error:
            first = error.errors()[0]
            name, *inside = map(str, first["loc"])
            where = f"LORAYARD_{name.upper()}" + (f", at {' '.join(inside)}" if inside else "")
            raise SetupError(f"{where}: {first['msg']} (got {first.get('input')!r})") from None

    @cached_property
    def worker(self) -> str:
        """This worker's name: also its queue's."""
        return self.worker_name or f"llama-{socket.gethostname().split('.')[0]}"[:64]

    def wait_target_ms(self, priority: str) -> int:
        return round(1000 * {"high": self.wait_target_high_s, "low": self.wait_target_low_s}.get(priority, self.wait_target_normal_s))

    @property
    def client_url(self) -> str:
        return (self.api_url or f"http://{self.api_host}:{self.api_port}").rstrip("/")
