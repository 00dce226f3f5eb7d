"""Which tests run when: all of them, in full, with `make faults`; the quick form of some of them in `make test`."""

from __future__ import annotations

import pytest


def fault(*, quick: bool, timeout_s: float = 600.0) -> pytest.MarkDecorator:
    """A row of the table. The test takes `quick`; `quick` says whether there is such a form."""
    full = pytest.param(False, id="full", marks=[pytest.mark.faults, pytest.mark.timeout(timeout_s)])
    forms = [full, *([pytest.param(True, id="quick", marks=pytest.mark.fleet)] if quick else [])]
    return pytest.mark.parametrize("quick", forms)
