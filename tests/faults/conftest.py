"""A run that nobody disturbed, which the cases of this folder copy."""

import pytest

from tests.faults.runs import Case, case_in


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, server: str) -> Case:
    """A finished run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    case = case_in(folder, {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"})
    ended = case.run()
    assert ended.code == 0, ended.out
    return case
