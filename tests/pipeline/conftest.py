"""The pipeline tests' repository, made once."""

import pytest
from sandbox import Sandbox, build


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory) -> Sandbox:
    return build(tmp_path_factory.mktemp("plumbline"))
