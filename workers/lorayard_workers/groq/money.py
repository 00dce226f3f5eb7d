"""Money of batches at a hosted service: set aside at the most when their lines are made, settled when the lines are read back.

Each step has its batch's name for a token, so that it counts once, whoever does it how often.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from lorayard.hosted import answer_tokens, price, prompt_tokens
from lorayard.ledger.keys import split_ref
from lorayard.ledger.organisation import Held, Organisation
from lorayard.ledger.policies import NOTHING_LEAVES, Policies
from lorayard.settings import Settings
from lorayard_workers.groq.lines import cost_of, name_of, paid_of

DISCOUNT = 0.5


class BatchMoney:
    """`prices`: nano-dollars for a token of a prompt and of an answer, in a batch."""

    def __init__(self, settings: Settings, organisation: Organisation, policies: Policies) -> None:
        usd_in, usd_out = price(settings)
        self.prices = (DISCOUNT * usd_in, DISCOUNT * usd_out)
        self._org = organisation
        self._policies = policies

    def hold(self, batch: str, bodies: Sequence[tuple[str, dict[str, Any]]]) -> Held:
        """Set money aside for jobs (ref and body), as far as there is any: by the names of their lines."""
        policies, wants = self._policies.all(), []
        for ref, body in bodies:
            tenant = split_ref(ref)[0]
            nano = math.ceil(prompt_tokens(body) * self.prices[0] + answer_tokens(body) * self.prices[1])
            wants.append((name_of(ref), tenant, nano, policies.get(tenant, NOTHING_LEAVES).caps))
        return self._org.hold(f"hold:{batch}", wants)

    def held(self, batch: str) -> Held:
        """What somebody has set aside for it, who may not have come to write that down. No more is from now on."""
        return self._org.hold(f"hold:{batch}", [])

    def spent(self, rows: Collection[dict[str, Any]], tenants: Sequence[str], held: dict[str, int], *, missing: bool) -> Counter[str]:
        """Nano-dollars by tenant for every line that was run, whatever has become of its job meanwhile. `tenants` and `held` are of the
        batch, by number and by tenant. `missing`: lines that are not among these rows were run too, at their most."""
        by, unseen = Counter[str](), Counter(held)
        for row in rows:
            paid = paid_of(row)
            if 0 <= paid.tenant < len(tenants):
                by[tenants[paid.tenant]] += cost_of(row, self.prices)
                unseen[tenants[paid.tenant]] -= paid.nano
        return by + +unseen if missing else by  # of nobody less than was seen

    def charge(self, batch: str, adapter: str, date: str, held: dict[str, int], spent: Counter[str]) -> None:
        """What was held by tenant at that date and is not spent is free again. Once a batch."""
        owed = [(tenant, adapter, spent[tenant], held.get(tenant, 0)) for tenant in sorted(spent.keys() | held.keys())]
        if owed:
            self._org.charge(f"batch:{batch}", date, owed)


def by_tenant(held: Held) -> dict[str, int]:
    """Nano-dollars."""
    by: Counter[str] = Counter()
    for tenant, nano in held.held.values():
        by[tenant] += nano
    return dict(by)
