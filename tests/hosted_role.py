"""The hosted worker in its own process, started by the real command, that dies at a named call where a test orders it (`faults.role`).

    python -m hosted_role worker groq

Its holds are short, so that whoever takes over does so within a test's time.
"""

from __future__ import annotations

from faults.role import always, pointed

from lorayard import cli
from lorayard.adapters.hosting import Publications
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.organisation import Organisation
from lorayard_workers.groq import adapters, batches
from lorayard_workers.groq.client import ServiceClient

CALLS = {
    ServiceClient: ("tunings", "files", "upload", "tune", "delete_tuning", "delete_file", "start_batch", "batch", "content", "batches"),
    Publications: ("tell", "forget"),
    Ledger: ("take", "submit", "note", "contents", "finish", "settle"),
    Organisation: ("hold", "charge"),
}


def main() -> None:
    for owner, names in CALLS.items():
        for name in names:
            pointed(owner, name, name, always)
    adapters.LOCK_S, adapters.SWEEP_S = 0.8, 0.05
    batches.HOLD_S, batches.SWEEP_S = 0.8, 0.05
    cli.main()


if __name__ == "__main__":
    main()
