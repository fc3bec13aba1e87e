"""What every test starts from and must leave behind: an empty parameter store, one thread, default settings."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Clear Pyro's parameter store around the test; fail a test that changes global settings."""
    torch.set_num_threads(1)
    pyro.clear_param_store()
    torch.manual_seed(0)
    dtype, validation = torch.get_default_dtype(), _validation()
    yield
    pyro.clear_param_store()
    found = torch.get_default_dtype(), _validation()
    torch.set_default_dtype(dtype)
    pyro.enable_validation(validation[0])
    assert found[0] == dtype, f"the test left torch's default dtype at {found[0]}"
    assert found[1] == validation, "the test left Pyro's or torch's validation switched"


def _validation() -> tuple[bool, ...]:
    return (
        pyro.settings.get("validate_distributions_pyro"),
        pyro.settings.get("validate_distributions_torch"),
        pyro.settings.get("validate_poutine"),
        pyro.settings.get("validate_infer"),
    )
