import pytest

from reports.search_report import ReportPaths, write_report
from tests.reports.studies import add_results, add_test, make_study, searched_plans


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> ReportPaths:
    """The report of a search like a real one."""
    folder = tmp_path_factory.mktemp("searched")
    classes = [f"class-{i}" for i in range(10)]
    with make_study(folder / "s.db", searched_plans(), classes=classes, n_val=200) as store:
        number = store.best_trial(store.study("pets")).number
        add_results(store, "pets", number, classes, 23)
        add_test(store, "pets", number, 0.88, 0.935)
        return write_report(store, "pets", folder / "report")
