"""How tests are shared out to workers."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("together")
def test_a_group_reaches_the_scheduler(request):
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("without workers there is nothing to share out")
    assert request.node.nodeid.endswith("@together")
